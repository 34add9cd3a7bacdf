"""A residual added and the sum normalised, on the GPU: one kernel, a program a row."""

# Kernels are Triton's language, which its own compiler checks.
# mypy: disable-error-code="no-untyped-def, assignment, unreachable"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm.ops._gpu import on_device_of, power_of_2
from ssm.ops._library import operator
from ssm.ops.add_norm.torch import add_norm_torch


@triton.jit
def _add_norm(
    x,
    added,
    weight,
    total,
    normed,
    D,
    eps,
    HAS_ADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * D
    d = tl.arange(0, BLOCK)
    mask = d < D
    value = tl.load(x + row + d, mask=mask, other=0.0).to(tl.float32)
    if HAS_ADDED:
        value += tl.load(added + row + d, mask=mask, other=0.0).to(tl.float32)
    # what is normalised is what is kept: the sum as its dtype holds it
    kept = value.to(total.dtype.element_ty)
    tl.store(total + row + d, kept, mask=mask)
    value = kept.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / D + eps)
    w = tl.load(weight + d, mask=mask, other=0.0).to(tl.float32)
    tl.store(
        normed + row + d, (value * scale * w).to(normed.dtype.element_ty), mask=mask
    )


@operator("add_norm_triton", device="CompositeExplicitAutograd")
def _sum_normed(
    x: Tensor, added: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    found = _outputs(x, added, weight)
    if x.numel() == 0:
        return found
    D = x.shape[-1]
    x, weight = x.contiguous(), weight.contiguous()
    added = None if added is None else added.contiguous()
    BLOCK = max(16, power_of_2(D))
    with on_device_of(x):
        _add_norm[(x.numel() // D,)](
            x, added, weight, *found, D, eps, HAS_ADDED=added is not None,
            BLOCK=BLOCK, num_warps=4 if BLOCK <= 4096 else 8,
        )  # fmt: skip
    return found


def _outputs(x: Tensor, added: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    wide = x.dtype if added is None else torch.promote_types(x.dtype, added.dtype)
    shape = x.shape
    return x.new_empty(shape, dtype=wide), x.new_empty(shape, dtype=weight.dtype)


@_sum_normed.register_fake
def _(
    x: Tensor,
    added: Tensor | None,
    weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return _outputs(x, added, weight)


def _save(ctx: Any, inputs: tuple[Any, ...], _: tuple[Tensor, Tensor]) -> None:
    *operands, ctx.eps = inputs
    ctx.save_for_backward(*operands)


def _differentiate(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
    """Through PyTorch's operations: nothing here is made to train with."""
    with torch.enable_grad():
        operands: list[Any] = [
            x if x is None else x.detach() for x in ctx.saved_tensors
        ]
        leaves = [x.requires_grad_() for x in operands if x is not None]
        outputs = add_norm_torch(operands[0], operands[1], operands[2], ctx.eps)
        found = iter(torch.autograd.grad(outputs, leaves, above))
    return *(None if x is None else next(found) for x in operands), None


_sum_normed.register_autograd(_differentiate, setup_context=_save)


def add_norm_triton(
    x: Tensor, added: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The sum, and it normalised; differentiable once."""
    return _sum_normed(x, added, weight, eps)
