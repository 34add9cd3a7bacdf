"""Word problems: x_1 x_2 … x_L in a finite group  ->  t_i = x_1 x_2 … x_i, at every i.

Merrill et al. 2024, "The Illusion of State in State-Space Models" (arXiv:2404.08819):
t_1 = x_1 and t_i = t_{i-1} x_i, the product as in ``data_dir.groups``. Over A5, which
is not solvable, the task is complete for NC^1 (Barrington 1989). No sequence occurs
twice in a file, so none that validates has been trained on. The published files hold
all 216,000 words of length 3 and a million of each greater length, in this format:

    <folder>/A5=12.csv      seed,input,target
                            0,17 3 59 …,17 22 8 …
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from data_dir._files import locked
from data_dir._word_csv import Rows, read_rows, refusal, write_rows
from data_dir.groups import Group, group
from experiments.common import (
    InputError,
    bad_input,
    check_integer,
    check_nonempty,
    random_stream,
)

FOLDER = "data_dir/illusion"
SAMPLES = 1_000_000
_LEAST = 100_000  # rows of a file that a loader writes
_AT_ONCE = 100_000  # words drawn at once, whatever is asked for
_NUMBERED = 1_600_000  # so many words are numbered, and their numbers shuffled

Array = np.ndarray


class Words(NamedTuple):
    """Sequences of group elements by number, and their running products."""

    inputs: Int32[Array, "n L"]
    targets: Int32[Array, "n L"]


@dataclass(frozen=True)
class WordTask:
    """A word problem in two parts that share no sequence.

    ``metadata`` holds JSON values: counts, the SHA-256 of the rows used, the seeds, and
    the accuracies to compare with: ``guess_accuracy`` (1 / n_elements) and
    ``first_only_accuracy``, over all positions, of copying the first and guessing on.
    """

    group: str
    length: int
    n_elements: int
    train: Words
    val: Words
    metadata: dict[str, Any]


@dataclass(frozen=True)
class WordOptions:
    """Which files to write.

    Args:
        group: a group: S, A or Z and a number, or a product such as S3xZ2
        length: elements in each sequence; one file for each length given
        samples: sequences in each file; fewer where fewer exist (3,600 of length 2)
        seed: of the sequences drawn
        out_dir: the folder of the files
        force: write anew what is there already
    """

    group: str = "A5"
    length: tuple[int, ...] = (12,)
    samples: int = SAMPLES
    seed: int = 0
    out_dir: str = FOLDER
    force: bool = False


def load_words(
    length: int,
    *,
    group: str = "A5",
    samples: int = SAMPLES,
    folder: str = FOLDER,
    train_split: float = 0.8,
    seed: int = 0,
) -> WordTask:
    """The first ``samples`` rows of ``<folder>/<group>=<length>.csv``, in two parts.

    seed: of the split alone. train_split: the share that trains; at 1 nothing is left
    to validate. A file that is not there is generated, with 100,000 rows if fewer are
    asked for, so that it serves later runs, too; one of ours that is too short is
    written anew, with the same rows first. Where the group has fewer words than asked
    for, all of them are taken. Raises InputError for a file that is damaged or wrong,
    and for another's that is shorter than asked for.
    """
    options = WordOptions(group, (length,), samples, out_dir=folder)
    _check(options)
    path = word_file(options, length)
    if not path.exists():
        generate_words(replace(options, samples=max(samples, _LEAST)))
    rows = _read(path, group, length)
    n = _count(options, length)
    if len(rows.inputs) < n:
        rows = _lengthened(path, rows, options)
    words = Words(rows.inputs[:n], rows.targets[:n])
    train, val = _split(words, train_split, random_stream(seed, "word_problem/split"))
    order = _order(group)
    metadata = {
        "samples": n,
        "capped": n < samples,
        "n_train": len(train.inputs),
        "n_val": len(val.inputs),
        "split_seed": seed,
        "data_seeds": rows.seeds,
        "sha256": _sha256(words),
        "guess_accuracy": 1 / order,
        "first_only_accuracy": (1 + (length - 1) / order) / length,
    }
    return WordTask(group, length, order, train, val, metadata)


def generate_words(options: WordOptions) -> list[str]:
    """Write the files of ``options``; return a line on each.

    A file that is what would be written stays. Raises InputError where another one
    stands in its place, unless ``force`` is given.
    """
    _check(options)
    return [_generate(options, length) for length in options.length]


def word_file(options: WordOptions, length: int) -> Path:
    """Where the words of one length lie."""
    return Path(options.out_dir) / f"{options.group}={length}.csv"


def draw_words(
    rng: np.random.Generator, order: int, length: int, samples: int
) -> Int32[Array, "n L"]:
    """``samples`` words of ``length`` numbers below ``order``, without replacement.

    Every word is as probable as any other, and fewer samples are the first of more:
    few words are numbered and their numbers shuffled, many are drawn in blocks of one
    size and the repetitions left out. (More than half of many are numbered, too.)
    """
    n_words = order**length
    if n_words <= max(_NUMBERED, 2 * samples):
        numbers = rng.permutation(n_words)[:samples, None]
        places = order ** np.arange(length)[::-1]
        return (numbers // places % order).astype(np.int32)
    words = np.empty((0, length), np.int32)
    while (missing := samples - len(words)) > 0:
        blocks = -(-missing // _AT_ONCE)
        more = rng.integers(0, order, (blocks * _AT_ONCE, length), dtype=np.int32)
        words = np.concatenate([words, more])
        words = words[_first_places(words)]
    return words[:samples]


def running_products(group: Group, inputs: Int32[Array, "n L"]) -> Int32[Array, "n L"]:
    """t_1 = x_1, t_i = t_{i-1} x_i."""
    targets = inputs.copy()
    for i in range(1, inputs.shape[1]):
        targets[:, i] = group.table[targets[:, i - 1], inputs[:, i]]
    return targets


def _check(options: WordOptions) -> None:
    _order(options.group)
    check_nonempty("length", options.length, "length = 12")
    for length in options.length:
        check_integer("length", length, at_least=1, example=12)
    check_integer("samples", options.samples, at_least=1, example=SAMPLES)
    check_integer("seed", options.seed, at_least=0, example=0)


def _order(name: str) -> int:
    return group(name).order


def _count(options: WordOptions, length: int) -> int:
    """As many sequences as are asked for, or as there are."""
    return min(options.samples, _order(options.group) ** length)


def _generate(options: WordOptions, length: int) -> str:
    path = word_file(options, length)
    with locked(path.parent):
        if path.exists() and not options.force:
            return _keep(path, options, length)
        words = _drawn(options, length)
        write_rows(path, options.seed, *words)
    n, asked = len(words.inputs), options.samples
    all_there_are = f", all that exist ({asked:,} were asked for)" * (n < asked)
    return f"{path}: {n:,} sequences{all_there_are}"


def _drawn(options: WordOptions, length: int) -> Words:
    """What belongs into the file of these options."""
    rng = random_stream(options.seed, f"word_problem/{options.group} {length}")
    n, elements = _count(options, length), group(options.group)
    inputs = draw_words(rng, elements.order, length, n)
    return Words(inputs, running_products(elements, inputs))


def _lengthened(path: Path, rows: Rows, options: WordOptions) -> Rows:
    """The rows of the file with as many as are asked for, if its own are ours."""
    length, held = rows.inputs.shape[1], len(rows.inputs)
    same_seed = replace(options, seed=max(0, rows.seeds[0]))
    words = _drawn(same_seed, length)
    if not np.array_equal(words.inputs[:held], rows.inputs):
        raise bad_input(
            "samples",
            options.samples,
            f"at most the {held:,} sequences of {path}, which is not one of ours",
            "lower samples, name another folder, or write the file anew with python "
            "data_dir/generate_a5_dataset.py --force",
        )
    with locked(path.parent):
        now = _read(path, options.group, length)  # another run may have been here
        if len(now.inputs) < len(words.inputs):
            write_rows(path, same_seed.seed, *words)
            return Rows([same_seed.seed], *words)
    return now


def _keep(path: Path, options: WordOptions, length: int) -> str:
    rows = _read(path, options.group, length)
    n, expected = len(rows.inputs), _count(options, length)
    if n != expected or rows.seeds != [options.seed]:
        raise InputError(
            f"{path}: holds {n:,} sequences of seed {_listed(rows.seeds)}; expected "
            f"{expected:,} of seed {options.seed}; write it anew with --force, or name "
            "another --out-dir"
        )
    return f"{path}: {n:,} sequences, there already"


def _listed(seeds: list[int], most: int = 3) -> str:
    return ", ".join(map(str, seeds[:most])) + " …" * (len(seeds) > most)


def _read(path: Path, name: str, length: int) -> Rows:
    """The rows of a file, each the right answer to a sequence not asked before."""
    elements = group(name)
    rows = read_rows(path, length=length, order=elements.order)
    wrong = rows.targets != running_products(elements, rows.inputs)
    if wrong.any():
        row, place = np.argwhere(wrong)[0].tolist()
        got = f"got {rows.targets[row, place]} as target {place + 1}"
        raise refusal(path, row, got, f"the product in {name} of the input up to there")
    repeated = np.setdiff1d(np.arange(len(wrong)), _first_places(rows.inputs))
    if repeated.size:
        again = int(repeated[0])
        first = int((rows.inputs == rows.inputs[again]).all(axis=1).argmax())
        got = f"the sequence of line {first + 2} once more"
        raise refusal(path, again, got, "each sequence once")
    return rows


def _first_places(words: Int32[Array, "n L"]) -> Array:
    """In increasing order the rows that equal none before them."""
    _, places = np.unique(_as_keys(words), return_index=True)
    return np.sort(places)


def _as_keys(words: Int32[Array, "n L"]) -> Array:
    """Each row as one value that can be compared; 16 bits hold any group's elements."""
    short = np.ascontiguousarray(words, np.uint16)
    return short.view(np.dtype((np.void, short.itemsize * short.shape[1]))).ravel()


def _split(
    words: Words, train_split: float, rng: np.random.Generator
) -> tuple[Words, Words]:
    n = len(words.inputs)
    n_train = round(train_split * n) if 0 < train_split <= 1 else 0
    if not n_train or (n_train == n and train_split < 1):
        raise bad_input(
            "train_split",
            train_split,
            f"a share above 0 and at most 1 that leaves some of {n:,} sequences to "
            "train and, below 1, some to validate",
            "try 0.8",
        )
    rows = rng.permutation(n)
    train, val = (
        Words(words.inputs[part], words.targets[part])
        for part in (rows[:n_train], rows[n_train:])
    )
    shared = np.isin(_as_keys(val.inputs), _as_keys(train.inputs))
    assert not shared.any(), "a sequence is in both splits"
    return train, val


def _sha256(arrays: Iterable[Array]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(array.astype("<i4").tobytes())
    return digest.hexdigest()
