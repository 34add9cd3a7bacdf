"""Pictures from a log: which runs they show, and logs that they refuse."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.common import RunLog
from time_series_experiments import exp_synthetic_ndecay, plot_runs
from time_series_experiments._runs import read_runs
from time_series_experiments.plot_runs import draw_against_n, draw_curves

SIZES = {"epochs": 2, "n-train": 20, "n-val": 7, "n-test": 11, "bound-starts": 3}
TINY = [word for name, n in SIZES.items() for word in (f"--{name}", str(n))]


def make(folder: Path, *words: str, T: int = 9) -> str:
    command = [
        *TINY,
        "--T",
        str(T),
        "--log-path",
        str(folder / "ts_runs.jsonl"),
        *words,
    ]
    assert exp_synthetic_ndecay.main(command) == 0
    return str(folder / "ts_runs.jsonl")


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("runs")
    make(folder, "--models", "ssm_diag_linear", T=5)
    models = ("--models", "ssm_diag_linear", "transformer")
    return make(folder, *models, "--N-values", "1", "2", "3", "--seeds", "0", "1", "2")


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        plot_runs.main(words)
    told = capsys.readouterr()
    assert stop.value.code == 2
    assert len(told.err.splitlines()) == 1
    assert told.err.startswith("error: ")
    return told.err


def test_the_latest_settings_are_shown_alone(log: str) -> None:
    runs = read_runs(log, "synthetic_decays", "synthetic_decays", latest_only=True)
    assert runs.settings["T"] == 9
    groups = runs.groups()
    assert [len(groups[m]) for m in ("ssm_diag_linear", "transformer")] == [9, 3]


def test_a_run_done_again_replaces_the_one_before(tmp_path: Path) -> None:
    words = ("--models", "ssm_diag_linear", "--N-values", "1", "--again")
    for _ in range(2):
        path = make(tmp_path, *words)
    every = list(RunLog(path).records())
    runs = read_runs(path, "synthetic_decays", "synthetic_decays", latest_only=False)
    assert len(every) == 2
    assert [r["run_id"] for r in runs.records] == [every[1]["run_id"]]


def test_every_picture_is_drawn(log: str, tmp_path: Path) -> None:
    words = ["--task", "synthetic_decays", "--latest_only", "--log_val_curves"]
    words += ["--log_path", log, "--out_dir", str(tmp_path)]
    assert plot_runs.main(words) == 0
    names = {path.name for path in tmp_path.iterdir()}
    kinds = ("val_curves", "error_against_N", "hankel")
    assert names == {f"synthetic_decays_{kind}.png" for kind in kinds}
    assert all((tmp_path / name).stat().st_size > 10_000 for name in names)


def test_curves_and_levels_are_those_of_the_records(log: str) -> None:
    runs = read_runs(log, "synthetic_decays", "synthetic_decays", latest_only=True)
    curves = draw_curves(runs, log=True).axes[0]
    assert curves.get_yscale() == "log"
    assert draw_curves(runs, log=False).axes[0].get_yscale() == "linear"
    drawn = {tuple(line.get_ydata()) for line in curves.lines}
    for record in runs.records:
        values = tuple(entry["val_mse"] for entry in record["meta"]["curve"])
        assert values in drawn
    ax = draw_against_n(runs).axes[0]
    levels: dict[str, Any] = {line.get_label(): line for line in ax.lines}
    clean = runs.groups()["ssm_diag_linear"]
    for N in (1, 2, 3):
        own = [r["meta"] for r in clean if r["params"]["N"] == N]
        middle = np.median([meta["population_mse"] for meta in own])
        line = levels["ssm_diag_linear (3 seeds)"]
        assert line.get_ydata()[N - 1] == middle
        bound = levels["bound$_N$: least of N linear states"].get_ydata()[N - 1]
        assert bound == own[0]["bound"]["mse"]
    assert "transformer (has no N)" in levels


def test_logs_that_cannot_be_drawn_get_one_line(
    log: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no such file" in refused(capsys, "--log-path", str(tmp_path / "none"))
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    assert "it holds nothing" in refused(capsys, "--log-path", str(empty))
    other = tmp_path / "other.jsonl"
    text = Path(log).read_text().replace('"synthetic_decays"', '"exp1"')
    other.write_text(text)
    assert "it holds exp1" in refused(capsys, "--log-path", str(other))
    assert "T: 5, 9" in refused(capsys, "--log-path", log)
    assert "task: got 'decays'" in refused(capsys, "--task", "decays")
    assert "no runs of co2" in refused(capsys, "--task", "co2", "--log-path", log)
    torn = tmp_path / "torn.jsonl"
    torn.write_text("nonsense\n" + text)
    assert "torn.jsonl:1" in refused(capsys, "--log-path", str(torn))
