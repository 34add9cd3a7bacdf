"""One look for every picture: colour-blind safe, same size and fonts, no display."""

import io
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments._inputs import InputError, bad_input
from experiments._result import ExperimentResult
from experiments._runlog import unwritable

if TYPE_CHECKING:  # matplotlib is needed only where something is drawn
    from matplotlib.figure import Figure

# Okabe & Ito (2008): told apart under every common colour-vision deficiency.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
SEQUENTIAL = "cividis"
DIVERGING = "RdBu_r"
_PANEL_INCHES = (5.2, 3.6)
_STYLE: Any = {
    "figure.dpi": 150,
    "savefig.dpi": 150,
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "pdf.fonttype": 42,
    "svg.hashsalt": "experiments",  # else SVG ids are random
}


@dataclass(frozen=True)
class Picture:
    """A picture that an experiment can draw, and the flags that ask for it.

    ``draw`` takes the results to show (one, or the repeats of one experiment).
    The command line offers ``--<flag>`` and ``--<flag>-path``; ``alias`` is a second
    name for the same two flags.
    """

    draw: "Callable[[list[ExperimentResult]], Figure]"
    path: str
    flag: str = "plot"
    alias: str | None = None
    by_default: bool = False

    def render(self, results: list[ExperimentResult]) -> "Figure":
        """The figure of ``results`` in the shared style (legends included)."""
        with _style():
            return self.draw(results)


def new_figure(rows: int = 1, columns: int = 1) -> tuple["Figure", Any]:
    """A figure in the shared style and its axes, shape (rows, columns).

    Raises InputError if matplotlib is absent.
    """
    with _style():
        from matplotlib.figure import Figure

        width, height = _PANEL_INCHES
        figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
        for index, ax in enumerate(axes.flat):
            ax.set_prop_cycle(color=COLORS)
            ax.set_gid(f"panel-{index}")
    return figure, axes


def _style() -> AbstractContextManager[None]:
    try:
        import matplotlib as mpl
    except ImportError:
        raise InputError(
            "a picture was asked for, but matplotlib cannot be imported; "
            "expected it in the environment; run through `uv run`, or leave plots off"
        ) from None
    return mpl.rc_context(_STYLE)


def save_figure(figure: "Figure", path: str | Path) -> Path:
    """Write ``figure`` as PNG, PDF or SVG by suffix: the whole file or none.

    Raises InputError for another suffix or a path that cannot be written.
    """
    target = Path(path)
    check_picture_path(target)
    suffix = target.suffix.lower()
    dated = {".png": "Creation Time", ".pdf": "CreationDate", ".svg": "Date"}[suffix]
    drawn = io.BytesIO()  # first in memory: matplotlib's PDF writer hides disk errors
    with _style():
        figure.savefig(drawn, format=suffix[1:], metadata={dated: None})
    partial = target.with_name(f".{target.stem}.{os.getpid()}{suffix}")
    try:
        partial.write_bytes(drawn.getbuffer())
        partial.replace(target)
    except OSError as error:
        raise unwritable(target, error) from None
    finally:
        partial.unlink(missing_ok=True)
    return target


def check_picture_path(path: str | Path) -> None:
    """Raise InputError unless ``path`` can become a picture; makes its folder."""
    target = Path(path)
    if target.suffix.lower() not in {".png", ".pdf", ".svg"}:
        raise bad_input(
            "plot path", str(path), "a file ending in .png, .pdf or .svg", "rename it"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            raise IsADirectoryError(0, "it is a folder")
        if not os.access(target.parent, os.W_OK):
            raise PermissionError(0, "its folder is not writable")
    except OSError as error:
        raise unwritable(target, error) from None
