"""Experiment 1: the claim, a suite that can fail, and bad input to a real process."""

from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from experiments import exp1_scalar_equivalence as exp1


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 200),
    st.one_of(st.sampled_from([0.0, 1.0, -1.0, 1e-300]), st.floats(-1.2, 1.2)),
    st.integers(0, 2**40),
)
@example(T=177, a=1.1875, seed=183)  # growing terms that cancel
def test_the_claim_holds(T, a, seed):
    result = exp1.run(T=T, a=a, seed=seed)
    assert result.passed, result.details
    if abs(a) <= 1:  # else terms grow, and may cancel
        assert result.metadata["largest_difference"] <= 2e-14


@pytest.mark.parametrize("a", [0.0, 1.0, -1.0, 0.5, -0.75])
def test_kernel_equals_powers_of_fractions(a):
    """Dyadic numbers, so that float64 makes no error at all."""
    M = exp1.attention_kernel(a, 0.25, -3.0, 7)
    for t in range(7):
        for s in range(7):
            expected = Fraction(-3, 4) * Fraction(a) ** (t - s) if s <= t else 0
            assert Fraction(M[t, s]) == expected


@pytest.mark.parametrize("perturbed", [lambda M: M * (1 + 1e-6), lambda M: M + 1e-6])
def test_a_wrong_kernel_is_seen(monkeypatch, perturbed):
    kernel = exp1.attention_kernel
    monkeypatch.setattr(
        exp1, "attention_kernel", lambda *args: perturbed(kernel(*args))
    )
    assert exp1.run().passed is False


@pytest.mark.parametrize("difference", [1e-12, "NaN", "Infinity"])
def test_a_wrong_record_is_seen(difference):
    metadata = exp1.run(T=4).metadata
    assert exp1.problems(metadata) == []
    assert exp1.problems({**metadata, "largest_difference": difference})


def test_same_seed_same_result_other_seed_another():
    assert exp1.run(seed=3) == exp1.run(seed=3)
    assert exp1.run(seed=3).metadata["b"] != exp1.run(seed=4).metadata["b"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--T", "0"], "got 0; expected an integer of at least 1"),
        (["--T", "-3"], "got -3; expected an integer of at least 1"),
        (["--T", "abc"], "abc"),
        (["--a", "nan"], "got nan; expected finite"),
        (["--a", "inf"], "got inf; expected finite"),
        (["--a", "-1e9", "--T", "100"], "within float64 at T = 100"),
        (["--seed", "-1"], "got -1; expected an integer of at least 0"),
        (["--decay", "0.5"], "--decay"),
    ],
)
def test_bad_input_is_one_line_and_status_2(run_module, arguments, said):
    done = run_module(exp1.__name__, *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [["--T", "1"], ["--a", "-1.5", "--T", "1000"]])
def test_the_command_line_passes(run_module, arguments):
    done = run_module(exp1.__name__, *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[PASS] exp1_scalar_equivalence")
