"""The generator of toy data: by path, as a module, stopped between any two files."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_dir.generate_toy_dataset import main
from data_dir.toy import ToyOptions, generate_toy, load_toy
from experiments.common import InputError

ROOT = Path(__file__).parents[2]
SMALL = ("--n-paths", "40", "--length", "11")
FILES = {"data_2.npy", "data_2.json", "labels_2.npy"}


def options(folder: Path, **changed: object) -> ToyOptions:
    arguments = {"dimensions": (2,), "n_paths": 40, "length": 11} | changed
    return ToyOptions(**arguments, out_dir=str(folder))


def contents(folder: Path) -> dict[str, bytes]:
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    files.pop(".lock", None)
    return files


def test_the_command_by_path_writes_what_its_main_does(tmp_path):
    by_path, by_main = tmp_path / "path", tmp_path / "main"
    line = ("--dimensions", "2", *SMALL, "--out-dir")
    done = subprocess.run(
        [sys.executable, "data_dir/generate_toy_dataset.py", *line, str(by_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{by_path}/data_2.npy, labels_2.npy: 40 paths\n"
    assert main([*line, str(by_main)]) == 0
    assert set(contents(by_path)) == FILES
    assert contents(by_path) == contents(by_main)


def test_the_command_as_a_module_is_the_same(run_module):
    done = run_module("data_dir.generate_toy_dataset", "--n-paths", 0)
    assert done.returncode == 2
    assert done.stderr.startswith("error: n_paths: got 0")


@pytest.mark.parametrize("n_renamed", [0, 1, 2])
def test_stopped_between_two_files_no_pair_is_mixed(tmp_path, monkeypatch, n_renamed):
    """The new files stand for one whole pair, or loading says that half is missing."""
    generate_toy(options(tmp_path, seed=1))
    rename, renamed = Path.replace, []

    def stopped(partial: Path, final: Path) -> Path:
        if len(renamed) == n_renamed:
            raise KeyboardInterrupt
        renamed.append(final.name)
        return rename(partial, final)

    monkeypatch.setattr(Path, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        generate_toy(options(tmp_path, seed=2, force=True))
    monkeypatch.undo()
    assert "labels_2.npy" not in contents(tmp_path)
    with pytest.raises(InputError, match=r"labels_2\.npy: not there.*--force"):
        load_toy(2, folder=str(tmp_path), n_train=5, n_val=5)
    generate_toy(options(tmp_path, seed=2, force=True))
    task = load_toy(2, folder=str(tmp_path), n_train=5, n_val=5)
    assert task.metadata["made"]["seed"] == 2
    assert set(contents(tmp_path)) == FILES


@pytest.mark.parametrize("place", ["signature_labels", "np.save", "_hash_of"])
def test_stopped_while_it_works_nothing_changes(tmp_path, monkeypatch, place):
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    generate_toy(options(tmp_path))
    before = contents(tmp_path)
    monkeypatch.setattr(f"data_dir.toy.{place}", stopped)
    with pytest.raises(KeyboardInterrupt):
        generate_toy(options(tmp_path, seed=2, force=True))
    with pytest.raises(KeyboardInterrupt):
        generate_toy(options(tmp_path / "new"))
    assert contents(tmp_path / "new") == {}
    (tmp_path / "new" / ".lock").unlink()
    (tmp_path / "new").rmdir()
    assert contents(tmp_path) == before


def test_what_is_there_stays_unless_it_differs_and_is_replaced_by_force(
    tmp_path, capsys
):
    line = ["--dimensions", "2", *SMALL, "--out-dir", str(tmp_path)]
    assert main(line) == 0
    before = contents(tmp_path)
    assert main(line) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[1] == f"{tmp_path}/data_2.npy, labels_2.npy: 40 paths, there already"
    with pytest.raises(SystemExit) as stopped:
        main([*line, "--seed", "5"])
    err = capsys.readouterr().err
    assert stopped.value.code == 2
    assert "seed 1234, n_paths 40, length 11; expected seed 5" in err
    assert contents(tmp_path) == before
    assert main([*line, "--seed", "5", "--force"]) == 0
    assert contents(tmp_path)["data_2.npy"] != before["data_2.npy"]


def test_files_of_unknown_making_are_never_written_over_without_force(tmp_path):
    generate_toy(options(tmp_path))
    (tmp_path / "data_2.json").unlink()
    with pytest.raises(InputError, match="made with seed unknown"):
        generate_toy(options(tmp_path))


def test_without_the_extra_the_line_names_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "signax", None)
    with pytest.raises(InputError, match="signax is missing; expected the extra jax"):
        generate_toy(options(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--dimensions", "4"], "error: dimension: got 4; expected 2 or 3"),
        (["--dimensions"], "error: dimensions: got ()"),
        (["--n-paths", "0"], "error: n_paths: got 0"),
        (["--length", "1"], "error: length: got 1"),
        (["--seed", "-1"], "error: seed: got -1"),
        (["--seed", "4294967296"], "error: seed: got 4294967296"),
        (["--n-path", "3"], "error: unknown flag --n-path; did you mean --n-paths?"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    tmp_path, capsys, arguments, complaint
):
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--out-dir", str(tmp_path / "new")])
    err = capsys.readouterr().err
    assert stopped.value.code == 2
    assert err.startswith(complaint)
    assert err.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_a_draw_of_zeros_alone_is_refused(tmp_path, monkeypatch):
    def still(*_: object, **__: object) -> np.ndarray:
        return np.zeros((40, 11, 2), np.float32)

    monkeypatch.setattr("data_dir.toy.random_walks", still)
    with pytest.raises(InputError, match="every value drawn is zero"):
        generate_toy(options(tmp_path))
    assert contents(tmp_path) == {}
