"""Fail if a file under tests/ contributes no test (conftest and helpers excepted)."""

import subprocess
import sys
from pathlib import Path

HELPERS = {"conftest.py", "helpers.py", "__init__.py"}


def main() -> int:
    """Collect without running; compare the files on disk with those that hold tests."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "--collect-only",
            "-qq",
            "-p",
            "no:cacheprovider",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        print(done.stdout, done.stderr)
        return 1
    collected = {line.rpartition(": ")[0] for line in done.stdout.splitlines()}
    files = {str(p) for p in Path("tests").rglob("*.py") if p.name not in HELPERS}
    empty = sorted(files - collected)
    for path in empty:
        print(f"{path} holds no test")
    return 1 if empty else 0


if __name__ == "__main__":
    sys.exit(main())
