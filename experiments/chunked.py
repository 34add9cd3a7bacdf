"""The chunked block decomposition: a recurrence in matrix products, linear in T.

Split T steps into chunks of Q. With h the state that enters a chunk and t, s counted
inside it (Dao & Gu 2024, section 6; diagonal decays: arXiv:2510.04944, section 3),

    y_t  = sum_{s <= t} K[t, s] x_s + (c_t * a_t ... a_1)^T h         (inside; history)
    h'   = (a_Q ... a_1) * h + sum_s (a_Q ... a_{s+1}) * b_s x_s^T         (state pass)
    K[t, s] = sum_n c_t[n] (a_t[n] ... a_{s+1}[n]) b_s[n]

Everything but the pass of h from chunk to chunk is matrix products over all chunks at
once: O(T (Q + N) d + T Q N) operations, of which only T / Q steps are sequential.

Products of decays stay within a chunk and are never divided by or taken the logarithm
of: decays that are zero, tiny, negative or complex are right. K needs a product for
each pair (t, s) and state n, so it is put together from short blocks by doubling: for t
in the second half of a block and s in the first, a_t ... a_{s+1} is a product from the
start of the second half times one to the end of the first, and that quarter of K is one
matrix product over n. Constant decays whose powers stay far inside float64 for half a
chunk, both ways, need one matrix product in all (see `_by_powers`).

Differs from the recurrence where a product of up to Q decays leaves the range of
float64 although the state itself does not: such a product becomes 0 or infinity.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Inexact

from experiments.common import check_integer

Array = np.ndarray

CHUNK = 32  # fastest of 8 .. 128 at N = 16, d = 64; a power of two doubles best
_SAFE_DIGITS = 100  # of the 308 of float64: room for b, c and their sums
_LEAF = 4  # the short blocks: smaller products cost more than they save
_BATCH = 2048  # steps whose temporaries fit a processor's cache; memory stays flat

Matrices = tuple[
    Inexact[Array, "#J Q Q"],
    Inexact[Array, "#J Q N"],
    Inexact[Array, "#J Q N"],
    Inexact[Array, "#J N"],
]


def chunked(
    a: Inexact[Array, "#T N"],
    b: Inexact[Array, "#T N"],
    c: Inexact[Array, "#T N"],
    x: Inexact[Array, "T d"],
    initial_state: Inexact[Array, "N d"] | None = None,
    chunk: int = CHUNK,
) -> tuple[Inexact[Array, "T d"], Inexact[Array, "N d"]]:
    """y_t = c_t^T h_t with h_t = a_t * h_{t-1} + b_t x_t^T, in chunks of ``chunk``.

    Each of a, b, c has a row per step, or a single row where it is constant in time.
    What is constant is computed once and shared by all chunks of a batch: the powers
    of a constant a, and the whole of K (a Toeplitz matrix) if b and c are constant too.

    Returns every output and the final state; ``initial_state`` (default 0) is h_0.
    """
    check_integer("chunk", chunk, at_least=1, example=CHUNK)
    T, d = x.shape
    if initial_state is None:
        initial_state = np.zeros((a.shape[1], d))
    dtype = np.result_type(a, b, c, x, initial_state)
    h = initial_state.astype(dtype)
    y = np.empty((T, d), dtype)
    for start, stop, Q in _batches(T, chunk):
        a_part, b_part, c_part = (_in_chunks(v, start, stop, Q) for v in (a, b, c))
        x_part, y_part = (
            v[start:stop].reshape((stop - start) // Q, Q, d) for v in (x, y)
        )
        h = _equal_chunks(a_part, b_part, c_part, x_part, h, y_part)
    return y, h


def _batches(T: int, chunk: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, Q): steps start .. stop are whole chunks of Q, the last short."""
    whole = T - T % chunk
    batch = max(1, _BATCH // chunk) * chunk
    for start in range(0, whole, batch):
        yield start, min(start + batch, whole), chunk
    if whole < T:
        yield whole, T, T - whole


def _in_chunks(
    rows: Inexact[Array, "#T N"], start: int, stop: int, Q: int
) -> Inexact[Array, "#J Q N"]:
    """Steps start .. stop by chunk; one chunk stands for all if ``rows`` is one row."""
    N = rows.shape[1]
    if len(rows) == 1:
        return np.tile(rows, (1, Q, 1))  # not a view: inner loops over Q N, not N
    return rows[start:stop].reshape((stop - start) // Q, Q, N)


def _equal_chunks(
    a: Inexact[Array, "#J Q N"],
    b: Inexact[Array, "#J Q N"],
    c: Inexact[Array, "#J Q N"],
    x: Inexact[Array, "J Q d"],
    h: Inexact[Array, "N d"],
    y: Inexact[Array, "J Q d"],
) -> Inexact[Array, "N d"]:
    """Write the outputs of J chunks of equal length into ``y``; return the last state.

    ``h`` is the state that enters the first chunk.
    """
    K, queries, keys, whole = chunk_matrices(a, b, c)
    added = keys.swapaxes(1, 2) @ x
    across = np.broadcast_to(whole[:, :, None], (len(x), a.shape[2], 1))
    states = np.empty((len(x) + 1, *h.shape), h.dtype)
    states[0] = h
    for h_next, h_now, decay, gain in zip(
        states[1:], states[:-1], across, added, strict=True
    ):
        np.multiply(decay, h_now, out=h_next)
        h_next += gain
    np.matmul(K, x, out=y)
    y += queries @ states[:-1]
    return states[-1].copy()


def chunk_matrices(
    a: Inexact[Array, "#J Q N"],
    b: Inexact[Array, "#J Q N"],
    c: Inexact[Array, "#J Q N"],
) -> Matrices:
    """(K, queries, keys, whole) of each chunk.

    K[t, s] = sum_n c_t (a_t ... a_{s+1}) b_s for s <= t, else 0;
    queries[t] = c_t a_t ... a_1;  keys[s] = a_Q ... a_{s+1} b_s;  whole = a_Q ... a_1.
    """
    constant = len(a) == 1 and bool((a == a[:, :1]).all())
    if constant and _powers_in_range(a[0, 0], a.shape[1]):
        return _by_powers(a, b, c)
    return _by_doubling(a, b, c)


def _powers_in_range(a: Inexact[Array, " N"], Q: int) -> bool:
    """Whether a^(Q/2) and a^(-Q/2) are far inside float64 for every decay."""
    with np.errstate(divide="ignore"):  # a zero decay: the answer is no
        digits = np.abs(np.log10(np.abs(a))) * Q / 2
    return bool((digits < _SAFE_DIGITS).all())


def _by_powers(
    a: Inexact[Array, "1 Q N"],
    b: Inexact[Array, "#J Q N"],
    c: Inexact[Array, "#J Q N"],
) -> Matrices:
    """For a constant: a^(t-s) = a^(t-m) a^(m-s), m the middle of the chunk.

    One matrix product over n. Each term is a product of four numbers within float64's
    range, so that it has a relative error of a few roundings, whatever its size.
    """
    Q = a.shape[1]
    steps = np.arange(1, Q + 1)[:, None]
    from_start, to_end = a[0] ** steps, a[0] ** (Q - steps)
    from_middle, to_middle = a[0] ** (steps - Q // 2), a[0] ** (Q // 2 - steps)
    K = (c * from_middle) @ (b * to_middle).swapaxes(1, 2)
    K *= np.tri(Q)
    return K, c * from_start, b * to_end, from_start[None, -1]


def _by_doubling(
    a: Inexact[Array, "#J Q N"],
    b: Inexact[Array, "#J Q N"],
    c: Inexact[Array, "#J Q N"],
) -> Matrices:
    """First for short blocks, then for twice the length until one is the chunk."""
    Q = q = a.shape[1]
    while q > _LEAF and q % 2 == 0:
        q //= 2
    K = np.zeros((max(len(a), len(b), len(c)), Q, Q), np.result_type(a, b, c))
    a_q, b_q, c_q = (_split(rows, q) for rows in (a, b, c))
    _fill_by_lag(_diagonal_blocks(K, q), a_q, b_q, c_q)
    from_start = np.cumprod(a_q, axis=2)
    queries, keys = _join(c_q * from_start), _join(b_q * _products_to_end(a_q))
    whole = from_start[:, :, -1]
    while q < Q:
        later, earlier = _split(queries, 2 * q)[:, :, q:], _split(keys, 2 * q)[:, :, :q]
        scores = later @ earlier.swapaxes(-1, -2)
        _diagonal_blocks(K, 2 * q)[..., q:, :q] = scores
        first, second = whole[:, 0::2], whole[:, 1::2]
        later *= np.repeat(first[:, :, None], q, axis=2)  # repeated: longer inner loops
        earlier *= np.repeat(second[:, :, None], q, axis=2)
        whole = first * second
        q *= 2
    return K, queries, keys, whole[:, 0]


def _fill_by_lag(
    K: Inexact[Array, "J blocks q q"],
    a: Inexact[Array, "#J blocks q N"],
    tails: Inexact[Array, "#J blocks q N"],
    c: Inexact[Array, "#J blocks q N"],
) -> None:
    """Write K[t, t - lag], one lag after the other; ``tails`` starts as b.

    At each lag tails[s] = a_{s+lag} ... a_{s+1} b_s.
    """
    q = a.shape[2]
    for lag in range(q):
        if lag:
            tails = a[:, :, lag:] * tails[:, :, :-1]
        diagonal = np.einsum("jitt->jit", K[:, :, lag:, : q - lag])  # a view
        diagonal[...] = np.einsum("jitn,jitn->jit", c[:, :, lag:], tails)


def _split(rows: Inexact[Array, "J Q N"], q: int) -> Inexact[Array, "J blocks q N"]:
    """Chunks of Q as blocks of q."""
    J, Q, N = rows.shape
    return rows.reshape(J, Q // q, q, N)


def _join(blocks: Inexact[Array, "J blocks q N"]) -> Inexact[Array, "J Q N"]:
    """Undo ``_split``."""
    J, count, q, N = blocks.shape
    return blocks.reshape(J, count * q, N)


def _diagonal_blocks(
    K: Inexact[Array, "J Q Q"], q: int
) -> Inexact[Array, "J blocks q q"]:
    """The q x q blocks on the diagonal of each K, as a view that can be written to."""
    J, Q, _ = K.shape
    return np.einsum("jptps->jpts", K.reshape(J, Q // q, q, Q // q, q))


def _products_to_end(
    a: Inexact[Array, "J blocks q N"],
) -> Inexact[Array, "J blocks q N"]:
    """a_q ... a_{s+1} at each step s of a block; 1 at the last."""
    products = np.ones(a.shape, a.dtype)
    np.cumprod(a[:, :, :0:-1], axis=2, out=products[:, :, -2::-1])
    return products
