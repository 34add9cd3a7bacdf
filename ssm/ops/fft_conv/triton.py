"""The long convolution of short sequences on the GPU: sums of products, no transform.

A transform of some hundred steps is a dozen kernels that the GPU waits for and not much
else; the L^2 / 2 products of every channel are one. A program owns a stretch of time
and a block of channels and goes through the taps; inputs come from the L1 cache again
and again. The same kernel, looking ahead instead of back, is the gradient of the
inputs. The gradient of the taps is summed over time and some rows of the batch by each
program; PyTorch adds the programs' shares in a fixed order: no atomics.

D, which a tap at lag 0 is, too, is added to that one.
"""

# Kernels are Triton's language, which its own compiler checks.
# mypy: disable-error-code="no-untyped-def, assignment, unreachable"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm.ops._gpu import cdiv, on_device_of
from ssm.ops._library import operator

_STEPS, _CHANNELS = 16, 64  # of a program
_BACK_STEPS, _BACK_CHANNELS, _LAGS = 32, 32, 4  # of one that sums taps' gradients
_PROGRAMS = 512  # of these, at least


@triton.jit
def _rows(base, t, n, stride, d, D):
    """Rows ``t`` of an array of n; 0 outside of it."""
    mask = ((t >= 0) & (t < n))[:, None] & (d < D)[None, :]
    place = base + t[:, None] * stride + d[None, :]
    return tl.load(place, mask=mask, other=0.0)


@triton.jit
def _convolve(
    x, taps, skip, y, T, L, D, R, shift, x_b, x_t, taps_d, taps_j,
    AHEAD: tl.constexpr, HAS_SKIP: tl.constexpr,
    STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # y_t = sum_j taps_j x_{t + shift - j} of T inputs, or x_{t + shift + j} AHEAD
    blocks, stretches = tl.cdiv(D, BLOCK), tl.cdiv(L, STEPS)
    program = tl.program_id(0)
    d = program % blocks * BLOCK + tl.arange(0, BLOCK)
    first = (program // blocks % stretches).to(tl.int64) * STEPS
    row = (program // blocks // stretches).to(tl.int64)
    t = first + tl.arange(0, STEPS)
    x += row * x_b
    if AHEAD:
        end = tl.minimum(R, T - first - shift)
    else:
        end = tl.minimum(R, first + STEPS + shift)
    total = tl.zeros((STEPS, BLOCK), tl.float32)
    for j in range(end):
        tap = tl.load(taps + d * taps_d + j * taps_j, mask=d < D, other=0.0)
        at = t + shift + j if AHEAD else t + shift - j
        total += tap[None, :] * _rows(x, at, T, x_t, d, D)
    if HAS_SKIP:
        weight = tl.load(skip + d, mask=d < D, other=0.0)
        total += weight[None, :] * _rows(x, t + shift, T, x_t, d, D)
    place = y + row * L * D + t[:, None] * D + d[None, :]
    tl.store(place, total, mask=(t < L)[:, None] & (d < D)[None, :])


@triton.jit
def _sum_taps(
    x, dy, shares, B, T, L, D, R, x_b, x_t, dy_b, dy_t, rows,
    LAGS: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # sum_{b, t} dy_t x_{t + T - L - j} of LAGS lags j
    blocks, groups = tl.cdiv(D, BLOCK), tl.cdiv(R, LAGS)
    program = tl.program_id(0)
    d = program % blocks * BLOCK + tl.arange(0, BLOCK)
    lag = program // blocks % groups * LAGS
    share = (program // blocks // groups).to(tl.int64)
    sums = ()
    for _ in tl.static_range(LAGS):
        sums += (tl.zeros((STEPS, BLOCK), tl.float32),)
    for row in range(share * rows, tl.minimum(share * rows + rows, B)):
        for first in range(0, L, STEPS):
            t = first + tl.arange(0, STEPS).to(tl.int64)
            above = _rows(dy + row * dy_b, t, L, dy_t, d, D)
            added = ()
            for k in tl.static_range(LAGS):
                at = t + (T - L) - lag - k
                added += (sums[k] + above * _rows(x + row * x_b, at, T, x_t, d, D),)
            sums = added
    for k in tl.static_range(LAGS):
        place = shares + (share * R + lag + k) * D + d
        channels = tl.where(lag + k < R, D, 0)
        tl.store(place, tl.sum(sums[k], 0), mask=d < channels)


def _channels_last(x: Tensor) -> Tensor:
    """With channels side by side; rows and steps may lie anywhere."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _convolved(
    x: Tensor, taps: Tensor, skip: Tensor | None, L: int, *, ahead: bool
) -> Tensor:
    """Of (B, T, D) inputs the last L outputs; ``ahead``: the adjoint of that."""
    B, T, D = x.shape
    x, y = _channels_last(x), x.new_empty(B, L, D)
    shift = -abs(T - L) if ahead else T - L
    options: dict[str, Any] = {"STEPS": _STEPS, "BLOCK": _CHANNELS, "num_warps": 2}
    if y.numel():
        programs = B * cdiv(L, _STEPS) * cdiv(D, _CHANNELS)
        with on_device_of(x):
            _convolve[(programs,)](
                x, taps, skip, y, T, L, D, taps.shape[1], shift, *x.stride()[:2],
                *taps.stride(), AHEAD=ahead, HAS_SKIP=skip is not None, **options,
            )  # fmt: skip
    return y


@operator("fft_conv_triton", device="CompositeExplicitAutograd")
def _conv(x: Tensor, taps: Tensor, skip: Tensor | None, L: int) -> Tensor:
    return _convolved(x, taps, skip, L, ahead=False)


@_conv.register_fake
def _(x: Tensor, taps: Tensor, skip: Tensor | None, L: int) -> Tensor:
    return x.new_empty(x.shape[0], L, x.shape[2])


@operator("fft_conv_triton_backward", device="CompositeExplicitAutograd")
def _conv_backward(
    dy: Tensor, x: Tensor, taps: Tensor, skip: Tensor | None
) -> tuple[Tensor, Tensor]:
    (B, T, D), L, R = x.shape, dy.shape[1], taps.shape[1]
    dx = _convolved(dy, taps, skip, T, ahead=True)
    if x.numel() == 0 or L == 0:
        return dx.zero_(), torch.zeros_like(taps, memory_format=torch.contiguous_format)
    x, dy = _channels_last(x), _channels_last(dy)
    columns = cdiv(D, _BACK_CHANNELS) * cdiv(R, _LAGS)
    rows = cdiv(B, min(B, cdiv(_PROGRAMS, columns)))
    shares = x.new_empty(cdiv(B, rows), R, D)
    with on_device_of(x):
        _sum_taps[(columns * len(shares),)](
            x, dy, shares, B, T, L, D, R, *x.stride()[:2], *dy.stride()[:2], rows,
            LAGS=_LAGS, STEPS=_BACK_STEPS, BLOCK=_BACK_CHANNELS, num_warps=2,
        )  # fmt: skip
    return dx, shares.sum(0).T.contiguous()


@_conv_backward.register_fake
def _(
    dy: Tensor,  # as _conv_backward
    x: Tensor,
    taps: Tensor,
    skip: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), taps.new_empty(taps.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], _: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx, dtaps = _conv_backward(dy, *ctx.saved_tensors)
    dskip = None if ctx.saved_tensors[2] is None else dtaps[:, 0]
    return dx, dtaps, dskip, None


_conv.register_autograd(_differentiate, setup_context=_save)
_conv_backward.refuse_backward("fft_conv", "triton")


def fft_conv_triton(
    u: Tensor, kernel: Tensor, D: Tensor | None, initial_state: Tensor
) -> Tensor:
    """y_t = sum_j kernel_j u_{t-j} + D u_t in float32; differentiable once."""
    L, S = u.shape[1], initial_state.shape[1]
    x = torch.cat([initial_state, u], 1) if S else u
    return _conv(x, kernel[:, : S + L], D, L)
