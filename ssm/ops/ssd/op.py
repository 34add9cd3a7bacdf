"""Mamba-2's scan, scalar times identity: the state space duality (SSD)."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Inexact, Int
from torch import Tensor
from torch.nn.functional import softplus

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
from ssm.ops._ragged import packed_from_padded
from ssm.ops._segments import check_chunk_size, neutralised, over_pieces, unpacked
from ssm.ops.ssd.naive import one_step, skip_and_gate, ssd_loop
from ssm.ops.ssd.torch import ssd_torch


def _triton(
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
    # compiles only where it runs
    from ssm.ops.ssd.triton import ssd_triton

    return ssd_triton(x, dt, A, B, C, initial_state, D=D, z=z, chunk_size=chunk_size)


BACKENDS = {
    "triton": gpu_backend("ssd", "triton", _triton),
    "torch": Backend(ssd_torch),
    "naive": Backend(ssd_loop),
}
_NO_LIMIT = (0.0, float("inf"))


def ssd(
    x: Inexact[Tensor, "B L H P"],
    dt: Float[Tensor, "B L H"],
    A: Inexact[Tensor, " H"],
    B: Inexact[Tensor, "B L G N"],
    C: Inexact[Tensor, "B L G N"],
    *,
    chunk_size: int = 64,
    D: Inexact[Tensor, "H *P"] | None = None,
    z: Float[Tensor, "B L H P"] | None = None,
    dt_bias: Float[Tensor, " H"] | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = _NO_LIMIT,
    initial_state: Inexact[Tensor, "B H P N"] | None = None,
    lengths: Int[Tensor, " B"] | None = None,
    cu_seqlens: Int[Tensor, " S1"] | None = None,
    states_at: Sequence[int] | None = None,
    backend: str = "auto",
    check_domain: bool = False,
) -> tuple[Inexact[Tensor, "B L H P"], ...]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T, y_t = (h_t C_t + D x_t) silu(z_t).

    The meaning of mamba_ssm's ``mamba_chunk_scan_combined`` (Dao & Gu 2024, section
    6): dt + dt_bias, then softplus (threshold 20), then clamped to ``dt_limit``; H / G
    neighbouring heads share a B and C; D is one number a head or (H, P). Complex
    x, A, B, C are taken as they are (y = h C, nothing conjugated).

    Returns (y, final_state); with ``states_at`` (indices of steps) also the states
    after those steps, (B, len(states_at), H, P, N). All are differentiable in every
    operand. The state is float32 at least; y has the dtype of x (complex where an
    operand is). ``lengths`` marks padding and ``cu_seqlens`` packs sequences into one
    row (then states have one row a sequence, and steps count from each start): see
    :mod:`ssm.ops._ragged`. ``chunk_size`` is rounded up to a power of 2.

    Raises ArgumentError for wrong shapes, dtypes or devices and, with
    ``check_domain``, for values that are not finite, A > 0 or steps dt < 0;
    BackendError where ``backend`` cannot run.
    """
    choice = _settle(x, dt, A, B, C, D, z, dt_bias, initial_state, chunk_size, backend)
    chosen, dtype = choice.taken(), choice.dtype
    gate = [] if z is None else [z]
    sequences, lengths = unpacked((x, dt, B, C, *gate), lengths, cu_seqlens)
    sequences = neutralised(sequences, lengths, [0.0] * len(sequences))
    dt = _steps(sequences[1], dt_bias, dt_softplus, dt_limit, dtype)
    # again: on the padding too a bias or softplus makes a step
    sequences[1] = neutralised([dt], lengths, [0.0])[0]
    h0 = _initial(initial_state, sequences[0], B.shape[3], dtype)
    if check_domain:
        _check_values(*sequences, A=A, D=D, initial_state=initial_state)

    def run(
        x: Tensor, dt: Tensor, B: Tensor, C: Tensor, *gate_and_state: Tensor
    ) -> tuple[Tensor, Tensor]:
        *gate, state = gate_and_state
        if x.shape[1] == 0:
            return x.to(dtype), state
        options = {"D": D, "z": gate[0] if gate else None, "chunk_size": chunk_size}
        return chosen.run(x, dt, A, B, C, state, **options)

    y, *states = over_pieces(run, sequences, h0, states_at)
    if cu_seqlens is not None:
        y = packed_from_padded(y, cu_seqlens)
    out_dtype = torch.promote_types(x.dtype, dtype) if dtype.is_complex else x.dtype
    return y.to(out_dtype), *states


@remembered
def _settle(*given: Any) -> Choice:
    """The operands of :func:`ssd`, checked, and what serves them."""
    *operands, initial_state, chunk_size, backend = given
    _check(*operands)
    check_chunk_size(chunk_size)
    dtype = compute_dtype(*operands, initial_state)
    return find("ssd", backend, BACKENDS, Request(operands[0].device, dtype))


def ssd_step(
    x: Inexact[Tensor, "B H P"],
    dt: Float[Tensor, "B H"],
    A: Inexact[Tensor, " H"],
    B: Inexact[Tensor, "B G N"],
    C: Inexact[Tensor, "B G N"],
    state: Inexact[Tensor, "B H P N"],
    *,
    D: Inexact[Tensor, "H *P"] | None = None,
    z: Float[Tensor, "B H P"] | None = None,
    dt_bias: Float[Tensor, " H"] | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = _NO_LIMIT,
) -> tuple[Inexact[Tensor, "B H P"], Inexact[Tensor, "B H P N"]]:
    """One step of :func:`ssd`: (y_t, h_t) from h_{t-1}, which stays as it is."""
    gate = None if z is None else z[:, None]
    _check(x[:, None], dt[:, None], A, B[:, None], C[:, None], D, gate, dt_bias)
    dtype = compute_dtype(x, dt, A, B, C, D, z, dt_bias, state)
    h = _initial(state, x[:, None], B.shape[2], dtype)
    dt = _steps(dt, dt_bias, dt_softplus, dt_limit, dtype)
    repeats = x.shape[1] // B.shape[1]
    B, C = (v.to(dtype).repeat_interleave(repeats, 1) for v in (B, C))
    h, y = one_step(x.to(dtype), dt, A.to(dtype), B, C, h)
    out_dtype = torch.promote_types(x.dtype, dtype) if dtype.is_complex else x.dtype
    return skip_and_gate(y, x, D, z).to(out_dtype), h


def _steps(
    dt: Tensor,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    dtype: torch.dtype,
) -> Tensor:
    """The discretisation steps, real, in the precision of the computation."""
    wide = dtype in (torch.float64, torch.complex128)
    dt = dt.to(torch.float64 if wide else torch.float32)
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = softplus(dt)
    return dt if dt_limit == _NO_LIMIT else dt.clamp(*dt_limit)


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
) -> None:
    everything = {"dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias}
    check_floating(x=x, **everything)
    check_alike(x, **everything)
    for name, tensor in {"dt": dt, "z": z, "dt_bias": dt_bias}.items():
        if tensor is not None and tensor.is_complex():
            raise bad_argument(name, tensor.dtype, "real numbers", "take its real part")
    check_shape("x", x, (None, None, None, None))
    batch, L, H, P = x.shape
    check_shape("dt", dt, (batch, L, H))
    check_shape("A", A, (H,))
    check_shape("B", B, (batch, L, None, None))
    check_shape("C", C, B.shape)
    if z is not None:
        check_shape("z", z, x.shape)
    if D is not None:
        check_shape("D", D, (H,), (H, P))
    if dt_bias is not None:
        check_shape("dt_bias", dt_bias, (H,))
    if B.shape[2] == 0 or H % B.shape[2]:
        raise bad_argument(
            "B, C", f"{B.shape[2]} groups", f"a divisor of the {H} heads", "regroup"
        )


def _check_values(
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    z: Tensor | None = None,
    *,
    A: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
) -> None:
    check_finite_values(
        x=x, dt=dt, B=B, C=C, z=z, A=A, D=D, initial_state=initial_state
    )
    for name, signed in {"A": A, "dt": -dt}.items():
        if bool((signed.real > 0).any()):
            raise bad_argument(
                name,
                f"{'a positive' if name == 'A' else 'a negative'} value",
                "A <= 0 and dt >= 0, so that exp(dt A) decays",
                "use A = -exp(A_log) and dt_softplus=True",
            )


def _initial(
    initial_state: Tensor | None, x: Tensor, N: int, dtype: torch.dtype
) -> Tensor:
    shape = (x.shape[0], *x.shape[2:], N)
    if initial_state is None:
        return torch.zeros(shape, dtype=dtype, device=x.device)
    check_floating(initial_state=initial_state)
    check_alike(x, initial_state=initial_state)
    check_shape("initial_state", initial_state, shape)
    return initial_state.to(dtype)
