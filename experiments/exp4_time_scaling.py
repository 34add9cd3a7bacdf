"""Time against length: recurrence O(T), explicit kernel O(T^2), chunked form O(T).

    recurrence   h_t = a_t * h_{t-1} + b_t x_t^T,  y_t = c_t^T h_t        O(T N d)
    kernel       y = M x,  M[t, s] = c_t^T a_t ... a_{s+1} b_s            O(T^2 d)
    chunked      M x in blocks of Q (experiments.chunked)         O(T (Q + N) d)

Three ways to the same outputs; forming M costs O(T^2 N) more, timed on request. Source:
"On Structured State-Space Duality" (arXiv:2510.04944), section 3, and Dao & Gu (2024),
section 6, for the block decomposition. b and c vary in time; the decays a are constant
in one set of curves and vary in the other.

The claim judged is that the three agree. Times are measured and reported, never judged.
"""

import math
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from experiments.chunked import CHUNK, chunked
from experiments.common import (
    COLORS,
    MARKERS,
    ExperimentResult,
    Picture,
    bad_input,
    check_increasing,
    check_integer,
    command_line,
    new_figure,
    random_stream,
    track,
)
from experiments.kernels import largest_difference, recurrence

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "exp4_time_scaling"
CLAIM = "recurrence, explicit kernel and chunked form give the same outputs"
TOLERANCE = 1e-12  # relative to the output's scale: sums of up to 10^5 rounded terms
FORMS = ("recurrence", "kernel", "chunked")
DECAYS = ("constant", "time-varying")
LONGEST = 16384  # the kernel of that length takes 2 GiB
Array = np.ndarray
Inputs = tuple[Array, Array, Array, Array]
Call = Callable[[], Array]
Measurement = dict[str, Any]


def explicit_kernel(
    a: Float[Array, "T N"], b: Float[Array, "T N"], c: Float[Array, "T N"]
) -> Float[Array, "T T"]:
    """M[t, s] = c_t^T a_t ... a_{s+1} b_s for s <= t, else 0; row from row, T^2 memory.

    ``tails[s]`` holds a_t ... a_{s+1} b_s: no T x T x N mask is formed.
    """
    T, N = a.shape
    M = np.zeros((T, T))
    tails = np.zeros((T, N))
    for t in range(T):
        tails[:t] *= a[t]
        tails[t] = b[t]
        np.matmul(tails[: t + 1], c[t], out=M[t, : t + 1])
    return M


def draw_inputs(
    decays: str, T: int, N: int, d: int, rng: np.random.Generator
) -> Inputs:
    """(a, b, c, x) with decays in [0.8, 1): one row of them if constant, else T."""
    a = rng.uniform(0.8, 1.0, (1 if decays == "constant" else T, N))
    b, c = rng.standard_normal((2, T, N))
    return a, b, c, rng.standard_normal((T, d))


def forms_of(inputs: Inputs, *, end_to_end: bool) -> dict[str, Call]:
    """One call per form, each returning y; ``end_to_end``: the kernel's forms M too."""
    a, b, c, x = inputs
    a_rows = np.broadcast_to(a, b.shape)
    M = None if end_to_end else explicit_kernel(a_rows, b, c)
    return {
        "recurrence": lambda: recurrence(a_rows, b, c, x)[0],
        "kernel": lambda: (explicit_kernel(a_rows, b, c) if M is None else M) @ x,
        "chunked": lambda: chunked(a, b, c, x)[0],
    }


def time_forms(
    calls: dict[str, Call], n_repeats: int
) -> tuple[dict[str, Measurement], dict[str, Array]]:
    """Seconds of each call: the first apart, then ``n_repeats`` taken in turn.

    Taking turns spreads a slow spell of the machine over all forms. Also returns what
    each call gave.
    """
    outputs: dict[str, Array] = {}
    times: dict[str, Measurement] = {}
    for form, call in calls.items():
        start = time.perf_counter()
        outputs[form] = call()
        times[form] = {"cold_s": time.perf_counter() - start, "repeats_s": []}
    for _ in range(n_repeats):
        for form, call in calls.items():
            start = time.perf_counter()
            call()
            times[form]["repeats_s"].append(time.perf_counter() - start)
    return times, outputs


def measure(inputs: Inputs, n_repeats: int, *, end_to_end: bool) -> list[Measurement]:
    """Times of every form on ``inputs`` and its difference from the recurrence."""
    times, outputs = time_forms(forms_of(inputs, end_to_end=end_to_end), n_repeats)
    return [
        {
            "form": form,
            **times[form],
            "difference": largest_difference(outputs[form], outputs["recurrence"]),
        }
        for form in FORMS
    ]


def peak_bytes(call: Call) -> int:
    """The most memory that ``call`` holds at once beyond its inputs (untimed)."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def t_quantile(dof: int) -> float:
    """The 97.5 % point of Student's t with ``dof`` degrees of freedom.

    Bisects theta = arctan(t / sqrt(dof)) in the finite series of Abramowitz & Stegun
    (1964), 26.7.3 and 26.7.4, for P(|t| < t0).
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        theta = (low + high) / 2
        low, high = (low, theta) if _within(theta, dof) > 0.95 else (theta, high)
    return math.sqrt(dof) * math.tan(low)


def _within(theta: float, dof: int) -> float:
    odd = dof % 2
    term = math.cos(theta) if odd else 1.0
    total = term if dof > 1 else 0.0
    for k in range(2 + odd, dof - 1, 2):
        term *= math.cos(theta) ** 2 * (k - 1) / k
        total += term
    total *= math.sin(theta)
    return 2 / math.pi * (theta + total) if odd else total


def fit_exponent(T_values: Sequence[int], seconds: Sequence[float]) -> Measurement:
    """Least squares of log(seconds) on log(T): the slope and its 95 % interval.

    One length has no slope and fewer than three have no interval: those are None.
    """
    n = len(T_values)
    if n < 2:
        return {"exponent": None, "exponent_ci95": None}
    u, v = np.log(T_values), np.log(seconds)
    u = u - u.mean()
    slope = float(u @ v / (u @ u))
    if n < 3:
        return {"exponent": slope, "exponent_ci95": None}
    residual = v - v.mean() - slope * u
    error = math.sqrt(float(residual @ residual) / (n - 2) / float(u @ u))
    half = t_quantile(n - 2) * error
    return {"exponent": slope, "exponent_ci95": [slope - half, slope + half]}


def check_scaling(
    T_values: Sequence[int], n_repeats: int, N: int, d: int, **counts: int
) -> None:
    """Raise InputError unless the sizes make sense and the kernel fits in memory."""
    check_increasing("T-values", T_values, at_least=1)
    if T_values[-1] > LONGEST:
        raise bad_input(
            "T-values",
            T_values[-1],
            f"lengths of at most {LONGEST}, where the T x T kernel takes 2 GiB",
            "leave that length out (benchmarks/ssd_scaling.py goes further)",
        )
    sizes = {"n-repeats": n_repeats, "N": N, "d": d, **counts}
    for name, value in sizes.items():
        check_integer(name, value, at_least=1, example=5)


def run(
    T_values: tuple[int, ...] = (300, 600, 1200),
    N: int = 16,
    d: int = 64,
    n_repeats: int = 5,
    end_to_end: bool = False,
    seed: int = 0,
) -> ExperimentResult:
    """Time the recurrence, the explicit kernel and the chunked form against length.

    Args:
        T_values: sequence lengths, increasing; three or more for an interval
        N: state size
        d: channels that share the kernel
        n_repeats: warm repeats of each form, whose median is reported
        end_to_end: time the forming of the kernel too, not only its product with x
        seed: draws decays, couplings and input
    """
    check_scaling(T_values, n_repeats, N, d)
    curves = []
    for decays in DECAYS:
        rng = random_stream(seed, f"data {decays}")
        by_length = []
        for T in track(T_values, f"{decays} decays"):
            inputs = draw_inputs(decays, T, N, d, rng)
            measured = measure(inputs, n_repeats, end_to_end=end_to_end)
            whole = forms_of(inputs, end_to_end=True)
            for entry in measured:
                entry["peak_bytes"] = peak_bytes(whole[entry["form"]])
            by_length.append(measured)
        curves += [
            {"decays": decays, **_curve(T_values, per_form)}
            for per_form in zip(*by_length, strict=True)
        ]
    metadata = {
        "T_values": T_values,
        "N": N,
        "d": d,
        "seed": seed,
        "n_repeats": n_repeats,
        "chunk": CHUNK,
        **what_was_timed(end_to_end),
        "curves": curves,
        "tolerance": TOLERANCE,
    }
    return ExperimentResult(NAME, _details(metadata), metadata, not problems(metadata))


def what_was_timed(end_to_end: bool) -> dict[str, Any]:
    """The metadata that says what the clock saw."""
    return {
        "end_to_end": end_to_end,
        "timed": "wall clock (time.perf_counter) of one call in float64; the kernel "
        f"form {'includes' if end_to_end else 'excludes'} forming M; cold_s is the "
        "first call, repeats_s the warm ones, the forms taking turns; b and c vary "
        "in time; peak_bytes (a separate call under tracemalloc) includes forming M",
    }


def _curve(T_values: Sequence[int], measured: Sequence[Measurement]) -> Measurement:
    """One form's measurements over the lengths, with its fitted exponent."""
    repeats = [entry["repeats_s"] for entry in measured]
    median = [float(np.median(times)) for times in repeats]
    return {
        "form": measured[0]["form"],
        "median_s": median,
        "repeats_s": repeats,
        "cold_s": [entry["cold_s"] for entry in measured],
        "peak_bytes": [entry["peak_bytes"] for entry in measured],
        "difference": [entry["difference"] for entry in measured],
        **fit_exponent(T_values, median),
    }


def _details(metadata: dict[str, Any]) -> str:
    parts = []
    for decays in DECAYS:
        fits = [
            f"{curve['form']} {exponent_text(curve)}"
            for curve in metadata["curves"]
            if curve["decays"] == decays
        ]
        parts.append(f"{decays} decays: {', '.join(fits)}")
    worst = max(max(curve["difference"]) for curve in metadata["curves"])
    kernel = "formed and applied" if metadata["end_to_end"] else "applied"
    lengths = " ".join(map(str, metadata["T_values"]))
    return (
        f"the forms agree to {worst:.1e} (relative; tolerance {TOLERANCE:.0e}); "
        f"time ~ T^p, p [95 %], not judged: {'; '.join(parts)} "
        f"(T = {lengths}, kernel {kernel})"
    )


def exponent_text(curve: Measurement) -> str:
    """``1.02 [0.95, 1.09]``, without what too few lengths leave undefined."""
    if curve["exponent"] is None:
        return "- (one length)"
    if curve["exponent_ci95"] is None:
        return f"{curve['exponent']:.2f}"
    low, high = curve["exponent_ci95"]
    return f"{curve['exponent']:.2f} [{low:.2f}, {high:.2f}]"


def problems(metadata: dict[str, Any]) -> list[str]:
    """The claims that a record's metadata breaks."""
    tolerance = float(metadata["tolerance"])
    return [
        f"{CLAIM}: {curve['form']} differs by {float(difference):.1e} at T = {T}, "
        f"{curve['decays']} decays"
        for curve in metadata["curves"]
        for T, difference in zip(metadata["T_values"], curve["difference"], strict=True)
        if not float(difference) <= tolerance
    ]


def plot_results(results: list[ExperimentResult]) -> "Figure":
    """Seconds against length, a panel per kind of decay: median, and least to most.

    Several results are pooled by length.
    """
    pooled: dict[tuple[str, str], dict[int, list[float]]] = {}
    for result in results:
        for curve in result.metadata["curves"]:
            times = pooled.setdefault((curve["decays"], curve["form"]), {})
            lengths = result.metadata["T_values"]
            for T, repeats in zip(lengths, curve["repeats_s"], strict=True):
                times.setdefault(T, []).extend(repeats)
    points = {
        key: {
            T: (float(np.median(s)), min(s), max(s)) for T, s in sorted(times.items())
        }
        for key, times in pooled.items()
    }
    return draw_curves(points, "time per call (s), median and range", results)


def draw_curves(
    points: dict[tuple[str, str], dict[int, tuple[float, float, float]]],
    y_label: str,
    results: list[ExperimentResult],
) -> "Figure":
    """``points[decays, form][T]`` = (middle, low, high), on logarithmic axes."""
    figure, axes = new_figure(1, len(DECAYS))
    for ax, decays in zip(axes[0], DECAYS, strict=True):
        lengths: set[int] = set()
        for color, marker, form in zip(COLORS, MARKERS, FORMS, strict=False):
            by_length = points[decays, form]
            lengths |= set(by_length)
            T = list(by_length)
            middle, low, high = np.array(list(by_length.values())).T
            fit = fit_exponent(T, middle.tolist())["exponent"]
            label = form if fit is None else f"{form}: $T^{{{fit:.2f}}}$"
            bars = (middle - low, high - middle)
            ax.errorbar(
                T, middle, bars, color=color, marker=marker, capsize=2, label=label
            )
        ax.set(xscale="log", yscale="log", title=f"{decays} decays")
        ax.set_xlabel("sequence length T (steps)")
        if len(lengths) <= 8:
            ax.set_xticks(sorted(lengths), [str(T) for T in sorted(lengths)])
            ax.set_xticks([], minor=True)
        ax.legend(title="fitted time" if len(lengths) > 1 else None, frameon=False)
    limits = [ax.get_ylim() for ax in axes[0]]
    for ax in axes[0]:
        ax.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
    axes[0, 0].set_ylabel(y_label)
    meta = results[0].metadata
    kernel = "forming M included" if meta["end_to_end"] else "M formed beforehand"
    figure.suptitle(f"N = {meta['N']}, d = {meta['d']}; {kernel}", fontsize=10)
    return figure


PICTURES = (Picture(plot_results, "outputs/exp4_time_scaling.png", alias="exp4-plot"),)


if __name__ == "__main__":
    sys.exit(command_line(run, pictures=PICTURES))
