"""docs/properties.md: six rows, each pointing at code and tests that exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "properties.md"
PROPERTIES = (
    *("Associativity", "Separability", "Locality"),
    *("Sparsity", "Redundancy", "Symmetry"),
)
LINK = re.compile(r"\[`(\w+)`\]\(([^)]+)\)")


def sections():
    """Title -> text of every section."""
    parts = re.split(r"^## (.+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def links(kind, text):
    """(name, file) of every link in the lines that start with ``- kind:``."""
    lines = re.findall(rf"^- {kind}: (.+)$", text, flags=re.MULTILINE)
    return [link for line in lines for link in LINK.findall(line)]


def defined_in(path):
    """Top-level functions and classes of a Python file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name for node in tree.body if isinstance(node, kinds)}


POINTERS = [
    pytest.param(kind, name, target, id=f"{title}-{kind}-{name}")
    for title, text in sections().items()
    for kind in ("code", "test")
    for name, target in links(kind, text)
]


@pytest.mark.parametrize(("kind", "name", "target"), POINTERS)
def test_every_pointer_leads_to_a_definition(kind, name, target):
    path = (PAGE.parent / target).resolve()
    assert path.is_relative_to(ROOT)
    assert name in defined_in(path)
    assert path.is_relative_to(ROOT / "tests") == (kind == "test")
    assert (kind == "test") == name.startswith("test_")


@pytest.mark.parametrize("title", PROPERTIES)
def test_every_property_is_quoted_judged_and_shown(title):
    text = sections()[title]
    assert "**The chapter:**" in text
    assert re.search(r"\*\*(True|False|Half true)", text)
    assert links("code", text)
    assert links("test", text)


def test_the_table_has_the_six_rows_and_no_link_is_elsewhere():
    page = PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \|", page, flags=re.MULTILINE)
    assert rows == ["Property", *PROPERTIES]
    assert len(re.findall(r"\]\(", page)) == len(POINTERS)
