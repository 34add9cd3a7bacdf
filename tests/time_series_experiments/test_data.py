"""The signal against its plain loop; the exact population error against a sum."""

import numpy as np
import pytest

from experiments.common import InputError, random_stream
from time_series_experiments.data import (
    Array,
    Mixture,
    decay_kernel,
    population_mse,
    sample,
    toeplitz,
)

MIXED = Mixture((0.9, -0.6, 0.0), (1.0, -0.7, 0.3), 7, 0.0)


def loop(mixture: Mixture, x: Array) -> Array:
    """y_t = sum_i c_i h_ti, h_ti = λ_i h_{t-1,i} + x_t, step by step."""
    y = np.zeros_like(x)
    for row in range(len(x)):
        h = [0.0] * len(mixture.lambdas)
        for t in range(mixture.T):
            for i, decay in enumerate(mixture.lambdas):
                h[i] = decay * h[i] + x[row, t]
                y[row, t] += mixture.coeffs[i] * h[i]
    return y


@pytest.mark.parametrize("T", [1, 2, 7, 31])
def test_targets_are_those_of_the_plain_recurrence(T: int) -> None:
    mixture = Mixture(MIXED.lambdas, MIXED.coeffs, T, 0.0)
    x, y = sample(mixture, 3, random_stream(0, "x"), random_stream(0, "noise"))
    np.testing.assert_allclose(y, loop(mixture, x), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(y, x @ toeplitz(mixture.kernel()).T, atol=1e-12)


def test_noise_has_its_deviation_and_leaves_the_inputs_alone() -> None:
    noisy = Mixture(MIXED.lambdas, MIXED.coeffs, 7, 0.3)
    x, y = sample(noisy, 4000, random_stream(1, "x"), random_stream(1, "noise"))
    still, clean = sample(MIXED, 4000, random_stream(1, "x"), random_stream(1, "n"))
    np.testing.assert_array_equal(x, still)
    # 28,000 draws: the deviation of the deviation is 0.3 / sqrt(56,000) = 0.0013.
    assert abs(np.std(y - clean) - 0.3) < 5 * 0.0013
    assert noisy.noise_floor == pytest.approx(0.09)


def test_population_error_is_the_expectation_over_white_inputs() -> None:
    rng = random_stream(2, "matrix")
    mixture = Mixture((0.8,), (1.0,), 5, 0.2)
    matrix = rng.standard_normal((5, 5))  # looks ahead, too: no Toeplitz matrix
    exact = population_mse(matrix, mixture)
    x, y = sample(mixture, 200_000, rng, rng)
    errors = ((y - x @ matrix.T) ** 2).mean(1)
    assert abs(errors.mean() - exact) < 5 * errors.std() / np.sqrt(len(errors))
    # For a causal kernel it is the sum over lags with weights 1 - j/T.
    kernel = decay_kernel((0.5,), (0.9,), 5)
    lags = (1 - np.arange(5) / 5) @ (mixture.kernel() - kernel) ** 2
    assert population_mse(toeplitz(kernel), mixture) == pytest.approx(lags + 0.04)


def test_equal_decays_are_one_and_zero_coefficients_none() -> None:
    assert Mixture((0.5, 0.5, 0.9), (1.0, 2.0, 0.0), 9, 0.0).n_decays == 1
    assert Mixture((0.5, 0.5), (1.0, -1.0), 9, 0.0).n_decays == 0


@pytest.mark.parametrize(
    ("lambdas", "coeffs", "T", "noise", "said"),
    [
        ((0.9, 0.5), (1.0,), 9, 0.1, "2 decays and 1 coefficients"),
        ((1.0,), (1.0,), 9, 0.1, "|λ| < 1"),
        ((-1.5,), (1.0,), 9, 0.1, "|λ| < 1"),
        ((float("nan"),), (1.0,), 9, 0.1, "finite"),
        ((), (), 9, 0.1, "at least one"),
        ((0.9,), (1.0,), 0, 0.1, "at least 1"),
        ((0.9,), (1.0,), 9, -0.1, "0 or more"),
        ((0.9,), (1.0,), 9, float("inf"), "0 or more"),
    ],
)
def test_a_signal_that_is_none_is_refused_in_one_line(
    lambdas: tuple[float, ...],
    coeffs: tuple[float, ...],
    T: int,
    noise: float,
    said: str,
) -> None:
    with pytest.raises(InputError) as refusal:
        Mixture(lambdas, coeffs, T, noise)
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)
