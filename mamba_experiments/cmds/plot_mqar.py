"""Multi-query associative recall: accuracy against key-value pairs and state size.

    python -m mamba_experiments.cmds.plot_mqar --log-path train_runs.jsonl

A run is trained on sequences of several numbers of pairs; at the end its validation
accuracy is taken for each number apart. One panel a model, one line a state size: the
mean over seeds, bars from the least to the greatest, every seed faint. A model whose
state ``--n-state`` does not set (attention keeps everything, RWKV two sums a channel)
is one line, drawn in every panel. Spearman's rho between state size and accuracy says
how steadily more state helps: at each number of pairs, and for the accuracy averaged
over them. Ties, as at 100 %, keep rho below 1. With ``--best-of lr`` each model, state
size and seed is shown by the best of its runs at several learning rates, as in Zoology.
Task: Arora et al. (2024), "Zoology", section 3.
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from experiments.common import (
    MARKERS,
    SEQUENTIAL,
    InputError,
    Parameter,
    check_picture_path,
    new_figure,
    one_line_errors,
    parse,
    save_figure,
)
from mamba_experiments.cmds._runs import (
    LOG,
    MAY_DIFFER,
    MODELS,
    WHERE,
    Array,
    Run,
    by_model,
    check_equal_settings,
    known_key,
    latest,
    missing_from,
    note,
    read_runs,
    select,
)
from mamba_experiments.cmds._stats import plain_table, spearman

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

UNSIZED = frozenset({"transformer", "rwkv"})  # models whose state n_state does not set
PANELS_A_ROW = 3
DASHES = (":", "-.")
GUESSES = {"guess_accuracy": "guess", "guess_shown_accuracy": "guess of those shown"}
AVERAGE = "average"
PARAMETERS = (
    LOG,
    Parameter("out", str, "outputs/mqar.png", "The picture (.png, .pdf or .svg)."),
    MODELS,
    WHERE,
    MAY_DIFFER,
    Parameter(
        "best_of",
        tuple[str, ...],
        (),
        "Settings that were searched: of runs that differ in them, each model, state "
        "size and seed is shown by the one with the least validation loss.",
    ),
)
Levels = dict[str, dict[int, float]]  # name -> pairs -> accuracy without training


@dataclass(frozen=True)
class Scores:
    """One model's accuracies: numbers of pairs, and for each state size a row a seed.

    State sizes are in order; None is that of a model which ``n_state`` does not size.
    """

    pairs: list[int]
    lines: dict[int | None, Float[Array, "S P"]]

    def sized(self) -> dict[int, Float[Array, "S P"]]:
        """The lines that have a state size."""
        return {size: line for size, line in self.lines.items() if size is not None}


def state_size(run: Run) -> int | None:
    """The state size of a run's model, None where ``n_state`` does not set it."""
    return None if run.model in UNSIZED else int(run.params["n_state"])


def runs_of(
    log_path: str,
    models: Sequence[str],
    where: Sequence[str],
    may_differ: Sequence[str],
    best_of: Sequence[str] = (),
) -> list[Run]:
    """One run for each model, state size and seed, all other settings equal.

    best_of: settings of which the run with the least validation loss is taken. Raises
    InputError where others differ, and for a run without scores at each number of
    pairs.
    """
    found = read_runs(log_path)
    runs = select(found, log_path, dataset="mqar", models=models, where=where)
    for run in runs:
        if not _is_complete(run):
            raise InputError(
                f"{log_path}: run {run.run_id} lacks n_state, or scores at each of "
                f"n_pairs = {run.setting('n_pairs')}; expected both in a run on mqar; "
                "leave it out with --where, or train again"
            )
    searched = [known_key("best-of", key, runs) for key in best_of]
    check_equal_settings(
        runs, log_path, varied=["n_state", *searched], may_differ=may_differ
    )

    def tried(run: Run) -> tuple[object, ...]:
        values = [json.dumps(run.setting(key)) for key in searched]
        return (*_cell_of(run), *values)

    return _best(latest(runs, tried))


def _cell_of(run: Run) -> tuple[str, int | None, int]:
    return run.model, state_size(run), run.seed


def _best(runs: Sequence[Run]) -> list[Run]:
    """Of the runs of each model, state size and seed the one of least loss."""
    best: dict[tuple[str, int | None, int], Run] = {}
    for run in runs:
        rival = best.setdefault(_cell_of(run), run)
        if least_loss(run) < least_loss(rival):
            best[_cell_of(run)] = run
    return [run for run in runs if best[_cell_of(run)] is run]


def least_loss(run: Run) -> float:
    """The least validation loss of the curve; not a number counts as infinite."""
    losses = run.values("val_loss")
    return float(np.where(np.isnan(losses), np.inf, losses).min())


def _is_complete(run: Run) -> bool:
    pairs, guesses = run.setting("n_pairs"), run.task.get("parts", {})
    return (
        isinstance(pairs, list)
        and isinstance(run.setting("n_state"), int)
        and all("accuracy" in run.parts.get(str(n), {}) for n in pairs)
        and all(GUESSES.keys() <= guesses.get(str(n), {}).keys() for n in pairs)
    )


def scores_of(runs: Sequence[Run]) -> Scores:
    """The accuracies of one model's runs."""
    pairs = runs[0].params["n_pairs"]
    rows: dict[int | None, list[list[float]]] = {}
    for run in sorted(runs, key=lambda run: (state_size(run) or 0, run.seed)):
        accuracies = [float(run.parts[str(n)]["accuracy"]) for n in pairs]
        rows.setdefault(state_size(run), []).append(accuracies)
    return Scores(pairs, {size: np.array(line) for size, line in rows.items()})


def levels_of(runs: Sequence[Run]) -> Levels:
    """Accuracies without training, by number of pairs; equal in runs that compare."""
    parts = {int(n): part for run in runs for n, part in run.task["parts"].items()}
    return {
        name: {n: part[key] for n, part in sorted(parts.items())}
        for key, name in GUESSES.items()
    }


def all_pairs(scores: dict[str, Scores]) -> list[int]:
    """Every number of pairs that a model was scored at."""
    return sorted({n for own in scores.values() for n in own.pairs})


# --- statistics -----------------------------------------------------------------------


def correlations(scores: Scores) -> dict[str, tuple[float, float]]:
    """Spearman's rho of state size with accuracy, over means and over runs.

    For each number of pairs, and for the average over them. With fewer than two state
    sizes there is none (NaN).
    """
    lines = scores.sized()
    sizes = np.array(list(lines), dtype=float)
    means = _with_average(np.array([line.mean(axis=0) for line in lines.values()]))
    runs = _with_average(np.concatenate(list(lines.values())))
    of_runs = np.repeat(sizes, [len(line) for line in lines.values()])
    keys = [*map(str, scores.pairs), AVERAGE]
    return {
        key: (spearman(sizes, mean), spearman(of_runs, run))
        for key, mean, run in zip(keys, means.T, runs.T, strict=True)
    }


def _with_average(rows: Float[Array, "n P"]) -> Float[Array, "n P+1"]:
    """A last column, the mean; rounded, since the order of a sum must break no tie."""
    return np.round(np.column_stack([rows, rows.mean(axis=1)]), 12)


# --- text -----------------------------------------------------------------------------


def accuracy_rows(scores: dict[str, Scores]) -> list[list[str]]:
    """A row for each model and state size, a column for each number of pairs."""
    pairs = all_pairs(scores)
    rows = [["accuracy %: mean (min .. max), seeds", *map(_pairs_text, pairs)]]
    for model, own in scores.items():
        for size, line in own.lines.items():
            cells = dict(zip(own.pairs, map(_cell, line.T), strict=True))
            name = model if size is None else f"{model}, state {size}"
            rows.append([name, *(cells.get(n, "-") for n in pairs)])
    return rows


def _pairs_text(n: int) -> str:
    return f"{n} pair{'s' if n > 1 else ''}"


def _cell(accuracies: Float[Array, " S"]) -> str:
    percent = 100 * accuracies
    return (
        f"{percent.mean():.1f} ({percent.min():.1f} .. {percent.max():.1f}), "
        f"{len(percent)}"
    )


def extreme_rows(scores: dict[str, Scores]) -> list[list[str]]:
    """Each model at the most state and fewest pairs, and at the least and the most."""
    rows = [["accuracy %: mean over seeds", "easiest setting", "hardest setting"]]
    for model, own in scores.items():
        sizes = list(own.lines)
        easiest, hardest = _setting(own, sizes[-1], 0), _setting(own, sizes[0], -1)
        rows.append([model, easiest, hardest])
    return rows


def _setting(scores: Scores, size: int | None, column: int) -> str:
    mean = 100 * scores.lines[size][:, column].mean()
    state = "" if size is None else f"state {size}, "
    return f"{mean:.1f} ({state}{_pairs_text(scores.pairs[column])})"


def correlation_rows(scores: dict[str, Scores]) -> list[list[str]]:
    """A row for each model with two state sizes or more; ``-``: rho is undefined."""
    pairs = all_pairs(scores)
    head = [*map(_pairs_text, pairs), AVERAGE]
    rows = [["Spearman's rho with state size: of means (of runs)", *head]]
    for model, own in scores.items():
        if len(own.sized()) > 1:
            found = correlations(own)
            cells = [_rho_cell(found.get(key)) for key in [*map(str, pairs), AVERAGE]]
            rows.append([model, *cells])
    return rows


def _rho_cell(found: tuple[float, float] | None) -> str:
    if found is None or math.isnan(found[0]):
        return "-"
    return "{:.2f} ({:.2f})".format(*found)


# --- picture --------------------------------------------------------------------------


def draw(scores: dict[str, Scores], levels: Levels) -> "Figure":
    """One panel for each model with state sizes; the others' lines in every panel."""
    unsized = {model: own for model, own in scores.items() if None in own.lines}
    panels = {model: own for model, own in scores.items() if own.sized()}
    panels = panels or {"": Scores([], {})}
    rows = -(-len(panels) // PANELS_A_ROW)
    figure, axes = new_figure(rows, -(-len(panels) // rows))
    for ax in list(axes.flat)[len(panels) :]:
        ax.remove()
    sizes = sorted({size for own in panels.values() for size in own.sized()})
    for ax, (model, own) in zip(axes.flat, panels.items(), strict=False):
        for size, line in own.sized().items():
            style = _sized_style(sizes.index(size), len(sizes))
            _draw_line(ax, own.pairs, line, label=f"state {size}", **style)
        for index, (name, other) in enumerate(unsized.items()):
            style = {"color": "black", "marker": MARKERS[-1 - index], "linestyle": "--"}
            _draw_line(ax, other.pairs, other.lines[None], label=name, **style)
        shown = [
            *own.lines.values(),
            *(other.lines[None] for other in unsized.values()),
        ]
        _finish(ax, f"{model} ({_seed_counts(shown)})", all_pairs(scores), levels)
    _legend(figure)
    return figure


def _sized_style(index: int, count: int) -> dict[str, Any]:
    import matplotlib as mpl

    shade = mpl.colormaps[SEQUENTIAL](0.9 * index / max(1, count - 1))
    return {"color": shade, "marker": MARKERS[index % len(MARKERS)]}


def _draw_line(
    ax: "Axes", pairs: Sequence[int], line: Float[Array, "S P"], **style: Any
) -> None:
    """Mean and range of a line; its seeds faint, a little to the right of them."""
    mean = line.mean(axis=0)
    bars = np.array([mean - line.min(axis=0), line.max(axis=0) - mean])
    bars = np.maximum(bars, 0)  # rounding can put the mean of equal seeds beside them
    ax.errorbar(pairs, mean, bars, capsize=2, **style)
    x = np.broadcast_to(1.06 * np.array(pairs), line.shape)
    ax.scatter(x, line, s=9, color=style["color"], alpha=0.4, linewidths=0)


def _seed_counts(lines: Sequence[Float[Array, "_ _"]]) -> str:
    """How many rows, that is seeds, the lines have; each may cover its own numbers."""
    counts = sorted({len(line) for line in lines})
    return f"{' or '.join(map(str, counts))} seed{'s' if counts[-1] > 1 else ''}"


def _finish(ax: "Axes", title: str, pairs: Sequence[int], levels: Levels) -> None:
    for dash, (name, level) in zip(DASHES, levels.items(), strict=True):
        x, y = list(level), list(level.values())
        ax.plot(x, y, color="0.5", linestyle=dash, linewidth=1.2, label=name)
    ax.set(xscale="log", ylim=(-0.03, 1.03), title=title)
    ax.set(xlabel="key-value pairs", ylabel="validation accuracy at the end")
    ax.set_xticks(pairs, [str(n) for n in pairs])
    ax.set_xticks([], minor=True)


def _legend(figure: "Figure") -> None:
    """One legend for all panels, each label once, states by size."""
    found: dict[str, Any] = {}
    for ax in figure.axes:
        handles, labels = ax.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    labels = sorted(found, key=lambda label: (len(label), label))
    ordered = [label for label in labels if label.startswith("state ")]
    ordered += [label for label in found if label not in ordered]
    figure.legend(
        [found[label] for label in ordered],
        ordered,
        loc="outside right upper",
        frameon=False,
        title="mean (points: seeds)\nbars: min, max",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print accuracies and correlations, draw the picture, print its path."""
    about = (__doc__ or "").strip()
    options = parse(
        "python -m mamba_experiments.cmds.plot_mqar", about, PARAMETERS, argv
    )
    out = options.pop("out")
    with one_line_errors():
        check_picture_path(out)
        runs = runs_of(**options)
        groups = by_model(runs, options["models"])
        if missing := missing_from(groups, options["models"]):
            note(f"no run of {missing}")
        scores = {model: scores_of(group) for model, group in groups.items()}
        print(plain_table(accuracy_rows(scores)))
        print(f"\n{plain_table(extreme_rows(scores))}")
        if len(correlation := correlation_rows(scores)) > 1:
            print(f"\n{plain_table(correlation)}")
        print(f"\nsaved {save_figure(draw(scores, levels_of(runs)), out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
