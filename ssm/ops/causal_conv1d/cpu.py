"""The short causal convolution compiled by Numba: rows and stretches of time on all
cores, channels innermost, so that they fill the vector units. Needs no compiler on the
machine. The activation is PyTorch's, whose exponential is vectorised.
"""

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import silu as apply_silu

from ssm.ops._library import operator
from ssm.ops._numba import array, start_threads

start_threads()

_STEPS = 64  # of one task; fixed, so that sums do not depend on the number of cores


@numba.njit(parallel=True, cache=True, nogil=True)
def _correlate(x, weight, bias, history, z):  # type: ignore[no-untyped-def]
    rows, L, D = x.shape
    back = history.shape[1]
    chunks = (L + _STEPS - 1) // _STEPS
    for task in numba.prange(rows * chunks):
        row = task // chunks
        low = task % chunks * _STEPS
        for t in range(low, min(low + _STEPS, L)):
            for c in range(D):
                z[row, t, c] = bias[c]
            for w in range(back + 1):
                source = t + w - back
                if source < 0:
                    for c in range(D):
                        z[row, t, c] += weight[w, c] * history[row, t + w, c]
                else:
                    for c in range(D):
                        z[row, t, c] += weight[w, c] * x[row, source, c]


@numba.njit(parallel=True, cache=True, nogil=True)
def _gradients(grad, x, weight, history, dx, dhistory, sums):  # type: ignore[no-untyped-def]
    """dx and dhistory; into sums, each task's share of the taps' and bias's gradient.

    dx and dhistory are the reversed correlation; sums is (tasks, W + 1, D), zeros.
    """
    rows, L, D = x.shape
    back = history.shape[1]
    chunks = (L + _STEPS - 1) // _STEPS
    for task in numba.prange(rows * chunks):
        row = task // chunks
        low = task % chunks * _STEPS
        for j in range(back if low == 0 else 0):
            for w in range(max(j - L + 1, 0), j + 1):
                for c in range(D):
                    dhistory[row, j, c] += weight[w, c] * grad[row, j - w, c]
        for t in range(low, min(low + _STEPS, L)):
            for w in range(back + 1):
                source, target = t + w - back, t + back - w
                if target < L:
                    for c in range(D):
                        dx[row, t, c] += weight[w, c] * grad[row, target, c]
                if source < 0:
                    for c in range(D):
                        sums[task, w, c] += grad[row, t, c] * history[row, t + w, c]
                else:
                    for c in range(D):
                        sums[task, w, c] += grad[row, t, c] * x[row, source, c]
            for c in range(D):
                sums[task, back + 1, c] += grad[row, t, c]


@operator("causal_conv1d_cpu")
def _conv(
    x: Tensor, weight: Tensor, bias: Tensor, initial_state: Tensor, silu: bool
) -> Tensor:
    z = _preactivation(x, weight, bias, initial_state)
    return apply_silu(z, inplace=True) if silu else z


def _preactivation(
    x: Tensor, weight: Tensor, bias: Tensor, initial_state: Tensor
) -> Tensor:
    z = torch.empty_like(x, memory_format=torch.contiguous_format)
    _correlate(array(x), array(weight.T), array(bias), array(initial_state), z.numpy())
    return z


@operator("causal_conv1d_cpu_backward")
def _conv_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    initial_state: Tensor,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if silu:
        z = _preactivation(x, weight, bias, initial_state)
        grad = torch.ops.aten.silu_backward(grad, z)
    rows, L, D = x.shape
    dx = torch.zeros_like(x, memory_format=torch.contiguous_format)
    dhistory = torch.zeros_like(initial_state, memory_format=torch.contiguous_format)
    sums = np.zeros((rows * -(-L // _STEPS), weight.shape[1] + 1, D), dx.numpy().dtype)
    taps, past = array(weight.T), array(initial_state)
    _gradients(array(grad), array(x), taps, past, dx.numpy(), dhistory.numpy(), sums)
    total = torch.from_numpy(sums).sum(0)
    return dx, total[:-1].T.contiguous(), total[-1].clone(), dhistory


@_conv.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, initial_state: Tensor, silu: bool
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_conv_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    initial_state: Tensor,
    silu: bool,
) -> tuple[Tensor, ...]:
    operands = (x, weight, bias, initial_state)
    return tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor in operands
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.silu = inputs[4]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_conv_backward(grad, *ctx.saved_tensors, ctx.silu), None


_conv.register_autograd(_backward, setup_context=_save)
_conv_backward.refuse_backward("causal_conv1d")


def causal_conv1d_cpu(
    x: Tensor, weight: Tensor, bias: Tensor, initial_state: Tensor, silu: bool
) -> Tensor:
    """The convolution, through silu where asked; differentiable once."""
    return _conv(x, weight, bias, initial_state, silu)
