"""Statistics of training runs, the levels that they have to beat, and tables as text.

What the reports of this package share beside the reading of runs (``_runs``).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from experiments._cli import nearest
from experiments.common import bad_input
from mamba_experiments.cmds._runs import Array, Entry, Run


@dataclass(frozen=True)
class Baseline:
    """A level to beat that needs no training: its loss, its accuracy, or both."""

    name: str
    loss: float | None
    accuracy: float | None


def mean_and_sd(
    values: Float[Array, "S *E"],
) -> tuple[Float[Array, "*E"], Float[Array, "*E"]]:
    """Mean over seeds, and sqrt(sum (x - mean)^2 / (S - 1)): NaN for a single one."""
    with np.errstate(invalid="ignore"):  # an infinite loss has no deviation: NaN
        mean = np.asarray(values.mean(axis=0))
        if len(values) < 2:
            return mean, np.full(mean.shape, np.nan)
        return mean, np.asarray(values.std(axis=0, ddof=1))


def ranks(values: Float[Array, " n"]) -> Float[Array, " n"]:
    """Ranks from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def spearman(x: Float[Array, " n"], y: Float[Array, " n"]) -> float:
    """Spearman's rho, Pearson's correlation of the ranks; NaN where x or y is constant.

    Equal values take mean ranks, so ties in ``y`` at distinct ``x`` keep rho below 1.
    """
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return math.nan
    u, v = (ranks(values) - (len(values) + 1) / 2 for values in (x, y))
    scale = math.sqrt(float(u @ u) * float(v @ v))
    return float(u @ v) / scale if scale else math.nan


def best_entry(run: Run) -> Entry:
    """The evaluation with the lowest validation loss (the first of equals).

    Where no loss was finite, the first evaluation stands.
    """
    loss = run.values("val_loss")
    return run.curve[int(np.argmin(np.where(np.isfinite(loss), loss, np.inf)))]


def known_metrics(runs: Sequence[Run]) -> list[str]:
    """The numeric keys that every evaluation of every run has."""
    entries = [entry for run in runs for entry in run.curve]
    return [key for key in entries[0] if all(_is_number(e.get(key)) for e in entries)]


def check_metric(metric: str, runs: Sequence[Run]) -> None:
    """Raise InputError with the nearest name unless every run has ``metric``."""
    known = known_metrics(runs)
    if metric not in known:
        near = nearest(metric, known)
        raise bad_input(
            "metric",
            metric,
            f"what every evaluation has ({', '.join(known)})",
            f"did you mean {near}?" if near else "choose one of those",
        )


def _is_number(value: Any) -> bool:
    if isinstance(value, str):
        return value in ("NaN", "Infinity", "-Infinity")  # as to_json writes them
    return isinstance(value, int | float) and not isinstance(value, bool)


def baselines(runs: Sequence[Run]) -> list[Baseline]:
    """The levels in the dataset's metadata: ``<name>_loss`` and ``<name>_accuracy``.

    Means over the runs: where the seed draws the validation data, levels vary with it.
    """
    keys = dict.fromkeys(key for run in runs for key in run.task)
    names = (key.rpartition("_") for key in keys)
    found = dict.fromkeys(n for n, _, kind in names if kind in ("loss", "accuracy"))
    return [
        Baseline(
            name.replace("_", " "),
            _level(runs, f"{name}_loss"),
            _level(runs, f"{name}_accuracy"),
        )
        for name in found
    ]


def _level(runs: Sequence[Run], key: str) -> float | None:
    values = [float(run.task[key]) for run in runs if key in run.task]
    return math.fsum(values) / len(values) if values else None


# --- text -----------------------------------------------------------------------------


def plain_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as aligned text: the first column to the left, numbers right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)]
        ).rstrip()
        for row in rows
    )


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells in Markdown, the first row its head."""
    rule = ["---", *("---:" for _ in rows[0][1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], rule, *rows[1:]])
