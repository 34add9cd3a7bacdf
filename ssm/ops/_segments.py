"""What the chunked duality operators share: products of decays over segments of time.

With decays d_1 … d_Q of a chunk, the matrix form of a scan needs d_t … d_{s+1} for
every pair s <= t, from the start of the chunk to each t, and from each s to its end.
They are put together by doubling: for t in the second half of a block and s in the
first, the product over (s, t] is one from the start of the second half times one to
the end of the first. Nothing is divided or subtracted, so decays given as numbers may
be 0, negative or complex. Decays given as logarithms are *added* the same way and
exponentiated last, with -inf above the diagonal: no exponential of a difference of
large sums, none of a positive number, and no NaN in a gradient, for any log-decay
from -inf to 0.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ssm._errors import bad_argument
from ssm.ops._ragged import (
    check_cu_seqlens,
    check_lengths,
    fill_padding,
    padded_from_packed,
    valid_steps,
)

_ELEMENTS = 1 << 18  # of the Q x Q matrices in one group of chunks: memory stays flat


@dataclass(frozen=True)
class Decays:
    """How decays join over time, what joins to no change, what is no path at all."""

    join: Callable[[Tensor, Tensor], Tensor]
    unit: float
    nothing: float
    value: Callable[[Tensor], Tensor]


NUMBERS = Decays(torch.mul, 1.0, 0.0, lambda decays: decays)
LOGS = Decays(torch.add, 0.0, -torch.inf, torch.exp)


def segments(decays: Tensor, kind: Decays) -> tuple[Tensor, Tensor, Tensor]:
    """(pairs, start, end) of a block of Q steps, Q a power of 2, C decays a step.

    pairs (…, Q, Q, C): the join over (s, t] for s <= t, ``kind.nothing`` above;
    start (…, Q, C): from the first step to t; end (…, Q, C): from after s to the last.
    """
    start = decays.unsqueeze(-2)
    end = torch.full_like(start, kind.unit)
    pairs = end.unsqueeze(-2)
    while start.shape[-3] > 1:
        (_, later), (earlier, _) = halves(start, -3), halves(end, -3)
        across = kind.join(later.unsqueeze(-2), earlier.unsqueeze(-3))
        first, second = halves(pairs, -4)
        pairs = corner(first, second, across, -2, kind.nothing)
        start, end = doubled(start, end, kind)
    return pairs.squeeze(-4), start.squeeze(-3), end.squeeze(-3)


def doubled(start: Tensor, end: Tensor, kind: Decays) -> tuple[Tensor, Tensor]:
    """``start`` and ``end`` of pairs of neighbouring blocks, from those of each."""
    start_1, start_2 = halves(start, -3)
    end_1, end_2 = halves(end, -3)
    whole_1, whole_2 = start_1[..., -1:, :], start_2[..., -1:, :]
    return (
        torch.cat([start_1, kind.join(start_2, whole_1)], -2),
        torch.cat([kind.join(end_1, whole_2), end_2], -2),
    )


def halves(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The even and the odd entries of ``dim`` (negative)."""
    first, second = x.unflatten(dim, (x.shape[dim] // 2, 2)).unbind(dim)
    return first, second


def corner(
    first: Tensor, second: Tensor, across: Tensor, column: int, nothing: float
) -> Tensor:
    """[[first, nothing], [across, second]], columns being dimension ``column``."""
    above = torch.full_like(across, nothing)
    top = torch.cat([first, above], column)
    return torch.cat([top, torch.cat([across, second], column)], column - 1)


def diagonal_scores(
    q: Tensor, k: Tensor, decays: Tensor, kind: Decays
) -> tuple[Tensor, Tensor, Tensor]:
    """(scores, start, end) of chunks (…, Q, K), Q a power of 2.

    scores (…, Q, Q) = sum_i q_t[i] d_t[i] … d_{s+1}[i] k_s[i] for s <= t, else 0. No
    product is formed for a pair and a state: for each quarter (t in the second half of
    a block, s in the first) it factors, and the quarter is one matrix product.
    """
    q, k, start = q.unsqueeze(-2), k.unsqueeze(-2), decays.unsqueeze(-2)
    end = torch.full_like(start, kind.unit)
    scores = (q * k).sum(-1, keepdim=True)
    while start.shape[-3] > 1:
        (_, later), (earlier, _) = halves(start, -3), halves(end, -3)
        (_, q_later), (k_earlier, _) = halves(q, -3), halves(k, -3)
        across = (q_later * kind.value(later)) @ (k_earlier * kind.value(earlier)).mT
        first, second = halves(scores, -3)
        scores = corner(first, second, across, -1, 0.0)
        start, end = doubled(start, end, kind)
        q, k = (x.unflatten(-3, (-1, 2)).flatten(-3, -2) for x in (q, k))
    return scores.squeeze(-3), start.squeeze(-3), end.squeeze(-3)


def pass_states(whole: Tensor, added: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The state that enters each chunk (dimension 1), and the one that leaves the last.

    h' = whole * h + added, from chunk to chunk.
    """
    entering = []
    for decay, gain in zip(whole.unbind(1), added.unbind(1), strict=True):
        entering.append(state)
        state = torch.addcmul(gain, decay, state)
    return torch.stack(entering, 1), state


def scalar_chunks(
    q: Tensor, k: Tensor, v: Tensor, decays: Tensor, state: Tensor, kind: Decays
) -> tuple[Tensor, Tensor]:
    """One decay a head: chunks of masked attention, and the states passed between.

    q, k (B, n, Q, G, K), v (B, n, Q, G, R, V), decays (B, n, Q, G, R), state
    (B, G, K, R, V): R heads share the q and k of a group. Dao & Gu 2024, section 6.
    Returns y like v and the last state.
    """
    R, V = v.shape[4:]
    pairs, start, end = segments(decays.movedim(2, -1).unsqueeze(-1), kind)
    pairs, start, end = (x.squeeze(-1) for x in (pairs, start, end))
    q, k = q.transpose(2, 3), k.transpose(2, 3)  # (B, n, G, Q, K)
    values = v.movedim(2, 4)  # (B, n, G, R, Q, V)
    scores = (q @ k.mT).unsqueeze(3) * kind.value(pairs)
    inside = scores @ values
    weighted = v.transpose(2, 3) * _per_step(kind.value(end))  # (B, n, G, Q, R, V)
    added = (k.mT @ weighted.flatten(-2)).unflatten(-1, (R, V))
    whole = kind.value(start[..., -1])[:, :, :, None, :, None]
    entering, state = pass_states(whole, added, state)
    history = (q @ entering.flatten(-2)).unflatten(-1, (R, V))
    y = inside.transpose(3, 4) + history * _per_step(kind.value(start))
    return y.transpose(2, 3), state


def _per_step(factor: Tensor) -> Tensor:
    """(…, R, Q) as (…, Q, R, 1)."""
    return factor.mT.unsqueeze(-1)


def chunk_length(chunk_size: int, L: int) -> int:
    """The power of 2 that holds ``chunk_size`` steps, no longer than L needs."""
    return 1 << (max(1, min(chunk_size, L)) - 1).bit_length()


def check_chunk_size(chunk_size: int) -> None:
    """Raise ArgumentError unless ``chunk_size`` is a whole number from 1 up."""
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise bad_argument(
            "chunk_size", repr(chunk_size), "a whole number from 1 up", "pass 64"
        )


def in_chunks(x: Tensor, Q: int, fill: float = 0.0) -> Tensor:
    """(B, L, …) as (B, n, Q, …), the last chunk filled up with ``fill``."""
    L = x.shape[1]
    missing = -L % Q
    if missing:
        x = torch.cat([x, x.new_full((x.shape[0], missing, *x.shape[2:]), fill)], 1)
    return x.unflatten(1, ((L + missing) // Q, Q))


def in_groups(
    run: Callable[..., tuple[Tensor, Tensor]],
    sequences: Sequence[Tensor],
    state: Tensor,
    heads: int,
    Q: int,
) -> tuple[Tensor, Tensor]:
    """``run(*parts, state) -> (y, state)`` over groups of chunks, one after the other.

    Of several, each group is computed again in the backward pass: what is saved between
    them is the state. ``sequences`` are split along dimension 1.
    """
    L = sequences[0].shape[1]
    steps = Q * max(1, _ELEMENTS // max(1, len(state) * heads * Q * Q))
    sizes = [min(steps, L - start) for start in range(0, L, steps)]
    if len(sizes) == 1:  # as much as a later one would keep while it is computed again
        return run(*sequences, state)
    outputs = []
    for part in _pieces(sequences, sizes):
        y, state = checkpoint(
            run, *part, state, use_reentrant=False, preserve_rng_state=False
        )
        outputs.append(y)
    return torch.cat(outputs, 1), state


def over_pieces(
    run: Callable[..., tuple[Tensor, Tensor]],
    sequences: Sequence[Tensor],
    state: Tensor,
    states_at: Sequence[int] | None,
) -> tuple[Tensor, ...]:
    """``run(*sequences, state)`` -> y, last state[, states after the steps states_at].

    With ``states_at`` it runs in pieces that end at those steps.
    """
    if states_at is None:
        return run(*sequences, state)
    bounds = _bounds(states_at, sequences[0].shape[1])
    outputs, after = [], {}
    sizes = [stop - start for start, stop in itertools.pairwise(bounds)]
    for stop, piece in zip(bounds[1:], _pieces(sequences, sizes), strict=True):
        y, state = run(*piece, state)
        outputs.append(y)
        after[stop] = state
    chosen = [after[step + 1] for step in states_at]
    states = torch.stack(chosen, 1) if chosen else state.unsqueeze(1)[:, :0]
    return torch.cat(outputs, 1), state, states


def _bounds(states_at: Sequence[int], L: int) -> list[int]:
    for step in states_at:
        if not isinstance(step, int) or not 0 <= step < L:
            raise bad_argument(
                "states_at",
                repr(step),
                f"indices of steps, 0 to {L - 1}" if L else "no step: there is none",
                "choose steps of the sequence",
            )
    inner = {0, *(step + 1 for step in states_at)} - {L}
    return [*sorted(inner), L] if L else [0, 0]


def _pieces(
    sequences: Sequence[Tensor], sizes: Sequence[int]
) -> Iterator[tuple[Tensor, ...]]:
    # Split, not sliced: the gradient of a slice is as long as the whole.
    return zip(*(x.split(list(sizes), 1) for x in sequences), strict=True)


def unpacked(
    sequences: Sequence[Tensor],
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[list[Tensor], Tensor | None]:
    """The sequences one a row and their lengths, where ``cu_seqlens`` packs them."""
    batch, L = sequences[0].shape[:2]
    if cu_seqlens is None:
        if lengths is not None:
            check_lengths(lengths, batch, L)
        return list(sequences), lengths
    if lengths is not None:
        raise bad_argument(
            "lengths, cu_seqlens", "both", "one of the two", "leave one out"
        )
    check_cu_seqlens(cu_seqlens, batch, L)
    return [padded_from_packed(x, cu_seqlens) for x in sequences], cu_seqlens.diff()


def neutralised(
    sequences: Sequence[Tensor], lengths: Tensor | None, fills: Sequence[float]
) -> list[Tensor]:
    """The sequences with ``fills`` on the padding behind ``lengths``."""
    if lengths is None:
        return list(sequences)
    valid = valid_steps(lengths, sequences[0].shape[1])
    return [
        fill_padding(x, valid, fill) for x, fill in zip(sequences, fills, strict=True)
    ]
