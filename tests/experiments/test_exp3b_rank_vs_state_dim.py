"""Experiment 3b: the curves on and off the line y = N, and why."""

import json

import numpy as np
import pytest

from experiments import exp3b_rank_vs_state_dim as exp3b

MODULE = "experiments.exp3b_rank_vs_state_dim"


@pytest.fixture(scope="module")
def result():
    return exp3b.run(T=63, N_values=(4, 10, 12, 16, 32, 36), seeds=(0, 1))


def test_exact_and_well_conditioned_curves_stay_on_the_line(result):
    assert result.passed
    for row in result.metadata["rows"]:
        assert row["spaced_exact"] == [min(row["N"], 32)] * 2
        assert row["unity_float"] == [min(row["N"], 32)] * 2


def test_spaced_real_decays_leave_it_near_12_because_of_their_singular_values(result):
    for row in result.metadata["rows"]:
        on_the_line = row["spaced_float_mean"] == row["N"]
        assert on_the_line == (row["N"] <= 10)
        assert on_the_line == (row["sigma_ratio"] > exp3b.TOLERANCE)
    assert "off the line by N = 12" in result.details


def test_means_and_deviations_are_those_of_the_seeds(result):
    for row in result.metadata["rows"]:
        for curve in exp3b.CURVES:
            assert row[f"{curve}_mean"] == pytest.approx(np.mean(row[curve]))
            assert row[f"{curve}_std"] == pytest.approx(np.std(row[curve]))


@pytest.mark.parametrize("T", [1, 2, 7])
def test_short_sequences_pass(T):
    assert exp3b.run(T=T, N_values=(1, 2, 5), seeds=(4,)).passed


@pytest.mark.parametrize("curve", ["spaced_exact", "unity_float"])
def test_a_forged_record_is_found(result, curve):
    forged = json.loads(json.dumps(result.metadata))
    assert exp3b.problems(forged) == []
    forged["rows"][0][curve][1] -= 1
    assert len(exp3b.problems(forged)) == 1


def test_a_perturbed_kernel_fails(monkeypatch):
    kernel = exp3b.ssm_kernel

    def perturbed(*args):
        M = kernel(*args)
        return M * (1 + 1e-6 * np.random.default_rng(0).standard_normal(M.shape))

    monkeypatch.setattr(exp3b, "ssm_kernel", perturbed)
    assert exp3b.run(T=15, N_values=(2, 4), seeds=(0,)).passed is False


def test_the_picture_is_drawn_by_default(tmp_path, run_module):
    path = tmp_path / "ranks.png"
    flags = f"--T 15 --N-values 2 4 --seeds 0 --plot-path {path}".split()
    done = run_module(MODULE, *flags)
    assert done.returncode == 0, done.stderr
    assert path.read_bytes().startswith(b"\x89PNG")
    assert exp3b.PICTURES[0].path == "outputs/exp3b_rank_vs_state_dim.png"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--T 0", "T: got 0"),
        ("--N-values 4 2", "N_values: got (4, 2)"),
        ("--N-values", "N_values: got ()"),
        ("--seeds", "seeds: got ()"),
        ("--plot-path {file}/x.png", "x.png"),
    ],
)
def test_faults_are_one_line(flags, words, tmp_path, run_module):
    (tmp_path / "file").write_text("a regular file")
    argv = flags.format(file=tmp_path / "file").split()
    done = run_module(MODULE, *argv)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr
