"""exp4: the forms agree and can fail; fits, intervals, pictures and bad input."""

import json
import math

import numpy as np
import pytest

from experiments import exp4_time_scaling as exp4
from experiments.common import InputError
from experiments.kernels import semiseparable_kernel

SMALL = {"T_values": (20, 40, 80), "N": 3, "d": 2, "n_repeats": 2}


@pytest.mark.parametrize("end_to_end", [False, True])
def test_forms_agree_and_the_metadata_says_what_was_timed(end_to_end):
    result = exp4.run(**SMALL, end_to_end=end_to_end)
    assert result.passed is True
    assert exp4.problems(result.metadata) == []
    curves = result.metadata["curves"]
    assert {(c["decays"], c["form"]) for c in curves} == {
        (decays, form) for decays in exp4.DECAYS for form in exp4.FORMS
    }
    for curve in curves:
        assert [len(times) for times in curve["repeats_s"]] == [2, 2, 2]
        assert curve["median_s"] == [float(np.median(t)) for t in curve["repeats_s"]]
        assert min(curve["cold_s"]) > 0
        low, high = curve["exponent_ci95"]
        assert low <= curve["exponent"] <= high
    excluded = "excludes forming M" in result.metadata["timed"]
    assert excluded is not end_to_end


def test_peak_memory_of_the_kernel_is_at_least_the_kernel():
    result = exp4.run(T_values=(50, 200), N=2, d=1, n_repeats=1)
    peaks = {c["form"]: c["peak_bytes"] for c in result.metadata["curves"]}
    assert peaks["kernel"][1] >= 8 * 200 * 200
    assert peaks["recurrence"][1] < peaks["kernel"][1]


@pytest.mark.parametrize(
    "perturb", [lambda M: M * (1 + 1e-6), lambda M: M + 1e-6 * np.abs(M).max()]
)
@pytest.mark.parametrize("end_to_end", [False, True])
def test_a_perturbed_kernel_fails_the_claim(monkeypatch, perturb, end_to_end):
    true = exp4.explicit_kernel
    monkeypatch.setattr(exp4, "explicit_kernel", lambda *abc: perturb(true(*abc)))
    result = exp4.run(**SMALL, end_to_end=end_to_end)
    assert result.passed is False
    assert "kernel differs" in exp4.problems(result.metadata)[0]


def test_a_wrong_chunked_form_fails_the_claim(monkeypatch):
    true = exp4.chunked
    monkeypatch.setattr(
        exp4, "chunked", lambda *abcx: (true(*abcx)[0] * (1 + 1e-6), None)
    )
    assert exp4.run(**SMALL).passed is False


def test_nan_is_a_problem():
    metadata = json.loads(json.dumps(exp4.run(**SMALL).metadata))
    metadata["curves"][0]["difference"][1] = "NaN"
    assert len(exp4.problems(metadata)) == 1


@pytest.mark.parametrize("T", [1, 2, 17])
def test_explicit_kernel_against_the_masked_form(T):
    rng = np.random.default_rng(T)
    a, b, c = rng.standard_normal((3, T, 4))
    a[T // 2, 1] = 0.0
    expected = semiseparable_kernel(a, b, c)
    np.testing.assert_allclose(exp4.explicit_kernel(a, b, c), expected, atol=1e-12)


# Student's t, 97.5 %: the table of Abramowitz & Stegun (1964), 26.10.
TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 10: 2.228}
TABLE |= {29: 2.045, 30: 2.042, 60: 2.000, 120: 1.980}


@pytest.mark.parametrize(("dof", "quantile"), TABLE.items())
def test_t_quantile_is_the_tabled_one(dof, quantile):
    assert exp4.t_quantile(dof) == pytest.approx(quantile, abs=6e-4)


def test_t_quantile_approaches_the_normal_one():
    assert exp4.t_quantile(10**4) == pytest.approx(1.959964, abs=1e-3)


def test_fit_recovers_a_power_law():
    T = [100, 300, 700, 1500]
    fit = exp4.fit_exponent(T, [3e-9 * t**1.7 for t in T])
    assert fit["exponent"] == pytest.approx(1.7, abs=1e-12)
    assert fit["exponent_ci95"] == pytest.approx([1.7, 1.7], abs=1e-10)


def test_interval_covers_the_true_exponent_95_times_in_100():
    rng = np.random.default_rng(0)
    T, trials, covered = (100, 200, 400, 800), 2000, 0
    for _ in range(trials):
        seconds = 1e-6 * np.power(T, 1.3) * np.exp(0.1 * rng.standard_normal(4))
        low, high = exp4.fit_exponent(T, seconds.tolist())["exponent_ci95"]
        covered += low <= 1.3 <= high
    spread = math.sqrt(0.95 * 0.05 / trials)
    assert covered / trials == pytest.approx(0.95, abs=4 * spread)


def test_too_few_lengths_leave_fit_or_interval_undefined():
    two = exp4.run(**{**SMALL, "T_values": (20, 40)})
    one = exp4.run(**{**SMALL, "T_values": (1,)})
    assert all(c["exponent_ci95"] is None for c in two.metadata["curves"])
    assert all(isinstance(c["exponent"], float) for c in two.metadata["curves"])
    assert all(c["exponent"] is None for c in one.metadata["curves"])
    assert one.passed
    assert "one length" in one.details
    assert two.passed


def test_same_seed_same_inputs_another_seed_others():
    def differences(seed):
        curves = exp4.run(**SMALL, seed=seed).metadata["curves"]
        return [curve["difference"] for curve in curves]

    assert differences(1) == differences(1)
    assert differences(1) != differences(2)


def test_picture_shows_every_curve_of_pooled_results():
    results = [exp4.run(**SMALL), exp4.run(**{**SMALL, "T_values": (20, 60)})]
    figure = exp4.plot_results(results)
    panels = figure.get_axes()
    assert [ax.get_title() for ax in panels] == [f"{d} decays" for d in exp4.DECAYS]
    for ax in panels:
        assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
        labels = [text.get_text() for text in ax.get_legend().get_texts()]
        assert [label.partition(":")[0] for label in labels] == list(exp4.FORMS)
        assert list(ax.containers[0].lines[0].get_xdata()) == [20, 40, 60, 80]
    assert panels[0].get_ylim() == panels[1].get_ylim()


@pytest.mark.parametrize("flag", ["--plot", "--exp4-plot"])
def test_both_names_of_the_plot_flags(run_module, flag, tmp_path):
    path = tmp_path / "scaling.png"
    done = run_module(
        f"experiments.{exp4.NAME}",
        "--T-values",
        "10",
        "20",
        "--n-repeats",
        "1",
        flag,
        f"{flag}-path",
        str(path),
    )
    assert done.returncode == 0, done.stderr
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments",
    [
        {"T_values": ()},
        {"T_values": (0, 5)},
        {"T_values": (40, 20)},
        {"T_values": (20, 20)},
        {"T_values": (100, 10**6)},
        {"n_repeats": 0},
        {"N": 0},
        {"d": -1},
        {"seed": -1},
    ],
)
def test_bad_input_is_refused(arguments):
    with pytest.raises(InputError, match="got"):
        exp4.run(**{**SMALL, **arguments})


@pytest.mark.parametrize(
    "flags",
    [
        ("--n-repeats", "0"),
        ("--T-values", "40", "20"),
        ("--T-values", "20", "20"),
        ("--T-values", "1000000"),
        ("--T-values", "abc"),
        ("--exp4-plot", "--exp4-plot-path", "/dev/null/scaling.png"),
    ],
)
def test_faults_end_in_one_line_and_status_2(run_module, flags):
    done = run_module(f"experiments.{exp4.NAME}", *flags)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr
