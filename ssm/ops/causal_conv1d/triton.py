"""The short causal convolution on the GPU, with its bias, activation and states.

A program owns a block of channels and walks along a stretch of time. The last W - 1
inputs stay in registers, so that each input is read once; ``UNROLL`` rows are loaded
at once, and ``AHEAD`` while those before them are used, so that enough of them are on
their way. Sums are float32.

The backward pass recomputes the sum before the activation. It walks the same way with
a second window, of g_t = dL/dz_t, and leaves dx_t once g_t ... g_{t+W-1} are known.
Each stretch writes its share of the taps' gradient; a second kernel adds the shares in
a fixed order: no atomics, equal bits at every run.
"""

# Kernels are Triton's language, which its own compiler checks.
# mypy: disable-error-code="no-untyped-def, assignment, unreachable"

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm.ops._gpu import cdiv, on_device_of, power_of_2
from ssm.ops._library import operator

_FEW = 512  # programs: below, stretches are shorter, so that there are more


class _Plan(NamedTuple):
    """How a kernel walks: found best on an H200 (docs/kernels/causal_conv1d.md)."""

    wide: int  # bytes of x that a thread loads at once
    STEPS: int  # of a stretch
    UNROLL: int  # rows loaded at once
    AHEAD: bool  # while those before them are used
    num_warps: int


_FORWARD = _Plan(wide=8, STEPS=64, UNROLL=4, AHEAD=True, num_warps=4)
_BACKWARD = _Plan(wide=4, STEPS=64, UNROLL=4, AHEAD=True, num_warps=4)


@triton.jit
def _mask(d, D, there):
    """Channels that exist, of a row that is ``there`` (one truth value)."""
    return d < tl.where(there, D, 0)


@triton.jit
def _input(x, state, t, L, x_t, state_t, d, D, W: tl.constexpr, HAS: tl.constexpr):
    """Row t of the inputs; of the state before them where t < 0; 0 beyond."""
    row = tl.load(x + t * x_t + d, mask=_mask(d, D, (t >= 0) & (t < L)), other=0.0)
    row = row.to(tl.float32)
    if HAS:
        old = state + (W - 1 + t) * state_t + d
        mask = _mask(d, D, (t < 0) & (t > -W))
        row += tl.load(old, mask=mask, other=0.0).to(tl.float32)
    return row


@triton.jit
def _taps(weight, d, inside, W: tl.constexpr):
    """The columns of the weight, one by one; read as they lie, side by side."""
    w = tl.arange(0, triton.next_power_of_2(W))
    place = weight + d[:, None] * W + w[None, :]
    mask = inside[:, None] & (w < W)[None, :]
    whole = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    taps = ()
    for i in tl.static_range(W):
        taps += (tl.sum(tl.where((w == i)[None, :], whole, 0.0), 1),)
    return taps


@triton.jit
def _place(L, D, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's row, first step and channels; channels vary fastest."""
    blocks, stretches = tl.cdiv(D, BLOCK), tl.cdiv(L, STEPS)
    program = tl.program_id(0)
    d = program % blocks * BLOCK + tl.arange(0, BLOCK)
    stretch = program // blocks
    start = (stretch % stretches).to(tl.int64) * STEPS
    return (stretch // stretches).to(tl.int64), stretch.to(tl.int64), start, d


@triton.jit
def _rows(base, first, left, stride, d, D, UNROLL: tl.constexpr):
    """UNROLL rows from ``base`` on, of which the first is number ``first`` of left."""
    rows = ()
    for k in tl.static_range(UNROLL):
        mask = _mask(d, D, first + k < left)
        rows += (tl.load(base + k * stride, mask=mask, other=0.0),)
    return rows


@triton.jit
def _forward(
    x, weight, bias, state, y, final, L, D, x_b, x_t, state_b, state_t,
    W: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_STATE: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
    UNROLL: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    row, _, start, d = _place(L, D, STEPS, BLOCK)
    inside = d < D
    x += row * x_b
    final += row * (W - 1) * D
    if HAS_STATE:
        state += row * state_b
    left = tl.minimum(L - start, STEPS).to(tl.int32)  # rows of this stretch
    here, out = x + start * x_t + d, y + (row * L + start) * D + d
    if AHEAD:
        rows = _rows(here, 0, left, x_t, d, D, UNROLL)
    past = ()
    for j in tl.static_range(W - 1):
        t = start - (W - 1) + j
        past += (_input(x, state, t, L, x_t, state_t, d, D, W, HAS_STATE),)
    taps = _taps(weight, d, inside, W)
    shift = tl.zeros((BLOCK,), tl.float32)
    if HAS_BIAS:
        shift += tl.load(bias + d, mask=inside, other=0.0).to(tl.float32)
    for i in range(0, STEPS, UNROLL):
        if AHEAD:
            now = rows
            rows = _rows(here + UNROLL * x_t, i + UNROLL, left, x_t, d, D, UNROLL)
        else:
            now = _rows(here, i, left, x_t, d, D, UNROLL)
        for k in tl.static_range(UNROLL):
            window = past
            window += (now[k].to(tl.float32),)
            z = shift
            for w in tl.static_range(W):
                z += taps[w] * window[w]
            if SILU:
                z *= tl.sigmoid(z)
            mask = _mask(d, D, i + k < left)
            tl.store(out + k * D, z.to(y.dtype.element_ty), mask=mask)
            past = window[1:]
        here += UNROLL * x_t
        out += UNROLL * D
    if start + STEPS >= L:  # the last stretch
        for j in tl.static_range(W - 1):
            last = start + (L - start) - (W - 1) + j  # in 64 bits, as start is
            kept = _input(x, state, last, L, x_t, state_t, d, D, W, HAS_STATE)
            tl.store(final + j * D + d, kept.to(final.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    x, weight, bias, state, dy, dfinal, dx, dstate, shares, L, D,
    x_b, x_t, state_b, state_t, dy_b, dy_t,
    W: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_STATE: tl.constexpr, HAS_DFINAL: tl.constexpr, STEPS: tl.constexpr,
    BLOCK: tl.constexpr, UNROLL: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    # g_t of this stretch; dx lags by W - 1, so the last stretch goes beyond L
    row, stretch, start, d = _place(L + W - 1, D, STEPS, BLOCK)
    inside = d < D
    x, dy = x + row * x_b, dy + row * dy_b
    if HAS_STATE:
        state += row * state_b
        dstate += row * (W - 1) * D
    if HAS_DFINAL:
        dfinal += row * (W - 1) * D
    left = tl.minimum(L - start, STEPS).to(tl.int32)  # rows of this stretch
    here, above = x + start * x_t + d, dy + start * dy_t + d
    out = dx + (row * L + start) * D + d
    if AHEAD:
        rows = _rows(here, 0, left, x_t, d, D, UNROLL)
        upstream = _rows(above, 0, left, dy_t, d, D, UNROLL)
    past = ()
    for j in tl.static_range(W - 1):
        t = start - 2 * (W - 1) + j
        past += (_input(x, state, t, L, x_t, state_t, d, D, W, HAS_STATE),)
    taps = _taps(weight, d, inside, W)
    shift = tl.zeros((BLOCK,), tl.float32)
    if HAS_BIAS:
        shift += tl.load(bias + d, mask=inside, other=0.0).to(tl.float32)
    grads = ()
    for j in tl.static_range(W - 1):  # those before this stretch, for its first dx
        t = start - (W - 1) + j
        new = _input(x, state, t, L, x_t, state_t, d, D, W, HAS_STATE)
        window = past
        window += (new,)
        mask = _mask(d, D, (t >= 0) & (t < L))
        g = tl.load(dy + t * dy_t + d, mask=mask, other=0.0).to(tl.float32)
        grads += (_through(g, window, taps, shift, W, SILU),)
        past = window[1:]
    sums = ()
    for _ in tl.static_range(W + 1):
        sums += (tl.zeros((BLOCK,), tl.float32),)
    for i in range(0, STEPS, UNROLL):
        if AHEAD:
            now, g_now, first = rows, upstream, i + UNROLL
            rows = _rows(here + UNROLL * x_t, first, left, x_t, d, D, UNROLL)
            upstream = _rows(above + UNROLL * dy_t, first, left, dy_t, d, D, UNROLL)
        else:
            now = _rows(here, i, left, x_t, d, D, UNROLL)
            g_now = _rows(above, i, left, dy_t, d, D, UNROLL)
        for k in tl.static_range(UNROLL):
            window = past
            window += (now[k].to(tl.float32),)
            g = _through(g_now[k].to(tl.float32), window, taps, shift, W, SILU)
            grads += (g,)
            s = start + i + k - (W - 1)
            value = tl.zeros((BLOCK,), tl.float32)
            added = ()
            for w in tl.static_range(W):
                value += taps[W - 1 - w] * grads[w]
                added += (sums[w] + g * window[w],)
            added += (sums[W] + g,)
            sums = added
            if HAS_DFINAL:
                kept = s - (L - (W - 1))  # s is this row of the final state
                in_final = _mask(d, D, (kept >= 0) & (s < L))
                value += tl.load(dfinal + kept * D + d, mask=in_final, other=0.0)
            there = _mask(d, D, (s >= 0) & (s < L))
            place = out + (k - (W - 1)) * D
            tl.store(place, value.to(dx.dtype.element_ty), mask=there)
            if HAS_STATE:
                before = _mask(d, D, s < 0)
                value = value.to(dstate.dtype.element_ty)
                tl.store(dstate + (W - 1 + s) * D + d, value, mask=before)
            past, grads = window[1:], grads[1:]
        here += UNROLL * x_t
        above += UNROLL * dy_t
        out += UNROLL * D
    for w in tl.static_range(W + 1):
        tl.store(shares + (stretch * (W + 1) + w) * D + d, sums[w], mask=inside)


@triton.jit
def _through(g, window, taps, shift, W: tl.constexpr, SILU: tl.constexpr):
    """g dsilu(z)/dz, z from the window of inputs; g itself without activation."""
    if SILU:
        z = shift
        for w in tl.static_range(W):
            z += taps[w] * window[w]
        s = tl.sigmoid(z)
        g *= s * (1 + z * (1 - s))
    return g


@triton.jit
def _add_shares(
    shares, dweight, dbias, n, D,
    W: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    w = tl.program_id(1)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, n, ROWS):
        i = first + tl.arange(0, ROWS)[:, None]
        place = shares + (i.to(tl.int64) * (W + 1) + w) * D + d
        total += tl.load(place, mask=(i < n) & (d < D), other=0.0)
    result = tl.sum(total, 0)
    if w < W:
        tl.store(dweight + d * W + w, result.to(dweight.dtype.element_ty), mask=d < D)
    elif HAS_BIAS:
        tl.store(dbias + d, result.to(dbias.dtype.element_ty), mask=d < D)


def _channels_last(x: Tensor) -> Tensor:
    """With channels side by side; rows and steps may lie anywhere."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _tiling(x: Tensor, steps: int, plan: _Plan) -> tuple[int, dict[str, int]]:
    """How many programs walk ``steps`` steps of x, and the kernel's options."""
    B, _, D = x.shape
    most = 32 * plan.num_warps * plan.wide // x.element_size()
    BLOCK = min(most, max(16, power_of_2(D)))
    columns = B * cdiv(D, BLOCK)
    few = columns * cdiv(steps, plan.STEPS) < _FEW
    options = plan._asdict() | {"BLOCK": BLOCK, "STEPS": 16 if few else plan.STEPS}
    del options["wide"]
    return columns * cdiv(steps, options["STEPS"]), options


def _strides(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (x.stride(0), x.stride(1))


@operator("causal_conv1d_triton", device="CompositeExplicitAutograd")
def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    _, L, D = x.shape
    W = weight.shape[1]
    y, final = _outputs(x, weight, initial_state)
    if y.numel() == 0:
        return y, final
    x, weight = _channels_last(x), weight.contiguous()
    state = None if initial_state is None else _channels_last(initial_state)
    programs, options = _tiling(x, L, _FORWARD)
    with on_device_of(x):
        _forward[(programs,)](
            x, weight, bias, state, y, final, L, D, *_strides(x), *_strides(state),
            W=W, SILU=silu, HAS_BIAS=bias is not None, HAS_STATE=state is not None,
            **options,
        )  # fmt: skip
    return y, final


def _outputs(
    x: Tensor, weight: Tensor, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    B, L, D = x.shape
    kept = x.dtype
    if initial_state is not None:
        kept = torch.promote_types(kept, initial_state.dtype)
    return x.new_empty(B, L, D), x.new_empty(B, weight.shape[1] - 1, D, dtype=kept)


@_conv.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    return _outputs(x, weight, initial_state)


@operator("causal_conv1d_triton_backward", device="CompositeExplicitAutograd")
def _conv_backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    silu: bool,
) -> list[Tensor]:
    B, L, D = x.shape
    W = weight.shape[1]
    found = _gradients(x, weight, bias, initial_state)
    dx, dweight = found[:2]
    dbias = None if bias is None else found[2]
    dstate = None if initial_state is None else found[-1]
    if x.numel() == 0:
        return [gradient.zero_() for gradient in found]
    x, dy, weight = _channels_last(x), _channels_last(dy), weight.contiguous()
    state = None if initial_state is None else _channels_last(initial_state)
    dfinal = None if dfinal is None else dfinal.contiguous()
    programs, options = _tiling(x, L + W - 1, _BACKWARD)
    n = B * cdiv(L + W - 1, options["STEPS"])
    shares = x.new_empty(n, W + 1, D, dtype=torch.float32)
    flags = {"W": W, "HAS_BIAS": bias is not None}
    with on_device_of(x):
        _backward[(programs,)](
            x, weight, bias, state, dy, dfinal, dx, dstate, shares, L, D,
            *_strides(x), *_strides(state), *_strides(dy), **flags, SILU=silu,
            HAS_STATE=state is not None, HAS_DFINAL=dfinal is not None,
            **options,
        )  # fmt: skip
        _add_shares[(cdiv(D, 32), W + 1)](
            shares, dweight, dbias, n, D, **flags, ROWS=32, BLOCK=32
        )
    return found


def _gradients(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None
) -> list[Tensor]:
    """Unwritten gradients of the operands that are there, in their order."""
    operands = (x, weight, bias, initial_state)
    return [
        torch.empty_like(operand, memory_format=torch.contiguous_format)
        for operand in operands
        if operand is not None
    ]


@_conv_backward.register_fake
def _(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    silu: bool,
) -> list[Tensor]:
    return _gradients(x, weight, bias, initial_state)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.silu = inputs[4]
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, dy: Tensor | None, dfinal: Tensor | None
) -> tuple[Tensor | None, ...]:
    operands = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(operands[0])
    found = iter(_conv_backward(dy, dfinal, *operands, ctx.silu))
    return *(None if x is None else next(found) for x in operands), None


_conv.register_autograd(_differentiate, setup_context=_save)
_conv_backward.refuse_backward("causal_conv1d", "triton")


def causal_conv1d_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """The convolution, and the last W - 1 inputs; differentiable once."""
    return _conv(x, weight, bias, initial_state, silu)
