"""Pictures of the runs in a log: curves, error against N with bound_N, forecasts.

    python -m time_series_experiments.plot_runs --task synthetic_decays --latest-only

Of several seeds, curves show the first one and the others faint; against N, lines are
medians and every seed is a faint point.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.common import (
    COLORS,
    MARKERS,
    Parameter,
    bad_input,
    check_picture_path,
    new_figure,
    one_line_errors,
    parse,
    save_figure,
)
from time_series_experiments._forecasts import draw_errors, draw_forecasts
from time_series_experiments._runs import LOG, OUT_DIR, Runs, read_runs
from time_series_experiments.models import CLEAN

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DASHES = ("-", "--", "-.", ":")
PARAMETERS = (
    Parameter("task", str, "synthetic_decays", "synthetic_decays, sunspots or co2."),
    Parameter(
        "latest_only",
        bool,
        False,
        "Only runs with the settings of the last one, all but model, N and seed.",
    ),
    Parameter("log_val_curves", bool, False, "Validation curves on a log scale."),
    Parameter("log_path", str, f"{OUT_DIR}/{LOG}", "The run log."),
    Parameter("out_dir", str, "", "Where pictures go; the log's folder by default."),
)


def draw_curves(runs: Runs, *, log: bool) -> "Figure":
    """Validation MSE over the epochs: a colour a model, a dash an N, noise floor."""
    figure, axes = new_figure()
    ax = axes[0, 0]
    for color, (model, group) in zip(
        _cycle(COLORS), runs.groups().items(), strict=False
    ):
        sizes = sorted({record["params"]["N"] for record in group})
        for dash, N in zip(_cycle(DASHES), sizes, strict=False):
            own = [r["meta"]["curve"] for r in group if r["params"]["N"] == N]
            label = _label(model, N, group[0]["meta"], len(own))
            for i, curve in enumerate(own):
                x = [entry["epoch"] for entry in curve]
                y = [float(entry["val_mse"]) for entry in curve]
                look: dict[str, Any] = {"color": color, "linestyle": dash}
                faint = {} if i == 0 else {"alpha": 0.35, "linewidth": 0.8}
                ax.plot(x, y, label=label if i == 0 else None, **look | faint)
                if curve[-1].get("finish"):
                    ax.plot(x[-1:], y[-1:], marker="*", markersize=9, color=color)
    floor = runs.records[0]["meta"]["noise_floor"]
    _level(ax, floor, log)
    ax.set(xlabel="epoch", ylabel="MSE on the validation sample")
    if log:
        ax.set_yscale("log")
    if any(record["params"]["model"] == CLEAN for record in runs.records):
        ax.plot([], [], "*k", label="after the second-order finish")
    ax.set_title(_caption(runs), fontsize=8.5)
    low, high = ax.get_ylim()  # room for the legend above the curves
    ax.set_ylim(low, high * (high / low) ** 0.45 if log else low + 1.6 * (high - low))
    ax.legend(loc="upper right", fontsize=7, ncols=2, frameon=False)
    return figure


def draw_against_n(runs: Runs) -> "Figure":
    """Population MSE against N, bound_N, and the noise floor; log scale."""
    figure, axes = new_figure()
    ax = axes[0, 0]
    for i, (model, group) in enumerate(runs.groups().items()):
        look = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]}
        N = np.array([record["params"]["N"] for record in group])
        error = np.array([float(r["meta"]["population_mse"]) for r in group])
        if not group[0]["meta"]["stateful"]:
            label = f"{model} (has no N)"
            ax.axhline(np.median(error), color=look["color"], label=label, ls="-.")
            continue
        sizes = np.unique(N)
        middle = [np.median(error[n == N]) for n in sizes]
        seeds = len({record["seed"] for record in group})
        ax.plot(N, error, ls="", alpha=0.35, **look)
        ax.plot(sizes, middle, **look, label=f"{model} ({_seeds(seeds)})")
    bounds = {r["params"]["N"]: float(r["meta"]["bound"]["mse"]) for r in runs.records}
    sizes = np.array(sorted(bounds))
    levels = [bounds[n] for n in sizes]
    label = "bound$_N$: least of N linear states"
    ax.plot(sizes, levels, "_", color="black", markersize=22, mew=1.6, label=label)
    _level(ax, runs.records[0]["meta"]["noise_floor"], True)
    ax.set_yscale("log")
    ax.set_xticks(sizes)
    ax.set(xlabel="states N", ylabel="population MSE", xlim=_padded(sizes))
    ax.set_title(_caption(runs), fontsize=8.5)
    ax.legend(frameon=False)
    return figure


def draw_hankel(runs: Runs) -> "Figure":
    """The signal's Hankel singular values: another norm, not the bound."""
    figure, axes = new_figure()
    ax = axes[0, 0]
    values = [float(v) for v in runs.records[0]["meta"]["hankel_singular_values"]]
    ax.plot(np.arange(1, len(values) + 1), values, "o-", color=COLORS[0])
    ax.set_yscale("log")
    ax.set_xticks(np.arange(1, len(values) + 1))
    ax.set(xlabel="index n", ylabel="Hankel singular value $s_n$")
    ax.set_title(
        "$s_{N+1}$ is the least operator norm of the error of N states\nover infinite "
        "time; not the MSE, and not bound$_N$",
        fontsize=9,
    )
    return figure


def _label(model: str, N: int, meta: dict[str, Any], seeds: int) -> str:
    size = f", N = {N}" if meta["stateful"] else ""
    return f"{model}{size} ({_seeds(seeds)})"


def _seeds(n: int) -> str:
    return f"{n} seed{'s' if n > 1 else ''}"


def _cycle(values: Sequence[str]) -> list[str]:
    return [*values] * 8


def _level(ax: "Axes", floor: float, log: bool) -> None:
    if floor > 0 or not log:  # a log scale has no zero
        ax.axhline(
            floor, color="0.35", ls=":", lw=1.2, label=f"noise floor {floor:.1e}"
        )


def _padded(sizes: np.ndarray) -> tuple[float, float]:
    return float(sizes[0] - 0.5), float(sizes[-1] + 0.5)


def _caption(runs: Runs) -> str:
    s = runs.settings
    lambdas, coeffs = (", ".join(f"{v:g}" for v in s[k]) for k in ("lambdas", "coeffs"))
    return f"λ = {lambdas}; c = {coeffs}; T = {s['T']}; σ = {s['noise_std']:g}"


# --- the command line -----------------------------------------------------------------

Draw = Callable[[Runs, bool], "Figure"]
_SERIES: dict[str, Draw] = {
    "forecasts": lambda runs, _: draw_forecasts(runs),
    "errors": lambda runs, _: draw_errors(runs),
}
# For each task: the experiment whose runs they are, and its pictures by file name.
TASKS: dict[str, tuple[str, dict[str, Draw]]] = {
    "synthetic_decays": (
        "synthetic_decays",
        {
            "val_curves": lambda runs, log: draw_curves(runs, log=log),
            "error_against_N": lambda runs, _: draw_against_n(runs),
            "hankel": lambda runs, _: draw_hankel(runs),
        },
    ),
    "sunspots": ("real_series", _SERIES),
    "co2": ("real_series", _SERIES),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Draw every picture of the task; print their paths."""
    about = (__doc__ or "").partition("\n")[0]
    name = "python -m time_series_experiments.plot_runs"
    options = parse(name, about, PARAMETERS, argv)
    with one_line_errors():
        return _draw(**options)


def _draw(
    *, task: str, latest_only: bool, log_val_curves: bool, log_path: str, out_dir: str
) -> int:
    if task not in TASKS:
        raise bad_input("task", task, f"one of {', '.join(TASKS)}", "choose one")
    experiment, pictures = TASKS[task]
    runs = read_runs(log_path, experiment, task, latest_only=latest_only)
    folder = Path(out_dir) if out_dir else Path(log_path).parent
    for name, draw in pictures.items():
        path = folder / f"{task}_{name}.png"
        check_picture_path(path)
        print(f"saved {save_figure(draw(runs, log_val_curves), path)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
