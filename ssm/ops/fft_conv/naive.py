"""The specification of the long convolution: a loop over time, in float64."""

import numpy as np
import torch
from jaxtyping import Inexact
from torch import Tensor


def fft_conv_numpy(
    u: Inexact[np.ndarray, "B L D"],
    kernel: Inexact[np.ndarray, "D Lk"],
    initial_state: Inexact[np.ndarray, "B S D"],
) -> tuple[Inexact[np.ndarray, "B L D"], Inexact[np.ndarray, "B S1 D"]]:
    """y_t = sum_j kernel_j u_{t-j}, u_{-1}, … the initial state; the last Lk - 1 u."""
    S, Lk = initial_state.shape[1], kernel.shape[1]
    nothing = np.zeros((len(u), max(Lk - 1 - S, 0), u.shape[2]))
    inputs = np.concatenate([nothing, initial_state, u], 1)
    S = inputs.shape[1] - u.shape[1]
    y = np.empty(u.shape, np.result_type(inputs, kernel, np.float64))
    for t in range(S, S + u.shape[1]):
        y[:, t - S] = (kernel.T[::-1] * inputs[:, t - Lk + 1 : t + 1]).sum(1)
    return y, inputs[:, inputs.shape[1] - (Lk - 1) :]


def fft_conv_loop(u: Tensor, kernel: Tensor, initial_state: Tensor) -> Tensor:
    """The same loop in PyTorch, in double precision: differentiable at any order."""
    double = torch.promote_types(u.dtype, torch.float64)
    S, Lk = initial_state.shape[1], kernel.shape[1]
    inputs = torch.cat([initial_state, u], 1).to(double)
    inputs = torch.nn.functional.pad(inputs, (0, 0, Lk - 1, 0))
    taps = kernel.to(double).T.flip(0)
    steps = range(S, S + u.shape[1])
    y = [(taps * inputs[:, t : t + Lk]).sum(1) for t in steps]
    return torch.stack(y, 1).to(u.dtype)
