"""Run every command of the README as a reader would: each ```bash block, line by line.

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


def main() -> int:
    """Run the commands; return the exit status."""
    for command in commands(Path("README.md").read_text()):
        if command.startswith(SKIPPED):
            continue
        started = time.perf_counter()
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
        print(f"{time.perf_counter() - started:6.1f} s  {command}", flush=True)
        if done.returncode:
            print(f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
