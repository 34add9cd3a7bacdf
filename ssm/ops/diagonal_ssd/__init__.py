"""h_t = diag(a_t) h_{t-1} + k_t v_t^T, y_t = q_t^T h_t: see :func:`diagonal_ssd`."""

from ssm.ops.diagonal_ssd.op import BACKENDS, diagonal_ssd, diagonal_ssd_step

__all__ = ["BACKENDS", "diagonal_ssd", "diagonal_ssd_step"]
