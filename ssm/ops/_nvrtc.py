"""CUDA C++ compiled at run time by NVIDIA's ``cuda.core``, and launched.

A kernel file is compiled for one GPU architecture and one set of definitions, which are
put before it as ``#define`` lines, and ``common.cu``. The machine code is kept in a
folder, so that the next process only loads it; a file that cannot be read or written
costs a compilation.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import tempfile
from pathlib import Path

import torch

COMMON = Path(__file__).with_name("common.cu")
Definitions = tuple[tuple[str, int], ...]


class Kernel:
    """One kernel on one device; call it with a grid, its packed argument and a stream.

    The argument is a struct passed by value; nothing waits.
    """

    def __init__(
        self, function: object, device: int, threads: int, shared: int
    ) -> None:
        from cuda.bindings import driver

        self._launch = driver.cuLaunchKernel
        self._success = driver.CUresult.CUDA_SUCCESS
        self._no_context = driver.CUresult.CUDA_ERROR_INVALID_CONTEXT
        self._device = device
        self._function = driver.CUfunction(int(function))  # type: ignore[call-overload]
        self._threads, self._shared = threads, shared

    def __call__(self, blocks: int, argument: bytes, stream: int) -> None:
        """Launch that many blocks. Raises RuntimeError where the driver refuses."""
        status = self._try(blocks, argument, stream)
        if status == self._no_context:  # a thread that has not used the device yet
            _make_current(self._device)
            status = self._try(blocks, argument, stream)
        if status != self._success:
            raise RuntimeError(f"a kernel of {blocks} blocks was refused: {status}")

    def _try(self, blocks: int, argument: bytes, stream: int) -> object:
        address = ctypes.c_char_p(argument)  # the memory of ``argument`` itself
        (status,) = self._launch(
            self._function,
            blocks,
            1,
            1,
            self._threads,
            1,
            1,
            self._shared,
            stream,
            ctypes.addressof(address),
            0,
        )
        return status


@functools.cache
def kernel(
    file: Path,
    definitions: Definitions,
    name: str,
    device: int,
    threads: int,
    shared: int,
) -> Kernel:
    """The kernel ``name`` of ``file`` on a CUDA device; ``shared`` bytes a block."""
    from cuda.bindings import driver

    _make_current(device)
    library = _library(file, definitions, torch.cuda.get_device_capability(device))
    (function,) = _checked(driver.cuLibraryGetKernel(library, name.encode()))
    if shared > 48 * 1024:  # more must be asked for
        attribute = driver.CUfunction_attribute
        limit = attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        (ordinal,) = _checked(driver.cuDeviceGet(device))
        _checked(driver.cuKernelSetAttribute(limit, shared, function, ordinal))
    return Kernel(function, device, threads, shared)


def _make_current(device: int) -> None:
    """Give this thread PyTorch's context of the device."""
    from cuda.bindings import driver

    (ordinal,) = _checked(driver.cuDeviceGet(device))
    (context,) = _checked(driver.cuDevicePrimaryCtxRetain(ordinal))
    _checked(driver.cuCtxSetCurrent(context))


@functools.cache
def _library(
    file: Path, definitions: Definitions, capability: tuple[int, int]
) -> object:
    from cuda.bindings import driver

    code = machine_code(file, definitions, capability)
    options: tuple[object, ...] = ([], [], 0, [], [], 0)
    (library,) = _checked(driver.cuLibraryLoadData(code, *options))
    return library


def machine_code(
    file: Path, definitions: Definitions, capability: tuple[int, int]
) -> bytes:
    """``file`` compiled for GPUs of this compute capability; needs no GPU.

    Raises cuda.core's NVRTCError, with the compiler's log, where it does not compile.
    """
    import cuda.bindings

    lines = [f"#define {name} {value}\n" for name, value in definitions]
    parts = [path.read_text(encoding="utf-8") for path in (COMMON, file)]
    source = "#line 1\n".join(["".join(lines), *parts])
    target = "sm_{}{}".format(*capability)
    key = f"{target} {cuda.bindings.__version__} {_compiler()} {source}"
    path = _folder() / (hashlib.sha256(key.encode()).hexdigest()[:32] + ".cubin")
    with contextlib.suppress(OSError):
        return path.read_bytes()
    code = _compile(source, target, file.name)
    with contextlib.suppress(OSError):
        _write(path, code)
    return code


def _compile(source: str, target: str, name: str) -> bytes:
    from cuda.core import Program, ProgramOptions

    options = ProgramOptions(
        name=name, std="c++17", arch=target, device_as_default_execution_space=True
    )
    return bytes(Program(source, "c++", options).compile("cubin").code)


@functools.cache
def _compiler() -> str:
    from cuda.bindings import nvrtc

    return ".".join(map(str, nvrtc.nvrtcVersion()[1:]))


def _folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "ssm-laboratory" / "kernels"


def _write(path: Path, code: bytes) -> None:
    """All of it or nothing, from any number of processes at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("wb", dir=path.parent, delete=False) as file:
        file.write(code)
    Path(file.name).replace(path)


def _checked(answer: tuple[object, ...]) -> tuple[object, ...]:
    from cuda.bindings import driver

    status, *values = answer
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"the CUDA driver answers {status}")
    return tuple(values)
