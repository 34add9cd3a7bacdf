"""Run the README as a reader would: each line of a ```bash block, each ```python block.

Blocks of other kinds (```text, ```console) are not run. ``git clone`` and ``cd`` lines
are skipped, since this already stands in the clone, and so is the test command, which
CI runs by itself. Fails at the first command that does not exit with status 0.
"""

import re
import subprocess
import sys
import time
from pathlib import Path

SKIPPED = ("git clone", "cd ", "uv run --extra all pytest")


def commands(markdown: str) -> list[str]:
    """The command lines of all ```bash blocks, continuations joined."""
    blocks = re.findall(r"^```bash\n(.*?)^```", markdown, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    stripped = (re.sub(r"\s+#.*$", "", line).strip() for line in lines)
    return [line for line in stripped if line and not line.startswith("#")]


def programs(markdown: str) -> list[str]:
    """The ```python blocks."""
    return re.findall(r"^```python\n(.*?)^```", markdown, re.MULTILINE | re.DOTALL)


def main() -> int:
    """Run commands and programs; return the exit status."""
    markdown = Path("README.md").read_text()
    lines = [line for line in commands(markdown) if not line.startswith(SKIPPED)]
    jobs = [(line, ["bash", "-c", line]) for line in lines]
    jobs += [
        (block.partition("\n")[0] + " …", [sys.executable, "-c", block])
        for block in programs(markdown)
    ]
    for name, command in jobs:
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        print(f"{time.perf_counter() - started:6.1f} s  {name}", flush=True)
        if done.returncode:
            print(f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
