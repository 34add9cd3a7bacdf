"""Which layers a model has: a name, or a string of layer signs.

    sign  mixer                        suffix  feed-forward layer behind it
    M     mamba                        (none)  none
    2     mamba2                       +       mlp: gated linear unit
    S     s4           (gated core)    *       moe: mixture of experts
    D     s4d          (gated core)    ~       channel_mix: RWKV-4's
    5     s5           (gated core)
    G     diagonal_ssd                 "MMA+" is Mamba, Mamba, and attention with a
    A     attention                    feed-forward layer. A shorter pattern than the
    R     rwkv         (RWKV-4)        model is repeated from its start.
    K     rwkv_block   (chapter 19's)
    H     hyena
    N     rnn
    U     gru

S4, S4D and S5 are linear: as mixers they stand in :class:`GatedCore`.
"""

from typing import NamedTuple

from ssm._errors import bad_argument
from ssm.models.kinds import FEED_FORWARDS, MIXERS, unknown_key

NAMED_PATTERNS: dict[str, str] = {
    "mamba": "M",
    "mamba2": "2",
    "s4": "S",
    "s4d": "D",
    "s5": "5",
    "transformer": "A+",
    "rwkv": "R~",
    # Chapter 19, section 19.8: attention where i % 8 == 7; moe_every=2 as in the Jamba
    # paper (arXiv:2403.19887, section 2), which has experts in every other layer.
    "jamba": "M*" * 7 + "A*",
    "striped_hyena": "H+A+",
}

_MIXER_OF = {kind.sign: name for name, kind in MIXERS.items()}
_FEED_FORWARD_OF = {kind.sign: name for name, kind in FEED_FORWARDS.items()}


class Unit(NamedTuple):
    """One block: the kind of its mixer, and of its feed-forward layer if any."""

    mixer: str
    feed_forward: str | None = None


def resolve_pattern(pattern: str, n_layers: int, moe_every: int = 1) -> list[Unit]:
    """The ``n_layers`` blocks of a model.

    Of the layers with a mixture of experts, those with i % moe_every == moe_every - 1
    keep it and the others get the dense layer; moe_every = 0: all of them do.
    """
    named = pattern in NAMED_PATTERNS
    units = parse_pattern(NAMED_PATTERNS.get(pattern, pattern))
    if len(units) > n_layers and not named:
        raise bad_argument(
            "pattern",
            f"{pattern!r}, {len(units)} layers",
            f"at most n_layers = {n_layers}",
            "shorten it or raise n_layers",
        )
    blocks = [units[i % len(units)] for i in range(n_layers)]
    return [
        Unit(unit.mixer, "mlp")
        if unit.feed_forward == "moe" and not _has_experts(i, moe_every)
        else unit
        for i, unit in enumerate(blocks)
    ]


def parse_pattern(pattern: str) -> list[Unit]:
    """The blocks that a string of signs stands for."""
    units: list[Unit] = []
    for place, sign in enumerate(pattern):
        if sign in _MIXER_OF:
            units.append(Unit(_MIXER_OF[sign]))
        elif sign in _FEED_FORWARD_OF and units and units[-1].feed_forward is None:
            units[-1] = Unit(units[-1].mixer, _FEED_FORWARD_OF[sign])
        elif pattern.isidentifier() and pattern.islower():
            raise unknown_key("pattern", pattern, list(NAMED_PATTERNS))
        else:
            raise bad_argument(
                "pattern",
                f"{pattern!r}, where {sign!r} at {place} does not fit",
                f"a name of {list(NAMED_PATTERNS)}, or signs of "
                f"{''.join(_MIXER_OF)}, each with one of {''.join(_FEED_FORWARD_OF)} "
                "behind it or none",
                "see ssm.models.patterns for what the signs mean",
            )
    if not units:
        raise bad_argument("pattern", repr(pattern), "at least one layer", "name one")
    return units


def _has_experts(layer_idx: int, moe_every: int) -> bool:
    return moe_every > 0 and layer_idx % moe_every == moe_every - 1
