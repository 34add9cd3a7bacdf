"""The log checker finds what is wrong, says where, and finds nothing else."""

import csv
import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from experiments import _csv, check_logs, registry
from experiments.common import InputError, RunLog, execute
from experiments.exp1_scalar_equivalence import run

ROOT = Path(__file__).parents[2]


def command(*words):
    words = [sys.executable, "-m", "experiments.check_logs", *map(str, words)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def records():
    """Three sound records of exp1"""
    found = []
    for seed in range(3):
        values = {"T": 8, "a": 0.5, "seed": seed}
        found.append(execute(run, values, run_id=f"run-{seed}")[1])
    return found


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def as_csv(path, records):
    _csv.write_csv(RunLog(write(path.with_suffix(".jsonl"), records)), path)
    return path


def test_sound_logs_are_one_line_and_status_0(tmp_path, records):
    log = write(tmp_path / "a.jsonl", records)
    table = as_csv(tmp_path / "b.csv", records)
    done = command(log, table)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"6 records in {log}, {table}: no problems\n"


def test_a_problem_is_named_by_file_and_line_and_status_1(tmp_path, records):
    records[1]["meta"]["largest_difference"] = 0.5
    log = write(tmp_path / "runs.jsonl", records)
    done = command(log)
    assert done.returncode == 1
    first, second, summary = done.stdout.splitlines()
    assert first.startswith(f"{log}:2: claim failed: a scalar SSM's recurrence")
    assert second == f"{log}:2: recorded as passed, but meta says that it failed"
    assert summary == f"3 records in {log}: 2 problems"


def test_a_missing_file_is_bad_input(tmp_path):
    done = command(tmp_path / "none.jsonl")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "none.jsonl: no such file" in done.stderr
    assert done.stdout == ""


def change(**fields):
    return lambda record: record | fields


def without_figure(record):
    meta = {k: v for k, v in record["meta"].items() if k != "largest_difference"}
    return record | {"meta": meta}


LATER = (datetime.now(UTC) + timedelta(days=9)).isoformat()
FAULTS = [
    (change(passed=False), ["recorded as failed, but meta says that it passed"]),
    (change(run_id="run-0"), ["run run-0 is already on line {first}"]),
    (change(started="yesterday"), ["started 'yesterday' is not an ISO 8601 time"]),
    (change(started="2025-01-01T00:00:00"), ["is not in UTC"]),
    (change(started="2025-01-01T00:00:00+02:00"), ["is not in UTC"]),
    (change(started=LATER), ["lies in the future"]),
    (change(duration_s=-1.0), ["duration_s -1.0 is not a duration"]),
    (change(experiment="exp9_nothing"), ["did you mean"]),
    (change(schema=2), ["schema 2, expected 1"]),
    (without_figure, ["meta lacks 'largest_difference'"]),
    (
        lambda record: (
            record | {"meta": record["meta"] | {"largest_difference": "NaN"}}
        ),
        ["claim failed", "recorded as passed"],
    ),
    (
        lambda record: record | {"meta": record["meta"] | {"largest_difference": "x"}},
        ["meta is malformed"],
    ),
]


# A table has no other schema to hold: its columns are this one.
KINDS = [("jsonl", *fault) for fault in FAULTS] + [
    ("csv", fault, said) for fault, said in FAULTS if "schema" not in said[0]
]


@pytest.mark.parametrize(("kind", "fault", "said"), KINDS)
def test_each_fault_is_found_on_its_line(tmp_path, records, kind, fault, said):
    records[1] = fault(records[1])
    if kind == "jsonl":
        path, first = write(tmp_path / "runs.jsonl", records), 1
    else:
        path, first = as_csv(tmp_path / "runs.csv", records), 2
    found = list(check_logs.check_file(str(path), check_logs.Tally()))
    assert [line for line, _ in found] == [first + 1] * len(said)
    for (_, problem), words in zip(found, said, strict=True):
        assert words.format(first=first) in problem


def test_foreign_and_torn_lines(tmp_path, records):
    path = write(tmp_path / "runs.jsonl", records)
    with open(path, "a") as file:
        file.write('\nforeign\n{"schema": 1, "run')
    found = list(check_logs.check_file(str(path), check_logs.Tally()))
    assert [line for line, _ in found] == [5, 6]
    assert found[0][1].startswith("not JSON")
    assert found[1][1].startswith("torn line")


def test_a_row_of_another_length_in_a_table(tmp_path, records):
    path = as_csv(tmp_path / "runs.csv", records)
    with open(path, newline="") as file:
        rows = list(csv.reader(file))
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([*rows[:2], rows[2][:-2], [*rows[3], "more"]])
    found = list(check_logs.check_file(str(path), check_logs.Tally()))
    assert [line for line, _ in found] == [3, 4]
    assert all("number of cells" in problem for _, problem in found)


@pytest.mark.parametrize("content", [b"a,b\n1,2\n", b"\xff\xfe\n\xff,\n", b"a\n\x00\n"])
def test_another_table_is_full_of_problems(tmp_path, content):
    path = tmp_path / "runs.csv"
    path.write_bytes(content)
    assert list(check_logs.check_file(str(path), check_logs.Tally()))


def test_a_claim_whose_extra_is_missing_is_counted_not_failed(
    tmp_path, records, monkeypatch, capsys
):
    def load(entry):
        raise InputError("expected the extra 'torch'")

    monkeypatch.setattr(check_logs, "load", load)
    records[0]["meta"] = {}
    assert check_logs.check_files([str(write(tmp_path / "r.jsonl", records))]) == 0
    told = capsys.readouterr().out
    assert "3 not judged again (their extra is not installed)" in told


def test_a_measurement_is_not_a_verdict(tmp_path, records, monkeypatch):
    entry = registry.find("exp1")
    loaded = registry.Experiment(entry, run, (), None, "measured")
    monkeypatch.setattr(check_logs, "load", lambda entry: loaded)
    records[0]["passed"] = None
    path = write(tmp_path / "r.jsonl", records[:1])
    assert list(check_logs.check_file(str(path), check_logs.Tally())) == []
