"""Attention of packed sequences on the GPU: one kernel forward, one back.

By PyTorch's operations, heads of 16 channels and words of 20 positions are copies into
sequences and heads, products without tensor cores and elementwise kernels on weights
that are read from memory again. Here a program reads a tile of rows of one head where
they lie and keeps the tile's weights in registers. Whole sequences fill a tile, as many
as fit: weights of positions in different ones are 0, as those of later positions are.
The backward pass forms the weights again; every row of the gradient belongs to one
program: no atomics, the same bits in every run.

Dropout is drawn by Philox (Salmon et al. 2011, "Parallel random numbers: as easy as 1,
2, 3"; 7 rounds, the fewest without a failed test there) from a seed in GPU memory that
PyTorch's generator draws: it follows ``torch.manual_seed``, and every replay of a CUDA
graph has another one. The counter of a weight is its row, head and column in the tile:
both passes, which have the same tiles, drop the same weights.
"""

# Kernels are Triton's language, which its own compiler checks.
# mypy: disable-error-code="no-untyped-def, assignment, unreachable"

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm.ops._gpu import cdiv, on_device_of, power_of_2
from ssm.ops._library import operator
from ssm.ops.short_attention.torch import Parts

_SMALLEST = 16  # a side of a product
_MOST_PARTS = 4  # of a launch: each number of them is a kernel of its own
_LARGEST_SEED = 2**63 - 1
_PRODUCTS = {  # of the numbers as they come
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
}


@triton.jit
def _tile(tile, row, parts):
    """First row, end of the rows, and length of the sequences of this tile."""
    first, end, length = 0, 0, 1
    for n in tl.static_range(0, len(parts), 4):
        here = (tile >= 0) & (tile < parts[n])  # tiles, rows, rows of a tile, length
        begin = row + tile * parts[n + 2]
        last = tl.minimum(begin + parts[n + 2], row + parts[n + 1])
        first, end = tl.where(here, begin, first), tl.where(here, last, end)
        length = tl.where(here, parts[n + 3], length)
        tile -= parts[n]
        row += parts[n + 1]
    return first, end, length


@triton.jit
def _rows(base, stride, first, end, i, P: tl.constexpr, BLOCK_P: tl.constexpr):
    """Where a tile's rows of one head stand, and which of them there are."""
    p = tl.arange(0, BLOCK_P)
    place = base + (first + i).to(tl.int64)[:, None] * stride + p[None, :]
    return place, (first + i < end)[:, None] & (p < P)[None, :]


@triton.jit
def _softmax(
    q, k, i, length, scale, BLOCK: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """softmax(q k scale) over the positions of the same sequence up to each.

    Rows behind the last are 0 and see at least themselves, so that no sum is 0.
    """
    j = tl.arange(0, BLOCK)
    seen = (i // length)[:, None] == (j // length)[None, :]
    seen &= j[None, :] <= i[:, None]
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    scores = tl.where(seen, scores, -float("inf"))
    exps = tl.exp(scores - tl.max(scores, 1)[:, None])
    return exps * (1 / tl.sum(exps, 1))[:, None]


@triton.jit
def _factors(seed, first, head, i, least, factor, BLOCK: tl.constexpr):
    """``factor`` for weights whose number, from -2^31, is ``least`` or more; else 0.

    Philox gives four numbers at once, of columns side by side.
    """
    four = tl.arange(0, BLOCK // 4)
    row = (first + i)[:, None] + four[None, :] * 0
    column = four[None, :] + i[:, None] * 0
    zero = column * 0
    a, b, c, d = tl.philox(tl.load(seed), column, row, zero + head, zero, 7)
    drawn = tl.join(tl.join(a, b), tl.join(c, d)).reshape(BLOCK, BLOCK)
    return tl.where(drawn.to(tl.int32, bitcast=True) >= least, factor, 0.0)


@triton.jit
def _forward(
    qkv, seed, y, M, row, parts, scale, least, factor,
    HAS_DROPOUT: tl.constexpr, T: tl.constexpr, PRECISION: tl.constexpr,
    P: tl.constexpr, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % M
    first, end, length = _tile(tl.program_id(0) // M, row, parts)
    i = tl.arange(0, BLOCK)
    place, there = _rows(qkv + head * P, 3 * M * P, first, end, i, P, BLOCK_P)
    q = tl.load(place, mask=there, other=0.0).to(T)
    k = tl.load(place + M * P, mask=there, other=0.0).to(T)
    v = tl.load(place + 2 * M * P, mask=there, other=0.0).to(T)
    weights = _softmax(q, k, i, length, scale, BLOCK, PRECISION)
    if HAS_DROPOUT:
        weights *= _factors(seed, first, head, i, least, factor, BLOCK)
    values = tl.dot(weights.to(T), v, input_precision=PRECISION)
    place, there = _rows(y + head * P, M * P, first, end, i, P, BLOCK_P)
    tl.store(place, values.to(y.dtype.element_ty), mask=there)


@triton.jit
def _backward(
    dy, qkv, seed, dqkv, M, row, parts, scale, least, factor,
    HAS_DROPOUT: tl.constexpr, T: tl.constexpr, PRECISION: tl.constexpr,
    P: tl.constexpr, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % M
    first, end, length = _tile(tl.program_id(0) // M, row, parts)
    i = tl.arange(0, BLOCK)
    place, there = _rows(qkv + head * P, 3 * M * P, first, end, i, P, BLOCK_P)
    q = tl.load(place, mask=there, other=0.0).to(T)
    k = tl.load(place + M * P, mask=there, other=0.0).to(T)
    v = tl.load(place + 2 * M * P, mask=there, other=0.0).to(T)
    place, _ = _rows(dy + head * P, M * P, first, end, i, P, BLOCK_P)
    above = tl.load(place, mask=there, other=0.0).to(T)
    place, _ = _rows(dqkv + head * P, 3 * M * P, first, end, i, P, BLOCK_P)
    to = dqkv.dtype.element_ty

    weights = _softmax(q, k, i, length, scale, BLOCK, PRECISION)
    dweights = tl.dot(above, tl.trans(v), input_precision=PRECISION)
    dropped = weights
    if HAS_DROPOUT:
        factors = _factors(seed, first, head, i, least, factor, BLOCK)
        dropped, dweights = weights * factors, dweights * factors
    dv = tl.dot(tl.trans(dropped.to(T)), above, input_precision=PRECISION)
    tl.store(place + 2 * M * P, dv.to(to), mask=there)
    mean = tl.sum(weights * dweights, 1)
    dscores = (weights * (dweights - mean[:, None]) * scale).to(T)
    dq = tl.dot(dscores, k, input_precision=PRECISION)
    tl.store(place, dq.to(to), mask=there)
    dk = tl.dot(tl.trans(dscores), q, input_precision=PRECISION)
    tl.store(place + M * P, dk.to(to), mask=there)


def _launches(parts: list[int], BLOCK: int) -> Iterator[tuple[int, int, list[int]]]:
    """First row, tiles, and for each part its tiles, rows, rows of a tile, length."""
    pairs = [(B, L) for B, L in zip(parts[::2], parts[1::2], strict=True) if B * L]
    row = 0
    for n in range(0, len(pairs), _MOST_PARTS):
        described: list[int] = []
        for B, L in pairs[n : n + _MOST_PARTS]:
            described += [cdiv(B, BLOCK // L), B * L, BLOCK // L * L, L]
        yield row, sum(described[::4]), described
        row += sum(described[1::4])


def _launch(
    kernel: Any, tensors: tuple[Any, ...], qkv: Tensor, parts: list[int], share: float
) -> None:
    """A program for every tile and head; ``tensors`` are the kernel's first."""
    M, P = qkv.shape[2:]
    pairs = zip(parts[::2], parts[1::2], strict=True)
    longest = max([0, *(L for B, L in pairs if B)])
    BLOCK, BLOCK_P = (max(_SMALLEST, power_of_2(n)) for n in (longest, P))
    warps = max(1, BLOCK * max(BLOCK, BLOCK_P) // 1024)
    # Triton's interpreter, on the CPU, does not multiply bfloat16
    T = _PRODUCTS[qkv.dtype] if qkv.is_cuda else tl.float32
    least = min(round(share * 2**32), 2**32 - 1) - 2**31
    with on_device_of(qkv):
        for row, tiles, described in _launches(parts, BLOCK):
            kernel[(tiles * M,)](
                *tensors, M, row, tuple(described), P**-0.5, least, 1 / (1 - share),
                HAS_DROPOUT=share > 0, T=T, PRECISION=_precision(), P=P,
                BLOCK=BLOCK, BLOCK_P=BLOCK_P, num_warps=min(warps, 8),
            )  # fmt: skip


def _precision() -> str:
    """Of products of float32, as PyTorch's own are at the time."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@operator("short_attention_triton", device="CompositeExplicitAutograd")
def _attend(qkv: Tensor, seed: Tensor | None, parts: list[int], share: float) -> Tensor:
    qkv = qkv.contiguous()
    y = torch.empty_like(qkv[:, 0], memory_format=torch.contiguous_format)
    if y.numel():
        _launch(_forward, (qkv, seed, y), qkv, parts, share)
    return y


@_attend.register_fake
def _(qkv: Tensor, seed: Tensor | None, parts: list[int], share: float) -> Tensor:
    T, _, M, P = qkv.shape
    return qkv.new_empty(T, M, P)


@operator("short_attention_triton_backward", device="CompositeExplicitAutograd")
def _attend_backward(
    dy: Tensor, qkv: Tensor, seed: Tensor | None, parts: list[int], share: float
) -> Tensor:
    qkv, dy = qkv.contiguous(), dy.contiguous()
    dqkv = torch.empty_like(qkv)
    if qkv.numel():
        _launch(_backward, (dy, qkv, seed, dqkv), qkv, parts, share)
    return dqkv


@_attend_backward.register_fake
def _(
    dy: Tensor, qkv: Tensor, seed: Tensor | None, parts: list[int], share: float
) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], _: Tensor) -> None:
    qkv, seed, ctx.parts, ctx.share = inputs
    ctx.save_for_backward(qkv, seed)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dqkv = _attend_backward(dy, *ctx.saved_tensors, ctx.parts, ctx.share)
    return dqkv, None, None, None


_attend.register_autograd(_differentiate, setup_context=_save)
_attend_backward.refuse_backward("short_attention", "triton")


def short_attention_triton(qkv: Tensor, parts: Parts, share: float) -> Tensor:
    """The heads' values; differentiable once."""
    seed = None
    if share > 0:
        seed = torch.randint(_LARGEST_SEED, (1,), device=qkv.device)
    return _attend(qkv, seed, [n for part in parts for n in part], share)
