"""Every model of these experiments by name, at equal sizes or at equal parameters.

All are ``ssm.models.SequenceLM`` with a tied embedding. ``build_config`` makes a config
of document 1's flags, ``matched_config`` one with as many parameters as another model
has at the same flags, and ``build`` the model, with weights from a seed.

Matching counts what is outside the embedding: a table of 20,000 words times 64 holds
1.28 million parameters and two blocks of Mamba 65 thousand, so that equal totals would
say little. One knob of a model is turned, and the flags keep their meaning otherwise:

* where there is a feed-forward layer (transformer, rwkv, jamba), its width. d_model and
  with it the embedding stay the same, so that the totals are matched as well;
* elsewhere d_model, in steps that leave the number of heads as it was (heads grow
  wider). The embedding follows d_model and is not matched: say both counts. The layers'
  ``expand``, a whole number, would be too coarse, and the state size is what such
  experiments vary.
"""

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from experiments._cli import nearest
from experiments.common import InputError, bad_input, check_integer
from mamba_experiments.mamba_simple import mamba_simple
from mamba_experiments.mamba_SSD import mamba_SSD_diag
from ssm._errors import ArgumentError
from ssm.layers.mamba2 import resolve_headdim
from ssm.models import SequenceLM, SequenceLMConfig
from ssm.training import stream_seed

MATCH_TOLERANCE = 0.1  # of the target; beyond it a match is refused
LARGEST_KNOB = 2**16


class Sizes(NamedTuple):
    """The flags that shape a model's blocks."""

    d_model: int
    n_state: int
    n_layers: int


class Knob(NamedTuple):
    """The width that matching moves: ``turn(config, value)``, multiples of ``step``."""

    name: str
    step: Callable[[SequenceLMConfig], int]
    turn: Callable[[SequenceLMConfig, int], SequenceLMConfig]


class ParameterCount(NamedTuple):
    """How many numbers a model learns, in the embedding (also its head) and elsewhere.

    Where a mixture of experts is in it, all experts count.
    """

    embedding: int
    rest: int

    @property
    def total(self) -> int:
        """Both."""
        return self.embedding + self.rest


@dataclass(frozen=True)
class ModelSpec:
    """A model: what it is and what n_state means to it, its blocks, its knob.

    ``blocks`` gives entries of a ``SequenceLMConfig``: pattern and options of layers.
    """

    description: str
    blocks: Callable[[Sizes], dict[str, Any]]
    knob: Knob


def _set_hidden(config: SequenceLMConfig, width: int) -> SequenceLMConfig:
    """All feed-forward layers, and every expert, of this width."""
    return replace(
        config,
        feed_forward={
            kind: {**options, "d_hidden": width}
            for kind, options in config.feed_forward.items()
        },
    )


def _width_step(config: SequenceLMConfig) -> int:
    """The least step of d_model in which heads can grow wider and stay as many."""
    heads = [x["headdim"] for x in config.mixer.values() if "headdim" in x]
    steps = [config.d_model // math.gcd(config.d_model, P) for P in heads]
    return math.lcm(*steps)


def _set_width(config: SequenceLMConfig, d_model: int) -> SequenceLMConfig:
    """Another d_model, a multiple of :func:`_width_step`, with as many heads."""
    mixer = {kind: dict(options) for kind, options in config.mixer.items()}
    for options in mixer.values():
        if "headdim" in options:
            options["headdim"] = options["headdim"] * d_model // config.d_model
    return replace(config, d_model=d_model, mixer=mixer)


HIDDEN = Knob("d_hidden", lambda _: 1, _set_hidden)
WIDTH = Knob("d_model", _width_step, _set_width)


def _mamba2(sizes: Sizes) -> dict[str, Any]:
    headdim = resolve_headdim(2 * sizes.d_model, None, limit=64)
    options = {"d_state": sizes.n_state, "expand": 2, "headdim": headdim}
    return {"pattern": "mamba2", "mixer": {"mamba2": options}}


STEP = 0.01  # with Mamba-2's new A: a head forgets within 6 to 100 tokens


def _mamba2_fixed_decay(sizes: Sizes) -> dict[str, Any]:
    """Every step clamped to one size: as in RetNet (arXiv:2307.08621, section 2.1).

    What Mamba-2 would form the steps from is there, counted, and never learns.
    """
    blocks = _mamba2(sizes)
    blocks["mixer"]["mamba2"]["dt_limit"] = (STEP, STEP)
    return blocks


def _s4d(sizes: Sizes) -> dict[str, Any]:
    return {"pattern": "s4d", "mixer": {"s4d": {"d_state": sizes.n_state}}}


def _attention(d_model: int) -> dict[str, Any]:
    """Rotary positions; of 4, 2 and 1 heads the most that have equal, even widths."""
    heads = next((h for h in (4, 2) if d_model % (2 * h) == 0), 1)
    return {"n_heads": heads, "positions": "rotary"}


def _transformer(sizes: Sizes) -> dict[str, Any]:
    return {"pattern": "transformer", "mixer": {"attention": _attention(sizes.d_model)}}


def _jamba(sizes: Sizes) -> dict[str, Any]:
    n = sizes.n_layers
    check_integer("n_layers of jamba", n, at_least=2, example=2)
    return {
        "pattern": "jamba" if n >= 8 else "M*" * (n - 1) + "A*",
        "moe_every": 2,
        "mixer": {
            "mamba": {"d_state": sizes.n_state},
            "attention": _attention(sizes.d_model),
        },
    }


MODELS: dict[str, ModelSpec] = {
    "mamba_simple": ModelSpec(
        "Mamba's block; n_state: states of each of 2 d_model channels",
        lambda sizes: mamba_simple(sizes.n_state),
        WIDTH,
    ),
    "mamba_SSD_diag_exp": ModelSpec(
        "Mamba's block with diagonal decays that no input changes in the place of its "
        "scan; n_state: decays of each head of at most 16 channels",
        lambda sizes: mamba_SSD_diag(sizes.d_model, sizes.n_state, selective=False),
        WIDTH,
    ),
    "mamba_SSD_diag_selective": ModelSpec(
        "the same with decays, B and C read from the input; n_state: as there",
        lambda sizes: mamba_SSD_diag(sizes.d_model, sizes.n_state, selective=True),
        WIDTH,
    ),
    "mamba2": ModelSpec(
        "Mamba-2's block, one decay a head; n_state: states of each of 2 d_model "
        "channels, which share B and C",
        _mamba2,
        WIDTH,
    ),
    "mamba2_fixed_decay": ModelSpec(
        "the same with decays that no input changes, as RetNet has them: B and C alone "
        "are read from the input; n_state: as there",
        _mamba2_fixed_decay,
        WIDTH,
    ),
    "s4d": ModelSpec(
        "S4D with a gated output; n_state: real states of each of d_model channels, "
        "half as many conjugate pairs (an odd one is rounded up)",
        _s4d,
        WIDTH,
    ),
    "rwkv": ModelSpec(
        "RWKV-4: time mixing and channel mixing; n_state is ignored (two sums a "
        "channel)",
        lambda _: {"pattern": "rwkv"},
        HIDDEN,
    ),
    "transformer": ModelSpec(
        "causal attention with rotary positions, and a gated feed-forward layer; "
        "n_state is ignored (every key and value is kept)",
        _transformer,
        HIDDEN,
    ),
    "jamba": ModelSpec(
        "Mamba, every eighth layer attention (of fewer than 8 the last), 8 experts in "
        "every second layer and a gated feed-forward layer in the others; its balance "
        "loss is for the trainer to add; n_state: Mamba's",
        _jamba,
        HIDDEN,
    ),
}


def find_model(name: str) -> ModelSpec:
    """The spec called ``name``; InputError with the nearest name if there is none."""
    if name not in MODELS:
        near = nearest(name, MODELS)
        mend = f"did you mean {near}?" if near else "choose one of those"
        raise bad_input("model", name, f"one of {', '.join(MODELS)}", mend)
    return MODELS[name]


def build_config(
    name: str,
    *,
    vocab_size: int,
    d_model: int,
    n_state: int,
    n_layers: int,
    dropout: float = 0.0,
    embedding_std: float = 0.02,
) -> SequenceLMConfig:
    """The model ``name`` at these sizes; see :data:`MODELS` for what n_state means.

    dropout: of what every layer adds to the residual stream. embedding_std: deviation
    of new embeddings. Raises InputError for an
    unknown name and for sizes that no model has.
    """
    spec, sizes = find_model(name), Sizes(d_model, n_state, n_layers)
    for flag, value in (sizes._asdict() | {"vocab_size": vocab_size}).items():
        check_integer(flag, value, at_least=1, example=16)
    try:
        return SequenceLMConfig(
            vocab_size,
            d_model,
            n_layers,
            dropout=dropout,
            embedding_std=embedding_std,
            **spec.blocks(sizes),
        )
    except ArgumentError as error:
        raise InputError(str(error)) from None


def matched_config(
    reference: str,
    name: str,
    *,
    vocab_size: int,
    d_model: int,
    n_state: int,
    n_layers: int,
    dropout: float = 0.0,
    embedding_std: float = 0.02,
) -> SequenceLMConfig:
    """The model ``name`` with about as many parameters as ``reference`` has.

    Both outside the embedding and at the same flags; see :func:`match_params`.
    """
    flags: dict[str, Any] = {
        "vocab_size": vocab_size,
        "d_model": d_model,
        "n_state": n_state,
        "n_layers": n_layers,
        "dropout": dropout,
        "embedding_std": embedding_std,
    }
    target = count_parameters(build_config(reference, **flags)).rest
    return match_params(name, build_config(name, **flags), target)


def match_params(name: str, config: SequenceLMConfig, target: int) -> SequenceLMConfig:
    """``config``, of the model ``name``, with its knob where ``rest`` is nearest.

    ``rest`` (:class:`ParameterCount`) grows with the knob: of the last legal value
    below ``target`` and the first that reaches it, the nearer one is taken. Raises
    InputError where that is off by more than a tenth of the target.
    """
    knob = find_model(name).knob
    step = knob.step(config)

    def rest(multiple: int) -> int:
        return count_parameters(knob.turn(config, multiple * step)).rest

    def miss(multiple: int) -> int:
        return abs(rest(multiple) - target)

    above = 1 + bisect_left(range(1, LARGEST_KNOB), target, key=rest)
    found = min(range(max(1, above - 1), above + 1), key=miss)
    if miss(found) > MATCH_TOLERANCE * target:
        raise bad_input(
            "match_params",
            f"{rest(found):,} parameters of {name} outside its embedding at the "
            f"nearest {knob.name}, {found * step}",
            f"{target:,} within {MATCH_TOLERANCE:.0%}",
            "choose a d_model with more divisors, or do without matching",
        )
    return knob.turn(config, found * step)


def count_parameters(config: SequenceLMConfig) -> ParameterCount:
    """Parameters of a model that is never made: on the meta device."""
    model = SequenceLM(config, device="meta")
    embedding = model.embedding.weight.numel()
    return ParameterCount(embedding, model.num_parameters() - embedding)


def build(
    config: SequenceLMConfig, *, seed: int, device: torch.device | str | None = None
) -> SequenceLM:
    """The model, with weights from the seed's stream "init" on every device alike.

    Drawn on the CPU and then moved. PyTorch's generators are left as they were and
    bear on nothing.
    """
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(stream_seed(seed, "init"))
        model = SequenceLM(config, device="cpu")
    return model if device is None else model.to(device)
