"""The linear scan on the GPU: tiles of time scanned in parallel, one after the other.

A program owns a block of channels of one row. It loads ``T`` steps at once, scans them
in log(T) steps by the associative law (a, b) then (a', b') = (a a', a' b + b'), and
carries the last state on; the next tile is already on its way. Where rows and channels
are too few to fill the GPU, time is cut into segments: their total decays and end
states first (they are a linear scan themselves, of a few steps), then all segments side
by side from their right initial states.

The backward pass is the same walk from the end: g_t = dh_t + a_{t+1} g_{t+1}, with
da_t = g_t h_{t-1} and db_t = g_t on the way. Sums and states are float32; no division,
so that any decay is legal; no atomics.
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

_T = 64  # steps of a tile
_BLOCK = 32  # channels
_WARPS = 4
_PROGRAMS = 512  # that fill a GPU: below, time is cut


@triton.jit
def _then(a, b, a_next, b_next):
    return a * a_next, a_next * b + b_next


@triton.jit
def _place(C, segments, BLOCK: tl.constexpr):
    """This program's row, segment of time and channels; channels vary fastest."""
    blocks = tl.cdiv(C, BLOCK)
    program = tl.program_id(0)
    c = program % blocks * BLOCK + tl.arange(0, BLOCK)
    program = program // blocks
    return (program // segments).to(tl.int64), (program % segments).to(tl.int64), c


@triton.jit
def _load(x, t, L, x_t, c, C, other):
    """Steps t (a column) of channels c in float32; ``other`` outside 0 ... L - 1."""
    mask = (t >= 0) & (t < L) & (c < C)[None, :]
    return tl.load(x + t * x_t + c[None, :], mask=mask, other=other).to(tl.float32)


@triton.jit
def _load_decays(a, t, L, a_t, c, C, LOG: tl.constexpr):
    """Decays, from their logarithms with LOG; 1 outside."""
    if LOG:
        return tl.exp(_load(a, t, L, a_t, c, C, 0.0))
    return _load(a, t, L, a_t, c, C, 1.0)


@triton.jit
def _scan_tile(a, b, h, T: tl.constexpr):
    """All states of a tile entered with h, the last one, and the tile's decay."""
    decay, states = tl.associative_scan((a, b), 0, _then)
    states += decay * h[None, :]
    last = (tl.arange(0, T) == T - 1)[:, None]
    h = tl.sum(tl.where(last, states, 0.0), 0)
    return states, h, tl.sum(tl.where(last, decay, 0.0), 0)


@triton.jit
def _forward(
    a, b, initial, h, ends, decays, L, C, a_b, a_t, b_b, b_t, segments, steps,
    LOG: tl.constexpr, ENDS: tl.constexpr, T: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """All states; with ENDS only each segment's end from zero, and its total decay."""
    row, segment, c = _place(C, segments, BLOCK)
    a, b, h = a + row * a_b, b + row * b_b, h + row * L * C
    here = (row * segments + segment) * C + c
    state = tl.zeros((BLOCK,), tl.float32)
    if not ENDS:
        state += tl.load(initial + here, mask=c < C, other=0.0)
    decay = tl.full((BLOCK,), 1.0, tl.float32)
    for i in tl.range(0, steps, T, num_stages=3):
        t = (segment * steps + i + tl.arange(0, T))[:, None]
        a_tile = _load_decays(a, t, L, a_t, c, C, LOG)
        b_tile = _load(b, t, L, b_t, c, C, 0.0)
        states, state, factor = _scan_tile(a_tile, b_tile, state, T)
        if ENDS:
            decay *= factor
        else:
            mask = (t < L) & (c < C)[None, :]
            place = h + t * C + c[None, :]
            tl.store(place, states.to(h.dtype.element_ty), mask=mask)
    if ENDS:
        tl.store(ends + here, state, mask=c < C)
        tl.store(decays + here, decay, mask=c < C)
    elif segment == segments - 1:
        tl.store(ends + row * C + c, state, mask=c < C)


@triton.jit
def _backward(
    a, h, initial, dh, above, da, db, ends, decays, L, C, a_b, a_t, dh_b, dh_t,
    segments, steps, LOG: tl.constexpr, ENDS: tl.constexpr, T: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The walk from the end; ``above`` (and ``ends``) hold g beside each segment."""
    row, segment, c = _place(C, segments, BLOCK)
    a, dh = a + row * a_b, dh + row * dh_b
    h, da, db = h + row * L * C, da + row * L * C, db + row * L * C
    here = (row * segments + segment) * C + c
    g = tl.zeros((BLOCK,), tl.float32)
    if not ENDS:
        g += tl.load(above + here, mask=c < C, other=0.0)
    decay = tl.full((BLOCK,), 1.0, tl.float32)
    for i in tl.range(0, steps, T, num_stages=3):
        t = (L - 1 - (segment * steps + i + tl.arange(0, T)))[:, None]
        later = tl.where(t >= 0, t + 1, -1)  # of what fills the last tile, none
        following = _load_decays(a, later, L, a_t, c, C, LOG)
        gs, g, factor = _scan_tile(following, _load(dh, t, L, dh_t, c, C, 0.0), g, T)
        if ENDS:
            decay *= factor
        else:
            previous = _load(h, t - 1, L, C, c, C, 0.0)
            before = (t == 0) & (c < C)[None, :]
            start = initial + row * C + c[None, :] + t * 0
            previous += tl.load(start, mask=before, other=0.0)
            grad = gs * previous
            if LOG:
                grad *= _load_decays(a, t, L, a_t, c, C, LOG)
            mask = (t >= 0) & (c < C)[None, :]
            place = t * C + c[None, :]
            tl.store(da + place, grad.to(da.dtype.element_ty), mask=mask)
            tl.store(db + place, gs.to(db.dtype.element_ty), mask=mask)
    if ENDS:
        tl.store(ends + here, g, mask=c < C)
        tl.store(decays + here, decay, mask=c < C)
    elif segment == segments - 1:
        first = tl.load(a + c, mask=c < C, other=0.0).to(tl.float32)
        if LOG:
            first = tl.exp(first)
        tl.store(ends + row * C + c, first * g, mask=c < C)


class _Cut(NamedTuple):
    """Segments of time, ``steps`` each; tiles of T steps and BLOCK channels."""

    segments: int
    steps: int
    T: int
    BLOCK: int
    programs: int

    @classmethod
    def of(cls, B: int, L: int, C: int) -> "_Cut":
        T, BLOCK = (min(most, power_of_2(n)) for most, n in ((_T, L), (_BLOCK, C)))
        columns = B * cdiv(C, BLOCK)
        steps = T * max(2, cdiv(L, T * cdiv(_PROGRAMS, columns)))
        segments = cdiv(L, steps)
        return cls(segments, steps, T, BLOCK, columns * segments)

    def options(self, log: bool) -> dict[str, Any]:
        """What all kernels take."""
        return {"LOG": log, "T": self.T, "BLOCK": self.BLOCK, "num_warps": _WARPS}


def _channels(x: Tensor) -> Tensor:
    """(B, L, C), channels side by side; rows and steps may lie anywhere."""
    flat = x.reshape(*x.shape[:2], -1) if x.ndim != 3 else x
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def _outputs(b: Tensor, initial_state: Tensor) -> tuple[Tensor, Tensor]:
    h = torch.empty_like(b, memory_format=torch.contiguous_format)
    final = torch.empty_like(initial_state, memory_format=torch.contiguous_format)
    return h, final


def _entries(ends: Tensor, decays: Tensor, first: Tensor) -> Tensor:
    """The state that enters each segment: a scan over segments, (B, S, C)."""
    states, _ = _linear_scan(decays, ends, first, False)
    return torch.cat([first[:, None], states[:, :-1]], 1)


@operator("linear_scan_triton", device="CompositeExplicitAutograd")
def _linear_scan(
    a: Tensor, b: Tensor, initial_state: Tensor, log: bool
) -> tuple[Tensor, Tensor]:
    h, final = _outputs(b, initial_state)
    if b.numel() == 0:
        return h, final.copy_(initial_state)
    a, b = _channels(a), _channels(b)
    B, L, C = b.shape
    cut = _Cut.of(B, L, C)
    segments, grid, options = cut.segments, (cut.programs,), cut.options(log)
    sizes = (L, C, *a.stride()[:2], *b.stride()[:2], segments, cut.steps)
    entry = initial_state.contiguous().view(B, 1, C)
    with on_device_of(b):
        if segments > 1:
            ends, decays = b.new_empty(2, B, segments, C, dtype=torch.float32)
            _forward[grid](a, b, None, h, ends, decays, *sizes, ENDS=True, **options)
            entry = _entries(ends, decays, entry[:, 0])
        _forward[grid](a, b, entry, h, final, None, *sizes, ENDS=False, **options)
    return h, final


@operator("linear_scan_triton_backward", device="CompositeExplicitAutograd")
def _linear_scan_backward(
    dh: Tensor,
    dfinal: Tensor,
    a: Tensor,
    initial_state: Tensor,
    h: Tensor,
    log: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    found = _gradients(a, h, initial_state)
    if h.numel() == 0:
        found[2].copy_(dfinal)
        return found
    da, db, dinitial = found
    a, dh, h = _channels(a), _channels(dh), _channels(h)
    B, L, C = h.shape
    cut = _Cut.of(B, L, C)
    segments, grid, options = cut.segments, (cut.programs,), cut.options(log)
    sizes = (L, C, *a.stride()[:2], *dh.stride()[:2], segments, cut.steps)
    initial = initial_state.contiguous()
    above = dfinal.contiguous().view(B, 1, C)
    with on_device_of(h):
        if segments > 1:
            ends, decays = h.new_empty(2, B, segments, C, dtype=torch.float32)
            _backward[grid](
                a, h, initial, dh, None, da, db, ends, decays, *sizes,
                ENDS=True, **options,
            )  # fmt: skip
            above = _entries(ends, decays, above[:, 0])
        _backward[grid](
            a, h, initial, dh, above, da, db, dinitial, None, *sizes,
            ENDS=False, **options,
        )  # fmt: skip
    return found


def _gradients(
    a: Tensor, h: Tensor, initial_state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    operands = (a, h, initial_state)
    da, db, dinitial = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in operands
    )
    return da, db, dinitial


@_linear_scan.register_fake
def _(a: Tensor, b: Tensor, initial_state: Tensor, log: bool) -> tuple[Tensor, Tensor]:
    return _outputs(b, initial_state)


@_linear_scan_backward.register_fake
def _(
    dh: Tensor,
    dfinal: Tensor,
    a: Tensor,
    initial_state: Tensor,
    h: Tensor,
    log: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(a, h, initial_state)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    a, _, initial_state, ctx.log = inputs
    ctx.save_for_backward(a, initial_state, output[0])


def _differentiate(ctx: Any, dh: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
    return *_linear_scan_backward(dh, dfinal, *ctx.saved_tensors, ctx.log), None


_linear_scan.register_autograd(_differentiate, setup_context=_save)
_linear_scan_backward.refuse_backward("linear_scan", "triton")


def linear_scan_triton(
    decays: Tensor, b: Tensor, initial_state: Tensor, log: bool
) -> tuple[Tensor, Tensor]:
    """Every state in the dtype of b, and the last in float32; differentiable once.

    decays: a, or their logarithms with ``log``; initial_state: float32.
    """
    return _linear_scan(decays, b, initial_state, log)
