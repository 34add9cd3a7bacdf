"""The short causal convolution in CUDA C++ (``kernels.cu``), compiled at first use.

For 2 to 4 taps on channels in eights, from zeros: what the models of this library train
with. Inputs float32, bfloat16 or float16, sums float32. Saved for the backward pass are
the inputs alone.
"""

import functools
import struct
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssm.ops._gpu import cdiv, multiprocessors, on_device_of
from ssm.ops._library import operator
from ssm.ops._nvrtc import Kernel, kernel

SOURCE = Path(__file__).with_name("kernels.cu")

_IO = {torch.float32: 32, torch.float16: 16, torch.bfloat16: 17}
_CHANNELS = 64  # of a warp
_SUMS, _PARTS = 32, 8  # that a block of ``add_up`` leaves; warps that share them
_pack = struct.Struct("20q").pack  # the struct Args of kernels.cu


class Plan(NamedTuple):
    """How the work is laid out, in the letters of kernels.cu."""

    WARPS: int  # of a block
    BLOCKS: int  # wanted on a multiprocessor
    R: int  # rows of a stage
    SLOTS: int  # stages under way
    steps: tuple[int, ...]  # of a warp: the first with which there are enough blocks


# Found best on an H200: docs/kernels/causal_conv1d.md.
FORWARD = Plan(4, 8, 4, 4, (32, 16))
BACKWARD = Plan(4, 5, 4, 6, (64, 32, 16))


def definitions(plan: Plan, io: int, W: int, *, silu: bool) -> dict[str, int]:
    """What kernels.cu is compiled with, by its names."""
    letters = plan._asdict()
    del letters["steps"]
    return {"IO": io, "W": W, "SILU": int(silu), "PARTS": _PARTS} | letters


@functools.cache
def _kernel(name: str, device: int, dtype: torch.dtype, W: int, silu: bool) -> Kernel:
    plan = FORWARD if name == "forward" else BACKWARD
    given = tuple(definitions(plan, _IO[dtype], W, silu=silu).items())
    warps = _PARTS if name == "add_up" else plan.WARPS
    shared = shared_memory(name, dtype.itemsize, W)
    return kernel(SOURCE, given, name, device, 32 * warps, shared)


def shared_memory(name: str, itemsize: int, W: int) -> int:
    """Bytes a block: the rings of its warps, or the sums that they leave there."""
    row = _CHANNELS * itemsize
    if name == "forward":
        return FORWARD.WARPS * FORWARD.SLOTS * FORWARD.R * row
    if name == "backward":
        rings = 2 * BACKWARD.SLOTS * BACKWARD.R * row
        return BACKWARD.WARPS * max(rings, (W + 1) * _CHANNELS * 4)
    return _PARTS * _SUMS * 4


def tiling(plan: Plan, B: int, L: int, D: int, count: int) -> tuple[int, int, int]:
    """(steps of a warp, pieces of time, blocks), for so many multiprocessors."""
    columns = B * cdiv(D, _CHANNELS)
    for steps in plan.steps:
        pieces = cdiv(L, steps * plan.WARPS)
        if columns * pieces >= plan.BLOCKS * count:
            break
    return steps, pieces, columns * pieces


def _placed(x: Tensor) -> Tensor:
    """Channels side by side and rows at multiples of 16 bytes; x itself if so."""
    size = x.element_size()
    strides = x.stride()
    there = (
        strides[2] == 1
        and not (x.data_ptr() | strides[0] * size | strides[1] * size) & 15
    )
    return x if there else x.clone(memory_format=torch.contiguous_format)


@operator("causal_conv1d_cuda", device="CUDA")
def _conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    y, final = found = _outputs(x, weight)
    if y.numel() == 0:
        return found
    x, weight = _placed(x), weight.contiguous()
    (B, L, D), W = x.shape, weight.shape[1]
    device = x.get_device()
    steps, pieces, blocks = tiling(FORWARD, B, L, D, multiprocessors(device))
    arguments = _pack(
        *(x.data_ptr(), weight.data_ptr(), _address(bias), 0, 0),
        *(y.data_ptr(), final.data_ptr(), 0, 0, 0, 0),
        *(x.stride(0), x.stride(1), 0, 0, L, D, steps, pieces, 0),
    )
    with on_device_of(x):
        run = _kernel("forward", device, x.dtype, W, silu)
        run(blocks, arguments, torch._C._cuda_getCurrentRawStream(device))
    return found


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _outputs(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    B, L, D = x.shape
    return x.new_empty(B, L, D), x.new_empty(B, weight.shape[1] - 1, D)


@_conv.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    return _outputs(x, weight)


@operator("causal_conv1d_cuda_backward", device="CUDA")
def _conv_backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
) -> list[Tensor]:
    found = _gradients(x, weight, bias)
    if x.numel() == 0:
        return [gradient.zero_() for gradient in found]
    dx, dweight, *dbias = found
    x, dy, weight = _placed(x), _placed(dy), weight.contiguous()
    dfinal = None if dfinal is None else dfinal.contiguous()
    (B, L, D), W = x.shape, weight.shape[1]
    device = x.get_device()
    steps, pieces, blocks = tiling(BACKWARD, B, L, D, multiprocessors(device))
    n = B * pieces
    shares = weight.new_empty(n, W + 1, D)
    arguments = _pack(
        *(x.data_ptr(), weight.data_ptr(), _address(bias), dy.data_ptr()),
        *(_address(dfinal), 0, 0, dx.data_ptr(), dweight.data_ptr()),
        *(dbias[0].data_ptr() if dbias else 0, shares.data_ptr()),
        *(x.stride(0), x.stride(1), dy.stride(0), dy.stride(1)),
        *(L, D, steps, pieces, n),
    )
    stream = torch._C._cuda_getCurrentRawStream(device)
    with on_device_of(x):
        _kernel("backward", device, x.dtype, W, silu)(blocks, arguments, stream)
        add_up = _kernel("add_up", device, x.dtype, W, silu)
        add_up(cdiv((W + 1) * D, _SUMS), arguments, stream)
    return found


def _gradients(x: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    """Unwritten gradients of the operands that are there, in their order."""
    operands = (x, weight) if bias is None else (x, weight, bias)
    return [
        torch.empty_like(operand, memory_format=torch.contiguous_format)
        for operand in operands
    ]


@_conv_backward.register_fake
def _(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
) -> list[Tensor]:
    return _gradients(x, weight, bias)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.silu = inputs[3]
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, dy: Tensor | None, dfinal: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    dx, dweight, *dbias = _conv_backward(dy, dfinal, x, weight, bias, ctx.silu)
    return dx, dweight, dbias[0] if dbias else None, None


_conv.register_autograd(_differentiate, setup_context=_save)
_conv_backward.refuse_backward("causal_conv1d", "cuda")


def causal_conv1d_cuda(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    """The convolution, and the last W - 1 inputs; differentiable once.

    x (B, L, D), D a multiple of 8, weight (D, W), W from 2 to 4, bias (D,).
    """
    return _conv(x, weight.float(), None if bias is None else bias.float(), silu)
