"""Sequences of different lengths with their positions behind each other.

Parts of (B, L) sequences are packed into T = sum B L rows for what acts on positions
one by one, and filled up to one length for what mixes them. A step on 32 words of 20
elements and 32 pairs has 704 positions packed and 1,280 filled up.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ssm.ops.short_attention import Parts


def parts_of(xs: Sequence[Tensor]) -> Parts:
    """What is to be packed: tensors (B, L, …)."""
    return tuple((x.shape[0], x.shape[1]) for x in xs)


def pack(x: Float[Tensor, "B L *C"], parts: Parts) -> Float[Tensor, "T *C"]:
    """The positions that are no filling; the inverse of :func:`fill_up`."""
    return x.flatten(0, 1) if len(parts) == 1 else _Pack.apply(x, parts)


def fill_up(x: Float[Tensor, "T *C"], parts: Parts) -> Float[Tensor, "B L *C"]:
    """All sequences, with zeros behind the ends of the shorter ones."""
    return x.unflatten(0, parts[0]) if len(parts) == 1 else _FillUp.apply(x, parts)


def unpack(x: Float[Tensor, "T *C"], parts: Parts) -> list[Tensor]:
    """Each part (B, L, …) by itself."""
    # whole, it needs no copy of the gradient
    split = [x] if len(parts) == 1 else x.split([B * L for B, L in parts])
    return [each.unflatten(0, part) for each, part in zip(split, parts, strict=True)]


# Derivatives of their own: each is the other's transpose, three kernels at most, where
# those of slices would add up tensors of zeros.


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: Parts) -> Tensor:
        ctx.parts = parts
        rows = x.split([B for B, _ in parts])
        lengths = [L for _, L in parts]
        return torch.cat(
            [own[:, :L].flatten(0, 1) for own, L in zip(rows, lengths, strict=True)]
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _FillUp.apply(grad, ctx.parts), None


class _FillUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: Parts) -> Tensor:
        ctx.parts = parts
        B, L = sum(b for b, _ in parts), max(length for _, length in parts)
        filled = x.new_zeros(B, L, *x.shape[1:])
        rows = filled.split([b for b, _ in parts])
        for own, given in zip(rows, unpack(x, parts), strict=True):
            own[:, : given.shape[1]] = given
        return filled

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Pack.apply(grad, ctx.parts), None
