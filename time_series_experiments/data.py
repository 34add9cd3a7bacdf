"""y_t = sum_i c_i sum_{s<=t} λ_i^(t-s) x_s + σ ε_t: a signal with K decays.

Glossary: K decays λ with coefficients c in the signal, N states in a model, T steps,
k_j = sum_i c_i λ_i^j the kernel at lag j = 0 … T-1, σ the deviation of the noise.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Inexact

from experiments.common import (
    InputError,
    bad_input,
    check_finite,
    check_integer,
    check_nonempty,
)

Array = np.ndarray


@dataclass(frozen=True)
class Mixture:
    """The signal: K decays λ in (-1, 1), coefficients c, T steps, noise σ.

    Raises InputError for lists of different lengths, |λ| >= 1, σ < 0 and T < 1.
    """

    lambdas: tuple[float, ...]
    coeffs: tuple[float, ...]
    T: int
    noise_std: float

    def __post_init__(self) -> None:
        check_nonempty("lambdas", self.lambdas, "--lambdas 0.9 0.5")
        if len(self.lambdas) != len(self.coeffs):
            raise InputError(
                f"lambdas, coeffs: got {len(self.lambdas)} decays and "
                f"{len(self.coeffs)} coefficients; expected equally many; give one "
                "coefficient a decay"
            )
        check_finite("lambdas", self.lambdas)
        check_finite("coeffs", self.coeffs)
        for decay in self.lambdas:
            if abs(decay) >= 1:
                raise bad_input(
                    "lambdas",
                    decay,
                    "decays with |λ| < 1",
                    "a signal that does not decay has no finite error; try 0.99",
                )
        check_integer("T", self.T, at_least=1, example=100)
        if not 0 <= self.noise_std < math.inf:
            raise bad_input("noise_std", self.noise_std, "0 or more", "try 1e-4")

    @property
    def noise_floor(self) -> float:
        """σ²: the mean squared error that no model can beat."""
        return self.noise_std**2

    @property
    def n_decays(self) -> int:
        """How many different decays there are with a coefficient that is not zero."""
        return len(self.terms())

    def kernel(self) -> Float[Array, " T"]:
        """k_j = sum_i c_i λ_i^j."""
        return decay_kernel(self.lambdas, self.coeffs, self.T)

    def terms(self) -> dict[float, float]:
        """The sum of the coefficients of each different decay, zeros left out."""
        sums: dict[float, float] = {}
        for decay, coeff in zip(self.lambdas, self.coeffs, strict=True):
            sums[decay] = sums.get(decay, 0.0) + coeff
        return {decay: coeff for decay, coeff in sums.items() if coeff}


def decay_kernel(
    decays: Sequence[float] | Inexact[Array, " N"],
    weights: Sequence[float] | Inexact[Array, " N"],
    T: int,
) -> Float[Array, " T"]:
    """k_j = Re sum_n w_n a_n^j for j = 0 … T-1, with 0^0 = 1."""
    a, w = np.asarray(decays), np.asarray(weights)
    return (w @ a[:, None] ** np.arange(T)).real


def sample(
    mixture: Mixture, n: int, inputs: np.random.Generator, noise: np.random.Generator
) -> tuple[Float[Array, "n T"], Float[Array, "n T"]]:
    """n sequences x ~ N(0, 1) and their targets y, float64; h_0 = 0.

    One generator for each, so that a change of σ leaves x as it was.
    """
    from scipy.signal import lfilter

    x = inputs.standard_normal((n, mixture.T))
    y = mixture.noise_std * noise.standard_normal((n, mixture.T))
    for decay, coeff in zip(mixture.lambdas, mixture.coeffs, strict=True):
        y += lfilter([coeff], [1.0, -decay], x, axis=1)
    return x, y


def toeplitz(kernel: Float[Array, " T"]) -> Float[Array, "T T"]:
    """M[t, s] = k_{t-s} for s <= t, else 0: the matrix that the recurrence applies."""
    T = len(kernel)
    lag = np.arange(T)[:, None] - np.arange(T)
    return np.where(lag >= 0, kernel[np.abs(lag)], 0.0)


def population_mse(
    matrix: Float[Array, "T T"],
    mixture: Mixture,
) -> float:
    """E mean_t (y_t - ŷ_t)² of ŷ = M x over x ~ N(0, I) and the noise: exact.

    = (1/T) sum_{t,s} (K[t, s] - M[t, s])² + σ², whatever M is: it may look ahead or
    vary with t, so that the value holds for every model that is linear in x.
    """
    error = toeplitz(mixture.kernel()) - matrix
    return float((error**2).sum() / mixture.T + mixture.noise_floor)
