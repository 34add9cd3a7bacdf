"""The CUDA kernels of ``ssm.ops``, run on the CPU: their logic without a GPU.

A kernel file is compiled by the host's C++ compiler behind ``cuda.h``, which
stands for CUDA and for ``common.cu``. It shows wrong indices, missing barriers between
lanes that run in order, and sums that are not all there; not what only a GPU does:
races within a warp, registers, and the last digit of its exponential.
"""

import ctypes
import functools
import importlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch

from ssm.ops._dispatch import Backend, forget
from ssm.ops._nvrtc import Definitions

HEADER = Path(__file__).with_name("cuda.h")
COMPILER = shutil.which("g++") or shutil.which("clang++")
HOPPER = 227 * 1024  # bytes of shared memory of a block
_FOLDER = tempfile.TemporaryDirectory(prefix="cuda-on-cpu-")


class Kernel:
    """One kernel; call it as :class:`ssm.ops._nvrtc.Kernel`."""

    def __init__(
        self, library: ctypes.CDLL, name: str, threads: int, eager: bool
    ) -> None:
        self._run, self._kernel = library.run, library[name]
        ctypes.c_int.in_dll(library, "eager").value = int(eager)
        self._run.restype = ctypes.c_bool
        self._name, self._threads = name, threads

    def __call__(self, blocks: int, argument: bytes, stream: int) -> None:
        """Run that many blocks, now."""
        del stream
        numbers = ctypes.create_string_buffer(argument, len(argument))
        if not self._run(self._kernel, blocks, self._threads, numbers):
            raise AssertionError(f"threads of {self._name} wait for each other")


_RUN = """
extern "C" bool run(void (*kernel)(Args), int blocks, int threads, const Args *a) {
  return launch(blocks, threads, [=] { kernel(*a); });
}
"""


def _compile(*words: str | Path) -> None:
    assert COMPILER is not None
    # Some compilers let jumps go up the one stack only: fibres have their own.
    flags = ["-std=c++17", "-O1", "-w", "-fPIC", "-U_FORTIFY_SOURCE"]
    subprocess.run([COMPILER, *flags, *words], check=True)


@functools.cache
def _header(io: object) -> Path:
    """The header for one ``IO``, compiled: half of a kernel's compilation is its.

    GCC finds what it made of a header beside it; other compilers read the header.
    """
    header = Path(_FOLDER.name) / f"cuda-{io}.h"
    text = f"#define IO {io}\n" + HEADER.read_text(encoding="utf-8")
    header.write_text(text, encoding="utf-8")
    _compile("-x", "c++-header", "-o", header.with_name(f"{header.name}.gch"), header)
    return header


@functools.cache
def _library(file: Path, definitions: Definitions) -> ctypes.CDLL:
    """``file`` compiled: its kernels and ``run(kernel, blocks, threads, args)``."""
    named = dict(definitions)
    included = f'#include "{_header(named.pop("IO"))}"'  # reads no other definition
    defined = [f"#define {name} {value}" for name, value in named.items()]
    source = [included, *defined, file.read_text(encoding="utf-8"), _RUN]
    path = Path(_FOLDER.name) / f"{abs(hash((file, definitions))):x}.cpp"
    path.write_text("\n".join(source), encoding="utf-8")
    made = path.with_suffix(".so")
    _compile("-shared", "-o", made, path)
    return ctypes.CDLL(str(made))


def kernel(
    file: Path,
    definitions: Definitions,
    name: str,
    device: int,
    threads: int,
    shared: int,
    eager: bool = False,
) -> Kernel:
    """As :func:`ssm.ops._nvrtc.kernel`; ``eager``: see the header."""
    del device
    assert shared <= HOPPER, f"{name} asks for {shared} bytes of shared memory"
    return Kernel(_library(file, definitions), name, threads, eager)


@contextmanager
def emulated(
    op: str, *, multiprocessors: int = 1, eager: bool = False
) -> Iterator[None]:
    """Let backend "cuda" of ``op`` run on CPU tensors, asked for by name.

    ``multiprocessors``: of the GPU that it lays its work out for. ``eager``: when
    asynchronous copies are done (see the header).
    """
    if COMPILER is None:
        pytest.skip("needs a C++ compiler")
    host = importlib.import_module(f"ssm.ops.{op}.cuda")
    table = importlib.import_module(f"ssm.ops.{op}.op").BACKENDS

    with pytest.MonkeyPatch.context() as patch:
        for name in ("_kernel", "_layout"):  # none from another emulation
            if remembered := getattr(host, name, None):
                patch.setattr(host, name, functools.cache(remembered.__wrapped__))
        patch.setattr(host, "kernel", functools.partial(kernel, eager=eager))
        patch.setattr(host, "multiprocessors", lambda _: multiprocessors)
        patch.setattr(host, "most_shared", lambda _: HOPPER, raising=False)
        patch.setattr(host, "on_device_of", lambda _: nullcontext())
        patch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 0, raising=False)
        own = table["cuda"]
        served = Backend(own.run, from_zero=own.from_zero, direct=own.direct)
        patch.setitem(table, "cuda", served)
        forget()
        yield
    forget()
