"""Time against length over random trials: mean and 95 % confidence interval.

Each trial draws fresh decays, couplings and input at every length and times the three
forms of ``exp4_time_scaling`` on them (its equations and source); a trial's time is the
median of its warm repeats. Over trials: mean +- t sd / sqrt(n), with t from Student's
distribution with n - 1 degrees of freedom. One trial has no interval.

The claim judged is that the three forms agree in every trial; times are reported.
"""

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.chunked import CHUNK
from experiments.common import (
    ExperimentResult,
    Picture,
    command_line,
    random_stream,
    track,
)
from experiments.exp4_time_scaling import (
    CLAIM as FORMS_AGREE,
)
from experiments.exp4_time_scaling import (
    DECAYS,
    FORMS,
    TOLERANCE,
    Measurement,
    check_scaling,
    draw_curves,
    draw_inputs,
    fit_exponent,
    measure,
    t_quantile,
    what_was_timed,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "exp4b_time_scaling_errorbars"
CLAIM = f"{FORMS_AGREE}, in every trial"


def mean_and_interval(values: Sequence[float]) -> tuple[float, list[float] | None]:
    """The mean and its 95 % confidence interval (None for a single value)."""
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return mean, None
    half = t_quantile(n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return mean, [mean - half, mean + half]


def run(
    T_values: tuple[int, ...] = (300, 600, 1200),
    N: int = 16,
    d: int = 64,
    n_trials: int = 5,
    n_repeats: int = 3,
    end_to_end: bool = False,
    seed: int = 0,
) -> ExperimentResult:
    """Time the three forms over random trials; mean and 95 % confidence interval.

    Args:
        T_values: sequence lengths, increasing
        N: state size
        d: channels that share the kernel
        n_trials: trials, each with fresh inputs; two or more for an interval
        n_repeats: warm repeats in a trial, whose median is the trial's time
        end_to_end: time the forming of the kernel too, not only its product with x
        seed: draws decays, couplings and inputs, a separate stream for each trial
    """
    check_scaling(T_values, n_repeats, N, d, **{"n-trials": n_trials})
    measured: dict[tuple[str, str], list[list[Measurement]]] = {
        (decays, form): [] for decays in DECAYS for form in FORMS
    }
    for trial in track(range(n_trials), "trials"):
        for decays in DECAYS:
            rng = random_stream(seed, f"data {decays} trial {trial}")
            by_length = [
                measure(
                    draw_inputs(decays, T, N, d, rng), n_repeats, end_to_end=end_to_end
                )
                for T in T_values
            ]
            for form, entries in zip(FORMS, zip(*by_length, strict=True), strict=True):
                measured[decays, form].append(list(entries))
    metadata = {
        "T_values": T_values,
        "N": N,
        "d": d,
        "seed": seed,
        "n_trials": n_trials,
        "n_repeats": n_repeats,
        "chunk": CHUNK,
        **what_was_timed(end_to_end),
        "curves": [
            {"decays": decays, "form": form, **_curve(T_values, trials)}
            for (decays, form), trials in measured.items()
        ],
        "tolerance": TOLERANCE,
    }
    return ExperimentResult(NAME, _details(metadata), metadata, not problems(metadata))


def _curve(
    T_values: Sequence[int], trials: Sequence[Sequence[Measurement]]
) -> Measurement:
    """One form over trials and lengths: ``trials[i][k]`` is trial i at T_values[k]."""
    seconds = [
        [float(np.median(entry["repeats_s"])) for entry in trial] for trial in trials
    ]
    means = [mean_and_interval(times) for times in zip(*seconds, strict=True)]
    fits = [fit_exponent(T_values, times)["exponent"] for times in seconds]
    exponent, interval = (None, None) if len(T_values) < 2 else mean_and_interval(fits)
    return {
        "trial_s": seconds,
        "cold_s": [[entry["cold_s"] for entry in trial] for trial in trials],
        "mean_s": [mean for mean, _ in means],
        "mean_ci95_s": [interval for _, interval in means],
        "exponent": exponent,
        "exponent_ci95": interval,
        "difference": [[entry["difference"] for entry in trial] for trial in trials],
    }


def _details(metadata: dict[str, Any]) -> str:
    longest = metadata["T_values"][-1]
    parts = []
    for curve in metadata["curves"]:
        mean, interval = curve["mean_s"][-1], curve["mean_ci95_s"][-1]
        half = "" if interval is None else f" +- {1e3 * (interval[1] - mean):.2g}"
        parts.append(f"{curve['decays']} {curve['form']} {1e3 * mean:.3g}{half} ms")
    worst = max(np.max(curve["difference"]) for curve in metadata["curves"])
    kernel = "formed and applied" if metadata["end_to_end"] else "applied"
    return (
        f"the forms agree to {worst:.1e} over {metadata['n_trials']} trials (relative; "
        f"tolerance {TOLERANCE:.0e}); mean time at T = {longest} (95 %), not judged: "
        f"{', '.join(parts)} (kernel {kernel})"
    )


def problems(metadata: dict[str, Any]) -> list[str]:
    """The claims that a record's metadata breaks."""
    tolerance = float(metadata["tolerance"])
    return [
        f"{CLAIM}: {curve['form']} differs by {float(difference):.1e} at T = {T}, "
        f"{curve['decays']} decays, trial {trial}"
        for curve in metadata["curves"]
        for trial, by_length in enumerate(curve["difference"])
        for T, difference in zip(metadata["T_values"], by_length, strict=True)
        if not float(difference) <= tolerance
    ]


def plot_results(results: list[ExperimentResult]) -> "Figure":
    """Seconds against length, a panel per kind of decay: mean and 95 % interval.

    Several results are pooled, trial by trial.
    """
    pooled: dict[tuple[str, str], dict[int, list[float]]] = {}
    for result in results:
        for curve in result.metadata["curves"]:
            times = pooled.setdefault((curve["decays"], curve["form"]), {})
            for trial in curve["trial_s"]:
                for T, s in zip(result.metadata["T_values"], trial, strict=True):
                    times.setdefault(T, []).append(s)
    points: dict[tuple[str, str], dict[int, tuple[float, float, float]]] = {}
    for key, times in pooled.items():
        points[key] = {}
        for T, seconds in sorted(times.items()):
            mean, interval = mean_and_interval(seconds)
            low, high = interval or (mean, mean)
            points[key][T] = (mean, low, high)
    return draw_curves(points, "time per call (s), mean and 95 % CI", results)


PICTURES = (Picture(plot_results, "outputs/exp4b_time_scaling.png", by_default=True),)


if __name__ == "__main__":
    sys.exit(command_line(run, pictures=PICTURES))
