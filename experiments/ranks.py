"""Three ranks of a causal kernel, and the theory they are held against.

For a diagonal SSM with constant decays, M[t, s] = sum_n c_n b_n a_n^(t-s) for s <= t:

* generator rank: of the Vandermonde matrix V[t, n] = a_n^t (T x N);
* semiseparable rank: max over t of rank M[t:, :t+1], the largest rank of any
  submatrix on or below the diagonal (each such submatrix lies within one of those);
* ordinary rank: of M as a whole; T whenever the diagonal holds no zero.

Here they are floating-point ranks, which depend on a tolerance; `experiments.exact`
has the ranks that do not. Source: "On Structured State-Space Duality"
(arXiv:2510.04944), section 2; Dao & Gu (2024), section 3 for the semiseparable rank.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Complex128, Inexact, Int64, Integer, Num

from experiments.common import bad_input, check_integer, check_nonempty
from experiments.exact import field_array, field_kernel, field_rank
from experiments.kernels import constant, semiseparable_kernel

Array = np.ndarray

RANK_TOLERANCE = 1e-13  # of the largest singular value; rounding leaves about 1e-15


def ceiling(T: int) -> int:
    """floor((T+1)/2): M[t:, :t+1] is (T-t) x (t+1), so no rank of one exceeds it."""
    return (T + 1) // 2


def central_block(M: Num[Array, "T T"]) -> Num[Array, "rows columns"]:
    """M[t:, :t+1] for the t where its smaller side is floor((T+1)/2)."""
    t = (len(M) - 1) // 2
    return M[t:, : t + 1]


def numerical_rank(
    matrix: Inexact[Array, "rows columns"], tolerance: float = RANK_TOLERANCE
) -> int:
    """How many singular values exceed ``tolerance`` times the largest one."""
    sigma = np.linalg.svd(matrix, compute_uv=False)
    return int(np.count_nonzero(sigma > tolerance * sigma.max(initial=0.0)))


def semiseparable_rank(
    M: Inexact[Array, "T T"], tolerance: float = RANK_TOLERANCE
) -> int:
    """max over t of the numerical rank of M[t:, :t+1].

    The value is that of T singular value decompositions, most of which are avoided: a
    block is decomposed only where `largest_anchored_rank` still finds room for a larger
    rank and `_rank_is_at_most` fails to rule one out.
    """

    def rank_above(block: Array, best: int) -> int:
        if _rank_is_at_most(best, block, tolerance):
            return best
        return numerical_rank(block, tolerance)

    return largest_anchored_rank(M, rank_above)


def exact_semiseparable_rank(M: Integer[Array, "T T"]) -> int:
    """max over t of rank M[t:, :t+1] over the field of `experiments.exact`."""
    return largest_anchored_rank(M, lambda block, _: field_rank(block))


def largest_anchored_rank(
    M: Num[Array, "T T"], rank_above: Callable[[Array, int], int]
) -> int:
    """max over t of the rank of M[t:, :t+1], from the centre outwards.

    A rank of M[t:, :t+1] is at most min(T-t, t+1). Visiting t by falling bound, the
    search may stop at the first bound that the best rank so far already reaches: no
    later block can exceed it. ``rank_above(block, best)`` returns the block's rank, or
    anything up to ``best`` where the rank does not exceed ``best``.
    """
    T = len(M)
    best = 0
    for t in sorted(range(T), key=lambda t: abs(2 * t + 1 - T)):
        if min(T - t, t + 1) <= best:
            break
        best = max(best, rank_above(M[t:, : t + 1], best))
    return best


def _rank_is_at_most(
    rank: int, block: Inexact[Array, "rows columns"], tolerance: float
) -> bool:
    """Whether elimination proves that the numerical rank does not exceed ``rank``.

    ``rank`` steps with complete pivoting leave a rest, and block - rest has that rank,
    so sigma_{rank+1} <= ||rest||_F (Eckart & Young), while sigma_1 >= ||block||_F /
    sqrt(k) with k the smaller side. Cheaper than a decomposition, and free of BLAS
    threads, where ``rank`` is a small part of k; elsewhere, and where the rest is too
    large, the answer is False, which proves nothing.
    """
    k = min(block.shape)
    if 2 * rank > k:
        return False
    rest = block.copy()
    for _ in range(rank):
        i, j = np.unravel_index(np.abs(rest).argmax(), rest.shape)
        if rest[i, j] == 0:
            break
        rest -= np.outer(rest[:, j], rest[i] / rest[i, j])
    return bool(_frobenius(rest) <= tolerance * _frobenius(block) / np.sqrt(k))


def _frobenius(matrix: Inexact[Array, "rows columns"]) -> float:
    return float(np.sqrt((np.abs(matrix) ** 2).sum()))


def ssm_kernel(
    a: Inexact[Array, " N"], b: Inexact[Array, " N"], c: Inexact[Array, " N"], T: int
) -> Inexact[Array, "T T"]:
    """M[t, s] = sum_n c_n a_n^(t-s) b_n for s <= t, else 0, in floating point."""
    return semiseparable_kernel(constant(a, T), constant(b, T), constant(c, T))


def exact_ssm_kernel(
    a: Inexact[Array, " N"], b: Inexact[Array, " N"], c: Inexact[Array, " N"], T: int
) -> Int64[Array, "T T"]:
    """The same kernel of the exact binary values of a, b and c, modulo a prime."""
    shape = (T, len(a))
    return field_kernel(
        *(np.broadcast_to(field_array(values), shape) for values in (a, b, c))
    )


def roots_of_unity(N: int) -> Complex128[Array, " N"]:
    """exp(2 pi i n / N): decays whose Vandermonde blocks are as good as orthogonal."""
    return np.exp(2j * np.pi * np.arange(N) / N)


def check_distinct(name: str, values: Sequence[int], *, at_least: int) -> None:
    """Raise InputError unless ``values`` are different integers, in any order."""
    check_nonempty(name, values, f"{name} = {at_least} {at_least + 1}")
    for value in values:
        check_integer(name, value, at_least=at_least, example=at_least)
    if len(set(values)) < len(values):
        mended = " ".join(map(str, dict.fromkeys(values)))
        raise bad_input(
            name, tuple(values), "each value once", f"try {name} = {mended}"
        )
