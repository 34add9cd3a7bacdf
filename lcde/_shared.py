"""Final states of many paths whose increments repeat: one exponential for each of them.

On data with rounded increments (the signature data: 99 steps of 100,000 paths, about a
hundred distinct increments in two dimensions and seven hundred in three) the exact
transition of an interval depends on its increment alone. So

    letters   number the distinct increments; exp(M) and phi_1(M) b of each, once
    words     runs of letters that occur often get a transition of their own, the
              product of their letters': it costs as much as H steps of single paths,
              and saves one at each use
    rounds    every path goes on by the longest word that lies ahead of it; paths with
              the same word are advanced together, by one matrix product

Words are found level by level, as in Lempel-Ziv parsing: a word of m letters that
occurs ``WORD_USES`` times becomes the beginning of words of m + 1.

This is NumPy on the host: a round is a loop over groups of a few to thousands of rows,
which one BLAS call each on every core serves best (on 2 cores, 70 GFLOP/s a core).
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Float64, Int, Int32
from threadpoolctl import threadpool_limits

from experiments.common import track
from lcde._solvers import exact_transition
from lcde._structures import Structure

CELL = 2.0**-22  # of the largest |value|: the rounding of float32 paths is below it …
WIDEST = 4  # … and increments as many cells apart or closer may count as equal
MOST_WORDS = 2**12  # more distinct increments than that do not repeat …
MOST_BYTES = 2**30  # … nor do more than transitions of them fit in
REPEATS = 2  # uses of a letter, on average, below which increments do not repeat
WORD_USES = 4_000  # occurrences that pay for a word: H = 256 to make, more for caches
BATCH = 8  # exponentials at once: what they need stays in the caches

NDArray = np.ndarray


class Letters(NamedTuple):
    """Distinct increments, and which one each path makes at each step."""

    table: Float64[NDArray, "K W"]
    steps: Int32[NDArray, "n T"]


class Words(NamedTuple):
    """Words, letters first: word m is word ``parent[m]``, then letter ``letter[m]``.

    At every place of every path: the longest word that begins there, and its length.
    """

    parent: Int[NDArray, " M"]
    letter: Int[NDArray, " M"]
    longest: Int32[NDArray, "n T"]
    length: Int32[NDArray, "n T"]


class Maps(NamedTuple):
    """y -> E y + c of each word."""

    E: Float32[NDArray, "M H H"]
    c: Float32[NDArray, "M H"]


# --- letters --------------------------------------------------------------------------


def find_letters(channels: Sequence[NDArray], most: int) -> Letters | None:
    """The distinct increments of paths given channel by channel, (n, L) or (1, L) each.

    Increments are equal where they differ by rounding only: all that lie within
    ``WIDEST`` cells, each 2^-22 of the channel's largest value, become their mean.
    None where there are more than ``most``, or where they are spread without gaps.
    """
    numbered = []
    for values in channels:
        if (found := _number_channel(np.asarray(values))) is None:
            return None
        numbered.append(found)
    code, size = np.zeros((1, 1), np.int64), 1
    for means, index in numbered:
        code, size = code * len(means) + index, size * len(means)
        if size > 2**24:
            return None
    used = np.bincount(code.ravel(), minlength=size) > 0
    if used.sum() > most:
        return None
    distinct = np.flatnonzero(used)
    digits = np.unravel_index(distinct, [len(means) for means, _ in numbered])
    table = np.stack([m[0][i] for m, i in zip(numbered, digits, strict=True)], axis=1)
    return Letters(table, _ranks(used)[code])


def _number_channel(
    values: NDArray,
) -> tuple[Float64[NDArray, " k"], Int32[NDArray, "n T"]] | None:
    """The distinct increments of one channel, and the number of each step's."""
    increments = np.diff(values.astype(np.float64, copy=False), axis=1)
    cell = CELL * (float(np.abs(values).max()) or 1.0)
    cells = np.rint(increments / cell).astype(np.int32)
    cells -= cells.min()
    counts = np.bincount(cells.ravel())
    occupied = counts > 0
    begins = occupied & ~np.concatenate([[False], occupied[:-1]])
    cluster = np.cumsum(begins, dtype=np.int32) - 1
    if np.bincount(cluster[occupied]).max() > WIDEST:
        return None
    sums = np.bincount(cells.ravel(), weights=increments.ravel())
    total = np.bincount(cluster[occupied], weights=sums[occupied])
    means = total / np.bincount(cluster[occupied], weights=counts[occupied])
    return means, cluster[cells]


def _ranks(used: NDArray) -> Int32[NDArray, " size"]:
    """Entry i: how many used entries lie before the i-th."""
    return np.cumsum(used, dtype=np.int32) - 1


# --- words ----------------------------------------------------------------------------


def find_words(letters: Letters, uses: int, most: int) -> Words:
    """Letters, and all runs of them that occur at least ``uses`` times, up to ``most``.

    Where more runs of a length occur so often than ``most`` leaves room for, the rarest
    are left out.
    """
    steps, K = letters.steps, len(letters.table)
    parents, ends = [np.full(K, -1)], [np.arange(K)]
    longest, length = steps.copy(), np.ones_like(steps)
    words, first, total = steps, 0, K  # the words of m letters, by place, and their ids
    for m in range(1, steps.shape[1]):
        found = words[:, :-1] >= 0
        code = (words[:, :-1][found] - first) * K + steps[:, m:][found]
        counts = np.bincount(code, minlength=(total - first) * K)
        kept = _most_frequent(counts, uses, most - total)
        if not len(kept):
            break
        parents.append(first + kept // K)
        ends.append(kept % K)
        number = np.full(len(counts), -1, np.int32)
        number[kept] = total + np.arange(len(kept))
        words = np.full(found.shape, -1, np.int32)
        words[found] = number[code]
        found = words >= 0
        np.copyto(longest[:, :-m], words, where=found)
        np.copyto(length[:, :-m], m + 1, where=found)
        first, total = total, total + len(kept)
    return Words(np.concatenate(parents), np.concatenate(ends), longest, length)


def _most_frequent(counts: NDArray, uses: int, most: int) -> Int[NDArray, " kept"]:
    kept = np.flatnonzero(counts >= uses)
    if len(kept) > most:
        kept = np.sort(kept[np.argsort(-counts[kept], kind="stable")[: max(most, 0)]])
    return kept


def find_rounds(
    words: Words,
) -> Iterator[tuple[Int[NDArray, " active"], Int32[NDArray, " active"]]]:
    """Round by round, the paths that are not at their end, sorted by next word."""
    n, T = words.longest.shape
    place = np.zeros(n, np.int64)
    active = np.arange(n)
    while len(active):
        word = words.longest[active, place[active]]
        order = np.argsort(word.astype(np.uint16), kind="stable")  # a radix sort
        yield active[order], word[order]
        place[active] += words.length[active, place[active]]
        active = active[place[active] < T]


# --- states ---------------------------------------------------------------------------


def exact_final_states(
    A: Structure,
    B: Float[Array, "H W"],
    channels: Sequence[NDArray],
    y0: Float32[NDArray, "n H"],
) -> Float32[NDArray, "n H"] | None:
    """y_T of ``exact_cde_solve`` for n paths at once, float32; None: nothing repeats.

    channels: the control, W arrays (n, L), or (1, L) where all paths share a channel.
    Transitions of letters are rounded to float32 once, and words are products of at
    most a few of them: the error stays that of a float32 solve of L steps.
    """
    n_steps = len(y0) * (channels[0].shape[1] - 1)
    most = min(MOST_WORDS, MOST_BYTES // (4 * A.size**2), n_steps // REPEATS)
    letters = find_letters(channels, most) if most else None
    if letters is None:
        return None
    steps = np.broadcast_to(letters.steps, (len(y0), letters.steps.shape[1]))
    letters = Letters(letters.table, steps)
    words = find_words(letters, WORD_USES, most)
    cores = os.cpu_count() or 1
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(cores) as pool:
        maps = _compose(_letter_maps(A, B, letters.table), words, pool)
        return _advance(y0.copy(), maps, words, pool, cores)


@eqx.filter_jit
def _exact(A: Structure, B: Array, increments: Array) -> tuple[Array, Array]:
    map_ = exact_transition(A, B, increments)
    return map_.A.dense(), map_.c


def _letter_maps(
    A: Structure, B: Float[Array, "H W"], table: Float64[NDArray, "K W"]
) -> Maps:
    K, H = len(table), A.size
    maps = Maps(np.empty((K, H, H), np.float32), np.empty((K, H), np.float32))
    padded = np.zeros((-(-K // BATCH) * BATCH, table.shape[1]), np.float32)
    padded[:K] = table
    for first in track(range(0, K, BATCH), "transitions"):  # one shape, one compilation
        here = slice(first, min(first + BATCH, K))
        E, c = _exact(A, B, jnp.asarray(padded[first : first + BATCH]))
        maps.E[here] = np.asarray(E)[: here.stop - first]
        maps.c[here] = np.asarray(c)[: here.stop - first]
    return maps


def _compose(letters: Maps, words: Words, pool: ThreadPoolExecutor) -> Maps:
    """The maps of all words, each its parent's and then its last letter's."""
    K, M, H = len(letters.c), len(words.parent), letters.c.shape[1]
    maps = Maps(np.empty((M, H, H), np.float32), np.empty((M, H), np.float32))
    maps.E[:K], maps.c[:K] = letters

    def compose(m: int) -> None:
        parent, last = words.parent[m], words.letter[m]
        np.matmul(letters.E[last], maps.E[parent], out=maps.E[m])
        maps.c[m] = letters.E[last] @ maps.c[parent] + letters.c[last]

    depth = K
    while depth < M:  # one level after the other: parents first
        level = np.flatnonzero(words.parent[depth:] < depth) + depth
        list(pool.map(compose, level.tolist()))
        depth = int(level[-1]) + 1
    return maps


def _advance(
    Y: Float32[NDArray, "n H"],
    maps: Maps,
    words: Words,
    pool: ThreadPoolExecutor,
    cores: int,
) -> Float32[NDArray, "n H"]:
    """Take every path through all its words, in place."""

    def go(paths: NDArray, word: NDArray) -> None:
        starts = np.flatnonzero(np.diff(word, prepend=-1))
        for first, last in pairwise([*starts.tolist(), len(word)]):
            rows, m = paths[first:last], word[first]
            y = np.take(Y, rows, axis=0) @ maps.E[m].T
            y += maps.c[m]
            Y[rows] = y

    rounds = list(find_rounds(words))
    for paths, word in track(rounds, "paths", len(rounds)):
        parts = zip(
            np.array_split(paths, cores), np.array_split(word, cores), strict=True
        )
        list(pool.map(lambda part: go(*part), parts))
    return Y
