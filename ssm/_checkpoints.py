"""Checkpoints of a training run: whole or not there, the last two kept, no pickles.

    <folder>/checkpoint-00000157/model.safetensors
                                 optimizer.safetensors
                                 state.json      step, epoch, curve, settings, hashes

A checkpoint is written under a hidden name, flushed to the disk, and renamed; its
hashes (of the state, too) tell a whole one from one that was cut off or changed.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ssm._errors import ArgumentError

KEPT = 2
_PREFIX, _PARTIAL = "checkpoint-", ".partial-"
_STATE = "state.json"
_SHOWN = 5  # differing settings named in an error
_DAMAGED = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    SafetensorError,
)

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """What :func:`newest` read: tensors by file, and the state."""

    path: Path
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def write(folder: Path, step: int, files: Mapping[str, Tensors], state: Any) -> Path:
    """Store the tensors of each file and ``state`` as the checkpoint of ``step``.

    Raises ArgumentError where the disk does not take it; the checkpoints before stand.
    """
    final = folder / f"{_PREFIX}{step:08d}"
    partial = folder / f"{_PARTIAL}{final.name}.{os.getpid()}"
    for left in folder.glob(f"{_PARTIAL}*"):  # by a writer that was killed
        shutil.rmtree(left, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        hashes = {_STATE: _hash_of_state(state)}
        for name, tensors in files.items():
            data = save({n: _own_copy(x) for n, x in tensors.items()})
            hashes[name] = hashlib.sha256(data).hexdigest()
            _store(partial / f"{name}.safetensors", data)
        text = json.dumps({**state, "sha256": hashes}, allow_nan=False, indent=1)
        _store(partial / _STATE, text.encode())
        shutil.rmtree(final, ignore_errors=True)  # of a run that was started anew
        partial.rename(final)
    except OSError as error:
        raise ArgumentError(
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


def _own_copy(tensor: Tensor) -> Tensor:
    """Contiguous, in memory of its own: tied parameters may not be stored as one."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _hash_of_state(state: Mapping[str, Any]) -> str:
    text = json.dumps(state, allow_nan=False, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _store(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The last whole checkpoint (None: there is none), and what to say of damaged ones.

    Raises ArgumentError if there are checkpoints and none is whole.
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
        raise ArgumentError(
            f"resume: no checkpoint in {folder} is whole; expected at least one; "
            "remove that folder to start anew"
        )
    return None, notices


def _paths(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{_PREFIX}*"))


def _read(path: Path) -> Checkpoint:
    state = json.loads((path / _STATE).read_text(encoding="utf-8"))
    tensors, hashes = {}, state.pop("sha256")
    if _hash_of_state(state) != hashes.pop(_STATE):
        raise ValueError(f"{_STATE} is not what was written")
    for name, expected in hashes.items():
        data = (path / f"{name}.safetensors").read_bytes()
        if hashlib.sha256(data).hexdigest() != expected:
            raise ValueError(f"{name}.safetensors is not what was written")
        tensors[name] = load(data)
    return Checkpoint(path, tensors, state)


def check_settings(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> None:
    """Raise ArgumentError, listing them, if settings differ from the checkpoint's."""
    before: dict[str, Any] = checkpoint.state["settings"]
    now = json.loads(json.dumps(dict(settings)))
    differing = [
        f"{key}: {before.get(key, 'absent')!r} then, {now.get(key, 'absent')!r} now"
        for key in sorted({*before, *now})
        if before.get(key, "absent") != now.get(key, "absent")
    ]
    if differing:
        more = f" and {len(differing) - _SHOWN} more" * (len(differing) > _SHOWN)
        raise ArgumentError(
            f"resume: got other settings than those of {checkpoint.path} "
            f"({'; '.join(differing[:_SHOWN])}{more}); expected the same; restore "
            "them, or start anew in another folder"
        )


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state, entry ``k`` of parameter number i as ``i.k``."""
    return {
        f"{i}.{name}": torch.as_tensor(value)
        for i, entries in optimizer.state_dict()["state"].items()
        for name, value in entries.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    """The inverse of :func:`optimizer_tensors`; learning rates stay what they are."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def check_model(expected: Tensors, found: Tensors, path: Path) -> None:
    """Raise ArgumentError unless a checkpoint has the tensors of this model."""
    wanted, there = (
        {f"{name} {tuple(x.shape)}" for name, x in tensors.items()}
        for tensors in (expected, found)
    )
    missing, extra = wanted - there, there - wanted
    if missing or extra:
        raise ArgumentError(
            f"resume: {path} lacks {sorted(missing)[:3]} and has {sorted(extra)[:3]} "
            "beyond this model's tensors; expected a checkpoint of the same model; "
            "name its folder"
        )
