"""Models on disk: model.safetensors and config.json, in our layout or in others'.

Nothing is ever pickled or unpickled. Files are written under temporary names and then
renamed, so that a reader finds a whole file or the one before.
"""

import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ssm._errors import ArgumentError, bad_argument
from ssm.models.config import SequenceLMConfig
from ssm.models.interop import (
    CheckpointConfig,
    detect_format,
    from_hugging_face,
    from_mamba_ssm,
    to_hugging_face,
    to_mamba_ssm,
)

WEIGHTS, INDEX, CONFIG = (
    "model.safetensors",
    "model.safetensors.index.json",
    "config.json",
)
MODEL_TYPE = "ssm_sequence_lm"  # what our own config.json calls itself
Tensors = dict[str, Tensor]
Loaded = tuple[Tensors, SequenceLMConfig]
Saved = tuple[Tensors, dict[str, Any]]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """What a folder holds, in our names, and whose layout it was in."""

    folder: Path
    format: str
    config: SequenceLMConfig
    tensors: Tensors

    def check(self, expected: Mapping[str, Tensor]) -> None:
        """Raise ArgumentError unless the tensors are those of ``expected``."""
        if missing := sorted(expected.keys() - self.tensors.keys()):
            raise self._bad(f"no tensor {_some(missing)}", "all that its config says")
        if extra := sorted(self.tensors.keys() - expected.keys()):
            raise self._bad(f"also tensor {_some(extra)}", "only what its config says")
        for name, tensor in self.tensors.items():
            have, want = tuple(tensor.shape), tuple(expected[name].shape)
            if have != want:
                raise self._bad(f"{name} of shape {have}", f"shape {want}")
            if not tensor.is_floating_point():
                raise self._bad(f"{name} of {tensor.dtype}", "a floating-point dtype")

    def _bad(self, got: str, expected: str) -> ArgumentError:
        mend = f"see that {WEIGHTS} and {CONFIG} are of one model, and save it anew"
        return bad_argument(f"checkpoint {self.folder}", got, expected, mend)


def load_checkpoint(folder: str | PathLike[str]) -> Checkpoint:
    """Read ``folder``; raises ArgumentError, in one line, for whatever is wrong."""
    path = Path(folder)
    if not path.is_dir():
        raise bad_argument(
            "folder",
            repr(str(folder)),
            "a folder on this machine",
            "download the checkpoint first and name its folder",
        )
    config = _read_json(path / CONFIG)
    tensors = _read_tensors(path)
    found = detect_format(tensors)
    ours, resolved = _LAYOUTS[_NAMES[found.layout]].load(tensors, config)
    _log.info("%s: a checkpoint in the layout of %s", path, found)
    return Checkpoint(path, str(found), resolved, ours)


def save_checkpoint(
    folder: str | PathLike[str],
    tensors: Mapping[str, Tensor],
    config: SequenceLMConfig,
    layout: str = "native",
) -> None:
    """Write ``tensors`` (our names) and ``config`` in the named layout."""
    if layout not in _LAYOUTS:
        raise bad_argument(
            "layout", repr(layout), " or ".join(_LAYOUTS), "choose one of those"
        )
    theirs, entries = _LAYOUTS[layout].save(dict(tensors), config)
    text = json.dumps(entries, indent=2, allow_nan=False) + "\n"
    contiguous = {name: t.detach().cpu().contiguous() for name, t in theirs.items()}
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    # Both are complete on disk before either is renamed.
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=path) as scratch:
        weights, described = Path(scratch) / WEIGHTS, Path(scratch) / CONFIG
        save_file(contiguous, weights, metadata={"format": "pt"})
        described.write_text(text, encoding="utf-8")
        # safetensors lets only the owner read: like any other file instead.
        weights.chmod(described.stat().st_mode)
        _flush(weights)
        _flush(described)
        weights.replace(path / WEIGHTS)
        described.replace(path / CONFIG)


def _load_native(tensors: Tensors, config: Mapping[str, Any]) -> Loaded:
    entries = dict(config)
    if (kind := entries.pop("model_type", None)) != MODEL_TYPE:
        raise bad_argument(
            f"model_type in {CONFIG}",
            repr(kind),
            f"{MODEL_TYPE!r}, as the tensors have our names",
            "see that both files are of one model",
        )
    return tensors, SequenceLMConfig.from_dict(entries)


def _save_native(tensors: Tensors, config: SequenceLMConfig) -> Saved:
    entries = config.to_dict()
    for options in (*entries["mixer"].values(), *entries["feed_forward"].values()):
        # How to compute is for the machine that loads it to choose, not for this one.
        options.pop("backend", None)
    return tensors, {"model_type": MODEL_TYPE} | entries


def _load_theirs(
    convert: Callable[..., tuple[Tensors, CheckpointConfig]],
) -> Callable[[Tensors, Mapping[str, Any]], Loaded]:
    def load(tensors: Tensors, config: Mapping[str, Any]) -> Loaded:
        ours, theirs = convert(tensors, config)
        return ours, SequenceLMConfig(
            vocab_size=theirs.vocab_size,
            d_model=theirs.d_model,
            n_layers=theirs.n_layers,
            pattern=theirs.mixer,
            tie_embeddings=theirs.tie_embeddings,
            norm_eps=theirs.norm_eps,
            residual_in_fp32=theirs.residual_in_fp32,
            mixer={theirs.mixer: theirs.mixer_options},
        )

    return load


def _save_theirs(
    convert: Callable[..., Saved], head: str
) -> Callable[[Tensors, SequenceLMConfig], Saved]:
    def save(tensors: Tensors, config: SequenceLMConfig) -> Saved:
        kinds = set(config.units())
        mixer = next(iter(kinds)).mixer
        if len(kinds) > 1 or mixer not in ("mamba", "mamba2") or config.feed_forward:
            raise bad_argument(
                "layout",
                f"another's for a model of pattern {config.pattern!r}",
                "one for Mamba or Mamba-2 layers alone",
                "save it with layout='native'",
            )
        theirs, entries = convert(
            tensors,
            CheckpointConfig(
                mixer=mixer,  # type: ignore[arg-type]
                d_model=config.d_model,
                n_layers=config.n_layers,
                vocab_size=config.vocab_size,
                tie_embeddings=config.tie_embeddings,
                norm_eps=config.norm_eps,
                residual_in_fp32=config.residual_in_fp32,
                mixer_options=dict(config.mixer[mixer]),
            ),
        )
        if config.tie_embeddings:  # one tensor is saved once
            theirs.pop(head, None)
        return theirs, entries

    return save


class _Layout(NamedTuple):
    load: Callable[[Tensors, Mapping[str, Any]], Loaded]
    save: Callable[[Tensors, SequenceLMConfig], Saved]


_HEAD = "lm_head.weight"
_LAYOUTS: dict[str, _Layout] = {
    "native": _Layout(_load_native, _save_native),
    "mamba_ssm": _Layout(
        _load_theirs(from_mamba_ssm), _save_theirs(to_mamba_ssm, _HEAD)
    ),
    "hugging_face": _Layout(
        _load_theirs(from_hugging_face), _save_theirs(to_hugging_face, _HEAD)
    ),
}
_NAMES = {"ssm": "native", "mamba_ssm": "mamba_ssm", "hugging_face": "hugging_face"}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise bad_argument(
            "folder", f"{file.parent} without {file.name}", "both", _copy(file)
        ) from error
    except ValueError as error:  # not JSON, or not even text
        raise bad_argument(
            str(file), f"no JSON ({error})", "a whole JSON file", _copy(file)
        ) from error
    if not isinstance(entries, dict):
        raise bad_argument(
            str(file), f"a JSON {type(entries).__name__}", "an object", _copy(file)
        )
    return entries


def _read_tensors(folder: Path) -> Tensors:
    """All tensors of the one file, or of the pieces that its index names."""
    if (folder / WEIGHTS).is_file():
        return _read_safetensors(folder / WEIGHTS)
    if (folder / INDEX).is_file():
        pieces = _read_json(folder / INDEX).get("weight_map", {})
        tensors: Tensors = {}
        for name in sorted(set(pieces.values())):
            tensors |= _read_safetensors(folder / Path(name).name)
        return tensors
    pickled = [file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt")]
    if pickled:
        raise bad_argument(
            "folder",
            f"{folder} with {pickled[0]}, a pickle, which can run anything",
            WEIGHTS,
            "where you trust it, convert it: safetensors.torch.save_file({k: v.clone() "
            f"for k, v in torch.load({pickled[0]!r}, weights_only=True).items()}}, "
            f"{WEIGHTS!r})",
        )
    mend = _copy(folder / WEIGHTS)
    raise bad_argument("folder", f"{folder} without {WEIGHTS}", "both", mend)


def _read_safetensors(file: Path) -> Tensors:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise bad_argument(
            str(file),
            f"a file that cannot be read ({' '.join(str(error).split())})",
            "a whole safetensors file",
            _copy(file),
        ) from error


def _copy(file: Path) -> str:
    return f"copy {file.name} anew, or save the model again"


def _flush(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
