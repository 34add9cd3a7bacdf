"""Which implementation of an operator runs: explicit, visible, never switched silently.

Each operator keeps one table of backends in order of preference. ``backend="auto"``
takes the first that can serve the request; a backend asked for by name that cannot
serve it raises :class:`BackendError` with the reason.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ssm._errors import BackendError, bad_argument
from ssm.ops._library import is_ordinary


@dataclass(frozen=True)
class Request:
    """What a backend must know to say whether it can serve a call.

    dtype is that of the computation (complex where any operand is). ``sizes`` are those
    that some backend limits, by the operator's letters. ``by_name``: the caller named
    the backend, and did not leave the choice to "auto".
    """

    device: torch.device
    dtype: torch.dtype
    needs_grad: bool = False
    sizes: Mapping[str, int] = field(default_factory=dict)
    by_name: bool = False

    def naming(self) -> "Request":
        """The same request by a caller who named the backend."""
        return Request(self.device, self.dtype, self.needs_grad, self.sizes, True)


def _serves_all(request: Request) -> str | None:  # noqa: ARG001  # the signature
    return None


@dataclass(frozen=True)
class Backend:
    """One implementation: ``run(...)``, and ``refuses(request)`` -> reason or None.

    ``gpu``: a kernel for GPUs (:mod:`ssm.ops._gpu`), whose absence there is said.
    ``tested(device)``: whether what it refuses there will stay so in this process.
    ``from_zero``: it takes None for a first state of zeros.
    ``direct(*arguments)``: what serves ordinary tensors that lie in memory as these do,
    with less ado than ``run``, or None: see :func:`remembered`.
    """

    run: Callable[..., Any]
    refuses: Callable[[Request], str | None] = _serves_all
    gpu: bool = False
    tested: Callable[[torch.device], bool] = lambda _: True
    from_zero: bool = False
    direct: Callable[..., Callable[..., Any] | None] | None = None


@dataclass(frozen=True)
class Choice:
    """A backend by its name ``op=backend``, and the dtype of the computation."""

    name: str
    backend: Backend
    dtype: torch.dtype
    final: bool  # operands alike will always be served by it
    direct: Callable[..., Any] | None = None  # and by this, if it is there

    def taken(self) -> Backend:
        """The backend, and :func:`backends_used` hears of it."""
        _note(self.name)
        return self.backend


_used: ContextVar[set[str] | None] = ContextVar("backends_used", default=None)


def choose(
    op: str, backend: str, table: Mapping[str, Backend], request: Request
) -> Backend:
    """The backend that runs this call.

    Raises ArgumentError for an unknown name and BackendError, with the reason,
    for one that cannot serve the request.
    """
    return find(op, backend, table, request).taken()


def find(
    op: str, backend: str, table: Mapping[str, Backend], request: Request
) -> Choice:
    """As :func:`choose`, before it is taken."""
    if backend != "auto":
        if backend not in table:
            names = ", ".join(["auto", *table])
            raise bad_argument("backend", repr(backend), names, "choose one of those")
        if reason := table[backend].refuses(request.naming()):
            raise BackendError(f"{op}: backend {backend!r} cannot run: {reason}")
        name = backend
    else:
        name = next(n for n, b in table.items() if b.refuses(request) is None)
        if request.device.type == "cuda" and not table[name].gpu:
            _say_why_slow(table, request)
    found = table[name]
    return Choice(f"{op}={name}", found, request.dtype, found.tested(request.device))


_MOST = 4096  # kinds of calls that are remembered
_remembered: dict[Any, Choice] = {}


def remembered(
    settle: Callable[..., Choice], *, in_place: bool = False
) -> Callable[..., Choice]:
    """``settle``, which checks operands and chooses for them, once for all alike.

    Its arguments are tensors, of which it may look at shape, dtype and device only, and
    hashable options. Small scans on a GPU take less time than these checks.

    ``in_place``: those are alike that lie in memory alike too, with the same strides
    and at multiples of the same numbers of bytes, up to 16; the choice then has what
    the backend's ``direct`` made of the first of them.
    """
    kinds_of = _kinds_in_place if in_place else _kinds

    @functools.wraps(settle)
    def once(*arguments: Any) -> Choice:
        kinds = kinds_of(arguments)
        if kinds is None:
            return settle(*arguments)
        key = (settle, *kinds)
        try:
            choice = _remembered.get(key)
        except TypeError:  # an option of no use, which ``settle`` will refuse
            return settle(*arguments)
        if choice is None:
            choice = settle(*arguments)
            if choice.final:
                if in_place and (direct := choice.backend.direct):
                    choice = replace(choice, direct=direct(*arguments))
                if len(_remembered) >= _MOST:
                    _remembered.clear()
                _remembered[key] = choice
        return choice

    return once


def _kinds(arguments: Sequence[Any]) -> list[Any] | None:
    if torch.compiler.is_compiling() or type(arguments[0]) is not torch.Tensor:
        return None
    return [
        (x.shape, x.dtype, x.device) if isinstance(x, Tensor) else (type(x), x)
        for x in arguments  # the type too: 1, 1.0 and True are equal
    ]


def _kinds_in_place(arguments: Sequence[Any]) -> list[Any] | None:
    if not is_ordinary(arguments[0]):
        return None
    try:
        return [
            (x.shape, x.dtype, x.device, x.stride(), x.data_ptr() & 15)
            if isinstance(x, Tensor)
            else (type(x), x)
            for x in arguments
        ]
    except RuntimeError:  # another operand has no memory of its own
        return None


def forget() -> None:
    """Settle every call anew: what may run has changed."""
    _remembered.clear()


def _say_why_slow(table: Mapping[str, Backend], request: Request) -> None:
    """Warn once where this GPU, or what is installed, keeps every GPU kernel off."""
    from ssm.ops._gpu import say_once, unusable_kernels  # it imports this module

    written = any(backend.gpu for backend in table.values())
    if written and (reason := unusable_kernels(request.device)):
        say_once(f"GPU kernels are off: {reason}; PyTorch operations run instead")


def explain(table: Mapping[str, Backend], request: Request) -> dict[str, str | None]:
    """For each backend why it refuses the request, or None where it would run."""
    return {name: backend.refuses(request) for name, backend in table.items()}


@contextmanager
def backends_used() -> Iterator[set[str]]:
    """Collect ``op=backend`` for every operator call in the block."""
    names: set[str] = set()
    token = _used.set(names)
    try:
        yield names
    finally:
        _used.reset(token)


def _note(entry: str) -> None:
    if torch.compiler.is_compiling():
        return
    names = _used.get()
    if names is not None:
        names.add(entry)
