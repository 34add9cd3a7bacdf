"""Compiles the GPU kernels for this machine and tests each against the naive loop.

    python -m ssm.warmup

Every kernel of every operator runs on small random problems, forward and backward, in
float32 and bfloat16, at awkward sizes and at sizes as models have them; outputs, final
states and all gradients are held against the naive loop in double precision. What is
compiled and what is found is kept on disk (Triton's cache, and the file of
:func:`ssm.ops._selftest.cache_file`), so that the first call of a later process starts
at once. A kernel that fails is off until this command, or a changed library, finds it
right. Exit status 1 if one fails.
"""

import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from experiments import common

NO_GPU = "no CUDA device is visible to PyTorch: there is nothing to compile"


class Tested(NamedTuple):
    """One kernel on one device: why it cannot run, or what is wrong; seconds taken."""

    op: str
    backend: str
    refusal: str
    fault: str
    seconds: float


def warm_up(index: int) -> Iterator[Tested]:
    """Compile and test every kernel on CUDA device ``index``, one by one."""
    import torch

    from ssm.ops import _gpu, _selftest

    device = torch.device("cuda", index)
    for op, name in common.track(list(_selftest.kernels()), "kernels"):
        start = time.perf_counter()
        fault, refusal = None, _gpu.refuses_place(name, device)
        if refusal is None:
            with warnings.catch_warnings():  # the table says it
                warnings.simplefilter("ignore", RuntimeWarning)
                fault = _selftest.judge(op, name, index, whole=True)
        taken = time.perf_counter() - start
        yield Tested(op, name, refusal or "", fault or "", taken)


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line for each kernel; return 1 if one fails."""
    about = (__doc__ or "").strip()
    common.parse("python -m ssm.warmup", about, (), argv)
    with common.one_line_errors():
        try:
            import torch
        except ImportError:
            common.fail("PyTorch cannot be imported; mend: uv sync --extra torch")
        if not torch.cuda.is_available():
            print(NO_GPU)
            return 0
        failed = False
        for index in range(torch.cuda.device_count()):
            print(f"cuda:{index} {torch.cuda.get_device_name(index)}")
            with common.progress_shown():
                for kernel in warm_up(index):
                    failed |= bool(kernel.fault)
                    print(_line(kernel))
    return int(failed)


def _line(kernel: Tested) -> str:
    reason = kernel.refusal or kernel.fault
    verdict = f"off: {reason}" if reason else "right"
    name = f"{kernel.op} ({kernel.backend})"
    return f"  {name:<28} {kernel.seconds:6.1f} s  {verdict}"


if __name__ == "__main__":
    sys.exit(main())
