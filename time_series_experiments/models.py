"""The models by name: one channel in, one or more out, N states where there are any.

``ssm_diag_linear`` is :class:`DiagLinear`, nothing but N decays and their weights: the
one model that bound_N binds. The others are a :class:`Regressor`, one layer of
``ssm.layers`` between two projections.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import softplus

from experiments._cli import nearest
from experiments.common import bad_input, check_integer
from ssm._errors import ArgumentError
from ssm.layers import GLUMLP, RNN, S4D, Attention, DiagonalSSD, Mamba
from ssm.layers._base import SequenceLayer
from ssm.training import stream_seed

CLEAN = "ssm_diag_linear"


class DiagLinear(nn.Module):
    """ŷ_t = sum_n w_n h_tn, h_tn = a_n h_{t-1,n} + x_t: N real states and no more.

    S independent models at once (seeds, restarts), float64. a = tanh(theta) (S, N) lies
    in (-1, 1); w (S, O, N) has one row for each output. w_n stands for the product
    b_n c_n, which is all that the kernel depends on. Poles are real: where the best N
    poles are a conjugate pair, this model stays above bound_N.
    """

    def __init__(self, decays: Float[Tensor, "S N"], outputs: int = 1) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.atanh(decays.double()))
        S, N = decays.shape
        self.weights = nn.Parameter(torch.zeros(S, outputs, N, dtype=torch.float64))

    @property
    def decays(self) -> Float[Tensor, "S N"]:
        """a."""
        return self.theta.tanh()

    def kernel(self, T: int) -> Float[Tensor, "S O T"]:
        """k̂_j = sum_n w_n a_n^j, through the Vandermonde matrix of the decays."""
        # By doubling: PyTorch's gradient of a ** j is NaN at a = 0, j = 0.
        powers = torch.ones_like(self.theta)[..., None]
        factor = self.decays[..., None]
        while powers.shape[-1] < T:
            powers = torch.cat([powers, powers * factor], -1)
            factor = factor * factor
        return self.weights @ powers[..., :T]

    def kernel_matrix(self, T: int) -> Float[Tensor, "S O T T"]:
        """M[t, s] = k̂_{t-s} for s <= t, else 0."""
        lag = torch.arange(T, device=self.theta.device)
        lag = lag[:, None] - lag
        return torch.where(lag >= 0, self.kernel(T)[..., lag.abs()], 0.0)

    def forward(self, x: Float[Tensor, "S B T"]) -> Float[Tensor, "S B T O"]:
        """ŷ = M x, for the sequences of each model; as the recurrence with h_0 = 0."""
        matrix = self.kernel_matrix(x.shape[-1])
        return torch.einsum("zots,zbs->zbto", matrix, x.double())


class Alone(nn.Module):
    """One :class:`DiagLinear`, called as the other models are: x (B, T)."""

    def __init__(self, model: DiagLinear) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Float[Tensor, "B T"]) -> Float[Tensor, "B T O"]:
        """See the class."""
        return self.model(x[None])[0]


class Regressor(nn.Module):
    """ŷ = W_out (u + layer(u)), u = W_in x: a layer of D channels for one channel.

    x (B, T) to ŷ (B, T, O). No norm comes before the layer: of one channel spread over
    D it would leave little but the sign.
    """

    def __init__(
        self, layer: nn.Module, d_model: int, outputs: int = 1, *, bias: bool = True
    ) -> None:
        super().__init__()
        self.in_proj = nn.Linear(1, d_model, bias=bias)
        self.layer = layer
        self.out_proj = nn.Linear(d_model, outputs, bias=bias)

    def forward(self, x: Float[Tensor, "B T"]) -> Float[Tensor, "B T O"]:
        """See the class."""
        u = self.in_proj(x[..., None])
        return self.out_proj(u + _first(self.layer(u)))


class AttentionMLP(nn.Module):
    """v + mlp(v), v = u + attention(u): a transformer's block, without its norms."""

    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.attention = Attention(d_model, n_heads)
        self.mlp = GLUMLP(d_model)

    def forward(self, u: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """See the class; less u, which :class:`Regressor` adds."""
        mixed = _first(self.attention(u))
        return mixed + self.mlp(u + mixed)


def _first(output: Any) -> Tensor:
    """The output of a layer that also returns its state."""
    return output[0] if isinstance(output, tuple) else output


@dataclass(frozen=True)
class ModelSpec:
    """A model: what it is and what N means to it; None for the clean one.

    linear: ŷ is linear in x, so that its error has a closed form. negative_decays: it
    can hold λ < 0 in its states. stateful: it has N states to vary. decays: the N that
    it learned, where no input changes them.
    """

    description: str
    layer: Callable[[int, int], nn.Module] | None
    linear: bool = False
    negative_decays: bool = True
    stateful: bool = True
    decays: Callable[[Any], Tensor] | None = None


def _ssd_decays(model: Any) -> Tensor:
    return torch.exp(-softplus(model.layer.dt_bias)).flatten()


def _diagonal_ssd(d_model: int, N: int) -> SequenceLayer:
    return DiagonalSSD(d_model, d_state=N, d_conv=0, headdim=2 * d_model)


def _transformer(d_model: int, N: int) -> nn.Module:
    del N  # every key and value is kept
    heads = next((h for h in (4, 2) if d_model % (2 * h) == 0), 1)
    return AttentionMLP(d_model, heads)


MODELS: dict[str, ModelSpec] = {
    "mamba_diag_exp": ModelSpec(
        "a block around one head of N exponential decays that no input changes "
        "(ssm.layers.DiagonalSSD), N in all; with gate and direct path, but without "
        "the short convolution, whose 4 taps would stand in for states",
        _diagonal_ssd,
        negative_decays=False,
        decays=_ssd_decays,
    ),
    CLEAN: ModelSpec(
        "one channel, exactly N real states, no D, convolution, norm or gate; float64, "
        "Adam and then Levenberg-Marquardt",
        None,
        linear=True,
        decays=lambda model: model.model.decays.flatten(),
    ),
    "mamba": ModelSpec(
        "Mamba's block, N states for each of 2 d_model channels",
        lambda d_model, N: Mamba(d_model, d_state=N),
        negative_decays=False,
    ),
    "s4d": ModelSpec(
        "S4D, N real states (as conjugate pairs, an odd N rounded up) for each of "
        "d_model channels; linear",
        lambda d_model, N: S4D(d_model, d_state=N),
        linear=True,
    ),
    "transformer": ModelSpec(
        "one block of causal attention with rotary positions; has no N",
        _transformer,
        stateful=False,
    ),
    "rnn": ModelSpec(
        "tanh recurrence (Elman) with N hidden units, read from d_model channels",
        lambda d_model, N: RNN(d_model, d_hidden=N),
    ),
}


def find_model(name: str) -> ModelSpec:
    """The spec called ``name``; InputError with the nearest name if there is none."""
    if name not in MODELS:
        near = nearest(name, MODELS)
        mend = f"did you mean {near}?" if near else "choose one of those"
        raise bad_input("models", name, f"one of {', '.join(MODELS)}", mend)
    return MODELS[name]


def check_represents(name: str, lambdas: tuple[float, ...]) -> None:
    """Raise InputError where a decay is negative and the model's never are."""
    negative = [decay for decay in lambdas if decay < 0]
    if negative and not find_model(name).negative_decays:
        able = [key for key, spec in MODELS.items() if spec.negative_decays]
        raise bad_input(
            "lambdas",
            negative[0],
            f"decays in [0, 1) for {name}, whose states decay as exp(-rate)",
            f"choose one of {', '.join(able)}",
        )


def build_regressor(
    name: str, *, N: int, d_model: int, outputs: int, seed: int
) -> nn.Module:
    """The model ``name`` with weights from the seed's stream "init", float32.

    Of the clean model, one of N decays spread over (0, 1). PyTorch's generators are
    left as they were. Raises InputError.
    """
    spec = find_model(name)
    check_integer("N", N, at_least=1, example=1)
    check_integer("d_model", d_model, at_least=1, example=16)
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(stream_seed(seed, "init"))
        if spec.layer is None:
            return Alone(DiagLinear(spread_decays(1, N), outputs))
        try:
            layer = spec.layer(d_model, N)
        except ArgumentError as error:
            raise bad_input("d_model", d_model, str(error), "change it") from None
        return Regressor(layer, d_model, outputs, bias=not spec.linear)


def spread_decays(
    S: int, N: int, generator: torch.Generator | None = None
) -> Float[Tensor, "S N"]:
    """N decays in (0, 1) for each of S models: one drawn in each of N equal parts."""
    parts = torch.rand(S, N, generator=generator, dtype=torch.float64)
    return (torch.arange(N) + 0.05 + 0.9 * parts) / N


def count_parameters(model: nn.Module) -> int:
    """How many numbers a model learns."""
    return sum(parameter.numel() for parameter in model.parameters())
