"""One step of the selective scan, for generation."""

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from ssm._errors import bad_argument, check_shape
from ssm.ops._dispatch import Backend, Request, choose
from ssm.ops._dtypes import compute_dtype
from ssm.ops.selective_scan.op import BACKENDS as SCANS
from ssm.ops.selective_scan.op import (
    Operands,
    check_operands,
    check_state,
    sizes_of,
)
from ssm.ops.selective_scan.torch import decays_and_inputs, gate, read_out, step_size


def _triton(x: Operands, h: Tensor) -> tuple[Tensor, Tensor]:
    """A scan of one step."""
    y, state = SCANS["triton"].run(x, h, None, 1)
    return y[:, 0], state


def _torch(x: Operands, h: Tensor) -> tuple[Tensor, Tensor]:
    dtype, x = x.u.dtype, x.to(h.dtype)
    step = step_size(x.delta, x.delta_bias, x.delta_softplus)
    decay, inputs = decays_and_inputs(x.u, step, x.A, x.B)
    h = decay * h[:, None] + inputs
    y = gate(read_out(h, x.C), x.u, x.D, x.z)
    return y[:, 0].to(dtype), h[:, 0]


def _refuses_triton(request: Request) -> str | None:
    if request.needs_grad:
        return "it has no gradient; backend='torch' has, of any order"
    return SCANS["triton"].refuses(request)


BACKENDS = {
    "triton": Backend(_triton, _refuses_triton, gpu=True),
    "torch": Backend(_torch),
}


def selective_state_update(
    state: Inexact[Tensor, "B D N"],
    u: Float[Tensor, "B D"],
    delta: Float[Tensor, "B D"],
    A: Inexact[Tensor, "D N"],
    B: Inexact[Tensor, "B N"] | Inexact[Tensor, "B G N"] | Inexact[Tensor, "D N"],
    C: Inexact[Tensor, "B N"] | Inexact[Tensor, "B G N"] | Inexact[Tensor, "D N"],
    D: Float[Tensor, " D"] | None = None,
    z: Float[Tensor, "B D"] | None = None,
    delta_bias: Float[Tensor, " D"] | None = None,
    delta_softplus: bool = False,
    *,
    backend: str = "auto",
) -> tuple[Float[Tensor, "B D"], Inexact[Tensor, "B D N"]]:
    """h' = exp(delta A) h + delta B u, y = (C h' + D u) silu(z); returns (y, h').

    One step of :func:`ssm.ops.selective_scan.selective_scan`, differentiable (twice
    too); ``state`` is not changed. B and C are (B, N), one group a row; (B, G, N); or
    constant (D, N). Where the batch equals D, two dimensions could mean either, and
    three must be given: (B, 1, N), or the constant one expanded to (B, D, N).

    Differs from mamba_ssm's: returns the new state instead of writing over the old.
    """
    check_shape("u", u, (None, None))
    for name, given in (("delta", delta), ("z", z)):
        if given is not None:
            check_shape(name, given, u.shape)
    x = Operands(
        u[:, None],
        delta[:, None],
        A,
        _one_step("B", B, u.shape, A.shape[-1]),
        _one_step("C", C, u.shape, A.shape[-1]),
        D,
        None if z is None else z[:, None],
        delta_bias,
        delta_softplus,
    )
    check_operands(x)
    check_state(x, state, "state")
    h = state.to(compute_dtype(*x.tensors().values(), state))
    operands = [h, *x.tensors().values()]
    wants = torch.is_grad_enabled() and any(t.requires_grad for t in operands)
    request = Request(u.device, h.dtype, needs_grad=wants, sizes=sizes_of(x))
    chosen = choose("selective_state_update", backend, BACKENDS, request)
    y, new_state = chosen.run(x, h)
    return y, new_state


def _one_step(name: str, X: Tensor, shape: tuple[int, ...], N: int) -> Tensor:
    """B or C with a time axis of one step, or (D, N) as it is."""
    batch, D = shape
    check_shape(name, X, (batch, N), (batch, None, N), (D, N))
    if X.ndim == 3:
        return X[:, None]
    if batch != D or D == 1:
        return X if X.shape[0] == D else X[:, None, None]
    raise bad_argument(
        name,
        f"shape {tuple(X.shape)}, which could be (batch, N) or (D, N)",
        "three dimensions where the batch equals D",
        f"pass {name}[:, None] (one a row) or {name}.expand({batch}, {D}, {N})",
    )
