"""The diagonal duality in matrix products: any device, any dtype, no compiler.

Within a chunk y = (M o mask) v with M[t, s] = sum_i q_t[i] a_t[i] … a_{s+1}[i] k_s[i]
(arXiv:2510.04944, section 3), put together by halving: see
:mod:`ssm.ops._segments`. Between chunks the state is passed. With a single decay a head
(a of size 1) M is q k^T times one matrix of products, which is Mamba-2's path.
Groups of chunks are computed again in the backward pass.
"""

from torch import Tensor

from ssm.ops._segments import (
    LOGS,
    NUMBERS,
    Decays,
    chunk_length,
    diagonal_scores,
    in_chunks,
    in_groups,
    pass_states,
    scalar_chunks,
)


def diagonal_ssd_torch(
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
    Q = chunk_length(chunk_size, q.shape[1])
    kind = LOGS if log else NUMBERS
    chunks = _scalar if decays.shape[3] == 1 else _diagonal

    def group(
        q: Tensor, k: Tensor, v: Tensor, decays: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        steps, dtype = q.shape[1], state.dtype
        q, k, v = (in_chunks(x.to(dtype), Q) for x in (q, k, v))
        decays = in_chunks(decays.to(dtype), Q, kind.unit)
        y, state = chunks(q, k, v, decays, state, kind)
        return y.flatten(1, 2)[:, :steps], state

    return in_groups(group, (q, k, v, decays), initial_state, q.shape[2], Q)


def _scalar(
    q: Tensor, k: Tensor, v: Tensor, decays: Tensor, state: Tensor, kind: Decays
) -> tuple[Tensor, Tensor]:
    """One decay a head: every head is a group of its own."""
    y, state = scalar_chunks(q, k, v.unsqueeze(4), decays, state.unsqueeze(3), kind)
    return y.squeeze(4), state.squeeze(3)


def _diagonal(
    q: Tensor, k: Tensor, v: Tensor, decays: Tensor, state: Tensor, kind: Decays
) -> tuple[Tensor, Tensor]:
    """One decay a state: q, k, decays (B, n, Q, H, K), v (B, n, Q, H, V)."""
    q, k, v, decays = (x.transpose(2, 3) for x in (q, k, v, decays))
    scores, start, end = diagonal_scores(q, k, decays, kind)
    added = (k * kind.value(end)).mT @ v
    whole = kind.value(start[..., -1, :]).unsqueeze(-1)
    entering, state = pass_states(whole, added, state)
    y = scores @ v + (q * kind.value(start)) @ entering
    return y.transpose(2, 3), state
