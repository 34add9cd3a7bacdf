"""Figure 1 of the paper from our log: RMSE on signature entries, published beside ours.

    python -m lcde.plot_toy

draws rmse_subplots.pdf and .png in --results-dir, a panel for 2D and one for 3D paths:
validation RMSE of each sequence model against the training step (median over seeds,
band from least to greatest), the random Linear CDE, which is not trained, as a level,
and the level of predicting zero; and prints the last values as a table. Published
values are hollow. Runs of one model whose settings differ are refused, never averaged.
"""

if __name__ == "__main__" and not __package__:  # run as a file: again, as a module
    import runpy
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    runpy.run_module("lcde.plot_toy", run_name="__main__", alter_sys=True)
    sys.exit()

import statistics
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

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
    spread,
    write_values,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NEEDED = {
    "lcde_toy": ("input_dim", "rmse", "rmse_zero"),
    "sm_toy": ("model", "input_dim", "depth", "nonlinear", "curve", "rmse_zero"),
}
COMMAND = "python run_experiment.py -m LCDE -e toy --quick"
DIMENSIONS = (2, 3)
RANDOM = "random Linear CDE"
CLOSE = 1.1  # our mean RMSE agrees if it is at most this many times the published one
LEARNT = 0.9  # below this share of predicting zero's RMSE, a model has learnt something
HEAD = (
    "paths",
    "model",
    "published RMSE",
    "at step",
    "ours",
    "at step",
    "seeds",
    "ours / predicting zero",
    "agreement",
)
Array = np.ndarray


@dataclass(frozen=True)
class Line:
    """Validation RMSE of one model, a row a seed, at each evaluation.

    The random Linear CDE, which is not trained, has one, at step 0.
    """

    model: str
    input_dim: int
    depth: int
    nonlinear: bool
    steps: Int[Array, " E"]
    rmse: Float[Array, "S E"]
    zero: float

    @property
    def trained(self) -> bool:
        """Whether it has a curve; else a level."""
        return self.model != RANDOM

    @property
    def name(self) -> str:
        """``S4, 2 blocks, linear``."""
        if not self.trained:
            return self.model
        kind = "nonlinear" if self.nonlinear else "linear"
        return f"{self.model}, {self.depth} block{'s' * (self.depth > 1)}, {kind}"

    @property
    def key(self) -> tuple[Any, ...]:
        """What a published and one of our own lines have in common."""
        return (self.input_dim, self.name)

    @property
    def last(self) -> list[float]:
        """The RMSE of each seed at the last evaluation."""
        values: list[float] = self.rmse[:, -1].tolist()
        return values


def note(text: str) -> None:
    """A line on standard error, for what a reader of the figure should know."""
    print(f"note: {text}", file=sys.stderr)


# --- what is drawn --------------------------------------------------------------------


def published_lines() -> list[Line]:
    """The lines of the paper's figure 1."""
    found = published("figure1")
    steps = np.array(found["steps"])
    lines = []
    for dim in DIMENSIONS:
        values = np.array(found["random_linear_cde"][str(dim)])[:, None]
        zero = found["predict_zero"][str(dim)]
        lines.append(Line(RANDOM, dim, 1, False, steps[:1], values, zero))
    for each in found["trained"]:
        zero = found["predict_zero"][str(each["input_dim"])]
        head = (each["model"], each["input_dim"], each["depth"], each["nonlinear"])
        lines.append(Line(*head, steps, np.array(each["rmse"]).T, zero))
    return lines


def our_lines(runs: Sequence[Run]) -> list[Line]:
    """A line for each model, dimension, depth and nonlinearity of ``runs``."""
    return [_line(group) for group in grouped(runs, lambda r: r.cell[:-1]).values()]


def _line(runs: Sequence[Run]) -> Line:
    meta = runs[0].meta
    zero = float(meta["rmse_zero"])
    if runs[0].experiment == "lcde_toy":
        values = np.array([[float(run.meta["rmse"])] for run in runs])
        start = np.array([0])
        return Line(RANDOM, meta["input_dim"], 1, False, start, values, zero)
    curves = [{e["step"]: float(e["val_rmse"]) for e in r.meta["curve"]} for r in runs]
    common = sorted(set.intersection(*map(set, curves)))
    if left := {step for curve in curves for step in curve} - set(common):
        note(
            f"{runs[0].model}: {len(left)} evaluations left out, not made by all seeds"
        )
    head = (runs[0].model, meta["input_dim"], meta["depth"], meta["nonlinear"])
    values = np.array([[curve[step] for step in common] for curve in curves])
    return Line(*head, np.array(common, dtype=int), values, zero)


# --- the figure -----------------------------------------------------------------------


def draw(ours: Sequence[Line], theirs: Sequence[Line], caption: str) -> "Figure":
    """Two panels, RMSE against step, both logarithmic."""
    figure, axes = new_figure(1, len(DIMENSIONS))
    figure.set_size_inches(11, 5.6)
    models = list(dict.fromkeys(line.model for line in (*theirs, *ours)))
    for ax, dim in zip(axes[0], DIMENSIONS, strict=True):
        for lines, hollow in ((theirs, True), (ours, False)):
            for line in lines:
                if line.input_dim == dim:
                    _draw_line(ax, line, color_of(line.model, models), hollow)
        levels = {line.zero for line in (*theirs, *ours) if line.input_dim == dim}
        for level in levels:
            ax.axhline(level, color="0.5", linestyle=(0, (1, 3)), linewidth=1)
        ax.set(
            xscale="log", yscale="log", xlabel="training step", title=f"{dim}D paths"
        )
    axes[0, 0].set_ylabel("validation RMSE")
    keys = _legend(models, ours)
    figure.legend(
        handles=keys, loc="outside lower center", ncols=4, frameon=False, fontsize=9
    )
    figure.suptitle(textwrap.fill(caption, 140), fontsize=8)
    return figure


def _draw_line(ax: "Axes", line: Line, color: str, hollow: bool) -> None:
    face = "white" if hollow else color
    label = f"{line.name}, {'published' if hollow else 'ours'}"
    least, greatest = line.rmse.min(0), line.rmse.max(0)
    if not line.trained:
        level = statistics.median(line.last)
        style = "--" if hollow else "-"
        ax.axhline(level, color=color, linestyle=style, linewidth=1.2, label=label)
        ax.axhspan(least[0], greatest[0], color=color, alpha=0.12, lw=0)
        return
    drawn = line.steps > 0  # step 0 has no logarithm
    ax.plot(
        line.steps[drawn],
        np.median(line.rmse, axis=0)[drawn],
        color=color,
        linestyle=_style(line),
        linewidth=0.9 if hollow else 1.8,
        marker="o",
        markersize=5 if hollow else 3,
        markevery=max(1, len(line.steps) // 10),
        markerfacecolor=face,
        label=label,
    )
    band = (line.steps[drawn], least[drawn], greatest[drawn])
    ax.fill_between(*band, color=color, alpha=0.1 if hollow else 0.25, lw=0)


def _style(line: Line) -> str:
    if line.nonlinear:
        return "-" if line.depth > 1 else "-."
    return "--" if line.depth > 1 else ":"


def _legend(models: Sequence[str], ours: Sequence[Line]) -> list[Any]:
    """Colours are models, dashes are depths, filled markers are ours."""
    from matplotlib.lines import Line2D

    def key(label: str, **look: Any) -> Line2D:
        return Line2D([], [], label=label, **{"color": "0.3", **look})

    filled = [key("ours", marker="o", linestyle="")] if ours else []
    levels = any(not line.trained for line in ours)
    random = [key(RANDOM, color="black")] if levels else []
    single = any(line.trained and line.depth == 1 and line.nonlinear for line in ours)
    unpublished = [key("1 block, nonlinear", linestyle="-.")] if single else []
    return [
        *(
            key(m, color=color_of(m, models), linewidth=4)
            for m in models
            if m != RANDOM
        ),
        key("2 blocks, nonlinear", linestyle="-"),
        key("2 blocks, linear", linestyle="--"),
        key("1 block, linear", linestyle=":"),
        *unpublished,
        *filled,
        key("published", marker="o", linestyle="", markerfacecolor="white"),
        *random,
        key(f"{RANDOM}, published", color="black", linestyle="--"),
        key("predicting zero", linestyle=(0, (1, 3)), color="0.5"),
    ]


# --- the table ------------------------------------------------------------------------


def table(ours: Sequence[Line], theirs: Sequence[Line]) -> str:
    """The last RMSE of every line, ours beside the published one of then or before."""
    mine = {line.key: line for line in ours}
    paper = {line.key: line for line in theirs}
    keys = [*paper, *(key for key in mine if key not in paper)]
    shown = [key for key in keys if key in mine] if mine else keys
    rows = [_row(mine.get(key), paper.get(key)) for key in sorted(shown, key=_order)]
    return markdown(HEAD, rows)


def _order(key: tuple[Any, ...]) -> tuple[Any, ...]:
    dim, name = key
    return (dim, name != RANDOM, name)


def _row(ours: Line | None, theirs: Line | None) -> list[str]:
    if ours and theirs:
        theirs = up_to(theirs, int(ours.steps[-1]))
    line = ours or theirs
    assert line is not None, "a row has a line"
    share = f"{statistics.median(ours.last) / ours.zero:.3g}" if ours else "-"
    return [
        f"{line.input_dim}D",
        line.name,
        *_told(theirs),
        *_told(ours),
        str(len(ours.rmse)) if ours else "-",
        share,
        agreement(ours, theirs) if ours and theirs else "-",
    ]


def _told(line: Line | None) -> tuple[str, str]:
    if line is None:
        return "-", "-"
    return spread(line.last), f"{line.steps[-1]:,}" if line.trained else "-"


def values(line: Line) -> dict[str, Any]:
    """A line in the published file's form: RMSE by step, then by seed."""
    head = {n: getattr(line, n) for n in ("input_dim", "model", "depth", "nonlinear")}
    rmse = line.rmse.T.tolist()
    return head | {"predict_zero": line.zero, "steps": line.steps, "rmse": rmse}


def up_to(line: Line, step: int) -> Line:
    """The part of a trained line that ends at ``step``, if it has one after step 0."""
    early = line.steps <= step
    if not line.trained or not line.steps[early].any():
        return line
    return replace(line, steps=line.steps[early], rmse=line.rmse[:, early])


def agreement(ours: Line, theirs: Line) -> str:
    """Whether ours says what the published line says, and in what sense.

    The random Linear CDE: by its mean RMSE. Trained models, which often have fewer
    steps and smaller sizes here: by whether they get below predicting zero.
    """
    if not np.isfinite(ours.last).all():
        return "no: a run diverged"
    if not theirs.trained:
        times = float(ours.rmse.mean() / theirs.rmse.mean())
        return f"{'yes' if times <= CLOSE else 'no'}: mean {times:.2f} times"
    verdicts = [
        "below" if statistics.median(line.last) < LEARNT * line.zero else "at"
        for line in (ours, theirs)
    ]
    if verdicts[0] == verdicts[1]:
        return f"yes: {verdicts[0]} predicting zero"
    return f"no: {verdicts[0]} predicting zero, published {verdicts[1]} it"


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the figure and print its table; return the exit status."""
    about = (__doc__ or "").strip()
    options = parse("python -m lcde.plot_toy", about, PARAMETERS, argv)
    with one_line_errors():
        runs = runs_to_show(options, NEEDED, COMMAND, note)
        ours, theirs = our_lines(runs), published_lines()
        names = ("hidden_dim", "state_dim", "n_train")
        caption = f"ours: {settings_line(runs, names)}" if runs else "published values"
        paths = [
            Path(options["results_dir"]) / f"rmse_subplots{suffix}"
            for suffix in (".pdf", ".png")
        ]
        for path in paths:
            check_picture_path(path)
        print(f"{table(ours, theirs)}\n\n{caption}")
        if options["json"]:
            write_values(options["json"], runs, {"lines": [*map(values, ours)]})
            print(f"saved {options['json']}")
        figure = draw(ours, theirs, caption)
        for path in paths:
            print(f"saved {save_figure(figure, path)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
