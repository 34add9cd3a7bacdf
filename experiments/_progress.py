"""Progress of long work: silent in libraries, a bar where a command line shows one."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

Item = TypeVar("Item")
_display: ContextVar["Progress | None"] = ContextVar("progress_display", default=None)


def track(
    items: Iterable[Item], description: str, total: int | None = None
) -> Iterator[Item]:
    """Yield ``items``, moving a bar along if :func:`progress_shown` is active."""
    display = _display.get()
    if display is None:
        yield from items
        return
    if total is None and isinstance(items, Sized):
        total = len(items)
    task = display.add_task(description, total=total)
    try:
        for item in items:
            yield item
            display.advance(task)
    finally:
        display.remove_task(task)  # else the bars of inner loops would pile up


@contextmanager
def meter(description: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar moved by ``show(done, total, note)``, if :func:`progress_shown` is active.

    For work that has something to tell beside how far it is: a loss, a speed.
    """
    display = _display.get()
    if display is None:
        yield lambda _done, _total, _note: None
        return
    task = display.add_task(description, total=None)

    def show(done: int, total: int, note: str) -> None:
        text = f"{description}  {note}"
        display.update(task, completed=done, total=total, description=text)

    try:
        yield show
    finally:
        display.remove_task(task)


@contextmanager
def progress_shown() -> Iterator[None]:
    """Show the bars of :func:`track` on standard error, where that is a terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    if _display.get() is not None or not sys.stderr.isatty():
        yield
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    display = Progress(
        *columns,
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=sys.stdout.isatty(),  # output sent to a file stays there
    )
    with display:
        token = _display.set(display)
        try:
            yield
        finally:
            _display.reset(token)
