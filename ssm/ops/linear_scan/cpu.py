"""The linear scan compiled by Numba: channels innermost, so that they fill the vector
units; rows and blocks of channels on all cores. Needs no compiler on the machine.
"""

import numba
import numpy as np
import torch
from torch import Tensor

from ssm.ops._adjoint import adjoint_scan
from ssm.ops._library import operator
from ssm.ops._numba import array, start_threads

start_threads()

_BLOCK = 64  # channels a task scans at once: its state stays in registers or L1


@numba.njit(parallel=True, cache=True, nogil=True)
def _scan(a, b, h0, h):  # type: ignore[no-untyped-def]  # numba infers the types
    rows, L, C = b.shape
    blocks = (C + _BLOCK - 1) // _BLOCK
    for task in numba.prange(rows * blocks):
        row = task // blocks
        low = task % blocks * _BLOCK
        high = min(low + _BLOCK, C)
        state = h0[row, low:high].copy()
        for t in range(L):
            for c in range(high - low):
                state[c] = a[row, t, low + c] * state[c] + b[row, t, low + c]
                h[row, t, low + c] = state[c]


@operator("linear_scan_cpu")
def _linear_scan(a: Tensor, b: Tensor, initial_state: Tensor) -> Tensor:
    h = torch.empty_like(b, memory_format=torch.contiguous_format)
    rows, L = b.shape[:2]
    flat = (rows, L, int(np.prod(b.shape[2:])))
    _scan(
        array(a).reshape(flat),
        array(b).reshape(flat),
        array(initial_state).reshape(rows, flat[2]),
        h.numpy().reshape(flat),
    )
    return h


@_linear_scan.register_fake
def _(a: Tensor, b: Tensor, initial_state: Tensor) -> Tensor:
    return torch.empty_like(b, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]  # torch.library's hook
    a, _, initial_state = inputs
    ctx.save_for_backward(a, initial_state, output)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]  # torch.library's hook
    a, initial_state, states = ctx.saved_tensors
    return adjoint_scan(linear_scan_cpu, a, initial_state, states, grad)


_linear_scan.register_autograd(_backward, setup_context=_save)


def linear_scan_cpu(a: Tensor, b: Tensor, initial_state: Tensor) -> Tensor:
    """Every state of the scan; differentiable, twice too."""
    return _linear_scan(a, b, initial_state)
