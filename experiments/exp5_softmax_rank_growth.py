"""Softmax attention has no fixed state size: its semiseparable rank grows with T.

    M[t, s] = exp(l_ts) / sum_{r <= t} exp(l_tr)  for s <= t,
    l_ts = q_t . k_s / sqrt(d_k)

A kernel of state size N has semiseparable rank (max over t of rank M[t:, :t+1]) at most
N. For generic queries and keys the one of softmax is floor((T+1)/2), the largest that
any T x T matrix can have; no N serves every T.

Exactly, for the very inputs of the run: queries and keys are drawn on a grid of step
delta, so each weight, before its row is normalised (which changes no rank), is x^n with
an integer n and x = exp(delta^2 / sqrt(d_k)). By Lindemann and Weierstrass x is
transcendental, so a minor, which is a polynomial in x and 1/x with integer
coefficients, vanishes only if that polynomial does; if it is not zero for x = g modulo
a prime, it is not zero. The rank modulo the prime is thus a lower bound on the true
rank, and reaching the ceiling is a proof.

In floating point the rank depends on a tolerance. With d_k of 8 or more the central
block of these inputs is well conditioned and float64 finds the same ranks. With d_k of
1 or 2 the weights are a smooth function of few variables whose singular values fall
faster than any tolerance: the floating-point rank lags behind, the exact one does not.

The ordinary rank says nothing. Causal *uniform* attention (q . k = 0) has ordinary rank
T, like any triangular matrix without zeros on its diagonal, and semiseparable rank 1:
the first control. The second, an SSM kernel of N states whose decays are the N-th roots
of unity, stays at N.

Source: "On Structured State-Space Duality" (arXiv:2510.04944), on softmax attention.
Differs: the growth is shown on the semiseparable rank, not on the ordinary one.
"""

import itertools
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Inexact, Int64

from experiments.common import (
    COLORS,
    MARKERS,
    ExperimentResult,
    Picture,
    bad_input,
    check_increasing,
    check_integer,
    command_line,
    new_figure,
    random_stream,
    track,
)
from experiments.exact import PRIME, root_of_unity
from experiments.ranks import (
    RANK_TOLERANCE,
    ceiling,
    central_block,
    exact_semiseparable_rank,
    numerical_rank,
    roots_of_unity,
    semiseparable_rank,
    ssm_kernel,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "exp5_softmax_rank_growth"
CLAIM = "softmax attention's semiseparable rank is floor((T+1)/2), so it grows with T"
TOLERANCE = RANK_TOLERANCE  # of the floating-point ranks, relative to sigma_1
COARSE_TOLERANCE = 1e-3  # what is left of the rank at practical accuracy
JUDGED_D_K = 8  # from here on float64 resolves the ranks of Gaussian inputs
GRID = 2.0**-20  # delta: queries and keys are multiples of it
TEMPERATURES = (0.01, 0.1, 1.0, 10.0)
TOLERANCES = (1e-3, 1e-6, 1e-9, RANK_TOLERANCE)
Array = np.ndarray


def run(
    T_values: tuple[int, ...] = (80, 160, 320),
    d_k: int = 16,
    N: int = 8,
    seed: int = 0,
) -> ExperimentResult:
    """Show that the semiseparable rank of causal softmax attention grows with T.

    Two controls: uniform attention (semiseparable rank 1, ordinary rank T) and an SSM
    of N states (semiseparable rank N).

    Args:
        T_values: sequence lengths, increasing
        d_k: dimension of queries and keys
        N: state size of the control, at most floor((T+1)/2) for every T
        seed: draws the queries, the keys and the control's couplings
    """
    check_increasing("T_values", T_values, at_least=1)
    check_integer("d_k", d_k, at_least=1, example=16)
    check_integer("N", N, at_least=1, example=8)
    if ceiling(T_values[0]) < N:
        raise bad_input(
            "N",
            N,
            f"at most floor((T+1)/2) = {ceiling(T_values[0])} at T = {T_values[0]}",
            "lower N or leave out the shortest T",
        )
    q, k = queries_and_keys(T_values[-1], d_k, seed)
    metadata = {
        "T_values": T_values,
        "d_k": d_k,
        "N": N,
        "seed": seed,
        "prime": PRIME,
        "grid": GRID,
        "float_tolerance": TOLERANCE,
        "coarse_tolerance": COARSE_TOLERANCE,
        "rows": [row_of(q[:T], k[:T], N, seed) for T in track(T_values, "ranks")],
        "temperatures": [temperature_row(q, k, tau) for tau in TEMPERATURES],
    }
    broken = problems(metadata)
    return ExperimentResult(NAME, _details(metadata, broken), metadata, not broken)


def queries_and_keys(
    T: int, d_k: int, seed: int
) -> tuple[Int64[Array, "T d_k"], Int64[Array, "T d_k"]]:
    """Gaussian queries and keys in units of ``GRID``; a shorter T is a prefix."""
    q, k = (
        np.rint(random_stream(seed, name).standard_normal((T, d_k)) / GRID)
        for name in ("queries", "keys")
    )
    return q.astype(np.int64), k.astype(np.int64)


def scores(q: Int64[Array, "T d_k"], k: Int64[Array, "T d_k"]) -> Float[Array, "T T"]:
    """q_t . k_s / sqrt(d_k), from queries and keys in units of ``GRID``."""
    return (q * GRID) @ (k * GRID).T / np.sqrt(q.shape[1])


def causal_softmax(logits: Float[Array, "T T"]) -> Float[Array, "T T"]:
    """Each row's softmax over s <= t, zero above the diagonal.

    Subtracting the row's largest logit keeps every exponential at most 1: no overflow.
    """
    causal = np.where(np.tri(len(logits), dtype=bool), logits, -np.inf)
    weights = np.exp(causal - causal.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def exact_weights(
    q: Int64[Array, "T d_k"], k: Int64[Array, "T d_k"]
) -> Int64[Array, "T T"]:
    """g^(q_t . k_s) modulo the prime for s <= t: softmax up to a factor per row."""
    exponents = np.mod(q @ k.T, PRIME - 1)  # g^(p-1) = 1
    weights = np.ones_like(exponents)
    square = root_of_unity(PRIME - 1)
    while exponents.any():
        weights = np.where(exponents % 2, weights * square % PRIME, weights)
        square = square * square % PRIME
        exponents //= 2
    return np.tril(weights)


def unity_kernel(N: int, T: int, seed: int) -> Inexact[Array, "T T"]:
    """The control of N states: N-th roots of unity, couplings from 0.5 to 1.5."""
    b, c = random_stream(seed, "couplings").uniform(0.5, 1.5, (2, N))
    return ssm_kernel(roots_of_unity(N), b, c, T)


def row_of(
    q: Int64[Array, "T d_k"], k: Int64[Array, "T d_k"], N: int, seed: int
) -> dict[str, Any]:
    """The ranks of softmax attention and of both controls at one T."""
    T = len(q)
    softmax = causal_softmax(scores(q, k))
    uniform = causal_softmax(np.zeros((T, T)))
    control = unity_kernel(N, T, seed)
    return {
        "T": T,
        "ceiling": ceiling(T),
        "softmax_semiseparable_exact": exact_semiseparable_rank(exact_weights(q, k)),
        "softmax_semiseparable": semiseparable_rank(softmax, TOLERANCE),
        "softmax_semiseparable_coarse": semiseparable_rank(softmax, COARSE_TOLERANCE),
        "softmax_ordinary": numerical_rank(softmax, TOLERANCE),
        "uniform_semiseparable": semiseparable_rank(uniform, TOLERANCE),
        "uniform_ordinary": numerical_rank(uniform, TOLERANCE),
        "ssm_semiseparable": semiseparable_rank(control, TOLERANCE),
        "ssm_ordinary": numerical_rank(control, TOLERANCE),
    }


def temperature_row(
    q: Int64[Array, "T d_k"], k: Int64[Array, "T d_k"], temperature: float
) -> dict[str, Any]:
    """How the floating-point rank of the central block depends on the tolerance.

    Cold logits (low temperature) make rows one-hot: weights underflow to zero and the
    rank is lost for good; hot ones make attention uniform, which has rank 1.
    """
    M = causal_softmax(scores(q, k) / temperature)
    block = central_block(M)
    sigma = np.linalg.svd(block, compute_uv=False)
    return {
        "T": len(q),
        "temperature": temperature,
        "underflowed_share": np.mean(M[np.tri(len(M), dtype=bool)] == 0),
        "sigma_ratio": sigma[-1] / sigma[0],
        "central_block_rank": {
            f"{tolerance:.0e}": np.count_nonzero(sigma > tolerance * sigma[0])
            for tolerance in TOLERANCES
        },
    }


def problems(metadata: dict[str, Any]) -> list[str]:
    """The claims that a record's metadata breaks."""
    return rank_problems(metadata["rows"], metadata["d_k"], metadata["N"])


def rank_problems(rows: list[dict[str, Any]], d_k: int, N: int) -> list[str]:
    """The claims that the ranks of one seed, by increasing T, break.

    The growth is judged on the exact rank, and for d_k >= ``JUDGED_D_K`` on the one at
    ``TOLERANCE`` too: it must grow wherever the ceiling does.
    """
    broken = []
    for row in rows:
        expected = {
            "softmax_semiseparable_exact": ceiling(row["T"]),
            "uniform_semiseparable": 1,
            "uniform_ordinary": row["T"],
            "ssm_semiseparable": N,
        }
        broken += [
            f"{CLAIM}: {rank} {row[rank]} at T = {row['T']}, theory {theory}"
            for rank, theory in expected.items()
            if row[rank] != theory
        ]
    return broken + (_growth_problems(rows) if d_k >= JUDGED_D_K else [])


def _growth_problems(rows: list[dict[str, Any]]) -> list[str]:
    rank = "softmax_semiseparable"
    return [
        f"{CLAIM}: {rank} {after[rank]} at T = {after['T']}, no more than at "
        f"T = {before['T']}"
        for before, after in itertools.pairwise(rows)
        if ceiling(after["T"]) > ceiling(before["T"]) and after[rank] <= before[rank]
    ]


def _details(metadata: dict[str, Any], broken: list[str]) -> str:
    if broken:
        return f"{len(broken)} rank(s) off; {broken[0]}"
    rows = metadata["rows"]

    def values(rank: str) -> str:
        return ", ".join(str(row[rank]) for row in rows)

    return (
        f"softmax semiseparable rank {values('softmax_semiseparable_exact')} (exact, "
        f"the ceiling) at T = {values('T')}; float64 {values('softmax_semiseparable')} "
        f"at tolerance {TOLERANCE:.0e}, {values('softmax_semiseparable_coarse')} at "
        f"{COARSE_TOLERANCE:.0e}; uniform attention 1 (ordinary T), SSM {metadata['N']}"
    )


def draw(results: list[ExperimentResult]) -> "Figure":
    """Ranks against T with the ceiling (left); the ordinary ranks, all T (right)."""
    metadata = results[-1].metadata
    rows = metadata["rows"]
    T = [row["T"] for row in rows]
    figure, axes = new_figure(1, 2)
    semiseparable, ordinary = axes[0]
    semiseparable.plot(
        T,
        [row["ceiling"] for row in rows],
        ":",
        color=COLORS[6],
        label="ceiling floor((T+1)/2)",
    )
    ordinary.plot(T, T, ":", color=COLORS[6], label="T")
    curves = (
        (semiseparable, "softmax_semiseparable_exact", "softmax, exact", 0, 9),
        (semiseparable, "softmax_semiseparable", _label(TOLERANCE), 1, 6),
        (semiseparable, "softmax_semiseparable_coarse", _label(COARSE_TOLERANCE), 2, 5),
        (semiseparable, "ssm_semiseparable", f"SSM, N = {metadata['N']}", 3, 5),
        (semiseparable, "uniform_semiseparable", "uniform attention", 4, 5),
        (ordinary, "softmax_ordinary", _label(TOLERANCE), 1, 8),
        (ordinary, "uniform_ordinary", "uniform attention", 4, 5),
    )
    for ax, rank, label, index, size in curves:
        look = {"color": COLORS[index], "markersize": size, "label": label}
        ax.plot(T, [row[rank] for row in rows], MARKERS[index] + "-", **look)
    semiseparable.set_ylim(0, 1.6 * rows[-1]["ceiling"])
    semiseparable.set(xlabel="sequence length T", ylabel="semiseparable rank")
    semiseparable.set_title(f"d_k = {metadata['d_k']}, seed {metadata['seed']}")
    semiseparable.legend(loc="upper left", ncols=2)
    ordinary.set(xlabel="sequence length T", ylabel="ordinary rank")
    ordinary.set_title("the ordinary rank tells nothing apart")
    ordinary.legend()
    return figure


def _label(tolerance: float) -> str:
    return f"softmax, float64, {tolerance:.0e}"


PICTURES = (Picture(draw, "outputs/exp5_rank_growth.png"),)


if __name__ == "__main__":
    sys.exit(command_line(run, pictures=PICTURES))
