"""The file of a word problem: ``seed,input,target``, a sequence and its answers a line.

    seed,input,target
    0,17 3 59,17 22 8

The format of the published files (Merrill et al. 2024, arXiv:2404.08819).
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from data_dir._files import written_whole
from experiments.common import InputError, track

HEADER = "seed,input,target"
_ROWS_AT_ONCE = 2_000
_BYTES_AT_ONCE = 4_000_000
_SEED = re.compile("-?[0-9]{1,20}")

Numbers = Int32[np.ndarray, "n L"]


class Rows(NamedTuple):
    """The lines of a file; ``seeds`` are those that occur in its first column."""

    seeds: list[int]
    inputs: Numbers
    targets: Numbers


def write_rows(path: Path, seed: int, inputs: Numbers, targets: Numbers) -> None:
    """Write the file, whole or not at all; the folder must be locked."""
    names = [str(i) for i in range(max(inputs.max(), targets.max()) + 1)]

    with (
        written_whole(path) as (partial,),
        open(partial, "w", encoding="utf-8", newline="\n") as file,
    ):
        file.write(f"{HEADER}\n")
        for start in track(range(0, len(inputs), _ROWS_AT_ONCE), f"writing {path}"):
            rows = slice(start, start + _ROWS_AT_ONCE)
            pairs = zip(inputs[rows].tolist(), targets[rows].tolist(), strict=True)
            texts = ([" ".join([names[i] for i in w]) for w in pair] for pair in pairs)
            file.writelines(f"{seed},{x},{y}\n" for x, y in texts)


def read_rows(path: Path, *, length: int, order: int) -> Rows:
    """Every row of a file whose words have ``length`` elements of a group of ``order``.

    Raises InputError with file and line for whatever else stands there.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if b"\r" in raw:
        raw = raw.replace(b"\r\n", b"\n")
    head, _, body = raw.partition(b"\n")
    if head != HEADER.encode():
        got = f"got {head.decode(errors='replace')[:60]!r}"
        raise refusal(path, -1, got, f"the header {HEADER}")
    if not raw.endswith(b"\n"):
        torn = raw.count(b"\n") - 1
        raise refusal(path, torn, "torn: no newline ends it", "a whole line")
    if not body:
        raise refusal(path, -1, "no row behind the header", "at least one")
    seeds, parts = set[bytes](), []
    for block in _blocks(body):
        found = _numbers(block, length, order)
        if found is None:
            raise _fault(path, body, length, order)
        seeds |= found[0]
        parts.append(found[1])
    if not all(_SEED.fullmatch(seed.decode()) for seed in seeds):
        raise _fault(path, body, length, order)
    inputs, targets = np.concatenate(parts, axis=1)
    return Rows(sorted(map(int, seeds)), inputs, targets)


def _blocks(body: bytes) -> Iterator[bytes]:
    """Whole lines, some megabytes at once."""
    start = 0
    while start < len(body):
        end = body.find(b"\n", start + _BYTES_AT_ONCE) + 1 or len(body)
        yield body[start:end]
        start = end


def _numbers(
    block: bytes, length: int, order: int
) -> tuple[set[bytes], Int32[np.ndarray, "2 n L"]] | None:
    """The seeds and the words of lines; None unless all of them are as they should."""
    data = np.frombuffer(block, np.uint8)
    digit = data - ord("0")  # above 9 for every other character
    stops = np.flatnonzero((digit > 9) & (data != ord("-")))  # of the numbers
    line = f",{' ' * (length - 1)},{' ' * (length - 1)}\n".encode()
    if stops.size % len(line):
        return None
    ends = stops.reshape(-1, len(line))
    if (data[ends] != np.frombuffer(line, np.uint8)).any():
        return None
    starts = np.concatenate([[0], stops[:-1] + 1]).reshape(ends.shape)
    seeds = {block[i:j] for i, j in zip(starts[:, 0], ends[:, 0], strict=True)}
    starts, ends = starts[:, 1:], ends[:, 1:]
    widths, most = ends - starts, len(str(order - 1))
    padded_by_0 = (digit[starts] == 0) & (widths > 1)
    if ((widths < 1) | (widths > most) | padded_by_0).any():
        return None
    numbers = np.zeros(ends.shape, np.int32)
    for place in range(most):
        there = widths > place
        digits = np.where(there, digit[ends - 1 - place], 0)
        if (digits > 9).any():
            return None
        numbers += digits * np.int32(10**place)
    if (numbers >= order).any():
        return None
    return seeds, numbers.reshape(-1, 2, length).swapaxes(0, 1)


def refusal(path: Path, row: int, got: str, expected: str) -> InputError:
    """The error for a row, counted from 0 behind the header."""
    return InputError(
        f"{path}:{row + 2}: {got}; expected {expected}; mend that line, or write the "
        "file anew with python data_dir/generate_a5_dataset.py --force"
    )


def _fault(path: Path, body: bytes, length: int, order: int) -> InputError:
    """The error for the first line that is not as it should be."""
    numbers = {str(i) for i in range(order)}
    for row, line in enumerate(body.decode(errors="replace").split("\n")):
        fields = line.split(",")
        if len(fields) != 3:
            got = f"got {len(fields)} columns"
            return refusal(path, row, got, "3, as in the header")
        if not _SEED.fullmatch(fields[0]):
            return refusal(path, row, f"got seed {fields[0]!r}", "an integer")
        for name, text in zip(("input", "target"), fields[1:], strict=True):
            tokens = text.split(" ")
            if len(tokens) != length:
                got = f"got {len(text.split())} elements in {name}"
                expected = f"{length}, separated by single spaces"
                return refusal(path, row, got, expected)
            for place, token in enumerate(tokens, start=1):
                if token not in numbers:
                    got = f"got {token!r} as {name} {place}"
                    expected = f"an element from 0 to {order - 1}"
                    return refusal(path, row, got, expected)
    raise AssertionError(f"{path} is as it should be")
