"""Run the README as a reader would: each line of a ```bash block, each ```python block.

Blocks of other kinds (```text, ```console) are not run. ``git clone`` and ``cd`` lines
are skipped, since this already stands in the clone, and so is the test command, which
CI runs by itself. The lines of a block run in their order, for one may read what those
above it wrote; blocks stand alone, and as many run at a time as there are cores, first
the one that takes longest: begun later, it would run on alone behind the others. Each
should have one thread (OMP_NUM_THREADS): threads that share a core wait for each other.
After a command that does not exit with status 0 no other is begun, and this fails.
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

SKIPPED = ("git clone", "cd ", "uv run --extra all pytest")
LONGEST = "ssm.doctor"  # named in the block that takes longest: it compiles the kernels

Command = tuple[str, Sequence[str]]  # its name, and what to run


def blocks(markdown: str) -> list[list[Command]]:
    """The commands of every block: lines of ```bash, the whole of ```python."""
    found = re.findall(
        r"^```(bash|python)\n(.*?)^```", markdown, re.MULTILINE | re.DOTALL
    )
    return [lines(text) if kind == "bash" else [program(text)] for kind, text in found]


def lines(text: str) -> list[Command]:
    """The command lines of a ```bash block, continuations joined."""
    whole = text.replace("\\\n", " ").splitlines()
    stripped = (re.sub(r"\s+#.*$", "", line).strip() for line in whole)
    wanted = (line for line in stripped if line and not line.startswith("#"))
    return [(x, ["bash", "-c", x]) for x in wanted if not x.startswith(SKIPPED)]


def program(text: str) -> Command:
    """A ```python block, named by its first line."""
    return text.partition("\n")[0] + " …", [sys.executable, "-c", text]


def run(block: Sequence[Command], failed: Event) -> None:
    """Run the commands in their order, unless one has failed, here or elsewhere."""
    for name, command in block:
        if failed.is_set():
            return
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        told = f"{time.perf_counter() - started:6.1f} s  {name}"
        if done.returncode:
            failed.set()
            told += f"\nexit status {done.returncode}\n{done.stdout}\n{done.stderr}"
        print(told, flush=True)


def main() -> int:
    """Run all blocks; return the exit status."""
    found = blocks(Path("README.md").read_text())
    found.sort(key=lambda block: all(LONGEST not in name for name, _ in block))
    assert LONGEST in found[0][0][0], f"no block begins with {LONGEST}"
    failed = Event()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda block: run(block, failed), found))
    return int(failed.is_set())


if __name__ == "__main__":
    sys.exit(main())
