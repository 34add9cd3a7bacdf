"""The runner: grids, repeats, resumption, and the faults it must survive."""

import contextlib
import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import _csv, _grid, registry, run_and_log
from experiments.common import (
    ExperimentResult,
    InputError,
    Picture,
    RunLog,
    make_record,
    new_figure,
    parse_line,
)

ROOT = Path(__file__).parents[2]
RUN = [sys.executable, "-m", "experiments.run_and_log"]
posix_only = pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")


def command(folder, *words, **options):
    words = [*RUN, *words, "--log-path", str(folder / "runs.jsonl")]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, **options)


def records(folder):
    text = (folder / "runs.jsonl").read_text()
    assert text == "" or text.endswith("\n")
    return [parse_line(line) for line in text.splitlines()]


def assert_bad_input(done, *said):
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "Traceback" not in done.stderr
    for words in said:
        assert words in done.stderr


# --- what a grid is


def exp1():
    return registry.load(registry.find("exp1"))


def test_a_grid_is_the_cartesian_product_repeated_over_seeds():
    axes = [
        _grid.parse_axis(text, [exp1()]) for text in ("exp1.T=16,32", "exp1.a=0.5,-0.9")
    ]
    points = _grid.grid_points([exp1()], axes, repeats=3, seed=7)
    found = [(p.values["T"], p.values["a"], p.values["seed"]) for p in points]
    assert found == [
        (T, a, s) for T in (16, 32) for a in (0.5, -0.9) for s in (7, 8, 9)
    ]
    assert len({point.run_id for point in points}) == 12


def test_repeats_without_a_seed_are_told_apart_by_their_index():
    axis = _grid.parse_axis("exp1.seed=4", [exp1()])
    points = _grid.grid_points([exp1()], [axis], repeats=3, seed=0)
    assert [point.values["seed"] for point in points] == [4, 4, 4]
    assert [point.repeat for point in points] == [0, 1, 2]
    assert len({point.run_id for point in points}) == 3


def test_run_id_is_the_hash_of_experiment_arguments_and_repeat():
    point = _grid.Point("e", "experiment", {"z": (1, 2), "a": 0.5 + 1j}, 3)
    canonical = '{"experiment":"experiment","params":{"a":"0.5+1.0j","z":[1,2]},'
    digest = hashlib.sha256((canonical + '"repeat":3}').encode()).hexdigest()
    assert point.run_id == digest[:16]


def of_every_kind(
    n: int = 1,
    x: float = 1.0,
    z: tuple[complex, ...] = (),
    flag: bool = False,
    mode: str | None = None,
) -> ExperimentResult:
    return ExperimentResult("fake", "ok", {"n": n, "x": x}, n < 5)


@pytest.fixture
def fake(monkeypatch):
    """An experiment of this test: passes for n < 5, refuses n = 0, and has a picture"""

    def run(n: int = 1) -> ExperimentResult:
        if n == 0:
            raise InputError("n: got 0; expected 1; try 1")
        return ExperimentResult("fake", f"n is {n}", {"n": n}, n < 5)

    def draw(results):
        figure, axes = new_figure()
        drawn.append([result.metadata["n"] for result in results])
        axes[0, 0].plot(drawn[-1])
        return figure

    drawn = []
    entry = registry.Entry("fake", "experiments.fake", "a fake")
    loaded = registry.Experiment(entry, run, (Picture(draw, "x/f.png"),), None, "fake")
    monkeypatch.setattr(registry, "ENTRIES", (*registry.ENTRIES, entry))
    monkeypatch.setattr(run_and_log, "load", lambda e: loaded)
    monkeypatch.setattr(loaded.run, "drawn", drawn, raising=False)
    return loaded


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("fake.n=-3,4", (-3, 4)),
        ("fake.x=1e-3,nan_is_not_here", None),
        ("fake.x=1e-3,-.5", (1e-3, -0.5)),
        ("fake.z=[0.5, -0.2+0.3j],[1]", ((0.5, -0.2 + 0.3j), (1,))),
        ("fake.z=[]", ((),)),
        ("fake.flag=true,False", (True, False)),
        ("fake.mode=fast,None", ("fast", None)),
        ("fake.n=1.5", None),
        ("fake.n=1,1", None),
        ("fake.n=", None),
        ("fake.n=1,,2", None),
        ("fake.z=[[1]]", None),
        ("fake.n=--help", None),
    ],
)
def test_values_are_read_as_the_parameter_s_type(text, values):
    loaded = registry.Experiment(registry.find("exp1"), of_every_kind, (), None, "")
    text = text.replace("fake", "exp1")
    if values is None:
        with pytest.raises(InputError):
            _grid.parse_axis(text, [loaded])
    else:
        axis = _grid.parse_axis(text, [loaded])
        assert axis.values == values
        assert [type(v) for v in axis.values] == [type(v) for v in values]


# --- faults of the command line, each against a real process


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--experiment exp1 --jobs 0", ["--jobs", "got 0"]),
        ("--experiment exp1 --repeats 0", ["--repeats", "got 0"]),
        ("--experiment exp1 --seed -1", ["--seed", "got -1"]),
        ("--experiment exp1 --grid nonsense", ["'nonsense'", "exp1.T=16,32"]),
        ("--experiment exp1 --grid exp1.t=3", ["(T, a, seed)", "did you mean T?"]),
        ("--experiment exp1 --grid exp1.T=3,x", ["exp1.T", "'x'", "int"]),
        ("--experiment exp1 --grid exp1.T=3 exp1.T=4", ["exp1.T twice"]),
        ("--experiment exp1 --grid exp2.T=3", ["add exp2 to --experiment"]),
        ("--experiment exp1 --exp4-plot", ["add exp4 to --experiment"]),
        ("--experiment ex1", ["'ex1'", "did you mean exp1?"]),
        ("--experiment exp1_scalar_equivalance", ["did you mean exp1_scalar_equi"]),
        ("--experiment", ["--experiment", "try --experiment exp1"]),
        ("--experimant exp1", ["--experimant", "did you mean --experiment?"]),
        ("--experiment exp1 --repeats many", ["--repeats", "many"]),
        ("--experiment exp1 --csv-path {}/runs.jsonl", ["--csv-path"]),
    ],
)
def test_bad_input_is_one_line_before_any_work(tmp_path, words, said):
    done = command(tmp_path, *words.replace("{}", str(tmp_path)).split())
    assert_bad_input(done, *said)
    assert not (tmp_path / "runs.jsonl").exists()


def test_a_missing_folder_is_made(tmp_path):
    done = command(tmp_path / "a" / "b", "--experiment", "exp1")
    assert done.returncode == 0
    assert len(records(tmp_path / "a" / "b")) == 1


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    done = command(tmp_path / "file" / "below", "--experiment", "exp1")
    assert_bad_input(done, "runs.jsonl", "cannot be written")
    assert (tmp_path / "file").read_text() == "not a folder"


def test_a_table_that_cannot_be_written_is_found_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    csv_path = str(tmp_path / "file" / "runs.csv")
    done = command(tmp_path, "--experiment", "exp1", "--csv-path", csv_path)
    assert_bad_input(done, "runs.csv", "cannot be written")
    assert records(tmp_path) == []


def test_a_foreign_line_stops_the_run_and_stays(tmp_path):
    assert command(tmp_path, "--experiment", "exp1").returncode == 0
    log = tmp_path / "runs.jsonl"
    before = log.read_text() + "a shopping list\n"
    log.write_text(before)
    done = command(tmp_path, "--experiment", "exp1", "--repeats", "3")
    assert_bad_input(done, f"{log}:2:")
    assert log.read_text() == before


def test_a_torn_last_line_is_set_aside_and_the_run_goes_on(tmp_path):
    assert command(tmp_path, "--experiment", "exp1").returncode == 0
    log = tmp_path / "runs.jsonl"
    with open(log, "a") as file:
        file.write('{"schema": 1, "run_id": "abc')
    done = command(tmp_path, "--experiment", "exp1", "--repeats", "2")
    assert done.returncode == 0
    assert "torn" in done.stderr
    assert "1 of 2 already in" in done.stdout
    assert len(records(tmp_path)) == 2
    assert (tmp_path / "runs.jsonl.torn").read_text().startswith('{"schema": 1, "run_')


@posix_only
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_full_disk_loses_no_whole_record(tmp_path, jobs):
    grid = ["--experiment", "exp1", "--repeats", "12", "--jobs", jobs]
    log = ["--log-path", str(tmp_path / "runs.jsonl")]
    done = subprocess.run(  # no file may grow past 4 KiB: a write comes up short
        ["bash", "-c", 'ulimit -f 4; exec "$@"', "bash", *RUN, *grid, *log],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert_bad_input(done, "runs.jsonl", "cannot be written")
    kept = records(tmp_path)
    assert 1 <= len(kept) < 12
    done = command(tmp_path, *grid)
    assert done.returncode == 0
    assert f"{len(kept)} of 12 already in" in done.stdout
    assert len({record["run_id"] for record in records(tmp_path)}) == 12


def test_one_point_that_is_refused_costs_no_other(tmp_path):
    done = command(tmp_path, "--experiment", "exp1", "--grid", "exp1.T=8,0,16")
    assert_bad_input(done, "exp1 T=0", "expected an integer of at least 1")
    assert [record["params"]["T"] for record in records(tmp_path)] == [8, 16]


# --- interrupts during a grid

SLOW = ["--experiment", "exp1", "--repeats", "24", "--grid", "exp1.T=900"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The run ids of the grid when nothing goes wrong"""
    folder = tmp_path_factory.mktemp("whole")
    assert command(folder, *SLOW).returncode == 0
    return sorted(record["run_id"] for record in records(folder))


def struck(folder, number, jobs, lines):
    """Start the grid; send ``number`` to its group once the log has ``lines``"""
    log = folder / "runs.jsonl"
    process = subprocess.Popen(
        [*RUN, *SLOW, "--jobs", str(jobs), "--log-path", str(log)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while process.poll() is None:
        if log.exists() and log.read_bytes().count(b"\n") >= lines:
            break
        time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
    _, complaint = process.communicate(timeout=60)
    return process.returncode, complaint


def group_members(group):
    listed = subprocess.run(
        ["ps", "-eo", "pgid=,pid=,stat="], capture_output=True, text=True, check=True
    )
    rows = [line.split() for line in listed.stdout.splitlines()]
    return [pid for pgid, pid, stat in rows if pgid == str(group) and "Z" not in stat]


@posix_only
@pytest.mark.parametrize(
    ("number", "jobs", "moments"),
    [
        (signal.SIGINT, 1, (0, 9)),
        (signal.SIGINT, 2, (1, 9)),
        (signal.SIGKILL, 1, (1, 9)),
        (signal.SIGKILL, 2, (0, 1, 9)),
    ],
)
def test_an_interrupted_grid_is_completed_without_duplicates(
    tmp_path, number, jobs, moments, uninterrupted
):
    done = 0
    for lines in moments:
        status, complaint = struck(tmp_path, number, jobs, lines)
        if number == signal.SIGINT:
            assert status == 130, complaint
            assert complaint == "interrupted; what was logged before is whole\n"
        assert "Traceback" not in complaint
        if (tmp_path / "runs.jsonl.torn").exists():
            assert number == signal.SIGKILL
        text = (tmp_path / "runs.jsonl").read_text()
        whole = text[: text.rfind("\n") + 1]
        ids = [parse_line(line)["run_id"] for line in whole.splitlines()]
        assert len(ids) >= max(done, lines)
        assert set(ids) <= set(uninterrupted)
        done = len(ids)
    assert done < 24, "the grid was never interrupted"
    finished = command(tmp_path, *SLOW, "--jobs", str(jobs))
    assert finished.returncode == 0
    assert f"{done} of 24 already in" in finished.stdout
    assert sorted(record["run_id"] for record in records(tmp_path)) == uninterrupted


@posix_only
def test_no_worker_outlives_a_killed_parent(tmp_path):
    process = subprocess.Popen(
        [*RUN, *SLOW, "--jobs", "2", "--log-path", str(tmp_path / "runs.jsonl")],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    log = tmp_path / "runs.jsonl"
    while not (log.exists() and log.stat().st_size) and process.poll() is None:
        time.sleep(0.01)
    workers = group_members(process.pid)
    process.kill()
    process.wait()
    try:
        assert len(workers) > 1
        for _ in range(500):
            if not group_members(process.pid):
                return
            time.sleep(0.01)
        pytest.fail(f"still alive: {group_members(process.pid)}")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


# --- outcomes


def test_processes_and_one_process_find_the_same(tmp_path):
    grid = ["--experiment", "exp1", "--repeats", "3", "--grid", "exp1.a=0.5,-0.9"]
    found = []
    for jobs in ("1", "2"):
        folder = tmp_path / jobs
        assert command(folder, *grid, "--jobs", jobs).returncode == 0
        found.append({r["run_id"]: (r["meta"], r["params"]) for r in records(folder)})
        assert "run_and_log --experiment exp1" in records(folder)[0]["command"]
    assert found[0] == found[1]
    assert len(found[0]) == 6


def test_a_failed_claim_is_status_1_now_and_when_resumed(tmp_path, fake, capsys):
    words = ["--experiment", "fake", "--grid", "fake.n=1,7,2"]
    words += ["--log-path", str(tmp_path / "runs.jsonl")]
    assert run_and_log.main(words) == 1
    assert "n is 7" in capsys.readouterr().out
    assert run_and_log.main(words) == 1
    assert "3 of 3 already in" in capsys.readouterr().out
    assert [record["passed"] for record in records(tmp_path)] == [True, False, True]


def test_refused_points_outrank_failed_claims(tmp_path, fake, capsys):
    words = ["--experiment", "fake", "--grid", "fake.n=0,7"]
    words += ["--log-path", str(tmp_path / "runs.jsonl")]
    assert run_and_log.main(words) == 2
    assert "error: fake n=0: n: got 0" in capsys.readouterr().err


def test_pictures_show_every_run_of_the_grid(tmp_path, fake):
    words = ["--experiment", "fake", "--grid", "fake.n=1,3,2", "--plots"]
    words += [
        "--plot-dir",
        str(tmp_path / "p"),
        "--log-path",
        str(tmp_path / "r.jsonl"),
    ]
    assert run_and_log.main(words) == 0
    assert run_and_log.main(words) == 0
    assert fake.run.drawn == [[1, 3, 2], [1, 3, 2]]
    assert (tmp_path / "p" / "f.png").read_bytes().startswith(b"\x89PNG")


def test_all_names_every_experiment_that_is_installed(monkeypatch, capsys):
    def load(entry):
        if entry.short == "exp2":
            raise InputError("exp2: expected the extra 'torch'")
        return registry.Experiment(entry, of_every_kind, (), None, "")

    monkeypatch.setattr(run_and_log, "load", load)
    found = run_and_log._experiments(["all"])
    assert [e.entry for e in found] == [
        entry for entry in registry.ENTRIES if entry.short != "exp2"
    ]
    assert "note: left out exp2" in capsys.readouterr().err
    with pytest.raises(InputError):
        run_and_log._experiments(["exp2"])


# --- the source document's flags


def test_state_sizes_become_spaced_decays(tmp_path):
    words = ["--experiment", "exp2", "--exp2-n-list", "1", "2", "4"]
    assert command(tmp_path, *words).returncode == 0
    found = [[complex(a) for a in r["params"]["decays"]] for r in records(tmp_path)]
    assert [len(decays) for decays in found] == [1, 2, 4]
    assert found[2] == [0.2, 0.4, 0.6, 0.8]


def test_lists_for_exp3_go_to_one_run(tmp_path):
    words = "--experiment exp3 --exp3-t-list 6 9 --exp3-seeds 3 --exp3-random-n 2"
    assert command(tmp_path, *words.split()).returncode == 0
    (record,) = records(tmp_path)
    assert record["params"]["T_values"] == [6, 9]
    assert record["params"]["seeds"] == [3]
    assert record["params"]["random_n"] == [2]


# --- the table


def test_the_table_holds_every_record_whole(tmp_path):
    words = "--experiment exp1 exp2 --repeats 2 --grid exp2.decays=[0.5],[0.9+0.3j,0]"
    assert command(tmp_path, *words.split()).returncode == 0
    rows = list(_csv.read_csv(tmp_path / "runs.csv"))
    assert [line for line, _ in rows] == [2, 3, 4, 5, 6, 7]
    assert [record for _, record in rows] == records(tmp_path)
    with open(tmp_path / "runs.csv", newline="") as file:
        first = next(csv.DictReader(file))
    assert first["experiment"] == "exp1_scalar_equivalence"
    assert first["params.T"] == first["meta.T"] == "64"
    assert list(tmp_path.glob(".*")) == []


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner),
    max_leaves=6,
).filter(lambda value: "Infinity" not in json.dumps(value))


@settings(deadline=None, max_examples=25)
@given(st.lists(st.dictionaries(st.text(min_size=1), json_values), max_size=3))
def test_a_table_is_read_back_as_it_was_written(tmp_path_factory, metas):
    folder = tmp_path_factory.mktemp("table")
    log = RunLog(folder / "runs.jsonl")
    now = datetime.now(UTC)
    for meta in metas:
        result = ExperimentResult("x", '"quoted", or\nnot', {**meta, "device": "d"})
        log.append(make_record(result, params={}, started=now, duration_s=0.1))
    _csv.write_csv(log, folder / "runs.csv")
    read = [record for _, record in _csv.read_csv(folder / "runs.csv")]
    assert read == list(log.records())
