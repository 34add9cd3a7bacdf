"""The specification of Mamba-2's scan (SSD): a loop over time, in float64."""

import numpy as np
import torch
from jaxtyping import Float, Inexact
from torch import Tensor
from torch.nn.functional import silu


def ssd_numpy(
    x: Inexact[np.ndarray, "B L H P"],
    dt: Float[np.ndarray, "B L H"],
    A: Inexact[np.ndarray, " H"],
    B: Inexact[np.ndarray, "B L G N"],
    C: Inexact[np.ndarray, "B L G N"],
    initial_state: Inexact[np.ndarray, "B H P N"],
) -> tuple[Inexact[np.ndarray, "B L H P"], Inexact[np.ndarray, "B H P N"]]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T, y_t = h_t C_t, head by head."""
    h = np.asarray(initial_state, np.result_type(x, A, B, C, initial_state, 1.0))
    y = np.empty(x.shape, h.dtype)
    heads = np.arange(x.shape[2]) * B.shape[2] // x.shape[2]  # each head's group
    for t in range(x.shape[1]):
        decay = np.exp(dt[:, t] * A)[..., None, None]
        gain = (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, heads, None]
        h = decay * h + gain
        y[:, t] = (h @ C[:, t, heads, :, None])[..., 0]
    return y, h


def ssd_loop(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor,
    *,
    D: Tensor | None,
    z: Tensor | None,
    chunk_size: int,  # noqa: ARG001  # every backend takes it; a loop has no chunks
) -> tuple[Tensor, Tensor]:
    """The same loop in PyTorch, in double precision: differentiable at any order."""
    dtype = initial_state.dtype
    double = torch.promote_types(dtype, torch.float64)
    x, A, h = x.to(double), A.to(double), initial_state.to(double)
    dt = dt.to(torch.float64)
    repeats = x.shape[2] // B.shape[2]
    B, C = (v.to(double).repeat_interleave(repeats, 2) for v in (B, C))
    outputs = []
    for x_t, dt_t, B_t, C_t in zip(
        x.unbind(1), dt.unbind(1), B.unbind(1), C.unbind(1), strict=True
    ):
        h, y_t = one_step(x_t, dt_t, A, B_t, C_t, h)
        outputs.append(y_t)
    y = skip_and_gate(torch.stack(outputs, 1), x, D, z)
    return y.to(dtype), h.to(dtype)


def one_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor
) -> tuple[Tensor, Tensor]:
    """(h_t, y_t) from x (B, H, P), dt (B, H), B, C (B, H, N) and h_{t-1}."""
    gain = (dt[..., None] * x)[..., None] * B[:, :, None]
    h = (dt * A).exp()[..., None, None] * h + gain
    return h, (h @ C[..., None]).squeeze(-1)


def skip_and_gate(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """(y + D x) silu(z), in the dtype of y."""
    if D is not None:
        D = D.to(y.dtype)
        y = y + x.to(y.dtype) * (D if D.ndim == 2 else D[:, None])
    if z is not None:
        y = y * silu(z.to(torch.promote_types(z.dtype, y.real.dtype)))
    return y
