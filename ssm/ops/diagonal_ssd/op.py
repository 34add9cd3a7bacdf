"""The general diagonal case of the duality: one decay per state dimension and step."""

from collections.abc import Sequence

import torch
from jaxtyping import Inexact, Int
from torch import Tensor

from ssm._errors import (
    bad_argument,
    check_alike,
    check_finite_values,
    check_floating,
    check_shape,
)
from ssm.ops._dispatch import Backend, Choice, Request, find, remembered
from ssm.ops._dtypes import compute_dtype
from ssm.ops._gpu import gpu_backend
from ssm.ops._numba import refuses_real
from ssm.ops._ragged import packed_from_padded
from ssm.ops._segments import check_chunk_size, neutralised, over_pieces, unpacked
from ssm.ops.diagonal_ssd.naive import diagonal_ssd_loop, one_step
from ssm.ops.diagonal_ssd.torch import diagonal_ssd_torch


def _cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decays: Tensor,
    initial_state: Tensor,
    *,
    log: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    # compiles only where it runs
    from ssm.ops.diagonal_ssd.cpu import diagonal_ssd_cpu

    return diagonal_ssd_cpu(
        q, k, v, decays, initial_state, log=log, chunk_size=chunk_size
    )


def _triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decays: Tensor,
    initial_state: Tensor,
    *,
    log: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    # compiles only where it runs
    from ssm.ops.diagonal_ssd.triton import diagonal_ssd_triton

    return diagonal_ssd_triton(
        q, k, v, decays, initial_state, log=log, chunk_size=chunk_size
    )


BACKENDS = {
    "cpu": Backend(_cpu, refuses_real),
    "triton": gpu_backend("diagonal_ssd", "triton", _triton),
    "torch": Backend(diagonal_ssd_torch),
    "naive": Backend(diagonal_ssd_loop),
}


def diagonal_ssd(
    q: Inexact[Tensor, "B L H K"],
    k: Inexact[Tensor, "B L H K"],
    v: Inexact[Tensor, "B L H V"],
    a: Inexact[Tensor, "B L H #K"] | None = None,
    *,
    log_a: Inexact[Tensor, "B L H #K"] | None = None,
    initial_state: Inexact[Tensor, "B H K V"] | None = None,
    lengths: Int[Tensor, " B"] | None = None,
    cu_seqlens: Int[Tensor, " S1"] | None = None,
    states_at: Sequence[int] | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
    check_domain: bool = False,
) -> tuple[Inexact[Tensor, "B L H V"], ...]:
    """h_t = diag(a_t) h_{t-1} + k_t v_t^T, y_t = q_t^T h_t.

    The diagonal case of the state space duality (arXiv:2510.04944), also known as
    gated linear attention. Decays enter as ``a`` (any real or complex numbers: 0, 1,
    negatives) or as ``log_a`` (from -inf to 0), one of the two; of size 1 in the last
    dimension they are one decay a head, which is Mamba-2's cheaper case. Complex
    operands are taken as they are: nothing is conjugated.

    Returns (y, final_state); with ``states_at`` (indices of steps) also the states
    after those steps, (B, len(states_at), H, K, V). All are differentiable in every
    operand. The state is float32 at least; y has the dtype of v (complex where an
    operand is). ``lengths`` marks padding and ``cu_seqlens`` packs sequences into one
    row (then states have one row a sequence, and steps count from each start): see
    :mod:`ssm.ops._ragged`. ``chunk_size`` is rounded up to a power of 2.

    Raises ArgumentError for wrong shapes, dtypes or devices and, with
    ``check_domain``, for values that are not finite (but log_a may be -inf) and for
    log_a > 0; BackendError where ``backend`` cannot run.
    """
    log, decays = _decays(a, log_a)
    choice = _settle(q, k, v, decays, log, initial_state, chunk_size, backend)
    chosen, dtype = choice.taken(), choice.dtype
    sequences, lengths = unpacked((q, k, v, decays), lengths, cu_seqlens)
    fills = [0.0, 0.0, 0.0, 0.0 if log else 1.0]
    sequences = neutralised(sequences, lengths, fills)
    h0 = _initial(initial_state, sequences[0], v.shape[3], dtype)
    if check_domain:
        _check_values(*sequences, log=log, initial_state=initial_state)

    def run(
        q: Tensor, k: Tensor, v: Tensor, decays: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        if v.shape[1] == 0:
            return v.to(dtype), state
        return chosen.run(q, k, v, decays, state, log=log, chunk_size=chunk_size)

    y, *states = over_pieces(run, sequences, h0, states_at)
    if cu_seqlens is not None:
        y = packed_from_padded(y, cu_seqlens)
    out_dtype = torch.promote_types(v.dtype, dtype) if dtype.is_complex else v.dtype
    return y.to(out_dtype), *states


@remembered
def _settle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decays: Tensor,
    log: bool,
    initial_state: Tensor | None,
    chunk_size: int,
    backend: str,
) -> Choice:
    """The operands of :func:`diagonal_ssd`, checked, and what serves them."""
    _check(q, k, v, decays, "log_a" if log else "a")
    check_chunk_size(chunk_size)
    dtype = compute_dtype(q, k, v, decays, initial_state)
    return find("diagonal_ssd", backend, BACKENDS, Request(q.device, dtype))


def diagonal_ssd_step(
    q: Inexact[Tensor, "B H K"],
    k: Inexact[Tensor, "B H K"],
    v: Inexact[Tensor, "B H V"],
    a: Inexact[Tensor, "B H #K"],
    state: Inexact[Tensor, "B H K V"],
) -> tuple[Inexact[Tensor, "B H V"], Inexact[Tensor, "B H K V"]]:
    """One step of :func:`diagonal_ssd`: (y_t, h_t) from h_{t-1}, which stays."""
    _check(q[:, None], k[:, None], v[:, None], a[:, None], "a")
    dtype = compute_dtype(q, k, v, a, state)
    h = _initial(state, q[:, None], v.shape[2], dtype)
    y, h = one_step(q.to(dtype), k.to(dtype), v.to(dtype), a.to(dtype), h)
    out_dtype = torch.promote_types(v.dtype, dtype) if dtype.is_complex else v.dtype
    return y.to(out_dtype), h


def _decays(a: Tensor | None, log_a: Tensor | None) -> tuple[bool, Tensor]:
    if a is not None and log_a is None:
        return False, a
    if log_a is not None and a is None:
        return True, log_a
    given = "neither" if a is None else "both"
    raise bad_argument("a, log_a", given, "one of the two", "pass a or log_a=")


def _check(q: Tensor, k: Tensor, v: Tensor, decays: Tensor, name: str) -> None:
    others = {"k": k, "v": v, name: decays}
    check_floating(q=q, **others)
    check_alike(q, **others)
    check_shape("q", q, (None, None, None, None))
    check_shape("k", k, q.shape)
    check_shape("v", v, (*q.shape[:3], None))
    check_shape(name, decays, q.shape, (*q.shape[:3], 1))


def _check_values(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decays: Tensor,
    *,
    log: bool,
    initial_state: Tensor | None,
) -> None:
    check_finite_values(q=q, k=k, v=v, initial_state=initial_state)
    if not log:
        check_finite_values(a=decays)
    elif not bool((decays.real <= 0).all()):
        where = tuple((~(decays.real <= 0)).nonzero()[0].tolist())
        raise bad_argument(
            "log_a",
            f"{decays[where].item()} at index {where}",
            "logarithms of decays, at most 0",
            "use logsigmoid or -softplus",
        )


def _initial(
    initial_state: Tensor | None, q: Tensor, V: int, dtype: torch.dtype
) -> Tensor:
    shape = (q.shape[0], *q.shape[2:], V)
    if initial_state is None:
        return torch.zeros(shape, dtype=dtype, device=q.device)
    check_floating(initial_state=initial_state)
    check_alike(q, initial_state=initial_state)
    check_shape("initial_state", initial_state, shape)
    return initial_state.to(dtype)
