"""Grids of runs: which runs a command asks for, each under a name of its own.

``exp1.T=16,32`` is an axis: a parameter of an experiment and its values. The runs of
an experiment are the cartesian product of its axes, repeated. A run's id is a hash of
what determines it, so that a grid which was interrupted knows what is missing.
"""

import contextlib
import dataclasses
import hashlib
import inspect
import io
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from experiments._cli import nearest
from experiments.common import Parameter, bad_input, parameters_of, to_json
from experiments.registry import Experiment, find

_AXIS = re.compile(r"(?P<name>[\w.]+)\.(?P<parameter>[\w-]+)=(?P<values>.*)")
_VALUE = r"(\[[^\[\]]*\]|[^,\[\]]+)"


@dataclass(frozen=True)
class Axis:
    """The values that a grid gives to one parameter of one experiment."""

    short: str
    parameter: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Point:
    """One run of a grid: an experiment, its resolved arguments, and which repeat."""

    short: str
    experiment: str
    values: dict[str, Any]
    repeat: int = 0

    @property
    def run_id(self) -> str:
        """16 hexadecimal digits that name this run, the same on every machine."""
        identity = {
            "experiment": self.experiment,
            "params": to_json(self.values),
            "repeat": self.repeat,
        }
        canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    def __str__(self) -> str:
        values = " ".join(f"{k}={_shown(v)}" for k, v in self.values.items())
        return f"{self.short} {values}" + (f" #{self.repeat}" if self.repeat else "")


def parse_axis(text: str, experiments: Sequence[Experiment]) -> Axis:
    """The axis that ``NAME.PARAMETER=VALUE,VALUE,…`` describes.

    A value that is itself a list stands in brackets: ``exp2.decays=[0.5,0.8],[0.9]``.
    Raises InputError for an unknown name or a value of the wrong type.
    """
    match = _AXIS.fullmatch(text)
    if not match or not re.fullmatch(f"{_VALUE}(,{_VALUE})*", match["values"]):
        raise bad_input(
            "--grid",
            text,
            "NAME.PARAMETER=VALUE,VALUE,… with lists in brackets",
            "try --grid exp1.T=16,32 exp2.decays=[0.5,0.8],[0.9]",
        )
    label = text.partition("=")[0]
    experiment = chosen(match["name"], experiments, f"--grid {label}")
    values = [
        re.split(r"[\s,]+", value.strip("[] ")) if value.startswith("[") else [value]
        for value in re.findall(_VALUE, match["values"])
    ]
    return make_axis(f"--grid {label}", experiment, match["parameter"], values)


def chosen(name: str, experiments: Sequence[Experiment], asked: str) -> Experiment:
    """The experiment called ``name`` among those to run; InputError if it is not."""
    entry = find(name)
    for experiment in experiments:
        if experiment.entry == entry:
            return experiment
    named = " ".join(experiment.entry.short for experiment in experiments)
    raise bad_input(
        asked,
        entry.short,
        f"an experiment of this run ({named})",
        f"add {entry.short} to --experiment",
    )


def make_axis(
    asked: str, experiment: Experiment, name: str, values: Iterable[Sequence[str]]
) -> Axis:
    """An axis from words as they would be typed behind the parameter's own flag."""
    parameter = _parameter(asked, experiment, name)
    typed = [_typed(asked, parameter, words) for words in values]
    for earlier, later in itertools.combinations(typed, 2):
        if earlier == later:
            raise bad_input(asked, later, "each value once", "leave out the second")
    return Axis(experiment.entry.short, parameter.name, tuple(typed))


def grid_points(
    experiments: Sequence[Experiment], axes: Sequence[Axis], repeats: int, seed: int
) -> list[Point]:
    """Every run of the grid, experiment by experiment.

    Repeat r has seed ``seed + r`` where the experiment takes one seed and no axis sets
    it; elsewhere the repeats share their arguments and are told apart by r.
    """
    named = [(axis.short, axis.parameter) for axis in axes]
    for short, parameter in named:
        if named.count((short, parameter)) > 1:
            raise bad_input(
                "--grid", f"{short}.{parameter} twice", "each once", "join its values"
            )
    points = []
    for experiment in experiments:
        own = [axis for axis in axes if axis.short == experiment.entry.short]
        points += _points_of(experiment, own, repeats, seed)
    return points


def _points_of(
    experiment: Experiment, axes: Sequence[Axis], repeats: int, seed: int
) -> list[Point]:
    entry = experiment.entry
    defaults = experiment.defaults()
    names = [axis.parameter for axis in axes]
    seeded = "seed" in defaults and "seed" not in names
    points = []
    for combination in itertools.product(*(axis.values for axis in axes)):
        values = defaults | dict(zip(names, combination, strict=True))
        for r in range(repeats):
            own, repeat = ({"seed": seed + r}, 0) if seeded else ({}, r)
            module = entry.module.rpartition(".")[2]
            points.append(Point(entry.short, module, values | own, repeat))
    return points


def _parameter(asked: str, experiment: Experiment, name: str) -> Parameter:
    known = {parameter.name: parameter for parameter in parameters_of(experiment.run)}
    if (found := known.get(name.replace("-", "_"))) is not None:
        return found
    near = nearest(name, known)
    raise bad_input(
        asked,
        name,
        f"a parameter of {experiment.entry.short} ({', '.join(known)})",
        f"did you mean {near}?" if near else "choose one of those",
    )


def _typed(asked: str, parameter: Parameter, words: Sequence[str]) -> Any:
    """``words`` read as the experiment's own command line would read them."""
    import tyro

    words = [word for word in words if word]
    if parameter.type is bool:
        words = [word.capitalize() for word in words]
    try:
        silence = io.StringIO()
        with contextlib.redirect_stderr(silence), contextlib.redirect_stdout(silence):
            return tyro.cli(parameter.type, args=words)
    except SystemExit:
        kind = inspect.formatannotation(parameter.type)
        shown = (
            ""
            if parameter.default is dataclasses.MISSING
            else _shown(parameter.default)
        )
        raise bad_input(
            asked, " ".join(words), kind, f"try {parameter.name}={shown or 'VALUE'}"
        ) from None


def _shown(value: Any) -> str:
    """``value`` as it would be typed in a grid."""
    if isinstance(value, tuple | list):
        return f"[{','.join(map(_shown, value))}]"
    if isinstance(value, complex):
        return str(to_json(value))
    return str(value)
