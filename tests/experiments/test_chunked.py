"""The chunked form against the recurrence, the full kernel and exact fractions."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.chunked import chunk_matrices, chunked
from experiments.common import InputError
from experiments.kernels import largest_difference, recurrence, semiseparable_kernel

AGREE = 1e-13  # relative to the output's scale
LENGTHS = (1, 2, 63, 64, 65, 127, 257)
CHUNKS = (1, 2, 3, 8, 32, 64, 100, 512)
DECAYS = {
    "one": [1.0, 1.0],
    "zero": [0.0, 0.7],
    "tiny": [1e-300, 0.9],
    "smallest": [5e-324, -1e-160],
    "negative": [-0.9, -1.0],
    "growing": [1.05, -1.02],
    "complex": [0.9 + 0.3j, -0.2 - 0.97j],
}


def draw(T, N, d, seed=0, *, is_complex=False):
    rng = np.random.default_rng(seed)

    def numbers(*shape):
        values = rng.standard_normal(shape)
        return values + 1j * rng.standard_normal(shape) if is_complex else values

    a = numbers(T, N)
    a /= np.maximum(1.0, np.abs(a))
    return a, numbers(T, N), numbers(T, N), numbers(T, d), numbers(N, d)


def in_full(rows, T):
    return np.broadcast_to(rows, (T, rows.shape[1]))


def assert_same(a, b, c, x, h, chunk):
    T = len(x)
    rows = [in_full(v, T) for v in (a, b, c)]
    y, state = recurrence(*rows, x, h)
    # Rounding follows the terms of a sum, not what is left of them.
    terms, state_terms = recurrence(*(np.abs(v) for v in (*rows, x, h)))
    y_chunked, state_chunked = chunked(a, b, c, x, h, chunk)
    assert np.all(np.abs(y_chunked - y) <= AGREE * terms.max(initial=0.0))
    assert np.all(np.abs(state_chunked - state) <= AGREE * state_terms.max(initial=0.0))
    assert y_chunked.dtype == y.dtype
    assert y_chunked.shape == y.shape
    assert state_chunked.shape == state.shape


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("constant", ["", "a", "abc", "bc"])
def test_outputs_and_final_state_are_the_recurrence_s(T, chunk, constant):
    a, b, c, x, h = draw(T, 3, 2, seed=T)
    a, b, c = (
        v[:1] if name in constant else v
        for name, v in zip("abc", (a, b, c), strict=True)
    )
    assert_same(a, b, c, x, h, chunk)


@settings(deadline=None, max_examples=60)
@given(
    T=st.integers(1, 150),
    N=st.integers(0, 5),
    d=st.integers(1, 3),
    chunk=st.integers(1, 200),
    seed=st.integers(0, 2**32 - 1),
    is_complex=st.booleans(),
    special=st.sampled_from([None, 0.0, 1.0, -1.0, 1e-300]),
    steps=st.sets(st.integers(0, 149), max_size=8),
)
def test_any_sizes_and_decays(T, N, d, chunk, seed, is_complex, special, steps):
    a, b, c, x, h = draw(T, N, d, seed, is_complex=is_complex)
    if special is not None:
        a[[t for t in steps if t < T]] = special
    assert_same(a, b, c, x, h, chunk)


@pytest.mark.parametrize("name", DECAYS)
@pytest.mark.parametrize("chunk", [7, 32, 512])
@pytest.mark.parametrize("rows", [1, 193])
def test_extreme_decays(name, chunk, rows):
    values = np.array(DECAYS[name])
    _, b, c, x, h = draw(193, 2, 3, seed=5)
    assert_same(np.tile(values, (rows, 1)), b, c, x, h, chunk)


def test_growth_to_the_edge_of_float64_stays_finite():
    _, b, c, x, h = draw(90, 2, 2, seed=6)
    a = np.array([[1e3, -2.0]])  # 1e3^90 = 1e270
    y, state = chunked(a, b, c, x, h, chunk=512)
    assert np.isfinite(y).all()
    assert np.isfinite(state).all()
    assert_same(a, b, c, x, h, 512)


def test_a_zero_decay_forgets_everything_before_it():
    a, b, c, x, h = draw(100, 3, 2, seed=7)
    a[50] = 0.0
    y, _ = chunked(a, b, c, x, h)
    y_other, _ = chunked(a, b, c, np.where(np.arange(100) < 50, 9.0, x.T).T, -h)
    np.testing.assert_array_equal(y[64:], y_other[64:])  # whole chunks after the zero
    np.testing.assert_allclose(y[50:], y_other[50:], rtol=1e-12, atol=1e-12)
    assert largest_difference(y[:50], y_other[:50]) > 0.1


@pytest.mark.parametrize("chunk", [1, 2, 5, 8, 64])
@pytest.mark.parametrize("constant", [True, False])
def test_against_exact_fractions(chunk, constant):
    T, N, d = 21, 2, 1
    a, b, c, x, h = draw(T, N, d, seed=8)
    a = a[:1] if constant else a
    state = [Fraction(float(v)) for v in h[:, 0]]
    exact = []
    for t in range(T):
        state = [
            Fraction(float(in_full(a, T)[t, n])) * state[n]
            + Fraction(float(b[t, n])) * Fraction(float(x[t, 0]))
            for n in range(N)
        ]
        exact.append(sum(Fraction(float(c[t, n])) * state[n] for n in range(N)))
    y, final = chunked(a, b, c, x, h, chunk)
    scale = max(abs(v) for v in exact)
    assert all(
        abs(Fraction(float(v)) - e) <= 1e-15 * float(scale) * 8
        for v, e in zip(y[:, 0], exact, strict=True)
    )
    np.testing.assert_allclose(final[:, 0], [float(s) for s in state], rtol=1e-13)


@pytest.mark.parametrize("Q", [1, 2, 4, 5, 6, 8, 12, 16, 31, 32])
def test_chunk_matrices_against_the_semiseparable_kernel_of_each_chunk(Q):
    a, b, c, _, _ = draw(3 * Q, 4, 1, seed=Q)
    K, queries, keys, whole = chunk_matrices(*(v.reshape(3, Q, 4) for v in (a, b, c)))
    for j in range(3):
        part = slice(j * Q, (j + 1) * Q)
        expected = semiseparable_kernel(a[part], b[part], c[part])
        np.testing.assert_allclose(K[j], expected, rtol=1e-12, atol=1e-13)
        assert not np.triu(K[j], 1).any()
        from_t = [np.prod(a[part][: t + 1], axis=0) * c[part][t] for t in range(Q)]
        to_end = [np.prod(a[part][s + 1 :], axis=0) * b[part][s] for s in range(Q)]
        np.testing.assert_allclose(queries[j], from_t, rtol=1e-12)
        np.testing.assert_allclose(keys[j], to_end, rtol=1e-12)
        np.testing.assert_allclose(whole[j], np.prod(a[part], axis=0), rtol=1e-12)


def test_constant_parameters_share_one_toeplitz_kernel():
    a, b, c = (np.full((1, 16, 2), v) for v in ([0.9, -0.5], [1.0, 2.0], [0.3, 1.0]))
    K = chunk_matrices(a, b, c)[0]
    assert K.shape == (1, 16, 16)
    powers = np.array([0.3 * 0.9**k + 2.0 * (-0.5) ** k for k in range(16)])
    for lag in range(16):
        np.testing.assert_allclose(np.diagonal(K[0], -lag), powers[lag], rtol=1e-13)


def test_two_calls_joined_by_the_state_are_one_call():
    a, b, c, x, h = draw(200, 3, 2, seed=9)
    y, final = chunked(a, b, c, x, h)
    y1, middle = chunked(a[:77], b[:77], c[:77], x[:77], h)
    y2, end = chunked(a[77:], b[77:], c[77:], x[77:], middle)
    assert largest_difference(np.concatenate([y1, y2]), y) <= AGREE
    assert largest_difference(end, final) <= AGREE


def test_longer_than_one_batch():
    a, b, c, x, h = draw(9001, 2, 1, seed=10)
    assert_same(a, b, c, x, h, 32)  # four batches and a rest
    assert_same(a[:1], b, c, x, h, 5000)


def test_inputs_are_left_alone_and_the_state_starts_at_zero():
    a, b, c, x, h = draw(70, 2, 2, seed=11)
    copies = [v.copy() for v in (a, b, c, x, h)]
    y, _ = chunked(a, b, c, x)
    chunked(a, b, c, x, h)
    for before, after in zip(copies, (a, b, c, x, h), strict=True):
        np.testing.assert_array_equal(before, after)
    assert largest_difference(y, recurrence(a, b, c, x)[0]) <= AGREE


def test_no_steps_return_the_initial_state():
    h = np.arange(6.0).reshape(2, 3)
    y, final = chunked(*[np.zeros((0, 2))] * 3, np.zeros((0, 3)), h)
    assert y.shape == (0, 3)
    np.testing.assert_array_equal(final, h)


@pytest.mark.parametrize("chunk", [0, -4])
def test_a_chunk_of_nothing_is_refused(chunk):
    a, b, c, x, _ = draw(4, 1, 1)
    with pytest.raises(InputError, match="chunk: got"):
        chunked(a, b, c, x, chunk=chunk)


def test_any_memory_layout():
    a, b, c, x, h = draw(2100, 3, 2, seed=12)
    assert_same(*(np.asfortranarray(v) for v in (a, b, c, x, h)), 32)
    assert_same(*(v[::-1] for v in (a, b, c, x)), h, 32)
    assert_same(in_full(a[:1], 2100), b, c, x, h, 64)
