"""Exact ranks: linear algebra over the integers modulo a prime.

A rank decided in floating point depends on a tolerance. Here every number is mapped
to the field of p elements, where elimination is exact. The rank modulo p never exceeds
the true rank, and for a fixed matrix it is smaller only if p divides one of its
minors: a chance of order 1/p = 5e-10 for generic entries.

p = 15 * 2^27 + 1, so that -1 has a square root and the field holds roots of unity of
every order dividing 15 * 2^27: complex rationals and roots of unity are exact too.
"""

from fractions import Fraction

import numpy as np
from jaxtyping import Int64, Integer

Array = np.ndarray

PRIME = 15 * 2**27 + 1
_GENERATOR = 31  # of the multiplicative group modulo PRIME


def to_field(value: complex | Fraction) -> int:
    """The element of the field for a rational or complex rational number.

    A float stands for its exact binary value. ``x + iy`` becomes x + I y with
    I^2 = -1 in the field.
    """
    if isinstance(value, complex | np.complexfloating):
        imaginary_unit = root_of_unity(4)
        return (to_field(value.real) + imaginary_unit * to_field(value.imag)) % PRIME
    fraction = value if isinstance(value, Fraction) else Fraction(value)
    return fraction.numerator * pow(fraction.denominator, -1, PRIME) % PRIME


def root_of_unity(order: int) -> int:
    """A primitive root of unity of ``order`` in the field; order divides 15 * 2^27."""
    if order < 1 or (PRIME - 1) % order:
        raise ValueError(f"order: got {order}; expected a divisor of {PRIME - 1}")
    return pow(_GENERATOR, (PRIME - 1) // order, PRIME)


def field_array(values: np.ndarray | list) -> Int64[Array, "*shape"]:
    """Map an array of (complex) rationals, floats or integers into the field."""
    entries = np.asarray(values)
    flat = [to_field(v if isinstance(v, Fraction) else v.item()) for v in entries.flat]
    return np.array(flat, np.int64).reshape(entries.shape)


def field_kernel(
    a: Integer[Array, "T N"], b: Integer[Array, "T N"], c: Integer[Array, "T N"]
) -> Int64[Array, "T T"]:
    """M[t, s] = sum_n c_t a_t ... a_{s+1} b_s modulo p; zero above the diagonal."""
    T, _ = a.shape
    M = np.zeros((T, T), np.int64)
    tails = np.zeros((T, a.shape[1]), np.int64)  # tails[s] = a_t ... a_{s+1} b_s
    for t in range(T):
        tails[:t] = tails[:t] * a[t] % PRIME
        tails[t] = b[t]
        M[t, : t + 1] = (tails[: t + 1] * c[t] % PRIME).sum(axis=1) % PRIME
    return M


def field_rank(matrix: Integer[Array, "rows columns"]) -> int:
    """Rank over the field, by Gaussian elimination. O(rank * rows * columns)."""
    rows = np.array(matrix, np.int64) % PRIME
    rank = 0
    for column in range(rows.shape[1]):
        nonzero = np.flatnonzero(rows[rank:, column])
        if not len(nonzero):
            continue
        pivot = rank + nonzero[0]
        rows[[rank, pivot]] = rows[[pivot, rank]]
        inverse = pow(int(rows[rank, column]), -1, PRIME)
        rows[rank] = rows[rank] * inverse % PRIME
        below = rows[rank + 1 :]
        below -= below[:, column : column + 1] * rows[rank] % PRIME
        below %= PRIME
        rank += 1
        if rank == len(rows):
            break
    return rank
