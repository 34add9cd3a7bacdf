"""Run one experiment of document 2: as published, or a few minutes' worth of it.

    python run_experiment.py -m LCDE -e toy --quick

-m LCDE is the Linear CDE in JAX, -m SequenceModel the S4, S5, Mamba, RNN and
Transformer in PyTorch; -e toy predicts entries of signatures (figure 1), -e A5 products
in the group A5 (figure 2). Settings are read from experiment_configs: lcde_toy.yaml,
lcde_a5.yaml, ssm_toy.yaml or ssm_a5.yaml, or with --quick their _quick.yaml; the flags
-n, -l, -d, -i and -nl narrow them. Each run adds a line to runs.jsonl in --results-dir.
What was interrupted goes on where it was when the same command is given again.
"""

import contextlib
import importlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from experiments._grid import Point
from experiments.common import (
    EXIT_FAILED_CLAIM,
    ExperimentResult,
    InputError,
    Parameter,
    RunLog,
    bad_input,
    check_integer,
    execute,
    meter,
    one_line_errors,
    parse,
    progress_shown,
)
from lcde._watch import Hooks, Tick, Watch
from lcde.config import (
    LCDEA5Config,
    LCDEToyConfig,
    SMA5Config,
    SMToyConfig,
    changed,
    read_config,
    to_yaml,
)

Record = dict[str, Any]
CONFIGS = Path(__file__).parent / "experiment_configs"
LOG = "runs.jsonl"

_WORDS = tuple[str, ...]
_NUMBERS = tuple[int, ...]
PARAMETERS = (
    Parameter(
        "model", Literal["LCDE", "SequenceModel"], MISSING, "Which package.", ("-m",)
    ),
    Parameter("experiment", Literal["toy", "A5"], MISSING, "Which data.", ("-e",)),
    Parameter("seed", int, 2345, "Of data, weights, batches and dropout.", ("-s",)),
    Parameter("name", _WORDS, (), "Only these sequence models: S4 Mamba S5 …", ("-n",)),
    Parameter("length", _NUMBERS, (), "A5: only these sequence lengths.", ("-l",)),
    Parameter("depth", _NUMBERS, (), "Only these numbers of blocks.", ("-d",)),
    Parameter("input_dim", _NUMBERS, (), "toy: only these dimensions.", ("-i",)),
    Parameter(
        "nonlinear", str, "", "toy: only with (True) or without (False) GELU.", ("-nl",)
    ),
    Parameter("config", str, "", "A YAML file with other settings.", ("-c",)),
    Parameter("quick", bool, False, "A few minutes on 2 cores, smaller settings."),
    Parameter("results_dir", str, "outputs/lcde", "Gets the log and checkpoints."),
    Parameter(
        "resume",
        bool,
        True,
        "Skip runs that the log has, and go on from checkpoints; else start anew.",
    ),
    Parameter("dry_run", bool, False, "Print what would be run, and stop."),
)


# --- the four drivers -----------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What a driver will do: how many runs, at most how many steps each, in words.

    at_most: whether it may do fewer runs. steps: 0 where nothing is trained.
    """

    runs: int
    steps: int
    words: str
    at_most: bool = False


@dataclass(frozen=True)
class Driver:
    """One of document 2's experiments: where it is, its settings, what it shows.

    name: of the experiment that each run is. function: of ``module``, called with
    (config, seed=…, hooks=…). stem: of its settings' files. columns: of the closing
    table, from a run's metadata or arguments. figure: the module that draws it.
    extra: what to install, which brings ``needs``.
    """

    name: str
    module: str
    function: str
    config: type[Any]
    stem: str
    plan: Callable[[Any], Plan]
    columns: tuple[str, ...]
    figure: str
    extra: str
    needs: tuple[str, ...]


def _plan_lcde_toy(config: LCDEToyConfig) -> Plan:
    paths = config.n_train + config.n_val
    words = f"each solves {paths:,} paths and fits their labels by least squares"
    return Plan(config.runs * len(config.input_dims), 0, words)


def _plan_lcde_a5(config: LCDEA5Config) -> Plan:
    words = f"each stops once its validation accuracy passes {config.threshold:.0%}"
    return Plan(len(config.lengths), config.num_steps, words)


def _plan_sm_toy(config: SMToyConfig) -> Plan:
    kinds = (config.model_names, config.input_dims, config.depth_nonlinears)
    longest = config.num_epochs * math.ceil(config.n_train / config.batch_size)
    steps = min(longest, config.max_steps or longest)
    words = f"batches of {config.batch_size} of {config.n_train:,} paths each"
    return Plan(config.runs * math.prod(map(len, kinds)), steps, words)


def _plan_sm_a5(config: SMA5Config) -> Plan:
    # A depth that fails is tried no more, and each length ends with the first that
    # passes: at most one failure a depth and one success a length, and never both all.
    runs = len(config.lengths) + len(config.depths) - 1
    longest = math.ceil(0.8 * config.samples / config.batch_size) * config.num_epochs
    steps = min(longest, config.max_steps or longest)
    words = (
        "each stops once its validation accuracy passes "
        f"{config.threshold:.0%}, and deeper models are tried only where none did"
    )
    return Plan(len(config.model_names) * runs, steps, words, at_most=True)


_JAX = ("jax", ("jax", "equinox", "diffrax", "optax", "signax", "sklearn"))
_TORCH = ("torch", ("torch", "einops", "numba", "accelerate", "safetensors"))

DRIVERS: dict[tuple[str, str], Driver] = {
    ("LCDE", "toy"): Driver(
        "lcde_toy",
        "lcde.toy",
        "run_lcde_toy_experiment",
        LCDEToyConfig,
        "lcde_toy",
        _plan_lcde_toy,
        ("input_dim", "hidden_dim", "rmse", "rmse_zero"),
        "lcde.plot_toy",
        *_JAX,
    ),
    ("LCDE", "A5"): Driver(
        "lcde_a5",
        "lcde.a5",
        "run_lcde_A5_experiment",
        LCDEA5Config,
        "lcde_a5",
        _plan_lcde_a5,
        ("model", "length", "accuracy", "steps", "reached"),
        "lcde.plot_A5",
        *_JAX,
    ),
    ("SequenceModel", "toy"): Driver(
        "sm_toy",
        "lcde.sm_toy",
        "run_sm_toy_experiment",
        SMToyConfig,
        "ssm_toy",
        _plan_sm_toy,
        ("model", "input_dim", "depth", "nonlinear", "rmse", "rmse_zero"),
        "lcde.plot_toy",
        *_TORCH,
    ),
    ("SequenceModel", "A5"): Driver(
        "sm_a5",
        "lcde.sm_a5",
        "run_sm_A5_experiment",
        SMA5Config,
        "ssm_a5",
        _plan_sm_a5,
        ("model", "length", "depth", "accuracy", "steps", "reached"),
        "lcde.plot_A5",
        *_TORCH,
    ),
}


@contextlib.contextmanager
def missing_extra_named(driver: Driver) -> Iterator[None]:
    """Turn an import that fails for want of the driver's extra into one line."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in driver.needs:
            raise
        raise InputError(
            f"{driver.module}: got an environment without {missing}; expected the "
            f"extra '{driver.extra}'; run `uv run --extra all python "
            "run_experiment.py …`"
        ) from None


# --- settings -------------------------------------------------------------------------

_NARROWED = {
    "name": "model_names",
    "length": "lengths",
    "depth": "depths",
    "input_dim": "input_dims",
}
_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def settings(driver: Driver, options: dict[str, Any]) -> Any:
    """The config of the file that ``options`` name, narrowed by the other flags."""
    if options["config"] and options["quick"]:
        raise bad_input(
            "--quick", True, "either --quick or --config", "leave one of them out"
        )
    stem = f"{driver.stem}_quick" if options["quick"] else driver.stem
    path = options["config"] or os.path.relpath(CONFIGS / f"{stem}.yaml")
    config: Any = read_config(path, driver.config)
    known = {each.name for each in fields(config)}
    flags = {flag: name for flag, name in _NARROWED.items() if name in known}
    pairs = {"depth", "nonlinear"} if "depth_nonlinears" in known else set()
    for flag in (*_NARROWED, "nonlinear"):
        if options[flag] and flag not in {*flags, *pairs}:
            raise _useless(flag, options)
    given = {
        name: (_typed(flag), options[flag])
        for flag, name in flags.items()
        if options[flag]
    }
    if pairs:
        given["depth_nonlinears"] = ("--depth", _narrowed_pairs(config, options))
    return changed(config, given)


def _narrowed_pairs(
    config: SMToyConfig, options: dict[str, Any]
) -> list[tuple[int, bool]]:
    """The pairs of depth and nonlinearity asked for; both flags together make new."""
    depths, wanted = options["depth"], _truth(options["nonlinear"])
    if depths and wanted is not None:
        pairs = [(depth, wanted) for depth in depths]
    else:
        pairs = [
            (depth, nonlinear)
            for depth, nonlinear in config.depth_nonlinears
            if (not depths or depth in depths) and wanted in (None, nonlinear)
        ]
    if not pairs:
        raise bad_input(
            "--depth" if depths else "--nonlinear",
            depths or options["nonlinear"],
            f"one that the settings have ({config.depth_nonlinears})",
            "give --depth and --nonlinear together for another",
        )
    return pairs


def _truth(text: str) -> bool | None:
    if text and text.lower() not in _TRUTH:
        raise bad_input("--nonlinear", text, "True or False", "try -nl True")
    return _TRUTH[text.lower()] if text else None


def _useless(flag: str, options: dict[str, Any]) -> InputError:
    asked = f"-m {options['model']} -e {options['experiment']}"
    expected = f"no {_typed(flag)} with {asked}"
    return bad_input(_typed(flag), options[flag], expected, "leave it out")


def _typed(flag: str) -> str:
    return f"--{flag.replace('_', '-')}"


# --- running --------------------------------------------------------------------------


def _show_nothing(_done: int, _total: int, _note: str) -> None:
    """A bar where there is none."""


@dataclass
class Session:
    """The runs of one command: those that the log has, and those that it gets.

    name: of their experiment. most: how many runs there can be. logged: every record
    of the log, by run id. shown: the records of this command's runs, old and new.
    """

    name: str
    log: RunLog
    most: int
    resume: bool
    logged: dict[str, Record]
    shown: dict[str, Record] = field(default_factory=dict)
    show: Callable[[int, int, str], None] = _show_nothing

    def done(self, name: str, options: dict[str, Any]) -> bool:
        """Whether the log already has this run, so that it is not run again."""
        return self._logged_run(name, options) is not None

    def keep(
        self, run: Callable[..., ExperimentResult], options: dict[str, Any]
    ) -> ExperimentResult:
        """The result of a run: of the log if it is there, else run under a bar."""
        if (record := self._logged_run(self.name, options)) is not None:
            return ExperimentResult(
                self.name, record["details"], record["meta"], record["passed"]
            )
        told = ("model", "input_dim", "length", "depth", "nonlinear", "seed")
        words = [f"{name} {options[name]}" for name in told if name in options]
        with meter(", ".join(words)) as self.show:
            result, record = execute(run, options)
        self.show = _show_nothing  # the bar is gone
        *_, free = self._ids(self.name, options)
        record["run_id"] = free
        self.log.append(record)
        self.logged[free] = record
        self._tell(f"{record['duration_s']:.0f} s", record)
        return result

    def on_step(self, at: Tick) -> None:
        """Move the bar of the run that goes on."""
        self.show(*at)

    def _logged_run(self, name: str, options: dict[str, Any]) -> Record | None:
        """The last record of this run, which is then told of; None to run it."""
        *found, _free = self._ids(name, options)
        if not self.resume or not found:
            return None
        record = self.logged[found[-1]]
        self._tell("in the log", record)
        return record

    def _ids(self, name: str, options: dict[str, Any]) -> Iterator[str]:
        """The ids of this run's repeats in the log, then the first that is free."""
        repeat, known = 0, True
        while known:
            run_id = Point(name, name, options, repeat).run_id
            repeat, known = repeat + 1, run_id in self.logged
            yield run_id

    def _tell(self, when: str, record: Record) -> None:
        """One line for a run, the first time that it comes up."""
        if record["run_id"] not in self.shown:
            self.shown[record["run_id"]] = record
            count = f"{len(self.shown)}/{self.most}"
            print(f"{count} ({when}) {record['details']}", flush=True)


def print_entry(entry: dict[str, Any]) -> None:
    """One evaluation: its numbers, on one line; lists of numbers are in the log."""
    shown = [
        f"{key} {value:.6g}"
        for key, value in entry.items()
        if isinstance(value, int | float)
    ]
    print(f"  {'  '.join(shown)}", file=sys.stderr, flush=True)


def print_notice(line: str) -> None:
    """What a user should know, on standard error."""
    print(f"note: {line}", file=sys.stderr, flush=True)


def estimate(plan: Plan) -> str:
    """What a plan will take, in one line: runs, steps, and how long steps add up to."""
    runs = f"{plan.runs} runs" if plan.runs > 1 else "1 run"
    if plan.steps == 0:
        return f"{runs}; {plan.words}"
    most = "at most " if plan.at_most else ""
    total = plan.runs * plan.steps
    return (
        f"{most}{runs} of at most {plan.steps:,} steps; {plan.words}; all steps would "
        f"take {_duration(total / 100)} at 10 ms each"
    )


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return "less than 2 minutes"


def show_summary(driver: Driver, records: Sequence[Record]) -> None:
    """A table of the runs, one a row."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for heading in (*driver.columns, "seed", "time"):
        table.add_column(heading.replace("_", " "), justify="right")
    for record in records:
        values = record["params"] | record["meta"]
        cells = [_cell(values.get(name, "")) for name in driver.columns]
        seconds = f"{record['duration_s']:.1f} s"
        table.add_row(*cells, str(record["seed"]), seconds)
    console = Console()
    console.width = max(console.width, 100)
    console.print(table)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment that the command line names; return the exit status."""
    about = (__doc__ or "").strip()
    options = parse("python run_experiment.py", about, PARAMETERS, argv)
    driver = DRIVERS[options["model"], options["experiment"]]
    with one_line_errors(), progress_shown(), missing_extra_named(driver):
        return _run(driver, options)


def _run(driver: Driver, options: dict[str, Any]) -> int:
    check_integer("--seed", options["seed"], at_least=0, example=2345)
    config = settings(driver, options)
    plan = driver.plan(config)
    print(f"{to_yaml(config)}\nseed: {options['seed']}")
    print(f"# {estimate(plan)}", flush=True)
    if options["dry_run"]:
        return 0
    function = getattr(importlib.import_module(driver.module), driver.function)
    folder = Path(options["results_dir"])
    log = RunLog(folder / LOG)
    if notice := log.prepare():
        print_notice(notice)
    logged = {record["run_id"]: record for record in log.records()}
    session = Session(driver.name, log, plan.runs, options["resume"], logged)
    watch = Watch(session.on_step, print_entry, print_notice)
    function(
        config,
        seed=options["seed"],
        hooks=Hooks(folder, options["resume"], watch, session.done, session.keep),
    )
    records = list(session.shown.values())
    show_summary(driver, records)
    print(f"log: {log.path}")
    print(f"figure: python -m {driver.figure} --results-dir {folder}")
    failed = any(record["passed"] is False for record in records)
    return EXIT_FAILED_CLAIM if failed else 0


if __name__ == "__main__":
    sys.exit(main())
