"""Hyena (Poli et al. 2023, arXiv:2302.10866): long convolutions between gates."""

import itertools
import math
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ssm._errors import bad_argument
from ssm.layers._base import KernelLayer, check_fits
from ssm.layers._padded import PaddedLayer
from ssm.layers._positions import angles_at
from ssm.layers.selective_ssm import wide_dtype
from ssm.ops.causal_conv1d import causal_conv1d, causal_conv1d_step
from ssm.ops.fft_conv import fft_conv

_WAVES = 8  # frequencies among the features of a lag
_FASTEST = 4.0  # steps after which the shortest window is down to _FLOOR
_FLOOR = 1e-2


class HyenaState(NamedTuple):
    """The past inputs of every convolution; ``long`` grows by one entry a step.

    short (B, W - 1, (order + 1) D); long (B, S, order, D), S the steps fed so far,
    padding included. Both end with each row's latest step; before a row's first step
    they hold zeros.
    """

    short: Tensor
    long: Tensor


class HyenaFilter(nn.Module):
    """h_j = window_j * FFN(features of j): filters of any length, (order, D, L).

    ``filter(L)[..., j]`` depends on the lag j alone, whatever L is. Features: log(1 +
    j), and sine and cosine of j at 8 frequencies from 1 to 10^-3.5 a step; the FFN has
    four layers with sines of learned frequency between them (section 3.3). The window
    sqrt(2 alpha) exp(-alpha j) has a learned rate alpha a channel; at the start windows
    fall to 1% in 4 to ``reach`` steps, geometrically over the channels.

    Differs: the paper's features and windows use j / L, so that a filter changes with
    the length of the input and cannot be continued. And the window has unit energy, so
    that a channel's gain does not depend on its reach.
    """

    no_weight_decay: ClassVar[frozenset[str]] = frozenset({"log_rate", "frequency"})

    def __init__(
        self,
        d_model: int,
        order: int,
        hidden: int,
        reach: float,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.reach = reach
        sizes = [1 + 2 * _WAVES, hidden, hidden, hidden]
        self.hidden = nn.ModuleList(
            nn.Linear(n, m, device=device, dtype=dtype)
            for n, m in itertools.pairwise(sizes)
        )
        self.out = nn.Linear(
            hidden, order * d_model, bias=False, device=device, dtype=dtype
        )
        self.frequency = nn.Parameter(torch.empty(hidden, device=device, dtype=dtype))
        self.log_rate = nn.Parameter(
            torch.empty(order, d_model, device=device, dtype=wide_dtype(dtype))
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Rates spread over the channels, sines of frequency 1."""
        nn.init.ones_(self.frequency)
        D = self.log_rate.shape[1]
        part = torch.arange(D, device=self.log_rate.device) / max(D - 1, 1)
        log_reach = math.log(_FASTEST) + part * math.log(self.reach / _FASTEST)
        self.log_rate.copy_(math.log(-math.log(_FLOOR)) - log_reach)

    def forward(self, L: int) -> Float[Tensor, "order D L"]:
        """The filters at lags 0 to L - 1."""
        lags = torch.arange(L, device=self.log_rate.device)
        waves = angles_at(lags, _WAVES)
        features = [lags.to(waves.dtype).log1p()[:, None], waves.sin(), waves.cos()]
        z = torch.cat(features, -1).to(self.frequency.dtype)
        for linear in self.hidden:
            z = torch.sin(self.frequency * linear(z))
        shape = self.log_rate.shape
        rate = self.log_rate.exp()[..., None]
        window = (2 * rate).sqrt() * (-rate * lags).exp()
        return window * self.out(z).T.unflatten(0, shape)


class Hyena(PaddedLayer, KernelLayer):
    """y = W_o z_{N+1}; z_1 = v, z_{n+1} = x_n * (h_n conv z_n + skip_n z_n).

    x_1 … x_N and v are projections of the input, each passed through a short causal
    convolution; N is ``order``, h_n an implicit filter (:class:`HyenaFilter`) as long
    as the sequence (definition 3.1, algorithms 1 to 3).

    Linear in v given the gates: M = diag(x_N) T_N … diag(x_1) T_1 per channel, T_n the
    Toeplitz matrix of h_n with skip_n on its diagonal; ``kernel_matrix`` has one head a
    channel. A step costs O(S) after S steps, and the state grows: it holds all past
    inputs of every long convolution (:class:`HyenaState`).
    """

    no_weight_decay: ClassVar[frozenset[str]] = frozenset({"skip"})

    def __init__(
        self,
        d_model: int,
        order: int = 2,
        filter_hidden: int = 64,
        short_width: int = 3,
        reach: float = 1024.0,
        *,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("order", order), ("short_width", short_width)):
            if value < 1:
                raise bad_argument(name, value, "1 or more", "raise it")
        self.d_model, self.order, self.backend = d_model, order, backend
        width = (order + 1) * d_model
        self.in_proj = nn.Linear(d_model, width, device=device, dtype=dtype)
        self.short_weight = nn.Parameter(
            torch.empty(width, short_width, device=device, dtype=dtype)
        )
        self.short_bias = nn.Parameter(torch.empty(width, device=device, dtype=dtype))
        self.filter = HyenaFilter(
            d_model, order, filter_hidden, reach, device=device, dtype=dtype
        )
        self.skip = nn.Parameter(
            torch.empty(order, d_model, device=device, dtype=dtype)
        )
        self.out_proj = nn.Linear(d_model, d_model, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The short convolution as ``nn.Conv1d``, skips standard normal."""
        bound = self.short_weight.shape[1] ** -0.5
        nn.init.uniform_(self.short_weight, -bound, bound)
        nn.init.uniform_(self.short_bias, -bound, bound)
        nn.init.normal_(self.skip)

    def init_state(self, batch_size: int) -> HyenaState:
        """Nothing past: the short convolution starts from zeros."""
        width, taps = self.short_weight.shape
        new = self.short_weight.new_zeros
        long = new(batch_size, 0, self.order, self.d_model)
        return HyenaState(new(batch_size, taps - 1, width), long)

    def advance(
        self,
        x: Float[Tensor, "B L D"],
        past: HyenaState,
        lengths: Int[Tensor, " B"] | None,
    ) -> tuple[Float[Tensor, "B L D"], HyenaState]:
        """Every long convolution by FFT."""
        z, short = self._short(x, past.short, lengths)
        *gates, v = z.split(self.d_model, -1)
        # One tap more than meets an input: so the convolution's state is all inputs.
        kernels = self.filter(past.long.shape[1] + x.shape[1] + 1)
        inputs = []
        for n, gate in enumerate(gates):
            convolved, every = fft_conv(
                v,
                kernels[n],
                self.skip[n],
                initial_state=past.long[:, :, n],
                lengths=lengths,
                backend=self.backend,
            )
            inputs.append(every)
            v = gate * convolved
        return self.out_proj(v), HyenaState(short, torch.stack(inputs, 2))

    def step(
        self, x_t: Float[Tensor, "B D"], state: HyenaState
    ) -> tuple[Float[Tensor, "B D"], HyenaState]:
        """One step: a dot product of each filter with all past inputs."""
        self.check_input(x_t[:, None])
        check_fits(self, state, len(x_t))
        z, short = causal_conv1d_step(
            self.in_proj(x_t), self.short_weight, self.short_bias, state.short
        )
        *gates, v = z.split(self.d_model, -1)
        kernels = self.filter(state.long.shape[1] + 1).flip(-1)
        inputs = []
        for n, gate in enumerate(gates):
            every = torch.cat([state.long[:, :, n], v[:, None]], 1)
            inputs.append(every)
            kernel = kernels[n].to(v.dtype)
            convolved = torch.einsum("bsd,ds->bd", every, kernel)
            v = gate * (convolved + self.skip[n] * v)
        return self.out_proj(v), HyenaState(short, torch.stack(inputs, 2))

    def kernel_matrix(
        self, x: Float[Tensor, "B L D"]
    ) -> tuple[Float[Tensor, "B D L L"], Float[Tensor, "B L D 1"]]:
        """diag(x_N) T_N … diag(x_1) T_1, and v."""
        self.check_input(x)
        L = x.shape[1]
        z, _ = self._short(x, self.init_state(len(x)).short, None)
        *gates, v = z.split(self.d_model, -1)
        steps = torch.arange(L, device=x.device)
        lags = steps[:, None] - steps
        eye = (lags == 0).to(z.dtype)
        matrix = eye
        for n, (gate, kernel) in enumerate(zip(gates, self.filter(L), strict=True)):
            toeplitz = kernel[:, lags.clamp(min=0)].masked_fill(lags < 0, 0.0)
            toeplitz = toeplitz + self.skip[n][:, None, None] * eye
            matrix = gate.mT[..., None] * (toeplitz.to(z.dtype) @ matrix)
        return matrix, v[..., None]

    def readout(
        self,
        mixed: Float[Tensor, "B L D 1"],
        x: Float[Tensor, "B L D"],  # noqa: ARG002  # the contract's signature
    ) -> Float[Tensor, "B L D"]:
        """W_o mixed: the gates are in the matrix."""
        return self.out_proj(mixed[..., 0])

    def _short(
        self, x: Tensor, state: Tensor, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """All projections after the short convolution, and its new state."""
        return causal_conv1d(
            self.in_proj(x),
            self.short_weight,
            self.short_bias,
            initial_state=state,
            lengths=lengths,
            backend=self.backend,
        )
