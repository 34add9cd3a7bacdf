"""Runs kept in a log, each once; and read from it, never of mixed settings."""

import contextlib
import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from experiments.common import (
    EXIT_FAILED_CLAIM,
    ExperimentResult,
    InputError,
    RunLog,
    make_record,
    to_json,
)

OUT_DIR = "outputs/time_series_experiments"
LOG = "ts_runs.jsonl"
VARIED = ("model", "N", "seed")  # what one picture compares
Record = dict[str, Any]


class Sweep:
    """A command that makes many runs: those in the log are left out, each new one kept.

    A killed command goes on where it was when it is typed again.
    """

    def __init__(self, name: str, log_path: str, *, again: bool) -> None:
        self.log = RunLog(log_path)
        if notice := self.log.prepare():
            note(notice)
        records = [] if again else list(self.log.records())
        self._held = {_key(r["params"]) for r in records if r["experiment"] == name}
        self._left_out = self._kept = self._failed = 0

    def holds(self, options: Any) -> bool:
        """Whether the log has a run of these options (a dataclass)."""
        held = _key(asdict(options)) in self._held
        self._left_out += held
        return held

    def keep(self, each: Iterable[Any], results: Iterator[ExperimentResult]) -> None:
        """Log and print the result of each options, as soon as it is there."""
        for options in each:
            started, clock = datetime.now(UTC), time.perf_counter()
            result = next(results)
            record = make_record(
                result,
                params=asdict(options),
                started=started,
                duration_s=time.perf_counter() - clock,
            )
            self.log.append(record)
            self._kept += 1
            self._failed += result.passed is False
            verdict = {True: "PASS", False: "FAIL", None: "measured"}[result.passed]
            print(f"[{verdict}] {result.details}", flush=True)

    def close(self) -> int:
        """Say what was kept and left out; the exit status."""
        if self._left_out:
            note(
                f"{self._left_out} runs are in {self.log.path} already and were left "
                "out; --again runs them anew"
            )
        if self._kept:
            note(f"logged {self._kept} runs in {self.log.path}")
        return EXIT_FAILED_CLAIM if self._failed else 0


@dataclass(frozen=True)
class Runs:
    """Records of one task with equal settings, one for each model, N and seed."""

    settings: dict[str, Any]
    records: list[Record]

    def groups(self) -> dict[str, list[Record]]:
        """The records of each model, by N and seed."""
        groups: dict[str, list[Record]] = {}
        for record in self.records:
            groups.setdefault(record["params"]["model"], []).append(record)
        for group in groups.values():
            group.sort(key=lambda record: (record["params"]["N"], record["seed"]))
        return groups


def read_runs(path: str, name: str, task: str, *, latest_only: bool) -> Runs:
    """The runs of ``task`` in a log; of several with the same options the last.

    latest_only: those with the settings (all but model, N and seed) of the run that
    was logged last; without it, several settings are refused. Raises InputError for a
    log that is absent, empty, or of other tasks.
    """
    if not Path(path).is_file():
        raise InputError(
            f"{path}: no such file; expected a log of runs; make one with "
            f"`python -m time_series_experiments.{_MAKERS[name]}`"
        )
    every = list(RunLog(path).records())
    records = [r for r in every if r["experiment"] == name and _task(r) == task]
    if not records:
        there = ", ".join(sorted({_task(record) for record in every})) or "nothing"
        raise InputError(
            f"{path}: no runs of {task}, it holds {there}; expected runs of {task}; "
            f"make them with `python -m time_series_experiments.{_MAKERS[name]}`"
        )
    if latest_only:
        last = _settings(records[-1])
        records = [record for record in records if _settings(record) == last]
    else:
        _refuse_mixture(path, records)
    cells = {_cell(record): record for record in records}  # a later one replaces
    return Runs(_settings(records[-1]), list(cells.values()))


_MAKERS = {
    "synthetic_decays": "exp_synthetic_ndecay",
    "real_series": "exp_real_series",
}


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One thread for PyTorch: on tensors this small several only wait for each other.

    The number of before is put back.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _refuse_mixture(path: str, records: list[Record]) -> None:
    settings = [_settings(record) for record in records]
    keys = dict.fromkeys(key for each in settings for key in each)
    values = {key: {json.dumps(each.get(key)) for each in settings} for key in keys}
    mixed = {key: sorted(found) for key, found in values.items() if len(found) > 1}
    if mixed:
        listed = "; ".join(f"{key}: {', '.join(v)}" for key, v in mixed.items())
        raise InputError(
            f"{path}: runs of different settings ({listed}); expected equal ones but "
            "for model, N and seed; --latest-only keeps those of the last run"
        )


def _task(record: Record) -> str:
    """The series of a run on a real one, else the experiment."""
    return str(record["params"].get("task", record["experiment"]))


def _settings(record: Record) -> dict[str, Any]:
    return {k: v for k, v in record["params"].items() if k not in VARIED}


def _cell(record: Record) -> tuple[Any, ...]:
    return tuple(record["params"][key] for key in VARIED)


def _key(params: dict[str, Any]) -> str:
    return json.dumps(to_json(params), sort_keys=True)


def note(text: str) -> None:
    """A line on standard error, for what a user should know."""
    print(f"note: {text}", file=sys.stderr)
