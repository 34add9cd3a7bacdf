"""Keep the exact pins of pyproject.toml equal to what uv resolves.

``python .ci/pins.py --check`` fails if uv.lock holds a version that is not pinned.
``python .ci/pins.py --write`` pins what uv.lock holds. To move to newer versions, empty
the list ``constraint-dependencies``, run ``uv lock --upgrade``, then ``--write``.
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIST = re.compile(r"^constraint-dependencies = \[\n.*?^\]\n", re.MULTILINE | re.DOTALL)


def locked() -> list[str]:
    """``name==version`` of every package in uv.lock.

    Where uv chose different versions for different Pythons, the lowest stands for all:
    it is the one that runs on the oldest Python that we support.
    """
    lock = tomllib.loads((ROOT / "uv.lock").read_text())
    versions: dict[str, list[str]] = {}
    for package in lock["package"]:
        if "registry" in package["source"]:
            versions.setdefault(package["name"], []).append(package["version"])
    return [f"{name}=={min(found, key=_order)}" for name, found in versions.items()]


def _order(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


def pinned() -> list[str]:
    """The pins that pyproject.toml states."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return settings["tool"]["uv"]["constraint-dependencies"]


def write() -> None:
    """Rewrite the list of pins from uv.lock."""
    path = ROOT / "pyproject.toml"
    lines = "".join(f'  "{pin}",\n' for pin in sorted(locked()))
    block = f"constraint-dependencies = [\n{lines}]\n"
    path.write_text(LIST.sub(lambda _: block, path.read_text(), count=1))


def check() -> int:
    """Print what differs; return the exit status."""
    loose = sorted(set(locked()) - set(pinned()))
    stale = sorted(set(pinned()) - set(locked()))
    for pin in loose:
        print(f"uv.lock holds {pin}, which pyproject.toml does not pin")
    for pin in stale:
        print(f"pyproject.toml pins {pin}, which uv.lock does not hold")
    return 1 if loose or stale else 0


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--write"]:
            write()
        case ["--check"]:
            sys.exit(check())
        case _:
            sys.exit(__doc__)
