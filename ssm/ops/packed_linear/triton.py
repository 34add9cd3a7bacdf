"""The gradient of a bias on the GPU: sums of columns as one kernel.

Some hundred rows are few for a reduction over them: what counts is that all loads are
on their way at once. A program owns a sector, 32 bytes, of every row: 1,024 columns of
float32 are 128 programs, about as many as a large GPU has multiprocessors. Sums are in
float32 and in one order: no atomics.
"""

# Kernels are Triton's language, which its own compiler checks.
# mypy: disable-error-code="no-untyped-def, assignment, unreachable"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear

from ssm.ops._gpu import cdiv, on_device_of, power_of_2
from ssm.ops._library import operator

_SECTOR = 32  # bytes
_ROWS = 1024  # that a program has on their way


@triton.jit
def _sum_columns(x, sums, T, N, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.arange(0, BLOCK_T).to(tl.int64)
    total = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for first in range(0, T, BLOCK_T):
        mask = (first + t < T)[:, None] & (n < N)[None, :]
        place = x + (first + t)[:, None] * N + n[None, :]
        total += tl.load(place, mask=mask, other=0.0).to(tl.float32)
    tl.store(sums + n, tl.sum(total, 0).to(sums.dtype.element_ty), mask=n < N)


@operator("column_sums_triton", device="CompositeExplicitAutograd")
def column_sums(x: Tensor) -> Tensor:
    """sum_t x_tn of (T, N), in float32 and rounded once; differentiable."""
    T, N = x.shape
    sums = x.new_empty(N)
    if x.numel() == 0:
        return sums.zero_()
    x = x.contiguous()
    BLOCK_T, BLOCK_N = min(_ROWS, power_of_2(T)), _SECTOR // x.dtype.itemsize
    warps = max(1, min(8, BLOCK_T * BLOCK_N // 512))
    with on_device_of(x):
        _sum_columns[(cdiv(N, BLOCK_N),)](
            x, sums, T, N, BLOCK_T=BLOCK_T, BLOCK_N=BLOCK_N, num_warps=warps
        )
    return sums


@column_sums.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], _: Tensor) -> None:
    ctx.shape = inputs[0].shape


def _differentiate(ctx: Any, above: Tensor) -> Tensor:
    return above.expand(ctx.shape)


column_sums.register_autograd(_differentiate, setup_context=_save)


class _Linear(torch.autograd.Function):
    """PyTorch's products in both directions, and :func:`column_sums`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        with torch.autocast(x.device.type, enabled=False):  # as the backward pass is
            return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        return (
            dy @ weight if for_x else None,
            dy.mT @ x if for_weight else None,
            column_sums(dy) if for_bias else None,
        )


def packed_linear_triton(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """W x + bias; differentiable any number of times."""
    y: Tensor = _Linear.apply(x, weight, bias)
    return y
