"""h_t = a_t * h_{t-1} + b_t: see :func:`linear_scan`."""

from ssm.ops.linear_scan.op import BACKENDS, linear_scan

__all__ = ["BACKENDS", "linear_scan"]
