"""Every layer seen three ways: its T x T matrix, the ranks below its diagonal, forms.

    y = M v,     rank M[t:, :t] <= N for every t,     N: the state carried by a head

Whatever passes from the steps before t to those from t on passes through the state, so
the block M[t:, :t] has at most its rank (the diagonal, with skips and bonuses, is not
in it). That is the semiseparable rank of Dao & Gu (arXiv:2405.21060, definition 3.1),
of order N in their section 3.2. A layer whose state grows, attention or Hyena, has no
such bound: only the block's smaller side, min(t, T - t).

Layers are those of the table that ``ssm.equivalence`` checks, at its small sizes and
with their own random initial values: a new one appears here by itself. The rank is the
number of singular values above ``RANK_TOLERANCE`` of the largest one of M, in float64;
a slow mode may fall below that, so that a rank can be less than N. The forms agree or
not as in ``ssm.equivalence``: the whole sequence at once, steps, and the matrix, held
to the recurrence in values and all gradients, in double precision.
"""

import math
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Inexact
from torch import Tensor

from experiments.common import (
    COLORS,
    DIVERGING,
    ExperimentResult,
    Picture,
    bad_input,
    check_integer,
    command_line,
    new_figure,
    track,
)
from ssm._cases import LAYERS, LayerCase
from ssm.equivalence import TOLERANCE, layer_row
from ssm.layers._base import KernelLayer, state_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "views"
CLAIM = "no block below the diagonal has a rank above the state; all forms agree"
RANK_TOLERANCE = 1e-10  # of the largest singular value of M; rounding leaves 1e-15
FORMS = {"full": "parallel", "steps": "steps", "kernel": "matrix"}
# What the mixed values pass through; other parts of a state (windows, sums of weights)
# act on the values before, or on the weights.
CARRIERS = ("h", "ssm", "s", "average")
LONGEST = 128
SHORTEST = 4
COLUMNS = 4  # of the picture: two layers a row
Array = np.ndarray


def run(T: int = 48, seed: int = 0) -> ExperimentResult:
    """Show the matrix, the ranks and the agreement of forms of every layer.

    Judged: at every t the rank of M[t:, :t] is at most the layer's state, in all heads;
    M is causal; and the forms agree to 1e-10.

    Args:
        T: sequence length, from 4 to 128
        seed: draws parameters and inputs
    """
    check_integer("T", T, at_least=SHORTEST, example=48)
    if T > LONGEST:
        raise bad_input("T", T, f"at most {LONGEST}", "lower it: entries are logged")
    check_integer("seed", seed, at_least=0, example=0)
    views = [
        view_of(case, T, seed) for case in track(LAYERS, "layers") if not case.no_kernel
    ]
    metadata = {
        "T": T,
        "seed": seed,
        "rank_tolerance": RANK_TOLERANCE,
        "form_tolerance": TOLERANCE[torch.float64],
        "views": views,
        "without": {case.name: case.no_kernel for case in LAYERS if case.no_kernel},
    }
    broken = problems(metadata)
    return ExperimentResult(NAME, _details(metadata, broken), metadata, not broken)


def view_of(case: LayerCase, T: int, seed: int) -> dict[str, Any]:
    """One layer: the matrix of one head, ranks over all heads, errors of its forms.

    The head shown is the middle one of those with the largest rank.
    """
    layer, matrix, values = materialise(case, T, seed)
    heads = matrix.numpy()
    ranks = np.array([rank_profile(M) for M in heads])
    errors = layer_row(case, backend_of(case), torch.float64, (T,)).errors
    largest = np.flatnonzero(ranks.max(1) == ranks.max())
    shown = int(largest[len(largest) // 2])
    return {
        "layer": case.name,
        "heads": len(heads),
        "head_shown": shown,
        "state": state_of_a_head(layer, matrix, values),
        "above_diagonal": float(np.abs(np.triu(heads, 1)).max()),
        "ranks_most": ranks.max(0),
        "ranks_least": ranks.min(0),
        "errors": {form: errors[form] for form in FORMS},
        "matrix": lower_rows(heads[shown]),
    }


def backend_of(case: LayerCase) -> str:
    """The backend that runs anywhere."""
    return "torch" if "torch" in case.backends else case.backends[0]


def materialise(
    case: LayerCase, T: int, seed: int
) -> tuple[KernelLayer, Inexact[Tensor, "H T T"], Inexact[Tensor, "T H P"]]:
    """A layer with random parameters, its matrices on random inputs, and the values."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layer = case.build(backend_of(case), torch.float64)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, T, case.d_model, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        matrix, values = layer.kernel_matrix(x)
    return layer, matrix[0], values[0]


def rank_profile(
    M: Inexact[Array, "T T"], tolerance: float = RANK_TOLERANCE
) -> list[int]:
    """Numerical rank of M[t:, :t] for t = 1 … T - 1, relative to M's largest."""
    least = tolerance * np.linalg.norm(M, 2)
    return [
        int((np.linalg.svd(M[t:, :t], compute_uv=False) > least).sum())
        for t in range(1, len(M))
    ]


def state_of_a_head(
    layer: KernelLayer,
    matrix: Inexact[Tensor, "H T T"],
    values: Inexact[Tensor, "T H P"],
) -> int | None:
    """How many numbers one value of one head has in the state; None where that grows.

    They are of the kind of the matrix: a complex one counts twice for a real matrix.
    """
    if grows(layer):
        return None
    state = layer.init_state(1)
    carried = [getattr(state, name) for name in CARRIERS if hasattr(state, name)]
    assert len(carried) == 1, (
        f"{type(state).__name__} has {', '.join(state._fields)}; name the part that "
        "carries the mixed values in CARRIERS"
    )
    twice = 2 if carried[0].is_complex() and not matrix.is_complex() else 1
    return int(twice * carried[0].numel() // values[0].numel())


def grows(layer: KernelLayer) -> bool:
    """Whether a step makes the state larger."""
    before = layer.init_state(1)
    x_t = torch.zeros(1, layer.d_model, dtype=next(layer.parameters()).dtype)
    with torch.no_grad():
        _, after = layer.step(x_t, before)
    return state_bytes(after) > state_bytes(before)


def lower_rows(M: Inexact[Array, "T T"]) -> list[list[float]]:
    """Re M on and below the diagonal, row by row, to three digits.

    Relative to the largest entry below it: skips on the diagonal would hide the rest.
    """
    below = np.abs(np.tril(M.real, -1)).max()
    real = M.real / max(below, np.finfo(float).tiny)
    return [
        [float(f"{entry:.3g}") for entry in row[: t + 1]] for t, row in enumerate(real)
    ]


def problems(metadata: dict[str, Any]) -> list[str]:
    """The claims that a record's metadata breaks; an error that is NaN breaks one."""
    broken = []
    for view in metadata["views"]:
        name, state = view["layer"], view["state"]
        most = max(view["ranks_most"])
        if state is not None and most > state:
            broken.append(f"{name}: a rank of {most} below the diagonal, state {state}")
        above = float(view["above_diagonal"])
        if above != 0:  # NaN is not 0 either
            broken.append(f"{name}: {above:.1e} above the diagonal")
        broken += [
            f"{name}: the form '{FORMS[form]}' is off by {float(error):.1e}"
            for form, error in view["errors"].items()
            if not float(error) <= metadata["form_tolerance"]
        ]
    return broken


def _details(metadata: dict[str, Any], broken: list[str]) -> str:
    if broken:
        return f"{len(broken)} claim(s) off; {broken[0]}"
    views = metadata["views"]
    bounded = [view for view in views if view["state"] is not None]
    full = sum(max(view["ranks_most"]) == view["state"] for view in bounded)
    free = [
        f"{view['layer']} {max(view['ranks_most'])}"
        for view in views
        if view["state"] is None
    ]
    worst = max(max(view["errors"].values()) for view in views)
    return (
        f"{len(bounded)} layers within their state, {full} of them at it; without a "
        f"bound, of {metadata['T'] // 2} possible: {', '.join(free)}; forms agree to "
        f"{worst:.0e}"
    )


def draw(results: list[ExperimentResult]) -> "Figure":
    """Every layer's matrix beside the ranks below its diagonal, two layers a row."""
    metadata = results[-1].metadata
    views = metadata["views"]
    rows = math.ceil(2 * len(views) / COLUMNS)
    figure, axes = new_figure(rows, COLUMNS)
    figure.set_size_inches(3.3 * COLUMNS, 2.75 * rows + 1)
    panels = axes.reshape(-1, 2)
    for (left, right), view in zip(panels, views, strict=False):
        image = _draw_matrix(left, view)
        _draw_ranks(right, view, metadata["T"])
    for left, right in panels[len(views) :]:
        left.set_axis_off()
        right.set_axis_off()
    bar = figure.colorbar(image, ax=axes, orientation="horizontal", aspect=60, pad=0.01)
    bar.set_label(
        "M[t, s] of one head / its largest entry below the diagonal, which is clipped "
        "(linear within 0.001)"
    )
    bar.set_ticks([-1, -0.1, -0.01, 0, 0.01, 0.1, 1])
    handles, labels = _legend_of(panels[: len(views), 1])
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    figure.suptitle(
        "What passes from the past to the future passes through the state: below the "
        "diagonal\nno block of a state space model has a rank above it; attention and "
        "Hyena keep all of the past",
        fontsize=12,
    )
    return figure


def _draw_matrix(ax: Any, view: dict[str, Any]) -> Any:
    from matplotlib.colors import SymLogNorm

    T = len(view["matrix"])
    M = np.full((T, T), np.nan)
    for t, row in enumerate(view["matrix"]):
        M[t, : t + 1] = row
    image = ax.imshow(
        M,
        cmap=DIVERGING,
        norm=SymLogNorm(1e-3, vmin=-1, vmax=1, clip=True),
        interpolation="nearest",
    )
    errors = ", ".join(
        f"{FORMS[form]} {float(error):.0e}" for form, error in view["errors"].items()
    )
    ax.set_title(f"{view['layer']}\nerrors: {errors}", fontsize=8.5)
    ax.set(xlabel="from step s", ylabel="to step t")
    ax.grid(visible=False)
    return image


def _draw_ranks(ax: Any, view: dict[str, Any], T: int) -> None:
    t = np.arange(1, T)
    ax.plot(t, np.minimum(t, T - t), ":", color="#888888", label="size of the block")
    ax.fill_between(
        t,
        view["ranks_least"],
        view["ranks_most"],
        color=COLORS[0],
        alpha=0.2,
        linewidth=0,
        label="least to most over the heads",
    )
    ax.plot(t, view["ranks_most"], color=COLORS[0], label="rank of M[t:, :t]")
    state = view["state"]
    if state is not None:
        ax.axhline(state, color=COLORS[1], linestyle="--", label="state of a head")
        ax.set_ylim(0, 2.2 * max(state, 3))
    bound = "state grows" if state is None else f"state of a head {state}"
    most = max(view["ranks_most"])
    ax.set_title(
        f"largest rank {most}; {bound}\nover {view['heads']} heads", fontsize=8.5
    )
    ax.set(xlabel="t", ylabel="rank")
    ax.yaxis.get_major_locator().set_params(integer=True)


def _legend_of(panels: Iterable[Any]) -> tuple[list[Any], list[str]]:
    """Each label of any panel once."""
    found: dict[str, Any] = {}
    for ax in panels:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)


PICTURES = (Picture(draw, f"outputs/{NAME}.png", by_default=True),)


if __name__ == "__main__":
    sys.exit(command_line(run, pictures=PICTURES))
