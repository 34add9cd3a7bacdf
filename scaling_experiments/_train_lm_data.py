"""WikiText-2 in GPT-2's tokens, cut into windows, and what the unigram reaches there.

A window is ``seq_len`` consecutive tokens of one split, its targets the tokens one
further on. Windows follow each other without overlap; a tail too short for one is left
out. The tokens are those of the whole text in one piece.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from data_dir._corpora import END_OF_LINE
from data_dir._tokens import every_position
from data_dir.task import Split, TokenTask
from data_dir.text import read_corpus
from experiments.common import InputError, bad_input, check_integer

Tokens = Int64[np.ndarray, " T"]

_LOGGERS = ("huggingface_hub", "transformers")


def wikitext2_task(
    tokenizer: Any, *, seq_len: int, val_max_samples: int, data_dir: str
) -> TokenTask:
    """Next token at every position of WikiText-2; see the module.

    tokenizer: of ``transformers`` (:func:`load_tokenizer`). val_max_samples: windows to
    validate on, spread evenly over the text; 0 for all. data_dir: a folder with the
    text files, or "" for the Hub. The metadata name the splits that train and validate,
    and what can be had without context on exactly the targets that validate: by the
    training text's unigram, and at best. Raises InputError.
    """
    check_integer("seq_len", seq_len, at_least=1, example=128)
    check_integer("val_max_samples", val_max_samples, at_least=0, example=0)
    corpus = read_corpus("wikitext2", data_dir)
    train_tokens = encode(tokenizer, text_of(corpus.train))
    val_tokens = encode(tokenizer, text_of(corpus.val))
    train = windows(train_tokens, seq_len, "the training text")
    val = windows(val_tokens, seq_len, "the validation text")
    there = len(val.inputs)
    if 0 < val_max_samples < there:
        rows = np.arange(val_max_samples) * there // val_max_samples
        val = Split(val.inputs[rows], val.targets[rows])
    vocab_size = len(tokenizer)
    scored = val.targets.numpy().ravel()
    metadata = {
        "seq_len": seq_len,
        "vocab_size": vocab_size,
        "corpus": corpus.metadata,
        "train": {"n_tokens": len(train_tokens), "n_windows": len(train.inputs)},
        "val": {"n_tokens": len(val_tokens), "n_windows": len(val.inputs)},
        "n_val_targets": len(scored),
        "unigram_loss": unigram_loss(train_tokens, scored, vocab_size),
        "val_entropy": entropy(scored),
    }
    return TokenTask("wikitext2", vocab_size, train, val, False, metadata)


def text_of(words: Sequence[str]) -> str:
    """The text that ``read_corpus`` read as ``words``, in WikiText's own spelling.

    A line is its words with one space before each, then a space and a line break; an
    empty one is a space and a line break. On WikiText-2 that is the file, bit for bit.
    """
    breaks = " \n"
    return "".join(breaks if word == END_OF_LINE else f" {word}" for word in words)


def encode(tokenizer: Any, text: str) -> Tokens:
    """The tokens of ``text``; none is added to it, and it may be of any length."""
    found = tokenizer(text, add_special_tokens=False, verbose=False)
    return np.asarray(found["input_ids"], dtype=np.int64)


def windows(tokens: Tokens, seq_len: int, text: str) -> Split:
    """inputs x[i L … i L + L - 1] and targets one token on, for every i that fits."""
    n = (len(tokens) - 1) // seq_len
    if n < 1:
        raise bad_input(
            text,
            len(tokens),
            f"at least {seq_len + 1} tokens (seq_len + 1)",
            "give a longer text or lower seq_len",
        )
    end = n * seq_len
    inputs, targets = tokens[:end], tokens[1 : end + 1]
    return every_position(inputs.reshape(n, -1), targets.reshape(n, -1))


def unigram_loss(
    train: Tokens, targets: Int64[np.ndarray, " n"], vocab_size: int
) -> float:
    """Mean of -log p(w) over ``targets``, p(w) = (count of w in train + 1) / (T + V).

    In nats. What a model reaches that knows how frequent tokens are and nothing else.
    """
    counts = np.bincount(train, minlength=vocab_size)
    log_p = np.log(counts + 1) - math.log(len(train) + vocab_size)
    return float(-log_p[targets].mean())


def entropy(targets: Int64[np.ndarray, " n"]) -> float:
    """-sum_w f(w) log f(w), f the frequencies in ``targets`` themselves; in nats.

    No predictor that ignores the context is below it there, however it is smoothed.
    """
    counts = np.unique(targets, return_counts=True)[1]
    f = counts / counts.sum()
    return float(-(f * np.log(f)).sum())


def load_tokenizer(name: str) -> Any:
    """The tokenizer in the folder ``name``, or so called in the cache or on the Hub.

    Raises InputError where it cannot be had, with what to do about it.
    """
    from transformers import AutoTokenizer

    with _quiet():
        try:  # without asking the Hub whether what is cached is the newest
            return AutoTokenizer.from_pretrained(name, local_files_only=True)
        except _NOT_THERE as error:
            if Path(name).is_dir():
                raise _missing(name, "the folder holds no tokenizer", error) from None
        try:
            return AutoTokenizer.from_pretrained(name)
        except _NOT_THERE as error:
            where = (
                "it is no folder, and neither in the cache nor to be had from the Hub"
            )
            raise _missing(name, where, error) from None


_NOT_THERE = (OSError, ValueError, KeyError, ImportError)


def _missing(name: str, where: str, error: Exception) -> InputError:
    reason = str(error).strip().partition("\n")[0]
    return InputError(
        f"tokenizer: got {name!r}; {where} ({reason}); give a folder with "
        "tokenizer.json by --tokenizer FOLDER, or run once with internet"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the Hub's warning for each attempt: the last failure is what is told."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
