"""Which kernels are masked attention of width N: decided exactly, and constructed.

    M = L o (Q K^T),   L[t, s] = a_t ... a_{s+1} for s <= t,   Q and K of shape (T, N)

Theorem 3.1 of "On Structured State-Space Duality" (arXiv:2510.04944). Column t of a
lower-triangular M is *new* if its tail M[t:, t] is not in the span of the earlier
columns' tails {M[t:, s], s < t}. A dual of width N exists if and only if the non-zero
entries lie in consecutive diagonal blocks with at most N new columns each.

Why only then. A zero a_t makes M[t:, :t] zero, so the zeros of a cut M into diagonal
blocks. Within one, L[t, s] = r_t / r_s, where r_t is the product of the block's decays
up to t. Dividing row t by r_t and column s by 1/r_s leaves the lower triangle of
G = Q K^T and changes no column from new to not new. A column whose tail is new is, as
a whole column of G, outside the span of those before it: so there are at most
rank G <= N of them. Columns of earlier blocks have zero tails in later ones, so that
the count of a union of blocks is the sum of their counts, and no partition does better
than the finest.

Why then: :func:`complete` builds G with as many dimensions as new columns.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Integer, Shaped

from experiments.common import bad_input
from experiments.exact import PRIME, field_array
from experiments.kernels import decay_mask

Array = np.ndarray


class Field(NamedTuple):
    """The arithmetic of a field beyond +, - and *."""

    reduce: Callable[[Any], Any]
    inverse: Callable[[Any], Any]


RATIONALS = Field(reduce=lambda value: value, inverse=lambda value: 1 / value)


def integers_modulo(prime: int) -> Field:
    """The field of ``prime`` elements; int64 arrays suffice for primes below 2^31."""
    return Field(
        reduce=lambda value: value % prime,
        inverse=lambda value: pow(int(value), -1, prime),
    )


class Content(NamedTuple):
    """Factors of a completed lower triangle, one dimension for each new column."""

    Q: Shaped[Array, "T rank"]
    K: Shaped[Array, "T rank"]
    new: list[int]


@dataclass(frozen=True)
class Dual:
    """Decays, queries and keys with M = L(a) o (Q K^T), as exact fractions."""

    a: Shaped[Array, " T"]
    Q: Shaped[Array, "T N"]
    K: Shaped[Array, "T N"]

    def as_floats(
        self,
    ) -> tuple[Float[Array, " T"], Float[Array, "T N"], Float[Array, "T N"]]:
        """a, Q and K, each entry rounded to the nearest float64."""
        return self.a.astype(float), self.Q.astype(float), self.K.astype(float)

    def reproduces(self, M: Shaped[Array, "T T"]) -> bool:
        """Whether L o (Q K^T) = M, entry by entry, in exact arithmetic.

        The products are summed as integers, over one denominator for each query and
        key: sums of fractions would cost ten times more.
        """
        (Q, q), (K, k) = _over_one_denominator(self.Q), _over_one_denominator(self.K)
        lower = np.tril_indices(len(self.a))
        L = decay_mask(self.a[:, None])[..., 0]
        attention = L[lower] * (Q @ K.T)[lower]
        return bool((attention == (rational(M) * np.outer(q, k))[lower]).all())


def masked_attention(
    a: Shaped[Array, " T"], Q: Shaped[Array, "T N"], K: Shaped[Array, "T N"]
) -> Shaped[Array, "T T"]:
    """L o (Q K^T) with L[t, s] = a_t ... a_{s+1}; floats or fractions alike."""
    return decay_mask(a[:, None])[..., 0] * (Q @ K.T)


def rational(M: Shaped[Array, "..."]) -> Shaped[Array, "T T"]:
    """``M`` as an array of fractions; a float stands for its exact binary value.

    Raises InputError unless ``M`` is a finite real lower-triangular square matrix.
    """
    if M.ndim != 2 or M.shape[0] != M.shape[1]:
        raise bad_input("M", M.shape, "a square matrix", "give shape (T, T)")
    if np.triu(M != 0, 1).any():
        raise bad_input(
            "M", "entries above the diagonal", "a lower triangle", "give np.tril(M)"
        )
    fractions = [_fraction(entry) for row in M.tolist() for entry in row]
    return np.array(fractions, object).reshape(M.shape)


def _fraction(entry: Any) -> Fraction:
    try:
        return Fraction(entry)
    except (TypeError, ValueError, OverflowError):  # complex, NaN, infinity
        raise bad_input(
            "M", entry, "finite real entries", "give integers, floats or fractions"
        ) from None


def finest_blocks(M: Shaped[Array, "T T"]) -> list[tuple[int, int]]:
    """The shortest consecutive blocks [start, stop) that hold every non-zero entry.

    A block ends before row t exactly if M[t:, :t] = 0.
    """
    nonzero: Bool[Array, "T T"] = M != 0
    T = len(nonzero)
    last_row = np.where(nonzero.any(0), T - 1 - nonzero[::-1].argmax(0), 0)
    reach = np.maximum.accumulate(np.maximum(last_row, np.arange(T)))
    stops = [t + 1 for t in range(T) if reach[t] == t]
    return list(zip([0, *stops], stops, strict=False))


def complete(M: Shaped[Array, "T T"], field: Field) -> Content:
    """Q and K of least width whose product Q K^T has the lower triangle of ``M``.

    Columns are taken from left to right. The basis (the columns of Q) is kept in
    echelon form *from below*: each vector has its last non-zero entry, its pivot, in a
    row of its own. Vectors with a pivot below row t therefore stay independent when cut
    to rows t and after, the others vanish there, and together the cut vectors span the
    earlier tails. Subtracting multiples from the lowest pivot upwards leaves zero of
    tail t exactly if it is not new; the multiples are row t of K. Otherwise the
    remainder joins the basis. Its entries above row t are free, since they enter no
    product on or below the diagonal; they are zero here. Q has one column for each new
    column of M, and no completion has lower rank. O(rank T^2) operations.
    """
    T = len(M)
    Q, K = np.zeros_like(M), np.zeros_like(M)
    new: list[int] = []
    pivots: list[tuple[int, int]] = []  # (row, basis vector), lowest row first
    for t in range(T):
        tail = M[t:, t].copy()
        for row, j in pivots:
            if row < t:
                break
            K[t, j] = field.reduce(tail[row - t] * field.inverse(Q[row, j]))
            tail = field.reduce(tail - K[t, j] * Q[t:, j])
        (rows,) = np.nonzero(tail)
        if len(rows):
            j = len(new)
            Q[t:, j], K[t, j] = tail, 1
            pivots = sorted([*pivots, (t + int(rows[-1]), j)], reverse=True)
            new.append(t)
    return Content(Q[:, : len(new)], K[:, : len(new)], new)


def new_columns(M: Shaped[Array, "T T"]) -> list[int]:
    """The new columns of ``M``, decided modulo a prime (see ``experiments.exact``)."""
    residues: Integer[Array, "T T"] = field_array(rational(M))
    return complete(residues, integers_modulo(PRIME)).new


def new_columns_of_blocks(M: Shaped[Array, "T T"]) -> list[int]:
    """How many new columns each block of the finest partition has."""
    new = np.array(new_columns(M), int)
    return [
        int(((start <= new) & (new < stop)).sum()) for start, stop in finest_blocks(M)
    ]


def least_width(M: Shaped[Array, "T T"]) -> int:
    """The least N for which ``M`` has a dual of width N (Theorem 3.1)."""
    return max(new_columns_of_blocks(M), default=0)


def attention_dual(M: Shaped[Array, "T T"], N: int) -> Dual | None:
    """The dual of width ``N``, or None where Theorem 3.1 says that there is none.

    Each block is completed in fractions, so that no rounding enters the construction;
    a_t is zero where a block starts and never elsewhere.
    """
    exact = rational(M)
    if least_width(exact) > N:
        return None
    T = len(exact)
    a = np.full(T, Fraction(0), object)
    Q, K = (np.full((T, N), Fraction(0), object) for _ in range(2))
    for start, stop in finest_blocks(exact):
        block = slice(start, stop)
        content = complete(exact[block, block], RATIONALS)
        rank = len(content.new)
        assert rank <= N, f"{rank} new columns over the rationals, <= {N} modulo p"
        a[block], Q[block, :rank], K[block, :rank] = _rescale(content)
    return Dual(a, Q, K)


def _rescale(
    content: Content,
) -> tuple[Shaped[Array, " T"], Shaped[Array, "T rank"], Shaped[Array, "T rank"]]:
    """Move the size of query t, r_t, into the mask: a_t = r_t / r_{t-1}.

    r_t is the query's largest entry, sign included. Queries then lie in [-1, 1], and
    neither they nor the keys run out of float64's range as the kernel decays. For
    N = 1 and constant c the mask is the SSM's own.
    """
    r = [Fraction(1)]
    for query in content.Q:
        r.append(max(query, key=abs, default=Fraction(0)) or r[-1])
    scale = np.array(r[1:], object)
    a = np.array([Fraction(0), *scale[1:] / scale[:-1]], object)
    return a, content.Q / scale[:, None], content.K * scale[:, None]


def _over_one_denominator(
    rows: Shaped[Array, "T N"],
) -> tuple[Shaped[Array, "T N"], Shaped[Array, " T"]]:
    """Integers and a denominator for each row, as Python integers of any size."""
    denominators = np.array(
        [math.lcm(*(entry.denominator for entry in row)) for row in rows], object
    )
    scaled = [
        [int(entry * denominator) for entry in row]
        for row, denominator in zip(rows, denominators, strict=True)
    ]
    return np.array(scaled, object).reshape(rows.shape), denominators
