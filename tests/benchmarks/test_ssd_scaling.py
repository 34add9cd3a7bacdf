"""The benchmark runs, prints its table and stores strict JSON; times are not judged."""

import json

import numpy as np
import pytest

from benchmarks import ssd_scaling
from experiments.kernels import largest_difference, recurrence

TINY = ["--linear-lengths", "16", "32", "64", "--kernel-lengths", "8", "16", "32"]
TINY += ["--ratio-length", "40", "--N", "2", "--d", "3", "--n-repeats", "2"]


def test_the_command_prints_every_row_and_stores_the_report(run_module, tmp_path):
    path = tmp_path / "new folder" / "report.json"
    done = run_module("benchmarks.ssd_scaling", *TINY, "--json", str(path))
    assert done.returncode == 0, done.stderr
    report = json.loads(path.read_text())
    assert len(report["scaling"]) == 5
    assert len(report["against_loop"]) == 3
    for row in [*report["scaling"], *report["against_loop"]]:
        assert (row.get("form") or row["case"]) in done.stdout
    assert done.stdout.count("time ~ T^p") == 5
    assert "does not show" in done.stdout


def test_the_loop_is_the_recurrence():
    rng = np.random.default_rng(0)
    a, b, c = rng.standard_normal((3, 30, 4)) / 2
    x = rng.standard_normal((30, 2))
    y = ssd_scaling.loop_over_time(a, b, c, x)
    assert largest_difference(y, recurrence(a, b, c, x)[0]) <= 1e-14


def test_disagreement_is_exit_status_1(monkeypatch, capsys):
    true = ssd_scaling.loop_over_time
    monkeypatch.setattr(
        ssd_scaling, "loop_over_time", lambda *abcx: true(*abcx) * (1 + 1e-6)
    )
    assert ssd_scaling.main(TINY) == 1
    assert "1.0e-06" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags", [("--n-repeats", "0"), ("--kernel-lengths", "9", "3"), ("--N", "x")]
)
def test_faults_end_in_one_line_and_status_2(run_module, flags):
    done = run_module("benchmarks.ssd_scaling", *flags)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr
