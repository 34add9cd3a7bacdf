"""Signature ("toy") data: a random walk X in d dimensions  ->  a term of its signature.

    d = 2:  S^{12}(X)  = int_{s<t} dX^1_s dX^2_t
    d = 3:  S^{123}(X) = int_{r<s<t} dX^1_r dX^2_s dX^3_t

Cirone et al. 2024, "Theoretical Foundations of Deep Selective State-Space Models"
(arXiv:2402.19047), the toy datasets. Steps are standard normal numbers rounded to
integers; paths are divided by the largest absolute value over all of them, labels by
theirs. The defaults draw the published data, whose last 20,000 paths validate.

    <folder>/data_2.npy     float32 (n, L, 2)
             labels_2.npy   float32 (n,)
             data_2.json    how the two were made, and their SHA-256
"""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32

from data_dir._files import locked, written_whole
from experiments.common import (
    InputError,
    bad_input,
    check_integer,
    check_nonempty,
    track,
)

FOLDER = "data_dir/toy_data"
DIMENSIONS = (2, 3)
DEPTH = 4  # of the signature computed, as published; the labels need level d alone
_PATHS_AT_ONCE = 4_000
_ANEW = "write both anew with python data_dir/generate_toy_dataset.py --force"

Array = np.ndarray


class Paths(NamedTuple):
    """Paths by time, and the label of each."""

    paths: Float32[Array, "n L d"]
    labels: Float32[Array, " n"]


@dataclass(frozen=True)
class SignatureTask:
    """Paths to train on and others to validate.

    ``rmse_zero`` is the root mean squared error, on ``val``, of predicting zero.
    ``metadata`` holds JSON values: counts, hashes, and how the files were made
    ("made", None for files that came without saying so).
    """

    dimension: int
    train: Paths
    val: Paths
    rmse_zero: float
    metadata: dict[str, Any]


@dataclass(frozen=True)
class ToyOptions:
    """Which files to write.

    Args:
        dimensions: one pair of files for each dimension d of the paths, 2 or 3
        n_paths: paths in each
        length: points of each path
        seed: of JAX's generator; 1234 gives the published data
        out_dir: the folder of the files
        force: write anew what is there already
    """

    dimensions: tuple[int, ...] = DIMENSIONS
    n_paths: int = 100_000
    length: int = 100
    seed: int = 1234
    out_dir: str = FOLDER
    force: bool = False


def load_toy(
    dimension: int,
    *,
    folder: str = FOLDER,
    n_train: int = 80_000,
    n_val: int = 20_000,
) -> SignatureTask:
    """The first ``n_train`` paths to train on and the last ``n_val`` to validate.

    The published data are generated where the folder has none. Raises InputError for
    files that are damaged, do not belong together or hold NaN, and where the two parts
    would overlap.
    """
    _check_dimension(dimension)
    check_integer("n_train", n_train, at_least=1, example=80_000)
    check_integer("n_val", n_val, at_least=1, example=20_000)
    files = _files(folder, dimension)
    if not (files.data.exists() or files.labels.exists()):
        generate_toy(ToyOptions((dimension,), out_dir=folder))
    pair = _read(files, dimension)
    n = len(pair.labels)
    if n_train + n_val > n:
        raise bad_input(
            "n_train + n_val",
            n_train + n_val,
            f"at most the {n:,} paths of {files.data}, so that none is in both",
            "lower them, or write more paths",
        )
    val = Paths(pair.paths[n - n_val :], pair.labels[n - n_val :])
    metadata = {
        "n_paths": n,
        "length": pair.paths.shape[1],
        "n_train": n_train,
        "n_val": n_val,
        "sha256": pair.sha256,
        "made": pair.made,
    }
    train = Paths(pair.paths[:n_train], pair.labels[:n_train])
    return SignatureTask(dimension, train, val, _rms(val.labels), metadata)


def generate_toy(options: ToyOptions) -> list[str]:
    """Write the files of ``options``; return a line on each pair.

    A pair that is what would be written stays. Raises InputError where another one
    stands in its place, unless ``force`` is given.
    """
    _check(options)
    _check_installed()
    return [_generate(options, dimension) for dimension in options.dimensions]


def random_walks(
    dimension: int, *, n_paths: int, length: int, seed: int
) -> Float32[Array, "n L d"]:
    """Sums of rounded standard normal steps, divided by the largest absolute value.

    The numbers are those of JAX's threefry generator as it was when the data were
    published, on any device and whatever JAX's flags say.
    """
    import jax

    with jax.threefry_partitionable(False), jax.default_device(jax.devices("cpu")[0]):
        key = jax.random.key(seed, impl="threefry2x32")
        steps = jax.random.normal(key, (n_paths, length, dimension), np.float32)
    paths = np.cumsum(np.round(np.asarray(steps)), axis=1)  # integers: exact in float32
    return _normalised(paths)


def signature_labels(paths: Float32[Array, "n L d"]) -> Float32[Array, " n"]:
    """S^{1…d} of each path, divided by the largest absolute value of all."""
    import jax
    import signax

    d = paths.shape[2]
    starts = range(0, len(paths), _PATHS_AT_ONCE)
    labels = []
    with jax.default_device(jax.devices("cpu")[0]):
        for start in track(starts, f"signatures in {d} dimensions"):
            some = paths[start : start + _PATHS_AT_ONCE]
            levels = signax.signature(some, DEPTH, flatten=False)
            labels.append(np.asarray(levels[d - 1][:, *range(d)]))
    return _normalised(np.concatenate(labels))


class _Files(NamedTuple):
    data: Path
    made: Path
    labels: Path  # stands only where the others do: see `written_whole`


class _Pair(NamedTuple):
    paths: Float32[Array, "n L d"]
    labels: Float32[Array, " n"]
    sha256: dict[str, str]
    made: dict[str, Any] | None


def _files(folder: str, dimension: int) -> _Files:
    names = f"data_{dimension}.npy", f"data_{dimension}.json", f"labels_{dimension}.npy"
    return _Files(*(Path(folder) / name for name in names))


def _check(options: ToyOptions) -> None:
    check_nonempty("dimensions", options.dimensions, "dimensions = 2 3")
    for dimension in options.dimensions:
        _check_dimension(dimension)
    check_integer("n_paths", options.n_paths, at_least=1, example=100_000)
    check_integer("length", options.length, at_least=2, example=100)
    check_integer("seed", options.seed, at_least=0, example=1234)
    if options.seed >= 2**32:
        raise bad_input("seed", options.seed, "at most 32 bits", "try seed = 1234")


def _check_installed() -> None:
    try:
        import jax  # noqa: F401
        import signax  # noqa: F401
    except ModuleNotFoundError as error:
        raise InputError(
            f"toy data: {error.name} is missing; expected the extra jax, which draws "
            "the paths and computes the labels; install it, or bring the files"
        ) from None


def _check_dimension(dimension: int) -> None:
    if dimension not in DIMENSIONS:
        raise bad_input("dimension", dimension, "2 or 3", "try 2")


def _normalised(values: Float32[Array, " *shape"]) -> Float32[Array, " *shape"]:
    largest = np.abs(values).max()
    if largest == 0:
        raise InputError(
            "n_paths and length: every value drawn is zero; expected one that is not, "
            "to divide by; raise them"
        )
    return values / largest


def _generate(options: ToyOptions, dimension: int) -> str:
    files = _files(options.out_dir, dimension)
    with locked(files.data.parent):
        there = files.data.exists() or files.labels.exists()
        if there and not options.force:
            return _keep(files, options, dimension)
        paths = random_walks(
            dimension,
            n_paths=options.n_paths,
            length=options.length,
            seed=options.seed,
        )
        _write(files, paths, signature_labels(paths), _wanted(options))
    return f"{files.data}, {files.labels.name}: {options.n_paths:,} paths"


def _wanted(options: ToyOptions) -> dict[str, Any]:
    """What makes the data what they are, beside their dimension."""
    return {
        "seed": options.seed,
        "n_paths": options.n_paths,
        "length": options.length,
    }


def _write(
    files: _Files,
    paths: Float32[Array, "n L d"],
    labels: Float32[Array, " n"],
    wanted: dict[str, Any],
) -> None:
    import jax

    with written_whole(*files) as partials:
        data_file, made_file, labels_file = partials
        np.save(data_file, paths)
        np.save(labels_file, labels)
        hashes = {"data": _hash_of(data_file), "labels": _hash_of(labels_file)}
        made = {**wanted, "jax": jax.__version__, "sha256": hashes}
        made_file.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


def _keep(files: _Files, options: ToyOptions, dimension: int) -> str:
    made = _read(files, dimension).made or {}
    wanted = _wanted(options)
    found = {name: made.get(name, "unknown") for name in wanted}
    if found != wanted:
        raise InputError(
            f"{files.data}: made with {_listed(found)}; expected {_listed(wanted)}; "
            "write it anew with --force, or name another --out-dir"
        )
    return (
        f"{files.data}, {files.labels.name}: {options.n_paths:,} paths, there already"
    )


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _read(files: _Files, dimension: int) -> _Pair:
    """Both files of a pair, checked alone and together."""
    for file in (files.data, files.labels):
        if not file.is_file():
            raise InputError(
                f"{file}: not there, though its fellow is; expected both; {_ANEW}"
            )
    made = _read_made(files.made) if files.made.exists() else None
    hashes = {"data": _hash_of(files.data), "labels": _hash_of(files.labels)}
    if made is not None and made["sha256"] != hashes:
        raise InputError(
            f"{files.data}, {files.labels.name}: not the pair that {files.made.name} "
            f"tells of; expected files of its SHA-256; {_ANEW}, or remove "
            f"{files.made.name} if they are your own"
        )
    paths = _read_array(files.data, (None, None, dimension))
    labels = _read_array(files.labels, (len(paths),))
    return _Pair(paths, labels, hashes, made)


def _read_made(file: Path) -> dict[str, Any]:
    try:
        made = json.loads(file.read_text(encoding="utf-8"))
        made["sha256"]["data"], made["sha256"]["labels"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(
            f"{file}: {error!r}; expected JSON with the SHA-256 of data and labels; "
            f"{_ANEW}"
        ) from None
    return made


def _read_array(file: Path, expected: tuple[int | None, ...]) -> Array:
    """A finite float32 array of the shape ``expected``, where None is any size."""
    try:
        array = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"{file}: cannot be read ({reason}); expected NumPy's format; {_ANEW}"
        ) from None
    shape = "(" + ", ".join("any" if n is None else str(n) for n in expected) + ")"
    fits = len(array.shape) == len(expected) and all(
        want in (None, got) for want, got in zip(expected, array.shape, strict=True)
    )
    if not fits or array.dtype != np.float32 or not array.size:
        got = f"{array.dtype} of shape {array.shape}"
        raise bad_input(str(file), got, f"float32 of shape {shape}", _ANEW)
    if not np.isfinite(array).all():
        place = tuple(np.argwhere(~np.isfinite(array))[0].tolist())
        got = f"{array[place]} at {place}"
        raise bad_input(str(file), got, "finite numbers alone", _ANEW)
    return array


def _hash_of(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _rms(values: Float32[Array, " n"]) -> float:
    return math.sqrt(np.mean(np.square(values, dtype=np.float64)))
