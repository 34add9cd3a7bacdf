"""The diagonal duality on the GPU: one decay a state and step, on the tensor cores.

With c_t (K) the sum of log a from the start of a chunk up to t, and h the state that
enters the chunk,

    y_t = (q_t exp(c_t))^T h + sum_{s<=t} S_ts v_s,
    S_ts = sum_i q_t[i] k_s[i] exp(c_t[i] - c_s[i]).

S is a matrix product once exp(c_t - c_s) is a product of something of t and
something of s. Two ways (Yang et al. 2023, section 4, take the first for all but small
blocks):

* through the chunk's middle r, exp(c_t - c_r) exp(c_r - c_s), where neither half decays
  by more than exp(-60): one product, whose entries above the diagonal are thrown away;
* by halving, for any decays: s and t lie in different halves of one block of 2, 4, … Q
  steps, and split at its middle, where both factors are at most 1: one product a level.
  float32 operands always go this way, and decays given as numbers.

Sums over time are products with 0-1 matrices on the tensor cores, each of terms of one
sign: nothing cancels. One decay a head is :mod:`ssm.ops.ssd.triton`. Forward and
backward are put together as there.
"""

# Kernels are Triton's language, which its own compiler checks.
# mypy: disable-error-code="no-untyped-def"

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm.ops._gpu import cdiv, on_device_of
from ssm.ops._library import operator
from ssm.ops.ssd.triton import (
    Arithmetic,
    arithmetic,
    block,
    dense,
    fills_gpu,
    in_two,
    like_strides,
    load_tile,
    plain,
    scalar_scan,
    state_places,
    store_tile,
    wide,
)

_FLOOR = tl.constexpr(-110.0)  # beyond it float32 has only 0
_HALF_RANGE = tl.constexpr(-60.0)  # of a half chunk that needs no halving
_WIDEST = 64  # of K and of V that a program holds (docs/kernels/ssd.md)
_SMALLEST = 2.0**-100  # a decay of 0 as a logarithm that float32 squares to 0

# --- what the kernels share -----------------------------------------------------------


@triton.jit
def _sums(which, x, T: tl.constexpr, PRECISION: tl.constexpr):
    """The sums over rows of x (Q, K) that the 0-1 matrix ``which`` (Q, Q) names."""
    if T == tl.bfloat16:  # noqa: SIM300  # T is no constant
        picks = tl.where(which, 1.0, 0.0).to(T)
        high, low = in_two(x, T)
        total = tl.dot(picks, low)
        total = tl.dot(picks, high, acc=total)
    else:
        total = tl.dot(
            tl.where(which, 1.0, 0.0),
            x,
            input_precision="tf32x3" if PRECISION == "tf32" else "ieee",
        )
    return total


@triton.jit
def _dot(x, y, T: tl.constexpr, PRECISION: tl.constexpr):
    """x @ y of float32 operands; in bfloat16 each is a sum of two, less a product of
    the seconds."""
    if T == tl.bfloat16:  # noqa: SIM300  # as above
        x_1, x_2 = in_two(x, T)
        y_1, y_2 = in_two(y, T)
        product = tl.dot(x_1, y_2)
        product = tl.dot(x_2, y_1, acc=product)
        product = tl.dot(x_1, y_1, acc=product)
    else:
        product = tl.dot(x.to(T), y.to(T), input_precision=PRECISION)
    return product


@triton.jit
def _dot_onto(total, x, y, T: tl.constexpr, PRECISION: tl.constexpr):
    """total + x @ y, x float32 and y in T: in bfloat16 x is a sum of two."""
    if T == tl.bfloat16:  # noqa: SIM300  # as above
        x_1, x_2 = in_two(x, T)
        total = tl.dot(x_2, y, acc=total)
        total = tl.dot(x_1, y, acc=total)
    else:
        total = tl.dot(x.to(T), y, acc=total, input_precision=PRECISION)
    return total


@triton.jit
def _load_logs(log_a, t, i, stride, left, K):
    """Logarithms of a chunk's decays, 0 outside."""
    x = load_tile(log_a, t, i, stride, left, K, tl.float32)
    return tl.where(x < _FLOOR, _FLOOR, x)  # -inf too; NaN stays


@triton.jit
def _level(t, level):
    """Of blocks of two halves of 2^level steps: the later half, same block, sums.

    The sums are from the middle: up to t in the later half, after t in the earlier.
    """
    half = t >> level
    later = (half & 1) == 1
    near = half[:, None] == half[None, :]
    upto = t[:, None] >= t[None, :]
    sums = near & (later[:, None] == upto)
    return later, (half >> 1)[:, None] == (half >> 1)[None, :], sums


@triton.jit
def _halves(q, k, x, later, T: tl.constexpr):
    """The two factors of a level: q exp(x) in the later halves, k exp(x) before."""
    e = tl.exp(x)
    q_e = tl.where(later[:, None], q.to(tl.float32) * e, 0.0)
    k_e = tl.where(later[:, None], 0.0, k.to(tl.float32) * e)
    return q_e.to(T), k_e.to(T), e


@triton.jit
def _through_middle(q, k, a, c, t, Q: tl.constexpr):
    """The two factors q exp(c - r), k exp(r - c), and c - r."""
    middle = tl.sum(tl.where((t < Q // 2)[:, None], a, 0.0), 0)
    x = c - middle[None, :]
    return q.to(tl.float32) * tl.exp(x), k.to(tl.float32) * tl.exp(-x), x


@triton.jit
def _is_mild(a, t, Q: tl.constexpr):
    """Whether both halves of the chunk decay by little, for every state."""
    first = tl.sum(tl.where((t < Q // 2)[:, None], a, 0.0), 0)
    second = tl.sum(tl.where((t < Q // 2)[:, None], 0.0, a), 0)
    return tl.min(tl.minimum(first, second), 0) > _HALF_RANGE


@triton.jit
def _scores(
    q, k, a, c, t, Q: tl.constexpr, LEVELS: tl.constexpr, HALVING: tl.constexpr,
    T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sum_i q_t[i] exp(c_t[i] - c_s[i]) k_s[i] for s <= t, else 0.

    c, the sums of a, is read where the chunk decays mildly.
    """
    halving = HALVING
    if not HALVING:
        halving = not _is_mild(a, t, Q)
    scores = tl.zeros([Q, Q], tl.float32)
    if halving:
        for level in tl.range(LEVELS, disable_licm=True):
            later, block, sums = _level(t, level)
            x = _sums(sums, a, T, PRECISION)
            q_e, k_e, _ = _halves(q, k, x, later, T)
            part = tl.dot(q_e, tl.trans(k_e), input_precision=PRECISION)
            scores += tl.where(block, part, 0.0)
    else:
        q_e, k_e, _ = _through_middle(q, k, a, c, t, Q)
        part = _dot(q_e, tl.trans(k_e), T, PRECISION)
        scores = tl.where(t[:, None] > t[None, :], part, 0.0)
    diagonal = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)
    return tl.where(t[:, None] == t[None, :], diagonal[:, None], scores)


@triton.jit
def _chunk_outputs(
    q, k, v, a, h, t, Q: tl.constexpr, LEVELS: tl.constexpr, HALVING: tl.constexpr,
    T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y of a chunk that the state h enters."""
    c = _sums(t[:, None] >= t[None, :], a, T, PRECISION)
    q_e = (q.to(tl.float32) * tl.exp(c)).to(T)
    y = tl.dot(q_e, h, input_precision=PRECISION)
    scores = _scores(q, k, a, c, t, Q, LEVELS, HALVING, T, PRECISION)
    return _dot_onto(y, scores, v, T, PRECISION)


@triton.jit
def _next_state(h, k, v, a, which, T: tl.constexpr, PRECISION: tl.constexpr):
    """exp(sum of a) h + (k exp(the sums of a that ``which`` names))^T v."""
    decay = tl.exp(_sums(which, a, T, PRECISION))
    k_e = (k.to(tl.float32) * decay).to(T)
    whole = tl.exp(tl.sum(a, 0))
    return tl.dot(tl.trans(k_e), v, acc=h * whole[:, None], input_precision=PRECISION)


# --- forward --------------------------------------------------------------------------


@triton.jit
def _walk(
    q, k, v, log_a, h0, y, final,
    q_b, q_t, k_b, k_t, v_b, v_t, a_b, a_t, h_k, h_v,
    L, H, K, V,
    Q: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    HALVING: tl.constexpr, T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All chunks of a row and head, one after the other, the state in registers."""
    b, head = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    t, i, j = tl.arange(0, Q), tl.arange(0, BK), tl.arange(0, BV)
    inside = (i < K)[:, None] & (j < V)[None, :]
    state = (b * H + head) * K * V
    h = tl.load(state_places(h0 + state, i, j, h_k, h_v), mask=inside, other=0.0)
    q += b * q_b + head * K
    k += b * k_b + head * K
    v += b * v_b + head * V
    log_a += b * a_b + head * K
    y += b * L * H * V + head * V
    for start in tl.range(0, L, Q, disable_licm=True):  # what it hoists is spilled
        first, left = wide(start), L - start
        q_c = load_tile(q + first * q_t, t, i, q_t, left, K, T)
        k_c = load_tile(k + first * k_t, t, i, k_t, left, K, T)
        v_c = load_tile(v + first * v_t, t, j, v_t, left, V, T)
        a_c = _load_logs(log_a + first * a_t, t, i, a_t, left, K)
        y_c = _chunk_outputs(
            q_c, k_c, v_c, a_c, h.to(T), t, Q, LEVELS, HALVING, T, PRECISION
        )
        store_tile(y + first * H * V, t, j, H * V, left, V, y_c)
        h = _next_state(h, k_c, v_c, a_c, t[:, None] < t[None, :], T, PRECISION)
    tl.store(state_places(final + state, i, j, h_k, h_v), h, mask=inside)


@triton.jit
def _states(
    k, v, log_a, h0, states, final,
    k_b, k_t, v_b, v_t, a_b, a_t, h_k, h_v,
    L, H, K, V,
    Q: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, REVERSE: tl.constexpr,
    T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of the state that enters each chunk, and of the one that leaves the last.

    REVERSE: the same for the gradient of the state, from the last chunk to the first;
    then k is q, and v the gradient of y.
    """
    b, head = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    t = tl.arange(0, Q)
    i = tl.program_id(1) * BK + tl.arange(0, BK)
    j = tl.program_id(2) * BV + tl.arange(0, BV)
    inside = (i < K)[:, None] & (j < V)[None, :]
    state = (b * H + head) * K * V
    h = tl.load(state_places(h0 + state, i, j, h_k, h_v), mask=inside, other=0.0)
    k += b * k_b + head * K
    v += b * v_b + head * V
    log_a += b * a_b + head * K
    chunks = tl.cdiv(L, Q)
    states += (b * chunks * H + head) * K * V
    which = t[:, None] < t[None, :]
    if REVERSE:
        which = t[:, None] >= t[None, :]
    for n in range(chunks):
        c = n
        if REVERSE:
            c = chunks - 1 - n
        first, left = wide(c) * Q, L - c * Q
        k_c = load_tile(k + first * k_t, t, i, k_t, left, K, T)
        v_c = load_tile(v + first * v_t, t, j, v_t, left, V, T)
        a_c = _load_logs(log_a + first * a_t, t, i, a_t, left, K)
        store_tile(states + wide(c) * H * K * V, i, j, V, K, V, h)
        h = _next_state(h, k_c, v_c, a_c, which, T, PRECISION)
    tl.store(state_places(final + state, i, j, h_k, h_v), h, mask=inside)


@triton.jit
def _outputs(
    q, k, v, log_a, states, y,
    q_b, q_t, k_b, k_t, v_b, v_t, a_b, a_t,
    L, H, K, V,
    Q: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    HALVING: tl.constexpr, T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y of one chunk of a row and head, from the state that enters it."""
    chunks = tl.cdiv(L, Q)
    head, chunk = tl.program_id(0) % H, tl.program_id(0) // H
    b, c = (chunk // chunks).to(tl.int64), chunk % chunks
    first, left = c.to(tl.int64) * Q, L - c * Q
    t, i, j = tl.arange(0, Q), tl.arange(0, BK), tl.arange(0, BV)
    q_c = load_tile(q + b * q_b + first * q_t + head * K, t, i, q_t, left, K, T)
    k_c = load_tile(k + b * k_b + first * k_t + head * K, t, i, k_t, left, K, T)
    v_c = load_tile(v + b * v_b + first * v_t + head * V, t, j, v_t, left, V, T)
    a_c = _load_logs(log_a + b * a_b + first * a_t + head * K, t, i, a_t, left, K)
    entering = states + ((b * chunks + c) * H + head) * K * V
    h = load_tile(entering, i, j, V, K, V, T)
    y_c = _chunk_outputs(q_c, k_c, v_c, a_c, h, t, Q, LEVELS, HALVING, T, PRECISION)
    store_tile(y + ((b * L + first) * H + head) * V, t, j, H * V, left, V, y_c)


# --- backward -------------------------------------------------------------------------


@triton.jit
def _by_halving(
    m, q, k, a, t, LEVELS: tl.constexpr, T: tl.constexpr, PRECISION: tl.constexpr
):
    """From m, the gradient of the scores below the diagonal: those of q, k and a."""
    dq = q.to(tl.float32) * 0.0
    dk = dq
    da = dq
    for level in tl.range(LEVELS, disable_licm=True):
        later, block, sums = _level(t, level)
        x = _sums(sums, a, T, PRECISION)
        q_e, k_e, e = _halves(q, k, x, later, T)
        part = tl.where(block, m, 0.0).to(T)
        dq_e = tl.dot(part, k_e, input_precision=PRECISION)
        dk_e = tl.dot(tl.trans(part), q_e, input_precision=PRECISION)
        dq += tl.where(later[:, None], dq_e * e, 0.0)
        dk += tl.where(later[:, None], 0.0, dk_e * e)
        dx = tl.where(later[:, None], q_e.to(tl.float32) * dq_e, 0.0)
        dx += tl.where(later[:, None], 0.0, k_e.to(tl.float32) * dk_e)
        da += _sums(tl.trans(sums), dx, T, PRECISION)
    return dq, dk, da


@triton.jit
def _by_middle(
    m, q, k, a, c, t, Q: tl.constexpr, T: tl.constexpr, PRECISION: tl.constexpr
):
    """The same for q and k; a's sums over t and later the first times q, less k's."""
    q_e, k_e, x = _through_middle(q, k, a, c, t, Q)
    dq = _dot(m, k_e, T, PRECISION) * tl.exp(x)
    dk = _dot(tl.trans(m), q_e, T, PRECISION) * tl.exp(-x)
    return dq, dk


@triton.jit
def _value_gradients(
    q, k, log_a, dy, leaving, dv,
    q_b, q_t, k_b, k_t, a_b, a_t, dy_b, dy_t,
    L, H, K, V,
    Q: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    HALVING: tl.constexpr, T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of v in one chunk; g is that of the state that leaves."""
    chunks = tl.cdiv(L, Q)
    head, chunk = tl.program_id(0) % H, tl.program_id(0) // H
    b, c = (chunk // chunks).to(tl.int64), chunk % chunks
    first, left = c.to(tl.int64) * Q, L - c * Q
    t, i, j = tl.arange(0, Q), tl.arange(0, BK), tl.arange(0, BV)
    q_c = load_tile(q + b * q_b + first * q_t + head * K, t, i, q_t, left, K, T)
    k_c = load_tile(k + b * k_b + first * k_t + head * K, t, i, k_t, left, K, T)
    dy_c = load_tile(dy + b * dy_b + first * dy_t + head * V, t, j, dy_t, left, V, T)
    a_c = _load_logs(log_a + b * a_b + first * a_t + head * K, t, i, a_t, left, K)
    g = load_tile(leaving + ((b * chunks + c) * H + head) * K * V, i, j, V, K, V, T)
    to_end = _sums(t[:, None] < t[None, :], a_c, T, PRECISION)
    k_e = (k_c.to(tl.float32) * tl.exp(to_end)).to(T)
    dv_c = tl.dot(k_e, g, input_precision=PRECISION)
    c = tl.sum(a_c, 0)[None, :] - to_end  # exact enough where decays are mild
    scores = _scores(q_c, k_c, a_c, c, t, Q, LEVELS, HALVING, T, PRECISION)
    dv_c = _dot_onto(dv_c, tl.trans(scores), dy_c, T, PRECISION)
    store_tile(dv + ((b * L + first) * H + head) * V, t, j, H * V, left, V, dv_c)


@triton.jit
def _key_gradients(
    q, k, v, log_a, dy, states, leaving, dq, dk, dlog_a,
    q_b, q_t, k_b, k_t, v_b, v_t, a_b, a_t, dy_b, dy_t,
    L, H, K, V,
    Q: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    HALVING: tl.constexpr, ALL: tl.constexpr, T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The other gradients of one chunk.

    Launched once for the chunks that decay mildly and once, HALVING, for the others
    (or once for ALL): both in one kernel would not fit into the registers.

    That of a logarithm at t sums what is carried by all paths through t: from the state
    to outputs i >= t, from inputs j < t to the end, from the state to the end, and
    within the chunk.
    """
    chunks = tl.cdiv(L, Q)
    head, chunk = tl.program_id(0) % H, tl.program_id(0) // H
    b, c = (chunk // chunks).to(tl.int64), chunk % chunks
    first, left = c.to(tl.int64) * Q, L - c * Q
    t, i, j = tl.arange(0, Q), tl.arange(0, BK), tl.arange(0, BV)
    upto, after = t[:, None] >= t[None, :], t[:, None] < t[None, :]
    q_c = load_tile(q + b * q_b + first * q_t + head * K, t, i, q_t, left, K, T)
    k_c = load_tile(k + b * k_b + first * k_t + head * K, t, i, k_t, left, K, T)
    v_c = load_tile(v + b * v_b + first * v_t + head * V, t, j, v_t, left, V, T)
    dy_c = load_tile(dy + b * dy_b + first * dy_t + head * V, t, j, dy_t, left, V, T)
    a_c = _load_logs(log_a + b * a_b + first * a_t + head * K, t, i, a_t, left, K)
    due = True
    if not ALL:
        due = _is_mild(a_c, t, Q) != HALVING
    if due:
        state = ((b * chunks + c) * H + head) * K * V
        h = load_tile(states + state, i, j, V, K, V, T)
        g = load_tile(leaving + state, i, j, V, K, V, T)
        through = tl.sum(h.to(tl.float32) * g.to(tl.float32), 1)
        through *= tl.exp(tl.sum(a_c, 0))

        m = tl.dot(dy_c, tl.trans(v_c), input_precision=PRECISION)
        m = tl.where(t[:, None] > t[None, :], m, 0.0)
        from_start = _sums(upto, a_c, T, PRECISION)
        coming = tl.dot(dy_c, tl.trans(h), input_precision=PRECISION)
        coming *= tl.exp(from_start)
        if HALVING:
            dq_c, dk_c, da_c = _by_halving(m, q_c, k_c, a_c, t, LEVELS, T, PRECISION)
            dq_c += coming
            carried = coming * q_c.to(tl.float32)
            da_c += _sums(tl.trans(upto), carried, T, PRECISION)
        else:
            dq_c, dk_c = _by_middle(m, q_c, k_c, a_c, from_start, t, Q, T, PRECISION)
            dq_c += coming
            carried = dq_c * q_c.to(tl.float32) - dk_c * k_c.to(tl.float32)
            da_c = _sums(tl.trans(upto), carried, T, PRECISION)
        place = ((b * L + first) * H + head) * K
        same = tl.sum(dy_c.to(tl.float32) * v_c.to(tl.float32), 1)[:, None]
        dq_c += same * k_c.to(tl.float32)
        store_tile(dq + place, t, i, H * K, left, K, dq_c)
        reaching = tl.dot(v_c, tl.trans(g), input_precision=PRECISION)
        reaching *= tl.exp(_sums(after, a_c, T, PRECISION))
        dk_c += reaching + same * q_c.to(tl.float32)
        store_tile(dk + place, t, i, H * K, left, K, dk_c)
        da_c += _sums(tl.trans(after), reaching * k_c.to(tl.float32), T, PRECISION)
        store_tile(dlog_a + place, t, i, H * K, left, K, da_c + through[None, :])


# --- launches -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Shape:
    """What the launches need of q (B, L, H, K) and v (B, L, H, V)."""

    batch: int
    L: int
    H: int
    K: int
    V: int
    Q: int

    @property
    def chunks(self) -> int:
        return cdiv(self.L, self.Q)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.L, self.H, self.K, self.V


def _shape(q: Tensor, v: Tensor, how: Arithmetic) -> _Shape:
    batch, L, H, K = q.shape
    Q = 64 if how.torch == torch.bfloat16 else 32
    return _Shape(batch, L, H, K, v.shape[3], Q)


def _options(shape: _Shape, how: Arithmetic, halving: bool) -> dict[str, object]:
    return {
        "Q": shape.Q,
        "LEVELS": shape.Q.bit_length() - 1,
        "BK": block(shape.K, how),
        "BV": block(shape.V, how),
        "HALVING": halving or how.exact,
        "T": how.T,
        "PRECISION": how.precision,
    }


def _strides(*tensors: Tensor) -> list[int]:
    """Of rows and steps."""
    return [x.stride(i) for x in tensors for i in (0, 1)]


def _pass_states(
    sequences: tuple[Tensor, Tensor, Tensor],
    ends: tuple[Tensor, Tensor],
    shape: _Shape,
    how: Arithmetic,
    *,
    reverse: bool,
) -> Tensor:
    """The states that enter the chunks; ``ends``: the first, and room for the last."""
    h0, final = ends
    K, V = shape.K, shape.V
    room = (shape.batch, shape.chunks, shape.H, K, V)
    states = final.new_empty(room, dtype=how.torch)
    BK, BV = min(64, block(K, how)), min(64, block(V, how))
    rows = shape.batch * shape.H
    grid = (rows, cdiv(K, BK), cdiv(V, BV))
    _states[grid](
        *sequences, h0, states, final,
        *(_strides(*sequences)), *h0.stride()[2:], *shape.sizes,
        Q=shape.Q, BK=BK, BV=BV, REVERSE=reverse,
        T=how.T, PRECISION=how.precision, num_warps=4, num_stages=3,
    )  # fmt: skip
    return states


@operator("diagonal_ssd_triton", device="CompositeExplicitAutograd")
def _scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_a: Tensor,
    initial_state: Tensor,
    halving: bool,
) -> tuple[Tensor, Tensor]:
    y, final = _empty_outputs(v, initial_state)
    if 0 in y.shape or 0 in final.shape:
        return y.zero_(), final.copy_(initial_state)
    how = arithmetic(q, k, v)
    shape = _shape(q, v, how)
    q, k, v, log_a = plain(q), plain(k), plain(v), plain(log_a)
    sequences, strides = (q, k, v, log_a), _strides(q, k, v, log_a)
    options = _options(shape, how, halving)
    ends = (initial_state, final)
    rows = shape.batch * shape.H
    with on_device_of(v):
        if fills_gpu(rows, v):
            _walk[rows,](
                *sequences, initial_state, y, final, *strides,
                *initial_state.stride()[2:], *shape.sizes, **options,
                num_warps=4, num_stages=2 if how.torch == torch.bfloat16 else 1,
            )  # fmt: skip
        else:
            states = _pass_states((k, v, log_a), ends, shape, how, reverse=False)
            _outputs[rows * shape.chunks,](
                *sequences, states, y, *strides, *shape.sizes, **options,
                num_warps=4, num_stages=1,
            )  # fmt: skip
    return y, final


@_scan.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_a: Tensor,
    initial_state: Tensor,
    halving: bool,
) -> tuple[Tensor, Tensor]:
    return _empty_outputs(v, initial_state)


def _empty_outputs(v: Tensor, initial_state: Tensor) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), torch.empty_like(initial_state)


@operator("diagonal_ssd_triton_backward", device="CompositeExplicitAutograd")
def _adjoint(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_a: Tensor,
    initial_state: Tensor,
    dy: Tensor,
    dfinal: Tensor,
    halving: bool,
) -> list[Tensor]:
    gradients = _empty_gradients(q, k, v, log_a, initial_state)
    dh0 = gradients[4]
    if 0 in v.shape or 0 in q.shape:
        return [x.zero_() for x in gradients[:4]] + [dh0.copy_(dfinal)]
    how = arithmetic(q, k, v)
    shape = _shape(q, v, how)
    q, k, v, log_a, dy = (plain(x) for x in (q, k, v, log_a, dy))
    with on_device_of(v):
        ends = (initial_state, torch.empty_like(initial_state))
        entering = _pass_states((k, v, log_a), ends, shape, how, reverse=False)
        ends = (like_strides(dfinal, dh0), dh0)
        leaving = _pass_states((q, dy, log_a), ends, shape, how, reverse=True)
        grid = (shape.batch * shape.H * shape.chunks,)
        dq, dk, dv, dlog_a, _ = gradients
        options = _options(shape, how, halving)
        _value_gradients[grid](
            q, k, log_a, dy, leaving, dv, *_strides(q, k, log_a, dy), *shape.sizes,
            **options, num_warps=4, num_stages=1,
        )  # fmt: skip
        always = bool(options["HALVING"])
        for way in (True,) if always else (False, True):
            _key_gradients[grid](
                q, k, v, log_a, dy, entering, leaving, dq, dk, dlog_a,
                *_strides(q, k, v, log_a, dy), *shape.sizes,
                **(options | {"HALVING": way}), ALL=always,
                num_warps=4, num_stages=1,
            )  # fmt: skip
    return gradients


@_adjoint.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_a: Tensor,
    initial_state: Tensor,
    dy: Tensor,
    dfinal: Tensor,
    halving: bool,
) -> list[Tensor]:
    return _empty_gradients(q, k, v, log_a, initial_state)


def _empty_gradients(
    q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, initial_state: Tensor
) -> list[Tensor]:
    contiguous = [x.new_empty(x.shape) for x in (q, k, v, log_a)]
    return [*contiguous, torch.empty_like(initial_state)]


def _save(ctx, inputs, output):  # torch.library's hook
    *operands, ctx.halving = inputs
    ctx.save_for_backward(*operands)


def _differentiate(ctx, dy, dfinal):  # as above
    return *_adjoint(*ctx.saved_tensors, dy, dfinal, ctx.halving), None


_scan.register_autograd(_differentiate, setup_context=_save)
_adjoint.refuse_backward("diagonal_ssd", "triton")


def _vector_scan(
    q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, state: Tensor, halving: bool
) -> tuple[Tensor, Tensor]:
    """One decay a state, of any sizes.

    A scan is linear in v, and a sum over the states: wide ones are cut to what a
    program holds.
    """
    if v.shape[3] > _WIDEST:
        narrow = [
            _vector_scan(q, k, v_i, log_a, h_i, halving)
            for v_i, h_i in zip(
                v.split(_WIDEST, 3), state.split(_WIDEST, 3), strict=True
            )
        ]
        return torch.cat([y for y, _ in narrow], 3), torch.cat(
            [h for _, h in narrow], 3
        )
    if q.shape[3] > _WIDEST:
        pieces = zip(*(x.split(_WIDEST, 3) for x in (q, k, log_a)), strict=True)
        parts = [
            _vector_scan(q_i, k_i, v, a_i, h_i, halving)
            for (q_i, k_i, a_i), h_i in zip(
                pieces, state.split(_WIDEST, 2), strict=True
            )
        ]
        y = torch.stack([y.float() for y, _ in parts]).sum(0)
        return y.to(v.dtype), torch.cat([h for _, h in parts], 2)
    y, final = _scan(q, k, v, log_a, dense(state), halving)
    return y, final


def _signs_and_logs(a: Tensor) -> tuple[Tensor, Tensor]:
    """The product of the signs of a up to each step, and log |a|.

    A 0 enters as 2^-100: any product with it vanishes beside the others, and its own
    gradient, what is carried by paths through it over its value, is exact.
    """
    sign = torch.where(a < 0, -1.0, 1.0)
    nonzero = torch.where(a.abs() < _SMALLEST, _SMALLEST * sign, a)
    value = a + (nonzero - a).detach()
    return sign.cumprod(1), value.abs().log()


def diagonal_ssd_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decays: Tensor,
    initial_state: Tensor,
    *,
    log: bool,
    chunk_size: int,  # the kernels' chunks are theirs
) -> tuple[Tensor, Tensor]:
    """y and the final state; see :func:`ssm.ops.diagonal_ssd.diagonal_ssd`.

    Decays given as numbers of any sign, 0 too, go through their logarithms: of the
    product a_t … a_{s+1} the sign is that of all before t times that of all before s,
    which are put into q and k.
    """
    if not log:
        signs, decays = _signs_and_logs(decays.float().expand(q.shape))
        y, final = _vector_scan(
            q * signs.to(q.dtype), k * signs.to(k.dtype), v, decays, initial_state, True
        )
        return y, final * signs[:, -1, :, :, None]
    if decays.shape[3] == 1:
        log_a = decays.squeeze(3).float().contiguous()
        return scalar_scan(q, k, v, None, log_a, None, initial_state)
    return _vector_scan(q, k, v, decays, initial_state, False)
