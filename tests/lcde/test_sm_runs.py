"""Both experiments with sequence models as commands: kept, killed, resumed."""

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from data_dir.word_problem import load_words
from experiments.common import execute, parse_line
from lcde import sm_a5, sm_toy
from lcde._sm_runs import keep
from lcde._watch import Hooks, Tick, Watch

Meta = dict[str, Any]


def write_paths(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for name, shape in (("data", (60, 5, 2)), ("labels", (60,))):
        np.save(folder / f"{name}_2.npy", rng.uniform(-1, 1, shape).astype("f4"))
    return folder


def write_words(folder: Path) -> Path:
    for length in (2, 3):
        load_words(length, group="S3", folder=str(folder))
    return folder


class Case:
    """An experiment with its tiny settings, on data in a folder of its own."""

    def __init__(self, module: ModuleType, folder: Path, **settings: Any) -> None:
        self.module = module
        self.settings: Meta = {"hidden_dim": 6, "state_dim": 2, "num_epochs": 3}
        self.settings |= {"learning_rate": 1e-2, "device": "cpu"} | settings
        self.settings |= {"data_dir": str(folder)}

    def options(self, **changed: Any) -> Any:
        return self.module.COMMAND.options(**self.settings | changed)

    def words(self, folder: Path, *more: str, **changed: Any) -> list[str]:
        given = {**self.settings, **changed, "results_dir": folder}
        flags = [[f"--{k.replace('_', '-')}", str(v)] for k, v in given.items()]
        return [word for flag in flags for word in flag] + list(more)


@pytest.fixture(scope="module", params=["sm_toy", "sm_a5"])
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Case:
    folder = tmp_path_factory.mktemp(request.param) / "data"
    if request.param == "sm_toy":
        sizes = {"n_train": 30, "n_val": 13, "batch_size": 7, "eval_every": 2}
        return Case(sm_toy, write_paths(folder), model="S4", **sizes)
    sizes = {"batch_size": 64, "eval_every": 2}
    return Case(sm_a5, write_words(folder), model="RNN", group="S3", **sizes)


def told(meta: Meta) -> Meta:
    """What a run found, without what the clock says."""
    entries = [{k: v for k, v in e.items() if k != "seconds"} for e in meta["curve"]]
    return meta | {"curve": entries}


def records(folder: Path) -> list[Meta]:
    text = (folder / "runs.jsonl").read_text()
    return [parse_line(line) for line in text.splitlines()]


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_run_is_quiet_and_writes_nothing(
    case: Case,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = torch.get_rng_state()
    result = case.module.run(case.options())
    assert torch.equal(torch.get_rng_state(), before)
    assert result.name == case.module.NAME
    assert files(tmp_path) == []
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "")
    json.dumps(result.metadata, allow_nan=False)
    assert result.metadata["n_params"] > 100
    assert result.metadata["backends"] or case.settings["model"] == "RNN"


def test_the_command_leaves_a_record_a_picture_and_checkpoints(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = case.module
    assert module.main(case.words(tmp_path, "--plot")) == 0
    said = capsys.readouterr()
    (record,) = records(tmp_path)
    curve = record["meta"]["curve"]
    assert said.err == ""
    lines = said.out.splitlines()
    assert len(lines) == len(curve) + 2
    for line, entry in zip(lines, curve, strict=False):
        assert line.split()[:2] == ["step", str(entry["step"])]
    assert lines[-2] == record["details"]
    assert record["experiment"] == module.NAME
    assert record["params"] == asdict(case.options())
    assert told(record["meta"]) == told(module.run(case.options()).metadata)
    assert module.problems(record["meta"]) == []
    name = module.run_name(case.options())
    assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    kept = sorted((tmp_path / "checkpoints" / name).iterdir())
    assert len(kept) == 2
    assert kept[-1].name == f"checkpoint-{curve[-1]['step']:08d}"


def test_a_run_out_of_time_is_logged_and_goes_on_later(
    case: Case,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def main(*more: str) -> int:
        return int(case.module.main(case.words(tmp_path, *more)))

    with monkeypatch.context() as patch:  # a minute between two looks at the clock
        clock = itertools.count(0, 60)
        patch.setattr("lcde._sm_runs.time.monotonic", lambda: next(clock))
        assert main("--max-seconds", "70") == 0  # two evaluations
    assert main("--resume") == 0
    part, whole = (record["meta"] for record in records(tmp_path))
    reference = case.module.run(case.options()).metadata
    assert told(whole) == told(reference)
    assert part["steps"] == part["curve"][-1]["step"] < reference["steps"]
    assert told(part)["curve"] == told(reference)["curve"][:2]
    assert "going on from" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main("--max-seconds", "-1")
    assert "max_seconds: got -1" in capsys.readouterr().err


class KilledError(Exception):
    """By the test."""


@pytest.mark.parametrize("resume", [True, False])
def test_a_killed_run_goes_on_to_the_same_numbers(
    case: Case, resume: bool, tmp_path: Path
) -> None:
    whole = case.module.run(case.options())
    steps: list[Tick] = []
    notices: list[str] = []

    def watch(at: Tick) -> None:
        steps.append(at)
        if len(steps) == whole.metadata["steps"] - 1:
            raise KilledError

    heard = Watch(on_step=watch, on_notice=notices.append)
    with pytest.raises(KilledError):
        case.module.train(case.options(), tmp_path, resume=False, watch=heard)
    result = case.module.train(case.options(), tmp_path, resume=resume, watch=heard)
    assert told(result.metadata) == told(whole.metadata)
    first = steps[whole.metadata["steps"] - 1].step
    evaluated = [e["step"] for e in whole.metadata["curve"]]
    saved = max(step for step in evaluated if step < whole.metadata["steps"] - 1)
    assert first == (saved + 1 if resume else 1)
    assert [f"{n}".partition(" ")[0] for n in notices] == ["going"] * resume
    assert "loss" in steps[0].text
    assert {at.steps for at in steps} == {whole.metadata["steps"]}


def test_a_finished_run_is_reported_again(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert case.module.main(case.words(tmp_path)) == 0
    assert case.module.main(case.words(tmp_path, "--resume")) == 0
    first, again = records(tmp_path)
    assert first["meta"]["curve"] == again["meta"]["curve"]
    assert "going on from" in capsys.readouterr().err


@pytest.fixture
def refusal(
    case: Case, capsys: pytest.CaptureFixture[str]
) -> Callable[[Sequence[str]], str]:
    def of(words: Sequence[str]) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            case.module.main(words)
        said = capsys.readouterr()
        assert stop.value.code == 2
        assert said.out == ""
        assert said.err.startswith("error: ")
        assert len(said.err.splitlines()) == 1
        return said.err

    return of


def test_bad_input_is_one_line_and_nothing_is_written(
    case: Case, tmp_path: Path, refusal: Callable[[Sequence[str]], str]
) -> None:
    wrong = [
        ({"model": "RNNN"}, "did you mean RNN"),
        ({"num_epochs": "many"}, "--num-epochs"),
        ({"leraning_rate": 0.1}, "unknown flag --leraning-rate"),
        ({"device": "abacus"}, "device: got 'abacus'"),
        ({"seed": -1}, "seed: got -1"),
    ]
    for changed, said in wrong:
        assert said in refusal(case.words(tmp_path, **changed))
    assert not (tmp_path / "checkpoints").exists()
    assert {name for name in files(tmp_path) if "lock" not in name} <= {"runs.jsonl"}
    assert (tmp_path / "runs.jsonl").read_text() == ""


def test_other_settings_and_other_data_are_not_resumed(
    case: Case, tmp_path: Path, refusal: Callable[[Sequence[str]], str]
) -> None:
    assert case.module.main(case.words(tmp_path)) == 0
    line = refusal(case.words(tmp_path, "--resume", learning_rate=0.5))
    assert "learning_rate: 0.01 then, 0.5 now" in line
    fewer = "n_train" if case.module is sm_toy else "samples"
    line = refusal(case.words(tmp_path, "--resume", **{fewer: 20}))
    assert "data_sha256" in line


def test_a_picture_that_cannot_be_written_fails_before_the_training(
    case: Case, tmp_path: Path, refusal: Callable[[Sequence[str]], str]
) -> None:
    (tmp_path / f"{case.module.run_name(case.options())}.png").mkdir(parents=True)
    assert "cannot be written" in refusal(case.words(tmp_path, "--plot"))
    assert not (tmp_path / "checkpoints").exists()


def test_a_driver_keeps_checkpoints_apart_by_settings(
    case: Case, tmp_path: Path
) -> None:
    """And goes on from those of the same settings."""
    steps: list[Tick] = []
    notices: list[str] = []
    watch = Watch(on_step=steps.append, on_notice=notices.append)
    hooks = Hooks(folder=tmp_path, resume=True, watch=watch)

    def kept(**changed: Any) -> Meta:
        return keep(case.module.train, "a", case.options(**changed), hooks).metadata

    first = kept()
    count = len(steps)
    assert count == first["steps"]
    assert not notices  # that there is nothing to resume goes without saying
    assert kept()["curve"] == first["curve"]
    assert len(steps) == count
    assert len(notices) == 1
    assert kept(learning_rate=0.5)["curve"] != first["curve"]
    assert len([*(tmp_path / "checkpoints").iterdir()]) == 2
    hooks = Hooks()
    assert told(kept()) == told(first)


def test_the_kept_run_takes_its_options_by_name(case: Case) -> None:
    """As every runner calls it."""
    seen: list[Meta] = []

    def hold(run: Any, values: Meta) -> Any:
        seen.append(values)
        result, record = execute(run, values)
        assert record["params"] == values
        return result

    keep(case.module.train, "a", case.options(), Hooks(keep=hold))
    assert seen == [asdict(case.options())]
