"""Figure 1: medians and ranges of our runs, beside the published ones."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lcde import plot_toy
from lcde._logs import read_runs
from lcde.plot_toy import NEEDED, RANDOM, agreement, our_lines, published_lines, table
from tests.conftest import ROOT
from tests.lcde.helpers import Record, random_cde, record, toy, write

RMSE = {0: [0.5, 0.3, 0.4], 100: [0.09, 0.07, 0.10], 200: [0.05, 0.02, 0.03]}


def records() -> list[Record]:
    return [
        *(random_cde(2, rmse, seed=i) for i, rmse in enumerate((1e-4, 3e-4, 2e-4))),
        *(
            toy("S4", {step: row[seed] for step, row in RMSE.items()}, seed=seed)
            for seed in range(3)
        ),
        toy("S4", {100: 0.1, 200: 0.0995}, nonlinear=False),
        toy("Mamba2", {100: 0.01}, depth=1),
    ]


def lines(tmp_path: Path, *given: Record) -> list[plot_toy.Line]:
    log = write(tmp_path / "runs.jsonl", *given)
    return our_lines(read_runs(str(log), NEEDED, "make"))


def test_the_command_draws_both_files_and_prints_the_table(tmp_path, capsys):
    write(tmp_path / "runs.jsonl", *records())
    assert plot_toy.main(["--results-dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert (tmp_path / "rmse_subplots.pdf").read_bytes().startswith(b"%PDF")
    assert (tmp_path / "rmse_subplots.png").read_bytes().startswith(b"\x89PNG")
    assert f"saved {tmp_path / 'rmse_subplots.pdf'}" in out
    assert "ours: LinearCDE: hidden_dim 256; S4, Mamba2: hidden_dim 32" in out
    row = next(x for x in out.splitlines() if "S4, 2 blocks, nonlinear" in x)
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[2:4] == ["0.0145 (0.014 .. 0.0153)", "990,000"]
    assert cells[4:7] == ["0.03 (0.02 .. 0.05)", "200", "3"]
    assert cells[7:] == ["0.3", "yes: below predicting zero"]


def test_values_are_written_line_by_line(tmp_path):
    write(tmp_path / "runs.jsonl", *records())
    path = tmp_path / "toy.json"
    flags = ["--results-dir", str(tmp_path), "--json", str(path)]
    assert plot_toy.main(flags) == 0
    lines = json.loads(path.read_text())["lines"]
    found = next(x for x in lines if x["model"] == "S4" and x["nonlinear"])
    assert found["steps"] == [*RMSE]
    assert found["rmse"] == [*RMSE.values()]


def test_published_values_are_those_of_the_step_that_we_reached(tmp_path):
    ours = lines(tmp_path, toy("S4", {10_000: 0.1, 100_000: 0.05}))[0]
    theirs = next(x for x in published_lines() if x.key == ours.key)
    until = plot_toy.up_to(theirs, 100_000)
    assert until.steps.tolist() == [0, 10_000, 100_000]
    assert until.last == theirs.rmse[:, 2].tolist()
    assert plot_toy.up_to(theirs, 9_999) is theirs  # nothing before but step 0
    row = table([ours], [theirs]).splitlines()[-1]
    assert "100,000" in row
    assert "990,000" not in row


@pytest.mark.parametrize(
    ("file", "picture"),
    [("plot_toy.py", "rmse_subplots"), ("plot_A5.py", "A5_plot_shaded_regions")],
)
def test_the_files_run_by_their_path_from_any_folder(tmp_path, file, picture):
    command = [sys.executable, ROOT / "lcde" / file, "--published-only"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert (tmp_path / "outputs" / "lcde" / f"{picture}.pdf").is_file()
    assert "published values" in done.stdout


def test_lines_are_medians_with_the_range_of_the_seeds(tmp_path):
    figure = plot_toy.draw(lines(tmp_path, *records()), published_lines(), "")
    two, three = figure.axes
    drawn = {line.get_label(): line for line in two.get_lines()}
    ours = drawn["S4, 2 blocks, nonlinear, ours"]
    assert list(ours.get_xdata()) == [100, 200]  # step 0 has no logarithm
    assert list(ours.get_ydata()) == [statistics.median(RMSE[s]) for s in (100, 200)]
    edges = [
        (float(low), float(high))
        for band in two.collections
        for x in [band.get_paths()[0].vertices]
        if x[:, 0].max() == 200
        for low, high in [(x[:, 1].min(), x[:, 1].max())]
    ]
    assert (0.02, 0.10) in edges
    assert list(drawn[f"{RANDOM}, ours"].get_ydata()) == [2e-4, 2e-4]
    assert list(drawn[f"{RANDOM}, published"].get_ydata()) == [0.000216] * 2
    assert drawn["S4, 2 blocks, nonlinear, published"].get_markerfacecolor() == "white"
    assert "Mamba2, 1 block, nonlinear, ours" in drawn
    assert "S4, 2 blocks, nonlinear, ours" not in {
        line.get_label() for line in three.get_lines()
    }


def test_seeds_evaluated_at_other_steps_share_what_they_have_in_common(
    tmp_path, capsys
):
    (line,) = lines(
        tmp_path, toy("S4", {10: 0.4, 20: 0.2}), toy("S4", {20: 0.3, 30: 0.1}, seed=1)
    )
    assert line.steps.tolist() == [20]
    assert line.rmse.tolist() == [[0.2], [0.3]]
    assert "S4: 2 evaluations left out" in capsys.readouterr().err


def test_a_diverged_run_is_drawn_as_far_as_it_goes(tmp_path):
    (line,) = lines(tmp_path, toy("S4", {10: 0.4, 20: "NaN"}))
    assert np.isnan(line.last).all()
    assert agreement(line, published_lines()[-1]) == "no: a run diverged"
    assert len(plot_toy.draw([line], [], "").axes) == 2


@pytest.mark.parametrize(
    ("dim", "values", "said"),
    [
        (2, [2e-4, 2e-4], "yes: mean 0.97 times"),
        (2, [2.4e-4], "no: mean 1.16 times"),
        (3, [7e-3], "yes: mean 1.02 times"),
    ],
)
def test_the_random_cde_agrees_by_its_mean(tmp_path, dim, values, said):
    (ours,) = lines(
        tmp_path, *(random_cde(dim, v, seed=i) for i, v in enumerate(values))
    )
    theirs = next(line for line in published_lines() if line.key == ours.key)
    assert agreement(ours, theirs) == said


@pytest.mark.parametrize(
    ("rmse", "nonlinear", "said"),
    [
        (0.03, True, "yes: below predicting zero"),
        (0.099, True, "no: at predicting zero, published below it"),
        (0.099, False, "yes: at predicting zero"),
        (0.03, False, "no: below predicting zero, published at it"),
    ],
)
def test_trained_models_agree_by_whether_they_learn(tmp_path, rmse, nonlinear, said):
    (ours,) = lines(tmp_path, toy("S4", {100: rmse}, nonlinear=nonlinear))
    theirs = next(line for line in published_lines() if line.key == ours.key)
    assert agreement(ours, theirs) == said


def test_the_published_figure_alone_lists_every_line():
    rows = table([], published_lines()).splitlines()[2:]
    assert len(rows) == 2 * (1 + 3 * 3)
    assert all(row.count(" - ") >= 4 for row in rows)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "make one with `python run_experiment.py -m LCDE -e toy --quick`"),
        (
            [toy("S4", RMSE), toy("S4", RMSE, seed=1, lr=0.1)],
            "lr: 0.001, 0.1; expected",
        ),
        (
            [record("sm_toy", {"model": "S4"})],
            "lacks input_dim, depth, nonlinear, curve",
        ),
    ],
)
def test_what_cannot_be_drawn_is_one_line_and_writes_nothing(
    tmp_path, capsys, given, said
):
    write(tmp_path / "runs.jsonl", *given)
    with pytest.raises(SystemExit) as stop:
        plot_toy.main(["--results-dir", str(tmp_path)])
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    assert said in line
    assert [path.name for path in tmp_path.iterdir()] == ["runs.jsonl"]
