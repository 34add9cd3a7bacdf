"""Solvers against SciPy's exponential, interval by interval, in float64.

``naive_exact`` and ``naive_euler`` are the reference of this package; its other tests
import them from here.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from experiments.common import InputError
from lcde._solvers import (
    adaptive_cde_solve,
    exact_cde_solve,
    parallel_cde_solve,
    scan_cde_solve,
)
from lcde._structures import Dense, random_structure

Array = np.ndarray
H, W = 4, 3


def naive_exact(A: Array, B: Array, path: Array, y0: Array) -> Array:
    """y at the knots, one exponential of [[M, b], [0, 0]] an interval, A (W, H, H)."""
    ys = [y0]
    for increment in np.diff(path, axis=0):
        wide = np.zeros((len(y0) + 1, len(y0) + 1))
        wide[:-1, :-1] = sum(v * A_k for v, A_k in zip(increment, A, strict=True))
        wide[:-1, -1] = B @ increment
        ys.append((scipy.linalg.expm(wide) @ [*ys[-1], 1])[:-1])
    return np.array(ys)


def naive_euler(A: Array, B: Array, path: Array, y0: Array) -> Array:
    """y at the knots by y <- y + sum_k A_k y Δ_k + B Δ."""
    ys = [y0]
    for increment in np.diff(path, axis=0):
        slopes = np.stack([A_k @ ys[-1] for A_k in A], axis=1) + B
        ys.append(ys[-1] + slopes @ increment)
    return np.array(ys)


TIGHT = partial(adaptive_cde_solve, rtol=1e-11, atol=1e-11)
EULER_SCANNED = partial(parallel_cde_solve, transition="euler")
EACH = {
    "exact": (exact_cde_solve, naive_exact, 1e-11),
    "parallel": (parallel_cde_solve, naive_exact, 1e-11),
    "adaptive": (TIGHT, naive_exact, 1e-8),
    "euler": (scan_cde_solve, naive_euler, 1e-12),
    "euler, parallel": (EULER_SCANNED, naive_euler, 1e-12),
}
FIXED = {
    "exact": exact_cde_solve,
    "parallel": parallel_cde_solve,
    "euler": scan_cde_solve,
}
KNOTS = 7  # of every adaptive solve, so that they share one compilation


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def problem(L: int, size: float = 1.0) -> tuple[Array, Array, Array, Array]:
    """A, B, a random walk of expected length ``size`` a channel, y_0."""
    rng = np.random.default_rng(L)
    A, B = rng.standard_normal((W, H, H)) / H**0.5, rng.standard_normal((H, W))
    steps = rng.standard_normal((L, W)) * size / max(L - 1, 1)
    return A, B, np.cumsum(steps, axis=0), rng.standard_normal(H)


def solved(solve, A, B, path, y0, **options):
    return solve(Dense(jnp.asarray(A)), *map(jnp.asarray, (B, path, y0)), **options)


@jax.jit
def _adaptive(A, B, path, y0, options):
    return solved(adaptive_cde_solve, A, B, path, y0, **options)


def adaptive(A, B, path, y0, *, ts=None, length=KNOTS, tolerance=1e-11):
    options = {"rtol": tolerance, "atol": tolerance, "length": length}
    options["ts"] = np.linspace(0, 1, KNOTS) if ts is None else ts
    return np.asarray(_adaptive(A, B, path, y0, jax.tree.map(jnp.asarray, options)))


def close(got, want, rtol):
    np.testing.assert_allclose(got, want, rtol=rtol, atol=rtol * np.abs(want).max())


@pytest.mark.parametrize("L", [1, 2, 63, 64, 65, 97])
def test_solutions_at_every_knot_are_the_references(L):
    given = problem(L, size=3.0)

    @jax.jit
    def solve_all(*operands):
        return {name: solved(solve, *operands) for name, solve in FIXED.items()}

    for name, ys in solve_all(*given).items():
        assert ys.shape == (L, H)
        close(ys, EACH[name][1](*given), EACH[name][2])


def test_the_adaptive_solution_is_the_exact_one():
    given = problem(KNOTS, size=3.0)
    close(adaptive(*given), naive_exact(*given), 1e-9)
    one = problem(1)
    assert np.array_equal(solved(adaptive_cde_solve, *one), one[3][None])
    close(solved(TIGHT, *problem(2)), naive_exact(*problem(2)), 1e-9)


@pytest.mark.parametrize("name", EACH)
def test_gradients_in_A_B_path_and_y0_are_central_differences(name):
    solve, naive, rtol = EACH[name]
    given = problem(4, size=2.0)
    weights = np.random.default_rng(1).standard_normal((4, H))

    def loss(*operands):
        return (solved(solve, *operands) * weights).sum()

    gradients = jax.jit(jax.grad(loss, (0, 1, 2, 3)))(*given)
    for i, gradient in enumerate(gradients):
        wanted = np.zeros_like(given[i])
        for at in np.ndindex(wanted.shape):

            def moved(h: float, i: int = i, at: tuple = at) -> float:
                others = [x.copy() for x in given]
                others[i][at] += h
                return float((naive(*others) * weights).sum())

            h = 1e-3
            near, far = moved(h) - moved(-h), moved(2 * h) - moved(-2 * h)
            wanted[at] = (8 * near - far) / (12 * h)
        close(gradient, wanted, max(10 * rtol, 1e-9))


# --- orders and tolerances ------------------------------------------------------------


def refined(path: Array, n: int) -> Array:
    """The same path with ``n`` knots for each one before."""
    at = np.arange(n * (len(path) - 1) + 1) / n
    return np.stack(
        [np.interp(at, np.arange(len(path)), column) for column in path.T], axis=1
    )


def test_the_error_of_euler_falls_with_order_one():
    A, B, path, y0 = problem(5, size=2.0)
    wanted = naive_exact(A, B, path, y0)[-1]
    parts = np.array([32, 64, 128, 256])
    solve = jax.jit(partial(solved, scan_cde_solve))
    errors = [
        np.linalg.norm(solve(A, B, refined(path, n), y0)[-1] - wanted) for n in parts
    ]
    slope = np.polyfit(np.log(1 / parts), np.log(errors), 1)[0]
    assert slope == pytest.approx(1, abs=0.1)


def test_the_error_of_the_adaptive_solver_falls_with_its_tolerance():
    given = problem(KNOTS, size=6.0)
    wanted = naive_exact(*given)

    tolerances = 10.0 ** -np.arange(3, 11)
    errors = [np.abs(adaptive(*given, tolerance=t) - wanted).max() for t in tolerances]
    slope = np.polyfit(np.log(tolerances), np.log(errors), 1)[0]
    assert slope == pytest.approx(1, abs=0.25)
    assert errors[-1] < 1e-7 * np.abs(wanted).max() < errors[0]


def test_refining_a_path_changes_no_exact_solution():
    A, B, path, y0 = problem(6, size=3.0)
    fine = jax.jit(partial(solved, exact_cde_solve))(A, B, refined(path, 3), y0)
    close(np.asarray(fine)[::3], naive_exact(A, B, path, y0), 1e-11)


def test_going_back_along_the_path_undoes_the_solution():
    A, B, path, y0 = problem(6, size=3.0)
    there_and_back = np.concatenate([path, path[-2::-1]])
    ys = jax.jit(partial(solved, exact_cde_solve))(A, B, there_and_back, y0)
    close(ys[-1], y0, 1e-11)


def test_times_of_the_knots_do_not_change_the_solution():
    given = problem(KNOTS, size=3.0)
    ts = np.array([-1.0, 0.0, 0.1, 4.0, 4.5, 7.0, 7.25])
    close(adaptive(*given, ts=ts), naive_exact(*given), 1e-8)


# --- lengths --------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIXED)
def test_each_path_stands_still_behind_its_own_length(name):
    lengths = np.array([1, 2, 5, 7])
    A, B, path, y0 = problem(7, size=2.0)
    padded = np.where(np.arange(7)[:, None] < lengths[:, None, None], path, np.nan)

    def solve(path, length):
        return solved(FIXED[name], A, B, path, y0, length=length)

    ys = jax.jit(jax.vmap(solve))(padded, jnp.asarray(lengths))
    whole = EACH[name][1](A, B, path, y0)
    for i, length in enumerate(lengths):
        close(ys[i, :length], whole[:length], 1e-11)
        assert (ys[i, length:] == ys[i, length - 1]).all()


def test_an_adaptive_path_stands_still_behind_its_length():
    A, B, path, y0 = problem(KNOTS, size=2.0)
    for length in (1, 4):
        ys = adaptive(
            A,
            B,
            np.where(np.arange(KNOTS)[:, None] < length, path, np.nan),
            y0,
            length=length,
        )
        close(ys[:length], naive_exact(A, B, path[:length], y0), 1e-9)
        assert (ys[length:] == ys[length - 1]).all()


def test_the_gradient_is_zero_behind_the_length_and_not_before():
    A, B, path, y0 = problem(7, size=2.0)
    path[4:] = np.nan

    def end(path):
        return solved(exact_cde_solve, A, B, path, y0, length=4)[-1].sum()

    gradient = jax.jit(jax.grad(end))(path)
    assert np.asarray(gradient[:4]).all()
    assert np.isfinite(gradient).all()
    assert not np.asarray(gradient[4:]).any()


# --- structures -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["block_diagonal", "diagonal_plus_low_rank"])
def test_a_structure_gives_the_solution_of_its_dense_matrices(name):
    _, B, path, y0 = problem(9, size=2.0)
    A = random_structure(name, W, H, block_size=2, rank=2, key=jax.random.key(2))

    @jax.jit
    def solve_all(A):
        operands = [jnp.asarray(x) for x in (B, path, y0)]
        return {key: solve(A, *operands) for key, solve in FIXED.items()}

    dense = np.asarray(A.dense())
    for key, ys in solve_all(A).items():
        close(ys, EACH[key][1](dense, B, path, y0), EACH[key][2])


def test_float32_stays_float32_and_keeps_its_digits():
    given = problem(97, size=3.0)
    single = [x.astype(np.float32) for x in given]
    wanted = naive_exact(*(x.astype(float) for x in single))
    for solve in (exact_cde_solve, parallel_cde_solve):
        ys = jax.jit(partial(solved, solve))(*single)
        assert ys.dtype == np.float32
        close(ys, wanted, 1e-5)


def test_an_unknown_transition_is_named():
    with pytest.raises(InputError, match=r"'eulr'.*exact or euler"):
        solved(parallel_cde_solve, *problem(3), transition="eulr")
