"""The notebook runs as it stands; the pages beside it name commands that exist."""

import importlib.util
import json
import os
import re
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from traitlets import default

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PAGES = [*NOTEBOOKS, ROOT / "docs" / "when_to_use.md"]
SECTIONS = ("from scratch", "SSM against attention", "simple task", "A hybrid")


class KernelOfThisPython(AsyncKernelManager):
    """A kernel of the interpreter that runs the tests, whatever a user has installed.

    Without folders to look in, what is found is ipykernel's own: sys.executable.
    """

    @default("kernel_spec_manager")
    def _no_folders(self):
        return KernelSpecManager(kernel_dirs=[])


@pytest.fixture(autouse=True)
def nothing_of_the_user(tmp_path, monkeypatch):
    """Neither history nor settings of the person who runs the tests."""
    for variable in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(variable, str(tmp_path))


def pictures(cell):
    return [
        output
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_runs_and_every_section_has_a_picture(path):
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        kernel_manager_class=KernelOfThisPython,
        kernel_name="python3",
        timeout=600,
        resources={"metadata": {"path": str(ROOT)}},
    )
    client.execute()
    drawn = dict.fromkeys(SECTIONS, 0)
    section = ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and cell.source.startswith("## "):
            section = next(s for s in SECTIONS if s in cell.source.splitlines()[0])
        elif section:
            drawn[section] += len(pictures(cell))
    assert all(drawn.values()), drawn


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_nothing_that_a_run_leaves_is_kept(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code
    assert all(not c["outputs"] and c["execution_count"] is None for c in code)


def test_the_first_cell_finds_the_packages_from_the_notebooks_folder(monkeypatch):
    (path,) = NOTEBOOKS
    first = next(c for c in nbformat.read(path, 4).cells if c.cell_type == "code")
    monkeypatch.chdir(path.parent)
    monkeypatch.setattr(sys, "path", ["elsewhere"])
    monkeypatch.setattr(os, "environ", {})
    exec(compile(first.source, str(path), "exec"), {})
    assert sys.path == [str(ROOT), "elsewhere"]


def text_of(path):
    if path.suffix != ".ipynb":
        return path.read_text(encoding="utf-8")
    return "\n".join(cell.source for cell in nbformat.read(path, 4).cells)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_commands_and_links_lead_somewhere(path):
    text = text_of(path)
    modules = set(re.findall(r"python -m ([\w.]+)", text))
    assert modules
    missing = [m for m in modules if importlib.util.find_spec(m) is None]
    links = re.findall(r"\]\(([^)#]+)\)", text)
    missing += [x for x in links if not (path.parent / x).resolve().exists()]
    assert not missing
