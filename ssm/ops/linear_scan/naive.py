"""The specification of the linear scan: a loop over time, in float64."""

import numpy as np
import torch
from jaxtyping import Inexact
from torch import Tensor


def linear_scan_numpy(
    a: Inexact[np.ndarray, "B L *C"],
    b: Inexact[np.ndarray, "B L *C"],
    initial_state: Inexact[np.ndarray, "B *C"],
) -> tuple[Inexact[np.ndarray, "B L *C"], Inexact[np.ndarray, "B *C"]]:
    """h_t = a_t * h_{t-1} + b_t, elementwise; every h_t and the last one."""
    h = np.asarray(initial_state, np.result_type(a, b, np.float64))
    states = np.empty(b.shape, h.dtype)
    for t in range(b.shape[1]):
        h = a[:, t] * h + b[:, t]
        states[:, t] = h
    return states, h


def linear_scan_loop(a: Tensor, b: Tensor, initial_state: Tensor) -> Tensor:
    """The same loop in PyTorch, in double precision: differentiable at any order."""
    dtype = b.dtype
    double = torch.promote_types(dtype, torch.float64)
    h, states = initial_state.to(double), []
    for a_t, b_t in zip(a.to(double).unbind(1), b.to(double).unbind(1), strict=True):
        h = a_t * h + b_t
        states.append(h)
    return torch.stack(states, 1).to(dtype)
