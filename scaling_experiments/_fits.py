"""Laws behind measured times: exponents, lines, and where one curve crosses another."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.exp4_time_scaling import fit_exponent, t_quantile

Samples = Sequence[Sequence[float]]  # the repeats at each length
RESAMPLES = 1000


def exponents(lengths: Sequence[int], seconds: Sequence[float]) -> dict[str, Any]:
    """p in seconds ~ length^p: between neighbours, and over the upper half of lengths.

    The upper half (at least three lengths, where there are so many) is where constant
    costs no longer hide the law; its interval is the fit's (95 %, Student's t).
    """
    start = min(len(lengths) // 2, max(0, len(lengths) - 3))
    u, v = np.log(lengths), np.log(seconds)
    return {
        "local": (np.diff(v) / np.diff(u)).tolist(),
        "from": int(lengths[start]),
        **fit_exponent(lengths[start:], seconds[start:]),
    }


def exponents_text(fit: dict[str, Any]) -> str:
    """``1.02 ±0.07`` (95 %), without what too few lengths leave undefined."""
    if fit["exponent"] is None:
        return "- (one length)"
    if fit["exponent_ci95"] is None:
        return f"{fit['exponent']:.2f}"
    low, high = fit["exponent_ci95"]
    return f"{fit['exponent']:.2f} ±{(high - low) / 2:.2f}"


def slope_text(fit: dict[str, Any], unit: float, spec: str) -> str:
    """``0.12 ±0.02`` (95 %) in ``unit``; ``-`` where there are too few points."""
    if fit["slope"] is None:
        return "-"
    low, high = fit["ci95"]
    return f"{unit * fit['slope']:{spec}} ±{unit * (high - low) / 2:{spec}}"


def fit_line(x: Sequence[float], y: Sequence[float]) -> dict[str, Any]:
    """The least-squares slope of y on x with its 95 % interval (None below 3 points).

    A constant y has slope 0 exactly.
    """
    if len(x) < 3:
        return {"slope": None, "ci95": None}
    shifted = np.asarray(y, dtype=float) - y[0]  # else rounding tilts a constant
    (slope, _), covariance = np.polyfit(x, shifted, 1, cov=True)
    half = t_quantile(len(x) - 2) * math.sqrt(max(float(covariance[0, 0]), 0.0))
    return {"slope": float(slope), "ci95": [float(slope) - half, float(slope) + half]}


def crossing(
    lengths: Sequence[int], first: Sequence[float], second: Sequence[float]
) -> float:
    """The length from which on ``second`` > ``first``: straight in log-log between two.

    0 where it is so at every length, infinity where it is not so at the longest.
    """
    above = np.log(second) - np.log(first)
    below = np.flatnonzero(above <= 0)
    if len(below) == 0:
        return 0.0
    i = int(below[-1])
    if i == len(lengths) - 1:
        return math.inf
    u = np.log(lengths[i : i + 2])
    part = above[i] / (above[i] - above[i + 1])
    return float(np.exp(u[0] + part * (u[1] - u[0])))


def crossover(
    lengths: Sequence[int], first: Samples, second: Samples, rng: np.random.Generator
) -> dict[str, Any]:
    """The crossing of the medians of two contestants, with a 95 % bootstrap interval.

    Repeats are drawn again with replacement at each length; the interval is what lies
    between the 2.5 % and 97.5 % quantiles of the crossings found. ``at`` and the ends
    of ``ci95`` are None where there is none in range; ``verdict`` says on which side
    ("always": second > first at every length, "never": not at the longest).
    """
    at = crossing(lengths, _medians(first), _medians(second))
    pairs = zip(_resampled(first, rng), _resampled(second, rng), strict=True)
    drawn = sorted(crossing(lengths, *pair) for pair in pairs)
    cut = round(0.025 * RESAMPLES)
    ends = drawn[cut], drawn[-1 - cut]
    verdict = "always" if at == 0 else "never" if at == math.inf else "crossover"
    return {
        "at": _in_range(at),
        "verdict": verdict,
        "ci95": [_in_range(end) for end in ends],
        "sides": [_side(end) for end in ends],
        "range": [int(lengths[0]), int(lengths[-1])],
    }


def crossover_text(found: dict[str, Any], first: str, second: str) -> str:
    """One sentence for a person, with names for the two contestants."""
    low, high = found["range"]
    if found["verdict"] == "always":
        told = f"no crossover in range: {first} is faster from {low} on"
    elif found["verdict"] == "never":
        told = f"no crossover in range: {second} is not slower at {high}"
    else:
        told = f"{first} is faster from about {found['at']:.0f} on"
    sides = found["sides"]
    if sides[0] == sides[1] != "within":
        return told
    ends = [
        {"below": f"below {low}", "above": f"above {high}"}.get(side, f"{end or 0:.0f}")
        for side, end in zip(sides, found["ci95"], strict=True)
    ]
    return f"{told} (95 %: {ends[0]} to {ends[1]})"


def _medians(samples: Samples) -> list[float]:
    return [float(np.median(repeats)) for repeats in samples]


def _resampled(samples: Samples, rng: np.random.Generator) -> list[list[float]]:
    """Medians at each length of as many repeats, drawn with replacement; many times."""
    medians = [
        np.median(rng.choice(repeats, (RESAMPLES, len(repeats))), axis=1)
        for repeats in samples
    ]
    return np.stack(medians, 1).tolist()


def _in_range(at: float) -> float | None:
    return at if 0 < at < math.inf else None


def _side(at: float) -> str:
    return "below" if at == 0 else "above" if at == math.inf else "within"
