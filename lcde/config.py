"""What the four experiments of document 2 are run with: published values by default.

Each dataclass holds the keys of one file in ``experiment_configs``: first the published
ones, names unchanged, then ours. :func:`read_config` makes one from such a file, and
:func:`changed` takes over values from a command line; both answer bad input in one line
that names the key, what was given and what is expected.
"""

import importlib
import json
import math
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

from experiments._cli import nearest
from experiments.common import InputError, bad_input

Config = TypeVar("Config", "LCDEToyConfig", "LCDEA5Config", "SMToyConfig", "SMA5Config")


# --- what a value must be -------------------------------------------------------------


class Within(NamedTuple):
    """A condition on a value of the right type, and its words: "of at least 1"."""

    words: str
    holds: Callable[[Any], bool]


class NamedIn(NamedTuple):
    """One of the names that a module registers; it is imported only to check one."""

    module: str
    registry: str

    def names(self) -> tuple[str, ...]:
        """The names to choose from."""
        return tuple(getattr(importlib.import_module(self.module), self.registry))

    @property
    def words(self) -> str:
        return f"from {', '.join(self.names())}"

    def holds(self, value: str) -> bool:
        return value in self.names()


Rule = Within | NamedIn


def _at_least(least: int) -> Within:
    return Within(f"of at least {least}", lambda value: value >= least)


def _exactly(number: int, why: str) -> Within:
    return Within(f"equal to {number}, {why}", lambda value: value == number)


_EACH_ONCE = Within("each once", lambda values: len(set(values)) == len(values))
_INCREASING = Within(
    "in increasing order", lambda values: sorted(set(values)) == list(values)
)
_POSITIVE = Within("above 0", lambda value: 0 < value < math.inf)
_PRECISION = Within(
    "float32 or tensorfloat32", lambda value: value in ("float32", "tensorfloat32")
)
_PRODUCTS = Within(
    "float32, tensorfloat32 or bfloat16",
    lambda value: value in ("float32", "tensorfloat32", "bfloat16"),
)
_FRACTION = Within("between 0 and 1", lambda value: 0 < value < 1)

Count = Annotated[int, _at_least(1)]
Positive = Annotated[float, _POSITIVE]
Fraction = Annotated[float, _FRACTION]
Dimension = Annotated[int, Within("equal to 2 or 3", lambda value: value in (2, 3))]
Dimensions = Annotated[tuple[Dimension, ...], _EACH_ONCE]
Lengths = Annotated[tuple[Annotated[int, _at_least(2)], ...], _INCREASING]
Elements = Annotated[int, _exactly(60, "the elements of A5")]
OneLabel = Annotated[int, _exactly(1, "as the data have one label a path")]
Models = Annotated[
    tuple[Annotated[str, NamedIn("lcde.torch_sequence_models", "MODELS")], ...],
    _EACH_ONCE,
]

A5_LENGTHS = (3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16, 18, 20)


# --- the four experiments -------------------------------------------------------------


@dataclass(frozen=True)
class LCDEToyConfig:
    """Random Linear CDE, then least squares, on signatures: ``lcde_toy.yaml``.

    Args:
        runs: models a dimension; run i has seed + i
        hidden_dim: size H of the hidden state y
        output_dim: numbers predicted a path; the data have 1
        batch_size: paths solved at once
        input_dims: dimensions of the paths, 2 or 3 each
        solver: of the controlled differential equation
        n_train: paths that the least squares fits
        n_val: paths that the error is measured on
    """

    runs: Count = 5
    hidden_dim: Count = 256
    output_dim: OneLabel = 1
    batch_size: Count = 4000
    input_dims: Dimensions = (2, 3)
    solver: Annotated[str, NamedIn("lcde._solvers", "SOLVERS")] = "exact"
    n_train: Count = 80_000
    n_val: Count = 20_000


@dataclass(frozen=True)
class LCDEA5Config:
    """Trained Linear CDE on the word problem of A5: ``lcde_a5.yaml``.

    Args:
        hidden_dim: size H of the hidden state y and of the embedding
        output_dim: classes, the elements of the group
        batch_size: sequences a step; a tenth as many pairs in the step that follows
        input_dim: tokens, the elements of the group
        train_split: share of the sequences that is trained on
        num_steps: most steps of a run
        print_steps: steps between evaluations
        learning_rate: of AdamW
        lengths: sequence lengths, a run for each
        structure: of the matrices A
        block_size: of block-diagonal A
        samples: sequences of each length, training and validation together
        threshold: validation accuracy above which a run stops
        precision: of matrix products where a device has tensorfloat32
    """

    hidden_dim: Count = 256
    output_dim: Elements = 60
    batch_size: Annotated[int, _at_least(10)] = 32
    input_dim: Elements = 60
    train_split: Fraction = 0.8
    num_steps: Count = 1_000_000
    print_steps: Count = 10_000
    learning_rate: Positive = 2e-4
    lengths: Lengths = A5_LENGTHS
    structure: Annotated[str, NamedIn("lcde._structures", "STRUCTURES")] = "dense"
    block_size: Count = 4
    samples: Annotated[int, _at_least(10)] = 1_000_000
    threshold: Fraction = 0.9
    precision: Annotated[str, _PRECISION] = "float32"


@dataclass(frozen=True)
class SMToyConfig:
    """Trained sequence models on signatures: ``ssm_toy.yaml``.

    Args:
        runs: seeds of each model; run i has seed + i
        model_names: which models
        input_dims: dimensions of the paths, 2 or 3 each
        depth_nonlinears: pairs of a number of blocks and whether they have GELU
        output_dim: numbers predicted a path; the data have 1
        hidden_dim: channels
        state_dim: state a channel
        batch_size: paths a step
        learning_rate: of Adam
        num_epochs: passes over the training paths
        eval_every: steps between evaluations
        n_train: paths that are trained on
        n_val: paths that the error is measured on
        max_steps: most steps of a run, 0 for as many as the epochs have
        precision: of matrix products
        compile: whether the model runs through torch.compile
        cuda_graph: whether each step is launched as one CUDA graph
    """

    runs: Count = 5
    model_names: Models = ("S4", "Mamba")
    input_dims: Dimensions = (2, 3)
    depth_nonlinears: Annotated[tuple[tuple[Count, bool], ...], _EACH_ONCE] = (
        (2, True),
        (2, False),
        (1, False),
    )
    output_dim: OneLabel = 1
    hidden_dim: Count = 256
    state_dim: Count = 256
    batch_size: Count = 32
    learning_rate: Positive = 1e-4
    num_epochs: Count = 401
    eval_every: Count = 10_000
    n_train: Count = 80_000
    n_val: Count = 20_000
    max_steps: Annotated[int, _at_least(0)] = 0
    precision: Annotated[str, _PRODUCTS] = "float32"
    compile: bool = False
    cuda_graph: bool = False


@dataclass(frozen=True)
class SMA5Config:
    """Trained sequence models on the word problem of A5: ``ssm_a5.yaml``.

    Args:
        model_names: which models
        lengths: sequence lengths, the shortest first
        depths: numbers of blocks, tried in increasing order until one suffices
        input_dim: tokens, the elements of the group
        output_dim: classes, the elements of the group
        hidden_dim: channels
        state_dim: state a channel; heads of the Transformer
        batch_size: sequences a step, and as many pairs
        learning_rate: of AdamW
        num_epochs: passes over the training sequences
        eval_every: steps between evaluations
        samples: sequences of each length, training and validation together
        threshold: validation accuracy above which a run stops
        max_steps: most steps of a run, 0 for as many as the epochs have
        precision: of matrix products
        compile: whether the model runs through torch.compile
        cuda_graph: whether each step is launched as one CUDA graph
    """

    model_names: Models = ("Transformer", "Mamba", "RNN", "S4")
    lengths: Lengths = A5_LENGTHS
    depths: Annotated[tuple[Count, ...], _INCREASING] = (1, 2, 3, 4)
    input_dim: Elements = 60
    output_dim: Elements = 60
    hidden_dim: Count = 1024
    state_dim: Count = 64
    batch_size: Count = 32
    learning_rate: Positive = 2e-4
    num_epochs: Count = 40
    eval_every: Count = 10_000
    samples: Annotated[int, _at_least(10)] = 1_000_000
    threshold: Fraction = 0.9
    max_steps: Annotated[int, _at_least(0)] = 0
    precision: Annotated[str, _PRODUCTS] = "float32"
    compile: bool = False
    cuda_graph: bool = False


# --- reading --------------------------------------------------------------------------


def read_config(path: str | Path, kind: type[Config]) -> Config:
    """The config in a YAML file; a key that it leaves out has its published value.

    Raises InputError for a file that is missing, empty, no YAML or no mapping, for a
    key that is unknown or stands twice, and for a value of another type or out of
    range.
    """
    values = _mapping(path)
    known = [field.name for field in fields(kind)]
    for key in values:
        if key not in known:
            near = nearest(str(key), known)
            expected = f"a key of {kind.__name__} ({', '.join(known)})"
            mend = f"did you mean {near}?" if near else "choose one of those"
            raise bad_input(f"{path}: key", key, expected, mend)
    return changed(kind(), {key: (f"{path}: {key}", values[key]) for key in values})


def changed(config: Config, given: Mapping[str, tuple[str, Any]]) -> Config:
    """``config`` with other values: field -> (what to call it, the value).

    Raises InputError for a value that the field does not take.
    """
    kinds = typing.get_type_hints(type(config), include_extras=True)
    defaults = {field.name: field.default for field in fields(config)}
    made = {}
    for name, (called, value) in given.items():
        try:
            made[name] = fitted(kinds[name], value)
        except (ValueError, OverflowError):
            mend = _mend(kinds[name], value, name, defaults[name])
            raise bad_input(called, value, described(kinds[name]), mend) from None
    return replace(config, **made)


def to_yaml(config: Config) -> str:
    """Every key of ``config`` with its value, as a file that gives it would say."""
    return "\n".join(
        f"{field.name}: {_yaml(getattr(config, field.name))}"
        for field in fields(config)
    )


def fitted(kind: Any, value: Any) -> Any:
    """``value`` as a field of type ``kind`` holds it; ValueError where it is none.

    Lists become tuples, and a float may be written ``1e-4``, which YAML 1.1 takes for
    text.
    """
    if typing.get_origin(kind) is Annotated:
        base, *rules = typing.get_args(kind)
        made = fitted(base, value)
        if not all(rule.holds(made) for rule in rules):
            raise ValueError(value)
        return made
    if typing.get_origin(kind) is tuple:
        return _fitted_entries(typing.get_args(kind), value)
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise ValueError(value)
    return value


def _fitted_entries(kinds: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(value)
    wanted = kinds[:1] * len(value) if kinds[-1] is Ellipsis else kinds
    if len(wanted) != len(value):
        raise ValueError(value)
    return tuple(fitted(kind, entry) for kind, entry in zip(wanted, value, strict=True))


_WORDS = {int: "an integer", float: "a number", str: "a name", bool: "true or false"}


def described(kind: Any) -> str:
    """In words, what a field of type ``kind`` takes: "an integer of at least 1"."""
    if typing.get_origin(kind) is Annotated:
        base, *rules = typing.get_args(kind)
        separator = ", " if typing.get_origin(base) is tuple else " "
        return separator.join([described(base), *(rule.words for rule in rules)])
    if typing.get_origin(kind) is tuple:
        first, *others = typing.get_args(kind)
        if others == [Ellipsis]:
            return f"a list, each entry {described(first)}"
        return f"[{', '.join(map(described, (first, *others)))}]"
    return _WORDS[kind]


def _mend(kind: Any, value: Any, name: str, default: Any) -> str:
    """A name near the one given where names are wanted, else the published value."""
    named = [rule for rule in _rules(kind) if isinstance(rule, NamedIn)]
    if named:
        known = named[0].names()
        given = value if isinstance(value, list | tuple) else [value]
        wrong = [str(entry) for entry in given if entry not in known]
        if wrong and (near := nearest(wrong[0], known)):
            return f"did you mean {near}?"
    return f"try {name}: {_yaml(default)}"


def _rules(kind: Any) -> Iterable[Rule]:
    base, *rules = typing.get_args(kind) or (kind,)
    if typing.get_origin(kind) is Annotated:
        return [*rules, *_rules(base)]
    return _rules(base) if typing.get_origin(kind) is tuple else ()


def _yaml(value: Any) -> str:
    """JSON is YAML."""
    return json.dumps(value)


def _mapping(path: str | Path) -> dict[Any, Any]:
    """The keys and values of a YAML file, each key once."""
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror or error}); expected a YAML "
            "file; name one that exists, such as experiment_configs/lcde_toy.yaml"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        told = " ".join(str(error).split())
        raise InputError(f"{path}: not YAML ({told}); mend that line") from None
    if not isinstance(values, dict):
        kind = "nothing" if values is None else type(values).__name__
        raise bad_input(str(path), kind, "lines of `key: value`", "write runs: 5")
    keys = [key.value for key, _ in typing.cast("yaml.MappingNode", node).value]
    if repeated := [key for key in keys if keys.count(key) > 1]:
        raise bad_input(f"{path}: key", repeated[0], "each key once", "remove one")
    return values
