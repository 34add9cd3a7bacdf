"""Tables beside the one line that every command prints; axes that both pictures share.

A *point* is an entry of metadata with median_s, low_s, high_s (quartiles) and n.
"""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from experiments.common import ExperimentResult, Picture, command_line

if TYPE_CHECKING:
    from rich.table import Table

WIDTH = 100
Show = Callable[[dict[str, Any]], "list[Table | str]"]


def command_with_tables(
    run: Callable[..., ExperimentResult],
    show: Show,
    *,
    pictures: Sequence[Picture] = (),
    argv: Sequence[str] | None = None,
) -> int:
    """:func:`command_line` of ``run``, and the tables of its metadata.

    The tables go to standard error, as notes do: standard output keeps the one line, or
    the record where ``--json`` asks for it.
    """

    @functools.wraps(run)
    def run_and_show(*values: Any, **named: Any) -> ExperimentResult:
        result = run(*values, **named)
        print_all(show(result.metadata))
        return result

    return command_line(run_and_show, pictures=pictures, argv=argv)


def print_all(parts: "Sequence[Table | str]") -> None:
    """Tables and lines, on standard error, at least :data:`WIDTH` columns wide."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    console.width = max(console.width, WIDTH)
    for part in parts:
        console.print(part, markup=False, soft_wrap=isinstance(part, str))


def table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Any:
    """A table whose first column is to the left, the others to the right."""
    from rich.table import Table

    made = Table(title=title, title_justify="left", title_style="bold")
    for heading in headings:
        made.add_column(heading, justify="right" if made.columns else "left")
    for row in rows:
        made.add_row(*row)
    return made


def milliseconds(entry: dict[str, Any] | None, enough: int) -> str:
    """``1.23 ±4%``: the median and half of what lies between the quartiles.

    ``*`` stands behind what has fewer than ``enough`` repeats.
    """
    if entry is None:
        return "-"
    half = (entry["high_s"] - entry["low_s"]) / 2 / entry["median_s"]
    few = "*" if entry["n"] < enough else ""
    return f"{1e3 * entry['median_s']:.3g} ±{100 * half:.0f}%{few}"


def skipped_lines(skipped: Sequence[dict[str, Any]]) -> list[str]:
    """One line for each contestant: where it was left out, and why at first.

    Lengths that follow for a reason of the same kind (its first word) stand alone.
    """
    lines: dict[str, str] = {}
    kinds: dict[str, str] = {}
    for entry in skipped:
        what, kind = entry["what"], entry["why"].partition(" ")[0]
        why = "" if kinds.get(what) == kind else f" ({entry['why']})"
        kinds[what] = kind
        start = f"{lines[what]}, " if what in lines else f"skipped: {what} at "
        lines[what] = f"{start}{entry['at']}{why}"
    return list(lines.values())


def errorbars(
    ax: Any,
    x: Sequence[int],
    points: Sequence[dict[str, Any]],
    unit: float,
    style: dict[str, Any],
) -> None:
    """Medians and quartiles, in 1 / ``unit`` seconds."""
    if not points:
        return
    low, middle, high = (
        [unit * point[kind] for point in points]
        for kind in ("low_s", "median_s", "high_s")
    )
    down = [m - v for m, v in zip(middle, low, strict=True)]
    up = [v - m for m, v in zip(middle, high, strict=True)]
    ax.errorbar(x, middle, [down, up], capsize=2, **style)


def finish_axes(ax: Any, lengths: Sequence[int], label: str) -> None:
    """Logarithmic axes, lengths below as 64, 1K, …, and room for the legend above."""
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xlabel(label)
    ticks = lengths[:: -(-len(lengths) // 6)]
    ax.set_xticks(ticks, [f"{L // 1024}K" if L % 1024 == 0 else f"{L}" for L in ticks])
    ax.set_xticks([], minor=True)
    if ax.get_legend_handles_labels()[0]:
        low, high = ax.get_ylim()
        ax.set_ylim(low, high * (high / low) ** 0.4)
        ax.legend(loc="upper left", ncols=2)
