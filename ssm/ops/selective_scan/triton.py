"""The selective scan in Triton, for what the CUDA kernels leave out.

Complex A, B and C that are constant in time, any number of states. A program keeps the
states of one block of channels of one row in registers and walks through time, loading
one step at a time: simple, and bound by the wait for memory at each step. The backward
pass computes the states of one chunk of KEEP steps again, into a scratch buffer, and
walks it backwards. Sums over channels and rows are partial sums added in a fixed order:
no atomics, two runs agree in every bit.

A complex number is two neighbours in memory: places count in elements of ``S`` floats,
S = 2 where the system is complex. Gradients of complex numbers are PyTorch's,
dL/dRe + i dL/dIm.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm.ops._gpu import on_device_of, power_of_2
from ssm.ops._library import operator
from ssm.ops.linear_scan import linear_scan
from ssm.ops.selective_scan.op import Operands
from ssm.ops.selective_scan.torch import gate, step_size

KEEP = 32
_ELEMENTS = 512  # states of a program, about
_LONG = 1024  # steps from which ten launches take less time than the walk


# --- what the kernels share -----------------------------------------------------------


@triton.jit
def _softplus(x):  # type: ignore[no-untyped-def]
    """log(1 + e^x) = max(x, 0) + 2 artanh(e / (2 + e)), e = e^-|x|; x above 20."""
    e = tl.exp(-tl.abs(x))
    s = e / (2.0 + e)
    q = s * s
    p = 0.14005996
    p = p * q + 0.14000902
    p = p * q + 0.20010764
    p = p * q + 0.33333208
    p = p * q + 1.0
    return tl.where(x > 20.0, x, tl.maximum(x, 0.0) + 2.0 * s * p)


@triton.jit
def _sigmoid(x):  # type: ignore[no-untyped-def]
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _vector(base, d, mask, GIVEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """An operand over channels, or zeros."""
    if GIVEN:
        x = tl.load(base + d, mask=mask, other=0.0).to(tl.float32)
    else:
        x = tl.zeros(d.shape, tl.float32)
    return x


@triton.jit
def _numbers(base, places, mask, S: tl.constexpr):  # type: ignore[no-untyped-def]
    """(real, imaginary) parts; the latter zeros where S is 1."""
    re = tl.load(base + places * S, mask=mask, other=0.0).to(tl.float32)
    if S == 2:
        im = tl.load(base + places * S + 1, mask=mask, other=0.0).to(tl.float32)
    else:
        im = tl.zeros(re.shape, tl.float32)
    return re, im


@triton.jit
def _put(base, places, mask, re, im, S: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(base + places * S, re.to(base.dtype.element_ty), mask=mask)
    if S == 2:
        tl.store(base + places * S + 1, im.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _times(a, ai, b, bi, S: tl.constexpr):  # type: ignore[no-untyped-def]
    """(a + i ai) (b + i bi)."""
    re, im = a * b, a * bi
    if S == 2:
        re -= ai * bi
        im += ai * b
    return re, im


@triton.jit
def _decay(d, A, Ai, S: tl.constexpr):  # type: ignore[no-untyped-def]
    """exp(d A), d (D,), A (D, N)."""
    size = tl.exp(d[:, None] * A)
    if S == 2:
        angle = d[:, None] * Ai
        re, im = size * tl.cos(angle), size * tl.sin(angle)
    else:
        re, im = size, tl.zeros(size.shape, tl.float32)
    return re, im


@triton.jit
def _matrix(  # type: ignore[no-untyped-def]
    base, t, b, g, d, n, dm, nm, L, G, N, CONSTANT: tl.constexpr, S: tl.constexpr
):  # fmt: skip
    """B or C at step t: (D, N) of the block's channels where constant, else (1, N)."""
    if CONSTANT:
        tile, mask = d[:, None] * N + n[None, :], dm[:, None] & nm[None, :]
        re, im = _numbers(base, tile, mask, S)
    else:
        row = ((b * L + t) * G + g) * N
        re, im = _numbers(base, row + n[None, :], nm[None, :], S)
    return re, im


@triton.jit
def _step(u, delta, bias, place, dm, SOFTPLUS: tl.constexpr):  # type: ignore[no-untyped-def]
    """u, the raw step with its bias, and the step size, of all channels."""
    x = tl.load(u + place, mask=dm, other=0.0).to(tl.float32)
    raw = tl.load(delta + place, mask=dm, other=0.0).to(tl.float32) + bias
    step = raw
    if SOFTPLUS:
        step = _softplus(raw)
    return x, raw, step


# --- the scans ------------------------------------------------------------------------


@triton.jit
def _scan(  # type: ignore[no-untyped-def]
    u, delta, A, B, C, D, z, bias, h0, lengths, y, final, starts,
    L, channels, N, G, chunks,
    HAS_D: tl.constexpr, GATED: tl.constexpr, BIASED: tl.constexpr,
    RAGGED: tl.constexpr, KEPT: tl.constexpr, SOFTPLUS: tl.constexpr,
    B_CONSTANT: tl.constexpr, C_CONSTANT: tl.constexpr,
    S: tl.constexpr, KEEP: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t, for BD channels of one row."""
    size = channels // G
    blocks = tl.cdiv(size, BD)
    program = tl.program_id(0).to(tl.int64)
    b, g = program // (blocks * G), program // blocks % G
    within = program % blocks * BD + tl.arange(0, BD)
    d, dm = g * size + within, within < size
    n = tl.arange(0, BN)
    nm = n < N
    tile, mask = d[:, None] * N + n[None, :], dm[:, None] & nm[None, :]
    Ar, Ai = _numbers(A, tile, mask, S)
    skip, shift = _vector(D, d, dm, HAS_D), _vector(bias, d, dm, BIASED)
    h, hi = _numbers(h0, b * channels * N + tile, mask, S)
    length = L
    if RAGGED:
        length = tl.load(lengths + b).to(tl.int32)
    for step in range(length):
        t = step + tl.full([], 0, tl.int64)
        if KEPT and t % KEEP == 0:
            chunk = (b * chunks + t // KEEP) * channels * N
            _put(starts, chunk + tile, mask, h, hi, S)
        place = (b * L + t) * channels + d
        x, _, dt = _step(u, delta, shift, place, dm, SOFTPLUS)
        a, ai = _decay(dt, Ar, Ai, S)
        Bt, Bi = _matrix(B, t, b, g, d, n, dm, nm, L, G, N, B_CONSTANT, S)
        Ct, Ci = _matrix(C, t, b, g, d, n, dm, nm, L, G, N, C_CONSTANT, S)
        h, hi = _times(a, ai, h, hi, S)
        h += (dt * x)[:, None] * Bt
        hi += (dt * x)[:, None] * Bi
        Ch, _ = _times(Ct, Ci, h, hi, S)
        out = S * tl.sum(Ch, 1) + skip * x
        if GATED:
            gate = tl.load(z + place, mask=dm, other=0.0).to(tl.float32)
            out = out * gate * _sigmoid(gate)
        tl.store(y + place, out.to(y.dtype.element_ty), mask=dm)
    _put(final, b * channels * N + tile, mask, h, hi, S)


@triton.jit
def _scan_back(  # type: ignore[no-untyped-def]
    u, delta, A, B, C, D, z, bias, lengths, starts, dy, dfinal, scratch,
    du, ddelta, dz, dA, dB, dC, dD, dbias, dh0,
    L, channels, N, G, chunks, rows,
    HAS_D: tl.constexpr, GATED: tl.constexpr, BIASED: tl.constexpr,
    RAGGED: tl.constexpr, SOFTPLUS: tl.constexpr,
    B_CONSTANT: tl.constexpr, C_CONSTANT: tl.constexpr,
    S: tl.constexpr, KEEP: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """g_t = S conj(C_t) dy_t + conj(a_{t+1}) g_{t+1}, and what follows from it."""
    size = channels // G
    blocks = tl.cdiv(size, BD)
    program = tl.program_id(0).to(tl.int64)
    b, g = program // (blocks * G), program // blocks % G
    within = program % blocks * BD + tl.arange(0, BD)
    d, dm = g * size + within, within < size
    n = tl.arange(0, BN)
    nm = n < N
    tile, mask = d[:, None] * N + n[None, :], dm[:, None] & nm[None, :]
    own = tl.arange(0, BD)[:, None] * BN + n[None, :]  # a place in the scratch buffer
    Ar, Ai = _numbers(A, tile, mask, S)
    skip, shift = _vector(D, d, dm, HAS_D), _vector(bias, d, dm, BIASED)
    row = b * channels * N + tile
    grad, gradi = _numbers(dfinal, row, mask, S)
    sum_A, sum_Ai = tl.zeros((BD, BN), tl.float32), tl.zeros((BD, BN), tl.float32)
    sum_B, sum_Bi = tl.zeros((BD, BN), tl.float32), tl.zeros((BD, BN), tl.float32)
    sum_C, sum_Ci = tl.zeros((BD, BN), tl.float32), tl.zeros((BD, BN), tl.float32)
    sum_D, sum_bias = tl.zeros((BD,), tl.float32), tl.zeros((BD,), tl.float32)
    length = L
    if RAGGED:
        length = tl.load(lengths + b).to(tl.int32)
    used = (length + KEEP - 1) // KEEP
    for k in range(used):
        first = (used - 1 - k) * KEEP + tl.full([], 0, tl.int64)
        steps = tl.minimum(length - (used - 1 - k) * KEEP, KEEP)
        chunk = (b * chunks + first // KEEP) * channels * N
        h, hi = _numbers(starts, chunk + tile, mask, S)
        tl.debug_barrier()
        for i in range(steps):  # the states before each step, again
            at = (program * KEEP + i) * BD * BN + own
            _put(scratch, at, mask, h, hi, S)
            place = (b * L + first + i) * channels + d
            x, _, dt = _step(u, delta, shift, place, dm, SOFTPLUS)
            a, ai = _decay(dt, Ar, Ai, S)
            Bt, Bi = _matrix(B, first + i, b, g, d, n, dm, nm, L, G, N, B_CONSTANT, S)
            h, hi = _times(a, ai, h, hi, S)
            h += (dt * x)[:, None] * Bt
            hi += (dt * x)[:, None] * Bi
        tl.debug_barrier()
        for back in range(steps):
            i = steps - 1 - back
            t = first + i
            place = (b * L + t) * channels + d
            x, raw, dt = _step(u, delta, shift, place, dm, SOFTPLUS)
            a, ai = _decay(dt, Ar, Ai, S)
            Bt, Bi = _matrix(B, t, b, g, d, n, dm, nm, L, G, N, B_CONSTANT, S)
            Ct, Ci = _matrix(C, t, b, g, d, n, dm, nm, L, G, N, C_CONSTANT, S)
            out = tl.load(dy + place, mask=dm, other=0.0).to(tl.float32)
            if GATED:
                gate = tl.load(z + place, mask=dm, other=0.0).to(tl.float32)
                s = _sigmoid(gate)
                Ch, _ = _times(Ct, Ci, h, hi, S)
                value = S * tl.sum(Ch, 1) + skip * x
                slope = out * value * s * (1.0 + gate * (1.0 - s))
                tl.store(dz + place, slope.to(dz.dtype.element_ty), mask=dm)
                out = out * gate * s
            grad += S * out[:, None] * Ct
            gradi -= S * out[:, None] * Ci
            gB, _ = _times(grad, gradi, Bt, -Bi, S)
            gB = tl.sum(gB, 1)
            of_B, of_Bi = grad * (dt * x)[:, None], gradi * (dt * x)[:, None]
            of_C, of_Ci = S * out[:, None] * h, -S * out[:, None] * hi
            if B_CONSTANT:
                sum_B += of_B
                sum_Bi += of_Bi
            else:
                at = ((program % blocks * rows + b) * L + t) * G + g
                _put(dB, at * N + n, nm, tl.sum(of_B, 0), tl.sum(of_Bi, 0), S)
            if C_CONSTANT:
                sum_C += of_C
                sum_Ci += of_Ci
            else:
                at = ((program % blocks * rows + b) * L + t) * G + g
                _put(dC, at * N + n, nm, tl.sum(of_C, 0), tl.sum(of_Ci, 0), S)
            h, hi = _numbers(scratch, (program * KEEP + i) * BD * BN + own, mask, S)
            grad, gradi = _times(grad, gradi, a, -ai, S)
            gah, gahi = _times(grad, gradi, h, -hi, S)
            sum_A += gah * dt[:, None]
            sum_Ai += gahi * dt[:, None]
            gahA, _ = _times(gah, gahi, Ar, -Ai, S)
            of_step = tl.sum(gahA, 1) + x * gB
            if SOFTPLUS:
                of_step = of_step * tl.where(raw > 20.0, 1.0, _sigmoid(raw))
            of_u = dt * gB + skip * out
            tl.store(ddelta + place, of_step.to(ddelta.dtype.element_ty), mask=dm)
            tl.store(du + place, of_u.to(du.dtype.element_ty), mask=dm)
            sum_D += out * x
            sum_bias += of_step
    _put(dA, row, mask, sum_A, sum_Ai, S)
    if B_CONSTANT:
        _put(dB, row, mask, sum_B, sum_Bi, S)
    if C_CONSTANT:
        _put(dC, row, mask, sum_C, sum_Ci, S)
    tl.store(dD + b * channels + d, sum_D, mask=dm)
    tl.store(dbias + b * channels + d, sum_bias, mask=dm)
    _put(dh0, row, mask, grad, gradi, S)


# --- launches -------------------------------------------------------------------------


class _Shape(NamedTuple):
    """Sizes of one call."""

    rows: int
    L: int
    channels: int
    N: int
    G: int
    S: int

    @classmethod
    def of(cls, u: Tensor, A: Tensor, B: Tensor, C: Tensor) -> "_Shape":
        G = next((X.shape[2] for X in (B, C) if X.ndim == 4), 1)
        rows, L, channels = u.shape
        return cls(rows, L, channels, A.shape[1], G, 2 if A.is_complex() else 1)

    @property
    def BN(self) -> int:
        return power_of_2(self.N)

    @property
    def BD(self) -> int:
        size = power_of_2(self.channels // self.G)
        return int(min(size, max(1, _ELEMENTS // self.BN)))

    @property
    def blocks(self) -> int:
        """Blocks of channels in a group."""
        return -(-self.channels // self.G // self.BD)

    @property
    def programs(self) -> int:
        return self.rows * self.G * self.blocks

    @property
    def chunks(self) -> int:
        return -(-self.L // KEEP)


def _floats(x: Tensor | None) -> Tensor | None:
    """Contiguous memory; complex numbers as pairs."""
    if x is None:
        return None
    x = x.contiguous().resolve_conj()
    return torch.view_as_real(x) if x.is_complex() else x


def _options(
    shape: _Shape,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    lengths: Tensor | None,
    constant: tuple[bool, bool],
) -> dict[str, bool | int]:
    return {
        "HAS_D": D is not None,
        "GATED": z is not None,
        "BIASED": delta_bias is not None,
        "RAGGED": lengths is not None,
        "B_CONSTANT": constant[0],
        "C_CONSTANT": constant[1],
        "S": shape.S,
        "KEEP": KEEP,
        "BD": shape.BD,
        "BN": shape.BN,
    }


@operator("selective_scan_triton", device="CompositeExplicitAutograd")
def _forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor,
    lengths: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _forward_fake(u, A, keep)
    shape = _Shape.of(u, A, B, C)
    if lengths is not None:
        outputs[0].zero_()  # the padding
    given = (u, delta, A, B, C, D, z, delta_bias, initial_state, lengths)
    with on_device_of(u):
        _scan[(shape.programs,)](
            *(_floats(x) for x in given),
            *(_floats(x) for x in outputs),
            *(shape.L, shape.channels, shape.N, shape.G, shape.chunks),
            KEPT=keep,
            SOFTPLUS=delta_softplus,
            **_options(shape, D, z, delta_bias, lengths, (B.ndim == 2, C.ndim == 2)),
        )
    return outputs


def _forward_fake(u: Tensor, A: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y, final state and the states at every KEEP steps (B, K, D, N), or none."""
    rows, L, channels = u.shape
    chunks = -(-L // KEEP) if keep else 0
    return (
        u.new_empty(rows, L, channels),
        A.new_empty(rows, *A.shape),
        A.new_empty(rows, chunks, *A.shape),
    )


@_forward.register_fake
def _(  # type: ignore[no-untyped-def]  # as _forward
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
    delta_softplus,
    initial_state,
    lengths,
    keep,
):
    return _forward_fake(u, A, keep)


@operator("selective_scan_triton_backward", device="CompositeExplicitAutograd")
def _backward(
    dy: Tensor,
    dfinal: Tensor,
    starts: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    lengths: Tensor | None,
) -> list[Tensor]:
    shape = _Shape.of(u, A, B, C)
    fresh = torch.empty if lengths is None else torch.zeros
    in_time = [
        fresh(t.shape, dtype=u.dtype, device=u.device)
        for t in (u, u, u[:0] if z is None else u)
    ]
    dA, dh0 = (A.new_empty(shape.rows, *A.shape) for _ in range(2))
    dB, dC = (_matrix_sums(X, shape, fresh) for X in (B, C))
    dD, dbias = torch.empty(2, shape.rows, shape.channels, device=u.device)
    elements = shape.programs * KEEP * shape.BD * shape.BN
    scratch = A.new_empty(elements)
    given = (u, delta, A, B, C, D, z, delta_bias, lengths, starts, dy, dfinal, scratch)
    with on_device_of(u):
        _scan_back[(shape.programs,)](
            *(_floats(x) for x in given),
            *in_time,
            *(_floats(x) for x in (dA, dB, dC)),
            *(dD, dbias, _floats(dh0)),
            *(shape.L, shape.channels, shape.N, shape.G, shape.chunks, shape.rows),
            SOFTPLUS=delta_softplus,
            **_options(shape, D, z, delta_bias, lengths, (B.ndim == 2, C.ndim == 2)),
        )
    du, ddelta, dz = in_time
    dA, dB, dC, dD, dbias = (x.sum(0) for x in (dA, dB, dC, dD, dbias))
    return [du, ddelta, dA, dB.to(B.dtype), dC.to(C.dtype), dD, dz, dbias, dh0]


def _matrix_sums(X: Tensor, shape: _Shape, fresh) -> Tensor:  # type: ignore[no-untyped-def]
    """Room for the gradient of B or C: one a row where constant, else one a block."""
    dtype = torch.complex64 if X.is_complex() else torch.float32
    parts = shape.rows if X.ndim == 2 else shape.blocks
    return fresh((parts, *X.shape), dtype=dtype, device=X.device)


@_backward.register_fake
def _(  # type: ignore[no-untyped-def]  # as _backward
    dy,
    dfinal,
    starts,
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
    delta_softplus,
    lengths,
):
    vector = u.new_empty(u.shape[2], dtype=torch.float32)
    gate = u[:0] if z is None else u
    like = (u, u, A, B, C, vector, gate, vector, dfinal)
    return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in like]


_backward.refuse_backward("selective_scan", "triton")


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]  # torch.library's hook
    *tensors, delta_softplus, _, lengths, _ = inputs  # initial state; keep
    ctx.save_for_backward(*tensors, lengths, output[2])
    ctx.delta_softplus = delta_softplus
    ctx.set_materialize_grads(False)


def _gradients(ctx, dy, dfinal, _):  # type: ignore[no-untyped-def]  # the same
    *tensors, lengths, starts = ctx.saved_tensors
    dy = torch.zeros_like(tensors[0]) if dy is None else dy
    rows, _, channels, N = starts.shape
    dfinal = starts.new_zeros(rows, channels, N) if dfinal is None else dfinal
    *gradients, dh0 = (
        gradient if needed else None
        for gradient, needed in zip(
            _backward(dy, dfinal, starts, *tensors, ctx.delta_softplus, lengths),
            [*ctx.needs_input_grad[:8], ctx.needs_input_grad[9]],
            strict=True,
        )
    )
    return *gradients, None, dh0, None, None


_forward.register_autograd(_gradients, setup_context=_save)


def _one_state(x: Operands, initial_state: Tensor) -> tuple[Tensor, Tensor]:
    """A channel with one state and constant B and C, as a linear scan.

    That has its own kernel, which is parallel over time: at 131,072 steps of 128
    channels the walk above leaves nearly all of a GPU idle.
    """
    step = step_size(x.delta.float(), x.delta_bias, x.delta_softplus)
    u, z = x.u.float(), None if x.z is None else x.z.float()
    h, final = linear_scan(
        None,
        step * u * x.B[:, 0],
        log_a=step * x.A[:, 0],
        initial_state=initial_state[..., 0],
        backend="triton",
    )
    y = gate(h * x.C[:, 0], u, x.D, z)
    return y.to(x.u.dtype), final[..., None]


def selective_scan_triton(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y and the final state of the whole operator; differentiable once.

    u, delta, z (B, L, D); A (D, N); B, C (B, L, G, N) with one G, or (D, N) where they
    are constant, complex where A is; D, delta_bias (D,); initial state (B, D, N).
    """
    system = initial_state.dtype
    A, initial_state = A.to(system), initial_state.to(system)
    if A.is_complex():
        B, C = B.to(system), C.to(system)
    D, delta_bias = (x if x is None else x.float() for x in (D, delta_bias))
    lengths = lengths if lengths is None else lengths.to(torch.int64)
    operands = (u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state)
    single = A.shape[1] == 1 and B.ndim == C.ndim == 2 and not A.is_complex()
    if single and lengths is None and u.shape[1] >= _LONG:
        return _one_state(Operands(*operands[:-1]), initial_state)
    keep = torch.is_grad_enabled() and any(
        isinstance(x, Tensor) and x.requires_grad for x in operands
    )
    y, final, _ = _forward(*operands, lengths, keep)
    return y, final
