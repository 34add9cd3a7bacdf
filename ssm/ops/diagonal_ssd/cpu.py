"""The diagonal recurrence compiled by Numba: the values' channels innermost, so that
they fill the vector units; rows and heads on all cores. Needs no compiler.

The forward pass keeps the state at each chunk's start; the backward pass recomputes
the states of one chunk at a time from it and walks back through them.
"""

import numba
import numpy as np
from torch import Tensor

from ssm.ops._library import operator
from ssm.ops._numba import array, start_threads

start_threads()

_FAST = {"contract", "reassoc", "nsz"}  # lets sums over V be vectorised; NaN is kept


@numba.njit(nogil=True)
def _copy(source, target):  # type: ignore[no-untyped-def]
    """target[:] = source, which Numba would take seconds to compile."""
    for i in range(target.shape[0]):
        for j in range(target.shape[1]):
            target[i, j] = source[i, j]


@numba.njit(parallel=True, cache=True, nogil=True, fastmath=_FAST)
def _forward(q, k, v, a, h0, chunk, y, starts, final):  # type: ignore[no-untyped-def]
    rows, L, heads, K = q.shape
    V = v.shape[3]
    per_state = a.shape[3] > 1
    for task in numba.prange(rows * heads):
        row, head = task // heads, task % heads
        h, out = np.empty((K, V), h0.dtype), np.empty(V, h0.dtype)
        _copy(h0[row, head], h)
        for t in range(L):
            if t % chunk == 0:
                _copy(h, starts[row, t // chunk, head])
            v_t = v[row, t, head]
            for j in range(V):
                out[j] = 0
            for i in range(K):
                a_i = a[row, t, head, i if per_state else 0]
                k_i, q_i = k[row, t, head, i], q[row, t, head, i]
                for j in range(V):
                    h_ij = a_i * h[i, j] + k_i * v_t[j]
                    h[i, j] = h_ij
                    out[j] += q_i * h_ij
            for j in range(V):
                y[row, t, head, j] = out[j]
        _copy(h, final[row, head])


@numba.njit(parallel=True, cache=True, nogil=True, fastmath=_FAST)
def _backward(q, k, v, a, starts, dy, dfinal, chunk, dq, dk, dv, da, dh0):  # type: ignore[no-untyped-def]
    rows, L, heads, K = q.shape
    V = v.shape[3]
    per_state = a.shape[3] > 1
    for task in numba.prange(rows * heads):
        row, head = task // heads, task % heads
        g, dv_t = np.empty((K, V), dfinal.dtype), np.empty(V, dfinal.dtype)
        states = np.empty((chunk + 1, K, V), g.dtype)
        _copy(dfinal[row, head], g)
        for c in range(starts.shape[1] - 1, -1, -1):
            first, last = c * chunk, min(c * chunk + chunk, L)
            _copy(starts[row, c, head], states[0])
            for t in range(first, last):
                v_t = v[row, t, head]
                before, after = states[t - first], states[t - first + 1]
                for i in range(K):
                    a_i = a[row, t, head, i if per_state else 0]
                    k_i = k[row, t, head, i]
                    for j in range(V):
                        after[i, j] = a_i * before[i, j] + k_i * v_t[j]
            for t in range(last - 1, first - 1, -1):
                v_t, dy_t = v[row, t, head], dy[row, t, head]
                before, after = states[t - first], states[t - first + 1]
                for j in range(V):
                    dv_t[j] = 0
                for i in range(K):
                    i_a = i if per_state else 0
                    a_i = a[row, t, head, i_a]
                    k_i, q_i = k[row, t, head, i], q[row, t, head, i]
                    dq_i = dk_i = da_i = g.dtype.type(0)
                    for j in range(V):
                        g_ij = g[i, j] + q_i * dy_t[j]
                        dq_i += after[i, j] * dy_t[j]
                        dk_i += g_ij * v_t[j]
                        da_i += g_ij * before[i, j]
                        dv_t[j] += g_ij * k_i
                        g[i, j] = a_i * g_ij
                    dq[row, t, head, i] = dq_i
                    dk[row, t, head, i] = dk_i
                    da[row, t, head, i_a] += da_i
                for j in range(V):
                    dv[row, t, head, j] = dv_t[j]
        _copy(g, dh0[row, head])


@operator("diagonal_ssd_cpu")
def _scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decays: Tensor,
    initial_state: Tensor,
    log: bool,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    y, final, starts = _empty_outputs(v, initial_state, chunk)
    a = decays.exp() if log else decays
    operands = (array(x) for x in (q, k, v, a, initial_state))
    arguments = (*operands, chunk, y.numpy(), starts.numpy(), final.numpy())
    _forward(*arguments)
    return y, final, starts


@_scan.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decays: Tensor,
    initial_state: Tensor,
    log: bool,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_outputs(v, initial_state, chunk)


def _empty_outputs(
    v: Tensor, initial_state: Tensor, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state and the state at the start of each chunk."""
    rows, *rest = initial_state.shape
    chunks = (v.shape[1] + chunk - 1) // chunk
    return (
        v.new_empty(v.shape),
        v.new_empty(initial_state.shape),
        v.new_empty(rows, chunks, *rest),
    )


@operator("diagonal_ssd_cpu_backward")
def _adjoint(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decays: Tensor,
    starts: Tensor,
    dy: Tensor,
    dfinal: Tensor,
    log: bool,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    gradients = _empty_gradients(q, k, v, decays, dfinal)
    gradients[3].zero_()  # summed over the states of a head where it has one decay
    a = decays.exp() if log else decays
    operands = (array(x) for x in (q, k, v, a, starts, dy, dfinal))
    arguments = (*operands, chunk, *(x.numpy() for x in gradients))
    _backward(*arguments)
    if log:
        gradients[3].mul_(a)
    return gradients


@_adjoint.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decays: Tensor,
    starts: Tensor,
    dy: Tensor,
    dfinal: Tensor,
    log: bool,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _empty_gradients(q, k, v, decays, dfinal)


def _empty_gradients(
    q: Tensor, k: Tensor, v: Tensor, decays: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k, v, decays, state = (x.new_empty(x.shape) for x in (q, k, v, decays, state))
    return q, k, v, decays, state


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]  # torch.library's hook
    q, k, v, decays, _, log, chunk = inputs
    ctx.save_for_backward(q, k, v, decays, output[2])
    ctx.log, ctx.chunk = log, chunk
    ctx.mark_non_differentiable(output[2])


def _differentiate(ctx, dy, dfinal, _):  # type: ignore[no-untyped-def]  # as above
    return *_adjoint(*ctx.saved_tensors, dy, dfinal, ctx.log, ctx.chunk), None, None


_scan.register_autograd(_differentiate, setup_context=_save)
_adjoint.refuse_backward("diagonal_ssd")


def diagonal_ssd_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decays: Tensor,
    initial_state: Tensor,
    *,
    log: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """y and the final state; see :func:`ssm.ops.diagonal_ssd.diagonal_ssd`."""
    q, k, v, decays = (x.to(initial_state.dtype) for x in (q, k, v, decays))
    y, final, _ = _scan(q, k, v, decays, initial_state, log, chunk_size)
    return y, final
