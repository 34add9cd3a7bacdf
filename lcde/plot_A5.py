# ruff: noqa: N999  # the name is document 2's
"""Figure 2 of the paper from our log: blocks that state tracking in A5 takes.

    python -m lcde.plot_A5

draws A5_plot_shaded_regions.pdf and .png in --results-dir, a panel for each model: the
fewest blocks with which its validation accuracy passes 90 % against the length of the
sequences, published (hollow, too few blocks shaded) and ours (filled, the median over
seeds and their range); and prints the same as a table. An arrow up says that no number
of blocks that was tried passed within the steps taken, an arrow down that fewer blocks
were not tried. Runs of one model whose settings differ are refused, never averaged.
"""

if __name__ == "__main__" and not __package__:  # run as a file: again, as a module
    import runpy
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    runpy.run_module("lcde.plot_A5", run_name="__main__", alter_sys=True)
    sys.exit()

import math
import statistics
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.common import (
    check_picture_path,
    new_figure,
    one_line_errors,
    parse,
    save_figure,
)
from lcde._logs import (
    PARAMETERS,
    Run,
    color_of,
    grouped,
    markdown,
    published,
    runs_to_show,
    settings_line,
    write_values,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NEEDED = ("model", "length", "depth", "accuracy", "steps", "reached", "threshold")
NEEDED = {"lcde_a5": _NEEDED, "sm_a5": _NEEDED}
COMMAND = "python run_experiment.py -m LCDE -e A5 --quick"
HEAD = ("model", "length", "published blocks", "ours", "seeds", "agreement")
Cell = tuple[str, int]  # model, length


@dataclass(frozen=True)
class Need:
    """The blocks that one seed of a model needs at one length.

    blocks: the fewest that passed; infinite if none did. tried: the most that were
    tried. steps: of the longest run. exact: whether fewer blocks are known to fail.
    """

    blocks: float
    tried: int
    steps: int
    exact: bool


# --- what is drawn --------------------------------------------------------------------


def published_needs() -> dict[Cell, list[Need]]:
    """The paper's figure 2; a length at which nothing was run is left out."""
    found = published("figure2")
    last = {
        (model, length): (depth, steps)
        for model, length, depth, _, steps, _ in found["runs"]
    }
    needs = {}
    for model, row in found["blocks"].items():
        for length, blocks in zip(found["lengths"], row, strict=True):
            if (model, length) in last:
                depth, steps = last[model, length]
                need = Need(math.inf if blocks is None else blocks, depth, steps, True)
                needs[model, length] = [need]
    return needs


def our_needs(runs: Sequence[Run]) -> dict[Cell, list[Need]]:
    """What each seed needed, by model and length in increasing order.

    A depth that failed at a shorter length, same model and seed, counts as failed.
    """
    needs: dict[Cell, list[Need]] = {}
    seeds = grouped(runs, lambda run: (run.model, run.seed))
    for (model, _), group in seeds.items():
        failed: set[int] = set()
        by_length = grouped(group, lambda run: run.meta["length"])
        for length in sorted(by_length):
            tried = sorted(by_length[length], key=lambda run: run.meta["depth"])
            failed |= {run.meta["depth"] for run in tried if not run.meta["reached"]}
            passed = [run.meta["depth"] for run in tried if run.meta["reached"]]
            blocks = min(passed, default=math.inf)
            lower = range(1, int(min(blocks, tried[-1].meta["depth"])))
            need = Need(
                blocks,
                tried[-1].meta["depth"],
                max(run.meta["steps"] for run in tried),
                exact=failed.issuperset(lower),
            )
            needs.setdefault((model, length), []).append(need)
    return dict(sorted(needs.items()))


def middle(needs: Sequence[Need]) -> float:
    """The median number of blocks, the lower of two: a number that was seen."""
    return statistics.median_low([need.blocks for need in needs])


# --- the figure -----------------------------------------------------------------------


def draw(
    ours: Mapping[Cell, list[Need]], theirs: Mapping[Cell, list[Need]], caption: str
) -> "Figure":
    """A panel for each model: blocks against length."""
    models = list(dict.fromkeys(model for model, _ in (*theirs, *ours)))
    figure, axes = new_figure(1, len(models))
    figure.set_size_inches(2.3 * len(models) + 0.8, 3.4)
    every = [need for needs in (*theirs.values(), *ours.values()) for need in needs]
    top = max(need.tried for need in every)
    lengths = [length for _, length in (*theirs, *ours)]
    for ax, model in zip(axes[0], models, strict=True):
        color = color_of(model, models)
        _draw_published(ax, _of(model, theirs), color, top)
        _draw_ours(ax, _of(model, ours), color)
        ax.set(title=model, xlabel="sequence length", ylim=(0.5, top + 0.9))
        ax.set_yticks(range(1, top + 1))
        ax.set_xlim(min(lengths) - 1, max(lengths) + 1)
    axes[0, 0].set_ylabel("blocks for 90 % accuracy")
    figure.legend(
        handles=_legend(bool(ours)),
        loc="outside lower center",
        ncols=4,
        frameon=False,
        fontsize=9,
    )
    figure.suptitle(textwrap.fill(caption, 150), fontsize=8)
    return figure


def _of(model: str, needs: Mapping[Cell, list[Need]]) -> dict[int, list[Need]]:
    return {length: each for (name, length), each in needs.items() if name == model}


def _draw_published(
    ax: "Axes", needs: dict[int, list[Need]], color: str, top: int
) -> None:
    if not needs:
        return
    upper = [min(middle(each), top + 0.9) for each in needs.values()]
    ax.fill_between(list(needs), 0.5, upper, color=color, alpha=0.12, lw=0)
    _draw_needs(ax, needs, color, hollow=True)


def _draw_ours(ax: "Axes", needs: dict[int, list[Need]], color: str) -> None:
    for length, each in needs.items():
        seen = [need.blocks for need in each if math.isfinite(need.blocks)]
        if len(set(seen)) > 1:
            ax.plot(
                [length] * 2,
                [min(seen), max(seen)],
                color=color,
                linewidth=5,
                alpha=0.3,
                solid_capstyle="round",
            )
    _draw_needs(ax, needs, color, hollow=False)


def _draw_needs(
    ax: "Axes", needs: dict[int, list[Need]], color: str, *, hollow: bool
) -> None:
    """Medians joined by a line; arrows where they are only bounds."""
    known = {n: middle(each) for n, each in needs.items()}
    finite = {n: blocks for n, blocks in known.items() if math.isfinite(blocks)}
    face = "white" if hollow else color
    ax.plot(
        list(finite),
        list(finite.values()),
        color=color,
        linestyle="--" if hollow else "-",
        linewidth=0.9 if hollow else 1.8,
        marker="o",
        markersize=7 if hollow else 4.5,
        markerfacecolor=face,
        label="published" if hollow else "ours",
    )
    for n, each in needs.items():
        if any(math.isinf(need.blocks) for need in each):
            tried = max(need.tried for need in each)
            _arrow(ax, n, tried, 0.6, color, face)
        elif not all(need.exact for need in each):
            _arrow(ax, n, known[n], -0.4, color, face)


def _arrow(ax: "Axes", x: int, y: float, length: float, color: str, face: str) -> None:
    look = {"arrowstyle": "-|>", "edgecolor": color, "facecolor": face}
    ax.annotate("", (x, y + length), (x, y), arrowprops=look)


def _legend(with_ours: bool) -> list[object]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    dark = "0.3"
    filled = Line2D([], [], color=dark, marker="o", label="ours")
    hollow = Line2D(
        [],
        [],
        color=dark,
        linestyle="--",
        marker="o",
        markersize=7,
        markerfacecolor="white",
        label="published",
    )
    shade = Patch(color=dark, alpha=0.12, label="too few blocks (published)")
    arrow = Line2D(
        [], [], color=dark, marker="^", linestyle="", label="more than were tried"
    )
    return [*([filled] if with_ours else []), hollow, shade, arrow]


# --- the table ------------------------------------------------------------------------


def table(ours: Mapping[Cell, list[Need]], theirs: Mapping[Cell, list[Need]]) -> str:
    """Blocks needed by model and length, ours beside the published ones."""
    models = list(dict.fromkeys(model for model, _ in (*theirs, *ours)))
    cells = sorted(ours or theirs, key=lambda cell: (models.index(cell[0]), cell[1]))
    return markdown(
        HEAD, [_row(cell, ours.get(cell), theirs.get(cell)) for cell in cells]
    )


def _row(
    cell: Cell, ours: Sequence[Need] | None, theirs: Sequence[Need] | None
) -> list[str]:
    return [
        cell[0],
        str(cell[1]),
        told(theirs) if theirs else "-",
        told(ours) if ours else "-",
        str(len(ours)) if ours else "-",
        agreement(ours, theirs) if ours and theirs else "-",
    ]


def values(runs: Sequence[Run]) -> dict[str, Any]:
    """Every run as a row, in the published file's form."""
    columns = ("model", "length", "depth", "seed", "accuracy", "steps", "reached")
    rows = [
        [
            run.model,
            *(run.meta[name] for name in columns[1:3]),
            run.seed,
            *(run.meta[name] for name in columns[4:]),
        ]
        for run in runs
    ]
    threshold = {run.model: run.meta["threshold"] for run in runs}
    return {"threshold": threshold, "columns": columns, "runs": sorted(rows)}


def told(needs: Sequence[Need]) -> str:
    """``2``, ``2 (1 .. 3)``, or a bound with the steps that it holds for."""
    found = list(dict.fromkeys(map(_told, sorted(needs, key=lambda n: n.blocks))))
    if len(found) == 1:
        return found[0]
    return f"{_told(_median(needs))} ({found[0]} .. {found[-1]})"


def _told(need: Need) -> str:
    if math.isinf(need.blocks):
        return f"> {need.tried} in {need.steps:,} steps"
    return f"{'' if need.exact else '<= '}{need.blocks:.0f}"


def _median(needs: Sequence[Need]) -> Need:
    return sorted(needs, key=lambda need: need.blocks)[(len(needs) - 1) // 2]


def agreement(ours: Sequence[Need], theirs: Sequence[Need]) -> str:
    """Whether the median is the published one; bounds and few steps leave it open."""
    mine, paper = _median(ours), _median(theirs)
    if math.isinf(mine.blocks) and mine.tried < min(paper.blocks, paper.tried):
        return "open: deeper was not tried"
    if not mine.exact and mine.blocks > paper.blocks:
        return "open: fewer were not tried"
    if mine.blocks > paper.blocks and mine.steps < paper.steps:
        return "open: fewer steps than published"
    if mine.blocks == paper.blocks:
        return "yes"
    return "no: fewer suffice" if mine.blocks < paper.blocks else "no: more are needed"


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the figure and print its table; return the exit status."""
    about = (__doc__ or "").strip()
    options = parse("python -m lcde.plot_A5", about, PARAMETERS, argv)
    with one_line_errors():
        runs = runs_to_show(options, NEEDED, COMMAND, note)
        ours, theirs = our_needs(runs), published_needs()
        names = ("hidden_dim", "state_dim", "learning_rate")
        caption = f"ours: {settings_line(runs, names)}" if runs else "published values"
        paths = [
            Path(options["results_dir"]) / f"A5_plot_shaded_regions{suffix}"
            for suffix in (".pdf", ".png")
        ]
        for path in paths:
            check_picture_path(path)
        print(f"{table(ours, theirs)}\n\n{caption}")
        if options["json"]:
            write_values(options["json"], runs, values(runs))
            print(f"saved {options['json']}")
        figure = draw(ours, theirs, caption)
        for path in paths:
            print(f"saved {save_figure(figure, path)}")
    return 0


def note(text: str) -> None:
    """A line on standard error, for what a reader of the figure should know."""
    print(f"note: {text}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
