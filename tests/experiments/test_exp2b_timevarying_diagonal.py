"""Experiment 2b: the mask of products, every kind of decay, the absorbed form."""

import json
from fractions import Fraction
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import exp2b_timevarying_diagonal as exp2b

EPS = np.finfo(float).eps
decays = st.one_of(
    st.sampled_from([0.0, 1.0, -1.0, 1e-300, -1e-300]),
    st.floats(-1, 1, allow_subnormal=False),
)


@settings(deadline=None, max_examples=40)
@given(st.data(), st.integers(1, 9), st.integers(0, 3))
def test_mask_equals_products_of_fractions(data, T, N):
    entries = data.draw(st.lists(decays, min_size=T * N, max_size=T * N))
    a = np.array(entries, float).reshape(T, N)
    L = exp2b._build_time_varying_mask(a)
    assert L.shape == (T, T, N)
    for t in range(T):
        for s in range(T):
            for n in range(N):
                factors = [Fraction(v) for v in a[s + 1 : t + 1, n]]
                exact = prod(factors, start=Fraction(1)) if s <= t else Fraction(0)
                error = abs(Fraction(L[t, s, n]) - exact)
                # 1e-300 allows for underflow of products of tiny decays
                assert error <= T * Fraction(EPS) * abs(exact) + Fraction(1, 10**300)
                if 0 in factors:
                    assert L[t, s, n] == 0


def test_mask_of_alternating_signs_is_exact():
    a = np.array([[-1.0], [-1.0], [0.0], [-1.0]])
    assert exp2b._build_time_varying_mask(a)[:, :, 0].tolist() == [
        [1, 0, 0, 0],
        [-1, 1, 0, 0],
        [0, 0, 1, 0],
        [0, 0, -1, 1],
    ]


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 100), st.integers(1, 12), st.integers(0, 2**40))
def test_the_claim_holds(T, N, seed):
    result = exp2b.run(T=T, N=N, seed=seed)
    assert result.passed, result.details


def test_kernel_equals_a_loop_over_fractions():
    """Dyadic numbers, so that float64 makes no error at all."""
    rng = np.random.default_rng(1)
    a, b, c = rng.integers(-4, 5, (3, 7, 3)) / 4
    M = exp2b.attention_kernel(a, b, c)
    for t in range(7):
        for s in range(t + 1):
            terms = [
                Fraction(c[t, n])
                * prod((Fraction(v) for v in a[s + 1 : t + 1, n]), start=Fraction(1))
                * Fraction(b[s, n])
                for n in range(3)
            ]
            assert Fraction(M[t, s]) == sum(terms)
    assert np.array_equal(M, np.tril(M))


def test_each_kind_of_decay_is_what_its_name_says():
    drawn = {name: exp2b.draw_system(name, 48, 4, 0).a for name in exp2b.DRAWS}
    assert np.any(drawn["signed"] < 0)
    assert np.any(drawn["signed"] > 0)
    assert np.all(drawn["negative"] < 0)
    for name in ("zeros", "complex zeros"):
        assert 0 < np.mean(drawn[name] == 0) < 0.5
        assert np.all(drawn[name][24] == 0)
    assert 0 < np.mean(drawn["tiny"] == 1e-300) < 0.5
    assert not np.any(drawn["tiny"] == 0)
    for name in ("complex", "complex zeros"):
        assert np.any(drawn[name].imag)
        assert np.all(np.abs(drawn[name]) < 1)


@pytest.mark.parametrize("function", ["attention_kernel", "_build_time_varying_mask"])
@pytest.mark.parametrize("perturbed", [lambda M: M * (1 + 1e-6), lambda M: M + 1e-6])
def test_a_wrong_kernel_is_seen(monkeypatch, function, perturbed):
    right = getattr(exp2b, function)
    monkeypatch.setattr(exp2b, function, lambda *args: perturbed(right(*args)))
    result = exp2b.run()
    assert result.passed is False
    assert len(exp2b.problems(result.metadata)) == len(exp2b.DRAWS)


def test_a_mask_from_running_products_is_seen(monkeypatch):
    """The division that the mask avoids: right without zeros, caught with them."""

    def divided(a):
        with np.errstate(all="ignore"):
            P = np.cumprod(a, axis=0)
            ratio = P[:, None] / P[None, :]
        return np.where(np.tri(len(a), dtype=bool)[:, :, None], ratio, 0)

    monkeypatch.setattr(exp2b, "_build_time_varying_mask", divided)
    result = exp2b.run()
    assert result.passed is False
    named = " ".join(exp2b.problems(result.metadata))
    assert "'zeros'" in named
    assert "'signed'" not in named


@pytest.mark.parametrize("difference", [1e-12, "NaN", "Infinity"])
def test_a_wrong_record_is_seen(difference):
    metadata = json.loads(json.dumps(exp2b.run(T=8).metadata))
    assert exp2b.problems(metadata) == []
    metadata["judged_differences"]["complex"] = difference
    assert len(exp2b.problems(metadata)) == 1


def test_absorbed_form_is_right_only_for_short_sequences_without_zeros():
    metadata = exp2b.run(T=48).metadata
    errors = metadata["absorbed_errors"]
    assert float(errors["signed"]) <= 2e-14
    assert errors["zeros"] == errors["complex zeros"] == "NaN"
    assert not float(errors["tiny"]) <= 2e-14
    by_length = metadata["absorbed_errors_by_length"]
    assert float(by_length["64"]) <= 2e-14
    # The mean of log|a| is -1, so |P_1024| is about exp(-1024): below float64.
    assert not float(by_length["1024"]) <= 2e-14


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--N", "0"], "N: got 0; expected an integer of at least 1"),
        (["--T", "0"], "T: got 0; expected an integer of at least 1"),
        (["--seed", "-1"], "seed: got -1; expected an integer of at least 0"),
        (["--N", "four"], "four"),
    ],
)
def test_bad_input_is_one_line_and_status_2(run_module, arguments, said):
    done = run_module(exp2b.__name__, *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_the_command_line_passes(run_module):
    done = run_module(exp2b.__name__, "--T", "1", "--N", "1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[PASS] exp2b_timevarying_diagonal")
