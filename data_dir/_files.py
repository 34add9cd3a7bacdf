"""Files that appear under their names whole or not at all, one writer at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from experiments.common import unwritable

PARTIAL = ".partial-"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make ``folder`` and hold its other writers back, in this and other processes."""
    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise unwritable(folder, error) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def written_whole(*finals: Path) -> Iterator[tuple[Path, ...]]:
    """Give a temporary name per file; at the end each is renamed, the last one last.

    Where there are several, the last one is taken away before the first is replaced:
    where it stands, all stand as they were written together. To be used under
    :func:`locked`; what a killed writer left is overwritten by the next one.
    """
    partials = tuple(final.with_name(PARTIAL + final.name) for final in finals)
    try:
        yield partials
        if len(finals) > 1:
            finals[-1].unlink(missing_ok=True)
        for partial, final in zip(partials, finals, strict=True):
            partial.replace(final)
    except OSError as error:
        raise unwritable(finals[0], error) from None
    finally:
        for partial in partials:
            partial.unlink(missing_ok=True)
