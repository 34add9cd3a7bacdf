"""The gated feed-forward layer."""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from ssm._errors import bad_argument

Activation = Literal["silu", "gelu"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
}


def default_hidden(d_model: int) -> int:
    """8/3 d_model, up to a multiple of 8: the parameters of an ungated layer of 4 d."""
    return -(-8 * d_model // 24) * 8


class GLUMLP(nn.Module):
    """y = W_down (activation(W_gate x) * W_up x): a gated linear unit, no biases.

    x (…, d_model); silu gives SwiGLU and gelu GEGLU (arXiv:2002.05202, equation 6).
    """

    def __init__(
        self,
        d_model: int,
        d_hidden: int | None = None,
        activation: Activation = "silu",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_model = d_model
        self.d_hidden = default_hidden(d_model) if d_hidden is None else d_hidden
        self.activation = check_activation(activation)

        def linear(n: int, m: int) -> nn.Linear:
            return nn.Linear(n, m, bias=False, device=device, dtype=dtype)

        self.gate = linear(d_model, self.d_hidden)
        self.up = linear(d_model, self.d_hidden)
        self.down = linear(self.d_hidden, d_model)

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """The layer at every position by itself; see the class."""
        if x.shape[-1:] != (self.d_model,):
            raise bad_argument(
                "x", f"shape {tuple(x.shape)}", f"(…, {self.d_model})", "reshape it"
            )
        gate = ACTIVATIONS[self.activation](self.gate(x))
        return self.down(gate * self.up(x))


def check_activation(name: str) -> str:
    """``name``, or ArgumentError where there is no such activation."""
    if name not in ACTIVATIONS:
        raise bad_argument(
            "activation", repr(name), " or ".join(ACTIVATIONS), "choose one of those"
        )
    return name
