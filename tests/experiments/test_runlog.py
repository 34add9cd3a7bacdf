"""The run log: strict lines, whole or not at all, whoever writes and whatever fails."""

import json
import os
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest

from experiments import _runlog
from experiments.common import (
    FIELDS,
    ExperimentResult,
    InputError,
    RunLog,
    make_record,
    parse_line,
)

ROOT = Path(__file__).parents[2]
WRITER = """
import json, sys
from experiments.common import RunLog
path, writer, count, record = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
log, record = RunLog(path), json.loads(record)
for index in range(count):
    log.append({**record, "run_id": f"{writer}-{index}"})
"""


def record(run_id="0123456789abcdef", **meta):
    result = ExperimentResult("exp1_scalar_equivalence", "fine, größer", meta, True)
    now = datetime.now(UTC)
    params = {"T": 4, "seed": 3}
    return make_record(
        result, params=params, started=now, duration_s=1.0, run_id=run_id
    )


@pytest.fixture
def log(tmp_path):
    return RunLog(tmp_path / "runs.jsonl")


def test_a_record_has_every_field_and_survives_the_file(log):
    written = record(x=float("nan"), y=[1, 0.1])
    assert list(written) == list(FIELDS)
    log.append(written)
    assert list(log.records()) == [written]
    assert written["seed"] == 3
    assert written["meta"]["x"] == "NaN"


def test_times_are_utc_whatever_the_zone(log):
    noon = datetime(2025, 5, 1, 12, tzinfo=timezone(timedelta(hours=2)))
    result = ExperimentResult("x", "")
    told = make_record(result, params={}, started=noon, duration_s=0.0)["started"]
    assert told == "2025-05-01T10:00:00.000+00:00"


def test_the_device_of_the_experiment_wins():
    result = ExperimentResult("x", "", {"device": {"gpu": "H100"}})
    now = datetime.now(UTC)
    made = make_record(result, params={}, started=now, duration_s=0.0)
    assert made["device"] == '{"gpu": "H100"}'


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"passed": 1}, "'passed' is 1"),
        ({"passed": "yes"}, "'passed'"),
        ({"seed": True}, "'seed' is True"),
        ({"meta": []}, "'meta'"),
        ({"schema": 2}, "schema 2"),
        ({"extra": 1}, "unknown field 'extra'"),
        ({"run_id": None}, "'run_id'"),
    ],
)
def test_a_record_of_another_shape_is_refused(change, said):
    with pytest.raises(ValueError, match=said):
        parse_line(json.dumps({**record(), **change}))


@pytest.mark.parametrize("token", ["NaN", "Infinity", "-Infinity"])
def test_bare_nan_is_not_json(token):
    line = json.dumps(record(x=0.25)).replace("0.25", token)
    with pytest.raises(ValueError, match=token):
        parse_line(line)


@pytest.mark.parametrize("text", ["[]", "3", "null", "", "{", "{} {}"])
def test_other_json_is_no_record(text):
    with pytest.raises(ValueError, match=r"."):
        parse_line(text)


def test_a_missing_field_is_named():
    incomplete = record()
    del incomplete["git"]
    with pytest.raises(ValueError, match="'git' is missing"):
        parse_line(json.dumps(incomplete))


# --- tails


def test_a_torn_tail_is_set_aside_once(log):
    log.append(record("a"))
    torn = json.dumps(record("b"))[:40]
    with open(log.path, "a") as file:
        file.write(torn)
    assert [each["run_id"] for each in log.records()] == ["a"]
    assert "torn" in (log.prepare() or "")
    assert log.prepare() is None
    log.append(record("c"))
    assert [each["run_id"] for each in log.records()] == ["a", "c"]
    assert Path(f"{log.path}.torn").read_text() == torn + "\n"


def test_append_mends_a_tail_that_another_writer_left(log):
    log.append(record("a"))
    with open(log.path, "a") as file:
        file.write('{"schema"')
    log.append(record("b"))
    assert [each["run_id"] for each in log.records()] == ["a", "b"]


def test_a_whole_record_without_its_newline_is_kept(log):
    log.append(record("a"))
    log.path.write_text(log.path.read_text().rstrip("\n"))
    assert log.prepare() is None
    log.append(record("b"))
    assert [each["run_id"] for each in log.records()] == ["a", "b"]
    assert not Path(f"{log.path}.torn").exists()


@pytest.mark.parametrize("text", ["notes", "notes\n", "{}\n", '{"a": 1}', "\x89PNG\n"])
def test_a_file_of_something_else_is_refused_and_left_alone(log, text):
    log.path.write_text(text)
    with pytest.raises(InputError, match=r"runs.jsonl:1: .*expected a run log"):
        log.prepare()
    assert log.path.read_text() == text


def test_a_foreign_line_is_named_by_its_number(log):
    log.append(record("a"))
    with open(log.path, "a") as file:
        file.write("\nforeign\n")
    with pytest.raises(InputError, match=r"runs.jsonl:3: not JSON"):
        list(log.records())


def test_an_absent_log_is_empty_and_reading_makes_nothing(tmp_path):
    assert list(RunLog(tmp_path / "a" / "runs.jsonl").records()) == []
    assert list(tmp_path.iterdir()) == []


# --- faults of the disk


class Disk:
    """A file whose writes stop after ``room`` bytes, as a full disk's do"""

    def __init__(self, file, room, error):
        self.file, self.room, self.error = file, room, error

    def write(self, data):
        if not self.room:
            raise self.error
        taken = self.file.write(data[: self.room])
        self.room -= taken
        return taken

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt()])
def test_a_write_cut_short_is_taken_back(log, error):
    log.append(record("a"))
    before = log.path.read_bytes()
    with open(log.path, "ab+", buffering=0) as file, pytest.raises(type(error)):
        log._write_whole(Disk(file, 30, error), b"x" * 100)
    assert log.path.read_bytes() == before


def test_a_write_in_pieces_is_made_whole(log):
    class Slow(Disk):
        def write(self, data):
            return self.file.write(data[:7])

    with open(log.path, "ab+", buffering=0) as file:
        log._write_whole(Slow(file, 0, None), b"0123456789" * 5)
    assert log.path.read_bytes() == b"0123456789" * 5


@pytest.mark.parametrize("below", ["file/runs.jsonl", "file/a/b/runs.jsonl", "."])
def test_a_path_that_cannot_be_a_log(tmp_path, below):
    (tmp_path / "file").write_text("")
    for attempt in (RunLog.prepare, lambda log: log.append(record())):
        with pytest.raises(InputError, match="cannot be written"):
            attempt(RunLog(tmp_path / below))


# --- many writers


def test_sixteen_processes_lose_and_tear_nothing(log):
    words = [sys.executable, "-c", WRITER, str(log.path)]
    sample = json.dumps(record(x=list(range(50))))
    writers = [
        subprocess.Popen([*words, str(writer), "1000", sample], cwd=ROOT)
        for writer in range(16)
    ]
    assert [writer.wait() for writer in writers] == [0] * 16
    found = [json.loads(line)["run_id"] for line in log.path.read_text().splitlines()]
    assert len(found) == 16000
    assert set(found) == {f"{w}-{i}" for w in range(16) for i in range(1000)}
    for writer in range(16):  # and each writer's own records are in its order
        own = [
            int(name.split("-")[1]) for name in found if name.startswith(f"{writer}-")
        ]
        assert own == sorted(own)


def test_threads_of_one_process_share_a_log(log):
    def write(who):
        for index in range(50):
            log.append(record(f"{who}-{index}"))

    threads = [threading.Thread(target=write, args=(who,)) for who in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({each["run_id"] for each in log.records()}) == 200


# --- where the numbers come from


def test_versions_are_those_of_the_loaded_libraries():
    import numpy

    versions = record()["versions"]
    assert versions["numpy"] == numpy.__version__
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))


def test_without_git_the_record_says_so(monkeypatch):
    monkeypatch.setenv("PATH", os.devnull)
    _runlog._git_state.cache_clear()
    try:
        assert record()["git"] is None
    finally:
        _runlog._git_state.cache_clear()
