"""The picture shows the mean, the deviation and every seed; mixtures are refused."""

import math
import statistics

import numpy as np
import pytest

from experiments.common import InputError
from mamba_experiments.cmds import plot_variance_bands as bands
from mamba_experiments.cmds._runs import by_model, read_runs
from tests.mamba_experiments.cmds.helpers import curve, record, write

LOSSES = {
    "mamba_simple": [(6.0, 5.0, 4.0), (6.5, 5.1, 4.4), (5.0, 5.5, 3.9)],
    "mamba_SSD_diag_exp": [(7.0, 6.0, 5.0), (7.5, 6.5, 5.6)],
}
TASK = {"unigram_loss": 5.5, "unigram_accuracy": 0.05, "guess_accuracy": 0.01}


def records():
    return [
        record(model, seed=seed, curve=curve(losses, (0.1, 0.2, 0.3)), task=TASK)
        for model, runs in LOSSES.items()
        for seed, losses in enumerate(runs)
    ]


@pytest.fixture
def log(tmp_path):
    return write(tmp_path / "train_runs.jsonl", *records())


def command(run_module, log, *flags):
    return run_module(
        "mamba_experiments.cmds.plot_variance_bands", "--log-path", log, *flags
    )


def test_document_1s_command_writes_the_picture(run_module, log, tmp_path):
    flags = ["--out-dir", tmp_path / "new" / "plots", "--dataset", "wikitext2"]
    flags += ["--models", *LOSSES, "--metric", "val_loss", "--require-all-models"]
    done = command(run_module, log, *flags)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "new" / "plots" / "wikitext2_val_loss_variance_bands.png"
    assert done.stdout == f"saved {path}\n"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert "different seeds: mamba_simple: 0-2; mamba_SSD_diag_exp: 0-1" in done.stderr


def test_the_picture_shows_mean_deviation_and_every_seed(log):
    groups = by_model(read_runs(str(log)))
    (ax,) = bands.draw(groups, "val_loss").axes
    lines = {line.get_label(): line for line in ax.get_lines()}
    for (model, runs), band in zip(LOSSES.items(), ax.collections, strict=True):
        columns = list(zip(*runs, strict=True))
        mean = [statistics.fmean(column) for column in columns]
        sd = [statistics.stdev(column) for column in columns]
        line = lines[f"{model} ({len(runs)} seeds)"]
        np.testing.assert_allclose(line.get_xydata(), list(enumerate(mean, 1)))
        corners = band.get_paths()[0].vertices
        for epoch, m, s in zip((1, 2, 3), mean, sd, strict=True):
            at = corners[corners[:, 0] == epoch, 1]
            np.testing.assert_allclose([at.min(), at.max()], [m - s, m + s])
        drawn = [tuple(each.get_ydata()) for each in ax.get_lines()]
        assert all(drawn.count(losses) == 1 for losses in runs)
    assert list(lines["unigram: 5.5"].get_ydata()) == [5.5, 5.5]


@pytest.mark.parametrize(
    ("metric", "levels"),
    [
        ("val_accuracy", {"unigram: 0.05": 0.05, "guess: 0.01": 0.01}),
        ("val_perplexity", {"unigram: 244.7": math.exp(5.5)}),
        ("train_loss", {}),
    ],
)
def test_levels_are_those_of_the_metric(tmp_path, metric, levels):
    entries = [dict(e, val_perplexity=9.0, train_loss=1.0) for e in curve([2.0], [0.1])]
    log = write(tmp_path / "a.jsonl", record(curve=entries, task=TASK))
    (ax,) = bands.draw(by_model(read_runs(str(log))), metric).axes
    drawn = {x.get_label(): x.get_ydata()[0] for x in ax.get_lines()}
    shown = {k: v for k, v in drawn.items() if k.startswith(("unigram", "guess"))}
    assert shown == pytest.approx(levels)


def test_a_run_cut_short_leaves_the_common_epochs(tmp_path, capsys):
    short = curve((6.0, 5.0), (0.1, 0.2))
    log = write(
        tmp_path / "a.jsonl",
        record(curve=curve((4.0, 3.0, 2.0), (0.1, 0.2, 0.3))),
        record(seed=1, curve=short),
    )
    epochs, values = bands.aligned(read_runs(str(log)), "val_loss")
    assert (epochs.tolist(), values.tolist()) == ([1.0, 2.0], [[4.0, 3.0], [6.0, 5.0]])
    assert "seed 0: 1 of 3 evaluations left out" in capsys.readouterr().err
    apart = record(seed=2, curve=[dict(short[0], epoch=0.5)])
    log = write(tmp_path / "b.jsonl", record(seed=1, curve=short), apart)
    with pytest.raises(InputError, match="never evaluated at the same epoch"):
        bands.aligned(read_runs(str(log)), "val_loss")


def test_a_diverged_seed_is_drawn_and_said(tmp_path, capsys):
    log = write(
        tmp_path / "a.jsonl",
        record(curve=curve((4.0, "NaN"), (0.1, 0.1))),
        record(seed=1, curve=curve((4.0, 3.0), (0.1, 0.1))),
    )
    assert bands.main(["--log-path", str(log), "--out-dir", str(tmp_path)]) == 0
    said = capsys.readouterr().err
    assert said == "note: mamba_simple, seed 0: val_loss is not finite at epoch 2\n"


@pytest.mark.parametrize(
    ("more", "flags", "said"),
    [
        ([record(seed=9, lr=0.003)], [], "lr: 0.001, 0.003; expected equal"),
        ([record(dataset="mqar")], [], "dataset: mqar, wikitext2; expected equal"),
        ([], ["--metric", "val_los"], "did you mean val_loss?"),
        ([], ["--models", "s4d"], "it has mamba_simple on wikitext2 (3 runs)"),
        ([], ["--dataset", "recall"], "no runs of dataset=recall"),
        (
            [],
            ["--models", "mamba_simple", "s4d", "--require-all-models"],
            "no run of s4d; expected one of every model",
        ),
        ([], ["--require-all-model"], "did you mean --require-all-models?"),
    ],
)
def test_each_fault_is_one_line_and_status_2(tmp_path, capsys, more, flags, said):
    log = write(tmp_path / "a.jsonl", *records(), *more)
    with pytest.raises(SystemExit) as stop:
        bands.main(["--log-path", str(log), "--out-dir", str(tmp_path), *flags])
    assert stop.value.code == 2
    *notes, error = capsys.readouterr().err.splitlines()
    assert all(line.startswith("note: the models have") for line in notes)
    assert error.startswith("error: ")
    assert said in error
    assert list(tmp_path.iterdir()) == [log]


def test_without_require_all_models_a_missing_one_is_said(log, tmp_path, capsys):
    flags = ["--models", "mamba_simple", "s4d", "--out-dir", str(tmp_path)]
    assert bands.main(["--log-path", str(log), *flags]) == 0
    assert capsys.readouterr().err == "note: no run of s4d\n"


def test_more_models_than_colours_are_told_apart(tmp_path):
    models = [f"model{i}" for i in range(9)]
    log = write(tmp_path / "a.jsonl", *(record(model) for model in models))
    (ax,) = bands.draw(by_model(read_runs(str(log))), "val_loss").axes
    named = [x for x in ax.get_lines() if x.get_label().startswith("model")]
    assert len({(x.get_color(), x.get_linestyle()) for x in named}) == len(models)
