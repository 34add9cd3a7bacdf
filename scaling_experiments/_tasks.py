"""Copying, recall and a needle in noise: three tasks that a sequence must be kept for.

    copy     x_1 … x_L | x_1 … x_L    every token again, in order, L of them distinct
    recall   k_1 v_1 … k_L v_L … k_i  the value of each key that is asked for
    needle   noise … | v … noise |    the one token behind the mark

A task has a *length* L: tokens to copy, pairs to keep, tokens of noise. What a model
must carry from one part of the sequence to the other is ``content_bits`` of the task at
L. It grows with L for copying and recall, so that a state of fixed size and precision
must fail at some L whatever is learned; for the needle it does not, and a model fails
there only if it does not tell what to keep.

:func:`mixture` joins sequences of several lengths, padded on the right, where nothing
is scored. Each has an oracle that finds the answers a second way (``*_oracle``).

Sources: copying after Jelassi et al., "Repeat After Me" (2024), section 4.1; recall:
``data_dir.mqar``. Differs: the tokens of a copied sequence are distinct, so that one
token of context tells where to go on.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional

from data_dir._tokens import every_position, last_position
from data_dir.mqar import mqar
from data_dir.task import IGNORED, Split
from experiments._cli import nearest
from experiments.common import bad_input, check_increasing, check_integer, random_stream

LARGEST_VOCAB = 8192  # two of them and a mark fit into 16 bits


def copy_sequences(rng: np.random.Generator, n: int, length: int, vocab: int) -> Split:
    """x_1 … x_L | x_1 … x_(L-1), to be answered with x_1 … x_L from the mark on."""
    tokens = rng.permuted(np.tile(np.arange(vocab), (n, 1)), axis=1)[:, :length]
    mark = np.full((n, 1), vocab)
    inputs = np.concatenate([tokens, mark, tokens[:, :-1]], axis=1)
    targets = np.full_like(inputs, IGNORED)
    targets[:, length:] = tokens
    return every_position(inputs, targets)


def copy_oracle(inputs: Int[Tensor, "n W"], vocab: int) -> Int[Tensor, "n W"]:
    """The targets, from the tokens alone: what stands as far behind as the mark does.

    With the mark at position L, position t >= L is answered by the token at t - L.
    """
    answers = torch.full_like(inputs, IGNORED)
    for row, tokens in enumerate(inputs.tolist()):
        gap = tokens.index(vocab)
        for t in range(gap, len(tokens)):
            answers[row, t] = tokens[t - gap]
    return answers


def recall_sequences(
    rng: np.random.Generator, n: int, length: int, vocab: int
) -> Split:
    """L pairs, then each of their keys once, every second position; see ``mqar``."""
    seed = int(rng.integers(2**31))
    sizes = {"seq_len": 4 * length, "n_pairs": length}
    return mqar(
        **sizes, n_keys=vocab, n_values=vocab, seed=seed, n_train=n, n_val=1
    ).train


def needle_sequences(
    rng: np.random.Generator, n: int, length: int, vocab: int
) -> Split:
    """L tokens of noise, among them a mark and its value; the mark again at the end."""
    inputs = np.full((n, length + 1), vocab)
    inputs[:, :length] = rng.integers(0, vocab, (n, length))
    rows, place = np.arange(n), rng.integers(0, length - 1, n)
    inputs[rows, place] = vocab
    return last_position(inputs, inputs[rows, place + 1])


def needle_oracle(inputs: Int[Tensor, "n W"], vocab: int) -> Int[Tensor, "n W"]:
    """The targets, from the tokens alone: what follows the first mark, at the end."""
    answers = torch.full_like(inputs, IGNORED)
    for row, tokens in enumerate(inputs.tolist()):
        answers[row, -1] = tokens[tokens.index(vocab) + 1]
    return answers


def arrangement_bits(length: int, vocab: int) -> float:
    """log2 of V (V - 1) … (V - L + 1): L distinct tokens in order."""
    return sum(math.log2(vocab - i) for i in range(length))


@dataclass(frozen=True)
class Task:
    """A task: its generator, what its length counts, and what must be kept.

    ``draw(rng, n, length, vocab) -> Split``; ``vocab_size(vocab)`` counts marks and,
    for recall, keys and values; ``content_bits(length, vocab)`` is the least that the
    answers hold.
    """

    unit: str
    draw: Callable[[np.random.Generator, int, int, int], Split]
    vocab_size: Callable[[int], int]
    content_bits: Callable[[int, int], float]
    shortest: int
    distinct: bool  # a sequence of length L needs L different tokens


TASKS: dict[str, Task] = {
    "copy": Task(
        "tokens to copy", copy_sequences, lambda V: V + 1, arrangement_bits, 1, True
    ),
    "recall": Task(
        "key-value pairs", recall_sequences, lambda V: 2 * V, arrangement_bits, 1, True
    ),
    "needle": Task(
        "tokens of noise",
        needle_sequences,
        lambda V: V + 1,
        lambda _, V: math.log2(V),
        2,
        False,
    ),
}


def find_task(name: str) -> Task:
    """The task called ``name``; InputError with the nearest name if there is none."""
    if name not in TASKS:
        near = nearest(name, TASKS)
        mend = f"did you mean {near}?" if near else "choose one of those"
        raise bad_input("task", name, f"one of {', '.join(TASKS)}", mend)
    return TASKS[name]


def check_lengths(name: str, lengths: Sequence[int], vocab: int) -> None:
    """Raise InputError for lengths or a vocabulary that the task ``name`` lacks."""
    task = find_task(name)
    check_integer("vocab", vocab, at_least=2, example=64)
    if vocab > LARGEST_VOCAB:
        raise bad_input("vocab", vocab, f"at most {LARGEST_VOCAB}", "lower it")
    check_increasing("lengths", lengths, at_least=task.shortest)
    if task.distinct and lengths[-1] > vocab:
        raise bad_input(
            "lengths",
            tuple(lengths),
            f"at most vocab = {vocab}, since the tokens of a sequence are distinct",
            "lower the lengths or raise vocab",
        )


@dataclass(frozen=True)
class Mixture:
    """Sequences of several lengths to train on, others to choose by, others to score.

    train and val hold equally many of each length, all padded to the width of the
    longest, in 16 bits; tests has sequences of each length by itself.
    """

    vocab_size: int
    train: Split
    val: Split
    tests: dict[int, Split]


def mixture(
    name: str,
    *,
    lengths: Sequence[int],
    vocab: int,
    seed: int,
    n_train: int,
    n_test: int,
) -> Mixture:
    """``n_train`` sequences of the task in all; ``n_test`` to score of each length.

    As many again to choose by. Each part of each length comes from a stream of its own.
    Raises InputError.
    """
    check_lengths(name, lengths, vocab)
    task, share = find_task(name), -(-n_train // len(lengths))

    def splits(part: str, n: int) -> dict[int, Split]:
        streams = {L: random_stream(seed, f"{name}/{part} {L}") for L in lengths}
        return {L: task.draw(rng, n, L, vocab) for L, rng in streams.items()}

    train, val = splits("train", share), splits("val", n_test)
    tests = splits("test", n_test)
    size = task.vocab_size(vocab)
    return Mixture(size, joined(list(train.values())), joined([*val.values()]), tests)


def joined(splits: Sequence[Split]) -> Split:
    """All rows, padded on the right with token 0, which is never scored there."""
    width = max(split.inputs.shape[1] for split in splits)

    def padded(tokens: Tensor, fill: int) -> Tensor:
        missing = width - tokens.shape[1]
        return functional.pad(tokens.to(torch.int16), (0, missing), value=fill)

    inputs = torch.cat([padded(split.inputs, 0) for split in splits])
    targets = torch.cat([padded(split.targets, IGNORED) for split in splits])
    return Split(inputs, targets)


def describe(name: str, lengths: Sequence[int], vocab: int) -> dict[str, Any]:
    """What the task asks for, as JSON values: content and guessing at each length."""
    task = find_task(name)
    return {
        "unit": task.unit,
        "content_bits": {str(L): task.content_bits(L, vocab) for L in lengths},
        "guess_accuracy": 1 / vocab,
    }
