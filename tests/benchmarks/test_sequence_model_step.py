"""The benchmark runs the trainer's own steps, tells them, and judges the losses."""

import json
from dataclasses import replace
from typing import Any

import pytest

from benchmarks import sequence_model_step as bench
from experiments.common import InputError


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"hidden_dim": 8, "state_dim": 4, "batch_size": 4}
    rows = {
        name: row._replace(options=replace(row.options, **small))
        for name, row in bench.ROWS.items()
    }
    monkeypatch.setattr(bench, "ROWS", rows)


def test_the_command_tells_and_stores_every_row(tmp_path, capsys):
    path = tmp_path / "report.json"
    flags = ["--steps", "8", "--blocks", "2", "--device", "cpu", "--json", str(path)]
    assert bench.main(flags) == 0
    report, printed = json.loads(path.read_text()), capsys.readouterr().out
    assert [row["row"] for row in report["rows"]] == list(bench.ROWS)
    for row in report["rows"]:
        side = row["sides"]["kernel by kernel"]
        assert f"{row['row']}, tensorfloat32, cpu: published" in printed
        assert len(side["losses"]) == bench.COMPARED
        assert 0 < side["min_s"] <= side["median_s"] <= side["max_s"]


def test_published_sizes_and_tasks_stand_in_the_rows():
    for name, row in bench.ROWS.items():
        task = bench.task_of(row.options, 6, seed=0)
        assert task.model.model_name == name.split("-")[1]
        assert len(task.train[0]) == len(task.train[1]) == 6
        if name.startswith("a5"):
            assert task.train[0].shape == (6, 20)
            assert task.auxiliary is not None
            assert task.auxiliary[0].shape == (6, 2)
        else:
            assert task.train[0].shape == (6, 100, 2)
            assert task.auxiliary is None


@pytest.mark.parametrize("bad", [2.1e-3, float("nan")])
def test_sides_that_differ_are_a_problem(bad: float):
    report: dict[str, Any] = {"precision": "tensorfloat32", "row": "a5-S4"}
    assert "losses differ" in bench.problems(report | {"difference": bad})[0]
    assert not bench.problems(report | {"difference": 1e-3})


def test_how_far_losses_are_apart_is_relative_and_the_largest():
    sides = {"a": {"losses": [1.0, 4.0]}, "b": {"losses": [1.1, 4.0]}}
    assert bench._apart(sides) == pytest.approx(0.1 / 1.1)


@pytest.mark.parametrize("wrong", [{"rows": ("a5-LSTM",)}, {"steps": 3}, {"blocks": 0}])
def test_bad_input_is_one_line(wrong: dict[str, Any]):
    with pytest.raises(InputError, match=r"rows|steps|blocks") as caught:
        next(bench.benchmark(**wrong))
    assert "\n" not in str(caught.value)
