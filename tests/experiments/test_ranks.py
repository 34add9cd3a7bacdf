"""Floating-point and exact ranks against brute force and exact fractions."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.common import InputError
from experiments.exact import field_rank, to_field
from experiments.ranks import (
    RANK_TOLERANCE,
    ceiling,
    central_block,
    check_distinct,
    exact_semiseparable_rank,
    exact_ssm_kernel,
    numerical_rank,
    roots_of_unity,
    semiseparable_rank,
    ssm_kernel,
)

entries = st.integers(-1, 1)


def brute_force_rank(M):
    """The largest rank of any submatrix on or below the diagonal, whatever its shape.

    For a choice of rows the widest choice of columns is all s <= the first row.
    """
    T = len(M)
    choices = itertools.chain.from_iterable(
        itertools.combinations(range(T), size) for size in range(1, T + 1)
    )
    return max(field_rank(M[list(rows), : rows[0] + 1]) for rows in choices)


def every_block(M, tolerance):
    """The definition: one decomposition for each t."""
    return max(numerical_rank(M[t:, : t + 1], tolerance) for t in range(len(M)))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 6), st.data())
def test_exact_rank_is_that_of_every_lower_left_submatrix(T, data):
    values = data.draw(st.lists(entries, min_size=T * T, max_size=T * T))
    M = np.tril(np.array(values, np.int64).reshape(T, T))
    assert exact_semiseparable_rank(M) == brute_force_rank(M)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 30), st.data())
def test_distinct_decays_give_exactly_N_up_to_the_ceiling(T, data):
    size = st.integers(1, ceiling(T))
    nodes = st.integers(-500, 500).map(lambda n: n / 512)
    N = data.draw(size)
    a = np.array(data.draw(st.lists(nodes, min_size=N, max_size=N, unique=True)))
    sign = st.sampled_from([-1.5, -1.0, 0.25, 2.0])
    c = np.array(data.draw(st.lists(sign, min_size=N, max_size=N)))
    assert exact_semiseparable_rank(exact_ssm_kernel(a, np.ones(N), c, T)) == N


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("tolerance", [RANK_TOLERANCE, 1e-6, 1e-2])
@pytest.mark.parametrize("N", [1, 3, 9, 30])
def test_shortcuts_do_not_change_the_rank(seed, tolerance, N):
    rng = np.random.default_rng(seed)
    a, (b, c) = rng.uniform(-1, 1, N), rng.standard_normal((2, N))
    for M in (
        ssm_kernel(a, b, c, 29),
        ssm_kernel(roots_of_unity(N), b, c, 29),
        np.tril(rng.standard_normal((29, 29))),
        ssm_kernel(a, b, c, 29) + 1e-7 * rng.standard_normal((29, 29)),
    ):
        assert semiseparable_rank(M, tolerance) == every_block(M, tolerance)


@pytest.mark.parametrize("T", [1, 2, 3, 30, 31])
def test_no_block_is_larger_than_the_ceiling(T):
    M = np.arange(T * T).reshape(T, T)
    sides = [min(M[t:, : t + 1].shape) for t in range(T)]
    assert ceiling(T) == max(sides) == min(central_block(M).shape)


def test_a_perturbation_of_one_millionth_is_seen():
    b, c = np.random.default_rng(0).uniform(0.5, 1.5, (2, 5))
    M = ssm_kernel(roots_of_unity(5), b, c, 31)
    noise = np.random.default_rng(1).standard_normal(M.shape)
    assert semiseparable_rank(M) == 5
    assert semiseparable_rank(M * (1 + 1e-6 * noise)) > 5


def test_zero_and_diagonal_matrices():
    assert numerical_rank(np.zeros((4, 3))) == 0
    assert semiseparable_rank(np.zeros((6, 6))) == 0
    assert semiseparable_rank(np.diag(np.arange(1.0, 7.0))) == 1
    assert exact_semiseparable_rank(np.eye(6, dtype=np.int64)) == 1


def test_exact_kernel_is_the_rational_one():
    states = (0.5, 1.0, 2.0), (-0.75, 3.0, 0.25)
    M = exact_ssm_kernel(*(np.array(values) for values in zip(*states, strict=True)), 6)
    for t, s in itertools.product(range(6), repeat=2):
        lag = [Fraction(a) ** abs(t - s) * Fraction(b * c) for a, b, c in states]
        assert M[t, s] == (to_field(sum(lag)) if s <= t else 0)


@pytest.mark.parametrize("values", [(), (1, 1), (-1, 2)])
def test_bad_seeds_are_refused(values):
    with pytest.raises(InputError, match="seeds: got"):
        check_distinct("seeds", values, at_least=0)
