"""Bars of long work: nothing in libraries, one bar each where a terminal shows them."""

import io
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from rich.progress import Progress

from experiments import _progress
from experiments.common import meter, progress_shown, track


class Terminal(io.StringIO):
    """Standard error that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@contextmanager
def terminal() -> Iterator[Terminal]:
    """For a ``with`` in the test: pytest replaces standard error after its fixtures."""
    screen = Terminal()
    settings = {"TERM": "xterm", "COLUMNS": "200", "LINES": "20"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stderr", screen)
        for name, value in settings.items():
            patch.setenv(name, value)
        yield screen


def display() -> Progress:
    shown = _progress._display.get()
    assert shown is not None
    return shown


def test_without_a_command_line_nothing_is_shown(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with terminal() as screen, meter("training") as show:
        show(3, 10, "loss 0.5")
        assert screen.getvalue() == ""
    assert capfd.readouterr() == ("", "")


def test_without_a_terminal_nothing_is_shown(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with progress_shown(), meter("training") as show:
        show(3, 10, "loss 0.5")
        assert _progress._display.get() is None
    assert capfd.readouterr() == ("", "")


def test_a_meter_shows_how_far_it_is_and_its_note() -> None:
    with terminal() as screen, progress_shown(), meter("training") as show:
        for done, note in [(3, "loss 0.5"), (7, "loss 0.25")]:
            start = len(screen.getvalue())
            show(done, 10, note)
            (task,) = display().tasks
            assert (task.completed, task.total) == (done, 10)
            display().refresh()
            line = screen.getvalue()[start:]
            assert f"training  {note}" in line
            assert f"{done}/10" in line
    assert _progress._display.get() is None


def fail_within_two_meters() -> None:
    with meter("outer") as outer:
        outer(1, 2, "")
        with meter("inner") as inner:
            inner(2, 3, "")
            found = [(task.completed, task.total) for task in display().tasks]
            assert found == [(1, 2), (2, 3)]
        assert len(display().tasks) == 1
        raise ValueError("stop")


def test_a_meter_goes_when_its_work_ends_or_fails() -> None:
    with terminal(), progress_shown():
        with pytest.raises(ValueError, match="stop"):
            fail_within_two_meters()
        assert not display().tasks


def test_a_track_within_a_meter_has_a_bar_of_its_own() -> None:
    found = []
    with terminal(), progress_shown():
        with meter("training") as show:
            for i in track(range(4), "steps"):
                show(2 * i, 8, "")
                found.append([(task.completed, task.total) for task in display().tasks])
        assert not display().tasks
    assert found == [[(2 * i, 8), (i, 4)] for i in range(4)]
