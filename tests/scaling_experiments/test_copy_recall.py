"""Cells are matched, scored, chosen and judged as said; the log is gone on from."""

import json
import math
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from data_dir.task import IGNORED
from experiments.common import InputError, RunLog
from scaling_experiments import copy_recall
from scaling_experiments.copy_recall import (
    PARAMETER_TOLERANCE,
    CopyRecallOptions,
    build,
    by_model,
    check_options,
    chosen,
    draw,
    draw_data,
    main,
    matched_config,
    objective,
    parse_model,
    problems,
    result_of,
    run,
    table,
    train_cell,
)
from ssm.layers.mamba2 import Mamba2State

TINY = CopyRecallOptions(
    models=("attention", "ssm:2"),
    lengths=(1, 3),
    vocab=5,
    n_params=8_000,
    steps=3,
    batch_size=4,
    n_test=6,
    device="cpu",
)
FLAGS = [
    *("--models", "attention", "ssm:2", "--lengths", "1", "3", "--vocab", "5"),
    *("--n-params", "8000", "--steps", "3", "--batch-size", "4", "--n-test", "6"),
    *("--device", "cpu"),
]


# --- models


@pytest.mark.parametrize("name", ["attention", "hybrid:4", "ssm:1", "ssm:64", "lti:16"])
@pytest.mark.parametrize("n_params", [20_000, 60_000])
def test_every_model_has_the_parameters_asked_for(name, n_params):
    model = build(matched_config(name, 65, n_params), 0)
    counted = sum(p.numel() for p in model.parameters())
    assert abs(counted - n_params) <= PARAMETER_TOLERANCE * n_params


@pytest.mark.parametrize("name", ["attention", "hybrid:4", "ssm:3", "lti:6"])
def test_numbers_in_the_state_are_those_that_the_model_keeps(name):
    config = matched_config(name, 9, 20_000)
    kind, _, N = parse_model(name)
    kept = 0
    for block in build(config, 0).init_state(1).states:
        state = block.mixer
        if isinstance(state, Mamba2State):
            kept += state.ssm.numel()
        elif name.startswith("lti"):
            kept += sum(torch.view_as_real(x).numel() for x in state)
    assert kind.state_numbers(config.d_model, N) == kept


def test_weights_come_from_the_seed_alone():
    config = matched_config("hybrid:2", 9, 3_000)
    first = build(config, 4).state_dict()
    torch.manual_seed(99)
    for name, weight in build(config, 4).state_dict().items():
        assert torch.equal(weight, first[name])
    other = build(config, 5).embedding.weight
    assert not torch.equal(other, first["embedding.weight"])


# --- scores


class Fixed(nn.Module):
    """A model that gives these logits."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, _inputs: Tensor) -> Any:
        class Out(NamedTuple):
            logits: Tensor

        return Out(self.logits)


def test_only_what_is_asked_for_is_scored():
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(3, 4, 5, generator=generator)
    targets = torch.tensor(
        [[IGNORED, 1, 2, IGNORED], [0, IGNORED, 4, 3], [IGNORED] * 3 + [2]]
    )
    inputs = torch.zeros(3, 4, dtype=torch.int16)
    found = objective(Fixed(logits), (inputs, targets.to(torch.int16)))
    asked = [(b, t) for b in range(3) for t in range(4) if targets[b, t] != IGNORED]
    losses = [functional.cross_entropy(logits[at], targets[at]) for at in asked]
    right = sum(int(logits[at].argmax() == targets[at]) for at in asked)
    assert int(found.scored) == len(asked) == 6
    assert math.isclose(float(found.loss), float(sum(losses)), rel_tol=1e-6)
    assert int(found.sums["accuracy"]) == right


def test_the_data_suffice_for_every_step_and_are_not_those_of_the_test():
    data = draw_data(replace(TINY, vocab=40, lengths=(9,), steps=30), 0)
    assert len(data.train.inputs) >= 30 * TINY.batch_size
    seen = {tuple(row) for row in data.train.inputs.tolist()}
    assert not seen & {tuple(row) for row in data.tests[9].inputs.tolist()}


def test_a_small_model_learns_to_copy_a_token():
    options = replace(
        TINY, models=("ssm:4",), lengths=(1, 2), steps=200, batch_size=32, n_test=64
    )
    cell = train_cell(options, draw_data(options, 0))
    assert cell["curve"][-1]["step"] == 200
    assert cell["accuracy"]["1"] > 0.9
    assert cell["val_loss"] < math.log(5) / 2


def test_a_training_depends_on_its_cell_alone():
    together = run(TINY).metadata["cells"]
    torch.manual_seed(3)
    alone = run(replace(TINY, models=("ssm:2",))).metadata["cells"]
    assert without_times(together[1]) == without_times(alone[0])
    other = run(replace(TINY, models=("ssm:2",), seeds=(1,))).metadata["cells"]
    assert other[0]["val_loss"] != alone[0]["val_loss"]


def without_times(cell: dict[str, Any]) -> dict[str, Any]:
    curve = [
        {k: v for k, v in entry.items() if k != "seconds"} for entry in cell["curve"]
    ]
    return cell | {"curve": curve}


# --- verdicts


def a_cell(model: str, short: float, long: float, **changes: Any) -> dict[str, Any]:
    kind, head, N = parse_model(model)
    cell = {
        "model": model,
        "kind": head,
        "d_state": N,
        "lr": 0.01,
        "seed": 0,
        "n_params": 1000,
        "state_numbers": kind.state_numbers(8, N),
        "val_loss": 1.0,
        "accuracy": {"2": short, "16": long},
        "device": None,
    }
    return cell | changes


GOOD = [
    a_cell("attention", 0.96, 0.99),
    a_cell("hybrid:4", 0.97, 0.98),
    a_cell("ssm:4", 0.99, 0.40),
    a_cell("ssm:16", 0.99, 0.70),
    a_cell("ssm:64", 0.99, 0.96),
]
SET = replace(CopyRecallOptions(), lengths=(2, 16))


def test_cells_that_bear_the_claim_out_pass():
    assert result_of(SET, GOOD).passed is True
    assert "ssm:4 40.0%" in result_of(SET, GOOD).details


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (a_cell("attention", 0.99, 0.94, seed=1), "attention >= 95% at length 16"),
        (a_cell("hybrid:4", 0.99, 0.94, seed=1), "hybrid:4 >= 95% at length 16"),
        (a_cell("ssm:16", 0.94, 0.71, seed=1), "ssm:16 >= 95% at length 2"),
        (a_cell("ssm:4", 0.99, 0.81, seed=1), "ssm:4 <= 80% at length 16"),
        (a_cell("ssm:16", 0.99, 0.0, seed=1), "more state, more kept at length 16"),
    ],
)
def test_one_seed_that_does_not_fails(bad, said):
    result = result_of(SET, [*GOOD, bad])
    assert result.passed is False
    (broken,) = problems(result.metadata)
    assert broken.startswith(said)


def test_state_that_brings_nothing_fails():
    flat = [a_cell("ssm:4", 0.99, 0.5), a_cell("ssm:16", 0.99, 0.52)]
    assert (
        "at least 10% above" in problems(result_of(SET, [*GOOD[:2], *flat]).metadata)[0]
    )


@pytest.mark.parametrize(
    ("task", "cells"), [("needle", GOOD), ("copy", GOOD[:3]), ("copy", GOOD[1:])]
)
def test_what_cannot_be_judged_is_measured(task, cells):
    assert result_of(replace(SET, task=task), cells).passed is None


def test_the_rate_with_the_least_validation_loss_counts_for_each_seed():
    cells = [
        a_cell("ssm:4", 0.9, 0.1, lr=0.1, val_loss=0.5),
        a_cell("ssm:4", 0.9, 0.2, lr=0.2, val_loss=0.4),
        a_cell("ssm:4", 0.9, 0.3, lr=0.1, val_loss=0.3, seed=1),
        a_cell("ssm:4", 0.9, 0.4, lr=0.2, val_loss=0.6, seed=1),
        a_cell("attention", 0.9, 0.5),
    ]
    got = [(c["model"], c["seed"], c["lr"]) for c in chosen(cells)]
    assert got == [("attention", 0, 0.01), ("ssm:4", 0, 0.2), ("ssm:4", 1, 0.1)]
    rows = table(result_of(SET, cells).metadata)
    assert rows[2][4:] == ["0.1 0.2", "90.0 (90.0-90.0)", "25.0 (20.0-30.0)"]


def test_the_picture_has_each_model_and_the_state_sizes_of_the_ssm():
    cells = [*GOOD, a_cell("ssm:4", 0.99, 0.2, seed=1), a_cell("lti:4", 0.2, 0.1)]
    figure = draw([result_of(SET, cells)])
    lengths, states = figure.axes
    labels = {text.get_text() for text in lengths.get_legend().get_texts()}
    assert labels == {*by_model({"cells": cells}), "guess"}
    heights = {
        line.get_label(): line.lines[0].get_ydata() for line in states.containers
    }
    np.testing.assert_allclose(heights["ssm"], [0.3, 0.7, 0.96])
    assert "2 seeds" in figure.get_suptitle()


# --- the command line


def lines(path: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_grid_goes_on_where_it_stopped_and_is_shown_whole(tmp_path, capsys):
    log, picture = tmp_path / "runs.jsonl", tmp_path / "x.png"
    where = ["--log-path", str(log), "--plot-path", str(picture)]
    assert main([*FLAGS, *where, "--no-plot"]) == 0
    assert [r["params"]["models"] for r in lines(log)] == [["attention"], ["ssm:2"]]
    assert main([*FLAGS, *where, "--seeds", "0", "1"]) == 0
    assert "2 of 4 trainings are in" in capsys.readouterr().out
    assert len(lines(log)) == 4
    assert main([*FLAGS, *where, "--seeds", "7", "--plot-only"]) == 0
    told = capsys.readouterr().out
    assert len(lines(log)) == 4
    assert f"saved {picture}" in told
    row = next(line for line in told.splitlines() if line.startswith("ssm:2"))
    assert row.split()[3] == "2"  # seeds
    assert picture.stat().st_size > 0


def test_cells_with_other_settings_are_not_mixed_in(tmp_path):
    log = RunLog(tmp_path / "runs.jsonl")
    copy_recall.train_missing(replace(TINY, models=("ssm:2",)), log)
    assert len(copy_recall.cells_in(log, TINY)) == 1
    assert copy_recall.cells_in(log, replace(TINY, steps=4)) == []


def test_nothing_to_show_is_said(tmp_path):
    with pytest.raises(SystemExit) as stop:
        main(["--plot-only", "--log-path", str(tmp_path / "none.jsonl"), "--no-plot"])
    assert stop.value.code == 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"task": "recal"}, "did you mean recall"),
        ({"models": ()}, "at least one value"),
        ({"models": ("ssm:2", "ssm:2")}, "each value once"),
        ({"models": ("atention",)}, "did you mean attention"),
        ({"models": ("ssm",)}, "try ssm:16"),
        ({"models": ("attention:4",)}, "expected attention; try attention"),
        ({"models": ("ssm:0",)}, "expected ssm:N"),
        ({"models": ("ssm:-1",)}, "expected ssm:N"),
        ({"models": ("ssm:64",), "n_params": 500}, "ssm:64 comes no nearer"),
        ({"seeds": (-1,)}, "seeds: got -1"),
        ({"lrs": (0.0,)}, "lrs: got 0.0"),
        ({"lrs": (math.nan,)}, "lrs: got nan"),
        ({"lengths": (3, 6)}, "at most vocab = 5"),
        ({"steps": 0}, "steps: got 0"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"n_test": 0}, "n_test: got 0"),
    ],
)
def test_bad_input_is_answered_in_one_line(changes, said):
    with pytest.raises(InputError, match=said) as error:
        check_options(replace(TINY, **changes))
    assert "\n" not in str(error.value)


def test_the_defaults_are_legal():
    check_options(CopyRecallOptions())
    assert len(CopyRecallOptions().cells()) == 4
    assert asdict(CopyRecallOptions().cells()[0])["models"] == ("attention",)
