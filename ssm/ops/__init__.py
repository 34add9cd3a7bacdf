"""Operators: every scan, convolution and structured product that a layer needs.

Each operator takes ``(…, *, initial_state=None, lengths=None, cu_seqlens=None,
backend="auto")`` and returns ``(y, final_state)``; batch first, time second, channels
last; both outputs are differentiable in every input.
"""

from ssm._errors import ArgumentError, BackendError
from ssm.ops._dispatch import backends_used
from ssm.ops.add_norm import add_norm
from ssm.ops.causal_conv1d import causal_conv1d, causal_conv1d_step
from ssm.ops.diagonal_ssd import diagonal_ssd, diagonal_ssd_step
from ssm.ops.fft_conv import fft_conv
from ssm.ops.linear_scan import linear_scan
from ssm.ops.linear_step import linear_step
from ssm.ops.matrix_scan import matrix_scan
from ssm.ops.packed_linear import packed_linear
from ssm.ops.parallel_scan import parallel_scan
from ssm.ops.power_sums import power_sums
from ssm.ops.selective_scan import (
    selective_scan,
    selective_scan_fn,
    selective_state_update,
)
from ssm.ops.short_attention import short_attention
from ssm.ops.ssd import ssd, ssd_step

__all__ = [
    "ArgumentError",
    "BackendError",
    "add_norm",
    "backends_used",
    "causal_conv1d",
    "causal_conv1d_step",
    "diagonal_ssd",
    "diagonal_ssd_step",
    "fft_conv",
    "linear_scan",
    "linear_step",
    "matrix_scan",
    "packed_linear",
    "parallel_scan",
    "power_sums",
    "selective_scan",
    "selective_scan_fn",
    "selective_state_update",
    "short_attention",
    "ssd",
    "ssd_step",
]
