"""Ranks modulo the prime against elimination with fractions, and the field itself."""

from fractions import Fraction
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.exact import (
    PRIME,
    field_array,
    field_kernel,
    field_rank,
    root_of_unity,
    to_field,
)
from experiments.ranks import exact_semiseparable_rank

examples = settings(deadline=None, max_examples=60)
fractions = st.fractions(-50, 50, max_denominator=97)
dyadic = st.builds(lambda n, k: n / 2**k, st.integers(-500, 500), st.integers(0, 8))
dyadic_complex = st.builds(complex, dyadic, dyadic)


def fraction_rank(matrix) -> int:
    """Rank over the rationals, by elimination with Fractions."""
    rows = [[Fraction(int(v)) for v in row] for row in matrix]
    rank = 0
    for column in range(len(rows[0]) if rows else 0):
        pivot = next((i for i in range(rank, len(rows)) if rows[i][column]), None)
        if pivot is None:
            continue
        rows[rank], rows[pivot] = rows[pivot], rows[rank]
        for i in range(rank + 1, len(rows)):
            factor = rows[i][column] / rows[rank][column]
            rows[i] = [v - factor * w for v, w in zip(rows[i], rows[rank], strict=True)]
        rank += 1
    return rank


@st.composite
def planted_matrices(draw):
    """An integer matrix of rank at most r: a product of thin factors."""
    shape = draw(st.tuples(st.integers(1, 7), st.integers(0, 7), st.integers(1, 7)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    left = rng.integers(-3, 4, shape[:2])
    return left @ rng.integers(-3, 4, shape[1:])


@examples
@given(planted_matrices())
def test_rank_equals_elimination_with_fractions(matrix):
    assert field_rank(matrix) == fraction_rank(matrix)


@examples
@given(planted_matrices())
def test_rank_is_that_of_the_transpose_and_leaves_its_input_alone(matrix):
    before = matrix.copy()
    assert field_rank(matrix) == field_rank(matrix.T)
    assert np.array_equal(matrix, before)


@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (3, 0), (4, 2)])
def test_rank_of_nothing_is_zero(shape):
    assert field_rank(np.zeros(shape, np.int64)) == 0


def test_rank_with_entries_near_the_prime():
    """Products of two residues near p must not overflow 64 bits."""
    u = np.array([[PRIME - 1], [PRIME - 2], [PRIME - 3]])
    v = np.array([[PRIME - 5, PRIME - 7, PRIME - 11]])
    outer = np.array([[int(p) * int(q) % PRIME for q in v[0]] for p in u[:, 0]])
    assert field_rank(outer) == 1
    assert field_rank((outer + np.eye(3, dtype=np.int64)) % PRIME) == 3


def vandermonde(decays, T):
    return np.array([[pow(int(a), k, PRIME) for a in decays] for k in range(T)])


@examples
@given(st.lists(st.integers(-60, 60), min_size=1, max_size=12), st.integers(1, 12))
def test_vandermonde_rank_is_the_number_of_distinct_decays(decays, T):
    """pow(0, 0) = 1: a zero decay counts as one more."""
    assert field_rank(vandermonde(decays, T)) == min(T, len(set(decays)))


@pytest.mark.parametrize("order", [1, 2, 3, 5, 8, 12, 15, 64])
def test_vandermonde_of_all_roots_of_unity_is_invertible(order):
    powers = vandermonde([root_of_unity(order)], order)[:, 0]
    assert field_rank(vandermonde(powers, order)) == order


@pytest.mark.parametrize(
    "order",
    [2**i * 3**j * 5**k for i in (0, 1, 2, 9, 27) for j in (0, 1) for k in (0, 1)],
)
def test_root_of_unity_has_exactly_its_order(order):
    """For order p - 1 (the last case) this proves that p is prime (Lucas)."""
    root = root_of_unity(order)
    assert pow(root, order, PRIME) == 1
    for q in (2, 3, 5):
        if order % q == 0:
            assert pow(root, order // q, PRIME) != 1


@pytest.mark.parametrize("order", [0, -1, 7, 9, 25, 2**28])
def test_root_of_unity_refuses_an_order_that_the_field_lacks(order):
    with pytest.raises(ValueError, match="divisor"):
        root_of_unity(order)


@examples
@given(fractions, fractions)
def test_to_field_is_a_homomorphism_of_rationals(u, v):
    assert to_field(u + v) == (to_field(u) + to_field(v)) % PRIME
    assert to_field(u * v) == to_field(u) * to_field(v) % PRIME
    assert u == v or to_field(u) != to_field(v)


@examples
@given(dyadic_complex, dyadic_complex)
def test_to_field_is_a_homomorphism_of_complex_rationals(u, v):
    """Dyadic parts, so that Python's own complex arithmetic is exact."""
    assert to_field(u + v) == (to_field(u) + to_field(v)) % PRIME
    assert to_field(u * v) == to_field(u) * to_field(v) % PRIME


def test_to_field_of_small_numbers():
    assert to_field(1) == 1
    assert to_field(-1) == PRIME - 1
    assert to_field(1j) ** 2 % PRIME == PRIME - 1
    assert 2 * to_field(0.5) % PRIME == 1
    assert 3 * to_field(Fraction(1, 3)) % PRIME == 1
    assert to_field(0.1) == to_field(Fraction(0.1)) != to_field(Fraction(1, 10))
    assert to_field(complex(0.75, 0)) == to_field(0.75)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), complex(0, np.inf)])
def test_to_field_refuses_what_is_no_number(value):
    with pytest.raises((ValueError, OverflowError)):
        to_field(value)


@pytest.mark.parametrize(
    "values",
    [
        np.array([[1, -2], [3, 0]]),
        np.array([0.5, -0.125]),
        np.array([0.5 + 2j, -1j]),
        np.array([[Fraction(1, 3)], [Fraction(-2, 7)]]),
        np.zeros((0, 3)),
    ],
)
def test_field_array_maps_each_entry(values):
    mapped = field_array(values)
    assert mapped.shape == values.shape
    assert mapped.dtype == np.int64
    expected = [
        to_field(v if isinstance(v, Fraction) else v.item()) for v in values.flat
    ]
    assert mapped.ravel().tolist() == expected


@st.composite
def rational_systems(draw):
    """Fractions a, b, c of shape (T, N), zeros among them."""
    T, N = draw(st.integers(0, 6)), draw(st.integers(0, 4))
    entry = st.one_of(st.just(Fraction(0)), st.fractions(-3, 3, max_denominator=9))
    values = draw(st.lists(entry, min_size=3 * T * N, max_size=3 * T * N))
    return np.array([*values, None], object)[:-1].reshape(3, T, N)


@examples
@given(rational_systems())
def test_kernel_equals_a_loop_over_fractions(system):
    a, b, c = system
    T, N = a.shape
    M = field_kernel(*[field_array(values) for values in system])
    for t in range(T):
        for s in range(T):
            terms = [
                c[t, n] * prod(a[s + 1 : t + 1, n], start=Fraction(1)) * b[s, n]
                for n in range(N)
            ]
            assert M[t, s] == (to_field(sum(terms, Fraction(0))) if s <= t else 0)


def brute_force_semiseparable_rank(M) -> int:
    """The largest rank over every contiguous block on or below the diagonal."""
    T = len(M)
    return max(
        (
            fraction_rank(M[top : bottom + 1, left : right + 1])
            for top in range(T)
            for bottom in range(top, T)
            for right in range(top + 1)
            for left in range(right + 1)
        ),
        default=0,
    )


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 6), st.integers(0, 3), st.integers(0, 2**32))
def test_semiseparable_rank_of_kernels_equals_brute_force(T, N, seed):
    rng = np.random.default_rng(seed)
    a, b, c = rng.integers(-2, 3, (3, T, N))
    M = np.zeros((T, T), np.int64)
    for t in range(T):
        for s in range(t + 1):
            M[t, s] = (c[t] * a[s + 1 : t + 1].prod(axis=0) * b[s]).sum()
    rank = exact_semiseparable_rank(M)
    assert rank == brute_force_semiseparable_rank(M)
    assert rank <= min(N, (T + 1) // 2)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 6), st.integers(0, 2**32))
def test_semiseparable_rank_of_any_matrix_equals_brute_force(T, seed):
    M = np.random.default_rng(seed).integers(-1, 2, (T, T))  # above it: not looked at
    assert exact_semiseparable_rank(M) == brute_force_semiseparable_rank(M)
