"""Checkpoints of a training run as tensors; ``experiments.checkpoints`` stores them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from experiments import checkpoints

Tensors = Mapping[str, Tensor]
_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """What :func:`newest` read: tensors by file, and the state."""

    path: Path
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def write(folder: Path, step: int, files: Mapping[str, Tensors], state: Any) -> Path:
    """Store the tensors of each file and ``state`` as the checkpoint of ``step``.

    Raises InputError where the disk does not take it; the checkpoints before stand.
    """
    stored = {
        f"{name}{_SUFFIX}": save({n: _own_copy(x) for n, x in tensors.items()})
        for name, tensors in files.items()
    }
    return checkpoints.write(folder, step, stored, state)


def _own_copy(tensor: Tensor) -> Tensor:
    """Contiguous, in memory of its own: tied parameters may not be stored as one."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The last whole checkpoint (None: there is none), and what to say of damaged ones.

    Raises InputError if there are checkpoints and none is whole.
    """
    found, notices = checkpoints.newest(folder)
    if found is None:
        return None, notices
    tensors = {k.removesuffix(_SUFFIX): load(x) for k, x in found.files.items()}
    return Checkpoint(found.path, tensors, found.state), notices


def check_settings(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> None:
    """Raise InputError, listing them, if settings differ from the checkpoint's."""
    before = checkpoint.state["settings"]
    checkpoints.check_settings(checkpoint.path, before, settings)


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
    """Raise InputError unless a checkpoint has the tensors of this model."""
    there, wanted = (
        {name: x.shape for name, x in tensors.items()} for tensors in (found, expected)
    )
    checkpoints.check_arrays(path, there, wanted)
