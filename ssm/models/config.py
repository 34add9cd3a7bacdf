"""What a language model is made of: one frozen value, complete and checked."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ssm._errors import bad_argument
from ssm.models.kinds import FEED_FORWARDS, MIXERS, resolve_options, unknown_key
from ssm.models.patterns import Unit, resolve_pattern


@dataclass(frozen=True)
class SequenceLMConfig:
    """A language model's sizes, its pattern of layers, and the options of each kind.

    ``mixer`` and ``feed_forward`` give options by kind of layer, as in
    ``mixer={"mamba": {"d_state": 16}}``: keyword arguments of the layer's class. Once
    made, a config is resolved: both hold every option of every kind that the pattern
    has. ``dropout`` is applied to what each layer adds to the residual stream, while
    training. ``residual_in_fp32`` keeps that stream in float32 at least where the
    parameters have 16 bits. ``embedding_std`` is the deviation of new embeddings (0.02:
    GPT-2's and mamba_ssm's). ``moe_every``: see :func:`resolve_pattern`.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    pattern: str = "mamba"
    tie_embeddings: bool = True
    embedding_std: float = 0.02
    norm_eps: float = 1e-5
    dropout: float = 0.0
    residual_in_fp32: bool = True
    moe_every: int = 1
    mixer: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    feed_forward: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "n_layers"):
            _check_whole(name, getattr(self, name), 1)
        _check_whole("moe_every", self.moe_every, 0)
        if not 0 <= self.dropout < 1:
            raise bad_argument("dropout", self.dropout, "0 <= dropout < 1", "lower it")
        if not 0 < self.embedding_std < math.inf:
            got = self.embedding_std
            raise bad_argument("embedding_std", got, "above 0", "try 0.02")
        if not 0 < self.norm_eps < math.inf:
            raise bad_argument("norm_eps", self.norm_eps, "above 0", "try 1e-5")
        units = self.units()
        mixers = {unit.mixer for unit in units}
        ffns = {unit.feed_forward for unit in units if unit.feed_forward is not None}
        # The only way to complete a frozen value as it is made.
        resolved = resolve_options("mixer", self.mixer, mixers, MIXERS)
        object.__setattr__(self, "mixer", resolved)
        resolved = resolve_options(
            "feed_forward", self.feed_forward, ffns, FEED_FORWARDS
        )
        object.__setattr__(self, "feed_forward", resolved)

    def units(self) -> list[Unit]:
        """The kinds of every block, in order."""
        return resolve_pattern(self.pattern, self.n_layers, self.moe_every)

    def to_dict(self) -> dict[str, Any]:
        """Every entry, as JSON values (infinity as {"__float__": "Infinity"})."""
        return {f.name: _to_json(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> "SequenceLMConfig":
        """The inverse of :meth:`to_dict`; missing entries have their defaults."""
        known = {f.name: f for f in fields(cls)}
        for key in entries:
            if key not in known:
                raise unknown_key("config", key, list(known))
        for key in ("vocab_size", "d_model", "n_layers"):
            if key not in entries:
                raise bad_argument("config", f"no {key}", f"an entry {key}", "add one")
        return cls(**{key: _from_json(value) for key, value in entries.items()})

    def to_json(self) -> str:
        """The resolved config as strict JSON."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "SequenceLMConfig":
        """The inverse of :meth:`to_json`."""
        try:
            entries = json.loads(text)
        except json.JSONDecodeError as error:
            raise bad_argument(
                "config", f"text that is not JSON ({error})", "JSON", "write it anew"
            ) from error
        if not isinstance(entries, dict):
            raise bad_argument(
                "config", f"a JSON {type(entries).__name__}", "an object", "use {…}"
            )
        return cls.from_dict(entries)


def _check_whole(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise bad_argument(
            name, repr(value), f"a whole number from {least}", "change it"
        )


def _to_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _to_json(entry) for key, entry in value.items()}
    if isinstance(value, tuple):
        return [_to_json(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        names = {math.inf: "Infinity", -math.inf: "-Infinity"}
        return {"__float__": names.get(value, "NaN")}
    return value


def _from_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _from_json(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_from_json(entry) for entry in value]
    return value
