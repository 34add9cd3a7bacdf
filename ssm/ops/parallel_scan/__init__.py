"""The associative scan with a general combine: see :func:`parallel_scan`."""

from ssm.ops.parallel_scan.op import BACKENDS, parallel_scan

__all__ = ["BACKENDS", "parallel_scan"]
