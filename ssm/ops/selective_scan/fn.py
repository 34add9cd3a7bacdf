"""The selective scan in mamba_ssm's layout (batch, channels, time), to and fro."""

import importlib
from typing import Any

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from ssm._errors import BackendError, bad_argument, check_shape
from ssm.ops._dtypes import compute_dtype
from ssm.ops.selective_scan.op import Operands, selective_scan


def selective_scan_fn(
    u: Float[Tensor, "B D L"],
    delta: Float[Tensor, "B D L"],
    A: Inexact[Tensor, "D N"],
    B: Inexact[Tensor, "D N"] | Float[Tensor, "B N L2"] | Float[Tensor, "B G N L2"],
    C: Inexact[Tensor, "D N"] | Float[Tensor, "B N L2"] | Float[Tensor, "B G N L2"],
    D: Float[Tensor, " D"] | None = None,
    z: Float[Tensor, "B D L"] | None = None,
    delta_bias: Float[Tensor, " D"] | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Float[Tensor, "B D L"] | tuple[Float[Tensor, "B D L"], Inexact[Tensor, "B D N"]]:
    """:func:`selective_scan` under the name, and in the layout, of mamba_ssm's.

    B and C are constant (D, N), or vary in time: (B, N, L) or (B, G, N, L). With
    complex A, those that vary are real with (Re, Im) interleaved in time, (…, 2L).
    Returns y, or (y, last_state) with ``return_last_state``.

    Differs: the last state is differentiable too.
    """
    check_shape("u", u, (None, None, None))
    for name, x in (("delta", delta), ("z", z)):
        if x is not None:
            check_shape(name, x, u.shape)
    y, last_state = selective_scan(
        u.mT,
        delta.mT,
        A,
        _time_first("B", B, u, A),
        _time_first("C", C, u, A),
        D,
        None if z is None else z.mT,
        delta_bias,
        delta_softplus,
    )
    return (y.mT, last_state) if return_last_state else y.mT


def _time_first(name: str, X: Tensor, u: Tensor, A: Tensor) -> Tensor:
    """(…, N, L) as (B, L, …, N); what is interleaved becomes complex."""
    if X.ndim == 2:
        return X
    batch, _, L = u.shape
    N, width = A.shape[-1], 2 * L if A.is_complex() else L
    check_shape(name, X, (batch, N, width), (batch, None, N, width))
    if A.is_complex():
        if X.is_complex():
            raise bad_argument(
                name,
                f"dtype {X.dtype}",
                "real numbers, (Re, Im) interleaved in time",
                "pass torch.view_as_real(…).flatten(-2)",
            )
        pairs = X.to(compute_dtype(X)).unflatten(-1, (L, 2))
        X = torch.complex(*pairs.unbind(-1))
    return X.movedim(-1, 1)


def mamba_ssm_scan(
    x: Operands, initial_state: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The scan by mamba_ssm's CUDA kernel, for comparison; B, C as backends get them.

    Raises BackendError for what that kernel does not do.
    """
    module = importlib.import_module("mamba_ssm.ops.selective_scan_interface")

    for what, is_there in {
        "lengths or cu_seqlens": lengths is not None,
        "an initial state": initial_state.requires_grad or bool(initial_state.any()),
    }.items():
        if is_there:
            raise BackendError(
                f"selective_scan: backend 'mamba_ssm' cannot run: it takes no {what}"
            )
    real = x.A.dtype.to_real()
    y, last_state = module.selective_scan_fn(
        x.u.mT,
        x.delta.mT.to(x.u.dtype),
        x.A,
        _time_last(x.B, x),
        _time_last(x.C, x),
        None if x.D is None else x.D.to(real),
        None if x.z is None else x.z.mT.to(x.u.dtype),
        None if x.delta_bias is None else x.delta_bias.to(real),
        x.delta_softplus,
        return_last_state=True,
    )
    return y.mT, _NoGradient.apply(last_state)


def _time_last(X: Tensor, x: Operands) -> Tensor:
    """The inverse of :func:`_time_first`."""
    if X.ndim == 2:
        return X.to(x.A.dtype)
    X = X.movedim(1, -1)
    if x.A.is_complex():
        return torch.view_as_real(X.to(x.A.dtype)).flatten(-2)
    return X.to(x.u.dtype)


class _NoGradient(torch.autograd.Function):
    """The identity; mamba_ssm would take the last state's gradient for zero."""

    @staticmethod
    def forward(_ctx: Any, state: Tensor) -> Tensor:
        return state.view_as(state)

    @staticmethod
    def backward(_ctx: Any, _grad: Tensor) -> Tensor:
        raise BackendError(
            "selective_scan: backend 'mamba_ssm' has no gradient of the final state; "
            "use backend='auto'"
        )
