"""Mamba-2's scan on the GPU: chunks of masked attention on the tensor cores.

Serves one decay a head, in the letters of the duality: with k_t (N) and v_t (P),

    h_t = a_t h_{t-1} + w_t k_t v_t^T,      y_t = q_t^T h_t + d v_t,

where heads of a group share q = C and k = B, v = x, w = dt and log a = dt A (Dao & Gu
2024, section 6). Of a chunk of Q steps that the state h enters, with c_t the sum of
log a up to t,

    y_t = sum_{s<=t} (q_t . k_s) exp(c_t - c_s) w_s v_s + exp(c_t) q_t^T h.

Forward: where rows and heads fill the GPU, a program a row and head walks through all
chunks with h in registers (``_walk``); else the states are passed alone (``_states``),
and all chunks are computed at once (``_outputs``). Backward: ``_states`` gives the
state that enters each chunk and, from the last to the first, the gradient of the state
that leaves it; then each chunk is on its own: one program a head for what a head has of
its own (``_value_gradients``), and one for several heads of a group, which sums the
gradients of q and k in registers (``_key_gradients``). Nothing but the operands is kept
between the two. No atomics: two runs give the same bits.

Sums of logarithms are kept in two parts (:func:`log_steps`), so that differences of
large sums are exact to float32; none is exponentiated that is above 0.
"""

# Kernels are Triton's language, which its own compiler checks.
# mypy: disable-error-code="no-untyped-def"

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm.ops._gpu import cdiv, multiprocessors, on_device_of
from ssm.ops._library import operator
from ssm.ops.ssd.naive import skip_and_gate

_LOG2E = tl.constexpr(1.4426950408889634)
_FLOOR = tl.constexpr(-160.0)  # in base 2: beyond it float32 has only 0
_WIDEST = 128  # of N and of P that a program holds
_HEADS = 16  # of one program where only the steps are read

# --- what the kernels share -----------------------------------------------------------


@triton.jit
def wide(i):
    """The loop's counter in 64 bits, for offsets."""
    return tl.full([], 0, tl.int64) + i


@triton.jit
def load_tile(base, rows, cols, stride, n_rows, n_cols, T: tl.constexpr):
    """Rows ``stride`` apart of a matrix whose columns are neighbours; 0 outside."""
    inside = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    places = base + rows[:, None] * stride + cols[None, :]
    return tl.load(places, mask=inside, other=0.0).to(T)


@triton.jit
def store_tile(base, rows, cols, stride, n_rows, n_cols, tile):
    """The inverse of :func:`load_tile`."""
    inside = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    places = base + rows[:, None] * stride + cols[None, :]
    tl.store(places, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def state_places(base, n, p, stride_n, stride_p):
    """Where the entries of one (N, P) state lie, whichever axis comes first."""
    return base + n[:, None] * stride_n + p[None, :] * stride_p


@triton.jit
def log_steps(log_a):
    """Logarithms in base 2 as (high, low): multiples of 2^-10, and what is left.

    Sums of 64 high parts are exact in float32, and those of the low parts are off by
    2^-28: so is every difference of such sums.
    """
    steps = log_a * _LOG2E
    steps = tl.where(steps < _FLOOR, _FLOOR, steps)  # -inf too; NaN stays
    high = tl.floor(steps * 1024.0) * (1.0 / 1024.0)
    return high, steps - high


@triton.jit
def _sum_logs(log_a, sums, low, L, H, Q: tl.constexpr, BH: tl.constexpr):
    """Sums of a chunk's logarithms up to each step, (B, chunks, H, Q), ``low`` apart.

    A kernel of its own: within the others a scan costs more than its result's load.
    """
    chunks = tl.cdiv(L, Q)
    b, c = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    t, h = tl.arange(0, Q), tl.program_id(1) * BH + tl.arange(0, BH)
    steps = log_a + (b * L + c * Q) * H
    a_high, a_low = log_steps(load_tile(steps, t, h, H, L - c * Q, H, tl.float32))
    sums += (b * chunks + c) * H * Q
    store_tile(sums, h, t, Q, H, Q, tl.trans(tl.cumsum(a_high, 0)))
    store_tile(sums + low, h, t, Q, H, Q, tl.trans(tl.cumsum(a_low, 0)))


@triton.jit
def _chunk_decays(sums, low, t, Q: tl.constexpr):
    """Of a chunk: the sums (high, low) up to each step, and decays to its two ends."""
    c_high, c_low = tl.load(sums + t), tl.load(sums + low + t)
    all_high, all_low = tl.load(sums + Q - 1), tl.load(sums + low + Q - 1)
    from_start = tl.exp2(c_high + c_low)
    to_end = tl.exp2((all_high - c_high) + (all_low - c_low))
    return c_high, c_low, from_start, to_end, tl.exp2(all_high + all_low)


@triton.jit
def _pair_decays(high, low, t):
    """exp(c_t - c_s) for s <= t, else 0: masked before the exponential."""
    sums = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    return tl.exp2(tl.where(t[:, None] >= t[None, :], sums, float("-inf")))


@triton.jit
def _chunk_outputs(q, k, v, h, high, low, from_start, gain, t, PRECISION: tl.constexpr):
    """y of a chunk that the state h enters, but for the skip."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    scores = scores * _pair_decays(high, low, t) * gain[None, :]
    y = tl.dot(q, h, input_precision=PRECISION) * from_start[:, None]
    return tl.dot(scores.to(v.dtype), v, acc=y, input_precision=PRECISION)


@triton.jit
def in_two(x, T: tl.constexpr):
    """float32 as a sum of two in T: bfloat16 alone has 8 digits, a pair of them 16."""
    first = x.to(T)
    return first, (x - first.to(tl.float32)).to(T)


@triton.jit
def _load_gain(gain, t, H, left, GAIN: tl.constexpr):
    if GAIN:
        weights = tl.load(gain + t * H, mask=t < left, other=0.0)
    else:
        weights = tl.where(t < left, 1.0, 0.0)
    return weights


# --- forward --------------------------------------------------------------------------


@triton.jit
def _walk(
    q, k, v, gain, sums, skip, h0, y, final,
    q_b, q_t, k_b, k_t, v_b, v_t, h_n, h_p,
    low, L, H, G, N, P,
    Q: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, GAIN: tl.constexpr,
    SKIP: tl.constexpr, T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All chunks of a row and head, one after the other, the state in registers."""
    b, head = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    group = head // (H // G)
    t, n, p = tl.arange(0, Q), tl.arange(0, BN), tl.arange(0, BP)
    inside = (n < N)[:, None] & (p < P)[None, :]
    state = (b * H + head) * N * P
    h = tl.load(state_places(h0 + state, n, p, h_n, h_p), mask=inside, other=0.0)
    q += b * q_b + group * N
    k += b * k_b + group * N
    v += b * v_b + head * P
    y += b * L * H * P + head * P
    gain += b * L * H + head
    sums += (b * tl.cdiv(L, Q) * H + head) * Q
    if SKIP:
        d = tl.load(skip + head * P + p, mask=p < P, other=0.0)
    for start in tl.range(0, L, Q, disable_licm=True):  # what it hoists is spilled
        first, left = wide(start), L - start
        q_c = load_tile(q + first * q_t, t, n, q_t, left, N, T)
        k_c = load_tile(k + first * k_t, t, n, k_t, left, N, T)
        v_c = load_tile(v + first * v_t, t, p, v_t, left, P, T)
        w = _load_gain(gain + first * H, t, H, left, GAIN)
        c_high, c_low, from_start, to_end, whole = _chunk_decays(
            sums + first * H, low, t, Q
        )
        y_c = _chunk_outputs(
            q_c, k_c, v_c, h.to(T), c_high, c_low, from_start, w, t, PRECISION
        )
        if SKIP:
            y_c += d[None, :] * v_c.to(tl.float32)
        store_tile(y + first * H * P, t, p, H * P, left, P, y_c)
        weighted = (v_c.to(tl.float32) * (to_end * w)[:, None]).to(T)
        h = tl.dot(tl.trans(k_c), weighted, acc=h * whole, input_precision=PRECISION)
    tl.store(state_places(final + state, n, p, h_n, h_p), h, mask=inside)


@triton.jit
def _states(
    k, v, gain, sums, h0, states, final,
    k_b, k_t, v_b, v_t, h_n, h_p,
    low, L, H, G, N, P,
    Q: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, GAIN: tl.constexpr,
    REVERSE: tl.constexpr, T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of the state that enters each chunk, and of the one that leaves the last.

    REVERSE: the same for the gradient of the state, from the last chunk to the first;
    then k is q, and v the gradient of y.
    """
    b, head = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    group = head // (H // G)
    t = tl.arange(0, Q)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    p = tl.program_id(2) * BP + tl.arange(0, BP)
    inside = (n < N)[:, None] & (p < P)[None, :]
    state = (b * H + head) * N * P
    h = tl.load(state_places(h0 + state, n, p, h_n, h_p), mask=inside, other=0.0)
    k += b * k_b + group * N
    v += b * v_b + head * P
    gain += b * L * H + head
    chunks = tl.cdiv(L, Q)
    sums += (b * chunks * H + head) * Q
    states += (b * chunks * H + head) * N * P
    for i in range(chunks):
        c = i
        if REVERSE:
            c = chunks - 1 - i
        first, left = wide(c) * Q, L - c * Q
        k_c = load_tile(k + first * k_t, t, n, k_t, left, N, T)
        v_c = load_tile(v + first * v_t, t, p, v_t, left, P, T)
        w = _load_gain(gain + first * H, t, H, left, GAIN and not REVERSE)
        _, _, from_start, to_end, whole = _chunk_decays(sums + first * H, low, t, Q)
        decay = to_end
        if REVERSE:
            decay = from_start
        store_tile(states + wide(c) * H * N * P, n, p, P, N, P, h)
        weighted, rest = in_two(v_c.to(tl.float32) * (decay * w)[:, None], T)
        h = tl.dot(tl.trans(k_c), weighted, acc=h * whole, input_precision=PRECISION)
        if T == tl.bfloat16:  # noqa: SIM300  # T is no constant here
            h = tl.dot(tl.trans(k_c), rest, acc=h)
    tl.store(state_places(final + state, n, p, h_n, h_p), h, mask=inside)


@triton.jit
def _outputs(
    q, k, v, gain, sums, skip, states, y,
    q_b, q_t, k_b, k_t, v_b, v_t,
    low, L, H, G, N, P,
    Q: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, GAIN: tl.constexpr,
    SKIP: tl.constexpr, T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y of one chunk of a row and head, from the state that enters it."""
    chunks = tl.cdiv(L, Q)
    head, chunk = tl.program_id(0) % H, tl.program_id(0) // H
    b, c = (chunk // chunks).to(tl.int64), chunk % chunks
    group, first, left = head // (H // G), c.to(tl.int64) * Q, L - c * Q
    t, n, p = tl.arange(0, Q), tl.arange(0, BN), tl.arange(0, BP)
    step = (b * L + first) * H + head
    q_c = load_tile(q + b * q_b + first * q_t + group * N, t, n, q_t, left, N, T)
    k_c = load_tile(k + b * k_b + first * k_t + group * N, t, n, k_t, left, N, T)
    v_c = load_tile(v + b * v_b + first * v_t + head * P, t, p, v_t, left, P, T)
    place = (b * chunks + c) * H + head
    h = load_tile(states + place * N * P, n, p, P, N, P, T)
    w = _load_gain(gain + step, t, H, left, GAIN)
    c_high, c_low, from_start, _, _ = _chunk_decays(sums + place * Q, low, t, Q)
    y_c = _chunk_outputs(q_c, k_c, v_c, h, c_high, c_low, from_start, w, t, PRECISION)
    if SKIP:
        d = tl.load(skip + head * P + p, mask=p < P, other=0.0)
        y_c += d[None, :] * v_c.to(tl.float32)
    store_tile(y + step * P, t, p, H * P, left, P, y_c)


# --- backward -------------------------------------------------------------------------


@triton.jit
def _value_gradients(
    q, k, v, gain, sums, skip, dy, states, leaving, dv, dgain, dsums, dskip,
    q_b, q_t, k_b, k_t, v_b, v_t, dy_b, dy_t,
    low, L, H, G, N, P,
    Q: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, GAIN: tl.constexpr,
    SKIP: tl.constexpr, T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of one chunk of a head that no other head shares.

    g is the gradient of the state that leaves. Of the logarithms only what each path
    carries is kept (``dsums``), summed where it ends and where it starts: the sums over
    time are :func:`_log_gradients`.
    """
    chunks = tl.cdiv(L, Q)
    head, chunk = tl.program_id(0) % H, tl.program_id(0) // H
    b, c = (chunk // chunks).to(tl.int64), chunk % chunks
    group, first, left = head // (H // G), c.to(tl.int64) * Q, L - c * Q
    t, n, p = tl.arange(0, Q), tl.arange(0, BN), tl.arange(0, BP)
    step = (b * L + first) * H + head
    place = (b * chunks + c) * H + head
    q_c = load_tile(q + b * q_b + first * q_t + group * N, t, n, q_t, left, N, T)
    k_c = load_tile(k + b * k_b + first * k_t + group * N, t, n, k_t, left, N, T)
    v_c = load_tile(v + b * v_b + first * v_t + head * P, t, p, v_t, left, P, T)
    dy_c = load_tile(dy + b * dy_b + first * dy_t + head * P, t, p, dy_t, left, P, T)
    h = load_tile(states + place * N * P, n, p, P, N, P, T)
    g = load_tile(leaving + place * N * P, n, p, P, N, P, T)
    w = _load_gain(gain + step, t, H, left, GAIN)
    c_high, c_low, from_start, to_end, whole = _chunk_decays(
        sums + place * Q, low, t, Q
    )
    through = whole * tl.sum(h.to(tl.float32) * g.to(tl.float32))
    tl.store(dsums + 3 * low + place, through)
    coming = tl.dot(q_c, h, input_precision=PRECISION) * from_start[:, None]
    coming = tl.sum(coming * dy_c.to(tl.float32), 1)

    scores = tl.dot(q_c, tl.trans(k_c), input_precision=PRECISION)
    scores *= _pair_decays(c_high, c_low, t)
    dv_c = tl.dot(k_c, g, input_precision=PRECISION) * to_end[:, None]
    reaching = tl.sum(dv_c * v_c.to(tl.float32), 1)
    dv_c = tl.dot(tl.trans(scores.to(T)), dy_c, acc=dv_c, input_precision=PRECISION)
    dv_c *= w[:, None]
    if SKIP:
        d = tl.load(skip + head * P + p, mask=p < P, other=0.0)
        dv_c += d[None, :] * dy_c.to(tl.float32)
        dd = tl.sum(dy_c.to(tl.float32) * v_c.to(tl.float32), 0)
        tl.store(dskip + place * P + p, dd, mask=p < P)
    store_tile(dv + step * P, t, p, H * P, left, P, dv_c)

    flow = tl.dot(dy_c, tl.trans(v_c), input_precision=PRECISION) * scores
    if GAIN:
        tl.store(dgain + t * H + step, tl.sum(flow, 0) + reaching, mask=t < left)
    flow = tl.where(t[:, None] > t[None, :], flow * w[None, :], 0.0)
    tl.store(dsums + place * Q + t, tl.sum(flow, 1) + coming)
    tl.store(dsums + low + place * Q + t, tl.sum(flow, 0))
    tl.store(dsums + 2 * low + place * Q + t, reaching * w)


@triton.jit
def _key_gradients(
    q, k, v, gain, sums, dy, states, leaving, dq, dk,
    q_b, q_t, k_b, k_t, v_b, v_t, dy_b, dy_t,
    low, L, H, G, N, P, batch,
    Q: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, GAIN: tl.constexpr,
    T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Those of q and k in one chunk, summed over a part of the heads of one group."""
    chunks = tl.cdiv(L, Q)
    b, c = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    group, part, parts = tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    first, left = c.to(tl.int64) * Q, L - c * Q
    t, n, p = tl.arange(0, Q), tl.arange(0, BN), tl.arange(0, BP)
    v += b * v_b + first * v_t
    dy += b * dy_b + first * dy_t
    gain += (b * L + first) * H
    sums += (b * chunks + c) * H * Q
    states += (b * chunks + c) * H * N * P
    leaving += (b * chunks + c) * H * N * P
    dscores = tl.zeros([Q, Q], tl.float32)
    dq_c = tl.zeros([Q, BN], tl.float32)
    dk_c = tl.zeros([Q, BN], tl.float32)
    per_group = H // G
    stop = group * per_group + (part + 1) * per_group // parts
    start = group * per_group + part * per_group // parts
    for head in tl.range(start, stop, disable_licm=True):  # what it hoists is spilled
        v_c = load_tile(v + head * P, t, p, v_t, left, P, T)
        dy_c = load_tile(dy + head * P, t, p, dy_t, left, P, T)
        h = load_tile(states + head * N * P, n, p, P, N, P, T)
        g = load_tile(leaving + head * N * P, n, p, P, N, P, T)
        w = _load_gain(gain + head, t, H, left, GAIN)
        c_high, c_low, from_start, to_end, _ = _chunk_decays(sums + head * Q, low, t, Q)
        m = tl.dot(dy_c, tl.trans(v_c), input_precision=PRECISION)
        dscores += m * _pair_decays(c_high, c_low, t) * w[None, :]
        # decays scale the products, in float32, and not the operands, in T
        dq_h = tl.dot(dy_c, tl.trans(h), input_precision=PRECISION)
        dq_c += dq_h * from_start[:, None]
        dk_h = tl.dot(v_c, tl.trans(g), input_precision=PRECISION)
        dk_c += dk_h * (to_end * w)[:, None]

    q_c = load_tile(q + b * q_b + first * q_t + group * N, t, n, q_t, left, N, T)
    k_c = load_tile(k + b * k_b + first * k_t + group * N, t, n, k_t, left, N, T)
    mixed, rest = in_two(dscores, T)
    dq_c = tl.dot(mixed, k_c, acc=dq_c, input_precision=PRECISION)
    dk_c = tl.dot(tl.trans(mixed), q_c, acc=dk_c, input_precision=PRECISION)
    if T == tl.bfloat16:  # noqa: SIM300  # as in _states
        dq_c = tl.dot(rest, k_c, acc=dq_c)
        dk_c = tl.dot(tl.trans(rest), q_c, acc=dk_c)
    place = (((part * batch + b) * L + first) * G + group) * N
    store_tile(dq + place, t, n, G * N, left, N, dq_c)
    store_tile(dk + place, t, n, G * N, left, N, dk_c)


@triton.jit
def _log_gradients(dsums, dlog_a, low, L, H, Q: tl.constexpr, BH: tl.constexpr):
    """The gradient of log a_t: all that is carried by paths through step t.

    Those that end at i >= t, less those that also start there; those from j < t to the
    chunk's end; and those through the whole chunk.
    """
    chunks = tl.cdiv(L, Q)
    b, c = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    t, h = tl.arange(0, Q), tl.program_id(1) * BH + tl.arange(0, BH)
    places = (b * chunks + c) * H * Q + h[None, :] * Q + t[:, None]
    inside = (t < Q)[:, None] & (h < H)[None, :]
    ending = tl.load(dsums + places, mask=inside, other=0.0)
    starting = tl.load(dsums + low + places, mask=inside, other=0.0)
    after = tl.cumsum(ending - starting, 0, reverse=True)
    inside &= (t > 0)[:, None]
    before = tl.load(dsums + 2 * low + places - 1, mask=inside, other=0.0)
    through = dsums + 3 * low + (b * chunks + c) * H + h
    total = after + tl.cumsum(before, 0)
    total += tl.load(through, mask=h < H, other=0.0)[None, :]
    store_tile(dlog_a + (b * L + c * Q) * H, t, h, H, L - c * Q, H, total)


# --- launches -------------------------------------------------------------------------


@dataclass(frozen=True)
class Arithmetic:
    """How products are formed: the dtype of their operands, and of float32 ones how.

    bfloat16 in bfloat16. float16 has no exponents to spare for decays and states: it is
    multiplied in tf32, which has float16's digits and float32's range. float32 in tf32
    only where PyTorch is allowed to.
    """

    T: tl.dtype
    torch: torch.dtype
    precision: str

    @property
    def exact(self) -> bool:
        """Products of float32."""
        return self.precision == "ieee"


def arithmetic(*tensors: Tensor) -> Arithmetic:
    """The arithmetic for these operands."""
    dtypes = {x.dtype for x in tensors}
    # Triton's interpreter, on the CPU, does not multiply bfloat16
    if dtypes == {torch.bfloat16} and tensors[0].is_cuda:
        return Arithmetic(tl.bfloat16, torch.bfloat16, "tf32")
    half = torch.float32 not in dtypes
    tf32 = half or torch.backends.cuda.matmul.allow_tf32
    return Arithmetic(tl.float32, torch.float32, "tf32" if tf32 else "ieee")


def block(size: int, how: Arithmetic) -> int:
    """The power of 2 that holds ``size``, and no less than 128 bytes.

    With narrower operands the assembler in Triton 3.6 (ptxas 12.8) loses addresses of
    operands under register pressure (docs/kernels/ssd.md).
    """
    least = 128 // how.torch.itemsize
    return max(least, 1 << (size - 1).bit_length())


def plain(x: Tensor) -> Tensor:
    """(B, L, H, D) with neighbouring heads and channels: itself, if it is so."""
    return x if x.stride()[2:] == (x.shape[3], 1) else x.contiguous()


def dense(state: Tensor) -> Tensor:
    """States (B, H, N, P) one behind the other, either axis of each first."""
    whole = state if state.stride(3) == 1 else state.mT
    return state if whole.is_contiguous() else state.contiguous()


@dataclass(frozen=True)
class _Shape:
    """What the launches need of q (B, L, G, N) and v (B, L, H, P)."""

    batch: int
    L: int
    H: int
    G: int
    N: int
    P: int
    Q: int

    @property
    def chunks(self) -> int:
        return cdiv(self.L, self.Q)

    @property
    def sizes(self) -> tuple[int, ...]:
        """How far apart the parts of the sums are, and L, H, G, N, P."""
        parts = self.batch * self.chunks * self.H * self.Q
        return parts, self.L, self.H, self.G, self.N, self.P

    def states(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Room for the state at a bound of each chunk."""
        return like.new_empty(
            (self.batch, self.chunks, self.H, self.N, self.P), dtype=dtype
        )


def _shape(q: Tensor, v: Tensor, how: Arithmetic) -> _Shape:
    (batch, L, G, N), (H, P) = q.shape, v.shape[2:]
    return _Shape(batch, L, H, G, N, P, 64 if how.torch == torch.bfloat16 else 32)


def _log_sums(log_a: Tensor, shape: _Shape) -> Tensor:
    sums = log_a.new_empty((2, shape.batch, shape.chunks, shape.H, shape.Q))
    _sum_logs[_per_chunk(shape)](
        log_a, sums, *shape.sizes[:3], Q=shape.Q, BH=_HEADS, num_warps=4
    )
    return sums


def _per_chunk(shape: _Shape) -> tuple[int, int]:
    return shape.batch * shape.chunks, cdiv(shape.H, _HEADS)


def _pass_states(
    kv: tuple[Tensor, Tensor],
    steps: tuple[Tensor | None, Tensor],
    ends: tuple[Tensor, Tensor],
    shape: _Shape,
    how: Arithmetic,
    *,
    reverse: bool,
) -> Tensor:
    """The states that enter the chunks; ``ends``: the first, and room for the last."""
    (k, v), (gain, sums), (h0, final) = kv, steps, ends
    states = shape.states(v, how.torch)
    BN, BP = block(shape.N, how), min(64, block(shape.P, how))
    rows = shape.batch * shape.H
    if not fills_gpu(rows, v):  # half the state a program
        BN = min(64, BN)
    grid = (rows, cdiv(shape.N, BN), cdiv(shape.P, BP))
    _states[grid](
        k, v, sums if gain is None else gain, sums, h0, states, final,
        *k.stride()[:2], *v.stride()[:2], *h0.stride()[2:], *shape.sizes,
        Q=shape.Q, BN=BN, BP=BP, GAIN=gain is not None, REVERSE=reverse,
        T=how.T, PRECISION=how.precision, num_warps=4, num_stages=3,
    )  # fmt: skip
    return states


def fills_gpu(programs: int, x: Tensor) -> bool:
    """Whether this many long programs are enough to keep the GPU busy."""
    if not x.is_cuda:
        return programs >= 4  # interpreted: so that tests reach both ways
    return programs * 3 >= multiprocessors(x.get_device()) * 2


@operator("ssd_triton", device="CompositeExplicitAutograd")
def _scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gain: Tensor | None,
    log_a: Tensor,
    skip: Tensor | None,
    initial_state: Tensor,
) -> tuple[Tensor, Tensor]:
    y, final = _empty_outputs(v, initial_state)
    if 0 in y.shape or 0 in final.shape:
        return y.zero_(), final.copy_(initial_state)
    how = arithmetic(q, k, v)
    shape = _shape(q, v, how)
    q, k, v = plain(q), plain(k), plain(v)
    skips = log_a if skip is None else skip
    strides = [x.stride(i) for x in (q, k, v) for i in (0, 1)]
    BN, BP = block(shape.N, how), block(shape.P, how)
    options = {
        "Q": shape.Q, "BN": BN, "BP": BP, "GAIN": gain is not None,
        "SKIP": skip is not None, "T": how.T, "PRECISION": how.precision,
    }  # fmt: skip
    rows = shape.batch * shape.H
    with on_device_of(v):
        sums = _log_sums(log_a, shape)
        tensors = (q, k, v, sums if gain is None else gain, sums)
        if fills_gpu(rows, v):
            _walk[rows,](
                *tensors, skips, initial_state, y, final, *strides,
                *initial_state.stride()[2:], *shape.sizes, **options,
                num_warps=4, num_stages=2 if how.torch == torch.bfloat16 else 1,
            )  # fmt: skip
        else:
            ends = (initial_state, final)
            states = _pass_states((k, v), (gain, sums), ends, shape, how, reverse=False)
            _outputs[rows * shape.chunks,](
                *tensors, skips, states, y, *strides, *shape.sizes, **options,
                num_warps=4, num_stages=1,
            )  # fmt: skip
    return y, final


@_scan.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gain: Tensor | None,
    log_a: Tensor,
    skip: Tensor | None,
    initial_state: Tensor,
) -> tuple[Tensor, Tensor]:
    return _empty_outputs(v, initial_state)


def _empty_outputs(v: Tensor, initial_state: Tensor) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), torch.empty_like(initial_state)


@operator("ssd_triton_backward", device="CompositeExplicitAutograd")
def _adjoint(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gain: Tensor | None,
    log_a: Tensor,
    skip: Tensor | None,
    initial_state: Tensor,
    dy: Tensor,
    dfinal: Tensor,
) -> list[Tensor]:
    gradients = _empty_gradients(q, k, v, gain, log_a, skip, initial_state)
    dq, dk, dv, dgain, dlog_a, dskip, dh0 = gradients
    if 0 in v.shape or 0 in q.shape:
        return [x.zero_() for x in gradients[:-1]] + [dh0.copy_(dfinal)]
    how = arithmetic(q, k, v)
    shape = _shape(q, v, how)
    q, k, v, dy = plain(q), plain(k), plain(v), plain(dy)
    parts = _head_parts(shape, v)
    dq_parts, dk_parts = dq, dk
    if parts > 1:
        dq_parts, dk_parts = (
            x.new_empty((parts, *x.shape), dtype=torch.float32) for x in (dq, dk)
        )
    dskip_parts = dlog_a
    dsums = log_a.new_empty(4 * shape.sizes[0])
    if skip is not None:
        dskip_parts = dskip.new_empty((shape.batch, shape.chunks, *dskip.shape))
    with on_device_of(v):
        sums = _log_sums(log_a, shape)
        final = torch.empty_like(initial_state)
        ends = (initial_state, final)
        entering = _pass_states((k, v), (gain, sums), ends, shape, how, reverse=False)
        ends = (like_strides(dfinal, dh0), dh0)
        leaving = _pass_states((q, dy), (None, sums), ends, shape, how, reverse=True)
        operands = (q, k, v, sums if gain is None else gain, sums)
        stages = 2 if how.torch == torch.bfloat16 else 1
        strides = [x.stride(i) for x in (q, k, v, dy) for i in (0, 1)]
        options = {
            "Q": shape.Q, "BN": block(shape.N, how), "BP": block(shape.P, how),
            "GAIN": gain is not None, "T": how.T, "PRECISION": how.precision,
        }  # fmt: skip
        _value_gradients[shape.batch * shape.chunks * shape.H,](
            *operands, sums if skip is None else skip, dy, entering, leaving,
            dv, dgain, dsums, dskip_parts, *strides, *shape.sizes,
            SKIP=skip is not None, **options, num_warps=4, num_stages=1,
        )  # fmt: skip
        _key_gradients[shape.batch * shape.chunks, shape.G, parts](
            *operands, dy, entering, leaving, dq_parts, dk_parts,
            *strides, *shape.sizes, shape.batch,
            **options, num_warps=8, num_stages=stages,
        )  # fmt: skip
        _log_gradients[_per_chunk(shape)](
            dsums, dlog_a, *shape.sizes[:3], Q=shape.Q, BH=_HEADS, num_warps=4
        )
    if parts > 1:
        dq.copy_(dq_parts.sum(0))
        dk.copy_(dk_parts.sum(0))
    if skip is not None:
        torch.sum(dskip_parts, (0, 1), out=dskip)
    return gradients


def _head_parts(shape: _Shape, x: Tensor) -> int:
    """In how many parts to go through the heads of a group: as few as fill the GPU."""
    parts, programs = 1, shape.batch * shape.chunks * shape.G
    while parts * 2 <= shape.H // shape.G and not fills_gpu(programs * parts, x):
        parts *= 2
    return parts


def like_strides(x: Tensor, model: Tensor) -> Tensor:
    """``x`` laid out in memory as ``model`` is."""
    if x.stride() == model.stride():
        return x
    return torch.empty_like(model).copy_(x)


@_adjoint.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gain: Tensor | None,
    log_a: Tensor,
    skip: Tensor | None,
    initial_state: Tensor,
    dy: Tensor,
    dfinal: Tensor,
) -> list[Tensor]:
    return _empty_gradients(q, k, v, gain, log_a, skip, initial_state)


def _empty_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gain: Tensor | None,
    log_a: Tensor,
    skip: Tensor | None,
    initial_state: Tensor,
) -> list[Tensor]:
    """Of each operand; no entries for one that is missing."""
    present = (x if x is not None else log_a.new_empty(0) for x in (gain, log_a, skip))
    contiguous = [x.new_empty(x.shape) for x in (q, k, v, *present)]
    return [*contiguous, torch.empty_like(initial_state)]


def _save(ctx, inputs, output):  # torch.library's hook
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, dy, dfinal):  # as above
    operands = ctx.saved_tensors
    gradients = _adjoint(*operands, dy, dfinal)
    return tuple(
        None if x is None else gradient
        for x, gradient in zip(operands, gradients, strict=True)
    )


_scan.register_autograd(_differentiate, setup_context=_save)
_adjoint.refuse_backward("ssd", "triton")


def scalar_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gain: Tensor | None,
    log_a: Tensor,
    skip: Tensor | None,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """y (B, L, H, P) in the dtype of v, and the final state, of any sizes.

    q, k (B, L, G, N), v (B, L, H, P), gain and log_a (B, L, H), skip (H, P), the state
    (B, H, N, P); the last four float32. A scan is linear in v, and a sum over the
    states: wide ones are cut to what a program holds.
    """
    if v.shape[3] > _WIDEST:
        narrow = [
            scalar_scan(q, k, v_i, gain, log_a, skip_i, h_i)
            for v_i, skip_i, h_i in zip(
                v.split(_WIDEST, 3),
                _split(skip, v.shape[3]),
                state.split(_WIDEST, 3),
                strict=True,
            )
        ]
        return torch.cat([y for y, _ in narrow], 3), torch.cat(
            [h for _, h in narrow], 3
        )
    if q.shape[3] > _WIDEST:
        pieces = zip(
            q.split(_WIDEST, 3),
            k.split(_WIDEST, 3),
            state.split(_WIDEST, 2),
            strict=True,
        )
        parts = [
            scalar_scan(q_i, k_i, v, gain, log_a, None if i else skip, h_i)
            for i, (q_i, k_i, h_i) in enumerate(pieces)
        ]
        y = torch.stack([y.float() for y, _ in parts]).sum(0)
        return y.to(v.dtype), torch.cat([h for _, h in parts], 2)
    y, final = _scan(q, k, v, gain, log_a, skip, dense(state))
    return y, final


def _split(skip: Tensor | None, P: int) -> Sequence[Tensor | None]:
    if skip is None:
        return [None] * cdiv(P, _WIDEST)
    return [x.contiguous() for x in skip.split(_WIDEST, 1)]


def ssd_triton(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor,
    *,
    D: Tensor | None,
    z: Tensor | None,
    chunk_size: int,  # the kernels' chunks are theirs
) -> tuple[Tensor, Tensor]:
    """y and the final state; see :func:`ssm.ops.ssd.ssd`."""
    skip = None
    if D is not None:
        skip = D.float() if D.ndim == 2 else D.float()[:, None].expand(x.shape[2:])
        skip = skip.contiguous()
    dt = dt.contiguous()
    state = initial_state.mT
    y, final = scalar_scan(C, B, x, dt, dt * A.float(), skip, state)
    return skip_and_gate(y, x, None, z), final.mT
