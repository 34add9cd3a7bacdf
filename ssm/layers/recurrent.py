"""The classical recurrent layers: not linear in their state, so no parallel form."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ssm.layers._padded import PaddedLayer
from ssm.ops._history import last_inputs


class RecurrentState(NamedTuple):
    """The hidden state h (B, d_hidden)."""

    h: Tensor


class _Recurrent(PaddedLayer):
    """A recurrent layer around one of PyTorch's (compiled) loops over time."""

    core_class: type[nn.RNN] | type[nn.GRU]

    def __init__(
        self,
        d_model: int,
        d_hidden: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_model = d_model
        self.d_hidden = d_model if d_hidden is None else d_hidden
        self.core = self.core_class(
            d_model, self.d_hidden, batch_first=True, device=device, dtype=dtype
        )
        self.out_proj = (
            nn.Identity()
            if self.d_hidden == d_model
            else nn.Linear(self.d_hidden, d_model, device=device, dtype=dtype)
        )

    def reset_parameters(self) -> None:
        """Nothing: the core and the projection have their own."""

    def train(self, mode: bool = True) -> "_Recurrent":
        """As for any module; but cuDNN can only differentiate a core in training."""
        super().train(mode)
        self.core.train()  # there is no dropout in it: nothing else depends on this
        return self

    def init_state(self, batch_size: int) -> RecurrentState:
        """h = 0."""
        return RecurrentState(
            next(self.core.parameters()).new_zeros(batch_size, self.d_hidden)
        )

    def advance(
        self,
        x: Float[Tensor, "B L D"],
        past: RecurrentState,
        lengths: Int[Tensor, " B"] | None,
    ) -> tuple[Float[Tensor, "B L D"], RecurrentState]:
        """Step after step, in PyTorch's loop."""
        states, last = self.core(x, past.h[None])
        if lengths is None:
            return self.out_proj(states), RecurrentState(last[0])
        final = last_inputs(states, past.h[:, None], 1, lengths)[:, 0]
        return self.out_proj(states), RecurrentState(final)


class RNN(_Recurrent):
    """h_t = tanh(W_h h_{t-1} + W_x x_t + b); y_t = h_t (Elman, 1990).

    y_t = W_o h_t + c where ``d_hidden`` differs from ``d_model``. b is kept in two
    parts, as ``torch.nn.RNN`` has it. The state has the dtype of the parameters.
    """

    core_class = nn.RNN


class GRU(_Recurrent):
    """h_t = (1 - z_t) n_t + z_t h_{t-1}; y_t = h_t (arXiv:1406.1078, section 2.3).

    r_t, z_t = sigmoid(W x_t + U h_{t-1} + b), n_t = tanh(W x_t + b + r_t (U h_{t-1} +
    c)), as in ``torch.nn.GRU``; y_t = W_o h_t + c where ``d_hidden`` differs from
    ``d_model``. The state has the dtype of the parameters.

    Differs: the reset gate acts after the product with U, as in cuDNN; the paper has it
    before, where the product cannot be formed for all gates at once.
    """

    core_class = nn.GRU
