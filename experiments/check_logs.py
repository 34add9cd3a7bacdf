"""Check logs of runs: their form, their claims, their ids and their times.

    python -m experiments.check_logs [PATHS …]

reads JSONL and CSV (by suffix), judges each record's claim again from its metadata,
prints ``file:line: problem`` for each problem, and exits with status 1 if there is any.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from experiments._csv import read_csv
from experiments._runlog import record_problems
from experiments.common import (
    EXIT_FAILED_CLAIM,
    InputError,
    Parameter,
    RunLog,
    one_line_errors,
    parse,
    parse_line,
)
from experiments.registry import find, load

Record = dict[str, Any]
Judge = Callable[[dict[str, Any]], list[str]]
_CLOCKS_DIFFER = timedelta(days=1)  # at most, between the machines that share a log

PARAMETERS = (
    Parameter(
        "paths",
        tuple[str, ...],
        ("outputs/runs.jsonl",),
        "Logs to check: tables if they end in .csv, else one JSON record a line.",
        positional=True,
    ),
)


@dataclass
class Tally:
    """What was counted over all files."""

    records: int = 0
    problems: int = 0
    unjudged: int = 0


def main(argv: Sequence[str] | None = None) -> int:
    """Check the logs that the command line names; return the exit status."""
    about = (__doc__ or "").strip()
    options = parse("python -m experiments.check_logs", about, PARAMETERS, argv)
    with one_line_errors():
        return check_files(options["paths"])


def check_files(paths: Sequence[str]) -> int:
    """Print each problem of each file, or one line that says there is none."""
    for path in paths:
        if not Path(path).is_file():
            raise InputError(
                f"{path}: no such file; expected a log of runs; make one with "
                "`python -m experiments.run_and_log --experiment exp1`"
            )
    tally = Tally()
    for path in paths:
        for line, problem in check_file(path, tally):
            print(f"{path}:{line}: {problem}")
            tally.problems += 1
    verdict = f"{tally.problems} problems" if tally.problems else "no problems"
    note = ""
    if tally.unjudged:
        note = f"; {tally.unjudged} not judged again (their extra is not installed)"
    print(f"{tally.records} records in {', '.join(paths)}: {verdict}{note}")
    return EXIT_FAILED_CLAIM if tally.problems else 0


def check_file(path: str, tally: Tally) -> Iterator[tuple[int, str]]:
    """(line, problem) for everything wrong with one log; counts into ``tally``."""
    first_seen: dict[str, int] = {}
    judges: dict[str, Judge | str | None] = {}
    for line, record in _entries(path):
        tally.records += 1
        if isinstance(record, str):
            yield line, record
            continue
        name, run_id = record["experiment"], record["run_id"]
        if name not in judges:
            judges[name] = _judge_of(name)
        judge = judges[name]
        tally.unjudged += judge is None
        found = _time_problems(record)
        if isinstance(judge, str):
            found.append(judge)
        elif judge is not None:
            found += claim_problems(record, judge)
        if run_id in first_seen:
            found.append(f"run {run_id} is already on line {first_seen[run_id]}")
        first_seen.setdefault(run_id, line)
        yield from ((line, problem) for problem in found)


def claim_problems(record: Record, judge: Judge) -> list[str]:
    """The claims that ``record`` breaks, and where its verdict is not that of now."""
    try:
        broken = judge(record["meta"])
    except KeyError as error:
        return [f"meta lacks {error}: its claim cannot be judged"]
    except (TypeError, ValueError, IndexError) as error:
        return [f"meta is malformed ({error}): its claim cannot be judged"]
    problems = [f"claim failed: {claim}" for claim in broken]
    if broken and record["passed"]:
        problems.append("recorded as passed, but meta says that it failed")
    if not broken and record["passed"] is False:
        problems.append("recorded as failed, but meta says that it passed")
    return problems


def _entries(path: str) -> Iterator[tuple[int, Record | str]]:
    """(line, record or what is wrong with it) for each line of a log."""
    if Path(path).suffix.lower() == ".csv":
        for number, row in read_csv(path):
            wrong = [row] if isinstance(row, str) else record_problems(row)
            yield number, "; ".join(wrong) or row
        return
    for number, line in RunLog(path).lines():
        try:
            yield number, parse_line(line)
        except ValueError as error:
            yield number, str(error) if line.endswith("\n") else f"torn line: {error}"


def _judge_of(name: str) -> Judge | str | None:
    """How to judge records of ``name`` again: None if not here, or why not at all."""
    try:
        entry = find(name)
    except InputError as error:
        return str(error)
    try:
        experiment = load(entry)
    except InputError:
        return None  # its extra is not installed
    return experiment.problems or (lambda _meta: [])


def _time_problems(record: Record) -> list[str]:
    problems = []
    try:
        started = datetime.fromisoformat(record["started"])
        if started.utcoffset() != timedelta(0):
            problems.append(f"started {record['started']!r} is not in UTC")
        elif started > datetime.now(UTC) + _CLOCKS_DIFFER:
            problems.append(f"started {record['started']!r} lies in the future")
    except ValueError:
        problems.append(f"started {record['started']!r} is not an ISO 8601 time")
    seconds = record["duration_s"]
    if not (math.isfinite(seconds) and seconds >= 0):
        problems.append(f"duration_s {seconds!r} is not a duration")
    return problems


if __name__ == "__main__":
    sys.exit(main())
