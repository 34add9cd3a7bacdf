"""The short depthwise convolution: see :func:`causal_conv1d`."""

from ssm.ops.causal_conv1d.op import BACKENDS, causal_conv1d, causal_conv1d_step

__all__ = ["BACKENDS", "causal_conv1d", "causal_conv1d_step"]
