"""Numba's threads and PyTorch's: one runtime, two settings."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_the_first_kernel_leaves_pytorch_its_threads():
    code = (
        "import torch; torch.set_num_threads(1)\n"
        "from ssm.ops import linear_scan\n"
        "linear_scan(torch.rand(2, 9, 3), torch.rand(2, 9, 3), backend='cpu')\n"
        "print(torch.get_num_threads())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": "", "NUMBA_NUM_THREADS": "2"},
    )
    assert done.stdout == "1\n"
