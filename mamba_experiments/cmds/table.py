"""The published comparison as a table: best validation loss and accuracy over seeds.

    python -m mamba_experiments.cmds.table --log-path train_runs.jsonl

One row a model: seeds, parameters, the lowest validation loss of each run (mean +-
sqrt(sum (x - mean)^2 / (n - 1)), least and greatest), the accuracy at that evaluation
and its epoch. Then the levels without training, and for every further model the mean
difference from the first, paired by seed, with t sd / sqrt(n) on both sides (95 %).
The best of several evaluations on the validation split flatters every model alike.
"""

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from experiments.common import (
    InputError,
    Parameter,
    one_line_errors,
    parse,
    to_json,
)
from experiments.exp4b_time_scaling_errorbars import mean_and_interval
from mamba_experiments.cmds._runs import (
    DATASET,
    LOG,
    MAY_DIFFER,
    MODELS,
    WHERE,
    Run,
    caption,
    comparable,
    differing,
    seeds_text,
)
from mamba_experiments.cmds._stats import (
    Baseline,
    baselines,
    best_entry,
    markdown_table,
    mean_and_sd,
    plain_table,
)

PARAMETERS = (
    LOG,
    DATASET,
    MODELS,
    WHERE,
    MAY_DIFFER,
    Parameter("markdown", bool, False, "Print Markdown."),
    Parameter("json", bool, False, "Print the numbers as JSON."),
)
Report = dict[str, Any]
Cells = list[list[str]]
HEAD = [
    "model",
    "seeds",
    "parameters (outside embedding)",
    "best val loss (nats)",
    "min .. max",
    "accuracy then",
    "epoch",
]
DIFFERENCES_HEAD = ["paired by seed", "pairs", "val loss", "95 %", "accuracy", "95 %"]


def report(groups: dict[str, list[Run]]) -> Report:
    """The statistics of every model, the levels to beat, and the paired differences."""
    runs = [run for group in groups.values() for run in group]
    first, *others = groups
    return {
        "caption": caption(runs),
        "differing": {
            key: {model: group[0].setting(key) for model, group in groups.items()}
            for key in differing(runs)
        },
        "models": [_row(model, group) for model, group in groups.items()],
        "baselines": [vars(level) for level in baselines(runs)],
        "differences": [
            {"model": model, "against": first, **paired(groups[model], groups[first])}
            for model in others
        ],
    }


def _row(model: str, runs: Sequence[Run]) -> Report:
    best = [best_entry(run) for run in runs]
    return {
        "model": model,
        "seeds": [run.seed for run in runs],
        "n_params": runs[0].n_params,
        "val_loss": _summary([float(entry["val_loss"]) for entry in best]),
        "val_accuracy": _summary([float(entry["val_accuracy"]) for entry in best]),
        "epoch": _summary([float(entry["epoch"]) for entry in best]),
    }


def _summary(values: Sequence[float]) -> dict[str, Any]:
    mean, sd = mean_and_sd(np.array(values))
    return {
        "mean": float(mean),
        "sd": float(sd) if len(values) > 1 else None,
        "min": float(np.min(values)),
        "max": float(np.max(values)),
        "values": list(values),
    }


def paired(runs: Sequence[Run], against: Sequence[Run]) -> Report:
    """Mean of (model - first) over the seeds of both, and its 95 % t interval.

    No mean without a seed in common, and no interval with one.
    """
    best = [{run.seed: best_entry(run) for run in group} for group in (runs, against)]
    seeds = sorted(set(best[0]) & set(best[1]))
    found: Report = {"seeds": seeds}
    for metric in ("val_loss", "val_accuracy"):
        ours, theirs = ([float(side[s][metric]) for s in seeds] for side in best)
        values = [a - b for a, b in zip(ours, theirs, strict=True)]
        with np.errstate(invalid="ignore"):  # infinite losses differ by NaN
            mean, interval = mean_and_interval(values) if values else (None, None)
        found[metric] = {"mean": mean, "ci95": interval}
    return found


# --- text -----------------------------------------------------------------------------


def rows_of(found: Report) -> Cells:
    """The table of models and levels, its head first."""
    models = [
        [
            row["model"],
            f"{len(row['seeds'])} ({seeds_text(row['seeds'])})",
            f"{row['n_params']['total']:,} ({row['n_params']['rest']:,})",
            _with_sd(row["val_loss"], _loss),
            f"{_loss(row['val_loss']['min'])} .. {_loss(row['val_loss']['max'])}",
            _with_sd(row["val_accuracy"], _percent),
            _with_range(row["epoch"]),
        ]
        for row in found["models"]
    ]
    levels = [_level_row(Baseline(**level)) for level in found["baselines"]]
    return [HEAD, *models, *levels]


def _level_row(level: Baseline) -> list[str]:
    loss = "-" if level.loss is None else _loss(level.loss)
    accuracy = "-" if level.accuracy is None else _percent(level.accuracy) + " %"
    return [f"{level.name} (no training)", "-", "-", loss, "-", accuracy, "-"]


def difference_rows(found: Report) -> Cells:
    """The table of paired differences, its head first."""
    rows = [
        [
            f"{row['model']} - {row['against']}",
            str(len(row["seeds"])),
            *_difference(row["val_loss"], _signed_loss),
            *_difference(row["val_accuracy"], _signed_points),
        ]
        for row in found["differences"]
    ]
    return [DIFFERENCES_HEAD, *rows]


def _difference(found: Report, shown: Callable[[float], str]) -> tuple[str, str]:
    mean = "-" if found["mean"] is None else shown(found["mean"])
    if found["ci95"] is None:
        return mean, "-"
    return mean, " .. ".join(shown(bound) for bound in found["ci95"])


def _loss(value: float) -> str:
    return f"{value:.4f}"


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"


def _signed_loss(value: float) -> str:
    return f"{value:+.4f}"


def _signed_points(value: float) -> str:
    return f"{100 * value:+.2f} pp"


def _with_sd(summary: Report, shown: Callable[[float], str]) -> str:
    unit = " %" if shown is _percent else ""
    if summary["sd"] is None:
        return shown(summary["mean"]) + unit
    return f"{shown(summary['mean'])} ± {shown(summary['sd'])}{unit}"


def _with_range(summary: Report) -> str:
    if summary["min"] == summary["max"]:
        return f"{summary['mean']:g}"
    return f"{summary['mean']:.3g} ({summary['min']:g} .. {summary['max']:g})"


def text(found: Report, layout: Callable[[Cells], str]) -> str:
    """The whole report, each table in ``layout``."""
    parts = [found["caption"], layout(rows_of(found))]
    for key, values in found["differing"].items():
        each = ", ".join(f"{model} {value}" for model, value in values.items())
        parts.insert(1, f"{key} differs between the models: {each}")
    if found["differences"]:
        parts.append(layout(difference_rows(found)))
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report that the flags ask for."""
    about = (__doc__ or "").strip()
    name = "python -m mamba_experiments.cmds.table"
    options = parse(name, about, PARAMETERS, argv)
    as_json, markdown = options.pop("json"), options.pop("markdown")
    with one_line_errors():
        if as_json and markdown:
            raise InputError("got --json and --markdown; expected one; leave out one")
        found = report(comparable(**options))
        if as_json:
            print(json.dumps(to_json(found), allow_nan=False, ensure_ascii=False))
        else:
            print(text(found, markdown_table if markdown else plain_table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
