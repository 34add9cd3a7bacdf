"""Pictures of the runs on a real series: forecasts, and their error by step ahead."""

from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.common import COLORS, new_figure
from time_series_experiments._runs import Runs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BASELINES = ("0.45", "0.7")  # greys
SHOWN = 4  # seasons of the test part, its last ones


def draw_forecasts(runs: Runs) -> "Figure":
    """The end of the test part: one step ahead, and whole paths of H steps."""
    figure, axes = new_figure(1, 2)
    series = runs.records[0]["meta"]["series"]
    years, x = np.array(series["years"]), np.array(series["x"])
    origins = np.array(series["origins"])
    origins = origins - origins[0]
    H = runs.records[0]["meta"]["horizon"]
    for ax in axes[0]:
        ax.plot(years, x, color="black", lw=1.1, label="observed")
        ax.set(xlabel="year", ylabel=series["unit"])
    for name, shown, color in _forecasters(runs):
        axes[0, 0].plot(years[origins + 1], shown["one_step"], color=color, label=name)
        for i, path in enumerate(shown["paths"]):
            at = years[origins[i * H] + np.arange(1, H + 1)]
            label = name if i == 0 else None
            axes[0, 1].plot(at, path, color=color, label=label)
    first = max(0, len(years) - 1 - SHOWN * series["period"])
    low, high = x[first:].min(), x[first:].max()
    for ax in axes[0]:
        margin = 0.2 * (high - low)
        ax.set(xlim=(years[first], years[-1]), ylim=(low - margin, high + 2 * margin))
    axes[0, 0].set_title(f"{runs.settings['task']}: one step ahead")
    axes[0, 1].set_title(f"paths of {H} steps, each begun where the last ended")
    axes[0, 0].legend(fontsize=7, ncols=2, frameon=False)
    return figure


def draw_errors(runs: Runs) -> "Figure":
    """The mean absolute error against the number of steps ahead."""
    figure, axes = new_figure()
    ax = axes[0, 0]
    meta = runs.records[0]["meta"]
    steps = np.arange(1, meta["horizon"] + 1)
    greys = zip(meta["baselines"].items(), BASELINES, ("--", "-"), strict=True)
    for (name, scores), color, dash in greys:
        ax.plot(steps, scores["mae_by_step"], dash, color=color, label=name)
    for i, (model, group) in enumerate(runs.groups().items()):
        rows = [record["meta"]["scores"]["mae_by_step"] for record in group]
        seeds = f" (median of {len(rows)} seeds)" if len(rows) > 1 else ""
        middle = np.median(rows, axis=0)
        ax.plot(steps, middle, color=COLORS[i], label=model + seeds)
    ax.set(
        xlabel="steps ahead", ylabel=f"mean absolute error, {meta['series']['unit']}"
    )
    ax.set_title(f"{runs.settings['task']}: the test part")
    ax.set_ylim(0, 1.45 * ax.get_ylim()[1])  # room for the legend above
    ax.legend(loc="upper right", fontsize=8, ncols=2, frameon=False)
    return figure


def _forecasters(runs: Runs) -> list[tuple[str, dict[str, Any], str]]:
    """Name, forecasts and colour of the baselines, then of each model's first seed."""
    meta = runs.records[0]["meta"]
    found = [
        (name, meta["forecasts"][name], color)
        for name, color in zip(meta["baselines"], BASELINES, strict=True)
    ]
    for i, (model, group) in enumerate(runs.groups().items()):
        found.append((model, group[0]["meta"]["forecasts"][model], COLORS[i]))
    return found
