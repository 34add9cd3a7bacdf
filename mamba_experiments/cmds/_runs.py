"""Training runs read from a log: which to show, and whether they compare.

What the reports of this package share. Runs compare if every setting is equal but for
the seed, the model, and where things lie; a mixture is refused, never averaged.
"""

import json
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import MISSING, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from experiments._cli import nearest
from experiments.common import (
    SCHEMA,
    InputError,
    Parameter,
    RunLog,
    bad_input,
    parse_line,
)

EXPERIMENT = "mamba_train"
ABSENT = "absent"  # the value of a setting that an older record does not have
NOT_SETTINGS = frozenset({"seed", "model", "device", "save_plots", "resume"})
CAPTION = ("seq_len", "d_model", "n_state", "n_layers", "epochs", "batch_size", "lr")
Array = np.ndarray
Entry = dict[str, Any]

LOG = Parameter("log_path", str, MISSING, "The run log that the trainer wrote.")
DATASET = Parameter("dataset", str, "", "Only runs on this dataset.")
MODELS = Parameter(
    "models",
    tuple[str, ...],
    (),
    "Only these models, in this order; every model of the log where none is named.",
)
WHERE = Parameter(
    "where",
    tuple[str, ...],
    (),
    "Only runs with these settings: lr=0.001 epochs=10; absent where none was logged.",
)
MAY_DIFFER = Parameter(
    "may_differ",
    tuple[str, ...],
    (),
    "Settings that models may have different values of, each model one: d_model.",
)


@dataclass(frozen=True)
class Run:
    """One training run, as its record tells it.

    curve: the evaluations, in order. parts: the last scores on each part of the
    validation split, where it has parts. task: the metadata of the data.
    """

    run_id: str
    model: str
    seed: int
    started: datetime
    params: dict[str, Any]
    curve: list[Entry]
    n_params: dict[str, int]
    parts: dict[str, Entry]
    task: dict[str, Any]

    def setting(self, key: str) -> Any:
        """The value of a flag, ``ABSENT`` where the run's trainer had no such flag."""
        return self.params.get(key, ABSENT)

    def values(self, metric: str) -> Float[Array, " E"]:
        """A column of the curve; what was logged as ``"NaN"`` is NaN again."""
        return np.array([float(entry[metric]) for entry in self.curve])


def note(text: str) -> None:
    """A line on standard error, for what a reader of the report should know."""
    print(f"note: {text}", file=sys.stderr)


# --- reading --------------------------------------------------------------------------


def read_runs(path: str) -> list[Run]:
    """Every training run of a log, in order; records of other kinds are counted.

    Raises InputError for a missing file, for a line that is no record, and for a
    training record without what the reports need.
    """
    if not Path(path).is_file():
        raise InputError(
            f"{path}: no such file; expected a log of training runs; make one with "
            "`python -m mamba_experiments.train --plot-dir FOLDER`"
        )
    runs, others = [], 0
    for number, line in RunLog(path).lines():
        if not line.endswith("\n"):
            note(f"{path}:{number}: left out, a torn line (a writer was killed)")
        elif (record := _record(path, number, line))["experiment"] == EXPERIMENT:
            runs.append(_run(f"{path}:{number}", record))
        else:
            others += 1
    if others:
        plural = "s" if others > 1 else ""
        note(f"skipped {others} record{plural} of other experiments")
    if not runs:
        raise InputError(
            f"{path}: no training runs, {others} records of other experiments; "
            f"expected records of {EXPERIMENT}; name the log of a training"
        )
    return runs


def _record(path: str, number: int, line: str) -> dict[str, Any]:
    """A record, or ``{"experiment": None}`` for one of another schema."""
    try:
        return parse_line(line)
    except ValueError as error:
        if _schema(line) not in (None, SCHEMA):
            return {"experiment": None}
        raise InputError(
            f"{path}:{number}: {error}; expected a run record; mend or remove that "
            "line, or name another log"
        ) from None


def _schema(line: str) -> Any:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record.get("schema") if isinstance(record, dict) else None


def _run(where: str, record: dict[str, Any]) -> Run:
    meta, params = record["meta"], record["params"]
    try:
        run = Run(
            run_id=record["run_id"],
            model=params["model"],
            seed=int(record["seed"]),
            started=datetime.fromisoformat(record["started"]),
            params=params | {"dataset": params["dataset"]} | _fingerprint(meta["task"]),
            curve=list(meta["curve"]),
            n_params={part: int(n) for part, n in meta["n_params"].items()},
            parts=dict(meta["parts"]),
            task=dict(meta["task"]),
        )
        run.values("epoch")
    except KeyError as error:
        raise _malformed(where, f"{error} is missing") from None
    except (AttributeError, TypeError, ValueError) as error:
        raise _malformed(where, str(error)) from None
    if not run.curve:
        raise _malformed(where, "its curve is empty")
    return run


def _fingerprint(task: dict[str, Any]) -> dict[str, str]:
    """What text a run saw, by its hashes: folders are no settings, their text is."""
    texts = task.get("corpus", {}).get("texts", {})
    hashes = [text["sha256"][:8] for text in texts.values()]
    return {"text_sha256": "-".join(hashes)} if hashes else {}


def _malformed(where: str, wrong: str) -> InputError:
    return InputError(
        f"{where}: {wrong}; expected a training record with model, dataset, seed, "
        "curve, n_params, parts and task; mend or remove that line"
    )


# --- selection ------------------------------------------------------------------------


def select(
    runs: Sequence[Run],
    log: str,
    *,
    dataset: str = "",
    models: Sequence[str] = (),
    where: Sequence[str] = (),
) -> list[Run]:
    """The runs asked for. Raises InputError saying what ``log`` has if none is left."""
    asked = [_condition(text, runs) for text in where]
    if dataset:
        asked.append(("dataset", dataset))
    found = [
        run
        for run in runs
        if (not models or run.model in models)
        and all(_matches(run.setting(key), value) for key, value in asked)
    ]
    if not found:
        wanted = [f"{key}={value}" for key, value in asked] + list(models)
        raise InputError(
            f"{log}: no runs of {' '.join(wanted)}; it has {_contents(runs)}; ask for "
            "one of those"
        )
    return found


def _condition(text: str, runs: Sequence[Run]) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise bad_input("where", text, "SETTING=VALUE", "try --where lr=0.001")
    return known_key("where", key, runs), value


def known_key(flag: str, key: str, runs: Sequence[Run]) -> str:
    """The setting that ``key`` names; InputError with the nearest if there is none."""
    name = key.replace("-", "_")
    known = list(dict.fromkeys(key for run in runs for key in run.params))
    if name not in known:
        near = nearest(name, known)
        expected = f"a setting of the log ({', '.join(known)})"
        hint = f"did you mean {near}?" if near else "choose one of those"
        raise bad_input(flag, key, expected, hint)
    return name


def _matches(value: Any, text: str) -> bool:
    """Whether ``text`` is how ``value`` is typed: 1e-3 for 0.001, true for True."""
    if text in (str(value), json.dumps(value)):
        return True
    try:
        return not isinstance(value, str) and bool(json.loads(text) == value)
    except ValueError:
        return False


def _contents(runs: Sequence[Run]) -> str:
    counts: dict[tuple[str, str], int] = {}
    for run in runs:
        key = (run.model, run.params["dataset"])
        counts[key] = counts.get(key, 0) + 1
    return ", ".join(f"{m} on {d} ({n} runs)" for (m, d), n in counts.items())


def by_model(runs: Sequence[Run], models: Sequence[str] = ()) -> dict[str, list[Run]]:
    """Runs of each model by seed: in the order asked for, else of first appearance."""
    groups: dict[str, list[Run]] = {model: [] for model in models}
    for run in runs:
        groups.setdefault(run.model, []).append(run)
    return {
        model: sorted(group, key=lambda run: run.seed)
        for model, group in groups.items()
        if group
    }


def latest(runs: Sequence[Run], identity: Callable[[Run], Hashable]) -> list[Run]:
    """One run for each identity, the one started last; says whose others are left."""
    kept = {identity(run): run for run in sorted(runs, key=lambda run: run.started)}
    chosen = [run for run in runs if kept[identity(run)] is run]
    if len(chosen) < len(runs):
        repeated = by_model([run for run in runs if kept[identity(run)] is not run])
        listed = "; ".join(
            f"{model}, seed {seeds_text([run.seed for run in group])}"
            for model, group in repeated.items()
        )
        note(
            f"{len(runs) - len(chosen)} runs left out, since later ones repeat them "
            f"with the same settings: {listed}"
        )
    return chosen


# --- equal settings -------------------------------------------------------------------


def is_setting(key: str) -> bool:
    """Whether a flag can change what a run computes: folders and paths cannot."""
    return key not in NOT_SETTINGS and not key.endswith(("_dir", "_path"))


def differing(runs: Sequence[Run], ignored: Iterable[str] = ()) -> dict[str, list[Any]]:
    """Settings with more than one value, and their values, numbers in order."""
    keys = dict.fromkeys(key for run in runs for key in run.params if is_setting(key))
    found = {}
    for key in keys:
        values = {json.dumps(run.setting(key)): run.setting(key) for run in runs}
        if len(values) > 1 and key not in ignored:
            found[key] = sorted(values.values(), key=_order)
    return found


def _order(value: Any) -> tuple[bool, Any]:
    is_number = isinstance(value, int | float)
    return (not is_number, value if is_number else json.dumps(value))


def check_equal_settings(
    runs: Sequence[Run],
    log: str,
    *,
    varied: Iterable[str] = (),
    may_differ: Iterable[str] = (),
) -> None:
    """Raise InputError naming every setting that differs, its values and the mend.

    varied: settings that the report varies. may_differ: those that models may have
    different values of, while the runs of one model have one. Runs of one model whose
    settings are equal have equally many parameters, else its code or data changed.
    """
    free = {*varied}
    allowed = {known_key("may-differ", key, runs) for key in may_differ}
    groups = by_model(runs)
    within = {key for group in groups.values() for key in differing(group, free)}
    mixed = differing(runs, free | (allowed - within))
    if mixed:
        raise _mixture(runs, log, mixed, [key for key in mixed if key not in within])
    for model, group in groups.items():
        _check_equal_sizes(group, f"{log}: {model}", free)


def _mixture(
    runs: Sequence[Run], log: str, mixed: dict[str, list[Any]], between: Sequence[str]
) -> InputError:
    """The refusal: every mixed setting, and how to keep the runs that are most.

    Those ``between`` models only may be let differ.
    """
    listed = "; ".join(
        f"{key}: {', '.join(map(_typed, values))}" for key, values in mixed.items()
    )
    sets = Counter(tuple(_typed(run.setting(key)) for key in mixed) for run in runs)
    most = zip(mixed, sets.most_common(1)[0][0], strict=True)
    typed = " ".join(f"{key}={shlex.quote(value)}" for key, value in most)
    own = f", or let models differ with --may-differ {' '.join(between)}"
    return InputError(
        f"{log}: runs of different settings: {listed}; expected equal ones but for "
        f"seed and model; keep some with --where {typed}{own if between else ''}"
    )


def _check_equal_sizes(runs: Sequence[Run], where: str, varied: set[str]) -> None:
    sizes: dict[str, set[int]] = {}
    for run in runs:
        cell = json.dumps([run.setting(key) for key in sorted(varied)])
        sizes.setdefault(cell, set()).add(run.n_params["total"])
    for found in sizes.values():
        if len(found) > 1:
            raise InputError(
                f"{where}: runs of equal settings with "
                f"{', '.join(map(str, sorted(found)))} parameters; expected one number "
                "(its code or data changed in between); name a log of one of them"
            )


def _typed(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def caption(runs: Sequence[Run]) -> str:
    """The dataset and the settings that all runs share, in one line."""
    mixed = differing(runs)
    shared = [
        f"{key} {_typed(runs[0].setting(key))}"
        for key in CAPTION
        if key not in mixed and runs[0].setting(key) != ABSENT
    ]
    return f"{runs[0].params['dataset']}: {', '.join(shared)}"


def seeds_text(seeds: Sequence[int]) -> str:
    """``0-2, 7``: seeds with runs of neighbours shortened."""
    parts: list[list[int]] = []
    for seed in sorted(set(seeds)):
        if parts and seed == parts[-1][-1] + 1:
            parts[-1].append(seed)
        else:
            parts.append([seed])
    return ", ".join(
        f"{part[0]}-{part[-1]}" if len(part) > 1 else f"{part[0]}" for part in parts
    )


def note_seeds(groups: dict[str, list[Run]]) -> None:
    """Say it where the models have different sets of seeds."""
    seeds = {m: tuple(run.seed for run in group) for m, group in groups.items()}
    if len(set(seeds.values())) > 1:
        listed = "; ".join(f"{model}: {seeds_text(s)}" for model, s in seeds.items())
        note(f"the models have different seeds: {listed}")


def missing_from(groups: dict[str, list[Run]], models: Sequence[str]) -> str:
    """The models asked for that have no run, in one line; empty where all have."""
    return ", ".join(model for model in models if model not in groups)


def comparable(
    log_path: str,
    dataset: str,
    models: Sequence[str],
    where: Sequence[str],
    may_differ: Sequence[str],
    *,
    require_all_models: bool = False,
) -> dict[str, list[Run]]:
    """The runs of each model that a command asks for: equal settings, one a seed.

    Raises InputError where nothing is left, settings are mixed, or a model that is
    required has no run; else says which have none, and whether seeds differ.
    """
    models = list(dict.fromkeys(models))
    runs = select(
        read_runs(log_path), log_path, dataset=dataset, models=models, where=where
    )
    check_equal_settings(runs, log_path, may_differ=may_differ)
    groups = by_model(latest(runs, lambda run: (run.model, run.seed)), models)
    missing = missing_from(groups, models)
    if missing and require_all_models:
        raise InputError(
            f"{log_path}: no run of {missing}; expected one of every model "
            "(--require-all-models); train what is missing, or leave it out"
        )
    if missing:
        note(f"no run of {missing}")
    note_seeds(groups)
    return groups
