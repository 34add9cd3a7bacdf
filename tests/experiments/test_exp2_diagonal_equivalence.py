"""Experiment 2: heads, the generator's rank, a suite that can fail, bad input."""

import json
import re
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import exp2_diagonal_equivalence as exp2
from experiments.common import InputError

PAIRS = (0.9 + 0.3j, 0.5, 0.9 - 0.3j, -0.2 - 0.1j, -0.2 + 0.1j)
real_decays = st.one_of(st.sampled_from([0.0, 1.0, -1.0, 0.5]), st.floats(-1, 1))
complex_decays = st.one_of(
    real_decays, st.sampled_from([1j, -1j]), st.complex_numbers(max_magnitude=1)
)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 200),
    st.one_of(
        st.lists(real_decays, min_size=1, max_size=12),
        st.lists(complex_decays, min_size=1, max_size=12),
    ),
    st.integers(0, 2**40),
)
def test_the_claim_holds(T, decays, seed):
    result = exp2.run(T=T, seed=seed, decays=tuple(decays))
    assert result.passed, result.details
    assert result.metadata["generator_rank_exact"] == min(T, len(set(decays)))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 60), st.lists(st.complex_numbers(max_magnitude=1), max_size=5))
def test_conjugate_decays_give_a_real_output(T, half):
    decays = (0.5, *half, *[z.conjugate() for z in reversed(half)])
    result = exp2.run(T=T, decays=decays)
    assert result.metadata["conjugate_closed"]
    assert result.metadata["largest_imaginary_part"] <= 2e-14
    assert result.passed, result.details


def test_published_setting():
    """N = 2, decays (0.5, 0.8), B = C = 1: the paper finds about 1e-14."""
    a, ones = np.array([0.5, 0.8]), np.ones(2)
    M = exp2.attention_kernel(a, ones, ones, 64)
    for seed in range(100):
        x = np.random.default_rng(seed).standard_normal(64)
        y, h = np.empty(64), np.zeros(2)
        for t in range(64):
            h = a * h + x[t]
            y[t] = h.sum()
        assert np.abs(M @ x - y).max() <= 2e-14 * np.abs(y).max()


def test_heads_equal_powers_of_fractions():
    """Dyadic numbers, so that float64 makes no error at all."""
    a, B, C = np.array([0.0, 0.5, -0.75]), np.array([1.0, -2, 3]), np.array([4.0, 5, 1])
    heads = exp2.head_kernels(a, B, C, 7)
    M = exp2.attention_kernel(a, B, C, 7)
    for t in range(7):
        for s in range(7):
            terms = [
                Fraction(C[m]) * Fraction(B[m]) * Fraction(a[m]) ** (t - s)
                if s <= t
                else 0
                for m in range(3)
            ]
            assert [Fraction(v) for v in heads[:, t, s]] == terms
            assert Fraction(M[t, s]) == sum(terms)


@pytest.mark.parametrize(
    ("decays", "T", "rank"),
    [
        ((0.5, 0.8), 64, 2),
        ((0.5, 0.5, 0.8), 64, 2),
        ((0.0,), 5, 1),
        ((0.0, -0.0, 1.0), 5, 2),
        ((0.1, 0.2, 0.3, 0.4), 3, 3),
        ((1.0, -1.0, 1j, -1j), 8, 4),
        ((0.5, 0.5 + 0j), 8, 1),
        ((0.5, float(np.nextafter(0.5, 1))), 64, 2),
        (tuple(np.linspace(0.3, 0.95, 30).tolist()), 64, 30),
    ],
)
def test_generator_rank(decays, T, rank):
    metadata = exp2.run(T=T, decays=decays).metadata
    assert metadata["generator_rank_exact"] == rank == metadata["generator_rank_theory"]


def test_float_rank_of_real_decays_is_shown_and_not_judged():
    """30 spaced real decays: float64 loses the rank, the exact one does not."""
    decays = tuple(np.linspace(0.3, 0.95, 30).tolist())
    result = exp2.run(decays=decays)
    assert result.metadata["generator_rank_float"] < 30
    assert result.passed


def test_cancelling_heads_are_judged_by_their_terms(monkeypatch):
    """Repeated decays whose couplings all but cancel: rounding of the terms stays."""

    def cancelling(rng, a, partners):
        draws.append(1)
        return np.array([1.0, -1.0 + 1e-9] if len(draws) % 2 else [1.0, 1.0])

    draws: list[int] = []
    monkeypatch.setattr(exp2, "draw_couplings", cancelling)
    result = exp2.run(decays=(0.7, 0.7))
    assert result.metadata["largest_difference"] > 2e-14
    assert "cancellation" in result.details
    assert result.passed


def test_partners():
    assert exp2.conjugate_partners(np.array(PAIRS)) == [2, 1, 0, 4, 3]
    assert exp2.conjugate_partners(np.array([1j, 1j, -1j, -1j])) == [2, 3, 0, 1]
    assert exp2.conjugate_partners(np.array([1j, 1j, -1j])) is None
    assert exp2.conjugate_partners(np.array([0.5, 0.5])) == [0, 1]


def test_couplings_are_real_or_conjugate():
    a = np.array(PAIRS)
    B = exp2.draw_couplings(np.random.default_rng(0), a, exp2.conjugate_partners(a))
    assert np.array_equal(B, B[[2, 1, 0, 4, 3]].conj())
    assert np.all(B.imag[[0, 2, 3, 4]] != 0)
    open_set = exp2.draw_couplings(np.random.default_rng(0), np.array([0.5, 1j]), None)
    assert open_set.imag[0] == 0 != open_set.imag[1]


@pytest.mark.parametrize("decays", [(0.5, 0.8), (0.0,), PAIRS, (0.3, 0.3)])
@pytest.mark.parametrize("perturbed", [lambda M: M * (1 + 1e-6), lambda M: M + 1e-6])
def test_a_wrong_kernel_is_seen(monkeypatch, decays, perturbed):
    kernel = exp2.attention_kernel
    monkeypatch.setattr(
        exp2, "attention_kernel", lambda *args: perturbed(kernel(*args))
    )
    assert exp2.run(decays=decays).passed is False


def test_a_complex_error_breaks_the_claim_of_a_real_output(monkeypatch):
    kernel = exp2.attention_kernel
    monkeypatch.setattr(exp2, "attention_kernel", lambda *args: kernel(*args) + 1e-6j)
    found = exp2.problems(exp2.run(decays=PAIRS).metadata)
    assert any("imaginary" in problem for problem in found)


@pytest.mark.parametrize(
    "change",
    [
        {"judged_difference": 1e-12},
        {"judged_difference": "NaN"},
        {"largest_imaginary_part": 1e-12},
        {"largest_imaginary_part": "NaN"},
        {"generator_rank_exact": 4},
        {"T": 3},
        {"decays": [0.5, 0.5]},
    ],
)
def test_a_wrong_record_is_seen(change):
    metadata = json.loads(json.dumps(exp2.run(T=16, decays=PAIRS).metadata))
    assert exp2.problems(metadata) == []
    assert len(exp2.problems({**metadata, **change})) == 1


def test_the_worst_seed_can_be_redone():
    several = exp2.run(seed=5, n_seeds=20).metadata
    assert 5 <= several["worst_seed"] < 25
    single = exp2.run(seed=several["worst_seed"]).metadata
    assert single["judged_difference"] == several["judged_difference"]
    assert single["worst_B"] == several["worst_B"]
    each = [exp2.run(seed=seed).metadata["largest_difference"] for seed in range(5, 25)]
    assert several["largest_difference"] == max(each)


def test_picture_shows_the_kernel_as_the_sum_of_its_heads():
    figure = exp2.draw([exp2.run(T=12, decays=(0.8, 0.9 + 0.3j, 0.9 - 0.3j))])
    kernel, *heads = [ax.images[0].get_array() for ax in figure.axes if ax.images][:4]
    assert len(heads) == 3
    assert np.allclose(kernel, sum(heads), rtol=0, atol=1e-12)
    assert np.array_equal(np.ma.getmaskarray(kernel), ~np.tri(12, dtype=bool))


@pytest.mark.parametrize(
    "bad",
    [
        {"decays": ()},
        {"decays": (0.5, float("nan"))},
        {"decays": (complex(0, float("inf")),)},
        {"decays": (0.5, 30 + 30j), "T": 500},
        {"T": 0},
        {"n_seeds": 0},
        {"seed": -1},
    ],
)
def test_bad_input_raises_input_error(bad):
    with pytest.raises(InputError, match="expected"):
        exp2.run(**bad)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--decays"], "expected at least one value"),
        (["--decays", "0.5", "nan"], "expected finite numbers"),
        (["--decays", "1.5", "--T", "9000"], "within float64 at T = 9000"),
        (["--decays", "half"], "half"),
        (["--n-seeds", "0"], "got 0; expected an integer of at least 1"),
    ],
)
def test_bad_input_is_one_line_and_status_2(run_module, arguments, said):
    done = run_module(exp2.__name__, *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("decays", "rank"),
    [
        (["0.5", "0.5", "0.8"], 2),
        (["-0.5", "0.8", "0.9+0.3j", "-0.2-0.1j"], 4),
        (["0.9+0.3j", "0.9-0.3j"], 2),
    ],
)
def test_decays_as_typed(run_module, decays, rank):
    done = run_module(exp2.__name__, "--decays", *decays, "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["passed"] is True
    assert record["meta"]["generator_rank_exact"] == rank
    assert [complex(z) for z in record["meta"]["decays"]] == [*map(complex, decays)]


def test_a_thousand_seeds_in_one_command(run_module):
    done = run_module(exp2.__name__, "--n-seeds", "1000")
    assert done.returncode == 0, done.stderr
    assert "1,000 seeds" in done.stdout
    assert "decays (0.5, 0.8)" in done.stdout
    printed = re.search(r"max \|y\| = (\S+) <= 2e-14", done.stdout)
    assert printed is not None
    assert 0 < float(printed[1]) <= 2e-14
