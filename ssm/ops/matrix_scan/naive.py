"""The specification of the matrix scan: a loop over time, in float64."""

import numpy as np
import torch
from jaxtyping import Inexact
from torch import Tensor


def matrix_scan_numpy(
    A: Inexact[np.ndarray, "B L H K K"] | Inexact[np.ndarray, "H K K"],
    b: Inexact[np.ndarray, "B L H K"],
    initial_state: Inexact[np.ndarray, "B H K"],
) -> tuple[Inexact[np.ndarray, "B L H K"], Inexact[np.ndarray, "B H K"]]:
    """h_t = A_t h_{t-1} + b_t, block by block; every h_t and the last one."""
    h = np.asarray(initial_state, np.result_type(A, b, np.float64))
    states = np.empty(b.shape, h.dtype)
    for t in range(b.shape[1]):
        A_t = A if A.ndim == 3 else A[:, t]
        h = (A_t @ h[..., None])[..., 0] + b[:, t]
        states[:, t] = h
    return states, h


def matrix_scan_loop(A: Tensor, b: Tensor, initial_state: Tensor) -> Tensor:
    """The same loop in PyTorch, in double precision: differentiable at any order."""
    double = torch.promote_types(b.dtype, torch.float64)
    A_double, L = A.to(double), b.shape[1]
    matrices = [A_double] * L if A.ndim == 3 else A_double.unbind(1)
    h, states = initial_state.to(double), []
    for A_t, b_t in zip(matrices, b.to(double).unbind(1), strict=True):
        h = (A_t @ h[..., None])[..., 0] + b_t
        states.append(h)
    return torch.stack(states, 1).to(b.dtype)
