"""h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T, y_t = h_t C_t: see :func:`ssd`."""

from ssm.ops.ssd.op import BACKENDS, ssd, ssd_step

__all__ = ["BACKENDS", "ssd", "ssd_step"]
