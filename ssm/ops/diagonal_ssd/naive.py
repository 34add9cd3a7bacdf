"""The specification of the diagonal duality's recurrence: a loop over time, float64."""

import numpy as np
import torch
from jaxtyping import Inexact
from torch import Tensor


def diagonal_ssd_numpy(
    q: Inexact[np.ndarray, "B L H K"],
    k: Inexact[np.ndarray, "B L H K"],
    v: Inexact[np.ndarray, "B L H V"],
    a: Inexact[np.ndarray, "B L H #K"],
    initial_state: Inexact[np.ndarray, "B H K V"],
) -> tuple[Inexact[np.ndarray, "B L H V"], Inexact[np.ndarray, "B H K V"]]:
    """h_t = diag(a_t) h_{t-1} + k_t v_t^T, y_t = q_t^T h_t, head by head."""
    h = np.asarray(initial_state, np.result_type(q, k, v, a, initial_state, 1.0))
    y = np.empty(v.shape, h.dtype)
    for t in range(v.shape[1]):
        h = a[:, t, :, :, None] * h + k[:, t, :, :, None] * v[:, t, :, None]
        y[:, t] = (q[:, t, :, None] @ h)[:, :, 0]
    return y, h


def diagonal_ssd_loop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decays: Tensor,
    initial_state: Tensor,
    *,
    log: bool,
    chunk_size: int,  # noqa: ARG001  # every backend takes it; a loop has no chunks
) -> tuple[Tensor, Tensor]:
    """The same loop in PyTorch, in double precision: differentiable at any order."""
    dtype = initial_state.dtype
    double = torch.promote_types(dtype, torch.float64)
    q, k, v, decays, h = (x.to(double) for x in (q, k, v, decays, initial_state))
    a = decays.exp() if log else decays
    outputs = []
    for q_t, k_t, v_t, a_t in zip(*(x.unbind(1) for x in (q, k, v, a)), strict=True):
        y_t, h = one_step(q_t, k_t, v_t, a_t, h)
        outputs.append(y_t)
    return torch.stack(outputs, 1).to(dtype), h.to(dtype)


def one_step(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, h: Tensor
) -> tuple[Tensor, Tensor]:
    """(y_t, h_t) from q, k (B, H, K), v (B, H, V), a (B, H, K or 1) and h_{t-1}."""
    h = a[..., None] * h + k[..., None] * v[:, :, None]
    return (q[:, :, None] @ h).squeeze(2), h
