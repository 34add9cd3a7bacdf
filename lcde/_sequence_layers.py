"""The parts of document 2's sequence models by the source's names, on ``ssm.layers``.

``RNN``, ``MambaRecurrence`` (the bare S6 core: projections to delta, B and C, the scan
and D; no convolution, gate or output projection) and ``S5`` are layers of ``ssm``;
``S4Recurrence`` is one more. Layers return (y, state); :class:`Outputs` and
:class:`Convolved` give y alone.

Source: the code published with Muca Cirone et al., "Theoretical Foundations of Deep
Selective State-Space Models" (NeurIPS 2024).
"""

from math import pi
from typing import ClassVar

import torch
from jaxtyping import Complex128, Float, Float64, Int
from torch import Tensor, nn
from torch.nn.functional import softplus

from lcde._packing import Parts, fill_up, pack, parts_of
from ssm._errors import bad_argument
from ssm.layers import RNN, S5
from ssm.layers import SelectiveSSM as MambaRecurrence
from ssm.layers._base import SequenceLayer
from ssm.layers._lti import (
    LTILayer,
    Powers,
    Recurrence,
    as_complex,
    check_sizes,
    fill,
    fill_log_uniform,
)
from ssm.layers._positions import angles_at
from ssm.ops.fft_conv import fft_conv
from ssm.ops.packed_linear import packed_linear
from ssm.ops.power_sums import power_sums
from ssm.ops.short_attention import short_attention

__all__ = [
    "RNN",
    "S5",
    "Convolved",
    "Embedding",
    "MambaRecurrence",
    "Mixer",
    "Outputs",
    "S4Recurrence",
    "SinusoidalPositionalEncoding",
    "TransformerLayer",
]


_KEPT = 64  # positions whose waves are kept


class Embedding(nn.Embedding):
    """y_t = E[x_t], standard normal rows at first; x (T,) whole, y (T, H)."""

    def __init__(self, input_dim: int, output_dim: int) -> None:
        super().__init__(input_dim, output_dim)

    def forward(self, x: Int[Tensor, "*T"]) -> Float[Tensor, "*T H"]:
        """One row of the table for each token."""
        return super().forward(x)


class SinusoidalPositionalEncoding(nn.Module):
    """y_t = dropout(x_t + [sin t w_0, cos t w_0, sin t w_1, …]), w_i = 10000^(-2i/H).

    Vaswani et al. 2017 (arXiv:1706.03762, section 3.5); x and y (B, L, H).

    Differs: no longest length, and an odd H leaves out the last cosine.
    """

    def __init__(self, d_model: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.d_model = d_model
        self.dropout = nn.Dropout(dropout)
        self.first: Tensor
        self.register_buffer("first", self.waves(_KEPT).float(), persistent=False)

    def forward(self, x: Float[Tensor, "B L H"]) -> Float[Tensor, "B L H"]:
        """x plus the waves."""
        L = x.shape[1]
        waves = self.first[:L] if L <= _KEPT else self.waves(L, x.device)
        return self.dropout(x + waves.to(x.dtype))

    def waves(self, L: int, device: torch.device | None = None) -> Float[Tensor, "L H"]:
        """Those of the first L positions."""
        at = torch.arange(L, device=device)
        angles = angles_at(at, (self.d_model + 1) // 2)
        pairs = torch.stack([angles.sin(), angles.cos()], -1)
        return pairs.flatten(-2)[:, : self.d_model]


def apply_linear(layer: nn.Linear, x: Float[Tensor, "T K"]) -> Float[Tensor, "T N"]:
    """``layer(x)``, whose bias has a faster gradient on a GPU."""
    return packed_linear(x, layer.weight, layer.bias)


class Mixer(nn.Module):
    """What mixes positions: (B, L, H) to (B, L, H), or parts of different lengths."""

    def packed(self, x: Float[Tensor, "T H"], parts: Parts) -> Float[Tensor, "T H"]:
        """As ``forward`` of each part; shorter sequences are filled up behind their
        ends, which nothing causal sees."""
        return pack(self(fill_up(x, parts)), parts)


class TransformerLayer(Mixer):
    """y = LN(z + FFN(z)), z = LN(x + attention(x)), causal: PyTorch's own layer.

    x and y (B, L, H). As published, that layer's defaults: a feed-forward width of 2048
    with ReLU, dropout 0.1, norms behind the sums, whatever ``hidden_dim`` is.
    """

    def __init__(self, hidden_dim: int, n_heads: int) -> None:
        super().__init__()
        if n_heads < 1 or hidden_dim % n_heads:
            raise bad_argument(
                "state_dim",
                n_heads,
                f"a divisor of hidden_dim = {hidden_dim}: the Transformer has as many "
                "heads",
                "choose one",
            )
        self.layer = nn.TransformerEncoderLayer(hidden_dim, n_heads, batch_first=True)

    def forward(self, x: Float[Tensor, "B L H"]) -> Float[Tensor, "B L H"]:
        """Position t sees positions up to t."""
        parts = parts_of([x])
        return self.packed(x.flatten(0, 1), parts).unflatten(0, parts[0])

    def packed(self, x: Float[Tensor, "T H"], parts: Parts) -> Float[Tensor, "T H"]:
        """Only attention has to know where sequences begin."""
        own = self.layer
        attention = own.self_attn
        projected = packed_linear(x, attention.in_proj_weight, attention.in_proj_bias)
        qkv = projected.unflatten(-1, (3, attention.num_heads, -1))
        share = attention.dropout if self.training else 0.0
        heads = short_attention(qkv, parts, share).flatten(1)
        z = own.norm1(x + own.dropout1(apply_linear(attention.out_proj, heads)))
        widened = own.dropout(apply_linear(own.linear1, z).relu())
        return own.norm2(z + own.dropout2(apply_linear(own.linear2, widened)))


class S4Recurrence(LTILayer):
    """h_t = exp(delta A) h_{t-1} + delta B x_t, y_t = 2 Re(C h_t) + D x_t (S4D-Lin).

    D channels of N complex states each: A = -exp(log_A_real) + i A_imag, -1/2 + i pi n
    for n = 1 … N at first; complex B and C of Xavier's deviation; D ones; one delta a
    channel. Gu et al. 2022, "On the Parameterization and Initialization of Diagonal
    State Space Models" (arXiv:2206.11893), section 4, with a learned B.

    As published, delta = softplus(exp(log_dt)) with exp(log_dt) log-uniform in [0.001,
    0.1]: the steps start between 0.693 and 0.745 and never fall below log 2, so that a
    channel remembers a few steps, not the tens to thousands of the range.

    Differs: the published code runs a selective scan whose delta, B and C do not vary.
    What does not vary is a convolution, some thirty times faster on a CPU; states and
    kernel are in double precision (``ssm.layers._lti`` says why).
    """

    no_weight_decay: ClassVar[frozenset[str]] = frozenset(
        {"log_A_real", "A_imag", "B", "log_dt", "D"}
    )

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        *,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(d_model, d_state, dt_min, dt_max)
        self.d_model, self.d_state, self.modes = d_model, d_state, d_state
        self.dt_min, self.dt_max = dt_min, dt_max
        self.backend = backend

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.log_A_real = empty(d_model, d_state)
        self.A_imag = empty(d_model, d_state)
        self.B = empty(d_model, d_state, 2)
        self.C = empty(d_model, d_state, 2)
        self.log_dt = empty(d_model)
        self.D = empty(d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A = -1/2 + i pi n; B, C normal with E|B|^2 = 2 / (N + D); D ones."""
        nn.init.constant_(self.log_A_real, torch.tensor(0.5).log().item())
        fill(self.A_imag, pi * torch.arange(1, self.d_state + 1))
        for parameter in (self.B, self.C):  # half the variance in each of Re and Im
            nn.init.normal_(parameter, std=(self.d_state + self.d_model) ** -0.5)
        fill_log_uniform(self.log_dt, self.dt_min, self.dt_max)
        nn.init.ones_(self.D)

    def recurrence(self, L: int) -> Recurrence:
        """Powers of exp(delta A) (D, N), delta B, and 2 conj(C)."""
        A_bar, B_bar = self._discrete()
        return Recurrence(Powers(A_bar, L, diagonal=True), B_bar, self.read())

    def kernel(self, system: Recurrence, L: int) -> Float64[Tensor, "D L"]:
        """K_j = 2 Re sum_n C_n exp(j delta A_n) delta B_n."""
        z = system.powers.map
        return power_sums(system.read.conj() * system.write, z, L)

    def advance(
        self, h: Complex128[Tensor, "B D n"], u: Float64[Tensor, "B D"]
    ) -> Complex128[Tensor, "B D n"]:
        """exp(delta A) h + delta B u."""
        A_bar, B_bar = self._discrete()
        return A_bar * h + B_bar * u[..., None]

    def read(self) -> Complex128[Tensor, "D n"]:
        """2 conj(C): outputs are inner products with it."""
        return 2 * as_complex(self.C).conj()

    def _discrete(
        self,
    ) -> tuple[Complex128[Tensor, "D n"], Complex128[Tensor, "D n"]]:
        delta = softplus(self.log_dt.double().exp())[:, None]
        A = torch.complex(-self.log_A_real.double().exp(), self.A_imag.double())
        return (delta * A).exp(), delta * as_complex(self.B)


class Outputs(Mixer):
    """The outputs y of a layer that returns (y, state)."""

    def __init__(self, layer: SequenceLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Float[Tensor, "B L H"]) -> Float[Tensor, "B L H"]:
        """y alone."""
        return self.layer(x)[0]


class Convolved(Mixer):
    """y = K * x + D x of a time-invariant layer, whose state is not formed.

    At the published sizes the last state costs four times as much as the rest.
    """

    def __init__(self, layer: LTILayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Float[Tensor, "B L H"]) -> Float[Tensor, "B L H"]:
        """y alone."""
        L = x.shape[1]
        kernel = self.layer.kernel(self.layer.recurrence(L), L).to(x.dtype)
        return fft_conv(x, kernel, self.layer.D, backend=self.layer.backend)[0]
