"""Which rank of an SSM kernel is its state size: three ranks against theory.

    M[t, s] = sum_n w_n a_n^(t-s)  for s <= t, else 0,      w_n = c_n b_n,  0^0 = 1

Equal decays act as one state whose w is their sum; a state whose w is then 0 is
silent. Let D count the different decays, R those that are not silent. Theory, valid
over any field:

* generator rank (of V[t, n] = a_n^t) = min(T, D): Vandermonde, whatever b and c are.
* semiseparable rank = R if R <= floor((T+1)/2). M[t:, :t+1] is, columns reversed, the
  Hankel matrix H[p, q] = sum w_n a_n^(p+q) = V_p diag(w) V_q^T, whose factors have full
  rank R at the central t. Decay 0 is a node like any other: its state fills only the
  diagonal, which meets the block in its corner p = q = 0, and counts once.
* For R > floor((T+1)/2) it is at most that ceiling, and equal to it where every decay
  is real and no w is negative: H is then positive definite.
* ordinary rank = T - k, where k is the first lag with sum w_n a_n^k != 0 (T - k = 0 if
  there is none): M is lower triangular and Toeplitz. So it is T unless the w sum to
  zero, and never says anything about N.

Source: "On Structured State-Space Duality" (arXiv:2510.04944), section 2.
Differs: the semiseparable rank, not the ordinary one, is compared with N.
"""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Inexact

from experiments.common import (
    COLORS,
    MARKERS,
    ExperimentResult,
    Picture,
    check_increasing,
    check_integer,
    command_line,
    new_figure,
    random_stream,
    track,
)
from experiments.exact import PRIME, field_array, field_rank
from experiments.ranks import (
    RANK_TOLERANCE,
    ceiling,
    check_distinct,
    exact_semiseparable_rank,
    exact_ssm_kernel,
    numerical_rank,
    roots_of_unity,
    semiseparable_rank,
    ssm_kernel,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "exp3_rank_vs_state_dim"
CLAIM = "the semiseparable rank, not the ordinary one, is the state size"
TOLERANCE = RANK_TOLERANCE  # of the floating-point ranks, relative to sigma_1
RANKS = ("generator", "semiseparable", "ordinary")
Array = np.ndarray


@dataclass(frozen=True)
class System:
    """A diagonal SSM; floating-point ranks are judged where it is well conditioned."""

    name: str
    a: Inexact[Array, " N"]
    b: Inexact[Array, " N"]
    c: Inexact[Array, " N"]
    well_conditioned: bool = False


def run(
    T_values: tuple[int, ...] = (15, 30),
    seeds: tuple[int, ...] = (0, 1),
    random_n: tuple[int, ...] = (2, 5, 9),
) -> ExperimentResult:
    """Hold the generator, semiseparable and ordinary rank of SSM kernels to theory.

    Verdicts rest on exact arithmetic modulo a prime, and on floating point only for
    decays on the unit circle, where it is well conditioned.

    Args:
        T_values: sequence lengths, increasing
        seeds: each draws the couplings b and c, and the random systems
        random_n: state sizes of the random systems; none if empty
    """
    check_increasing("T_values", T_values, at_least=1)
    check_distinct("seeds", seeds, at_least=0)
    for N in random_n:
        check_integer("random_n", N, at_least=1, example=4)
    jobs = [
        (system, T, seed)
        for T in T_values
        for seed in seeds
        for system in hand_made(T, seed) + random_systems(random_n, seed)
    ]
    metadata: dict[str, Any] = {
        "T_values": T_values,
        "seeds": seeds,
        "random_n": random_n,
        "prime": PRIME,
        "float_tolerance": TOLERANCE,
        "rows": [row_of(*job) for job in track(jobs, "ranks")],
    }
    broken = problems(metadata)
    details = _details(metadata["rows"], broken)
    return ExperimentResult(NAME, details, metadata, not broken)


def hand_made(T: int, seed: int) -> list[System]:
    """Decay sets that each show one case of the theory; ``seed`` draws b, c > 0."""
    crowded, overfull = ceiling(T) + 2, T + 2
    decays: dict[str, Any] = {
        "distinct": (0.9, 0.7, 0.5, 0.3),
        "repeated": (0.8, 0.8, 0.5, 0.5),
        "nearly equal": (0.5, 0.5 + 1e-9, 0.5 + 2e-9),
        "one zero": (0.0, 0.5, 0.8),
        "all zero": (0.0, 0.0),
        "negative": (-0.9, -0.4, 0.4, 0.9),
        "signs": (1.0, -1.0),
        "complex pairs": (0.8 + 0.3j, 0.8 - 0.3j, 0.5 + 0.6j, 0.5 - 0.6j),
        "N > ceiling": np.arange(1, crowded + 1) / (crowded + 1),
        "N > T": np.arange(1, overfull + 1) / (overfull + 1),
    }
    systems = [_positive(name, np.array(a), seed) for name, a in decays.items()]
    return [
        *systems,
        _coupled("silent state", (0.9, 0.6, 0.3), (1.0, 0.0, 2.0)),
        _coupled("zero diagonal", (0.9, 0.5), (1.0, -1.0)),
        _coupled("cancelled", (0.7, 0.7), (1.0, -1.0)),
        _positive("roots of unity", roots_of_unity(5), seed, well_conditioned=True),
    ]


def random_systems(sizes: tuple[int, ...], seed: int) -> list[System]:
    """Decays uniform in (-1, 1), Gaussian couplings."""
    systems = []
    for N in sizes:
        rng = random_stream(seed, f"random system of size {N}")
        a, (b, c) = rng.uniform(-1, 1, N), rng.standard_normal((2, N))
        systems.append(System(f"random N = {N}", a, b, c))
    return systems


def _positive(
    name: str, a: Inexact[Array, " N"], seed: int, *, well_conditioned: bool = False
) -> System:
    b, c = random_stream(seed, "couplings").uniform(0.5, 1.5, (2, len(a)))
    return System(name, a, b, c, well_conditioned)


def _coupled(name: str, a: tuple[float, ...], c: tuple[float, ...]) -> System:
    return System(name, np.array(a), np.ones(len(a)), np.array(c))


def row_of(system: System, T: int, seed: int) -> dict[str, Any]:
    """One line of the table: the ranks of ``system`` in theory, exactly, in floats."""
    return {
        "set": system.name,
        "T": T,
        "seed": seed,
        "N": len(system.a),
        "decays": system.a,
        "well_conditioned": system.well_conditioned,
        "semiseparable_relation": _relation(system, T),
        "theory": theory(system, T),
        "exact": exact_ranks(system, T),
        "float": float_ranks(system, T),
    }


def theory(system: System, T: int) -> dict[str, int]:
    """The three ranks that the module's docstring derives (or the bound on the second).

    "Equal" and "silent" are decided on the exact binary values of a, b and c.
    """
    weights = _merged(system)
    moments = (
        sum(w * pow(decay, lag, PRIME) for decay, w in weights.items()) % PRIME
        for lag in range(T)
    )
    zero_lags = next((lag for lag, moment in enumerate(moments) if moment), T)
    return {
        "generator": min(T, len(weights)),
        "semiseparable": min(_active(system), ceiling(T)),
        "ordinary": T - zero_lags,
    }


def _relation(system: System, T: int) -> str:
    """``=`` where theory gives the semiseparable rank, ``<=`` where it bounds it."""
    real = not np.iscomplexobj(system.a) and not np.iscomplexobj(system.b * system.c)
    definite = real and bool((system.b * system.c >= 0).all())
    return "=" if _active(system) <= ceiling(T) or definite else "<="


def _active(system: System) -> int:
    """R: how many different decays keep a weight once equal ones are merged."""
    return sum(weight != 0 for weight in _merged(system).values())


def _merged(system: System) -> dict[int, int]:
    """The weight w of each different decay, all as elements of the field."""
    weights: dict[int, int] = {}
    a, b, c = (field_array(values) for values in (system.a, system.b, system.c))
    for decay, w in zip(a.tolist(), (b * c % PRIME).tolist(), strict=True):
        weights[decay] = (weights.get(decay, 0) + w) % PRIME
    return weights


def exact_ranks(system: System, T: int) -> dict[str, int]:
    """The three ranks by elimination modulo a prime."""
    N = len(system.a)
    # State n alone, read out at lag t, is column n of the Vandermonde matrix.
    states = [
        exact_ssm_kernel(system.a[n : n + 1], np.ones(1), np.ones(1), T)[:, 0]
        for n in range(N)
    ]
    M = exact_ssm_kernel(system.a, system.b, system.c, T)
    ranks = field_rank(np.stack(states, axis=1)), exact_semiseparable_rank(M)
    return dict(zip(RANKS, (*ranks, field_rank(M)), strict=True))


def float_ranks(system: System, T: int) -> dict[str, int]:
    """The three ranks in float64 at the relative tolerance ``TOLERANCE``."""
    generator = np.power(system.a, np.arange(T)[:, None])
    M = ssm_kernel(system.a, system.b, system.c, T)
    ranks = (numerical_rank(generator), semiseparable_rank(M), numerical_rank(M))
    return dict(zip(RANKS, ranks, strict=True))


def problems(metadata: dict[str, Any]) -> list[str]:
    """The claims that a record's metadata breaks."""
    return [line for row in metadata["rows"] for line in _row_problems(row)]


def _row_problems(row: dict[str, Any]) -> list[str]:
    kinds = ("exact", "float") if row["well_conditioned"] else ("exact",)
    broken = []
    for kind in kinds:
        for rank in RANKS:
            found, expected = row[kind][rank], row["theory"][rank]
            relation = row["semiseparable_relation"] if rank == RANKS[1] else "="
            if found == expected or (relation == "<=" and found < expected):
                continue
            broken.append(
                f"{CLAIM}: '{row['set']}' at T = {row['T']}, seed {row['seed']}: "
                f"{kind} {rank} rank {found}, theory {relation} {expected}"
            )
    return broken


def _details(rows: list[dict[str, Any]], broken: list[str]) -> str:
    if broken:
        return f"{len(broken)} rank(s) off; {broken[0]}"
    equal = sum(row["semiseparable_relation"] == "=" for row in rows)
    lost = sum(row["float"] != row["exact"] for row in rows)
    return (
        f"{len(rows)} kernels: exact generator and ordinary ranks are as in theory, "
        f"the semiseparable rank equal to it for {equal} and within its bound for "
        f"{len(rows) - equal}; float64 (tolerance {TOLERANCE:.0e} sigma_1) misses a "
        f"rank of {lost} ill-conditioned ones"
    )


def draw(results: list[ExperimentResult]) -> "Figure":
    """The three ranks of each set at the largest T: theory, exact, floating point."""
    rows = results[-1].metadata["rows"]
    T, seed = rows[-1]["T"], rows[-1]["seed"]
    rows = [row for row in rows if (row["T"], row["seed"]) == (T, seed)]
    figure, axes = new_figure(1, 3)
    places = np.arange(len(rows))
    for ax, rank in zip(axes[0], RANKS, strict=True):
        ax.barh(places, [row["theory"][rank] for row in rows], 0.7, color="#cfcfcf")
        for index, (kind, size) in enumerate((("exact", 8), ("float", 4))):
            found = [row[kind][rank] for row in rows]
            look = {"color": COLORS[index], "markersize": size, "clip_on": False}
            ax.plot(found, places, MARKERS[index], **look)
        ax.set(xlabel=f"{rank} rank", yticks=places, ylim=(len(rows) - 0.5, -0.5))
        ax.set_yticklabels([])
        ax.grid(visible=False, axis="y")
    axes[0, 0].set_yticklabels([f"{row['set']} ({row['N']})" for row in rows])
    axes[0, 0].set_ylabel("set of decays (N)")
    line = axes[0, 1].axvline(ceiling(T), color=COLORS[6], linestyle=":")
    handles = [axes[0, 0].patches[0], *axes[0, 0].lines, line]
    found_in = ("exact", f"float64, tolerance {TOLERANCE:.0e}")
    labels = (f"theory at T = {T}", *found_in, "ceiling floor((T+1)/2)")
    figure.legend(handles, labels, loc="outside upper center", ncols=4)
    return figure


PICTURES = (Picture(draw, "outputs/exp3_ranks.png"),)


if __name__ == "__main__":
    sys.exit(command_line(run, pictures=PICTURES))
