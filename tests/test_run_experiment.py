"""Document 2's command: settings, narrowing, one log, and what was interrupted."""

import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from experiments.common import ExperimentResult, InputError, parse_line
from lcde._watch import Hooks, Tick
from lcde.config import LCDEA5Config, LCDEToyConfig, SMA5Config, SMToyConfig
from run_experiment import DRIVERS, estimate, main
from tests.conftest import ROOT

TOY = ["-m", "LCDE", "-e", "toy"]
A5 = ["-m", "LCDE", "-e", "A5"]
SM_TOY = ["-m", "SequenceModel", "-e", "toy"]
SM_A5 = ["-m", "SequenceModel", "-e", "A5"]
EVERY = (TOY, A5, SM_TOY, SM_A5)
Refuse = Callable[[Sequence[str]], str]


@dataclass(frozen=True)
class Options:
    """What an elementary run of the fake drivers takes."""

    length: int
    seed: int


class Fake:
    """A driver of three elementary runs; ``stop_at`` interrupts before that one."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.calls: list[tuple[Any, int, Hooks]] = []
        self.ran: list[Options] = []
        self.stop_at: int | None = None
        self.passed: bool | None = None

    def run(self, options: Options) -> ExperimentResult:
        if len(self.ran) == self.stop_at:
            raise KeyboardInterrupt
        hooks = self.calls[-1][2]
        hooks.watch.on_step(Tick(1, 2, "loss 1"))
        hooks.watch.on_entry({"step": 2, "val_rmse": 0.25, "curve": [1, 2]})
        hooks.watch.on_notice("a word")
        self.ran.append(options)
        meta = {"length": options.length, "rmse": 0.5}
        details = f"length {options.length} gave 0.5"
        return ExperimentResult(self.name, details, meta, self.passed)

    def __call__(self, config: Any, *, seed: int, hooks: Hooks) -> list[Any]:
        self.calls.append((config, seed, hooks))
        results = []
        for length in (3, 4, 5):
            options = {"length": length, "seed": seed}
            hooks.done(self.name, options)
            results.append(hooks.keep(self.run, options))
        return results


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Fake]:
    """Drivers that run at once, in the places of the four."""
    made = {}
    for driver in DRIVERS.values():
        made[driver.name] = Fake(driver.name)
        module = SimpleNamespace(**{driver.function: made[driver.name]})
        monkeypatch.setitem(sys.modules, driver.module, module)
    models = SimpleNamespace(MODELS=("S4", "S5", "Mamba", "RNN", "Transformer"))
    monkeypatch.setitem(sys.modules, "lcde.torch_sequence_models", models)
    return made


@pytest.fixture
def refuse(capsys: pytest.CaptureFixture[str]) -> Refuse:
    """The one line with which a command line is refused."""

    def refused(words: Sequence[str]) -> str:
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2
        line = capsys.readouterr().err
        assert line.startswith("error: ")
        assert line.count("\n") == 1
        return line

    return refused


def into(folder: Path, words: Sequence[str]) -> list[str]:
    return [*words, "--results-dir", str(folder)]


def logged(folder: Path) -> list[dict[str, Any]]:
    return [parse_line(x) for x in (folder / "runs.jsonl").read_text().splitlines()]


# --- the four drivers -----------------------------------------------------------------


@pytest.mark.parametrize("words", EVERY, ids=lambda words: " ".join(words))
def test_each_command_calls_its_driver_with_the_published_settings(
    words: list[str],
    fakes: dict[str, Fake],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    driver = DRIVERS[words[1], words[3]]
    assert main(into(tmp_path, words)) == 0
    ((config, seed, hooks),) = fakes[driver.name].calls
    assert config == driver.config()
    assert seed == 2345
    assert hooks.folder == tmp_path
    assert hooks.resume
    assert sum(len(fake.calls) for fake in fakes.values()) == 1
    out, err = capsys.readouterr()
    assert f"log: {tmp_path / 'runs.jsonl'}" in out
    assert f"figure: python -m {driver.figure} --results-dir {tmp_path}" in out
    assert "(0 s) length 4 gave 0.5" in out
    assert "step 2  val_rmse 0.25\n" in err
    assert "note: a word\n" in err


def test_quick_and_a_file_of_ones_own_set_other_values(
    fakes: dict[str, Fake], tmp_path: Path
) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("runs: 3\nhidden_dim: 7\n")
    for words in (["--quick"], ["-c", str(own), "-s", "11"]):
        assert main(into(tmp_path, [*TOY, *words])) == 0
    (quick, _, _), (mine, seed, _) = fakes["lcde_toy"].calls
    assert quick.n_train < LCDEToyConfig().n_train
    assert mine == LCDEToyConfig(runs=3, hidden_dim=7)
    assert seed == 11


def test_a_records_are_those_of_runs_and_found_again(
    fakes: dict[str, Fake], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = fakes["lcde_a5"]
    assert main(into(tmp_path, A5)) == 0
    first = capsys.readouterr().out
    records = logged(tmp_path)
    assert [record["params"] for record in records] == [
        {"length": length, "seed": 2345} for length in (3, 4, 5)
    ]
    assert [record["experiment"] for record in records] == ["lcde_a5"] * 3
    assert main(into(tmp_path, A5)) == 0
    assert len(fake.ran) == 3
    assert logged(tmp_path) == records
    again = capsys.readouterr().out
    assert again.count("(in the log) length") == 3
    assert first.partition("┏")[2] == again.partition("┏")[2]  # the same table
    assert main(into(tmp_path, [*A5, "--seed", "1"])) == 0
    assert len(fake.ran) == 6


def test_without_resumption_runs_are_repeated_under_ids_of_their_own(
    fakes: dict[str, Fake], tmp_path: Path
) -> None:
    for _ in range(3):
        assert main(into(tmp_path, [*A5, "--no-resume"])) == 0
    assert len(fakes["lcde_a5"].ran) == 9
    assert len({record["run_id"] for record in logged(tmp_path)}) == 9
    assert not fakes["lcde_a5"].calls[-1][2].resume
    assert main(into(tmp_path, A5)) == 0
    assert len(fakes["lcde_a5"].ran) == 9


def test_an_interrupted_command_goes_on(
    fakes: dict[str, Fake], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = fakes["lcde_a5"]
    fake.stop_at = 1
    with pytest.raises(SystemExit) as stop:
        main(into(tmp_path, A5))
    assert stop.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("interrupted; what")
    assert len(logged(tmp_path)) == 1
    fake.stop_at = None
    assert main(into(tmp_path, A5)) == 0
    assert [options.length for options in fake.ran] == [3, 4, 5]
    assert len(logged(tmp_path)) == 3


def test_a_claim_that_fails_is_the_exit_status(
    fakes: dict[str, Fake], tmp_path: Path
) -> None:
    fakes["lcde_toy"].passed = False
    for _ in range(2):  # also where the run is only found in the log
        assert main(into(tmp_path, TOY)) == 1


# --- what it will take ----------------------------------------------------------------


def test_what_it_will_take_is_said_first(
    fakes: dict[str, Fake], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(into(tmp_path, [*SM_TOY, "--dry-run"])) == 0
    out = capsys.readouterr().out
    assert 'model_names: ["S4", "Mamba"]' in out
    assert "seed: 2345" in out
    # 5 seeds x 2 models x 2 dimensions x 3 kinds; 401 epochs of 80,000 / 32 batches
    assert "# 60 runs of at most 1,002,500 steps" in out
    assert "7 days at 10 ms each" in out  # 60.15e6 x 0.01 s = 6.96 days
    assert not list(tmp_path.iterdir())
    assert not any(fake.calls for fake in fakes.values())


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (LCDEToyConfig(), "10 runs; each solves 100,000 paths"),
        (LCDEToyConfig(runs=1, input_dims=(3,)), "1 run; each solves"),
        (LCDEA5Config(), "14 runs of at most 1,000,000 steps; each stops once its"),
        (SMA5Config(), "at most 68 runs of at most 1,000,000 steps"),
        (SMA5Config(max_steps=50, lengths=(3,)), "at most 16 runs of at most 50 steps"),
        (SMA5Config(max_steps=10**9), "at most 1,000,000 steps"),
        (SMToyConfig(n_train=33, num_epochs=2), "60 runs of at most 4 steps"),
    ],
)
def test_estimates_count_runs_and_steps(config: Any, said: str) -> None:
    (driver,) = (each for each in DRIVERS.values() if each.config is type(config))
    assert said in estimate(driver.plan(config))


@pytest.mark.parametrize(("n_lengths", "n_depths"), [(1, 1), (1, 3), (3, 1), (3, 3)])
def test_no_outcome_of_a5_takes_more_runs_than_said(
    n_lengths: int, n_depths: int
) -> None:
    """Every outcome: the index of the first depth that passes, at each length."""
    config = SMA5Config(
        model_names=("S4",),
        lengths=tuple(range(3, 3 + n_lengths)),
        depths=tuple(range(1, 1 + n_depths)),
    )
    taken = []
    for firsts in itertools.product(range(n_depths + 1), repeat=n_lengths):
        tried, lowest = 0, 0
        for first in firsts:
            passes = max(first, lowest)
            tried += min(passes + 1, n_depths) - lowest
            lowest = passes
        taken.append(tried)
    plan = DRIVERS["SequenceModel", "A5"].plan(config)
    assert plan.runs == max(taken)


# --- narrowing ------------------------------------------------------------------------

PAIRS = "depth_nonlinears"
NARROWED: list[tuple[list[str], dict[str, Any]]] = [
    ([*SM_A5, "-n", "S5"], {"model_names": ("S5",)}),
    ([*SM_A5, "--name", "RNN", "S4"], {"model_names": ("RNN", "S4")}),
    ([*SM_A5, "-l", "5", "-d", "2"], {"lengths": (5,), "depths": (2,)}),
    ([*A5, "-l", "3", "20"], {"lengths": (3, 20)}),
    ([*TOY, "-i", "3"], {"input_dims": (3,)}),
    ([*SM_TOY, "--input_dim", "2"], {"input_dims": (2,)}),
    ([*SM_TOY, "-d", "2"], {PAIRS: ((2, True), (2, False))}),
    ([*SM_TOY, "-nl", "False"], {PAIRS: ((2, False), (1, False))}),
    ([*SM_TOY, "-d", "1", "-nl", "yes"], {PAIRS: ((1, True),)}),
    ([*SM_TOY, "-d", "3", "4", "-nl", "0"], {PAIRS: ((3, False), (4, False))}),
]


@pytest.mark.parametrize(("words", "changes"), NARROWED, ids=lambda x: str(x)[28:60])
def test_flags_narrow_the_settings(
    words: list[str], changes: dict[str, Any], fakes: dict[str, Fake], tmp_path: Path
) -> None:
    driver = DRIVERS[words[1], words[3]]
    assert main(into(tmp_path, words)) == 0
    ((config, _, _),) = fakes[driver.name].calls
    assert config == replace(driver.config(), **changes)


WRONG: list[tuple[list[str], list[str]]] = [
    (
        [*SM_A5, "-n", "mambo"],
        ["--name: got ('mambo',)", "from S4, S5, ", "mean Mamba?"],
    ),
    ([*A5, "-l", "1"], ["--length: got (1,)", "of at least 2"]),
    ([*A5, "-l", "three"], ["-l/--length", "'three'"]),
    ([*A5, "-d", "2"], ["--depth: got (2,); expected no --depth with -m LCDE -e A5"]),
    ([*TOY, "-n", "S4"], ["expected no --name with -m LCDE -e toy; leave it out"]),
    ([*SM_TOY, "-l", "3"], ["expected no --length with -m SequenceModel -e toy"]),
    ([*SM_A5, "-nl", "True"], ["expected no --nonlinear with -m SequenceModel -e A5"]),
    ([*SM_TOY, "-nl", "maybe"], ["--nonlinear: got 'maybe'; expected True or False"]),
    ([*SM_TOY, "-d", "7"], ["--depth: got (7,)", "together for another"]),
    ([*TOY, "-i", "4"], ["--input-dim: got (4,)", "equal to 2 or 3"]),
    ([*TOY, "-s", "-1"], ["--seed: got -1"]),
    ([*TOY, "-c", "no.yaml"], ["no.yaml: cannot be read (No such file"]),
    ([*TOY, "-c", "no.yaml", "--quick"], ["either --quick or --config"]),
    (["-m", "LCDE", "-e", "A6"], ["'A6'", "'toy', 'A5'"]),
    (["-m", "lcde", "-e", "A5"], ["'lcde'", "'LCDE', 'SequenceModel'"]),
    (["-m", "LCDE"], ["experiment"]),
    ([*TOY, "--lenght", "3"], ["--lenght", "did you mean --length?"]),
]


@pytest.mark.parametrize(("words", "said"), WRONG, ids=lambda x: " ".join(x)[-30:])
def test_bad_flags_are_one_line_and_nothing_is_written(
    words: list[str],
    said: list[str],
    fakes: dict[str, Fake],
    refuse: Refuse,
    tmp_path: Path,
) -> None:
    line = refuse(into(tmp_path / "out", words))
    for text in said:
        assert text in line
    assert not (tmp_path / "out").exists()
    assert not any(fake.calls for fake in fakes.values())


def test_a_bad_file_is_named_and_its_key(
    fakes: dict[str, Fake], refuse: Refuse, tmp_path: Path
) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("num_step: 3\n")
    line = refuse(into(tmp_path / "out", [*A5, "-c", str(own)]))
    assert f"{own}: key: got 'num_step'" in line
    assert "did you mean num_steps?" in line
    assert not (tmp_path / "out").exists()


def test_bad_data_found_by_a_driver_is_one_line_too(
    fakes: dict[str, Fake], refuse: Refuse, tmp_path: Path, monkeypatch: Any
) -> None:
    def bad(_: Options) -> ExperimentResult:
        raise InputError("data_2.npy: holds NaN; expected numbers; generate it again")

    monkeypatch.setattr(fakes["lcde_toy"], "run", bad)
    assert "data_2.npy: holds NaN" in refuse(into(tmp_path, TOY))
    assert logged(tmp_path) == []


def test_a_log_that_is_none_is_left_alone(
    fakes: dict[str, Fake], refuse: Refuse, tmp_path: Path
) -> None:
    log = tmp_path / "runs.jsonl"
    log.write_text("my notes\n")
    assert "expected a run log" in refuse(into(tmp_path, TOY))
    assert log.read_text() == "my notes\n"
    assert not fakes["lcde_toy"].calls


# --- installations --------------------------------------------------------------------


@pytest.mark.parametrize(("words", "package"), [(TOY, "jax"), (SM_A5, "torch")])
def test_a_missing_extra_is_named(
    words: list[str],
    package: str,
    fakes: dict[str, Fake],
    refuse: Refuse,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = DRIVERS[words[1], words[3]]
    monkeypatch.delitem(sys.modules, driver.module)
    monkeypatch.setitem(sys.modules, package, None)  # imports of it fail
    line = refuse(into(tmp_path, words))
    assert f"without {package}" in line
    assert f"the extra '{package}'; run `uv run --extra all python" in line


def test_an_import_that_fails_for_another_reason_is_not_hidden(
    fakes: dict[str, Fake], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: Options) -> ExperimentResult:
        raise ModuleNotFoundError("No module named 'lcde.gone'", name="lcde.gone")

    monkeypatch.setattr(fakes["lcde_toy"], "run", broken)
    with pytest.raises(ModuleNotFoundError):
        main(into(tmp_path, TOY))


# --- the real drivers, very small -----------------------------------------------------


def run_twice(
    folder: Path, words: Sequence[str], config: dict[str, Any], *, data: str, not_: str
) -> str:
    """What the command prints, in a process that must not import ``not_``."""
    (folder / "tiny.yaml").write_text(json.dumps(config))
    command = [*words, "-c", "tiny.yaml", "--results-dir", "."]
    program = (
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{data}\n"
        "import run_experiment\n"
        f"assert run_experiment.main({command}) == 0\n"
        f"assert run_experiment.main({command}) == 0\n"
        f"assert {not_!r} not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_random_linear_cde_runs_and_imports_no_torch(tmp_path: Path) -> None:
    data = (
        "from data_dir.toy import ToyOptions, generate_toy\n"
        "generate_toy(ToyOptions(dimensions=(2,), n_paths=60, length=7, seed=1))"
    )
    tiny = {"runs": 2, "hidden_dim": 8, "input_dims": [2], "n_train": 40, "n_val": 20}
    out = run_twice(tmp_path, TOY, tiny, data=data, not_="torch")
    assert "# 2 runs; each solves 60 paths" in out
    records = logged(tmp_path)
    assert [record["seed"] for record in records] == [2345, 2346]
    found = [record["meta"]["rmse"] for record in records]
    assert 0 < min(found) < max(found) < 3 * records[0]["meta"]["rmse_zero"]


def test_sequence_models_try_depths_and_import_no_jax(tmp_path: Path) -> None:
    data = (
        "from data_dir.word_problem import WordOptions, generate_words\n"
        "generate_words(WordOptions(length=(2, 3), samples=300))"
    )
    tiny = {
        "model_names": ["RNN"],
        "lengths": [3],
        "depths": [1, 2],
        "hidden_dim": 4,
        "state_dim": 2,
        "max_steps": 2,
        "eval_every": 1,
        "samples": 300,
    }
    out = run_twice(tmp_path, SM_A5, tiny, data=data, not_="jax")
    assert "# at most 2 runs of at most 2 steps" in out
    assert out.count("(in the log)") == 2
    found = [(r["meta"]["depth"], r["meta"]["reached"]) for r in logged(tmp_path)]
    assert found == [(1, False), (2, False)]  # two steps teach nothing
