"""Root mean square normalisation."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from ssm._errors import bad_argument


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight, over the last dimension.

    Computed in float32 at least; y has the dtype of x (arXiv:1910.07467, equation 4).
    """

    def __init__(
        self,
        d_model: int,
        eps: float = 1e-5,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_model, self.eps = d_model, eps
        self.weight = nn.Parameter(torch.empty(d_model, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Every weight 1."""
        nn.init.ones_(self.weight)

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """The normalised x; see the class."""
        if x.shape[-1:] != (self.d_model,):
            raise bad_argument(
                "x", f"shape {tuple(x.shape)}", f"(…, {self.d_model})", "reshape it"
            )
        # PyTorch's own, one kernel on a GPU, widens 16-bit numbers inside, but takes
        # one dtype only.
        dtype = torch.promote_types(x.dtype, self.weight.dtype)
        weight = self.weight.to(dtype)
        return rms_norm(x.to(dtype), (self.d_model,), weight, self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"{self.d_model}, eps={self.eps}"
