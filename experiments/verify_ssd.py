"""Every claim about structured state-space duality, checked once with quick settings.

    python -m experiments.verify_ssd

prints one table (experiment, claim, what was found, verdict), appends one record per
experiment to the log, draws the pictures, and exits with status 1 if any claim fails.
Timings are shown, never judged.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.common import (
    EXIT_FAILED_CLAIM,
    InputError,
    Parameter,
    RunLog,
    check_picture_path,
    execute,
    one_line_errors,
    parse,
    progress_shown,
    save_figure,
    track,
)
from experiments.registry import Experiment, find, load

# Settings that keep the whole check within seconds; everything else is the default.
QUICK: dict[str, dict[str, Any]] = {
    "exp1": {},
    "exp2": {"n_seeds": 100},
    "exp2b": {},
    "exp3": {},
    "exp3b": {},
    "exp4": {"T_values": (128, 256, 512), "n_repeats": 3},
    "exp4b": {"T_values": (64, 128, 256), "n_trials": 3, "n_repeats": 2},
    "exp5": {"T_values": (20, 40, 80)},
    "exp5b": {"T_values": (20, 40), "seeds": (0, 1, 2)},
    "exp6": {},
}
_VERDICTS = {True: "PASS", False: "FAIL", None: "measured"}

PARAMETERS = (
    Parameter("seed", int, 0, "Seed of every experiment that takes one."),
    Parameter("plots", bool, True, "Draw the pictures (left out without matplotlib)."),
    Parameter("plot_dir", str, "outputs/verify_ssd", "Folder for the pictures."),
    Parameter("log_path", str, "outputs/verify_ssd.jsonl", "The run log."),
)


def quick_settings(experiment: Experiment, seed: int) -> dict[str, Any]:
    """The resolved arguments of one experiment: defaults, quick settings, the seed."""
    values = experiment.defaults() | QUICK[experiment.entry.short]
    return values | {"seed": seed} if "seed" in values else values


def draw(experiment: Experiment, results: list, folder: Path) -> list[Path]:
    """Save the experiment's pictures in ``folder``, one file each."""
    return [
        save_figure(picture.render(results), folder / Path(picture.path).name)
        for picture in experiment.pictures
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Check every claim; return 0 if all hold, 1 otherwise."""
    about = (__doc__ or "").strip()
    options = parse("python -m experiments.verify_ssd", about, PARAMETERS, argv)
    with one_line_errors(), progress_shown():
        return _verify(**options)


def _verify(seed: int, plots: bool, plot_dir: str, log_path: str) -> int:
    started = time.perf_counter()
    log, folder = RunLog(log_path), Path(plot_dir)
    if notice := log.prepare():
        print(f"note: {notice}")
    if plots:
        check_picture_path(folder / "any.png")
    drawn, rows, failures = 0, [], []
    for short in track(list(QUICK), "verifying"):
        experiment = load(find(short))
        result, record = execute(experiment.run, quick_settings(experiment, seed))
        log.append(record)
        rows.append((short, experiment.claim, result.details, _VERDICTS[result.passed]))
        if result.passed is False:
            told = experiment.problems(result.metadata) if experiment.problems else []
            failures += [f"{result.name}: {line}" for line in told or [result.details]]
        try:
            drawn += len(draw(experiment, [result], folder)) if plots else 0
        except InputError as error:  # no matplotlib: the check itself goes on
            print(f"note: pictures left out: {error}")
            plots = False
    _show_table(rows)
    for line in failures:
        print(f"FAILED {line}")
    seconds = time.perf_counter() - started
    held = len(rows) - sum(row[3] == "FAIL" for row in rows)
    print(
        f"{held} of {len(rows)} claims hold; {seconds:.1f} s; log: {log_path}", end=""
    )
    print(f"; {drawn} pictures: {folder}" if drawn else "")
    return EXIT_FAILED_CLAIM if failures else 0


def _show_table(rows: list[tuple[str, str, str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("experiment", "claim", "found", "verdict", show_lines=True)
    colors = {"PASS": "green", "FAIL": "bold red", "measured": "cyan"}
    for short, claim, found, verdict in rows:
        table.add_row(short, claim, found, f"[{colors[verdict]}]{verdict}[/]")
    console = Console()
    console.width = max(console.width, 100)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
