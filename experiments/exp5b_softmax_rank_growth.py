"""The growth of softmax attention's ranks over several seeds, and its gaps.

Experiment 5 for each seed; for each T the mean and standard deviation over seeds of

* the semiseparable rank, and its gap to the ceiling floor((T+1)/2);
* the ordinary rank, and its gap T - rank. In exact arithmetic that gap is zero for any
  attention without zeros on its diagonal, uniform attention included: what is seen is
  the tolerance of the floating-point rank, not a property of softmax.

Source: "On Structured State-Space Duality" (arXiv:2510.04944), on softmax attention.
"""

import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments import exp5_softmax_rank_growth as exp5
from experiments.common import (
    COLORS,
    MARKERS,
    ExperimentResult,
    Picture,
    command_line,
    new_figure,
    track,
)
from experiments.ranks import ceiling, check_distinct

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "exp5b_softmax_rank_growth"
CLAIM = "for every seed, softmax attention's semiseparable rank is floor((T+1)/2)"
TOLERANCE = exp5.TOLERANCE  # of the floating-point ranks, relative to sigma_1
RANKS = (
    "softmax_semiseparable_exact",
    "softmax_semiseparable",
    "softmax_semiseparable_coarse",
    "softmax_ordinary",
    "uniform_semiseparable",
    "ssm_semiseparable",
)
LABELS = {
    "softmax_semiseparable_exact": "softmax, exact",
    "softmax_semiseparable": f"softmax, float64, {TOLERANCE:.0e}",
    "softmax_semiseparable_coarse": f"softmax, float64, {exp5.COARSE_TOLERANCE:.0e}",
    "softmax_ordinary": f"softmax, float64, {TOLERANCE:.0e}",
    "uniform_semiseparable": "uniform attention",
    "ssm_semiseparable": "SSM",
}


def run(
    T_values: tuple[int, ...] = (20, 40, 80, 160, 240),
    d_k: int = 16,
    N: int = 8,
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
) -> ExperimentResult:
    """Show how the ranks of causal softmax attention grow with T, over seeds.

    Mean and standard deviation of the semiseparable and the ordinary rank, and their
    gaps to floor((T+1)/2) and T. Controls: uniform attention and an SSM of N states.

    Args:
        T_values: sequence lengths, increasing
        d_k: dimension of queries and keys
        N: state size of the control, at most floor((T+1)/2) for every T
        seeds: each draws the queries, the keys and the control's couplings
    """
    check_distinct("seeds", seeds, at_least=0)
    results = [exp5.run(T_values, d_k, N, seed) for seed in track(seeds, "seeds")]
    by_seed = [result.metadata["rows"] for result in results]
    metadata = {
        "T_values": T_values,
        "d_k": d_k,
        "N": N,
        "seeds": seeds,
        "float_tolerance": TOLERANCE,
        "coarse_tolerance": exp5.COARSE_TOLERANCE,
        "rows": [_summary(list(rows)) for rows in zip(*by_seed, strict=True)],
        "rows_by_seed": by_seed,
    }
    broken = problems(metadata)
    return ExperimentResult(NAME, _details(metadata, broken), metadata, not broken)


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds at one T, of each rank and its gap."""
    T = rows[0]["T"]
    summary: dict[str, Any] = {"T": T, "ceiling": ceiling(T)}
    for rank in RANKS:
        values = [row[rank] for row in rows]
        most = T if rank.endswith("ordinary") else ceiling(T)
        summary[f"{rank}_mean"] = np.mean(values)
        summary[f"{rank}_std"] = np.std(values)
        summary[f"{rank}_gap"] = most - np.mean(values)
    return summary


def problems(metadata: dict[str, Any]) -> list[str]:
    """The claims that a record's metadata breaks, seed by seed."""
    return [
        f"seed {seed}: {problem}"
        for seed, rows in zip(metadata["seeds"], metadata["rows_by_seed"], strict=True)
        for problem in exp5.rank_problems(rows, metadata["d_k"], metadata["N"])
    ]


def _details(metadata: dict[str, Any], broken: list[str]) -> str:
    if broken:
        return f"{len(broken)} rank(s) off; {broken[0]}"
    last = metadata["rows"][-1]
    gaps = [f"{last[f'{rank}_gap']:.1f}" for rank in RANKS[:4]]
    return (
        f"{len(metadata['seeds'])} seeds, T = {metadata['rows'][0]['T']}..{last['T']}: "
        f"mean gap of the semiseparable rank to floor((T+1)/2) at T = {last['T']}: "
        f"{gaps[0]} exact, {gaps[1]} in float64 at tolerance {TOLERANCE:.0e}, "
        f"{gaps[2]} at {exp5.COARSE_TOLERANCE:.0e}; T - ordinary rank {gaps[3]}"
    )


def draw(results: list[ExperimentResult]) -> "Figure":
    """Semiseparable and ordinary rank against T: mean, and a band of one deviation."""
    metadata = results[-1].metadata
    rows = metadata["rows"]
    T = [row["T"] for row in rows]
    figure, axes = new_figure(1, 2)
    semiseparable, ordinary = axes[0]
    limit = {"color": COLORS[6], "linestyle": ":"}
    ceilings = [row["ceiling"] for row in rows]
    semiseparable.plot(T, ceilings, label="ceiling floor((T+1)/2)", **limit)
    ordinary.plot(T, T, label="T (uniform attention too)", **limit)
    for rank in RANKS:
        _band(ordinary if rank == "softmax_ordinary" else semiseparable, rows, rank)
    semiseparable.set(xlabel="sequence length T", ylabel="semiseparable rank")
    semiseparable.set_ylim(0, 1.6 * ceilings[-1])
    semiseparable.legend(loc="upper left", ncols=2)
    semiseparable.set_title(_title(metadata))
    ordinary.set(xlabel="sequence length T", ylabel="ordinary rank")
    ordinary.legend(loc="upper left")
    ordinary.set_title("the ordinary rank tells nothing apart")
    return figure


def draw_gap(results: list[ExperimentResult]) -> "Figure":
    """How far each rank of softmax stays below its largest value, against T."""
    metadata = results[-1].metadata
    rows = metadata["rows"]
    figure, axes = new_figure(1, 2)
    semiseparable, ordinary = axes[0]
    for rank in RANKS[:4]:
        ax = ordinary if rank == "softmax_ordinary" else semiseparable
        _band(ax, rows, rank, gap=True)
    label = "floor((T+1)/2) - semiseparable rank"
    semiseparable.set(xlabel="sequence length T", ylabel=label)
    semiseparable.set_title(_title(metadata))
    ordinary.set(xlabel="sequence length T", ylabel="T - ordinary rank")
    ordinary.set_title("exactly 0: this gap is the tolerance's")
    for ax in (semiseparable, ordinary):
        ax.legend(loc="upper left")
        ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
    return figure


def _band(ax: Any, rows: list[dict[str, Any]], rank: str, *, gap: bool = False) -> None:
    index = RANKS.index(rank)
    T = [row["T"] for row in rows]
    middle = np.array([row[f"{rank}_{'gap' if gap else 'mean'}"] for row in rows])
    spread = np.array([row[f"{rank}_std"] for row in rows])
    style = {"color": COLORS[index], "label": LABELS[rank]}
    ax.plot(T, middle, MARKERS[index] + "-", markersize=8 - index, **style)
    ax.fill_between(
        T, middle - spread, middle + spread, color=COLORS[index], alpha=0.25
    )


def _title(metadata: dict[str, Any]) -> str:
    seeds = len(metadata["seeds"])
    return f"d_k = {metadata['d_k']}, N = {metadata['N']}, {seeds} seeds, mean ± std"


PICTURES = (
    Picture(draw, "outputs/exp5b_rank_growth.png", by_default=True),
    Picture(
        draw_gap, "outputs/exp5b_rank_growth_gap.png", flag="gap-plot", by_default=True
    ),
)


if __name__ == "__main__":
    sys.exit(command_line(run, pictures=PICTURES))
