"""A residual added and the sum normalised, in PyTorch's operations."""

import torch
from torch import Tensor
from torch.nn.functional import rms_norm


def add_norm_torch(
    x: Tensor, added: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x + added, and that normalised in the dtype of weight."""
    total = x if added is None else x + added
    # PyTorch's own, one kernel on a GPU, widens 16-bit numbers inside, but takes one
    # dtype only.
    wide = torch.promote_types(total.dtype, weight.dtype)
    normed = rms_norm(total.to(wide), (x.shape[-1],), weight.to(wide), eps)
    return total, normed.to(weight.dtype)
