"""h_t = A_t h_{t-1} + b_t with matrices A_t: see :func:`matrix_scan`."""

from ssm.ops.matrix_scan.op import BACKENDS, matrix_scan

__all__ = ["BACKENDS", "matrix_scan"]
