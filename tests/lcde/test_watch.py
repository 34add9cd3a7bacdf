"""The hooks of a driver, left as they are and given."""

from pathlib import Path
from typing import Any

from experiments.common import ExperimentResult
from lcde._watch import Hooks, Tick, Watch


def double(number: int = 3, seed: int = 0) -> ExperimentResult:
    return ExperimentResult("double", str(seed), {"twice": 2 * number})


def test_without_hooks_every_run_is_made_and_nothing_is_kept() -> None:
    hooks = Hooks()
    assert hooks.checkpoints("any", {"number": 4}) is None
    assert not hooks.resume
    assert not hooks.done("double", {"number": 4})
    result = hooks.keep(double, {"number": 4, "seed": 7})
    assert (result.metadata, result.details) == ({"twice": 8}, "7")
    hooks.watch.on_step(Tick(1, 2, "loss"))
    hooks.watch.on_entry({})
    hooks.watch.on_notice("nothing")


def test_checkpoints_lie_in_the_folder_of_the_results(tmp_path: Path) -> None:
    place = Hooks(folder=tmp_path).checkpoints
    found = place("a run", {"size": 1, "rate": 0.1})
    assert found is not None
    assert found.parent == tmp_path / "checkpoints"
    assert found.name.startswith("a run_")
    assert not found.parent.exists()
    assert place("a run", {"rate": 0.1, "size": 1}) == found
    assert place("a run", {"size": 2, "rate": 0.1}) != found


def test_what_is_told_arrives() -> None:
    told: list[Any] = []
    watch = Watch(told.append, told.append, told.append)
    watch.on_step(Tick(1, 2, "loss"))
    watch.on_entry({"step": 1})
    watch.on_notice("a line")
    assert told == [(1, 2, "loss"), {"step": 1}, "a line"]
