"""y = W_out (S6(silu(conv(x'))) * silu(z)), [x', z] = W_in x: the Mamba block."""

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import silu

from ssm.layers._step import project
from ssm.layers.selective_ssm import (
    SelectiveSSM,
    check_sizes,
    check_step,
    without_padding,
)
from ssm.ops.causal_conv1d import BACKENDS, causal_conv1d, causal_conv1d_step


class MambaState(NamedTuple):
    """The last d_conv - 1 inputs of the convolution, and the hidden state."""

    conv: Float[Tensor, "B W1 D"]
    ssm: Float[Tensor, "B D N"]


class ShortConv(nn.Module):
    """y_t = silu(bias + sum_j w_j x_{t-j}), j < W: causal, each channel by itself.

    Its parameters have the names and shapes of ``nn.Conv1d``'s (weight (C, 1, W), bias
    (C,)), the layout of published checkpoints. ``backend`` is that of a whole layer:
    the convolution follows it where it has one of that name, and else chooses itself.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        *,
        bias: bool = True,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.backend = backend if backend in BACKENDS else "auto"
        self.weight = nn.Parameter(
            torch.empty(channels, 1, width, device=device, dtype=dtype)
        )
        self.bias = (
            nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
            if bias
            else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw both as ``nn.Conv1d`` does; safe after ``to_empty``."""
        bound = self.weight.shape[-1] ** -0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def init_state(self, batch_size: int) -> Float[Tensor, "B W1 C"]:
        """Zeros before the first step."""
        channels, _, width = self.weight.shape
        return self.weight.new_zeros(batch_size, width - 1, channels)

    def forward(
        self,
        x: Float[Tensor, "B L C"],
        state: Float[Tensor, "B W1 C"] | None,
        lengths: Int[Tensor, " B"] | None,
    ) -> tuple[Float[Tensor, "B L C"], Float[Tensor, "B W1 C"]]:
        """The whole sequence and the last W - 1 inputs."""
        return causal_conv1d(
            x,
            self.weight[:, 0],
            self.bias,
            activation="silu",
            initial_state=state,
            lengths=lengths,
            backend=self.backend,
        )

    def step(
        self, x_t: Float[Tensor, "B C"], state: Float[Tensor, "B W1 C"]
    ) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B W1 C"]]:
        """One step."""
        return causal_conv1d_step(x_t, self.weight[:, 0], self.bias, state, "silu")


class Mamba(SelectiveSSM):
    """y = W_out (S6(silu(conv(x'))) * silu(z)), [x', z] = W_in x.

    Gu & Dao 2023, arXiv:2312.00752, section 3.4; parameters named and shaped as in
    mamba_ssm's ``Mamba``, so that checkpoints load as they are. x (B, L, d_model); the
    state is the convolution's window (B, d_conv - 1, d_inner) and h (B, d_inner, N),
    d_inner = expand d_model. ``kernel_matrix`` has one head a channel of d_inner; its
    values are what the convolution puts out. Any sizes.

    Differs: A_log, D and dt_proj.bias are float32 at least, whatever ``dtype`` is.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | Literal["auto"] = "auto",
        *,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        bias: bool = False,
        conv_bias: bool = True,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_sizes(d_model=d_model, d_conv=d_conv, expand=expand)
        d_inner = expand * d_model
        super().__init__(
            d_inner,
            d_state,
            math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank,
            dt_min=dt_min,
            dt_max=dt_max,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        self.d_model, self.d_conv, self.expand = d_model, d_conv, expand
        self.in_proj = nn.Linear(
            d_model, 2 * d_inner, bias=bias, device=device, dtype=dtype
        )
        self.conv1d = ShortConv(
            d_inner,
            d_conv,
            bias=conv_bias,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        self.out_proj = nn.Linear(
            d_inner, d_model, bias=bias, device=device, dtype=dtype
        )

    def init_state(self, batch_size: int) -> MambaState:  # type: ignore[override]
        ssm = super().init_state(batch_size).ssm
        return MambaState(self.conv1d.init_state(batch_size), ssm)

    def forward(  # type: ignore[override]
        self,
        x: Float[Tensor, "B L D"],
        state: MambaState | None = None,
        lengths: Int[Tensor, " B"] | None = None,
    ) -> tuple[Float[Tensor, "B L D"], MambaState]:
        self.check_input(x, state)
        conv, h = (None, None) if state is None else state
        u, z = self.in_proj(without_padding(x, lengths)).chunk(2, -1)
        u, conv = self.conv1d(u, conv, lengths)
        y, h = self._scan(u, z, h, lengths)
        return without_padding(self.out_proj(y), lengths), MambaState(conv, h)

    def step(  # type: ignore[override]
        self, x_t: Float[Tensor, "B D"], state: MambaState
    ) -> tuple[Float[Tensor, "B D"], MambaState]:
        check_step(x_t, state, self.d_model, MambaState)
        u, z = project(self.in_proj, x_t).chunk(2, -1)
        u, conv = self.conv1d.step(u, state.conv)
        y, h = self._scan_step(u, z, state.ssm)
        return project(self.out_proj, y), MambaState(conv, h)

    def kernel_matrix(
        self, x: Float[Tensor, "B L D"]
    ) -> tuple[Float[Tensor, "B E L L"], Float[Tensor, "B L E 1"]]:
        self.check_input(x)
        u, _ = self.conv1d(self.in_proj(x).chunk(2, -1)[0], None, None)
        matrix = self._kernel(u)
        return matrix, u[..., None].to(matrix.dtype)

    def readout(
        self, mixed: Float[Tensor, "B L E 1"], x: Float[Tensor, "B L D"]
    ) -> Float[Tensor, "B L D"]:
        z = self.in_proj(x).chunk(2, -1)[1]
        return self.out_proj((mixed[..., 0] * silu(z)).to(x.dtype))
