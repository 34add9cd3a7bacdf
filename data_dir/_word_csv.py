"""The file of a word problem: ``seed,input,target``, a sequence and its answers a line.

    seed,input,target
    0,17 3 59,17 22 8

The format of the published files (Merrill et al. 2024, arXiv:2404.08819).
"""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from data_dir._files import written_whole
from experiments.common import InputError, track

HEADER = "seed,input,target"
_ROWS_AT_ONCE = 2_000

Numbers = Int32[np.ndarray, "n L"]


class Rows(NamedTuple):
    """The lines of a file; ``seeds`` are those that occur in its first column."""

    seeds: list[int]
    inputs: Numbers
    targets: Numbers


def write_rows(path: Path, seed: int, inputs: Numbers, targets: Numbers) -> None:
    """Write the file, whole or not at all; the folder must be locked."""
    names = [str(i) for i in range(max(inputs.max(), targets.max()) + 1)]

    def text(numbers: list[int]) -> str:
        return " ".join([names[number] for number in numbers])

    with (
        written_whole(path) as (partial,),
        open(partial, "w", encoding="utf-8", newline="\n") as file,
    ):
        file.write(f"{HEADER}\n")
        for start in track(range(0, len(inputs), _ROWS_AT_ONCE), f"writing {path}"):
            rows = slice(start, start + _ROWS_AT_ONCE)
            pairs = zip(inputs[rows].tolist(), targets[rows].tolist(), strict=True)
            file.writelines(f"{seed},{text(x)},{text(y)}\n" for x, y in pairs)


def read_rows(path: Path, *, length: int, order: int) -> Rows:
    """Every row of a file whose words have ``length`` elements of a group of ``order``.

    Raises InputError with file and line for whatever else stands there.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    header, *lines = text.split("\n")
    if header != HEADER:
        raise refusal(path, -1, f"got {header[:60]!r}", f"the header {HEADER}")
    if not text.endswith("\n"):
        torn = text.count("\n") - 1
        raise refusal(path, torn, "torn: no newline ends it", "a whole line")
    lines.pop()  # the nothing behind the last newline
    if not lines:
        raise refusal(path, -1, "no row behind the header", "at least one")
    fields = [line.split(",") for line in lines]
    for row, found in enumerate(fields):
        if len(found) != 3:
            raise refusal(path, row, f"got {len(found)} columns", "3, as in the header")
    seeds, inputs, targets = zip(*fields, strict=True)
    return Rows(
        _seeds(path, seeds),
        _numbers(path, "input", inputs, (length, order)),
        _numbers(path, "target", targets, (length, order)),
    )


def refusal(path: Path, row: int, got: str, expected: str) -> InputError:
    """The error for a row, counted from 0 behind the header."""
    return InputError(
        f"{path}:{row + 2}: {got}; expected {expected}; mend that line, or write the "
        "file anew with python data_dir/generate_a5_dataset.py --force"
    )


def _seeds(path: Path, column: tuple[str, ...]) -> list[int]:
    found = set(column)
    for text in found:
        if not re.fullmatch(r"-?[0-9]{1,20}", text):
            raise refusal(path, column.index(text), f"got seed {text!r}", "an integer")
    return sorted(int(text) for text in found)


def _numbers(
    path: Path, name: str, column: tuple[str, ...], shape: tuple[int, int]
) -> Numbers:
    """The column's words as numbers below the group's order, -1 for nothing known."""
    length, order = shape
    for row, text in enumerate(column):
        if text.count(" ") != length - 1:
            got = f"got {len(text.split())} elements in {name}"
            raise refusal(path, row, got, f"{length}, separated by single spaces")
    number_of = {str(i): i for i in range(order)}
    tokens = " ".join(column).split(" ")
    found = (number_of.get(token, -1) for token in tokens)
    numbers = np.fromiter(found, np.int32, len(tokens)).reshape(-1, length)
    if (unknown := numbers < 0).any():
        row, place = np.argwhere(unknown)[0].tolist()
        got = f"got {tokens[row * length + place]!r} as {name} {place + 1}"
        raise refusal(path, row, got, f"an element from 0 to {order - 1}")
    return numbers
