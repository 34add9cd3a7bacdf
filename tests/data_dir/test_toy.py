"""Walks and labels against iterated integrals by hand, and files that do not fit."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from data_dir.toy import (
    ToyOptions,
    generate_toy,
    load_toy,
    random_walks,
    signature_labels,
)
from experiments.common import InputError, to_json

ROOT = Path(__file__).parents[2]
N, LENGTH = 40, 11


def iterated_integral(paths: np.ndarray) -> np.ndarray:
    """S^{1…d}, d = 2 or 3, in float64: Chen's identity, one straight piece at a time.

    A piece with increment v has the signature 1, v, v v / 2, v v v / 6.
    """
    x = paths.astype(np.float64)
    s1, s12, s123 = np.zeros((3, len(x)))
    for i in range(1, x.shape[1]):
        v = x[:, i] - x[:, i - 1]
        if x.shape[2] == 3:
            s123 += s12 * v[:, 2] + s1 * v[:, 1] * v[:, 2] / 2 + v.prod(axis=1) / 6
        s12 += s1 * v[:, 1] + v[:, 0] * v[:, 1] / 2
        s1 += v[:, 0]
    return s123 if x.shape[2] == 3 else s12


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with 40 paths of 11 points, in 2 and in 3 dimensions."""
    folder = tmp_path_factory.mktemp("toy_data")
    generate_toy(ToyOptions(n_paths=N, length=LENGTH, out_dir=str(folder)))
    return folder


@pytest.fixture
def folder(made, tmp_path) -> Path:
    """A copy of it to be damaged."""
    return Path(shutil.copytree(made, tmp_path / "toy_data"))


def load(folder: Path, dimension: int = 2):
    return load_toy(dimension, folder=str(folder), n_train=30, n_val=10)


@pytest.mark.parametrize("dimension", [2, 3])
def test_labels_are_iterated_integrals_divided_by_the_largest(made, dimension):
    task = load(made, dimension)
    paths = np.concatenate([task.train.paths, task.val.paths])
    labels = np.concatenate([task.train.labels, task.val.labels])
    expected = iterated_integral(paths)
    np.testing.assert_allclose(labels, expected / np.abs(expected).max(), atol=2e-6)
    assert np.abs(labels).max() == 1
    assert task.rmse_zero == pytest.approx(
        math.sqrt(np.mean(expected[30:] ** 2) / np.abs(expected).max() ** 2), rel=1e-5
    )


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """The folder of the default data, from the command.

    A process of its own, where XLA optimises: so many numbers take longer than that.
    """
    folder = tmp_path_factory.mktemp("published")
    command = ["-m", "data_dir.generate_toy_dataset", "--out-dir", str(folder)]
    environment = {n: x for n, x in os.environ.items() if n != "XLA_FLAGS"}
    subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=True)
    return folder


@pytest.mark.parametrize(
    ("dimension", "rmse_zero"), [(2, 0.11195), (3, 0.05850)], ids=["2D", "3D"]
)
def test_the_default_data_are_the_published_ones(published, dimension, rmse_zero):
    """The levels of predicting zero that belong to the published data.

    Beside them: the labels of some paths by hand, and how often a rounded standard
    normal number is 0, 1 and -1.
    """
    paths = np.load(published / f"data_{dimension}.npy")
    labels = np.load(published / f"labels_{dimension}.npy")
    assert paths.shape == (100_000, 100, dimension)
    rmse = math.sqrt(np.mean(labels[-20_000:].astype(np.float64) ** 2))
    assert rmse == pytest.approx(rmse_zero, abs=5e-6)

    largest = np.abs(labels).argmax()
    some = np.r_[largest, 0:100, 99_900:100_000]
    expected = iterated_integral(paths[some])
    np.testing.assert_allclose(labels[some], expected / abs(expected[0]), atol=2e-6)

    moves = np.diff(paths[:20_000], axis=1)
    unit = np.abs(moves[np.abs(moves) > 1e-6]).min()
    steps = np.round(moves / unit)
    np.testing.assert_allclose(moves, steps * unit, atol=1e-6)
    tail = math.erfc(0.5 / math.sqrt(2))
    one = (tail - math.erfc(1.5 / math.sqrt(2))) / 2
    for step, share in ((0, 1 - tail), (1, one), (-1, one)):
        deviation = math.sqrt(share * (1 - share) / steps.size)
        assert abs(np.mean(steps == step) - share) < 5 * deviation


def test_walks_follow_their_seed_and_no_flag_of_jax():
    def walk(seed: int) -> bytes:
        return random_walks(2, n_paths=20, length=5, seed=seed).tobytes()

    plain = walk(3)
    flags = jax.threefry_partitionable(True), jax.default_prng_impl("rbg")
    with flags[0], flags[1], jax.enable_x64(True):
        assert walk(3) == plain
    assert walk(4) != plain


def test_a_shorter_draw_in_pieces_has_the_labels_of_the_whole(made, monkeypatch):
    paths = np.load(made / "data_2.npy")
    monkeypatch.setattr("data_dir.toy._PATHS_AT_ONCE", 17)
    np.testing.assert_allclose(
        signature_labels(paths), np.load(made / "labels_2.npy"), atol=1e-6
    )


def test_the_first_paths_train_and_the_last_validate(made):
    task = load_toy(2, folder=str(made), n_train=7, n_val=5)
    paths, labels = np.load(made / "data_2.npy"), np.load(made / "labels_2.npy")
    assert np.array_equal(task.train.paths, paths[:7])
    assert np.array_equal(task.train.labels, labels[:7])
    assert np.array_equal(task.val.paths, paths[-5:])
    assert np.array_equal(task.val.labels, labels[-5:])
    assert to_json(task.metadata) == task.metadata
    assert task.metadata["made"]["seed"] == 1234
    assert task.metadata["length"] == LENGTH


def test_parts_that_would_overlap_are_refused(made):
    assert len(load(made).val.labels) == 10
    with pytest.raises(InputError, match=r"n_train \+ n_val: got 41; .* the 40 paths"):
        load_toy(2, folder=str(made), n_train=31, n_val=10)


def test_data_are_generated_on_first_use(tmp_path, monkeypatch):
    small = ToyOptions((2,), N, LENGTH, out_dir=str(tmp_path))
    asked = []

    def generate(options: ToyOptions) -> list[str]:
        asked.append((options.dimensions, options.n_paths, options.length))
        return generate_toy(small)

    monkeypatch.setattr("data_dir.toy.generate_toy", generate)
    assert len(load(tmp_path).train.paths) == 30
    assert len(load(tmp_path).train.paths) == 30
    assert asked == [((2,), 100_000, 100)]


def test_published_files_come_without_a_word_on_how_they_were_made(folder):
    (folder / "data_2.json").unlink()
    task = load(folder)
    assert task.metadata["made"] is None
    assert task.rmse_zero == load(folder.parent / "toy_data").rmse_zero


def spoil(array: np.ndarray, value: float) -> np.ndarray:
    array[7, 3, 1] = value
    return array


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda x: x.astype(np.float64), r"got 'float64 of shape \(40, 11, 2\)'; exp"),
        (lambda x: x[..., :1], r"shape \(40, 11, 1\)'; .* shape \(any, any, 2\)"),
        (lambda x: x[0], r"got 'float32 of shape \(11, 2\)'"),
        (lambda x: x[:0], r"got 'float32 of shape \(0, 11, 2\)'"),
        (lambda x: x[:39], r"labels_2.npy: got .* shape \(40,\)'; .* shape \(39\)"),
        (lambda x: spoil(x, np.nan), r"got 'nan at \(7, 3, 1\)'; expected finite"),
        (lambda x: spoil(x, -np.inf), r"got '-inf at \(7, 3, 1\)'"),
        (lambda x: x.astype(object), "cannot be read .*; expected NumPy's format"),
    ],
)
def test_arrays_that_are_not_paths_are_refused(folder, change, complaint):
    (folder / "data_2.json").unlink()
    np.save(folder / "data_2.npy", change(np.load(folder / "data_2.npy")))
    with pytest.raises(InputError, match=complaint) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY\x01", b"no array at all"])
def test_a_file_of_something_else_is_refused(folder, content):
    (folder / "data_2.json").unlink()
    (folder / "labels_2.npy").write_bytes(content)
    with pytest.raises(InputError, match=r"labels_2\.npy: cannot be read"):
        load(folder)


def test_a_torn_file_is_refused_with_and_without_its_hash(folder):
    data = folder / "data_2.npy"
    data.write_bytes(data.read_bytes()[:-4])
    with pytest.raises(InputError, match=r"not the pair that data_2\.json tells of"):
        load(folder)
    (folder / "data_2.json").unlink()
    with pytest.raises(InputError, match=r"data_2\.npy: cannot be read"):
        load(folder)


def test_a_pair_that_was_not_written_together_is_refused(folder, made):
    np.save(folder / "labels_2.npy", -np.load(made / "labels_2.npy"))
    with pytest.raises(InputError, match="not the pair"):
        load(folder)


@pytest.mark.parametrize("name", ["data_2.npy", "labels_2.npy"])
def test_half_a_pair_is_refused_and_not_written_over(folder, name):
    (folder / name).unlink()
    with pytest.raises(InputError, match=f"{name}: not there, though its fellow is"):
        load(folder)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"sha256": {"data": 1}}', "{"])
def test_a_damaged_word_on_how_they_were_made_is_refused(folder, content):
    (folder / "data_2.json").write_text(content)
    with pytest.raises(InputError, match="expected JSON with the SHA-256") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"dimension": 4}, "dimension: got 4; expected 2 or 3"),
        ({"n_train": 0}, "n_train: got 0"),
        ({"n_val": 0}, "n_val: got 0"),
    ],
)
def test_bad_input_is_one_line(made, changed, complaint):
    arguments = {"dimension": 2, "folder": str(made), "n_train": 3, "n_val": 3}
    with pytest.raises(InputError, match=complaint):
        load_toy(**arguments | changed)


def test_the_files_tell_of_what_made_them(made):
    told = json.loads((made / "data_3.json").read_text())
    assert (told["seed"], told["n_paths"], told["length"]) == (1234, N, LENGTH)
    assert told["jax"] == jax.__version__
