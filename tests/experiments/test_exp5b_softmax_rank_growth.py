"""Experiment 5b: statistics over seeds, both pictures, faults."""

import json

import numpy as np
import pytest

from experiments import exp5_softmax_rank_growth as exp5
from experiments import exp5b_softmax_rank_growth as exp5b

MODULE = "experiments.exp5b_softmax_rank_growth"


@pytest.fixture(scope="module")
def result():
    return exp5b.run(T_values=(20, 40, 60), d_k=8, N=5, seeds=(4, 7, 9))


def test_every_seed_is_that_of_experiment_5(result):
    assert result.passed
    for seed, rows in zip((4, 7, 9), result.metadata["rows_by_seed"], strict=True):
        assert rows == exp5.run((20, 40, 60), 8, 5, seed).metadata["rows"]


def test_means_deviations_and_gaps(result):
    for index, row in enumerate(result.metadata["rows"]):
        T = row["T"]
        for rank in exp5b.RANKS:
            values = [rows[index][rank] for rows in result.metadata["rows_by_seed"]]
            most = T if rank == "softmax_ordinary" else (T + 1) // 2
            assert row[f"{rank}_mean"] == pytest.approx(np.mean(values))
            assert row[f"{rank}_std"] == pytest.approx(np.std(values))
            assert row[f"{rank}_gap"] == pytest.approx(most - np.mean(values))
        assert row["softmax_semiseparable_exact_gap"] == 0


def test_a_forged_record_is_found(result):
    forged = json.loads(json.dumps(result.metadata))
    assert exp5b.problems(forged) == []
    forged["rows_by_seed"][1][2]["uniform_semiseparable"] = 2
    assert len(exp5b.problems(forged)) == 1
    assert exp5b.problems(forged)[0].startswith("seed 7: ")


def test_a_perturbed_kernel_fails(monkeypatch):
    kernel = exp5.causal_softmax

    def perturbed(logits):
        M = kernel(logits)
        return M * (1 + 1e-6 * np.random.default_rng(0).standard_normal(M.shape))

    monkeypatch.setattr(exp5, "causal_softmax", perturbed)
    assert exp5b.run(T_values=(20, 40), d_k=8, N=4, seeds=(0,)).passed is False


def test_both_pictures_are_drawn_by_default(tmp_path, run_module):
    growth, gap = tmp_path / "growth.png", tmp_path / "gap.pdf"
    flags = ["--T-values", 10, 20, "--N", 3, "--seeds", 0, 1]
    paths = ["--plot-path", growth, "--gap-plot-path", gap]
    done = run_module(MODULE, *flags, *paths)
    assert done.returncode == 0, done.stderr
    assert growth.read_bytes().startswith(b"\x89PNG")
    assert gap.read_bytes().startswith(b"%PDF")
    assert [(picture.flag, picture.path) for picture in exp5b.PICTURES] == [
        ("plot", "outputs/exp5b_rank_growth.png"),
        ("gap-plot", "outputs/exp5b_rank_growth_gap.png"),
    ]


def test_the_band_is_one_deviation_wide(result):
    ordinary = exp5b.draw([result]).axes[1]
    rows = result.metadata["rows"]
    heights = ordinary.collections[0].get_paths()[0].vertices[:, 1]
    means = np.array([row["softmax_ordinary_mean"] for row in rows])
    spread = np.array([row["softmax_ordinary_std"] for row in rows])
    assert heights.max() == pytest.approx((means + spread).max())
    assert heights.min() == pytest.approx((means - spread).min())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--T-values 30 15", "T_values: got (30, 15)"),
        ("--T-values", "T_values: got ()"),
        ("--d-k 0", "d_k: got 0"),
        ("--seeds", "seeds: got ()"),
        ("--seeds 1 1", "seeds: got (1, 1)"),
        ("--plot-path {file}/x.png", "x.png"),
        ("--gap-plot-path {file}/y.png", "y.png"),
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
