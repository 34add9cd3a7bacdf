"""Products of a matrix with a few vectors on the GPU: bound by reading the matrix.

Libraries' products are made for many columns: in a model of 768 channels each takes 3.5
to 5 us of an H200, where reading its matrix takes one. Here a program reads BN rows of
the matrix, all loads on their way before the first is used, against every vector.
"""

# Kernels are Triton's language, which its own compiler checks.
# mypy: disable-error-code="no-untyped-def, assignment, unreachable"

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ssm.ops._gpu import cdiv, on_device_of, power_of_2
from ssm.ops._library import operator

_TILE = 4096  # numbers of the matrix that a program has on their way
_PROGRAMS = 128  # fewer rows each, rather than fewer programs


@triton.jit
def _product(
    x, weight, bias, y, N, x_m, w_n,
    M: tl.constexpr, K: tl.constexpr, HAS_BIAS: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = weight + n.to(tl.int64)[:, None] * w_n
    sums = ()
    for _ in tl.static_range(M):
        sums += (tl.zeros((BN,), tl.float32),)
    for first in tl.static_range(0, K, BK):
        k = first + tl.arange(0, BK)
        mask = (n < N)[:, None] & (k < K)[None, :]
        tile = tl.load(rows + k[None, :], mask=mask, other=0.0).to(tl.float32)
        added = ()
        for m in tl.static_range(M):
            vector = tl.load(x + m * x_m + k, mask=k < K, other=0.0).to(tl.float32)
            added += (sums[m] + tl.sum(tile * vector[None, :], 1),)
        sums = added
    shift = tl.zeros((BN,), tl.float32)
    if HAS_BIAS:
        shift += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    for m in tl.static_range(M):
        total = (sums[m] + shift).to(y.dtype.element_ty)
        tl.store(y + m * N + n, total, mask=n < N)


@operator("linear_step_triton", device="CompositeExplicitAutograd")
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    (M, K), N = x.shape, weight.shape[0]
    y = x.new_empty(M, N)
    if y.numel() == 0 or K == 0:
        return y.zero_() if bias is None else y.copy_(bias.expand(M, N))
    x = x if x.stride(1) == 1 else x.contiguous()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    BK = min(512, power_of_2(K))
    BN = max(1, min(_TILE // BK, power_of_2(cdiv(N, _PROGRAMS))))
    with on_device_of(x):
        _product[(cdiv(N, BN),)](
            x, weight, bias, y, N, x.stride(0), weight.stride(0),
            M=M, K=K, HAS_BIAS=bias is not None, BN=BN, BK=BK,
        )  # fmt: skip
    return y


@_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _save(ctx: Any, inputs: tuple[Any, ...], _: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """By PyTorch's own products: nothing here is made to train with."""
    x, weight, bias = ctx.saved_tensors
    return dy @ weight, dy.mT @ x, None if bias is None else dy.sum(0)


_linear.register_autograd(_differentiate, setup_context=_save)


def linear_step_triton(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """W x + bias of a few rows; differentiable."""
    return _linear(x, weight, bias)
