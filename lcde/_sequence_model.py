"""A stack of sequence layers between an embedding and a linear map, as in document 2.

    x_0 = E(inputs)                       linear, or a table where inputs are tokens
    x_k = norm(x_{k-1} + drop(act(W_k drop(layer_k(x_{k-1})) + b_k)))
    outputs = W x_depth + b               of every position, or of their mean

Shapes: B sequences, L positions, H ``hidden_dim``, N ``state_dim``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from experiments._cli import nearest
from experiments.common import bad_input, check_integer
from lcde._packing import Parts, parts_of, unpack
from lcde._sequence_layers import (
    RNN,
    S5,
    Convolved,
    Embedding,
    MambaRecurrence,
    Mixer,
    Outputs,
    S4Recurrence,
    SinusoidalPositionalEncoding,
    TransformerLayer,
    apply_linear,
)
from ssm import layers
from ssm.layers.mamba2 import resolve_headdim
from ssm.training import stream_seed


class Kind(NamedTuple):
    """A layer by name: ``make(hidden_dim, state_dim)``, and whether it needs positions.

    What is made maps (B, L, H) to (B, L, H).
    """

    description: str
    make: Callable[[int, int], Mixer]
    positions: bool = False


def _mamba2(H: int, N: int) -> Mixer:
    headdim = resolve_headdim(2 * H, None, limit=64)
    return Outputs(layers.Mamba2(H, N, headdim=headdim))


MODELS: dict[str, Kind] = {
    "RNN": Kind("tanh recurrence; state_dim is ignored", lambda H, _: Outputs(RNN(H))),
    "Transformer": Kind(
        "causal encoder layer with state_dim heads, sinusoidal positions",
        TransformerLayer,
        positions=True,
    ),
    "S4": Kind(
        "S4D-Lin as published, linear in its input",
        lambda H, N: Convolved(S4Recurrence(H, N)),
    ),
    "Mamba": Kind("bare S6 core", lambda H, N: Outputs(MambaRecurrence(H, N))),
    "S5": Kind("one system for all channels, linear", lambda H, N: Outputs(S5(H, N))),
    # Beyond the source: layers of ssm with all that belongs to them.
    "S4Full": Kind(
        "S4, HiPPO-LegS made normal plus low rank",
        lambda H, N: Convolved(layers.S4(H, N)),
    ),
    "S4D": Kind("S4D-Lin, zero-order hold", lambda H, N: Convolved(layers.S4D(H, N))),
    "MambaBlock": Kind("Mamba's block", lambda H, N: Outputs(layers.Mamba(H, N))),
    "Mamba2": Kind("Mamba-2's block", _mamba2),
    "GRU": Kind("gated recurrence; no state_dim", lambda H, _: Outputs(layers.GRU(H))),
    "RWKV": Kind(
        "RWKV-4's time mixing; no state_dim", lambda H, _: Outputs(layers.RWKV(H))
    ),
    "Hyena": Kind(
        "gated long convolutions; no state_dim", lambda H, _: Outputs(layers.Hyena(H))
    ),
}

# Name -> activation, and how many times H its input has.
ACTIVATIONS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "GLU": (nn.GLU, 2),
    "GELU": (nn.GELU, 1),
}


@dataclass(frozen=True)
class SequenceModelConfig:
    """What a :class:`SequenceModel` is; names and defaults are the source's.

    input_dim: channels of the data, or different tokens with ``embedding``.
    state_dim: states a channel; heads of a Transformer. model_name: one of
    :data:`MODELS`. nonlinear: with the activation, GLU or GELU, or without any.
    continuous_output: outputs at every position, not of the mean over them.
    """

    input_dim: int
    output_dim: int
    hidden_dim: int
    state_dim: int
    depth: int
    model_name: str
    nonlinear: bool = True
    activation: str = "GLU"
    continuous_output: bool = False
    embedding: bool = False
    use_layernorm: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("input_dim", "output_dim", "hidden_dim", "state_dim", "depth"):
            check_integer(name, getattr(self, name), at_least=1, example=2)
        find_kind(self.model_name)
        if self.activation not in ACTIVATIONS:
            known = " or ".join(ACTIVATIONS)
            raise bad_input("activation", self.activation, known, "choose one")
        if not 0 <= self.dropout < 1:
            raise bad_input("dropout", self.dropout, "0 or more, below 1", "try 0.1")


def find_kind(model_name: str) -> Kind:
    """The layer of that name. Raises InputError that suggests the nearest one."""
    if model_name not in MODELS:
        near = nearest(model_name, MODELS)
        mend = f"did you mean {near}?" if near else "choose one of those"
        raise bad_input("model", model_name, f"one of {', '.join(MODELS)}", mend)
    return MODELS[model_name]


class Block(nn.Module):
    """y = norm(x + drop(act(W drop(layer(x)) + b))), x and y (T, H), packed.

    Without an activation, dropout and norm this is linear in x where the layer is.
    """

    def __init__(self, config: SequenceModelConfig) -> None:
        super().__init__()
        H, times = config.hidden_dim, 1
        activation: nn.Module = nn.Identity()
        if config.nonlinear:
            make, times = ACTIVATIONS[config.activation]
            activation = make()
        self.layer = find_kind(config.model_name).make(H, config.state_dim)
        self.linear_mix = nn.Linear(H, times * H)
        self.activation = activation
        self.dropout = nn.Dropout(config.dropout)
        self.norm = nn.LayerNorm(H) if config.use_layernorm else nn.Identity()

    def forward(self, x: Float[Tensor, "T H"], parts: Parts) -> Float[Tensor, "T H"]:
        """Mixes time, then channels."""
        mixed = apply_linear(self.linear_mix, self.dropout(self.layer.packed(x, parts)))
        return self.norm(x + self.dropout(self.activation(mixed)))


class SequenceModel(nn.Module):
    """(B, L, input_dim), or tokens (B, L), -> (B, output_dim), or one such a position.

    See the module for the equations, :class:`SequenceModelConfig` for the choices.
    """

    def __init__(self, config: SequenceModelConfig) -> None:
        super().__init__()
        self.config = config
        into = Embedding if config.embedding else nn.Linear
        self.init_layer: nn.Module = into(config.input_dim, config.hidden_dim)
        positions = find_kind(config.model_name).positions
        self.positions = (
            SinusoidalPositionalEncoding(config.hidden_dim) if positions else None
        )
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.linear_out = nn.Linear(config.hidden_dim, config.output_dim)

    def forward(
        self, *sequences: Float[Tensor, "_ _ d"] | Int[Tensor, "_ _"]
    ) -> Float[Tensor, "B *L D"] | list[Float[Tensor, "_ *_ D"]]:
        """The outputs; their mean over time is taken before the last map.

        Sequences of several lengths, each with its batch, give a list of their outputs.
        """
        parts = parts_of(sequences)
        flat = [each.flatten(0, 1) for each in sequences]
        x = flat[0] if len(flat) == 1 else torch.cat(flat)
        first = self.init_layer
        x = apply_linear(first, x) if isinstance(first, nn.Linear) else first(x)
        if self.positions is not None:
            placed = map(self.positions, unpack(x, parts))
            x = torch.cat([each.flatten(0, 1) for each in placed])
        for block in self.blocks:
            x = block(x, parts)
        if self.config.continuous_output:
            outputs = unpack(apply_linear(self.linear_out, x), parts)
        else:
            outputs = [self.linear_out(each.mean(1)) for each in unpack(x, parts)]
        return outputs if len(sequences) > 1 else outputs[0]

    def num_parameters(self) -> int:
        """How many real numbers are learnt."""
        return sum(p.numel() for p in self.parameters())


def build(config: SequenceModelConfig, *, seed: int) -> SequenceModel:
    """The model with weights from the seed's stream "init".

    PyTorch's generators are left as they were and bear on nothing.
    """
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(stream_seed(seed, "init"))
        return SequenceModel(config)
