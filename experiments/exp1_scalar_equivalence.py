"""A scalar SSM is 1-semiseparable attention.

    h_t = a h_{t-1} + b x_t,  y_t = c h_t     =     y = M x,  M[t, s] = c a^(t-s) b

for s <= t. Source: "On Structured State-Space Duality" (arXiv:2510.04944), section 2:
the scalar case, whose mask L[t, s] = a^(t-s) is the 1-semiseparable matrix of
Dao & Gu (2024), section 3.
"""

import sys
from typing import Any

import numpy as np
from jaxtyping import Inexact

from experiments.common import (
    ExperimentResult,
    check_finite,
    check_integer,
    check_powers_finite,
    command_line,
    random_stream,
)
from experiments.kernels import constant, largest_difference, recurrence

NAME = "exp1_scalar_equivalence"
CLAIM = "a scalar SSM's recurrence equals 1-semiseparable attention"
TOLERANCE = 2e-14  # relative to the output's scale, for |a| <= 1


def attention_kernel(
    a: float, b: float, c: float, T: int
) -> Inexact[np.ndarray, "T T"]:
    """M[t, s] = c a^(t-s) b for s <= t, zero above the diagonal."""
    lag = np.subtract.outer(np.arange(T), np.arange(T))
    return np.where(lag >= 0, c * np.power(a, np.maximum(lag, 0)) * b, 0.0)


def tolerance(a: float, kernel: np.ndarray, x: np.ndarray, largest: float) -> float:
    """How far rounding may part the two forms, relative to the largest output.

    Growing terms, |a| > 1, can cancel: y then is small beside what it is a sum of, and
    T steps of rounding are relative to that, to |M| |x| (Higham, "Accuracy and
    Stability of Numerical Algorithms", section 3.1).
    """
    if abs(a) <= 1 or largest == 0:
        return TOLERANCE
    terms = (np.abs(kernel) @ np.abs(x)).max() / largest
    return float(max(TOLERANCE, len(x) * np.finfo(float).eps * terms))


def run(T: int = 64, a: float = 0.9, seed: int = 0) -> ExperimentResult:
    """Compare the recurrence h_t = a h_{t-1} + b x_t with attention by powers of a.

    Args:
        T: sequence length, at least 1
        a: decay; any finite number whose T-th power is finite (0 and negatives too)
        seed: draws the input x and the couplings b and c
    """
    check_integer("T", T, at_least=1, example=64)
    check_finite("a", a)
    check_powers_finite("a", (a,), T)
    rng = random_stream(seed, "data")
    b, c = rng.standard_normal(2)
    x = rng.standard_normal((T, 1))

    decays, B, C = (constant(np.array([value]), T) for value in (a, b, c))
    y_recurrence, _ = recurrence(decays, B, C, x)
    kernel = attention_kernel(a, b, c, T)
    y_attention, largest = kernel @ x, np.abs(y_recurrence).max()
    allowed = tolerance(a, kernel, x, largest)

    metadata = {
        "T": T,
        "a": a,
        "b": b,
        "c": c,
        "seed": seed,
        "largest_difference": largest_difference(y_attention, y_recurrence),
        "largest_output": largest,
        "tolerance": allowed,
    }
    details = (
        f"max |attention - recurrence| = {metadata['largest_difference']:.1e} "
        f"(relative; tolerance {allowed:.0e}) at T = {T}, a = {a:g}, seed {seed}"
    )
    return ExperimentResult(NAME, details, metadata, not problems(metadata))


def problems(metadata: dict[str, Any]) -> list[str]:
    """The claims that a record's metadata breaks."""
    difference = float(metadata["largest_difference"])
    if not difference <= float(metadata["tolerance"]):
        return [f"{CLAIM}: they differ by {difference:.1e}"]
    return []


if __name__ == "__main__":
    sys.exit(command_line(run))
