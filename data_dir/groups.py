"""Finite groups by name: S_n, A_n, Z_n and their direct products, as tables.

    table[i, j] = k  where  g_i g_j = g_k;    g_0 = e

S_n holds the permutations of 0 … n-1 in lexicographic order, multiplied as functions,
(p q)(k) = p(q(k)); A_n the even ones, in that order; Z_n the numbers 0 … n-1 under
addition mod n. A product counts its last factor fastest. Order and convention are those
of the published word problems (Merrill et al. 2024, arXiv:2404.08819), whose files can
therefore be read with these tables.
"""

import functools
import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from experiments.common import bad_input

MOST_ELEMENTS = 1_000  # a table of a million entries

Part = int | tuple[int, ...]  # an element of one factor
Table = Int32[np.ndarray, "n n"]

_NAME = re.compile(r"[SAZ][1-9][0-9]{0,2}(x[SAZ][1-9][0-9]{0,2})*")


@dataclass(frozen=True, eq=False)
class Group:
    """A group of ``order`` elements; the first is the identity.

    elements: for each element its part in every factor of the product, a permutation or
    a number. table: the numbers of all products, see the module's equation.
    """

    name: str
    elements: tuple[tuple[Part, ...], ...]
    table: Table

    @property
    def order(self) -> int:
        return len(self.elements)

    @property
    def inverses(self) -> Int32[np.ndarray, " n"]:
        """Entry i is the j with g_i g_j = e."""
        return (self.table == 0).argmax(axis=1).astype(np.int32)


@functools.cache
def group(name: str) -> Group:
    """The group of a name such as "A5", "Z60" or "S3xZ2".

    Raises InputError for any other name, and above ``MOST_ELEMENTS`` elements.
    """
    if not _NAME.fullmatch(name):
        raise bad_input(
            "group",
            name,
            "S, A or Z and a number from 1 to 999, factors joined by x",
            "try A5 or S3xZ2",
        )
    factors = [(factor[0], int(factor[1:])) for factor in name.split("x")]
    order = math.prod(_KINDS[kind].order(n) for kind, n in factors)
    if order > MOST_ELEMENTS:
        raise bad_input(
            "group", name, f"at most {MOST_ELEMENTS:,} elements", "take a smaller one"
        )
    parts, tables = zip(*(_KINDS[kind].build(n) for kind, n in factors), strict=True)
    table = functools.reduce(_product, tables)
    table.flags.writeable = False  # one object serves every caller
    return Group(name, tuple(itertools.product(*parts)), table)


class _Factor(NamedTuple):
    parts: tuple[Part, ...]
    table: Table


def _product(
    left: Table, right: Int32[np.ndarray, "m m"]
) -> Int32[np.ndarray, "n*m n*m"]:
    """The table of pairs (a, b), numbered m a + b."""
    pairs = left[:, None, :, None] * len(right) + right[None, :, None, :]
    order = len(left) * len(right)
    return pairs.reshape(order, order)


def _cyclic(n: int) -> _Factor:
    numbers = np.arange(n, dtype=np.int32)
    table = (numbers[:, None] + numbers) % np.int32(n)
    return _Factor(tuple(range(n)), table)


def _symmetric(n: int) -> _Factor:
    return _permutations(tuple(itertools.permutations(range(n))))


def _alternating(n: int) -> _Factor:
    every = itertools.permutations(range(n))
    return _permutations(tuple(p for p in every if _is_even(p)))


def _is_even(p: tuple[int, ...]) -> bool:
    inversions = sum(earlier > later for earlier, later in itertools.combinations(p, 2))
    return inversions % 2 == 0


def _permutations(parts: tuple[tuple[int, ...], ...]) -> _Factor:
    """The table of permutations that are closed and stand in lexicographic order."""
    p = np.array(parts)
    products = p[:, p]  # [i, j, k] = p_i(p_j(k))
    places = p.shape[1] ** np.arange(p.shape[1])[::-1]
    table = np.searchsorted(p @ places, products @ places)  # as numbers, still in order
    return _Factor(parts, table.astype(np.int32))


class _Kind(NamedTuple):
    order: Callable[[int], int]
    build: Callable[[int], _Factor]


_KINDS = {
    "S": _Kind(math.factorial, _symmetric),
    "A": _Kind(lambda n: max(math.factorial(n) // 2, 1), _alternating),
    "Z": _Kind(lambda n: n, _cyclic),
}
