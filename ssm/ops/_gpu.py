"""Where GPU kernels run: on NVIDIA GPUs that are new enough, once they passed a test.

A kernel enters its operator's table as ``gpu_backend(op, name, run)``. It serves CUDA
tensors of the dtypes it was written for, after the self-test of this GPU, torch and
Triton (:mod:`ssm.ops._selftest`) found it right. Triton's kernels also run on CPU
tensors, slowly, through Triton's interpreter (TRITON_INTERPRET=1), where they are asked
for by name: that is how they are tested without a GPU.
"""

import functools
import importlib.util
import math
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ssm.ops._dispatch import Backend, Request

OLDEST = (8, 0)  # bfloat16 and asynchronous copies
REAL = (torch.float32,)
_AS_IT_IS = nullcontext()

# Decided once: looking these up inside a compiled graph would break the graph.
_PACKAGES = {"triton": ("triton",), "cuda": ("cuda.core", "cuda.bindings")}
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "") == "1"


def _is_there(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # its parent is missing
        return False


_MISSING = {
    name: next((p for p in packages if not _is_there(p)), None)
    for name, packages in _PACKAGES.items()
}


def cdiv(n: int, size: int) -> int:
    """How many blocks of ``size`` cover n. Triton's own takes 10 µs on the host."""
    return -(-n // size)


def power_of_2(n: int) -> int:
    """The smallest power of 2 that is n or more, for n >= 1."""
    return 1 << (n - 1).bit_length()


@functools.cache
def multiprocessors(device: int) -> int:
    """Of the CUDA device with this index."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def most_shared(device: int) -> int:
    """Bytes that a block on the CUDA device with this index can ask for."""
    properties = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


def on_device_of(x: torch.Tensor) -> AbstractContextManager[Any]:
    """The device of x as the current one, where kernels are launched.

    Entering ``torch.cuda.device`` where nothing changes would cost microseconds.
    """
    if not x.is_cuda or x.get_device() == torch._C._cuda_getDevice():
        return _AS_IT_IS
    return torch.cuda.device(x.device)


def unwritten(
    shape: tuple[int, ...], dtype: torch.dtype, device: int
) -> Callable[[], torch.Tensor]:
    """A function that allocates on the current device, or on the CPU if that is -1.

    What the code of torch's compiler calls: a third of the time of ``torch.empty``,
    which goes through the dispatcher. For calls that nothing watches.
    """
    sizes = tuple(shape)  # no torch.Size
    strides = tuple(math.prod(sizes[i + 1 :]) for i in range(len(sizes)))
    guards: Any = torch._C._dynamo.guards
    empty = guards._empty_strided_cpu if device < 0 else guards._empty_strided_cuda
    return functools.partial(empty, sizes, strides, dtype)


def gpu_backend(
    op: str,
    name: str,
    run: Callable[..., Any],
    *,
    dtypes: Sequence[torch.dtype] = REAL,
    refuses: Callable[[Request], str | None] | None = None,
    from_zero: bool = False,
    direct: Callable[..., Callable[..., Any] | None] | None = None,
) -> Backend:
    """The table's entry for the kernel ``name`` ("triton" or "cuda") of ``op``.

    dtypes: of computation. ``refuses``: further limits of this kernel, asked last.
    ``from_zero``, ``direct``: see :class:`Backend`.
    ``run`` imports the kernel's module where it runs, not before.
    """

    settled: dict[Any, str | None] = {}  # asked at every call: microseconds count

    def refuse(request: Request) -> str | None:
        key = (request.device, request.dtype, request.by_name)
        if not torch.compiler.is_compiling() and key in settled:
            reason = settled[key]
        else:
            reason = _refuses_here(op, name, dtypes, request)
            if not torch.compiler.is_compiling() and (
                reason is not None or is_tested(op, name, request.device)
            ):
                settled[key] = reason
        return reason or (None if refuses is None else refuses(request))

    tested = functools.partial(is_tested, op, name)
    return Backend(run, refuse, True, tested, from_zero, direct)


def _refuses_here(
    op: str, name: str, dtypes: Sequence[torch.dtype], request: Request
) -> str | None:
    """Why this kernel serves no call with this device and dtype, or None."""
    place = refuses_place(name, request.device, by_name=request.by_name)
    if place is not None:
        return place
    if request.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"it computes in {names}, not in {request.dtype}"
    if request.device.type == "cuda":
        return verdict(op, name, request.device)
    return None


def is_tested(op: str, name: str, device: torch.device) -> bool:
    """Whether what :func:`verdict` says of this kernel is final in this process."""
    from ssm.ops import _selftest

    return device.type != "cuda" or _selftest.is_known(op, name, _index(device))


def refuses_place(
    name: str, device: torch.device, *, by_name: bool = False
) -> str | None:
    """Why kernels of this kind cannot run on this device, or None."""
    if device.type != "cuda" and not (name == "triton" and _INTERPRETED and by_name):
        return f"it runs on CUDA tensors, not on {device}"
    if (package := _MISSING[name]) is not None:
        return f"{package} is not installed"
    return unusable(device) if device.type == "cuda" else None


def _constant(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let torch.compile call ``function`` while it traces, and keep what it returned.

    ``torch.compiler.assume_constant_result`` does this and imports the whole compiler,
    seconds in every process; the mark is all that it sets.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant
def unusable(device: torch.device) -> str | None:
    """Why our kernels do not run on this GPU, or None."""
    return _unusable(_index(device))


def unusable_kernels(device: torch.device) -> str | None:
    """Why no kernel at all runs on this GPU: the GPU, or Triton's absence; or None."""
    if _MISSING["triton"] is not None:
        return f"{_MISSING['triton']} is not installed"
    return unusable(device)


@_constant
def verdict(op: str, name: str, device: torch.device) -> str | None:
    """Why the self-test switched this kernel off on this GPU, or None."""
    from ssm.ops import _selftest

    return _selftest.verdict(op, name, _index(device))


@_constant
def say_once(line: str) -> None:
    """Warn of a slow fallback, once in a process."""
    _say_once(line)


@functools.cache
def _say_once(line: str) -> None:
    warnings.warn(line, RuntimeWarning, stacklevel=2)


@functools.cache
def _unusable(index: int) -> str | None:
    if torch.version.cuda is None:
        return "the GPU kernels are written for NVIDIA GPUs"
    capability = torch.cuda.get_device_capability(index)
    if capability >= OLDEST:
        return None
    has, needs = (".".join(map(str, version)) for version in (capability, OLDEST))
    name = torch.cuda.get_device_name(index)
    return f"{name} has compute capability {has}; the GPU kernels need {needs}"


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
