"""The specification of the selective scan: a loop over time, in float64."""

import numpy as np
import torch
from jaxtyping import Float, Inexact
from torch import Tensor
from torch.nn.functional import silu, softplus


def selective_scan_numpy(
    u: Float[np.ndarray, "B L D"],
    delta: Float[np.ndarray, "B L D"],
    A: Inexact[np.ndarray, "D N"],
    B: Inexact[np.ndarray, "B L G N"] | Inexact[np.ndarray, "D N"],
    C: Inexact[np.ndarray, "B L G N"] | Inexact[np.ndarray, "D N"],
    D: Float[np.ndarray, " D"] | None,
    z: Float[np.ndarray, "B L D"] | None,
    delta_bias: Float[np.ndarray, " D"] | None,
    delta_softplus: bool,
    initial_state: Inexact[np.ndarray, "B D N"],
) -> tuple[Float[np.ndarray, "B L D"], Inexact[np.ndarray, "B D N"]]:
    """h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t; y_t = C_t h_t + D u_t, gated.

    Complex A: y_t = 2 Re(C_t h_t) + D u_t, each state standing for a conjugate pair.
    """
    h = np.asarray(initial_state, np.result_type(A, np.float64))
    y = np.empty(u.shape)
    for t in range(u.shape[1]):
        d = delta[:, t] + (0.0 if delta_bias is None else delta_bias)
        if delta_softplus:
            d = np.where(d > 20.0, d, np.log1p(np.exp(np.minimum(d, 20.0))))
        B_t, C_t = (
            X if X.ndim == 2 else X[:, t].repeat(u.shape[2] // X.shape[2], axis=1)
            for X in (B, C)
        )
        h = np.exp(d[..., None] * A) * h + (d * u[:, t])[..., None] * B_t
        Ch = (C_t * h).sum(-1)
        y[:, t] = 2.0 * Ch.real if np.iscomplexobj(A) else Ch
        y[:, t] += 0.0 if D is None else D * u[:, t]
        y[:, t] *= 1.0 if z is None else z[:, t] / (1.0 + np.exp(-z[:, t]))
    return y, h


def selective_scan_loop(
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
) -> tuple[Tensor, Tensor]:
    """The same loop in PyTorch, in double precision: differentiable at any order."""
    h, steps = initial_state, []
    for t in range(u.shape[1]):
        d = delta[:, t] + (0.0 if delta_bias is None else delta_bias)
        d = softplus(d) if delta_softplus else d
        B_t, C_t = (
            X if X.ndim == 2 else X[:, t].repeat_interleave(u.shape[2] // X.shape[2], 1)
            for X in (B, C)
        )
        h = torch.exp(d[..., None] * A) * h + (d * u[:, t])[..., None] * B_t
        Ch = (C_t * h).sum(-1)
        y = 2.0 * Ch.real if A.is_complex() else Ch
        y = y if D is None else y + D * u[:, t]
        steps.append(y if z is None else y * silu(z[:, t]))
    return torch.stack(steps, 1), h
