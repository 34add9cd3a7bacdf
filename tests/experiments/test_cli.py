"""One helper makes every command line: flags, help, one-line errors, outputs."""

import dataclasses
import importlib
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from experiments._cli import command_line, nearest, parameters_of, parse
from experiments.common import (
    ExperimentResult,
    InputError,
    Parameter,
    Picture,
    RunLog,
    new_figure,
)
from experiments.registry import ENTRIES

ROOT = Path(__file__).parents[2]


def run(
    n: int = 3,
    decays: tuple[complex, ...] = (0.5,),
    mode: Literal["fast", "slow"] = "fast",
    end_to_end: bool = False,
    seed: int = 0,
) -> ExperimentResult:
    """Do nothing, and say it.

    Args:
        n: a number
            on two lines
        decays: some decays
        mode: how
        end_to_end: all of it
        seed: a seed
    """
    if n < 0:
        raise InputError(f"n: got {n}; expected at least 0; try n = 1")
    if n == 99:
        raise MemoryError("Unable to allocate 7 TiB")
    if n == 77:
        raise KeyboardInterrupt
    told = {"n": n, "decays": decays, "mode": mode, "end_to_end": end_to_end}
    return ExperimentResult("fake", "done", told, n != 13)


@dataclasses.dataclass(frozen=True)
class Config:
    """The configuration.

    Attributes:
        width: how wide
        names: whose
    """

    width: int = 4
    names: list[str] = dataclasses.field(default_factory=lambda: ["a"])


def run_config(config: Config) -> ExperimentResult:
    """Run from one dataclass."""
    return ExperimentResult("fake", "", {"width": config.width, "names": config.names})


def output(capsys, *argv, run=run, **options):
    """The metadata of the record that the command line prints"""
    status = command_line(run, argv=[*argv, "--json"], **options)
    return status, json.loads(capsys.readouterr().out)["meta"]


def refused(capsys, *argv, run=run):
    with pytest.raises(SystemExit) as stop:
        command_line(run, argv=argv)
    told = capsys.readouterr().err
    assert stop.value.code == 2
    assert len(told.splitlines()) == 1, told
    return told


def module(*words):
    words = [sys.executable, "-m", *words]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True)


# --- flags


@pytest.mark.parametrize("flag", ["--end-to-end", "--end_to_end"])
def test_hyphens_and_underscores_are_alike(capsys, flag):
    assert output(capsys, flag)[1]["end_to_end"] is True


def test_negative_and_complex_values(capsys):
    words = ["--decays", "-0.5", "0.8", "0.9+0.3j", "-0.9-0.3j", "-1e-3", "--n", "0"]
    found = output(capsys, *words)[1]["decays"]
    expected = [-0.5, 0.8, 0.9 + 0.3j, -0.9 - 0.3j, -1e-3]
    assert [complex(a) for a in found] == expected


def test_a_config_dataclass_has_its_fields_as_flags(capsys):
    words = ["--width", "7", "--names", "b", "c"]
    found = output(capsys, *words, run=run_config)[1]
    assert found == {"width": 7, "names": ["b", "c"]}
    assert output(capsys, run=run_config)[1] == {"width": 4, "names": ["a"]}
    assert [p.help for p in parameters_of(run_config)] == ["how wide", "whose"]


def test_a_positional_parameter_and_an_alias():
    parameters = [
        Parameter("paths", tuple[str, ...], ("x",), positional=True),
        Parameter("plot", bool, False, aliases=("--draw",)),
    ]
    assert parse("p", "", parameters, ["a", "b"]) == {
        "paths": ("a", "b"),
        "plot": False,
    }
    assert parse("p", "", parameters, ["--draw"]) == {"paths": ("x",), "plot": True}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--end-to-ed"], "unknown flag --end-to-ed; did you mean --end-to-end?"),
        (["--N", "3"], "unknown flag --N; did you mean --n?"),
        (["--log_pth", "x"], "unknown flag --log_pth; did you mean --log-path?"),
        (["--zzzzzz"], "unknown flag --zzzzzz; see"),
        (["--n", "abc"], "'abc'"),
        (["--n", "1.5"], "'1.5'"),
        (["--n"], "--n"),
        (["--mode", "medium"], "'medium'"),
        (["--n", "-3"], "n: got -3; expected at least 0"),
        (["--n", "99"], "not enough memory (Unable to allocate 7 TiB)"),
    ],
)
def test_bad_input_is_one_line(capsys, words, said):
    assert said in refused(capsys, *words)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("t", "T"), ("T_value", "T_values"), ("seed", "seed"), ("quite else", None)],
)
def test_the_nearest_name(name, expected):
    assert nearest(name, ["T", "T_values", "seed"]) == expected


def test_an_interrupt_is_status_130_without_traceback(capsys):
    with pytest.raises(SystemExit) as stop:
        command_line(run, argv=["--n", "77"])
    assert stop.value.code == 130
    assert capsys.readouterr().err == "interrupted; what was logged before is whole\n"


# --- outputs


@pytest.mark.parametrize(
    ("n", "verdict", "code"), [("3", "PASS", 0), ("13", "FAIL", 1)]
)
def test_the_verdict_is_shown_and_is_the_status(capsys, n, verdict, code):
    assert command_line(run, argv=["--n", n]) == code
    assert capsys.readouterr().out == f"[{verdict}] fake: done\n"


def test_nothing_is_written_unless_asked(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command_line(run, argv=[]) == 0
    assert list(tmp_path.iterdir()) == []


def test_the_log_holds_every_resolved_parameter(capsys, tmp_path):
    path = str(tmp_path / "a" / "runs.jsonl")
    for seed in ("1", "2"):
        assert (
            command_line(run, argv=["--log", "--log-path", path, "--seed", seed]) == 0
        )
    first, second = RunLog(path).records()
    defaults = {"n": 3, "decays": [0.5], "mode": "fast", "end_to_end": False}
    assert first["params"] == {**defaults, "seed": 1}
    assert (first["seed"], second["seed"]) == (1, 2)
    assert first["run_id"] != second["run_id"]


def test_an_unwritable_log_is_found_before_the_work(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    worked = []

    def run() -> ExperimentResult:
        """Work."""
        worked.append(1)
        return ExperimentResult("fake", "")

    for flags in (["--log", "--log-path", str(tmp_path / "file" / "runs.jsonl")],):
        assert "cannot be written" in refused(capsys, *flags, run=run)
    assert worked == []


def test_a_picture_has_its_flags_and_its_alias(capsys, tmp_path):
    def draw(results):
        figure, axes = new_figure()
        axes[0, 0].plot([result.metadata["n"] for result in results])
        return figure

    picture = Picture(draw, str(tmp_path / "x.png"), alias="exp4-plot")
    target = tmp_path / "deep" / "y.svg"
    words = ["--exp4-plot", "--exp4-plot-path", str(target)]
    assert command_line(run, pictures=[picture], argv=words) == 0
    assert target.read_text().startswith("<?xml")
    assert command_line(run, pictures=[picture], argv=["--plot"]) == 0
    assert (tmp_path / "x.png").exists()
    assert command_line(run, pictures=[picture], argv=["--no-plot"]) == 0


# --- real processes


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.module)
def test_help_is_status_0_and_tells_every_flag(entry, monkeypatch, capsys):
    """As ``python -m`` runs the module, but here: an import of PyTorch takes long."""
    if not (ROOT / f"{entry.module.replace('.', '/')}.py").exists():
        pytest.fail(f"{entry.module} is registered but absent")
    monkeypatch.setattr(sys, "argv", [entry.module, "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(entry.module, run_name="__main__", alter_sys=True)
    out, err = capsys.readouterr()
    assert (stop.value.code, err) == (0, "")
    for parameter in parameters_of(importlib.import_module(entry.module).run):
        assert f"--{parameter.name.replace('_', '-')}" in out
        assert parameter.help, f"{parameter.name} has no help"
    assert "--log-path" in out


@pytest.mark.parametrize(
    "name",
    [
        "experiments.run_and_log",
        "experiments.check_logs",
        "experiments.verify_ssd",
        "lcde.sm_a5",
    ],
)
def test_help_in_a_process_is_status_0_and_says_nothing_else(name):
    done = module(name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"usage: python -m {name}" in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--T", "0"], "T: got 0"),
        (["--T", "-3"], "T: got -3"),
        (["--T", "abc"], "'abc'"),
        (["--a", "nan"], "a: got nan"),
        (["--a", "inf"], "a: got inf"),
        (["--a", "2", "--T", "2000"], "a: got 2.0"),
        (["--t", "3"], "did you mean --T?"),
        (["--seed", "-1"], "seed: got -1"),
    ],
)
def test_faults_of_a_real_command(words, said):
    done = module("experiments.exp1_scalar_equivalence", *words)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_sequence_of_one_step_means_something():
    assert module("experiments.exp1_scalar_equivalence", "--T", "1").returncode == 0


def test_the_command_in_the_record_can_be_typed_again():
    words = ["experiments.exp1_scalar_equivalence", "--a", "-0.5", "--json"]
    record = json.loads(module(*words).stdout)
    assert record["command"] == f"python -m {' '.join(words)}"


def test_bad_input_is_the_same_line_where_boxes_are_drawn_in_ascii():
    command = [sys.executable, "-m", "experiments.exp1_scalar_equivalence"]
    lines = {
        subprocess.run(
            [*command, "--T", "many"],
            cwd=ROOT,
            env=os.environ | {"PYTHONIOENCODING": encoding},
            capture_output=True,
            text=True,
            check=False,
        ).stderr
        for encoding in ("utf-8", "ascii")
    }
    (line,) = lines
    assert line.startswith("error: Error parsing --T: invalid literal"), line
