"""Pictures share one look, are written whole or not at all, and rerun to the byte."""

import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import _figures
from experiments.common import (
    COLORS,
    InputError,
    check_picture_path,
    new_figure,
    save_figure,
)

ROOT = Path(__file__).parents[2]
DRAW = """
import sys
from experiments.common import InputError, new_figure, save_figure
figure, axes = new_figure()
axes[0, 0].plot([0, 1, 3], label="three points")
axes[0, 0].legend()
try:
    save_figure(figure, sys.argv[1])
except InputError as error:
    sys.exit(f"refused: {error}")
"""


def drawn(rows=1, columns=1):
    figure, axes = new_figure(rows, columns)
    for ax in axes.flat:
        ax.plot([0, 1, 3], label="three points")
        ax.legend()
        ax.set_xlabel("sequence length T")
    return figure


@pytest.mark.parametrize(
    ("suffix", "start", "end"),
    [
        (".png", b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"),
        (".pdf", b"%PDF-", b"%%EOF\n"),
        (".svg", b"<?xml", b"</svg>\n"),
        (".PNG", b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"),
    ],
)
def test_each_format_is_whole_and_alone(tmp_path, suffix, start, end):
    target = tmp_path / "deep" / f"a{suffix}"
    assert save_figure(drawn(), target) == target
    content = target.read_bytes()
    assert content.startswith(start)
    assert content.endswith(end)
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg"])
def test_the_same_picture_is_the_same_file(tmp_path, suffix):
    paths = [tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"]
    save_figure(drawn(), paths[0])
    done = subprocess.run(  # a process of its own: no state of this one helps
        [sys.executable, "-c", DRAW, str(paths[1])], cwd=ROOT, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    figure, axes = new_figure()
    axes[0, 0].plot([0, 1, 3], label="three points")
    axes[0, 0].legend()
    save_figure(figure, paths[0])
    assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 2), (2, 3)])
def test_every_panel_has_the_same_size(tmp_path, rows, columns):
    path = save_figure(drawn(rows, columns), tmp_path / "a.png")
    width, height = struct.unpack(">II", path.read_bytes()[16:24])
    one = struct.unpack(
        ">II", save_figure(drawn(), tmp_path / "b.png").read_bytes()[16:24]
    )
    assert (width, height) == (columns * one[0], rows * one[1])


def test_the_style_ends_with_the_figure(tmp_path):
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    save_figure(drawn(), tmp_path / "a.png")
    assert dict(mpl.rcParams) == before
    assert "matplotlib.pyplot" not in sys.modules or mpl.get_backend()


def test_colours_are_told_apart():
    assert len(set(COLORS)) == len(COLORS) >= 7
    _, axes = new_figure()
    lines = [axes[0, 0].plot([0, 1])[0].get_color() for _ in COLORS]
    assert lines == list(COLORS)


@pytest.mark.parametrize("name", ["a.jpg", "a", "a.png.txt", ".png"])
def test_other_suffixes_are_bad_input(tmp_path, name):
    with pytest.raises(InputError, match=r"expected a file ending in \.png"):
        save_figure(drawn(), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_paths_that_cannot_be_pictures(tmp_path):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder.png").mkdir()
    for path in (tmp_path / "file" / "a.png", tmp_path / "folder.png"):
        with pytest.raises(InputError, match="cannot be written"):
            check_picture_path(path)
        with pytest.raises(InputError, match="cannot be written"):
            save_figure(drawn(), path)
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.skipif(os.name != "posix", reason="ulimit is POSIX's")
@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg"])
def test_a_full_disk_leaves_the_old_picture_and_no_part(tmp_path, suffix):
    target = tmp_path / f"a{suffix}"
    target.write_text("the old picture")
    drawing = [sys.executable, "-c", DRAW, str(target)]
    done = subprocess.run(
        ["bash", "-c", 'ulimit -f 1; exec "$@"', "bash", *drawing],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 1
    assert done.stderr.startswith("refused: ")
    assert "cannot be written" in done.stderr
    assert list(tmp_path.iterdir()) == [target]
    assert target.read_text() == "the old picture"


def test_without_matplotlib_the_line_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match="matplotlib cannot be imported"):
        _figures.new_figure()


def test_the_contract_imports_without_matplotlib():
    code = "import experiments.common, sys; print('matplotlib' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == "False\n"
