"""How the recurrence, the explicit kernel and the chunked form scale with length.

    python -m benchmarks.ssd_scaling

One process, NumPy float64 with its BLAS. Two measurements:

* time against length at large T with fitted exponents (theory: 1, 2 and 1);
* the chunked form against a NumPy loop over time that is vectorised over N and d,
  h = a[:, None] * h + outer(b_t, x_t); y_t = c_t @ h, in pairs of runs, one of each in
  turn, so that a slow spell of the machine falls on both.

"constant decays": one a for all steps; b_t and c_t vary unless said otherwise.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from experiments.chunked import CHUNK, chunked
from experiments.common import (
    EXIT_FAILED_CLAIM,
    Parameter,
    check_increasing,
    check_integer,
    one_line_errors,
    parameters_of,
    parse,
    progress_shown,
    random_stream,
    to_json,
    track,
    unwritable,
)
from experiments.exp4_time_scaling import (
    TOLERANCE,
    Call,
    Inputs,
    draw_inputs,
    explicit_kernel,
    exponent_text,
    fit_exponent,
    time_forms,
)
from experiments.kernels import largest_difference, recurrence

Array = np.ndarray
NOT_SHOWN = """\
What this does not show: float32, GPUs, other N and d, or gradients; nor a compiled
loop. Much of the loop's time is the interpreter's (several microseconds a step), which
chunking divides by Q: the ratio is no count of operations. Fits use the medians and,
beside them, the minima, which other work on the machine disturbs less; an interval
says how straight the line is, not how far another machine would differ."""


def loop_over_time(
    a: Float[Array, "#T N"],
    b: Float[Array, "#T N"],
    c: Float[Array, "#T N"],
    x: Float[Array, "T d"],
) -> Float[Array, "T d"]:
    """h = a[:, None] * h + outer(b_t, x_t); y_t = c_t @ h, as one writes it."""
    T, d = x.shape
    a, b, c = (np.broadcast_to(rows, (T, a.shape[1])) for rows in (a, b, c))
    h = np.zeros((a.shape[1], d))
    y = np.empty((T, d))
    for t in range(T):
        h = a[t][:, None] * h + np.outer(b[t], x[t])
        y[t] = c[t] @ h
    return y


def linear_forms(T: int, N: int, d: int, seed: int) -> dict[str, Call]:
    """The forms whose time is linear in T."""
    rng = random_stream(seed, "data")
    a, b, c, x = draw_inputs("constant", T, N, d, rng)
    varying = draw_inputs("time-varying", T, N, d, rng)
    return {
        "recurrence": lambda: recurrence(*varying)[0],
        "chunked, constant decays": lambda: chunked(a, b, c, x)[0],
        "chunked, time-varying": lambda: chunked(*varying)[0],
    }


def kernel_forms(T: int, N: int, d: int, seed: int) -> dict[str, Call]:
    """The forms that hold the T x T kernel."""
    a, b, c, x = draw_inputs("time-varying", T, N, d, random_stream(seed, "data"))
    M = explicit_kernel(a, b, c)
    return {
        "kernel, applied": lambda: M @ x,
        "kernel, formed and applied": lambda: explicit_kernel(a, b, c) @ x,
    }


def scaling(
    forms: Callable[[int], dict[str, Call]], lengths: Sequence[int], n_repeats: int
) -> list[dict[str, Any]]:
    """Times of every form at every length, and the exponents fitted to them."""
    curves: dict[str, dict[str, Any]] = {}
    for T in track(lengths, "lengths"):
        times, _ = time_forms(forms(T), n_repeats)
        for form, entry in times.items():
            curve = curves.setdefault(form, {"form": form, "points": []})
            curve["points"].append({"T": T, **_spread(entry["repeats_s"]), **entry})
    for curve in curves.values():
        for kind in ("median_s", "min_s"):
            seconds = [point[kind] for point in curve["points"]]
            curve[f"fit_{kind}"] = fit_exponent(lengths, seconds)
    return list(curves.values())


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    return {
        "median_s": float(np.median(seconds)),
        "min_s": min(seconds),
        "max_s": max(seconds),
    }


def against_loop(
    T: int, N: int, d: int, n_repeats: int, seed: int
) -> list[dict[str, Any]]:
    """Paired times of the loop and the chunked form for three kinds of parameters."""
    rng = random_stream(seed, "data against loop")
    a, b, c, x = draw_inputs("constant", T, N, d, rng)
    varying = draw_inputs("time-varying", T, N, d, rng)
    cases = {
        "constant a; b, c vary": (a, b, c, x),
        "constant a, b, c": (a[:1], b[:1], c[:1], x),
        "a, b, c vary": varying,
    }
    rows = []
    for name, inputs in track(cases.items(), "against the loop", len(cases)):
        times, y = time_forms(_loop_and_chunked(inputs), n_repeats)
        loop, ours = ({**t, **_spread(t["repeats_s"])} for t in times.values())
        pairs = zip(loop["repeats_s"], ours["repeats_s"], strict=True)
        ratios = [slow / fast for slow, fast in pairs]
        rows.append(
            {
                "case": name,
                "T": T,
                "ratio": float(np.median(ratios)),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
                "difference": largest_difference(y["chunked"], y["loop"]),
                "loop": loop,
                "chunked": ours,
            }
        )
    return rows


def _loop_and_chunked(inputs: Inputs) -> dict[str, Call]:
    return {
        "loop": lambda: loop_over_time(*inputs),
        "chunked": lambda: chunked(*inputs)[0],
    }


def benchmark(
    linear_lengths: tuple[int, ...] = (16384, 32768, 65536, 131072),
    kernel_lengths: tuple[int, ...] = (2048, 3072, 4096, 5120, 6144),
    ratio_length: int = 16384,
    N: int = 16,
    d: int = 64,
    n_repeats: int = 7,
    seed: int = 0,
) -> dict[str, Any]:
    """Time recurrence, explicit kernel and chunked form at large T; fit exponents.

    Args:
        linear_lengths: lengths for the recurrence and the chunked form
        kernel_lengths: lengths for the explicit kernel; below 2048 the loop over its
            rows and the caches still show; at 8192 it holds 512 MB, and on our machine
            the time of fetching it jumps tenfold
        ratio_length: length at which the chunked form meets the loop over time
        N: state size
        d: channels that share the kernel
        n_repeats: warm repeats of each form; the first, cold call is apart
        seed: draws decays, couplings and input
    """
    check_increasing("linear-lengths", linear_lengths, at_least=1)
    check_increasing("kernel-lengths", kernel_lengths, at_least=1)
    sizes = {"ratio-length": ratio_length, "N": N, "d": d, "n-repeats": n_repeats}
    for name, value in sizes.items():
        check_integer(name, value, at_least=1, example=16)
    return {
        "N": N,
        "d": d,
        "chunk": CHUNK,
        "n_repeats": n_repeats,
        "seed": seed,
        "numpy": np.__version__,
        "tolerance": TOLERANCE,
        "scaling": [
            *scaling(lambda T: linear_forms(T, N, d, seed), linear_lengths, n_repeats),
            *scaling(lambda T: kernel_forms(T, N, d, seed), kernel_lengths, n_repeats),
        ],
        "against_loop": against_loop(ratio_length, N, d, n_repeats, seed),
    }


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = [
        f"N = {report['N']}, d = {report['d']}, chunks of {report['chunk']}, float64, "
        f"{report['n_repeats']} warm repeats; milliseconds",
        "",
        f"{'form':<28}{'T':>7}{'median':>10}{'min':>10}{'max':>10}{'cold':>10}",
    ]
    for curve in report["scaling"]:
        for point in curve["points"]:
            kinds = ("median_s", "min_s", "max_s", "cold_s")
            cells = "".join(f"{1e3 * point[kind]:>10.3g}" for kind in kinds)
            lines.append(f"{curve['form']:<28}{point['T']:>7}{cells}")
        lines.append(
            f"  time ~ T^p: p = {exponent_text(curve['fit_median_s'])} from medians, "
            f"{exponent_text(curve['fit_min_s'])} from minima (95 %)"
        )
    lines += ["", f"{'loop / chunked, paired':<28}{'T':>7}{'loop':>10}{'chunked':>10}"]
    lines[-1] += "  ratio (least .. most)    difference"
    for row in report["against_loop"]:
        loop, ours = (1e3 * row[form]["median_s"] for form in ("loop", "chunked"))
        spread = f"({row['ratio_min']:.1f} .. {row['ratio_max']:.1f})"
        lines.append(
            f"{row['case']:<28}{row['T']:>7}{loop:>10.3g}{ours:>10.3g}"
            f"{row['ratio']:>7.1f} {spread:<17}{row['difference']:>11.1e}"
        )
    return "\n".join([*lines, "", NOT_SHOWN])


def store(report: dict[str, Any], path: str) -> None:
    """Write the report as JSON. Raises InputError if it cannot be written."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(to_json(report), allow_nan=False) + "\n")
    except OSError as error:
        raise unwritable(path, error) from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print the table, store the report where ``--json`` names a file.

    Exit status 1 if the chunked form and the loop disagree; times are not judged.
    """
    about = "Write the whole report here, for example outputs/ssd_scaling.json."
    parameters = [*parameters_of(benchmark), Parameter("json", str, "", about)]
    summary = (benchmark.__doc__ or "").partition("\n")[0]
    values = parse("python -m benchmarks.ssd_scaling", summary, parameters, argv)
    path = values.pop("json")
    with one_line_errors():
        with progress_shown():
            report = benchmark(**values)
        print(table(report))
        if path:
            store(report, path)
    agree = all(row["difference"] <= TOLERANCE for row in report["against_loop"])
    return 0 if agree else EXIT_FAILED_CLAIM


if __name__ == "__main__":
    sys.exit(main())
