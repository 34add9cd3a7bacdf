"""Multi-query associative recall: accuracy against key-value pairs and state size.

    python -m mamba_experiments.cmds.plot_mqar --log-path train_runs.jsonl

A run counts with the best validation accuracy of its evaluations. One panel a model,
one line a state size: the mean over seeds, bars from the least to the greatest, every
seed faint. A model whose state ``--n-state`` does not set (attention keeps everything,
RWKV two sums a channel) is one line, drawn in every panel. Spearman's rho between state
size and accuracy says how steadily more state helps: at each number of pairs, and for
the accuracy averaged over all of them. Ties, as at 100 %, keep rho below 1.
Task: Arora et al. (2024), "Zoology", section 3.
"""

import itertools
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

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
    Run,
    baselines,
    best_accuracy,
    by_model,
    check_equal_settings,
    differing,
    latest,
    note,
    plain_table,
    read_runs,
    select,
    spearman,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

UNSIZED = frozenset({"transformer", "rwkv"})  # models whose state n_state does not set
PANELS_A_ROW = 3
DASHES = (":", "-.")
PARAMETERS = (
    LOG,
    Parameter("out", str, "outputs/mqar.png", "The picture (.png, .pdf or .svg)."),
    MODELS,
    WHERE,
    MAY_DIFFER,
)
Line = dict[int, list[float]]  # pairs -> accuracies of the seeds, in order
Lines = dict[int | None, Line]  # state size (None: not set) -> its line
Levels = dict[str, dict[int, float]]  # name -> pairs -> accuracy without training


def state_size(run: Run) -> int | None:
    """The state size of a run's model, None where ``n_state`` does not set it."""
    return None if run.model in UNSIZED else int(run.params["n_state"])


def n_pairs(run: Run) -> int:
    """The number of key-value pairs in a sequence."""
    return int(run.params["n_pairs"])


def runs_of(
    log_path: str,
    models: Sequence[str],
    where: Sequence[str],
    may_differ: Sequence[str],
) -> list[Run]:
    """One run for each model, state size, number of pairs and seed.

    At one number of pairs all settings but the state size are equal, else InputError;
    from one number of pairs to the next they may change (the length of a sequence),
    which is said.
    """
    found = read_runs(log_path)
    runs = select(found, log_path, dataset="mqar", models=models, where=where)
    for needed in ("n_pairs", "n_state"):
        if lacking := [run.run_id for run in runs if needed not in run.params]:
            raise InputError(
                f"{log_path}: runs {', '.join(lacking)} lack the setting {needed}; "
                "expected it in every run on mqar; leave them out with --where"
            )
    for n in sorted({n_pairs(run) for run in runs}):
        check_equal_settings(
            [run for run in runs if n_pairs(run) == n],
            log_path,
            varied=["n_state"],
            may_differ=may_differ,
        )
    _note_changes(runs)
    return latest(
        runs, lambda run: (run.model, state_size(run), n_pairs(run), run.seed)
    )


def _note_changes(runs: Sequence[Run]) -> None:
    """Say which settings change with the number of pairs."""
    for key in differing(runs, {"n_pairs", "n_state"}):
        values: dict[int, set[str]] = {}
        for run in sorted(runs, key=n_pairs):
            values.setdefault(n_pairs(run), set()).add(str(run.setting(key)))
        if len(set(map(frozenset, values.values()))) > 1:
            each = ", ".join(f"{' '.join(sorted(v))} at {n}" for n, v in values.items())
            note(f"{key} changes with the number of pairs: {each}")


def lines_of(runs: Sequence[Run]) -> Lines:
    """Accuracies of one model's runs by state size and number of pairs."""
    lines: Lines = {}
    for run in sorted(runs, key=lambda r: (state_size(r) or 0, n_pairs(r), r.seed)):
        line = lines.setdefault(state_size(run), {})
        line.setdefault(n_pairs(run), []).append(best_accuracy(run))
    return lines


def levels_of(runs: Sequence[Run]) -> Levels:
    """Accuracies without training, such as guessing, by number of pairs."""
    levels: Levels = {}
    for n in sorted({n_pairs(run) for run in runs}):
        for level in baselines([run for run in runs if n_pairs(run) == n]):
            if level.accuracy is not None:
                levels.setdefault(level.name, {})[n] = level.accuracy
    return levels


# --- statistics -----------------------------------------------------------------------


def correlations(lines: Lines) -> dict[str, dict[str, float]]:
    """Spearman's rho of state size with accuracy, over means and over runs.

    Keys are numbers of pairs and ``all``: accuracy averaged over those numbers of
    pairs that every state size has. Fewer than two state sizes have no rho (NaN).
    """
    found = {}
    for n in sorted({n for line in lines.values() for n in line}):
        cells = [(float(size), line[n]) for size, line in _sized(lines) if n in line]
        found[str(n)] = _correlation(cells)
    shared = set.intersection(*(set(line) for line in lines.values()))
    if shared:
        means = [
            (float(size), [float(np.mean([np.mean(line[n]) for n in sorted(shared)]))])
            for size, line in _sized(lines)
        ]
        found["all"] = {"means": _correlation(means)["means"], "runs": math.nan}
    return found


def _sized(lines: Lines) -> list[tuple[int, Line]]:
    return [(size, line) for size, line in lines.items() if size is not None]


def _correlation(cells: Sequence[tuple[float, list[float]]]) -> dict[str, float]:
    sizes = np.array([size for size, _ in cells])
    means = np.array([np.mean(accuracies) for _, accuracies in cells])
    counts = [len(accuracies) for _, accuracies in cells]
    runs = np.array(list(itertools.chain.from_iterable(a for _, a in cells)))
    return {
        "means": spearman(sizes, means),
        "runs": spearman(np.repeat(sizes, counts), runs),
    }


# --- text -----------------------------------------------------------------------------


def accuracy_rows(lines: dict[str, Lines]) -> list[list[str]]:
    """A row for each model and state size, a column for each number of pairs."""
    pairs = sorted({n for own in lines.values() for line in own.values() for n in line})
    rows = [["accuracy %: mean (min .. max), seeds", *(f"{n} pairs" for n in pairs)]]
    for model, own in lines.items():
        for size, line in own.items():
            name = model if size is None else f"{model}, state {size}"
            rows.append([name, *(_cell(line.get(n, [])) for n in pairs)])
    return rows


def _cell(accuracies: Sequence[float]) -> str:
    if not accuracies:
        return "-"
    percent = 100 * np.array(accuracies)
    return (
        f"{percent.mean():.1f} ({percent.min():.1f} .. {percent.max():.1f}), "
        f"{len(accuracies)}"
    )


def correlation_rows(lines: dict[str, Lines]) -> list[list[str]]:
    """A row for each model with two state sizes or more; ``-``: rho is undefined."""
    found = {m: correlations(own) for m, own in lines.items() if len(_sized(own)) > 1}
    columns = list(dict.fromkeys(key for own in found.values() for key in own))
    numbers = sorted((c for c in columns if c != "all"), key=int)
    head = [f"{n} pairs" for n in numbers]
    rows = [["Spearman's rho with state size: of means (of runs)", *head, "average"]]
    for model, own in found.items():
        cells = [_rho_cell(own.get(key)) for key in [*numbers, "all"]]
        rows.append([model, *cells])
    return rows


def _rho_cell(found: dict[str, float] | None) -> str:
    if found is None or math.isnan(found["means"]):
        return "-"
    runs = "" if math.isnan(found["runs"]) else f" ({found['runs']:.2f})"
    return f"{found['means']:.2f}{runs}"


# --- picture --------------------------------------------------------------------------


def draw(lines: dict[str, Lines], levels: Levels) -> "Figure":
    """One panel for each model with state sizes; the others' lines in every panel."""
    unsized = {m: own[None] for m, own in lines.items() if None in own}
    panels = {m: _sized(own) for m, own in lines.items() if _sized(own)}
    panels = panels or {"": []}
    rows = -(-len(panels) // PANELS_A_ROW)
    figure, axes = new_figure(rows, -(-len(panels) // rows))
    for ax in list(axes.flat)[len(panels) :]:
        ax.remove()
    sizes = sorted({size for own in panels.values() for size, _ in own})
    for ax, (model, own) in zip(axes.flat, panels.items(), strict=False):
        for size, line in own:
            shade = _shade(sizes.index(size), len(sizes))
            marker = MARKERS[sizes.index(size) % len(MARKERS)]
            _draw_line(ax, line, color=shade, marker=marker, label=f"state {size}")
        for index, (other, line) in enumerate(unsized.items()):
            marker = MARKERS[-1 - index % len(MARKERS)]
            _draw_line(
                ax, line, color="black", marker=marker, label=other, linestyle="--"
            )
        shown = [line for _, line in own] + list(unsized.values())
        _finish(ax, f"{model} ({_seed_counts(shown)})", levels)
    pairs = sorted({n for own in lines.values() for line in own.values() for n in line})
    for ax in figure.axes:
        ax.set_xticks(pairs, [str(n) for n in pairs])
        ax.set_xticks([], minor=True)
    _legend(figure)
    return figure


def _shade(index: int, count: int) -> Any:
    import matplotlib as mpl

    return mpl.colormaps[SEQUENTIAL](0.9 * index / max(1, count - 1))


def _draw_line(ax: "Axes", line: Line, **style: Any) -> None:
    """Mean and range of a line; its seeds faint, a little to the right of them."""
    pairs = sorted(line)
    mean = np.array([np.mean(line[n]) for n in pairs])
    low, high = (np.array([f(line[n]) for n in pairs]) for f in (min, max))
    ax.errorbar(pairs, mean, (mean - low, high - mean), capsize=2, **style)
    x, y = zip(*((1.06 * n, each) for n in pairs for each in line[n]), strict=True)
    ax.scatter(x, y, s=9, color=style["color"], alpha=0.4, linewidths=0)


def _seed_counts(lines: Sequence[Line]) -> str:
    counts = sorted({len(each) for line in lines for each in line.values()})
    return f"{' or '.join(map(str, counts))} seed{'s' if counts[-1] > 1 else ''}"


def _finish(ax: "Axes", title: str, levels: Levels) -> None:
    for dash, (name, level) in zip(
        itertools.cycle(DASHES), levels.items(), strict=False
    ):
        x, y = list(level), list(level.values())
        ax.plot(x, y, color="0.5", linestyle=dash, linewidth=1.2, label=name)
    ax.set(xscale="log", ylim=(-0.03, 1.03), title=title)
    ax.set(xlabel="key-value pairs", ylabel="best validation accuracy")


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
        lines = {model: lines_of(group) for model, group in groups.items()}
        print(plain_table(accuracy_rows(lines)))
        if len(correlation := correlation_rows(lines)) > 1:
            print(f"\n{plain_table(correlation)}")
        print(f"\nsaved {save_figure(draw(lines, levels_of(runs)), out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
