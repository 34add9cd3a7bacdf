"""bound_N: a grid, known values, no random model below it, and the Jacobian."""

from functools import cache, partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.common import InputError
from time_series_experiments.bound import (
    attainable_mse,
    hankel_singular_values,
    lag_weights,
    project,
)
from time_series_experiments.data import (
    Array,
    Mixture,
    decay_kernel,
    population_mse,
    toeplitz,
)

TWO = Mixture((0.9, 0.5), (1.0, 0.7), 100, 1e-4)
FOUR = Mixture((0.95, 0.8, 0.5, 0.2), (1.0, 0.7, 0.5, 0.3), 100, 1e-4)
# What N poles can be: of signed weights the best poles are not the decays.
SIGNED = Mixture((0.9, -0.7, 0.4, -0.2), (1.0, 0.8, -0.5, 0.9), 23, 0.0)


def test_one_state_against_a_fine_grid_of_poles() -> None:
    poles = np.linspace(-0.999, 0.999, 19_981)
    powers = poles[:, None] ** np.arange(TWO.T)
    weights, kernel = lag_weights(TWO.T), TWO.kernel()
    # For each pole the best residue in closed form.
    residues = (powers * weights) @ kernel / ((powers**2) @ weights)
    errors = ((kernel - residues[:, None] * powers) ** 2) @ weights
    bound = attainable_mse(TWO, 1)
    assert bound.excess <= errors.min()
    assert bound.excess == pytest.approx(errors.min(), rel=1e-6)
    assert bound.poles[0].real == pytest.approx(poles[errors.argmin()], abs=2e-4)
    assert bound.mse == pytest.approx(0.1302, abs=5e-5)
    assert bound.poles[0].real == pytest.approx(0.858, abs=5e-4)


@pytest.mark.parametrize(("N", "value"), [(1, 0.697), (2, 1.11e-2), (3, 3.5e-5)])
def test_four_decays_have_the_values_of_the_issue(N: int, value: float) -> None:
    bound = attainable_mse(FOUR, N)
    assert bound.excess == pytest.approx(value, rel=0.01)
    assert bound.mse == bound.excess + FOUR.noise_floor
    assert bound.agreeing >= 25


def test_as_many_states_as_decays_reach_the_noise() -> None:
    for N in (4, 5):
        assert attainable_mse(FOUR, N).mse == FOUR.noise_floor
    # And the search itself would find that: its residual vanishes at the decays.
    root = np.sqrt(lag_weights(TWO.T))
    found = project(root * TWO.kernel(), root, np.array([1.4, -0.45]))
    np.testing.assert_allclose(found.residual, 0, atol=1e-13)


@pytest.mark.parametrize(("N", "T"), [(1, 1), (1, 2), (1, 3), (2, 2), (2, 4), (2, 5)])
def test_n_poles_and_residues_interpolate_2n_steps_and_no_more(N: int, T: int) -> None:
    short = Mixture(FOUR.lambdas, FOUR.coeffs, T, 0.1)
    excess = attainable_mse(short, N).excess
    assert excess < 1e-28 if T <= 2 * N else excess > 1e-9


def test_poles_and_residues_attain_the_bound() -> None:
    for mixture, N in ((TWO, 1), (FOUR, 3), (SIGNED, 2), (SIGNED, 3)):
        bound = attainable_mse(mixture, N)
        kernel = decay_kernel(bound.poles, bound.residues, mixture.T)
        error = population_mse(toeplitz(kernel), mixture)
        assert error == pytest.approx(bound.mse, rel=1e-9)
        np.testing.assert_allclose((bound.poles**5).sum().imag, 0, atol=1e-12)


bound_of_signed = cache(partial(attainable_mse, SIGNED))  # one search for all examples


@given(
    N=st.integers(1, 3),
    pairs=st.booleans(),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=150, deadline=None)
def test_no_model_of_n_states_is_below_it(N: int, pairs: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    bound = bound_of_signed(N)
    near = bound.poles * (1 + 10 ** rng.uniform(-6, 0) * rng.standard_normal())
    poles = near if seed % 2 else rng.uniform(-1, 1, N).astype(complex)
    if pairs and N > 1:
        poles[0] = rng.uniform(0, 1) * np.exp(1j * rng.uniform(0, np.pi))
        poles[1] = poles[0].conj()
    root = np.sqrt(lag_weights(SIGNED.T))
    lags = np.arange(SIGNED.T)[:, None]
    basis = np.column_stack([(poles**lags).real, (poles**lags).imag])
    best = np.linalg.lstsq(root[:, None] * basis, root * SIGNED.kernel(), rcond=None)
    error = population_mse(toeplitz(basis @ best[0]), SIGNED)
    assert error >= bound.mse * (1 - 1e-9)


def test_a_pair_of_conjugate_poles_is_found() -> None:
    # k_j = 0.9^j cos(j) up to rounding: no two real poles make it, one pair does.
    angle = 0.9 * np.exp(1j)
    root = np.sqrt(lag_weights(40))
    kernel = (angle ** np.arange(40)).real
    theta = np.array([2 * angle.real, -(abs(angle) ** 2)])
    found = project(root * kernel, root, theta)
    np.testing.assert_allclose(found.residual, 0, atol=1e-13)
    real = project(root * kernel, root, np.array([1.4, -0.45]))
    assert (real.residual**2).sum() > 0.1


@pytest.mark.parametrize("theta", [[1.4, -0.45], [1.2, -0.36], [0.5, -0.9, 0.7], [0.3]])
def test_half_the_gradient_of_the_excess_is_jacobian_times_residual(
    theta: list[float],
) -> None:
    root = np.sqrt(lag_weights(SIGNED.T))
    target = root * SIGNED.kernel()

    def excess(at: Array) -> float:
        return float((project(target, root, at).residual ** 2).sum())

    at, step = np.array(theta), 1e-6
    here = project(target, root, at)
    own = 2 * here.jacobian.T @ here.residual
    moves = step * np.eye(len(at))
    numeric = [(excess(at + m) - excess(at - m)) / (2 * step) for m in moves]
    np.testing.assert_allclose(own, numeric, rtol=1e-5, atol=1e-7)


def test_hankel_singular_values_are_those_of_a_long_hankel_matrix() -> None:
    lags = np.arange(300)
    kernel = decay_kernel(TWO.lambdas, TWO.coeffs, 600)
    exact = np.linalg.svd(kernel[lags[:, None] + lags], compute_uv=False)[:2]
    np.testing.assert_allclose(hankel_singular_values(TWO), exact, rtol=1e-9)
    # Another norm: its second value squared is not the error of one state.
    assert abs(exact[1] ** 2 - attainable_mse(TWO, 1).excess) > 0.05


def test_no_states_are_refused() -> None:
    with pytest.raises(InputError, match="N: got 0"):
        attainable_mse(TWO, 0)
