"""Single-pair recall: … k v … k  ->  v, at the last position.

One key k and its value v stand side by side at a random place; the last token is k
again, and v is asked for. With L tokens and the value at position p_v,

    1 <= p_v <= L - 1 - gap,    p_v uniform,

so that at least ``gap`` steps lie between the value and the query. Every other token
is a distractor, drawn uniformly from the values and the noise tokens and never from
the keys: a value token by itself says nothing, only the key before it does. No second
key appears either, so the pair can be found by its key's being a key, without comparing
it with the query; ``data_dir.mqar`` is the task that needs the comparison.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int, Int64
from torch import Tensor

from data_dir._tokens import last_position
from data_dir.task import TokenTask
from experiments.common import bad_input, check_integer, random_stream

NAME = "recall"
N_KEYS = 8
N_NOISE = 32

Array = np.ndarray


class _Shape(NamedTuple):
    """Tokens are numbered keys, values, noise."""

    seq_len: int
    gap: int
    n_values: int

    @property
    def vocab_size(self) -> int:
        return N_KEYS + self.n_values + N_NOISE


class _Draw(NamedTuple):
    inputs: Int64[Array, "n L"]
    answers: Int64[Array, " n"]


def recall(
    *,
    seq_len: int,
    gap: int,
    seed: int,
    n_train: int = 10_000,
    n_val: int = 2_000,
    n_values: int = 32,
) -> TokenTask:
    """Sequences of ``seq_len`` tokens that end with the key whose value is asked for.

    The metadata hold what a model that has not learnt the task can reach on the
    validation split: ``guess_accuracy`` (1 / n_values), ``fixed_lag_accuracy`` (always
    the token that stands ``fixed_lag`` steps back, the lag chosen on the training
    split), and ``most_frequent_value_accuracy`` (the value seen most often, the best
    that a bag of tokens can do: above guessing, since the answer itself is counted).
    Raises InputError where ``seq_len`` leaves no place for the pair.
    """
    check_integer("gap", gap, at_least=1, example=8)
    check_integer("n_train", n_train, at_least=1, example=10_000)
    check_integer("n_val", n_val, at_least=1, example=2_000)
    check_integer("n_values", n_values, at_least=2, example=32)
    if seq_len < gap + 2:
        raise bad_input(
            "seq_len",
            seq_len,
            f"at least {gap + 2} (key, value, and the query {gap} steps later)",
            f"raise seq_len, or lower gap from {gap}",
        )
    shape = _Shape(seq_len, gap, n_values)
    train = _draw(random_stream(seed, "recall/train"), n_train, shape)
    val = _draw(random_stream(seed, "recall/val"), n_val, shape)
    lag = _best_lag(train)
    metadata = {
        **shape._asdict(),
        "seed": seed,
        "n_train": n_train,
        "n_val": n_val,
        "n_keys": N_KEYS,
        "n_noise": N_NOISE,
        "guess_accuracy": 1 / n_values,
        "fixed_lag": lag,
        "fixed_lag_accuracy": _lag_hits(val)[lag - 1].item(),
        "most_frequent_value_accuracy": _most_frequent_value_accuracy(val, shape),
    }
    splits = last_position(*train), last_position(*val)
    return TokenTask(NAME, shape.vocab_size, *splits, last_only=True, metadata=metadata)


def recall_oracle(inputs: Int[Tensor, "n L"]) -> Int[Tensor, " n"]:
    """The answers, from the tokens alone: what follows the query's other occurrence.

    Raises ValueError where a sequence does not have exactly one such place.
    """
    answers = []
    for tokens in inputs.tolist():
        *context, query = tokens
        if context[:-1].count(query) != 1 or context[-1] == query:
            raise ValueError(
                f"token {query} is asked for: expected it once before, and a value "
                f"behind it; got it {context.count(query)} times"
            )
        answers.append(context[context.index(query) + 1])
    return torch.tensor(answers, dtype=inputs.dtype)


def _draw(rng: np.random.Generator, n: int, shape: _Shape) -> _Draw:
    L, gap, n_values = shape
    inputs = rng.integers(N_KEYS, shape.vocab_size, (n, L))
    keys = rng.integers(0, N_KEYS, n)
    answers = rng.integers(N_KEYS, N_KEYS + n_values, n)
    p_v = rng.integers(1, L - gap, n)
    rows = np.arange(n)
    inputs[rows, p_v - 1] = inputs[:, -1] = keys
    inputs[rows, p_v] = answers
    return _Draw(inputs, answers)


def _lag_hits(draw: _Draw) -> Array:
    """Entry k - 1: the share of sequences whose token x[L-1-k] is the answer."""
    return (draw.inputs[:, -2::-1] == draw.answers[:, None]).mean(axis=0)


def _best_lag(draw: _Draw) -> int:
    return int(_lag_hits(draw).argmax()) + 1


def _most_frequent_value_accuracy(draw: _Draw, shape: _Shape) -> float:
    """How often the value token that a sequence shows most often is its answer."""
    n, vocab_size = len(draw.answers), shape.vocab_size
    numbered = draw.inputs + vocab_size * np.arange(n)[:, None]
    counts = np.bincount(numbered.ravel(), minlength=n * vocab_size)
    values = counts.reshape(n, vocab_size)[:, N_KEYS : N_KEYS + shape.n_values]
    return (values.argmax(axis=1) + N_KEYS == draw.answers).mean().item()
