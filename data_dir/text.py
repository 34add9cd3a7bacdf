"""Language modelling by word: windows of a corpus, and what the unigram reaches there.

A window is seq_len + 1 consecutive words of one split, so none crosses a split. The
vocabulary holds ``<unk>`` and the most frequent words of the training text alone.

    objective "last":   x[0 … L-1] -> x[L], at the last position only
    objective "every":  x[0 … L-1] -> x[1 … L], at every position

Where a split has more windows than asked for, the seed draws the training ones, and the
validation ones are spread evenly, the same for every seed, so that seeds are compared
on the same targets. The unigram baseline gives a word the frequency it has in the
training text, one added to each count; its loss (nats) and accuracy are taken on
exactly the validation targets that are scored.
"""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from data_dir._corpora import Corpus, read_corpus
from data_dir._tokens import every_position, last_position
from data_dir.task import IGNORED, Split, TokenTask
from experiments.common import bad_input, check_integer, random_stream

__all__ = ["Corpus", "read_corpus", "text_task", "vocabulary", "window_stride"]

UNKNOWN = "<unk>"  # WikiText's own "<unk>" is the same word
UNKNOWN_TOKEN = 0

Array = np.ndarray
Windows = Int64[Array, "n width"]  # width = L + 1
Pick = Callable[[int, int], Int64[Array, " n"]]  # (number there, most) -> which ones


class _Cut(NamedTuple):
    seq_len: int
    stride: int  # 0: as `window_stride` says


def text_task(
    name: str,
    *,
    seq_len: int,
    max_vocab: int,
    train_max_samples: int,
    val_max_samples: int,
    seed: int,
    stride: int = 0,
    objective: str = "last",
    data_dir: str = "",
) -> TokenTask:
    """Windows of the corpus ``name`` as a task, with what a unigram reaches on them.

    max_vocab: tokens at most, ``<unk>`` included. stride: words from the start of one
    window to the next; 0 gives each split the stride of ``window_stride``. The metadata
    name texts, vocabulary, strides and counts. Raises InputError for an unknown name or
    objective, a text that cannot be had, or one shorter than a window.
    """
    _check_sizes(seq_len, max_vocab, stride, train_max_samples, val_max_samples)
    arrange = _arrangement(objective)
    corpus = read_corpus(name, data_dir)
    token_of = vocabulary(corpus.train, max_vocab)
    cut = _Cut(seq_len, stride)
    train_tokens = _encode(corpus.train, token_of)
    val_tokens = _encode(corpus.val, token_of)
    train_windows, train_facts = _windows(
        train_tokens, cut, train_max_samples, _drawn(seed), f"{name}, training text"
    )
    val_windows, val_facts = _windows(
        val_tokens, cut, val_max_samples, _spread, f"{name}, validation text"
    )
    train, val = arrange(train_windows), arrange(val_windows)
    metadata = {
        "seq_len": seq_len,
        "seed": seed,
        "objective": objective,
        "max_vocab": max_vocab,
        "vocab_size": len(token_of),
        "corpus": corpus.metadata,
        "train": train_facts,
        "val": val_facts,
        **_unigram(train_tokens, val, len(token_of)),
    }
    last_only = objective == "last"
    return TokenTask(name, len(token_of), train, val, last_only, metadata)


def _check_sizes(
    seq_len: int, max_vocab: int, stride: int, n_train: int, n_val: int
) -> None:
    check_integer("seq_len", seq_len, at_least=1, example=128)
    check_integer("max_vocab", max_vocab, at_least=2, example=20_000)
    check_integer("stride", stride, at_least=0, example=0)
    check_integer("train_max_samples", n_train, at_least=1, example=10_000)
    check_integer("val_max_samples", n_val, at_least=1, example=2_000)


def vocabulary(words: list[str], max_vocab: int) -> dict[str, int]:
    """Word -> token: ``<unk>`` is 0, then the most frequent words, ties by word."""
    counts = Counter(words)
    counts.pop(UNKNOWN, None)
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    return {word: i for i, word in enumerate([UNKNOWN, *ranked[: max_vocab - 1]])}


def window_stride(n_words: int, seq_len: int, max_samples: int) -> int:
    """The largest stride, 1 to seq_len, at which ``max_samples`` windows fit.

    n windows of L + 1 words at stride s need (n - 1) s + L + 1 words. So there are no
    holes between windows, and they overlap only as far as the number asked for takes;
    where stride 1 does not yield as many, there are fewer.
    """
    if max_samples == 1:
        return seq_len
    return min(max((n_words - seq_len - 1) // (max_samples - 1), 1), seq_len)


def _encode(words: list[str], token_of: dict[str, int]) -> Int64[Array, " T"]:
    tokens = (token_of.get(word, UNKNOWN_TOKEN) for word in words)
    return np.fromiter(tokens, np.int64, len(words))


def _windows(
    tokens: Int64[Array, " T"], cut: _Cut, max_samples: int, pick: Pick, text: str
) -> tuple[Windows, dict[str, Any]]:
    """The windows of one split in the order of the text, and how they were cut."""
    width = cut.seq_len + 1
    if len(tokens) < width:
        raise bad_input(
            text,
            len(tokens),
            f"at least {width} words, <eos> of each line included (seq_len + 1)",
            "give a longer text or lower seq_len",
        )
    stride = cut.stride or window_stride(len(tokens), cut.seq_len, max_samples)
    starts = np.arange(0, len(tokens) - width + 1, stride)
    chosen = starts
    if len(starts) > max_samples:
        chosen = starts[pick(len(starts), max_samples)]
    facts = {
        "n_words": len(tokens),
        "unknown_share": (tokens == UNKNOWN_TOKEN).mean().item(),
        "max_samples": max_samples,
        "stride": stride,
        "n_windows": len(chosen),
        "n_windows_at_stride": len(starts),
    }
    return tokens[chosen[:, None] + np.arange(width)], facts


def _drawn(seed: int) -> Pick:
    """A random choice without repetition, in the order of the text."""
    rng = random_stream(seed, "text/train windows")
    return lambda there, most: np.sort(rng.choice(there, most, replace=False))


def _spread(there: int, most: int) -> Int64[Array, " n"]:
    """Evenly over the whole text, the first window included."""
    return np.arange(most) * there // most


def _last(windows: Windows) -> Split:
    return last_position(windows[:, :-1], windows[:, -1])


def _every(windows: Windows) -> Split:
    return every_position(windows[:, :-1], windows[:, 1:])


_OBJECTIVES = {"last": _last, "every": _every}


def _arrangement(objective: str) -> Callable[[Windows], Split]:
    if objective not in _OBJECTIVES:
        known = " or ".join(_OBJECTIVES)
        raise bad_input("objective", objective, known, "choose one of these")
    return _OBJECTIVES[objective]


def _unigram(
    train: Int64[Array, " T"], val: Split, vocab_size: int
) -> dict[str, float | int]:
    """log p(w) = log (count + 1) / (T + V), on the targets that ``val`` scores."""
    targets = val.targets[val.targets != IGNORED].numpy()
    counts = np.bincount(train, minlength=vocab_size)
    log_p = np.log(counts + 1) - math.log(len(train) + vocab_size)
    return {
        "n_val_targets": len(targets),
        "unigram_loss": -log_p[targets].mean().item(),
        "unigram_accuracy": (targets == counts.argmax()).mean().item(),
    }
