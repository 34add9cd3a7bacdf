"""The benchmark runs, prints its tables and stores strict JSON; times are not judged.

mambapy, an extra, is played by the loop over time where it is not installed.
"""

import importlib.util
import json
from typing import Any

import pytest
import torch

from benchmarks import cpu_scan
from ssm.ops import selective_scan

TINY = ["--shapes", "2", "5", "16", "3", "1", "4", "8", "2", "--repeats", "2"]
TINY += ["--step-repeats", "2", "--batch", "2", "--length", "8", "--d-model", "8"]
TINY += ["--vocabulary", "20", "--threads", "1"]


def loop(x: cpu_scan.Operands) -> torch.Tensor:
    return selective_scan(*x, backend="naive")[0]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything in this process, so that nothing has to start or be installed."""

    def here(call: str, *arguments: object, **environment: str) -> Any:
        return getattr(cpu_scan, call)(*arguments)

    monkeypatch.setattr(cpu_scan, "in_fresh_process", here)
    if importlib.util.find_spec("mambapy") is None:
        monkeypatch.setitem(cpu_scan.SCANS, "mambapy", loop)
        monkeypatch.setattr(cpu_scan, "check_installed", lambda: None)


def test_the_command_prints_every_row_and_stores_the_report(tiny, tmp_path, capsys):
    path = tmp_path / "report.json"
    assert cpu_scan.main([*TINY, "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    printed = capsys.readouterr().out
    assert [row["D"] for row in report["scans"]] == [5, 4]
    assert printed.count("forward + backward") == 5
    for text in ("GPT-2", "Mamba (ours)", "peak memory", "does not show"):
        assert text in printed
    bound = report["memory"]["bound_bytes"]
    assert bound["states at chunk boundaries"] == 4 * 2 * 5 * 3
    assert bound["gradients"] == 4 * (2 * 2 * 16 * 5 + 2 * 2 * 16 * 3 + 5 * 3 + 5)


def test_disagreement_is_exit_status_1(tiny, monkeypatch, capsys):
    monkeypatch.setitem(cpu_scan.SCANS, "mambapy", lambda x: 1.001 * loop(x))
    assert cpu_scan.main(TINY) == 1
    assert "y differs by 1.0e-03 at (2, 5, 16, 3)" in capsys.readouterr().err


def test_a_fresh_process_measures_its_peak() -> None:
    """The gradients of u and delta alone are 2 MB."""
    shape = (1, 256, 1024, 2)
    peak = cpu_scan.in_fresh_process("peak_bytes", "ours", shape, 1, 0)
    assert 2e6 <= peak <= 40e6


@pytest.mark.parametrize("flags", [("--repeats", "0"), ("--shapes", "1", "2", "3")])
def test_faults_end_in_one_line_and_status_2(capsys, flags):
    with pytest.raises(SystemExit) as stop:
        cpu_scan.main(flags)
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
