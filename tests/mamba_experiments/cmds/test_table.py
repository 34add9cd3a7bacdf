"""The table's numbers, each found a second way; its forms agree."""

import json
import statistics

import numpy as np
import pytest

from mamba_experiments.cmds import table
from tests.mamba_experiments.cmds.helpers import curve, record, write

SIMPLE = {
    0: (5.0, 4.0, 4.5),
    1: (5.2, 4.4, 4.1),
    2: (5.1, 4.3, 4.6),
    4: (6.0, 5.0, 5.0),
}
DIAGONAL = {4: (7.0, 5.8, 5.6), 2: (6.0, 4.9, 5.2), 0: (6.0, 4.7, 5.0), 9: (6, 5, 5.5)}
ACCURACIES = (0.1, 0.2, 0.3)
TASK = {"unigram_loss": 6.25, "unigram_accuracy": 0.0625, "guess_accuracy": 0.01}


def records():
    return [
        record(model, seed=s, curve=curve(losses, ACCURACIES), task=TASK, n_params=n)
        for model, seeds, n in [("simple", SIMPLE, 12345), ("diagonal", DIAGONAL, 9000)]
        for s, losses in seeds.items()
    ]


@pytest.fixture
def log(tmp_path):
    return str(write(tmp_path / "train_runs.jsonl", *records()))


def as_json(capsys, log, *flags):
    assert table.main(["--log-path", log, "--json", *flags]) == 0
    return json.loads(capsys.readouterr().out)


def test_every_statistic_is_that_of_the_best_evaluations(log, capsys):
    found = as_json(capsys, log)
    for row, seeds in zip(found["models"], (SIMPLE, DIAGONAL), strict=True):
        best = [min(seeds[s]) for s in row["seeds"]]
        at = [seeds[s].index(min(seeds[s])) for s in row["seeds"]]
        assert row["seeds"] == sorted(seeds)
        assert row["val_loss"]["mean"] == pytest.approx(statistics.fmean(best))
        assert row["val_loss"]["sd"] == pytest.approx(statistics.stdev(best))
        assert (row["val_loss"]["min"], row["val_loss"]["max"]) == (
            min(best),
            max(best),
        )
        accuracies = [ACCURACIES[i] for i in at]
        assert row["val_accuracy"]["mean"] == pytest.approx(
            statistics.fmean(accuracies)
        )
        assert row["val_accuracy"]["sd"] == pytest.approx(statistics.stdev(accuracies))
        assert row["epoch"]["values"] == [i + 1 for i in at]
    assert [row["n_params"]["total"] for row in found["models"]] == [12345, 9000]
    assert found["baselines"] == [
        {"name": "unigram", "loss": 6.25, "accuracy": 0.0625},
        {"name": "guess", "loss": None, "accuracy": 0.01},
    ]


def test_differences_are_paired_by_seed(log, capsys):
    (found,) = as_json(capsys, log)["differences"]
    assert (found["model"], found["against"]) == ("diagonal", "simple")
    assert found["seeds"] == [0, 2, 4]
    values = [min(DIAGONAL[s]) - min(SIMPLE[s]) for s in (0, 2, 4)]
    stats = pytest.importorskip("scipy.stats")
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert found["val_loss"]["mean"] == pytest.approx(np.mean(values))
    assert found["val_loss"]["ci95"] == pytest.approx([expected.low, expected.high])


def test_the_first_model_asked_for_is_the_one_compared_with(log, capsys):
    (one,) = as_json(capsys, log)["differences"]
    (other,) = as_json(capsys, log, "--models", "diagonal", "simple")["differences"]
    assert (other["model"], other["against"]) == ("simple", "diagonal")
    assert other["val_loss"]["mean"] == -one["val_loss"]["mean"]


def test_one_seed_has_neither_deviation_nor_interval(tmp_path, capsys):
    log = str(
        write(tmp_path / "a.jsonl", record("a"), record("b"), record("c", seed=1))
    )
    found = as_json(capsys, log)
    assert [row["val_loss"]["sd"] for row in found["models"]] == [None] * 3
    same, none = found["differences"]
    assert same["val_loss"] == {"mean": 0.0, "ci95": None}
    assert none["val_loss"] == {"mean": None, "ci95": None}
    assert table.main(["--log-path", log]) == 0
    text = capsys.readouterr().out
    assert "±" not in text
    assert "nan" not in text


@pytest.mark.parametrize("flags", [(), ("--markdown",)])
def test_text_and_markdown_show_the_same_numbers(log, capsys, flags):
    assert table.main(["--log-path", log, *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("wikitext2: d_model 64, n_state 16, epochs 5")
    (row,) = (line for line in lines if line.removeprefix("| ").startswith("simple "))
    best = [4.0, 4.1, 4.3, 5.0]
    mean, sd = statistics.fmean(best), statistics.stdev(best)
    for shown in (
        "4 (0-2, 4)",
        "12,345 (12,295)",
        f"{mean:.4f} ± {sd:.4f}",
        "4.0000 .. 5.0000",
        "22.50 ± 5.00 %",
        "2.25 (2 .. 3)",
    ):
        assert shown in row
    (level,) = (line for line in lines if "unigram" in line)
    assert "6.2500" in level
    assert "6.25 %" in level
    assert all(line.startswith("|") for line in lines if "seeds" in line) is bool(flags)


def test_what_models_differ_in_is_said(tmp_path, capsys):
    both = [record("a", d_model=64), record("b", d_model=70)]
    log = str(write(tmp_path / "a.jsonl", *both))
    assert table.main(["--log-path", log, "--may-differ", "d_model"]) == 0
    text = capsys.readouterr().out
    assert "d_model differs between the models: a 64, b 70" in text
    assert "d_model 64" not in text.splitlines()[0]


def test_a_diverged_run_is_shown_as_such(tmp_path, capsys):
    lost = record("b", curve=curve(["NaN", "Infinity"], [0.1, 0.1]))
    log = str(write(tmp_path / "a.jsonl", record("a"), lost, record("b", seed=1)))
    found = as_json(capsys, log)
    assert found["models"][1]["val_loss"]["mean"] == "NaN"
    assert found["differences"][0]["val_loss"]["mean"] == "NaN"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--json", "--markdown"], "got --json and --markdown"),
        (["--where", "lr=7"], "no runs of lr=7"),
        (["--where", "learning=7"], "expected a setting of the log"),
    ],
)
def test_each_fault_is_one_line_and_status_2(log, capsys, flags, said):
    with pytest.raises(SystemExit) as stop:
        table.main(["--log-path", log, *flags])
    assert stop.value.code == 2
    out, error = capsys.readouterr()
    assert (out, len(error.splitlines())) == ("", 1)
    assert said in error


def test_a_mixture_is_one_line_in_a_process(run_module, tmp_path):
    log = write(tmp_path / "a.jsonl", record(), record(seed=1, epochs=3))
    done = run_module("mamba_experiments.cmds.table", "--log-path", log)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert "epochs: 3, 5" in done.stderr
