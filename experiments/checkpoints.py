"""Checkpoints of a training run: whole or not there, the last two kept, no pickles.

    <folder>/checkpoint-00000157/model.safetensors
                                 optimizer.safetensors
                                 state.json      step, curve, settings, …, hashes

A checkpoint is written under a hidden name, flushed to the disk, and renamed; its
hashes (of the state, too) tell a whole one from one that was cut off or changed. What
the files hold is bytes here: ``ssm`` and ``lcde`` make them of tensors and of arrays.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments._inputs import InputError

KEPT = 2
_PREFIX, _PARTIAL = "checkpoint-", ".partial-"
_STATE = "state.json"
_SHOWN = 5  # differing settings named in an error
_DAMAGED = (OSError, ValueError, LookupError, TypeError, AttributeError)


@dataclass(frozen=True)
class Checkpoint:
    """What :func:`newest` read: the bytes of each file by its name, and the state."""

    path: Path
    files: dict[str, bytes]
    state: dict[str, Any]


def write(
    folder: Path, step: int, files: Mapping[str, bytes], state: Mapping[str, Any]
) -> Path:
    """Store the files and ``state`` (JSON values) as the checkpoint of ``step``.

    Raises InputError where the disk does not take it; the checkpoints before stand.
    """
    final = folder / f"{_PREFIX}{step:08d}"
    partial = folder / f"{_PARTIAL}{final.name}.{os.getpid()}"
    for left in folder.glob(f"{_PARTIAL}*"):  # by a writer that was killed
        shutil.rmtree(left, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        _fill(partial, files, state)
        shutil.rmtree(final, ignore_errors=True)  # of a run that was started anew
        partial.rename(final)
    except OSError as error:
        raise InputError(
            f"checkpoint: {final} cannot be written ({error.strerror or error}); "
            "expected a writable folder with room on its disk; the checkpoint before "
            "stands: make room and resume"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    paths = _paths(folder)
    here = paths.index(final)
    kept = paths[max(0, here + 1 - KEPT) : here + 1]  # beyond: a run begun earlier
    for old in {*paths} - {*kept}:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _fill(partial: Path, files: Mapping[str, bytes], state: Mapping[str, Any]) -> None:
    hashes = {_STATE: _hash_of_state(state)}
    for name, data in files.items():
        hashes[name] = hashlib.sha256(data).hexdigest()
        _store(partial / name, data)
    text = json.dumps({**state, "sha256": hashes}, allow_nan=False, indent=1)
    _store(partial / _STATE, text.encode())


def _hash_of_state(state: Mapping[str, Any]) -> str:
    text = json.dumps(dict(state), allow_nan=False, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _store(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The last whole checkpoint (None: there is none), and what to say of damaged ones.

    Raises InputError if there are checkpoints and none is whole.
    """
    notices: list[str] = []
    paths = _paths(folder)
    for path in reversed(paths):
        try:
            return _read(path), notices
        except _DAMAGED as error:
            notices.append(
                f"{path} is damaged ({error}); falling back to the one before"
            )
    if paths:
        raise InputError(
            f"resume: no checkpoint in {folder} is whole; expected at least one; "
            "remove that folder to start anew"
        )
    return None, notices


def _paths(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{_PREFIX}*"))


def _read(path: Path) -> Checkpoint:
    state = json.loads((path / _STATE).read_text(encoding="utf-8"))
    files, hashes = {}, state.pop("sha256")
    if _hash_of_state(state) != hashes.pop(_STATE):
        raise ValueError(f"{_STATE} is not what was written")
    for name, expected in hashes.items():
        files[name] = (path / name).read_bytes()
        if hashlib.sha256(files[name]).hexdigest() != expected:
            raise ValueError(f"{name} is not what was written")
    return Checkpoint(path, files, state)


def check_settings(
    path: Path, before: Mapping[str, Any], settings: Mapping[str, Any]
) -> None:
    """Raise InputError, listing them, if settings differ from those ``before``."""
    now = json.loads(json.dumps(dict(settings)))
    differing = [
        f"{key}: {before.get(key, 'absent')!r} then, {now.get(key, 'absent')!r} now"
        for key in sorted({*before, *now})
        if before.get(key, "absent") != now.get(key, "absent")
    ]
    if differing:
        more = f" and {len(differing) - _SHOWN} more" * (len(differing) > _SHOWN)
        raise InputError(
            f"resume: got other settings than those of {path} "
            f"({'; '.join(differing[:_SHOWN])}{more}); expected the same; restore "
            "them, or start anew in another folder"
        )


def check_arrays(
    path: Path,
    found: Mapping[str, Iterable[int]],
    wanted: Mapping[str, Iterable[int]],
) -> None:
    """Raise InputError unless a checkpoint has the arrays, name -> shape, wanted."""
    there, here = (
        {f"{name} {tuple(shape)}" for name, shape in shapes.items()}
        for shapes in (found, wanted)
    )
    if there != here:
        raise InputError(
            f"resume: {path} lacks {sorted(here - there)[:3]} and has "
            f"{sorted(there - here)[:3]} beyond this model's arrays; expected a "
            "checkpoint of the same model; name its folder"
        )
