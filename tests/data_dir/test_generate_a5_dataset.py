"""The generator as a user starts it: by path, as a module, killed, twice."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_dir._files import PARTIAL
from data_dir.generate_a5_dataset import main
from data_dir.word_problem import WordOptions, generate_words, load_words
from experiments.common import InputError

ROOT = Path(__file__).parents[2]
SCRIPT = "data_dir/generate_a5_dataset.py"


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, SCRIPT, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".lock"}


def test_path_and_module_write_the_same_file_in_the_published_format(
    tmp_path, run_module
):
    by_path, as_module = tmp_path / "path", tmp_path / "module"
    options = ("--length", 6, "--samples", 50, "--out-dir")
    process = start(*options, by_path)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert out == f"{by_path}/A5=6.csv: 50 sequences\n"
    done = run_module("data_dir.generate_a5_dataset", *options, as_module)
    assert done.returncode == 0
    text = (by_path / "A5=6.csv").read_text()
    assert text == (as_module / "A5=6.csv").read_text()
    header, *lines = text.splitlines()
    assert header == "seed,input,target"
    assert len({line.split(",")[1] for line in lines}) == 50
    assert {line.split(",")[0] for line in lines} == {"0"}


def wait_for_partial(process: subprocess.Popen[str], folder: Path) -> None:
    partial = folder / f"{PARTIAL}A5=20.csv"
    deadline = time.monotonic() + 60
    while not (partial.exists() and partial.stat().st_size):
        assert process.poll() is None, "ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("word", [signal.SIGKILL, signal.SIGINT])
def test_a_writer_stopped_half_way_leaves_no_file_under_the_final_name(tmp_path, word):
    process = start("--length", 20, "--samples", 300_000, "--out-dir", tmp_path)
    wait_for_partial(process, tmp_path)
    os.kill(process.pid, word)
    _, err = process.communicate(timeout=60)
    left = {f"{PARTIAL}A5=20.csv"} if word == signal.SIGKILL else set()
    assert names(tmp_path) == left
    assert "Traceback" not in err
    assert process.returncode == (-signal.SIGKILL if word == signal.SIGKILL else 130)

    # No lock is left either, and what was left half-way is not in the way.
    generate_words(WordOptions(length=(20,), samples=40, out_dir=str(tmp_path)))
    assert len(load_words(20, samples=40, folder=str(tmp_path)).train.inputs) == 32
    assert names(tmp_path) == {"A5=20.csv"}


def test_a_failure_at_the_last_row_keeps_the_file_that_was_there(tmp_path, monkeypatch):
    options = WordOptions("S3", (3,), 20, out_dir=str(tmp_path))
    generate_words(options)
    before = (tmp_path / "S3=3.csv").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("data_dir._word_csv.track", full)
    anew = WordOptions("S3", (3,), 20, seed=1, out_dir=str(tmp_path), force=True)
    with pytest.raises(InputError, match=r"S3=3\.csv: cannot be written \(No space"):
        generate_words(anew)
    assert (tmp_path / "S3=3.csv").read_bytes() == before
    assert names(tmp_path) == {"S3=3.csv"}


def test_what_is_there_stays_unless_it_differs_and_is_replaced_by_force(
    tmp_path, capsys
):
    line = ["--group", "Z5xZ2", "--length", "2", "3", "--out-dir", str(tmp_path)]
    assert main([*line, "--samples", "90"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/Z5xZ2=2.csv: 90 sequences",
        f"{tmp_path}/Z5xZ2=3.csv: 90 sequences",
    ]
    assert main([*line, "--samples", "90"]) == 0
    assert capsys.readouterr().out.count(", there already\n") == 2
    for other in (["--samples", "91"], ["--samples", "90", "--seed", "1"]):
        with pytest.raises(SystemExit) as stopped:
            main([*line, *other])
        assert stopped.value.code == 2
        assert "with --force" in capsys.readouterr().err
    assert main([*line, "--samples", "101", "--force"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.endswith("100 sequences, all that exist (101 were asked for)")


def test_a_damaged_file_is_named_and_replaced_by_force(tmp_path):
    options = WordOptions("S3", (2,), 9, out_dir=str(tmp_path))
    generate_words(options)
    file = tmp_path / "S3=2.csv"
    whole = file.read_bytes()
    file.write_bytes(whole[:-3])
    with pytest.raises(InputError, match=r"S3=2\.csv:10: torn"):
        generate_words(options)
    generate_words(WordOptions("S3", (2,), 9, out_dir=str(tmp_path), force=True))
    assert file.read_bytes() == whole


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--group", "Q8"], "error: group: got 'Q8'"),
        (["--length", "0"], "error: length: got 0"),
        (["--length"], "error: length: got ()"),
        (["--sample", "3"], "error: unknown flag --sample; did you mean --samples?"),
        (["--seed", "-1"], "error: seed: got -1"),
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


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        main(["--out-dir", str(tmp_path / "file" / "folder")])
    err = capsys.readouterr().err
    assert "cannot be written" in err
    assert err.count("\n") == 1
