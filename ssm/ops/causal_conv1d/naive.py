"""The specification of the short causal convolution: a loop over time, in float64."""

import numpy as np
import torch
from jaxtyping import Inexact
from torch import Tensor


def causal_conv1d_numpy(
    x: Inexact[np.ndarray, "B L D"],
    weight: Inexact[np.ndarray, "D W"],
    bias: Inexact[np.ndarray, " D"],
    initial_state: Inexact[np.ndarray, "B W1 D"],
    silu: bool,
) -> tuple[Inexact[np.ndarray, "B L D"], Inexact[np.ndarray, "B W1 D"]]:
    """y_t = bias + sum_w weight_w x_{t-W+1+w}, through silu; and the last W - 1 x."""
    inputs = np.concatenate([initial_state, x], 1)
    y = np.empty(x.shape, np.result_type(inputs, weight, bias, np.float64))
    for t in range(x.shape[1]):
        y[:, t] = bias + (weight.T * inputs[:, t : t + weight.shape[1]]).sum(1)
    return (y / (1 + np.exp(-y)) if silu else y), inputs[:, x.shape[1] :]


def causal_conv1d_loop(
    x: Tensor, weight: Tensor, bias: Tensor, initial_state: Tensor, silu: bool
) -> Tensor:
    """The same loop in PyTorch, in double precision: differentiable at any order."""
    double = torch.promote_types(x.dtype, torch.float64)
    inputs = torch.cat([initial_state, x], 1).to(double)
    taps, W = weight.to(double).T, weight.shape[1]
    y = torch.stack(
        [(taps * inputs[:, t : t + W]).sum(1) for t in range(x.shape[1])], 1
    )
    y = y + bias.to(double)
    return (y * torch.sigmoid(y) if silu else y).to(x.dtype)
