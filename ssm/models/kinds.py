"""Every kind of layer that a language model can be made of: one table for each place.

A mixer moves information along time; a feed-forward layer works on it at every
position. Both tables hold what the rest of the package needs to know, so that nothing
else ever asks which kind a layer is.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ssm._errors import ArgumentError, bad_argument
from ssm.layers._base import SequenceLayer, State
from ssm.layers.attention import Attention
from ssm.layers.diagonal_ssd import DiagonalSSD
from ssm.layers.hyena import Hyena
from ssm.layers.mamba import Mamba
from ssm.layers.mamba2 import Mamba2
from ssm.layers.mlp import GLUMLP
from ssm.layers.moe import MoE
from ssm.layers.recurrent import GRU, RNN
from ssm.layers.rwkv import RWKV, RWKVBlock, RWKVChannelMix
from ssm.layers.s4 import S4
from ssm.layers.s4d import S4D
from ssm.layers.s5 import S5
from ssm.models.gated_core import GatedCore
from ssm.ops._ragged import valid_steps

Options = Mapping[str, Any]
# What a model supplies to every layer; the other arguments are a config's to choose.
_SUPPLIED = ("d_model", "device", "dtype")
_DEPTH = ("layer_idx", "n_layers")


class Place(NamedTuple):
    """Where in a model a layer stands, for layers that start differently by depth."""

    layer_idx: int = 0
    n_layers: int = 1


ALONE = Place()


@dataclass(frozen=True)
class Kind:
    """A kind of layer: its sign in a pattern, its class, what is put around it."""

    sign: str
    layer: Callable[..., Any]
    around: Callable[[Any], nn.Module] | None = None

    def defaults(self) -> dict[str, Any]:
        """Every option that a config may set, with its default."""
        return {
            name: parameter.default
            for name, parameter in inspect.signature(self.layer).parameters.items()
            if name not in (*_SUPPLIED, *_DEPTH)
        }

    def build(
        self,
        d_model: int,
        options: Options,
        place: Place,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> Any:
        """The layer itself."""
        known = inspect.signature(self.layer).parameters
        depth = {n: x for n, x in place._asdict().items() if n in known}
        made = self.layer(d_model, **options, **depth, device=device, dtype=dtype)
        return made if self.around is None else self.around(made)


def _forward_mlp(
    ffn: GLUMLP, x: Tensor, state: State, lengths: Tensor | None
) -> tuple[Tensor, State, None]:
    del state, lengths  # every position by itself; zero on padding, having no bias
    return ffn(x), (), None


def _forward_moe(
    ffn: MoE, x: Tensor, state: State, lengths: Tensor | None
) -> tuple[Tensor, State, Tensor]:
    del state
    valid = None if lengths is None else valid_steps(lengths, x.shape[1])
    y, loss = ffn(x, valid)
    return y, (), loss


def _forward_layer(
    ffn: SequenceLayer, x: Tensor, state: State, lengths: Tensor | None
) -> tuple[Tensor, State, None]:
    return *ffn(x, state, lengths), None


def _step_mlp(ffn: GLUMLP, x_t: Tensor, state: State) -> tuple[Tensor, State]:
    return ffn(x_t), state


def _step_moe(ffn: MoE, x_t: Tensor, state: State) -> tuple[Tensor, State]:
    return ffn(x_t)[0], state


def _no_state(ffn: nn.Module, batch_size: int) -> State:
    del ffn, batch_size
    return ()


@dataclass(frozen=True)
class FeedForwardKind(Kind):
    """A kind of feed-forward layer, and how it is called.

    ``forward(layer, x, state, lengths) -> (y, state, load-balancing loss or None)``;
    ``step(layer, x_t, state) -> (y_t, state)``. Without memory, the state is ``()``.
    """

    forward: Callable[..., tuple[Tensor, State, Tensor | None]] = _forward_mlp
    step: Callable[..., tuple[Tensor, State]] = _step_mlp
    init_state: Callable[..., State] = _no_state


MIXERS: dict[str, Kind] = {
    "mamba": Kind("M", Mamba),
    "mamba2": Kind("2", Mamba2),
    "s4": Kind("S", S4, GatedCore),
    "s4d": Kind("D", S4D, GatedCore),
    "s5": Kind("5", S5, GatedCore),
    "diagonal_ssd": Kind("G", DiagonalSSD),
    "attention": Kind("A", Attention),
    "rwkv": Kind("R", RWKV),
    "rwkv_block": Kind("K", RWKVBlock),
    "hyena": Kind("H", Hyena),
    "rnn": Kind("N", RNN),
    "gru": Kind("U", GRU),
}
FEED_FORWARDS: dict[str, FeedForwardKind] = {
    "mlp": FeedForwardKind("+", GLUMLP),
    "moe": FeedForwardKind("*", MoE, forward=_forward_moe, step=_step_moe),
    "channel_mix": FeedForwardKind(
        "~",
        RWKVChannelMix,
        forward=_forward_layer,
        step=RWKVChannelMix.step,
        init_state=RWKVChannelMix.init_state,
    ),
}


def unknown_key(where: str, key: str, valid: list[str]) -> ArgumentError:
    """The error for a key that is not among ``valid``, with the nearest that is."""
    near = get_close_matches(key, valid, 1)
    mend = f"did you mean {near[0]!r}?" if near else "drop it"
    return bad_argument(where, f"unknown key {key!r}", f"one of {sorted(valid)}", mend)


def resolve_options(
    where: str, given: Mapping[str, Options], used: set[str], kinds: Mapping[str, Kind]
) -> dict[str, dict[str, Any]]:
    """Every option of every kind in ``used``: the given value, or the default.

    Raises ArgumentError for a kind or an option that is unknown, and for options of a
    kind that the model does not have.
    """
    for name in given:
        if name not in kinds:
            raise unknown_key(where, name, list(kinds))
        if name not in used:
            raise bad_argument(
                where,
                f"options for {name!r}, which the pattern does not have",
                f"options for {sorted(used) or 'nothing'}",
                "drop them or change the pattern",
            )
    resolved = {}
    for name in sorted(used):
        options, defaults = given.get(name, {}), kinds[name].defaults()
        for key in options:
            if key not in defaults:
                raise unknown_key(f"{where}[{name!r}]", key, list(defaults))
        resolved[name] = {k: _frozen(options.get(k, x)) for k, x in defaults.items()}
    return resolved


def _frozen(value: Any) -> Any:
    """Lists, which JSON makes of tuples, as tuples again."""
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value
