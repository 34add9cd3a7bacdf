"""Theorem 3.1 against brute force, exhaustive search, and its own invariances."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.attention_dual import (
    RATIONALS,
    attention_dual,
    complete,
    finest_blocks,
    integers_modulo,
    least_width,
    masked_attention,
    new_columns,
    new_columns_of_blocks,
    rational,
)
from experiments.common import InputError
from experiments.kernels import largest_difference

quick = settings(deadline=None, max_examples=40)


def rank(rows):
    """Rank over the rationals, by elimination of one row at a time."""
    basis = []  # (position of the leading entry, row)
    for values in rows:
        row = [Fraction(int(v)) if not isinstance(v, Fraction) else v for v in values]
        for lead, other in basis:
            factor = row[lead] / other[lead]
            row = [x - factor * y for x, y in zip(row, other, strict=True)]
        lead = next((i for i, v in enumerate(row) if v), None)
        if lead is not None:
            basis.append((lead, row))
    return len(basis)


def new_columns_by_rank(M):
    """Column t is new if it raises the rank of the tails up to its own."""
    return [t for t in range(len(M)) if rank(M[t:, : t + 1].T) > rank(M[t:, :t].T)]


def blocks_by_cuts(M):
    cuts = [t for t in range(1, len(M)) if not any((M[t:, :t] != 0).flat)]
    return list(zip([0, *cuts], [*cuts, len(M)], strict=True))


@st.composite
def kernels(draw, largest=7):
    """Lower-triangular integer kernels; small entries make dependent tails common."""
    T = draw(st.integers(1, largest))
    flat = draw(st.lists(st.integers(-2, 2), min_size=T * T, max_size=T * T))
    M = np.tril(np.array(flat).reshape(T, T))
    if draw(st.booleans()):
        M[:, draw(st.integers(0, T - 1))] = 0
    cut = draw(st.integers(0, T))
    if draw(st.booleans()):
        M[cut:, :cut] = 0
    return M


@st.composite
def assembled(draw):
    """L o (Q K^T) from small integers, zeros among the decays, and its width N."""
    T, N = draw(st.integers(1, 12)), draw(st.integers(1, 3))
    small = st.integers(-3, 3)
    Q, K = (
        np.array(draw(st.lists(small, min_size=T * N, max_size=T * N))).reshape(T, N)
        for _ in range(2)
    )
    decay = st.sampled_from([-2, -1, 0, 1, 2, Fraction(1, 2)])
    a = rational(np.diag(draw(st.lists(decay, min_size=T, max_size=T)))).diagonal()
    return masked_attention(a, Q.astype(object), K.astype(object)), N


@quick
@given(kernels())
def test_new_columns_are_those_that_raise_the_rank_of_the_tails(M):
    expected = new_columns_by_rank(M)
    assert new_columns(M) == expected
    assert complete(rational(M), RATIONALS).new == expected


@quick
@given(kernels())
def test_blocks_are_cut_wherever_all_below_and_left_is_zero(M):
    assert finest_blocks(M) == blocks_by_cuts(M)


@quick
@given(kernels())
def test_the_completion_keeps_the_lower_triangle_and_has_no_superfluous_rank(M):
    Q, K, new = complete(rational(M), RATIONALS)
    G = Q @ K.T if new else rational(np.zeros_like(M))
    assert (np.tril(G) == M).all()
    assert rank(G) == len(new) == len(new_columns_by_rank(M))


@quick
@given(kernels())
def test_every_kernel_has_a_dual_of_its_least_width_and_none_narrower(M):
    counts = [
        len(new_columns_by_rank(M[start:stop, start:stop]))
        for start, stop in blocks_by_cuts(M)
    ]
    assert new_columns_of_blocks(M) == counts
    N = least_width(M)
    assert max(counts) == N
    assert attention_dual(M, N - 1) is None
    dual = attention_dual(M, N)
    assert dual.Q.shape == dual.K.shape == (len(M), N)
    starts = {start for start, _ in blocks_by_cuts(M)}
    assert {t for t in range(len(M)) if dual.a[t] == 0} == starts
    assert dual.reproduces(M)


@settings(deadline=None, max_examples=60)
@given(assembled())
def test_a_kernel_assembled_from_queries_and_keys_is_recognised_and_rebuilt(case):
    M, N = case
    dual = attention_dual(M, N)
    assert dual is not None
    assert dual.Q.shape == dual.K.shape == (len(M), N)
    assert dual.reproduces(M)
    assert (masked_attention(dual.a, dual.Q, dual.K) == M).all()
    kernel = masked_attention(*dual.as_floats())
    assert largest_difference(kernel, M.astype(float)) <= 1e-10


@quick
@given(kernels(), st.data())
def test_rescaling_rows_and_columns_keeps_blocks_and_new_columns(M, data):
    nonzero = st.fractions(-4, 4, max_denominator=7).filter(bool)
    rows, columns = (
        np.array(data.draw(st.lists(nonzero, min_size=len(M), max_size=len(M))), object)
        for _ in range(2)
    )
    scaled = rows[:, None] * M * columns
    assert new_columns(scaled) == new_columns(M)
    assert finest_blocks(scaled) == finest_blocks(M)


@quick
@given(kernels())
def test_reversing_time_and_swapping_queries_with_keys_keeps_the_least_width(M):
    """L o (Q K^T), reversed and transposed, is again a mask over K Q^T: the same N,
    although new columns are defined from left to right."""
    assert least_width(M[::-1, ::-1].T) == least_width(M)


@quick
@given(kernels(largest=4), kernels(largest=4))
def test_the_width_of_two_blocks_is_the_larger_of_their_widths(first, second):
    T = len(first) + len(second)
    M = np.zeros((T, T), int)
    M[: len(first), : len(first)] = first
    M[len(first) :, len(first) :] = second
    assert least_width(M) == max(least_width(first), least_width(second))


def kernels_with_a_dual(prime, T, N):
    """Every L o (Q K^T) over the field of ``prime`` elements, by exhaustion."""
    factors = np.array(list(itertools.product(range(prime), repeat=T * N)))
    factors = factors.reshape(-1, T, N)
    contents = np.einsum("qtn,ksn->qkts", factors, factors) % prime
    contents = np.unique(contents.reshape(-1, T * T), axis=0).reshape(-1, T, T)
    found = set()
    for a in itertools.product(range(prime), repeat=T - 1):
        L = np.array(
            [
                [np.prod(a[s:t], dtype=int) if s <= t else 0 for s in range(T)]
                for t in range(T)
            ]
        )
        found |= {tuple(M.flat) for M in L * contents % prime}
    return found


@pytest.mark.parametrize(
    ("prime", "T", "N"), [(2, 4, 1), (2, 4, 2), (2, 3, 2), (3, 3, 1)]
)
def test_theorem_3_1_both_ways_by_exhaustive_search_over_a_small_field(prime, T, N):
    """The theorem holds over any field, so over one where all can be tried."""
    realisable = kernels_with_a_dual(prime, T, N)
    lower = np.tril_indices(T)
    decided, total = set(), 0
    for entries in itertools.product(range(prime), repeat=len(lower[0])):
        M = np.zeros((T, T), np.int64)
        M[lower] = entries
        widths = [
            len(complete(M[i:j, i:j], integers_modulo(prime)).new)
            for i, j in finest_blocks(M)
        ]
        total += 1
        if max(widths) <= N:
            decided.add(tuple(M.flat))
    assert decided == realisable
    assert (len(decided) == total) == (N >= T - 1)  # the last column adds nothing


def bidiagonal(T):
    return 2 * np.eye(T, dtype=int) + np.eye(T, k=-1, dtype=int)


def corner(T):
    M = np.eye(T, dtype=int)
    M[T - 1, 0] = 1
    return M


@pytest.mark.parametrize("kernel", [bidiagonal, corner])
@pytest.mark.parametrize("T", [4, 5, 8, 13])
def test_the_papers_counterexamples_have_all_but_one_column_new(kernel, T):
    M = kernel(T)
    assert new_columns(M) == new_columns_by_rank(M) == list(range(T - 1))
    assert finest_blocks(M) == [(0, T)]
    assert attention_dual(M, 2) is None
    assert attention_dual(M, T - 2) is None
    assert attention_dual(M, T - 1).reproduces(M)


def test_length_three_leaves_room_for_two_new_columns():
    for M in (bidiagonal(3), corner(3)):
        assert attention_dual(M, 2).reproduces(M)


@pytest.mark.parametrize("kernel", [bidiagonal, corner])
def test_every_completion_of_a_counterexample_has_a_forced_minor_of_order_three(kernel):
    """Without Theorem 3.1: no entry of M that must not vanish allows a_t = 0, dividing
    by the mask keeps zeros and non-zeros, and rows 2..4, columns 1..3 of the content
    then have the determinant +- (product of non-zero entries) whatever completes it."""
    M = kernel(4)
    assert all(M[t:, :t].any() for t in (1, 2, 3))  # a zero a_t would clear these
    rng = np.random.default_rng(5)
    for _ in range(200):
        r = rng.integers(1, 6, 4) * rng.choice([-1, 1], 4)
        G = [[Fraction(int(M[t, s] * r[s]), int(r[t])) for s in range(4)]
             for t in range(4)]  # fmt: skip
        x = Fraction(int(rng.integers(-9, 10)))  # the one free entry, G[1, 2]
        G[1][2] = x
        minor = [row[:3] for row in G[1:]]
        (a, b, c), (d, e, f), (g, h, i) = minor
        determinant = a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)
        forced = a * e * i if kernel is bidiagonal else b * f * g
        assert determinant == forced != 0


def test_no_dual_of_the_bidiagonal_counterexample_over_three_elements():
    """2I + subdiagonal, N = 2, T = 4, over {0, 1, 2}: every mask, every completion."""
    prime, M = 3, bidiagonal(4)
    triples = list(itertools.combinations(range(4), 3))
    upper = np.triu_indices(4, 1)
    completions = np.array(list(itertools.product(range(prime), repeat=6)))

    def some_completion_has_rank_two(lower):
        G = np.broadcast_to(lower, (len(completions), 4, 4)).copy()
        G[:, upper[0], upper[1]] = completions
        minors = np.stack(
            [
                np.linalg.det(G[:, rows][:, :, columns]).round().astype(int) % prime
                for rows in triples
                for columns in triples
            ]
        )
        return not minors.any(axis=0).all()

    for a in itertools.product((1, 2), repeat=3):  # M[t+1, t] != 0: no a_t is zero
        inverse = np.array(
            [[np.prod(a[s:t], dtype=int) if s <= t else 0 for s in range(4)]
             for t in range(4)]
        )  # fmt: skip  # in {1, 2} each number is its own inverse
        assert not some_completion_has_rank_two(inverse * M % prime)
    assert some_completion_has_rank_two(np.tril(np.ones((4, 4), int)))


def test_a_scalar_ssm_gets_its_own_decays_back():
    rng = np.random.default_rng(3)
    a = np.array([Fraction(int(v), 7) for v in rng.choice([-9, -5, 2, 6, 0], 20)])
    one = np.full((20, 1), Fraction(1), object)
    b = rng.integers(1, 5, (20, 1)).astype(object)
    a[0] = Fraction(0)
    dual = attention_dual(masked_attention(a, one, b), 1)
    assert (dual.a == a).all()
    assert np.array_equal(dual.Q, one)
    assert np.array_equal(dual.K, b)


def test_a_long_product_of_decays_neither_overflows_nor_underflows_the_factors():
    T = 96
    a = np.array([Fraction(1, 2**40)] * T, object)
    one = np.full((T, 1), Fraction(1), object)
    dual = attention_dual(masked_attention(a, one, one), 1)
    _, Q, K = dual.as_floats()
    assert (Q == 1).all()
    assert (K == 1).all()  # where the kernel itself falls below 1e-1100


def test_a_wrong_factor_does_not_reproduce_the_kernel():
    M = bidiagonal(3)
    dual = attention_dual(M, 2)
    dual.K[2, 1] += Fraction(1, 10**30)
    assert not dual.reproduces(M)


def test_the_zero_kernel_has_a_dual_of_every_width():
    M = np.zeros((3, 3), int)
    assert finest_blocks(M) == [(0, 1), (1, 2), (2, 3)]
    for N in (0, 1, 4):
        assert attention_dual(M, N).reproduces(M)


def test_floats_stand_for_their_exact_binary_values():
    M = np.tril(np.full((3, 3), 0.1))
    assert rational(M)[2, 0] == Fraction(0.1) != Fraction(1, 10)
    assert least_width(M) == 1


@pytest.mark.parametrize(
    ("M", "told"),
    [
        (np.ones((2, 3)), r"\(2, 3\)"),
        (np.ones(3), r"\(3,\)"),
        (np.ones((2, 2)), "above the diagonal"),
        (np.diag([1.0, np.nan]), "nan"),
        (np.diag([1.0, np.inf]), "inf"),
        (np.diag([1j, 1]), "1j"),
    ],
)
def test_what_is_no_real_lower_triangle_is_refused(M, told):
    with pytest.raises(InputError, match=told):
        rational(M)
