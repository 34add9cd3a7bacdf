"""Which kernels have a dual M = L o (Q K^T) of width N: decided, constructed, refuted.

A diagonal SSM of state size N is a sum of N heads, each with a mask of its own. When do
N dimensions under *one* 1-semiseparable mask suffice? Theorem 3.1 of "On Structured
State-Space Duality" (arXiv:2510.04944): if and only if the non-zero entries of M lie in
consecutive diagonal blocks with at most N new columns each. ``attention_dual`` proves,
decides and constructs; this experiment runs it on kernels whose answer is known by
construction, and on kernels of state size 2 that have no dual of width 2:

    M = 2 I + subdiagonal of ones    the SSM y_t = 2 x_t + x_{t-1}: T - 1 new columns
    M = I + E[T, 1]                  remembers x_1 until T:         T - 1 new columns
    M[t, s] = 1 + [t = s]            decays 1 and 0:                T - 1 new columns
"""

import sys
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Integer, Shaped

from experiments.attention_dual import (
    Dual,
    attention_dual,
    finest_blocks,
    masked_attention,
    new_columns_of_blocks,
)
from experiments.common import (
    COLORS,
    SEQUENTIAL,
    ExperimentResult,
    Picture,
    bad_input,
    check_integer,
    command_line,
    new_figure,
    random_stream,
    track,
)
from experiments.exact import field_array
from experiments.kernels import (
    decay_mask,
    largest_difference,
    semiseparable_kernel,
)
from experiments.ranks import exact_semiseparable_rank

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "exp6_attention_dual"
CLAIM = "a width-N attention dual exists iff each block has at most N new columns"
TOLERANCE = 1e-10  # max |L o (Q K^T) - M| / max |M|
LARGEST = 128  # fractions grow with T and N: seconds at T = 64, N = 8; then minutes
PICTURED = "three diagonal SSMs in blocks"

Array = np.ndarray


@dataclass(frozen=True)
class Example:
    """A kernel and what theory says of it: its finest blocks and their new columns."""

    name: str
    M: Shaped[Array, "T T"]
    width: int
    blocks: list[tuple[int, int]]
    new_columns: list[int]

    @property
    def has_dual(self) -> bool:
        """Theorem 3.1."""
        return max(self.new_columns) <= self.width


@dataclass(frozen=True)
class Counterexample:
    """A kernel with T - 1 new columns, and the SSM of state size 2 that has it."""

    name: str
    M: Integer[Array, "T T"]
    a: Integer[Array, "T 2"]
    b: Integer[Array, "T 2"]
    c: Integer[Array, "T 2"]

    def as_example(self) -> Example:
        """The question that has the answer no: a dual as wide as the state is large?"""
        T, N = self.a.shape
        return Example(self.name, self.M, N, [(0, T)], [T - 1])


def dual_kernel(dual: Dual) -> Float[Array, "T T"]:
    """L o (Q K^T) in float64."""
    return masked_attention(*dual.as_floats())


def bidiagonal(T: int) -> Counterexample:
    """M = 2 I + subdiagonal of ones: two states take turns, each kept for one step."""
    mine: Bool[Array, "T 2"] = np.arange(T)[:, None] % 2 == np.arange(2)
    loaded, kept = mine.astype(int), (~mine).astype(int)
    M = 2 * np.eye(T, dtype=int) + np.eye(T, k=-1, dtype=int)
    return Counterexample("2I + subdiagonal", M, a=kept, b=loaded, c=2 * loaded + kept)


def corner(T: int) -> Counterexample:
    """M = I + E[T, 1]: one state passes x_t through, one carries x_1 to the end."""
    t = np.arange(T)
    M = np.eye(T, dtype=int)
    M[-1, 0] = 1
    one, zero = np.ones(T, int), np.zeros(T, int)
    return Counterexample(
        "I + E[T, 1]",
        M,
        a=np.column_stack([zero, one]),
        b=np.column_stack([one, t == 0]).astype(int),
        c=np.column_stack([one, t == T - 1]).astype(int),
    )


def zero_decay(T: int) -> Counterexample:
    """M[t, s] = 1 + [t = s]: a time-invariant diagonal SSM with decays 1 and 0."""
    ones = np.ones((T, 2), int)
    M = np.tril(np.ones((T, T), int)) + np.eye(T, dtype=int)
    return Counterexample("decays 1 and 0", M, a=ones * [1, 0], b=ones, c=ones)


def counterexamples(T: int) -> list[Counterexample]:
    """Three of the paper's length 4 and three of length T: T - 1 > 2 new columns."""
    length = max(T, 4)
    makers = (bidiagonal, corner, zero_decay)
    return [make(size) for size in sorted({4, length}) for make in makers]


def diagonal_ssm(T: int, N: int) -> tuple[Shaped[Array, "T T"], int]:
    """The kernel sum_n a_n^(t-s) of N decays in (1/3, 1), and its new columns.

    By Cauchy and Binet every minor of order up to N, on or below the diagonal, is
    positive: column t is new exactly while t < N and its tail has more than t rows.
    """
    decays = np.array([Fraction(2 * N - n, 2 * N + 1) for n in range(N)], object)
    M = decay_mask(np.broadcast_to(decays, (T, N))).sum(axis=2)
    return M, min(N, (T + 1) // 2)


def scalar_ssm(rng: np.random.Generator, T: int, zeros: list[int]) -> Example:
    """A time-varying scalar SSM with a_t = 0 at ``zeros``: each block has one new
    column, since all its columns are multiples of the first."""

    def draw(size: int) -> Shaped[Array, " T"]:
        values = rng.integers(1, size + 1, T) * rng.choice([-1, 1], T)
        return np.array([Fraction(v, size) for v in values.tolist()], object)

    a, b, c = draw(8), draw(3), draw(3)
    a[zeros] = Fraction(0)
    M = decay_mask(a[:, None])[..., 0] * np.outer(c, b)
    blocks = list(zip([0, *zeros], [*zeros, T], strict=True))
    return Example("scalar SSM with zeros", M, 1, blocks, [1] * len(blocks))


def random_content(
    rng: np.random.Generator, T: int, N: int
) -> tuple[Shaped[Array, "T T"], int]:
    """tril(Q K^T) with random integers and exactly n = min(N, (T+1)//2) new columns.

    Row T - 1 - j of Q is zero beyond its entry j, which is one, and row j of K
    likewise: the first n columns are independent in the last n rows, and all their
    tails hold those rows.
    """
    n = min(N, (T + 1) // 2)
    Q, K = rng.integers(-3, 4, (2, T, n))
    Q[T - n :] = (np.tril(Q[T - n :], -1) + np.eye(n, dtype=int))[::-1]
    K[:n] = np.tril(K[:n], -1) + np.eye(n, dtype=int)
    return np.tril(Q @ K.T), n


def block_starts(T: int) -> list[int]:
    """Where the second and third of three blocks of unequal length begin."""
    return sorted({T // 4, T // 4 + T // 3} - {0, T})


def blocks_of_ssms(T: int, N: int) -> Example:
    """Diagonal SSMs of N, N - 1, ... states one after the other, the state cleared."""
    starts = block_starts(T)
    blocks = list(zip([0, *starts], [*starts, T], strict=True))
    M = np.full((T, T), Fraction(0), object)
    counts = []
    for i, (start, stop) in enumerate(blocks):
        kernel, count = diagonal_ssm(stop - start, max(N - i, 1))
        M[start:stop, start:stop] = kernel
        counts.append(count)
    return Example(PICTURED, M, N, blocks, counts)


def examples(T: int, N: int, seed: int) -> list[Example]:
    """Kernels whose blocks and new columns are known by construction."""
    rng = random_stream(seed, "data")
    whole = [(0, T)]
    diagonal, count = diagonal_ssm(T, N)
    content, n = random_content(rng, T, N)
    return [
        Example("diagonal SSM", diagonal, N, whole, [count]),
        scalar_ssm(rng, T, block_starts(T)),
        blocks_of_ssms(T, N),
        Example("random content", content, N, whole, [n]),
    ]


def judge(example: Example) -> tuple[dict[str, Any], Dual]:
    """What was found beside what theory says, and a dual of the width asked for, or of
    the least width where that is larger."""
    M, found = example.M, new_columns_of_blocks(example.M)
    asked = attention_dual(M, example.width)
    dual = asked or attention_dual(M, max(found))
    assert dual is not None, "every kernel has a dual of its least width"
    a, Q, K = dual.as_floats()
    reference = M.astype(float)
    terms = masked_attention(np.abs(a), np.abs(Q), np.abs(K))
    record = {
        "name": example.name,
        "T": len(M),
        "width": example.width,
        "has_dual": asked is not None,
        "expected_has_dual": example.has_dual,
        "narrower_dual": attention_dual(M, max(found) - 1) is not None,
        "blocks": finest_blocks(M),
        "expected_blocks": example.blocks,
        "new_columns": found,
        "expected_new_columns": example.new_columns,
        "constructed_width": Q.shape[1],
        "difference": largest_difference(dual_kernel(dual), reference),
        "exact": dual.reproduces(M),
        "cancellation": terms.max() / np.abs(reference).max(),
    }
    return record, dual


def realised(example: Counterexample) -> dict[str, Any]:
    """The state size of the SSM that has this kernel, and its semiseparable rank."""
    ssm = [array.astype(float) for array in (example.a, example.b, example.c)]
    return {
        "state_size": example.a.shape[1],
        "semiseparable_rank": exact_semiseparable_rank(field_array(example.M)),
        "ssm_difference": largest_difference(
            semiseparable_kernel(*ssm), example.M.astype(float)
        ),
    }


def run(T: int = 24, N: int = 3, seed: int = 0) -> ExperimentResult:
    """Decide, construct and verify attention duals of kernels whose answer is known.

    Kernels that have a dual of width N, and kernels of state size 2 that have none of
    width 2. For every kernel a dual of sufficient width is constructed in fractions and
    verified, exactly and in float64, and one dimension too few is refused.

    Args:
        T: sequence length, 1 to 128; counter-examples need at least 4
        N: state size of the diagonal SSM and width of the random content, 1 to 128
        seed: draws the scalar SSM and the random content
    """
    for name, value, usual in (("T", T, 24), ("N", N, 3)):
        check_integer(name, value, at_least=1, example=usual)
        if value > LARGEST:
            expected = f"at most {LARGEST}: exact fractions grow long"
            raise bad_input(name, value, expected, f"try {name} = {usual}")
    records, duals = [], {}
    for example in track(examples(T, N, seed), "kernels"):
        record, duals[example.name] = judge(example)
        records.append(record)
    for counterexample in track(counterexamples(T), "counter-examples"):
        record, _ = judge(counterexample.as_example())
        records.append(record | realised(counterexample))
    a, Q, K = duals[PICTURED].as_floats()
    metadata = {
        "T": T,
        "N": N,
        "seed": seed,
        "tolerance": TOLERANCE,
        "kernels": records,
        "dual": {"of": PICTURED, "a": a, "Q": Q, "K": K},
    }
    return ExperimentResult(NAME, _details(metadata), metadata, not problems(metadata))


def _details(metadata: dict[str, Any]) -> str:
    records = metadata["kernels"]
    positive = sum(record["has_dual"] for record in records)
    refuted = sum("state_size" in record for record in records)
    worst = max(record["difference"] for record in records)
    return (
        f"{len(records)} kernels: {positive} have a dual of the width asked for, "
        f"{len(records) - positive} have none, {refuted} of these although their state "
        f"size is 2; max |L o (QK^T) - M| = {worst:.1e} (relative; tolerance "
        f"{TOLERANCE:.0e}) at T = {metadata['T']}, N = {metadata['N']}, "
        f"seed {metadata['seed']}"
    )


def problems(metadata: dict[str, Any]) -> list[str]:
    """The claims that a record's metadata breaks."""
    tolerance = float(metadata["tolerance"])
    found = [] if metadata["kernels"] else [f"{CLAIM}: no kernel was examined"]
    for record in metadata["kernels"]:
        broken = [*_undecided(record), *_unverified(record, tolerance)]
        where = f"{record['name']} (T = {record['T']}, width {record['width']})"
        found += [f"{CLAIM}: {where}: {complaint}" for complaint in broken]
    return found


def _undecided(record: dict[str, Any]) -> list[str]:
    """Where the decision, the blocks or the new columns are not theory's."""
    broken = [
        f"{key} is {record[key]}, theory says {record['expected_' + key]}"
        for key in ("has_dual", "new_columns", "blocks")
        if record[key] != record["expected_" + key]
    ]
    if record["narrower_dual"]:
        broken.append("a dual narrower than the new columns allow")
    return broken


def _unverified(record: dict[str, Any], tolerance: float) -> list[str]:
    """Where a dual misses its kernel, or a counter-example its small SSM."""
    broken = []
    if not record["exact"]:
        broken.append("the dual is not exactly the kernel")
    if not float(record["difference"]) <= tolerance:
        broken.append(
            f"the dual misses the kernel by {float(record['difference']):.1e}"
        )
    if "state_size" in record:
        if record["semiseparable_rank"] != record["state_size"]:
            broken.append(f"semiseparable rank {record['semiseparable_rank']}")
        if float(record["ssm_difference"]) != 0:
            broken.append("its SSM has another kernel")
    return broken


def draw(results: list[ExperimentResult]) -> "Figure":
    """The kernel, its mask and its completed content, of the first result."""
    metadata = results[0].metadata
    dual = metadata["dual"]
    a, Q, K = (np.array(dual[key], float) for key in ("a", "Q", "K"))
    record = next(r for r in metadata["kernels"] if r["name"] == dual["of"])
    ranks = ", ".join(map(str, record["new_columns"]))
    L = decay_mask(a[:, None])[..., 0]
    panels = (
        (L * (Q @ K.T), L != 0, r"kernel $M = L \circ QK^T$"),
        (L, L != 0, "mask $L$: 1-semiseparable, $a_t = 0$ between blocks"),
        (Q @ K.T, (L != 0) | (L != 0).T, f"content $QK^T$ of each block: rank {ranks}"),
    )
    figure, axes = new_figure(columns=len(panels))
    for ax, (matrix, shown, title) in zip(axes[0], panels, strict=True):
        _draw_matrix(figure, ax, np.where(shown, matrix, np.nan), title)
    _draw_staircase(axes[0, -1], record["blocks"])
    return figure


def _draw_matrix(
    figure: "Figure", ax: Any, matrix: Float[Array, "T T"], title: str
) -> None:
    """One panel: zeros of the mask stay blank; steps count from 1 as in the paper."""
    T = len(matrix)
    edges = (0.5, T + 0.5, T + 0.5, 0.5)
    ax.grid(visible=False)
    image = ax.imshow(matrix, cmap=SEQUENTIAL, vmin=0, extent=edges)
    ax.set(title=title, xlabel="input step $s$", ylabel="output step $t$")
    figure.colorbar(image, ax=ax, label="entry (no unit)")


def _draw_staircase(ax: Any, blocks: list[list[int]]) -> None:
    """The border between each block's given lower triangle and its completion."""
    for i, (start, stop) in enumerate(blocks):
        step = np.arange(start, stop + 1) + 0.5
        label = "above: completed" if i == 0 else None
        ax.step(step, step, where="post", color=COLORS[1], label=label)
    ax.legend(loc="upper right", frameon=False)


PICTURES = (Picture(draw, "outputs/exp6_attention_dual.png"),)

if __name__ == "__main__":
    sys.exit(command_line(run, pictures=PICTURES))
