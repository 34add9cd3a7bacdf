"""Multi-query associative recall: k1 v1 k2 v2 … kP vP … k2 … k1 …  ->  v2, v1 there.

Arora et al., "Zoology" (arXiv:2312.04927), section 4 and its appendix on the synthetic
task: P distinct keys, each followed by its value, then every key once more, and at that
position its value is asked for. Behind the pairs every second position is a slot for a
query; slot j = 1, 2, … is drawn, without replacement, with probability proportional to

    j^(power_a - 1),

so that with power_a = 0.01 most queries come soon and a few come late, and with
power_a = 1 all slots are alike. What is left is filled with tokens of the whole
vocabulary, keys and values that look like further pairs included.

Differs: (1) a filler is never one of the sequence's own keys, so that each of these is
queried exactly once and nothing is asked that has no target; (2) the P slots drawn are
given to the keys in random order, where the authors' code gives the first pair the
first slot drawn, so that early pairs tend to be asked for early; (3) the vocabulary is
256 keys and 256 values by default, where theirs is 8,192 tokens, since a CPU should do.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int, Int64
from torch import Tensor

from data_dir._tokens import every_position
from data_dir.task import IGNORED, Split, TokenTask
from experiments.common import (
    bad_input,
    check_finite,
    check_increasing,
    check_integer,
    random_stream,
)

NAME = "mqar"

Array = np.ndarray


class _Shape(NamedTuple):
    """Tokens are numbered keys, values."""

    seq_len: int
    n_pairs: int
    n_keys: int
    n_values: int
    power_a: float

    @property
    def n_slots(self) -> int:
        return self.seq_len // 2 - self.n_pairs


def mqar(
    *,
    seq_len: int,
    n_pairs: int,
    seed: int,
    n_train: int,
    n_val: int,
    n_keys: int = 256,
    n_values: int = 256,
    power_a: float = 0.01,
) -> TokenTask:
    """Sequences of ``n_pairs`` pairs and as many queries, scored at the queries alone.

    Keys and values are distinct within a sequence, as in the authors' code. The
    metadata hold two levels of guessing: ``guess_accuracy`` (1 / n_values) and
    ``guess_shown_accuracy`` (1 / n_pairs), which a model reaches that knows which
    values were shown and not which key each belongs to. Raises InputError where
    ``seq_len`` leaves no room for the pairs and their queries.
    """
    shape = _Shape(seq_len, n_pairs, n_keys, n_values, power_a)
    check_integer("n_train", n_train, at_least=1, example=20_000)
    check_integer("n_val", n_val, at_least=1, example=2_000)
    _check(shape)
    metadata = {
        **shape._asdict(),
        "seed": seed,
        "n_train": n_train,
        "n_val": n_val,
        "guess_accuracy": 1 / n_values,
        "guess_shown_accuracy": 1 / n_pairs,
    }
    return TokenTask(
        NAME,
        n_keys + n_values,
        _draw(random_stream(seed, f"mqar/train {n_pairs}"), n_train, shape),
        _draw(random_stream(seed, f"mqar/val {n_pairs}"), n_val, shape),
        last_only=False,
        metadata=metadata,
    )


def mqar_mixture(
    *,
    seq_len: int,
    n_pairs: Sequence[int],
    seed: int,
    n_train: int,
    n_val: int,
    n_keys: int = 256,
    n_values: int = 256,
) -> TokenTask:
    """Equally many sequences of each number of pairs; each number is a part of ``val``.

    A model learns the few pairs first and goes on to the many, on which alone it may
    stay at ``guess_shown_accuracy`` for thousands of steps. Zoology trains so, too.
    """
    check_increasing("n_pairs", n_pairs, at_least=1)
    tasks = {
        str(n): mqar(
            seq_len=seq_len,
            n_pairs=n,
            seed=seed,
            n_train=max(1, n_train // len(n_pairs)),
            n_val=max(1, n_val // len(n_pairs)),
            n_keys=n_keys,
            n_values=n_values,
        )
        for n in n_pairs
    }
    train, val = (
        Split(*(torch.cat(each) for each in zip(*splits, strict=True)))
        for splits in (
            [task.train for task in tasks.values()],
            [task.val for task in tasks.values()],
        )
    )
    metadata = {
        "guess_accuracy": 1 / n_values,
        "parts": {name: task.metadata for name, task in tasks.items()},
    }
    return TokenTask(
        NAME,
        n_keys + n_values,
        train,
        val,
        last_only=False,
        metadata=metadata,
        parts={name: task.val for name, task in tasks.items()},
    )


def mqar_oracle(inputs: Int[Tensor, "n L"], n_pairs: int) -> Int[Tensor, "n L"]:
    """The targets, from the tokens alone: a dictionary of pairs, then look-ups."""
    targets = []
    for tokens in inputs.tolist():
        value_of = {tokens[2 * i]: tokens[2 * i + 1] for i in range(n_pairs)}
        behind = [value_of.get(token, IGNORED) for token in tokens[2 * n_pairs :]]
        targets.append([IGNORED] * (2 * n_pairs) + behind)
    return torch.tensor(targets, dtype=inputs.dtype)


def _check(shape: _Shape) -> None:
    n_pairs = shape.n_pairs
    check_integer("n_pairs", n_pairs, at_least=1, example=8)
    for name in ("n_keys", "n_values"):
        if getattr(shape, name) < n_pairs:
            raise bad_input(
                name,
                getattr(shape, name),
                f"at least n_pairs = {n_pairs}, since each pair has its own",
                f"raise {name} or lower n_pairs",
            )
    if shape.seq_len < 4 * n_pairs:
        raise bad_input(
            "seq_len",
            shape.seq_len,
            f"at least {4 * n_pairs} (two tokens for each of {n_pairs} pairs, and two "
            "for each query)",
            "raise seq_len or lower n_pairs",
        )
    check_finite("power_a", shape.power_a)
    if shape.power_a <= 0:
        raise bad_input("power_a", shape.power_a, "a number above 0", "try 0.01")


def _draw(rng: np.random.Generator, n: int, shape: _Shape) -> Split:
    P = shape.n_pairs
    keys = _distinct(rng, n, shape.n_keys, P)
    values = shape.n_keys + _distinct(rng, n, shape.n_values, P)
    queries = 2 * P + 2 * _slots(rng, n, shape)

    inputs = np.empty((n, shape.seq_len), np.int64)
    inputs[:, 0 : 2 * P : 2] = keys
    inputs[:, 1 : 2 * P : 2] = values
    inputs[:, 2 * P :] = _fillers(rng, keys, shape)
    np.put_along_axis(inputs, queries, keys, axis=1)
    targets = np.full_like(inputs, IGNORED)
    np.put_along_axis(targets, queries, values, axis=1)
    return every_position(inputs, targets)


def _distinct(
    rng: np.random.Generator, n: int, size: int, count: int
) -> Int64[Array, "n count"]:
    """In each of n rows ``count`` different numbers below ``size``, in random order.

    Floyd's algorithm (Bentley and Floyd, CACM 30(9), 1987) on all rows at once: its
    cost does not grow with ``size``.
    """
    chosen = np.empty((n, count), np.int64)
    for i, top in enumerate(range(size - count, size)):
        candidate = rng.integers(0, top + 1, n)
        taken = (chosen[:, :i] == candidate[:, None]).any(axis=1)
        chosen[:, i] = np.where(taken, top, candidate)
    return rng.permuted(chosen, axis=1)  # the set is uniform, its order is not


def _slots(
    rng: np.random.Generator, n: int, shape: _Shape
) -> Int64[Array, "n n_pairs"]:
    """For each pair the slot of its query, counted from 0.

    The n_pairs largest of log p_j + Gumbel noise are a draw of n_pairs slots one after
    the other, without replacement (Yellott 1977).
    """
    j = np.arange(1, shape.n_slots + 1)
    scores = (shape.power_a - 1) * np.log(j) + rng.gumbel(size=(n, shape.n_slots))
    ranked = np.argpartition(-scores, shape.n_pairs - 1, axis=1)
    return rng.permuted(ranked[:, : shape.n_pairs], axis=1)


def _fillers(
    rng: np.random.Generator, keys: Int64[Array, "n n_pairs"], shape: _Shape
) -> Int64[Array, "n behind"]:
    """Tokens drawn uniformly from the vocabulary without the sequence's own keys."""
    n, P = keys.shape
    others = shape.n_keys + shape.n_values - P
    tokens = rng.integers(0, others, (n, shape.seq_len - 2 * P), dtype=np.int32)
    for key in np.sort(keys, axis=1).T.astype(np.int32):  # step over each key in turn
        tokens += tokens >= key[:, None]
    return tokens.astype(np.int64)
