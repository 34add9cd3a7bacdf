"""The recurrence and the matrix are two ways of computing one map."""

from fractions import Fraction
from itertools import pairwise
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.kernels import (
    constant,
    decay_mask,
    largest_difference,
    recurrence,
    semiseparable_kernel,
)

EPS = np.finfo(float).eps
SPECIAL = [0.0, 1.0, -1.0, 0.5, 0.999, 1e-300]
real_decays = st.one_of(st.sampled_from(SPECIAL), st.floats(-1, 1))
complex_decays = st.one_of(
    st.sampled_from([0j, 1 + 0j, -1 + 0j, 1j, 0.6 - 0.8j]),
    st.complex_numbers(max_magnitude=1),
)
sizes = st.tuples(st.integers(1, 200), st.integers(0, 12), st.integers(1, 3))


@st.composite
def systems(draw):
    """(a, b, c, x): decays from a few drawn values, Gaussian couplings and input."""
    T, N, d = draw(sizes)
    kind = draw(st.sampled_from([real_decays, complex_decays]))
    pool = np.array(draw(st.lists(kind, min_size=1, max_size=8)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    a = rng.choice(pool, (T, N))
    if draw(st.booleans()):
        a = np.broadcast_to(a[:1], (T, N))
    b, c = rng.standard_normal((2, T, N)).astype(a.dtype)
    if np.iscomplexobj(a):
        b = b + 1j * rng.standard_normal((T, N))
    return a, b, c, rng.standard_normal((T, d))


def assert_close_by_terms(y, reference, system, initial_state=None):
    """|y - reference| within rounding of the sum of the terms' absolute values."""
    T, N = system[0].shape
    start = None if initial_state is None else np.abs(initial_state)
    terms, _ = recurrence(*[np.abs(values) for values in system], start)
    allowed = 4 * (T + N + 2) * EPS * terms + 1e-290
    excess = np.abs(y - reference) - allowed
    worst = np.unravel_index(excess.argmax(), excess.shape)
    assert excess[worst] <= 0, f"error {np.abs(y - reference)[worst]} at {worst}"


@settings(deadline=None, max_examples=120)
@given(systems())
def test_recurrence_equals_kernel(system):
    a, b, c, x = system
    y, _ = recurrence(a, b, c, x)
    assert_close_by_terms(semiseparable_kernel(a, b, c) @ x, y, system)


@settings(deadline=None, max_examples=60)
@given(systems(), st.data())
def test_continuing_from_the_state_changes_nothing(system, data):
    splits = data.draw(st.lists(st.integers(0, len(system[0])), max_size=4))
    cuts = [0, *sorted(splits), len(system[0])]
    state, pieces = None, []
    for start, stop in pairwise(cuts):
        y, state = recurrence(*[v[start:stop] for v in system], state)
        pieces.append(y)
    whole, final = recurrence(*system)
    assert np.array_equal(np.concatenate(pieces), whole)
    assert np.array_equal(state, final)


@settings(deadline=None, max_examples=60)
@given(systems(), st.booleans())
def test_initial_state_enters_through_the_products_of_decays(system, complex_start):
    a, b, c, x = system
    T, N = a.shape
    rng = np.random.default_rng(T)
    h = rng.standard_normal((N, x.shape[1]))
    if complex_start:
        h = h + 1j * rng.standard_normal(h.shape)
    y, final = recurrence(a, b, c, x, h)
    products = np.cumprod(a, axis=0)
    expected = semiseparable_kernel(a, b, c) @ x + (c * products) @ h
    assert_close_by_terms(y, expected, system, h)
    if N:
        _, unforced = recurrence(a, b, c, 0 * x, h)
        assert np.abs(unforced - products[-1][:, None] * h).max() <= 4 * T * EPS * (
            np.abs(h).max()
        )
    assert final.shape == h.shape


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 7),
    st.integers(0, 3),
    st.integers(0, 2**32),
    st.sampled_from([[0, 1, -1], [0, 3, -2, 5], [1, Fraction(1, 3), Fraction(-5, 7)]]),
)
def test_mask_is_the_definition_in_exact_arithmetic(T, N, seed, pool):
    a = np.random.default_rng(seed).choice(np.array(pool, object), (T, N))
    L = decay_mask(a)
    for t in range(T):
        for s in range(T):
            for n in range(N):
                expected = prod(a[s + 1 : t + 1, n], start=Fraction(1))
                assert L[t, s, n] == (expected if s <= t else 0)


def test_recurrence_against_fractions():
    """Dyadic numbers, so that float64 makes no error at all."""
    rng = np.random.default_rng(3)
    a, b, c = rng.integers(-4, 5, (3, 6, 3)) / 4
    x = rng.integers(-4, 5, (6, 2)) / 4
    y, final = recurrence(a, b, c, x)
    for channel in range(2):
        h = [Fraction(0)] * 3
        for t in range(6):
            h = [
                Fraction(a[t, n]) * h[n] + Fraction(b[t, n]) * Fraction(x[t, channel])
                for n in range(3)
            ]
            assert y[t, channel] == sum(Fraction(c[t, n]) * h[n] for n in range(3))
        assert [Fraction(v) for v in final[:, channel]] == h


def test_nilpotent_and_unit_decays_have_closed_forms():
    ones = np.ones((5, 1))
    assert np.array_equal(semiseparable_kernel(0 * ones, ones, ones), np.eye(5))
    assert np.array_equal(semiseparable_kernel(ones, ones, ones), np.tri(5))
    assert semiseparable_kernel(-ones, ones, ones)[4].tolist() == [1, -1, 1, -1, 1]


def test_constant_repeats_its_values():
    assert constant(np.array([2.0, -3.0]), 3).tolist() == [[2.0, -3.0]] * 3


@pytest.mark.parametrize(
    ("y", "reference", "expected"),
    [
        ([], [], 0.0),
        ([0.0], [0.0], 0.0),
        ([1.0], [0.0], np.inf),
        ([1.0, -3.5], [1.0, -4.0], 0.125),
        ([3 + 4j], [0j + 10], abs(-7 + 4j) / 10),
    ],
)
def test_largest_difference(y, reference, expected):
    assert largest_difference(np.array(y), np.array(reference)) == expected


def test_largest_difference_does_not_hide_nan():
    assert np.isnan(largest_difference(np.array([1.0, np.nan]), np.array([1.0, 1.0])))
