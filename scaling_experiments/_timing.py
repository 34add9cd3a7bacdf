"""Time and memory of calls, on a CPU and on CUDA, by one code path.

Time: the first call of each contestant apart ("cold"), then warm ones in turns, so that
a slow spell of the machine falls on all. On a CPU by the wall clock; on CUDA by events
between two synchronisations, which leaves out what Python did before the first kernel.

Memory: on CUDA the most that PyTorch's allocator held during a call; on a CPU the most
that the resident size of the process grew (Linux only), which sees what NumPy and Numba
allocate too. Freed blocks must go back to the system for that: see
:func:`in_fresh_process`.
"""

import ctypes
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch

from experiments.common import bad_input

Call = Callable[[], object]
Tell = Callable[[str], None]
SLOW = 16  # times a point's seconds: a call expected to take longer is left out
SHORT = 0.01  # s; a shorter call is timed right after one that is not counted
USABLE = 0.8  # of the memory that is free: the rest is for what the estimates miss
_ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Budget:
    """How long a call is repeated: ``seconds`` of warm time, ``at_most`` times.

    Fewer than ``at_least`` repeats in that time go on, up to ``patience`` times it.
    """

    seconds: float
    at_least: int = 5
    at_most: int = 50
    patience: float = 4.0

    def wants(self, repeats: Sequence[float]) -> bool:
        """Whether another repeat is due."""
        n, spent = len(repeats), sum(repeats)
        if n == 0 or (n < self.at_least and spent < self.patience * self.seconds):
            return True
        return n < self.at_most and spent < self.seconds


def check_device(name: str) -> torch.device:
    """The device called ``name``. Raises InputError where PyTorch sees none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise bad_input("device", name, "a device of this machine", "try --device cpu")
    return torch.device(name)


def check_limits(seconds_per_point: float, memory_gb: float) -> None:
    """Raise InputError unless both limits make sense."""
    if not 0 < seconds_per_point < math.inf:
        raise bad_input(
            "seconds-per-point", seconds_per_point, "seconds above 0", "try 0.25"
        )
    if not 0 <= memory_gb < math.inf:
        raise bad_input("memory-gb", memory_gb, "0 or more", "try 4")


# --- time -----------------------------------------------------------------------------


def too_slow(
    past: Sequence[tuple[int, float]], length: int, power: float, seconds: float
) -> str | None:
    """Why a call is expected to take too long for a point of ``seconds``, or None."""
    if not past:
        return None
    expected = expected_seconds(past, length, power)
    if expected <= SLOW * seconds:
        return None
    return f"about {expected:.1f} s a call; raise --seconds-per-point"


def expected_seconds(
    past: Sequence[tuple[int, float]], length: int, power: float
) -> float:
    """Seconds at ``length``, from (length, seconds) before it and how fast they rose.

    The exponent is that of the last rise, within 1 and 2 (1 for ``power`` = 1: what is
    more is noise); ``power`` where there is one length only.
    """
    last, seconds = past[-1]
    exponent = power
    if len(past) > 1:
        before, shorter = past[-2]
        rise = math.log(seconds / shorter) / math.log(last / before)
        exponent = min(max(rise, 1.0), 2.0 if power > 1 else 1.0)
    return seconds * (length / last) ** exponent


@contextmanager
def threads(n: int) -> Iterator[None]:
    """``n`` threads of PyTorch, and of Numba where it has so many.

    After a first call: Numba's first kernel undoes ``torch.set_num_threads``.
    """
    before = torch.get_num_threads(), numba.get_num_threads()
    numba.set_num_threads(min(n, before[1]))
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        numba.set_num_threads(before[1])


def seconds_of(call: Call, device: torch.device) -> float:
    """Seconds of one call, its work on ``device`` included."""
    if device.type == "cuda":
        return _cuda_seconds(call, device)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _cuda_seconds(call: Call, device: torch.device) -> float:
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return 1e-3 * start.elapsed_time(end)


def in_turns(
    calls: Mapping[str, Call],
    device: torch.device,
    budget: Budget,
    tell: Tell = lambda _: None,
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Times of every call, and for those that ran out of memory the reason.

    Returns ({name: see :func:`summary`}, {name: reason}). ``tell`` hears whose turn it
    is. The calls keep nothing of each other: each is made anew for its turn.
    """
    cold: dict[str, float] = {}
    repeats: dict[str, list[float]] = {}
    lost: dict[str, str] = {}

    def attempt(name: str) -> float | None:
        tell(name)
        try:
            with memory_errors_told():
                return seconds_of(calls[name], device)
        except ShortOfMemoryError as error:
            lost[name] = str(error)
        if device.type == "cuda":  # here: the error no longer holds its tensors
            torch.cuda.empty_cache()
        return None

    for name in calls:
        first = attempt(name)
        if first is not None:
            cold[name], repeats[name] = first, []
    while waiting := [name for name in repeats if budget.wants(repeats[name])]:
        for name in waiting:
            last = repeats[name][-1] if repeats[name] else cold[name]
            seconds = attempt(name) if last < SHORT else 0.0
            seconds = seconds if seconds is None else attempt(name)
            if seconds is None:
                del repeats[name]
            else:
                repeats[name].append(seconds)
    return {name: summary(cold[name], repeats[name]) for name in repeats}, lost


def summary(cold: float, repeats: Sequence[float]) -> dict[str, Any]:
    """The first call, then median and quartiles of the warm ones, and each of them."""
    low, median, high = np.percentile(repeats, (25, 50, 75))
    return {
        "cold_s": cold,
        "median_s": float(median),
        "low_s": float(low),
        "high_s": float(high),
        "n": len(repeats),
        "repeats_s": list(repeats),
    }


# --- memory ---------------------------------------------------------------------------


class ShortOfMemoryError(Exception):
    """A call that ran out of memory; the text says so in one line."""


@contextmanager
def memory_errors_told() -> Iterator[None]:
    """Raise :class:`ShortOfMemoryError` where memory runs out, whoever notices it."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        said = str(error).strip() or type(error).__name__
        # PyTorch's allocator of the CPU has no type of error of its own.
        if type(error) is RuntimeError and "can't allocate memory" not in said:
            raise
        raise ShortOfMemoryError(f"out of memory ({said.splitlines()[0]})") from None


def free_bytes(device: torch.device) -> int:
    """The memory that a call may ask for: free on the card, or available here.

    On a CPU what Linux calls available, within the limit of a container; elsewhere half
    of what the machine has.
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + kept)  # PyTorch reuses it
    available = _field(Path("/proc/meminfo"), "MemAvailable")
    if available is None:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    group = Path("/sys/fs/cgroup")
    limit, used = (_number(group / f"memory.{kind}") for kind in ("max", "current"))
    if limit is None or used is None:
        return available
    return min(available, max(limit - used, 0))


def usable_bytes(memory_gb: float, device: torch.device) -> float:
    """``memory_gb``, or for 0 what may be used of the memory that is free."""
    return 1e9 * memory_gb if memory_gb else USABLE * free_bytes(device)


def short_of_memory(needed: float, limit: float) -> str | None:
    """Why a call that needs ``needed`` bytes is not tried, or None if it fits."""
    if needed <= limit:
        return None
    return f"needs about {needed / 1e9:.1f} GB, of which {limit / 1e9:.1f} may be used"


def peak_bytes(call: Call, device: torch.device) -> int:
    """The most memory that ``call`` holds beyond what is held before it."""
    if device.type == "cuda":
        return _cuda_peak(call, device)
    _trim()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
    before = _resident("VmRSS")
    call()
    return max(0, _resident("VmHWM") - before)


def _cuda_peak(call: Call, device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device) - before)


def _trim() -> None:
    """Give freed memory back, where the C library can: what is reused adds nothing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def can_see_peaks() -> bool:
    """Whether this system tells a process the peak of its resident size."""
    return Path("/proc/self/clear_refs").exists()


def in_fresh_process(
    module: str, function: str, argument: dict[str, Any]
) -> Iterator[Any]:
    """What ``module.function(argument)`` yields (JSON values) in a new process.

    There every freed block of 64 KiB or more goes back to the system at once, so that
    the resident size follows what is in use. Ends early where the process does: a
    system without memory kills it.
    """
    program = (
        f"import json, sys; from {module} import {function} as f\n"
        "for value in f(json.loads(sys.stdin.read())): "
        "print(json.dumps(value), flush=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=_ROOT,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
    ) as process:
        assert process.stdin is not None, "a pipe was asked for"
        assert process.stdout is not None, "a pipe was asked for"
        process.stdin.write(json.dumps(argument))
        process.stdin.close()
        try:
            for line in process.stdout:
                yield json.loads(line)
        finally:
            process.kill()  # where the caller stopped early


def _resident(kind: str) -> int:
    size = _field(Path("/proc/self/status"), kind)
    assert size is not None, f"the system tells no {kind}"
    return size


def _field(path: Path, name: str) -> int | None:
    """``name:   123 kB`` of a file in /proc, in bytes."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    sizes = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return 1024 * int(sizes[0]) if sizes else None


def _number(path: Path) -> int | None:
    """The number in a file; None where there is no file or no limit ("max")."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
