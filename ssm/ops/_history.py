"""The state of a convolution: the inputs that it still remembers."""

import torch
from jaxtyping import Inexact, Int
from torch import Tensor


def last_inputs(
    x: Inexact[Tensor, "B L D"],
    history: Inexact[Tensor, "B S D"],
    keep: int,
    lengths: Int[Tensor, " B"] | None = None,
) -> Inexact[Tensor, "B keep D"]:
    """The last ``keep`` inputs of each row of [history, x], zeros before the first.

    Rows end at ``lengths``. A copy: it does not hold the memory of ``x``.
    """
    batch, L, D = x.shape
    missing = keep - history.shape[1]
    if missing > 0:
        history = torch.cat([history.new_zeros(batch, missing, D), history], 1)
    if lengths is None and keep <= L:
        dtype = torch.promote_types(x.dtype, history.dtype)
        return x[:, L - keep :].to(dtype, copy=True)
    every = torch.cat([history, x], 1)
    if lengths is None:
        return every[:, every.shape[1] - keep :].clone()
    first = history.shape[1] - keep + lengths
    steps = first[:, None] + torch.arange(keep, device=x.device)
    return every.gather(1, steps[:, :, None].expand(batch, keep, D))
