"""Mamba-2's scan in matrix products: any device, any dtype, no compiler.

Dao & Gu 2024, section 6: chunks of masked attention with L = exp(segment sums), and a
state that is passed from chunk to chunk. Groups of chunks are computed again in the
backward pass; what is saved between them is the state.
"""

from torch import Tensor

from ssm.ops._segments import LOGS, chunk_length, in_chunks, in_groups, scalar_chunks
from ssm.ops.ssd.naive import skip_and_gate


def ssd_torch(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor,
    *,
    D: Tensor | None,
    z: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """y and the final state; see :func:`ssm.ops.ssd.ssd`."""
    H, G = x.shape[2], B.shape[2]
    Q = chunk_length(chunk_size, x.shape[1])
    dtype = initial_state.dtype

    def group(
        x: Tensor, dt: Tensor, B: Tensor, C: Tensor, *gate_and_state: Tensor
    ) -> tuple[Tensor, Tensor]:
        *gate, state = gate_and_state
        steps = x.shape[1]
        log_decays = (dt * A).to(dtype).unflatten(2, (G, H // G))
        gains = (x * dt.to(dtype)[..., None]).unflatten(2, (G, H // G))
        q, k, v = (in_chunks(s.to(dtype), Q) for s in (C, B, gains))
        decays = in_chunks(log_decays, Q, LOGS.unit)
        y, state = scalar_chunks(q, k, v, decays, state, LOGS)
        y = y.flatten(3, 4).flatten(1, 2)[:, :steps]
        return skip_and_gate(y, x, D, gate[0] if gate else None), state

    state = initial_state.unflatten(1, (G, H // G)).movedim(4, 2)  # (B, G, N, R, P)
    y, state = in_groups(group, (x, dt, B, C, *([] if z is None else [z])), state, H, Q)
    return y, state.movedim(2, 4).flatten(1, 2)
