"""exp4b: intervals over trials, the claim in every trial, pictures and bad input."""

import numpy as np
import pytest

from experiments import exp4_time_scaling as exp4
from experiments import exp4b_time_scaling_errorbars as exp4b
from experiments.common import InputError

SMALL = {"T_values": (20, 40), "N": 3, "d": 2, "n_trials": 3, "n_repeats": 1}


@pytest.mark.parametrize("end_to_end", [False, True])
def test_every_trial_agrees_and_is_summed_up(end_to_end):
    result = exp4b.run(**SMALL, end_to_end=end_to_end)
    assert result.passed is True
    assert result.metadata["end_to_end"] is end_to_end
    assert len(result.metadata["curves"]) == 6
    for curve in result.metadata["curves"]:
        assert np.shape(curve["trial_s"]) == (3, 2)
        np.testing.assert_allclose(curve["mean_s"], np.mean(curve["trial_s"], axis=0))
        for mean, (low, high) in zip(
            curve["mean_s"], curve["mean_ci95_s"], strict=True
        ):
            assert low <= mean <= high


def test_trials_draw_different_inputs():
    curves = exp4b.run(**SMALL).metadata["curves"]
    chunked = next(c for c in curves if c["form"] == "chunked")
    assert len({tuple(by_length) for by_length in chunked["difference"]}) > 1


def test_mean_and_interval_against_hand_computation():
    mean, interval = exp4b.mean_and_interval([1.0, 2.0, 6.0])
    half = 4.30265 * np.sqrt(7.0) / np.sqrt(3.0)  # t with 2 degrees, sd = sqrt(7)
    assert mean == pytest.approx(3.0)
    assert interval == pytest.approx([3.0 - half, 3.0 + half], rel=1e-5)
    assert exp4b.mean_and_interval([5.0]) == (5.0, None)


def test_interval_covers_the_true_mean_95_times_in_100():
    rng = np.random.default_rng(1)
    intervals = [
        exp4b.mean_and_interval(rng.normal(2, 1, 4).tolist())[1] for _ in range(2000)
    ]
    covered = np.mean([low <= 2 <= high for low, high in intervals])
    assert covered == pytest.approx(0.95, abs=0.02)


def test_one_trial_and_one_length_leave_intervals_undefined():
    result = exp4b.run(**{**SMALL, "n_trials": 1, "T_values": (7,)})
    assert result.passed is True
    for curve in result.metadata["curves"]:
        assert curve["mean_ci95_s"] == [None]
        assert curve["exponent"] is None
        assert curve["exponent_ci95"] is None
    exp4b.plot_results([result])


def test_a_perturbed_kernel_fails_the_claim(monkeypatch):
    true = exp4.explicit_kernel
    monkeypatch.setattr(exp4, "explicit_kernel", lambda *abc: true(*abc) * (1 + 1e-6))
    result = exp4b.run(**SMALL)
    assert result.passed is False
    found = exp4b.problems(result.metadata)
    assert len(found) == 2 * 3 * 2  # kinds of decay x trials x lengths
    assert "kernel differs" in found[0]


def test_picture_pools_the_trials_of_all_results():
    results = [exp4b.run(**SMALL), exp4b.run(**SMALL, seed=1)]
    ax = exp4b.plot_results(results).get_axes()[0]
    shown = ax.containers[0].lines[0].get_ydata()
    trials = [r.metadata["curves"][0]["trial_s"] for r in results]
    np.testing.assert_allclose(shown, np.mean(np.concatenate(trials), axis=0))


def test_the_picture_is_drawn_by_default(run_module, tmp_path):
    path = tmp_path / "scaling.pdf"
    small = ("--T-values", "10", "20", "--n-trials", "2", "--n-repeats", "1")
    done = run_module(f"experiments.{exp4b.NAME}", *small, "--plot-path", str(path))
    assert done.returncode == 0, done.stderr
    assert path.read_bytes().startswith(b"%PDF")
    assert exp4b.PICTURES[0].path == "outputs/exp4b_time_scaling.png"


@pytest.mark.parametrize("arguments", [{"n_trials": 0}, {"n_repeats": 0}])
def test_bad_counts_are_refused(arguments):
    with pytest.raises(InputError, match="got 0"):
        exp4b.run(**{**SMALL, **arguments})


@pytest.mark.parametrize("flags", [("--n-trials", "0"), ("--n-repeats", "0")])
def test_faults_end_in_one_line_and_status_2(run_module, flags):
    done = run_module(f"experiments.{exp4b.NAME}", *flags)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr
