"""Run experiments over grids and repeats; log each run; resume what was interrupted.

    python -m experiments.run_and_log --experiment exp1 --repeats 10
        --grid exp1.T=16,32 exp1.a=0.5,-0.9

Each run is one line of the log. Its id is a hash of the experiment, its arguments and
the repeat: run the same command again, and only what is missing is done. The log is
also written out as a table (CSV). Exit status 1 if a claim failed, 2 for bad input.
"""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments._csv import write_csv
from experiments._grid import Axis, Point, chosen, grid_points, make_axis, parse_axis
from experiments.common import (
    EXIT_BAD_INPUT,
    EXIT_FAILED_CLAIM,
    ExperimentResult,
    InputError,
    Parameter,
    Picture,
    RunLog,
    bad_input,
    check_integer,
    check_picture_path,
    execute,
    new_figure,
    one_line_errors,
    parse,
    progress_shown,
    save_figure,
    track,
)
from experiments.registry import ENTRIES, Experiment, find, load

Record = dict[str, Any]
Wanted = tuple[Experiment, Picture, Path]
_WORDS = tuple[str, ...]
# Flags for one parameter of one experiment: a list is one value, not several.
_SHORTHANDS = {
    "exp3_t_list": ("exp3", "T_values"),
    "exp3_seeds": ("exp3", "seeds"),
    "exp3_random_n": ("exp3", "random_n"),
    "exp4_end_to_end": ("exp4", "end_to_end"),
}
_THREAD_LIMITS = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMBA_NUM_THREADS",
)

PARAMETERS = (
    Parameter(
        "experiment",
        tuple[str, ...],
        (),
        "One or several, by short name (exp1) or module name, or 'all'.",
    ),
    Parameter("repeats", int, 1, "Runs of each grid point."),
    Parameter(
        "seed",
        int,
        0,
        "Repeat r has seed SEED + r; experiments without a seed are just repeated.",
    ),
    Parameter(
        "grid",
        _WORDS,
        (),
        "Values to run through, NAME.PARAMETER=VALUE,VALUE,… each; all combinations "
        "are run. Lists stand in brackets: exp2.decays=[0.5,0.8],[0.9].",
    ),
    Parameter("jobs", int, 1, "Processes. Keep 1 where timings are the point."),
    Parameter("log_path", str, "outputs/runs.jsonl", "The log, one record a line."),
    Parameter("csv_path", str | None, None, "The table; beside the log if not given."),
    Parameter("plots", bool, False, "Draw every picture, from all runs of this grid."),
    Parameter("plot_dir", str, "outputs", "Folder for --plots."),
    Parameter(
        "exp2_n_list",
        tuple[int, ...],
        (),
        "exp2: state sizes N; the decays are n / (N + 1), n = 1 … N.",
    ),
    Parameter("exp3_t_list", _WORDS, (), "exp3: its sequence lengths."),
    Parameter("exp3_seeds", _WORDS, (), "exp3: seeds of its random configurations."),
    Parameter("exp3_random_n", _WORDS, (), "exp3: its random configurations."),
    Parameter("exp4_end_to_end", bool, False, "exp4: time kernel construction too."),
    Parameter("exp4_plot", bool, False, "exp4: draw its picture."),
    Parameter(
        "exp4_plot_path",
        str,
        "outputs/exp4_time_scaling.png",
        "Where --exp4-plot draws (.png, .pdf or .svg).",
    ),
)


@dataclass
class Outcome:
    """What became of a grid: the records of its runs, and the runs that refused."""

    records: dict[str, Record]
    refused: int = 0

    def of(self, points: Iterable[Point], short: str) -> list[Record]:
        """The records of one experiment, in the grid's order."""
        ids = [point.run_id for point in points if point.short == short]
        return [self.records[run_id] for run_id in ids if run_id in self.records]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the grid that the command line describes; return the exit status."""
    about = (__doc__ or "").strip()
    options = parse("python -m experiments.run_and_log", about, PARAMETERS, argv)
    with one_line_errors(), progress_shown():
        return _run_grid(options)


def _run_grid(options: dict[str, Any]) -> int:
    check_integer("--repeats", options["repeats"], at_least=1, example=10)
    check_integer("--jobs", options["jobs"], at_least=1, example=os.cpu_count() or 1)
    check_integer("--seed", options["seed"], at_least=0, example=0)
    experiments = _experiments(options["experiment"])
    axes = _axes(options, experiments)
    points = grid_points(experiments, axes, options["repeats"], options["seed"])
    pictures = _pictures(options, experiments)
    log, table = _prepared_log(options["log_path"], options["csv_path"])

    ids = {point.run_id for point in points}
    outcome = Outcome({r["run_id"]: r for r in log.records() if r["run_id"] in ids})
    missing = [point for point in points if point.run_id not in outcome.records]
    print(f"{len(points) - len(missing)} of {len(points)} already in {log.path}")

    def store(point: Point, answer: Record | str) -> None:
        if isinstance(answer, str):
            outcome.refused += 1
            print(f"error: {point}: {answer}", file=sys.stderr)
        else:
            log.append(answer)
            outcome.records[point.run_id] = answer

    _run_points(missing, options["jobs"], store)
    write_csv(log, table)
    _draw(pictures, points, outcome)
    _show_summary(experiments, points, outcome)
    print(f"log: {log.path}; table: {table}")
    if outcome.refused:
        return EXIT_BAD_INPUT
    failed = any(record["passed"] is False for record in outcome.records.values())
    return EXIT_FAILED_CLAIM if failed else 0


def _experiments(names: Sequence[str]) -> list[Experiment]:
    """The experiments to run, each once. ``all`` leaves out those not installed."""
    if not names:
        raise bad_input(
            "--experiment", "nothing", "at least one name", "try --experiment exp1"
        )
    found: dict[str, Experiment] = {}
    for entry in [find(name) for name in names if name != "all"]:
        found[entry.short] = load(entry)
    for entry in ENTRIES if "all" in names else ():
        try:
            found[entry.short] = load(entry)
        except InputError as error:
            print(f"note: left out {error}", file=sys.stderr)
    return list(found.values())


def _axes(options: dict[str, Any], experiments: Sequence[Experiment]) -> list[Axis]:
    axes = [parse_axis(text, experiments) for text in options["grid"]]
    for flag, (short, parameter) in _SHORTHANDS.items():
        if given := options[flag]:
            asked = f"--{flag.replace('_', '-')}"
            words = given if isinstance(given, tuple) else [str(given)]
            experiment = chosen(short, experiments, asked)
            axes.append(make_axis(asked, experiment, parameter, [words]))
    if sizes := options["exp2_n_list"]:
        experiment = chosen("exp2", experiments, "--exp2-n-list")
        for N in sizes:
            check_integer("--exp2-n-list", N, at_least=1, example=2)
        spaced = [[str(n / (N + 1)) for n in range(1, N + 1)] for N in sizes]
        axes.append(make_axis("--exp2-n-list", experiment, "decays", spaced))
    return axes


def _pictures(
    options: dict[str, Any], experiments: Sequence[Experiment]
) -> list[Wanted]:
    """What to draw and where, checked before the work rather than after it."""
    wanted: list[Wanted] = []
    folder = Path(options["plot_dir"])
    if options["plots"]:
        wanted += [
            (experiment, picture, folder / Path(picture.path).name)
            for experiment in experiments
            for picture in experiment.pictures
        ]
    if options["exp4_plot"]:
        experiment = chosen("exp4", experiments, "--exp4-plot")
        path = Path(options["exp4_plot_path"])
        wanted.append((experiment, experiment.pictures[0], path))
    for _, _, path in wanted:
        check_picture_path(path)
    if wanted:
        new_figure()
    return wanted


def _prepared_log(log_path: str, csv_path: str | None) -> tuple[RunLog, Path]:
    """The log and the path of its table, both known to be writable and whole."""
    log = RunLog(log_path)
    table = Path(csv_path) if csv_path else log.path.with_suffix(".csv")
    if table == log.path:
        raise bad_input("--csv-path", csv_path, "a file of its own", "name another")
    if notice := log.prepare():
        print(f"note: {notice}", file=sys.stderr)
    write_csv(log, table)
    return log, table


def attempt(point: Point) -> Record | str:
    """The record of one run, or the line that says why there is none."""
    try:
        return execute(load(find(point.short)).run, point.values, point.run_id)[1]
    except InputError as error:
        return str(error)


def _run_points(
    points: Sequence[Point], jobs: int, store: Callable[[Point, Record | str], None]
) -> None:
    """Run ``points``, here or in ``jobs`` processes; store each answer as it comes."""
    if jobs == 1 or len(points) < 2:
        for point in track(points, "runs"):
            store(point, attempt(point))
        return
    with _processes(min(jobs, len(points))) as pool:
        with _interrupts_held():
            answers = {pool.submit(attempt, point): point for point in points}
        for answer in track(as_completed(answers), "runs", total=len(points)):
            store(answers[answer], answer.result())


@contextlib.contextmanager
def _processes(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """``jobs`` fresh processes that share the cores, gone when the work is over."""
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    # Set for the children, which read it as they start; a user's own choice stands.
    limits = {name: threads for name in _THREAD_LIMITS if name not in os.environ}
    os.environ.update(limits)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, context, initializer=_prepare_process)
    try:
        yield pool
    except BaseException as error:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in multiprocessing.active_children():
            child.terminate()
        if isinstance(error, BrokenProcessPool):
            raise InputError(
                "a process ended abruptly (out of memory, or killed); what was logged "
                "is whole; run the same command again, with fewer --jobs"
            ) from None
        raise
    finally:
        pool.shutdown()
        for name in limits:
            del os.environ[name]


def _prepare_process() -> None:
    """Leave interrupts to the parent, and end when the parent has."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"
    sentinel = parent.sentinel

    def follow() -> None:
        multiprocessing.connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Delay SIGINT here, and keep it from the processes that start meanwhile.

    They share the terminal, and a process interrupted while it imports would show a
    traceback. Windows has no such mask; :func:`_prepare_process` is all it gets.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _draw(
    pictures: Sequence[Wanted], points: Sequence[Point], outcome: Outcome
) -> None:
    for experiment, picture, path in pictures:
        records = outcome.of(points, experiment.entry.short)
        if records:
            results = [
                ExperimentResult(r["experiment"], r["details"], r["meta"], r["passed"])
                for r in records
            ]
            print(f"saved {save_figure(picture.render(results), path)}")


def _show_summary(
    experiments: Sequence[Experiment], points: Sequence[Point], outcome: Outcome
) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for heading in ("experiment", "runs", "passed", "failed", "measured", "time"):
        table.add_column(
            heading, justify="left" if heading == "experiment" else "right"
        )
    table.add_column("first failure, or last run")
    for experiment in experiments:
        short = experiment.entry.short
        records = outcome.of(points, short)
        verdicts = [record["passed"] for record in records]
        counts = [str(verdicts.count(verdict)) for verdict in (True, False, None)]
        seconds = sum(record["duration_s"] for record in records)
        told = next((r for r in records if r["passed"] is False), None)
        shown = (told or records[-1])["details"] if records else "no run"
        row = (short, str(len(records)), *counts, f"{seconds:.2f} s")
        table.add_row(*row, Text(shown))
    console = Console()
    console.width = max(console.width, 100)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
