"""Runs of the two figures, read from a log: which to show, and whether they compare.

A line of a figure belongs to one model. Its runs compare if every setting is equal but
for the seed and what the figure varies; a mixture is refused, never averaged.
"""

import json
import shlex
import statistics
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments._cli import nearest
from experiments.common import (
    COLORS,
    InputError,
    Parameter,
    RunLog,
    bad_input,
    to_json,
    unwritable,
)

LOG = "runs.jsonl"
VARIED = frozenset({"seed", "model", "input_dim", "length", "depth", "nonlinear"})
PLACES = frozenset({"device", "data_dir"})  # where a run was, not what it was
MODEL_COLORS = dict(
    zip(
        ("S4", "Mamba", "S5", "RNN", "Transformer", "LinearCDE", "random Linear CDE"),
        (*COLORS[:5], COLORS[6], COLORS[6]),
        strict=True,
    )
)

FOLDER = Parameter(
    "results_dir", str, "outputs/lcde", "Has the log, and gets the pictures."
)
LOG_PATH = Parameter(
    "log_path", str, "", f"The run log; {LOG} in the folder above by default."
)
WHERE = Parameter(
    "where",
    tuple[str, ...],
    (),
    "Only runs with these settings: hidden_dim=256, or S4.hidden_dim=256 of one model.",
)
MAY_DIFFER = Parameter(
    "may_differ",
    tuple[str, ...],
    (),
    "Settings in which a model's runs may differ, but for the seeds of one point.",
)
PUBLISHED_ONLY = Parameter(
    "published_only", bool, False, "Show the published values alone; read no log."
)
JSON = Parameter("json", str, "", "Write our values that are shown here, as JSON.")
PARAMETERS = (FOLDER, LOG_PATH, WHERE, MAY_DIFFER, PUBLISHED_ONLY, JSON)


@dataclass(frozen=True)
class Run:
    """One run as its record tells it; ``settings`` are its arguments."""

    experiment: str
    model: str
    seed: int
    started: str
    settings: dict[str, Any]
    meta: dict[str, Any]

    @property
    def cell(self) -> tuple[Any, ...]:
        """What the figures vary, seed included: runs of one cell repeat each other."""
        varied = ("input_dim", "length", "depth", "nonlinear")
        return (self.model, *(self.meta.get(name) for name in varied), self.seed)


def published(name: str) -> dict[str, Any]:
    """The published numbers of ``figure1`` or ``figure2``."""
    path = Path(__file__).parent / "published" / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def runs_to_show(
    options: dict[str, Any],
    needed: Mapping[str, Sequence[str]],
    command: str,
    note: Callable[[str], None],
) -> list[Run]:
    """The comparable runs that a plot's flags ask for, the last of each repeat.

    needed: what the metadata of each experiment must have. command: how to make such
    runs. note: told what is left out. Raises InputError where the log has none, or
    mixes settings.
    """
    if options["published_only"]:
        return []
    log = options["log_path"] or str(Path(options["results_dir"]) / LOG)
    runs = select(read_runs(log, needed, command), log, options["where"])
    check_equal_settings(runs, log, options["may_differ"])
    shown = latest(runs)
    if left := len(runs) - len(shown):
        note(f"{left} of {len(runs)} runs left out, since later ones repeat them")
    return shown


def read_runs(log: str, needed: Mapping[str, Sequence[str]], command: str) -> list[Run]:
    """Every run of the experiments in ``needed``, in order. Raises InputError."""
    if not Path(log).is_file():
        raise InputError(
            f"{log}: no such file; expected a log of runs; make one with `{command}`, "
            "or draw the published values with --published-only"
        )
    runs, others = [], 0
    for record in RunLog(log).records():
        if record["experiment"] in needed:
            runs.append(_run(log, record, needed[record["experiment"]]))
        else:
            others += 1
    if not runs:
        raise InputError(
            f"{log}: no run of {' or '.join(needed)} among {others} records; expected "
            f"one; make one with `{command}`, or draw the published values with "
            "--published-only"
        )
    return runs


def _run(log: str, record: dict[str, Any], needed: Sequence[str]) -> Run:
    meta, params = record["meta"], record["params"]
    if missing := [name for name in needed if name not in meta]:
        raise InputError(
            f"{log}: run {record['run_id']} of {record['experiment']} lacks "
            f"{', '.join(missing)}; expected {', '.join(needed)} in its metadata; "
            "remove that line, or run it again"
        )
    return Run(
        experiment=record["experiment"],
        model=str(meta.get("model", "LinearCDE")),
        seed=int(record["seed"] or 0),
        started=record["started"],
        settings={k: v for k, v in params.items() if is_setting(k)},
        meta=meta,
    )


def is_setting(name: str) -> bool:
    """Whether an argument sets a line apart from others of its model."""
    return name not in VARIED | PLACES


# --- selection ------------------------------------------------------------------------


def select(runs: Sequence[Run], log: str, where: Sequence[str]) -> list[Run]:
    """The runs with the settings asked for. Raises InputError if none is left."""
    conditions = [_condition(text, runs) for text in where]
    found = [run for run in runs if all(holds(run) for holds in conditions)]
    if not found:
        counts = Counter(run.model for run in runs)
        has = ", ".join(f"{model} ({n} runs)" for model, n in counts.items())
        raise InputError(
            f"{log}: no runs with {' '.join(where)}; it has {has}; ask for other values"
        )
    return found


def _condition(text: str, runs: Sequence[Run]) -> Callable[[Run], bool]:
    """``[MODEL.]SETTING=VALUE`` as a test of runs; it lets other models pass."""
    name, equals, value = text.partition("=")
    model, _, key = name.rpartition(".")
    known = dict.fromkeys(key for run in runs for key in run.settings)
    if not equals or key not in known:
        near = nearest(key, known)
        mend = f"did you mean {near}?" if near else "try --where hidden_dim=256"
        expected = f"[MODEL.]SETTING=VALUE with a setting of {', '.join(known)}"
        raise bad_input("--where", text, expected, mend)
    models = sorted({run.model for run in runs})
    if model and model not in models:
        near = nearest(model, models)
        mend = f"did you mean {near}?" if near else "choose one of those"
        raise bad_input("--where", text, f"a model of {', '.join(models)}", mend)

    def holds(run: Run) -> bool:
        return (
            bool(model and run.model != model)
            or key not in run.settings
            or _matches(run.settings[key], value)
        )

    return holds


def _matches(value: Any, text: str) -> bool:
    """Whether ``text`` is how ``value`` is typed: 1e-3 for 0.001, true for True."""
    if text in (str(value), json.dumps(value)):
        return True
    try:
        return not isinstance(value, str) and bool(json.loads(text) == value)
    except ValueError:
        return False


def check_equal_settings(
    runs: Sequence[Run], log: str, may_differ: Sequence[str] = ()
) -> None:
    """Raise InputError naming the settings in which runs of one model differ.

    may_differ: in which they may, unless they are seeds of one point of the figure.
    """
    _check_known(may_differ, runs)
    for model, group in grouped(runs, lambda run: (run.experiment, run.model)).items():
        points = grouped(group, lambda run: run.cell[:-1]).values()
        within = {key for point in points for key in differing(point)}
        allowed = {*may_differ} - within
        mixed = {k: v for k, v in differing(group).items() if k not in allowed}
        if mixed:
            listed = "; ".join(
                f"{key}: {', '.join(map(json.dumps, values))}"
                for key, values in mixed.items()
            )
            sets = Counter(
                tuple(json.dumps(run.settings.get(key)) for key in mixed)
                for run in group
            )
            most = zip(mixed, sets.most_common(1)[0][0], strict=True)
            typed = " ".join(
                shlex.quote(f"{model[1]}.{key}={value.strip(chr(34))}")
                for key, value in most
            )
            raise InputError(
                f"{log}: runs of {model[1]} with different settings: {listed}; "
                f"expected equal ones but for {', '.join(sorted(VARIED))}; keep some "
                f"with --where {typed}"
            )


def _check_known(may_differ: Sequence[str], runs: Sequence[Run]) -> None:
    known = dict.fromkeys(key for run in runs for key in run.settings)
    for key in may_differ:
        if key not in known:
            near = nearest(key, known)
            mend = f"did you mean {near}?" if near else "choose one of those"
            raise bad_input("--may-differ", key, f"one of {', '.join(known)}", mend)


def differing(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Settings of which ``runs`` have more than one value, and the values."""
    found = {}
    for key in dict.fromkeys(key for run in runs for key in run.settings):
        values = {json.dumps(v): v for run in runs for v in [run.settings.get(key)]}
        if len(values) > 1:
            found[key] = list(values.values())
    return found


def latest(runs: Sequence[Run]) -> list[Run]:
    """One run a cell, the one started last."""
    kept = {run.cell: run for run in sorted(runs, key=lambda run: run.started)}
    return [run for run in runs if kept[run.cell] is run]


def grouped(
    runs: Iterable[Run], key: Callable[[Run], Hashable]
) -> dict[Any, list[Run]]:
    """Runs by ``key``, in order of first appearance."""
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return groups


# --- values, kept small ---------------------------------------------------------------


def write_values(path: str, runs: Sequence[Run], values: Mapping[str, Any]) -> None:
    """``values`` of ``runs``, and what all runs of a model were run with and on.

    Raises InputError if the file cannot be written.
    """
    models = grouped(runs, lambda run: run.model)
    about = {
        "devices": sorted({str(run.meta.get("device") or "cpu") for run in runs}),
        "settings": {
            model: group[0].settings | differing(group)
            for model, group in models.items()
        },
    }
    plain = to_json(about | dict(values))
    parts = [f"{json.dumps(key)}: {_in_rows(value)}" for key, value in plain.items()]
    text = "{\n " + ",\n ".join(parts) + "\n}"
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise unwritable(path, error) from None


def _in_rows(value: Any) -> str:
    """JSON, with every entry of a list of lists or mappings in a line of its own."""
    if isinstance(value, list) and value and isinstance(value[0], list | dict):
        rows = ",\n  ".join(json.dumps(row, allow_nan=False) for row in value)
        return f"[\n  {rows}\n ]"
    return json.dumps(value, allow_nan=False)


# --- words ----------------------------------------------------------------------------


def color_of(model: str, models: Sequence[str]) -> str:
    """A model's own colour; one not in the paper gets the next that is free."""
    others = [name for name in models if name not in MODEL_COLORS]
    if model in MODEL_COLORS:
        return MODEL_COLORS[model]
    free = (COLORS[5], "#999999", "#7F3C8D", "#5C4033")
    return free[others.index(model) % len(free)]


def spread(values: Sequence[float], shown: str = ".3g") -> str:
    """``median (least .. greatest)``, or the one value that there is."""
    median = format(statistics.median(values), shown)
    if len(values) == 1:
        return median
    return f"{median} ({min(values):{shown}} .. {max(values):{shown}})"


def settings_line(runs: Sequence[Run], names: Sequence[str]) -> str:
    """What the models were run with: ``S4, Mamba: hidden_dim 32, state_dim 32; …``."""
    told: dict[str, list[str]] = {}
    for model, group in grouped(runs, lambda run: run.model).items():
        several = {k: " or ".join(map(str, v)) for k, v in differing(group).items()}
        values = group[0].settings | several
        words = [f"{name} {values[name]}" for name in names if name in values]
        told.setdefault(", ".join(words), []).append(model)
    return "; ".join(f"{', '.join(models)}: {words}" for words, models in told.items())


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose columns also line up as plain text."""
    cells = [list(head), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])
