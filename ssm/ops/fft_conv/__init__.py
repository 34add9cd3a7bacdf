"""The long convolution: see :func:`fft_conv`."""

from ssm.ops.fft_conv.op import BACKENDS, fft_conv

__all__ = ["BACKENDS", "fft_conv"]
