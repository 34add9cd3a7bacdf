"""What the layers' single steps share."""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ssm.ops.linear_step import linear_step


def project(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``; of one step that generates, by the kernel for a few rows.

    Whatever else stands in the place of a linear layer (an adapter, say) is called.
    """
    if type(layer) is not nn.Linear or not generates(x):
        y: Tensor = layer(x)
        return y
    return linear_step(x, layer.weight, layer.bias)


def project_by(weight: Tensor, x: Tensor) -> Tensor:
    """W x, as :func:`project`."""
    return linear_step(x, weight) if generates(x) else linear(x, weight)


def generates(x: Tensor) -> bool:
    """Whether x (B, K) is a step on a GPU that nobody differentiates or casts."""
    return (
        x.is_cuda
        and x.ndim == 2
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cuda")
    )
