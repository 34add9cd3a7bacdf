"""The one result type, its JSON form, and named random streams."""

import hashlib
import math
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from experiments._inputs import check_integer

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]


def format_complex(z: complex) -> str:
    """``0.9+0.3j``: the syntax in which complex values are typed and logged."""
    return f"{z.real!r}{'-' if math.copysign(1, z.imag) < 0 else '+'}{abs(z.imag)!r}j"


def to_json(value: Any) -> Any:
    """Return ``value`` as strict JSON.

    NumPy scalars and arrays become numbers and lists, complex numbers and fractions
    become strings, and non-finite floats become ``"NaN"``, ``"Infinity"`` or
    ``"-Infinity"`` (``float`` reads all three back), since JSON has no token for them.
    Raises ``TypeError`` for anything else.
    """
    match value:
        case None | bool() | str():
            return value
        case np.bool_():
            return bool(value)
        case int() | np.integer():
            return int(value)
        case float() | np.floating():
            number = float(value)
            if math.isfinite(number):
                return number
            if math.isnan(number):
                return "NaN"
            return "Infinity" if number > 0 else "-Infinity"
        case complex() | np.complexfloating():
            return format_complex(complex(value))
        case Fraction() | Path():
            return str(value)
        case np.ndarray():
            return to_json(value.tolist())
        case list() | tuple():
            return [to_json(entry) for entry in value]
        case dict():
            return {_key(key): to_json(entry) for key, entry in value.items()}
    raise TypeError(f"{type(value).__name__} has no JSON form: {value!r}")


def _key(key: Any) -> str:
    if not isinstance(key, str):
        raise TypeError(f"JSON keys are strings, got {key!r}")
    return key


@dataclass(frozen=True)
class ExperimentResult:
    """What every ``run(...)`` of every package returns.

    name: the experiment's module name. details: one line for a human reader.
    metadata: everything needed to redo and re-judge the run; converted to JSON values
    on construction. passed: whether the claim held, or None where the experiment
    measures and does not judge.
    """

    name: str
    details: str
    metadata: dict[str, Any] = field(default_factory=dict)
    passed: bool | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "metadata", to_json(self.metadata))


def random_stream(seed: int, name: str) -> np.random.Generator:
    """An independent generator for each pair of seed and purpose.

    Streams of different names ("data", "init", "batches", …) share nothing, so adding
    draws to one never changes another. Raises InputError for a negative seed.
    """
    check_integer("seed", seed, at_least=0, example=0)
    digest = hashlib.sha256(name.encode()).digest()
    words = np.frombuffer(digest[:16], dtype="<u4").tolist()
    return np.random.default_rng(np.random.SeedSequence([seed, *words]))
