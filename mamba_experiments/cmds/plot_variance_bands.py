"""Curves of training: the mean over seeds, +- 1 standard deviation, every seed faint.

    python -m mamba_experiments.cmds.plot_variance_bands --log-path train_runs.jsonl

draws one metric against epochs for each model, from runs whose settings are equal but
for seed and model; a mixture is refused. The deviation is sqrt(sum (x - mean)^2 /
(n - 1)) over n seeds at each evaluation; it says how runs scatter, not how well their
mean is known. Broken lines are levels without training (unigram model, guessing).
"""

import itertools
import math
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from experiments.common import (
    COLORS,
    InputError,
    Parameter,
    check_picture_path,
    new_figure,
    one_line_errors,
    parse,
    save_figure,
)
from mamba_experiments.cmds._runs import (
    DATASET,
    LOG,
    MAY_DIFFER,
    MODELS,
    WHERE,
    Array,
    Run,
    caption,
    comparable,
    note,
)
from mamba_experiments.cmds._stats import (
    Baseline,
    baselines,
    check_metric,
    mean_and_sd,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PARAMETERS = (
    LOG,
    Parameter("out_dir", str, "outputs", "The folder that gets the picture."),
    DATASET,
    MODELS,
    Parameter("metric", str, "val_loss", "What to draw: any number of an evaluation."),
    Parameter(
        "require_all_models", bool, False, "Refuse if a model of --models has no run."
    ),
    WHERE,
    MAY_DIFFER,
)
LABELS = {
    "val_loss": "validation loss (nats per scored token)",
    "val_accuracy": "validation accuracy",
    "val_perplexity": "validation perplexity per scored token",
    "train_loss": "training loss (nats per scored token)",
    "train_accuracy": "training accuracy",
}
LEVELS: dict[str, Callable[[Baseline], float | None]] = {
    "val_loss": lambda level: level.loss,
    "val_accuracy": lambda level: level.accuracy,
    "val_perplexity": lambda level: level.loss and math.exp(level.loss),
}
DASHES = ("--", ":", "-.")
Curves = tuple[Float[Array, " E"], Float[Array, "S E"]]


def aligned(runs: Sequence[Run], metric: str) -> Curves:
    """Epochs that every run was evaluated at, and the metric there, a row a run.

    Says which runs have evaluations that others lack. Raises InputError if none is
    common to all.
    """
    own = [{entry["epoch"] for entry in run.curve} for run in runs]
    common = set.intersection(*own)
    for run, epochs in zip(runs, own, strict=True):
        if left_out := len(epochs - common):
            note(
                f"{run.model}, seed {run.seed}: {left_out} of {len(epochs)} "
                "evaluations left out of the mean, since another seed has none then"
            )
    if not common:
        raise InputError(
            f"{runs[0].model}: its seeds were never evaluated at the same epoch; "
            "expected evaluations in common; run them with one --eval-every"
        )
    rows = []
    for run in runs:
        by_epoch = dict(
            zip((e["epoch"] for e in run.curve), run.values(metric), strict=True)
        )
        rows.append([by_epoch[epoch] for epoch in sorted(common)])
    return np.array(sorted(common), dtype=float), np.array(rows, dtype=float)


def draw(groups: dict[str, list[Run]], metric: str) -> "Figure":
    """One panel: band, mean and seeds of each model, and the levels to beat."""
    runs = [run for group in groups.values() for run in group]
    figure, axes = new_figure()
    ax = axes[0, 0]
    for index, (model, group) in enumerate(groups.items()):
        _draw_model(ax, index, model, group, metric)
    level = LEVELS.get(metric, lambda _: None)
    for style, baseline in zip(itertools.cycle(DASHES), baselines(runs), strict=False):
        if (y := level(baseline)) is not None:
            label = f"{baseline.name}: {y:.4g}"
            ax.axhline(y, color="0.35", linestyle=style, linewidth=1.2, label=label)
    ax.set(xlabel="epoch", ylabel=LABELS.get(metric, metric.replace("_", " ")))
    ax.set_title(textwrap.fill(caption(runs), 72), fontsize=8)
    title = "mean, ±1 standard deviation"
    ax.legend(title=title, frameon=False, fontsize=8, title_fontsize=8)
    return figure


def _draw_model(
    ax: "Axes", index: int, model: str, runs: Sequence[Run], metric: str
) -> None:
    color = COLORS[index % len(COLORS)]
    style = ("-", "-.")[index // len(COLORS) % 2]
    for run in runs:
        x = [entry["epoch"] for entry in run.curve]
        ax.plot(x, run.values(metric), style, color=color, alpha=0.3, linewidth=0.7)
    epochs, values = aligned(runs, metric)
    mean, sd = mean_and_sd(values)
    plural = "s" if len(runs) > 1 else ""
    marker = "o" if len(epochs) == 1 else None
    label = f"{model} ({len(runs)} seed{plural})"
    ax.plot(epochs, mean, style, color=color, marker=marker, label=label, zorder=3)
    if len(runs) > 1:
        ax.fill_between(epochs, mean - sd, mean + sd, color=color, alpha=0.2, lw=0)
    for run, row in zip(runs, values, strict=True):
        if not np.isfinite(row).all():
            first = epochs[np.argmin(np.isfinite(row))]
            note(f"{model}, seed {run.seed}: {metric} is not finite at epoch {first:g}")


def main(argv: Sequence[str] | None = None) -> int:
    """Draw what the flags ask for; print the picture's path."""
    about = (__doc__ or "").strip()
    name = "python -m mamba_experiments.cmds.plot_variance_bands"
    options = parse(name, about, PARAMETERS, argv)
    out_dir, metric = options.pop("out_dir"), options.pop("metric")
    with one_line_errors():
        groups = comparable(**options)
        runs = [run for group in groups.values() for run in group]
        check_metric(metric, runs)
        dataset = runs[0].params["dataset"]
        path = Path(out_dir) / f"{dataset}_{metric}_variance_bands.png"
        check_picture_path(path)
        print(f"saved {save_figure(draw(groups, metric), path)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
