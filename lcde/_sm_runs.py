"""What the experiments with sequence models share: training, and a command line."""

import hashlib
import math
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from experiments.common import (
    ExperimentResult,
    Parameter,
    Picture,
    RunLog,
    check_integer,
    check_picture_path,
    execute,
    meter,
    one_line_errors,
    parameters_of,
    parse,
    progress_shown,
    save_figure,
)
from lcde._sequence_model import SequenceModelConfig, build
from lcde._watch import Hooks, Tick, Watch
from ssm.ops import backends_used
from ssm.training import (
    Entry,
    Objective,
    Progress,
    Together,
    Trainer,
    TrainingConfig,
    device_name,
)

LOG = "runs.jsonl"
FOLDER = "outputs/lcde"
_PLACES = ("device", "data_dir")

# --- training -------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A model, what it is trained on, by which objective, and when it may end.

    ``told`` turns an entry of the trainer's curve into the log's. The other fields are
    the trainer's.
    """

    model: SequenceModelConfig
    objective: Objective
    training: TrainingConfig
    train: Sequence[Tensor]
    val: Sequence[Tensor]
    told: Callable[[Entry], dict[str, Any]]
    auxiliary: Sequence[Tensor] | None = None
    max_steps: int = 0
    stop: Callable[[Entry], bool] = lambda _: False
    together: Together | None = None


class Trained(NamedTuple):
    """The curve as it is logged, and facts for the metadata."""

    curve: list[dict[str, Any]]
    facts: dict[str, Any]


def fit(
    job: Job, options: Any, folder: Path | None, *, resume: bool, watch: Watch
) -> Trained:
    """Train; checkpoints, if any, are in ``folder``, from which ``resume`` goes on.

    Without ``resume`` those that are there are removed once all input is accepted.
    """
    model = build(job.model, seed=job.training.seed)
    trainer = Trainer(
        model,
        job.objective,
        job.training,
        folder=folder,
        settings=identity(options, job),
        max_steps=job.max_steps,
        stop=job.stop,
        paused=watch.paused,
        together=job.together,
        on_step=lambda at: watch.on_step(tick(at)),
        on_entry=lambda entry: watch.on_entry(job.told(entry)),
        on_notice=watch.on_notice,
    )
    if folder and not resume:
        shutil.rmtree(folder, ignore_errors=True)
    with backends_used() as backends:
        entries = trainer.fit(
            job.train,
            job.val,
            auxiliary=job.auxiliary,
            resume=resume and folder is not None,
        )
    facts = {
        "n_params": model.num_parameters(),
        "steps": trainer.step,
        "backends": sorted(backends),
        "device": device_name(trainer.device),
    }
    return Trained([job.told(entry) for entry in entries], facts)


def identity(options: Any, job: Job) -> dict[str, Any]:
    """What a run is, wherever it runs and its data lie: the data by their hash."""
    flags = {k: v for k, v in asdict(options).items() if k not in _PLACES}
    digest = hashlib.sha256()
    for tensor in (*job.train, *job.val, *(job.auxiliary or ())):
        digest.update(tensor.numpy().tobytes())
    return flags | {"data_sha256": digest.hexdigest()}


def tick(at: Progress) -> Tick:
    """A step of the trainer, as the drivers show it."""
    text = f"loss {at.loss:.4f}  {at.examples_per_s:,.0f} sequences/s"
    return Tick(at.step, at.steps, text)


def as_rows(arrays: Sequence[np.ndarray]) -> list[Tensor]:
    """Arrays of a dataset as the trainer takes them; whole numbers become indices."""
    tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    return [x if x.is_floating_point() else x.long() for x in tensors]


# --- many runs, and one by hand -------------------------------------------------------

Train = Callable[..., ExperimentResult]  # (options, folder, *, resume, watch)


def runner(
    train: Train, kind: type[Any], folder: Path | None, *, resume: bool, watch: Watch
) -> Callable[..., ExperimentResult]:
    """``train`` as a function of the options by name; ``kind`` is their dataclass."""

    def run_here(**values: Any) -> ExperimentResult:
        return train(kind(**values), folder, resume=resume, watch=watch)

    return run_here


def keep(train: Train, name: str, options: Any, hooks: Hooks) -> ExperimentResult:
    """Run once for a driver; the result is the log's where ``hooks`` find it there."""
    values = asdict(options)
    folder = hooks.checkpoints(name, values)
    kind, watch = type(options), hooks.watch
    begun = folder is not None and folder.exists()
    run_here = runner(train, kind, folder, resume=hooks.resume and begun, watch=watch)
    return hooks.keep(run_here, values)


@dataclass(frozen=True)
class Command:
    """The command line of one experiment.

    module: as ``python -m`` finds it. options: the dataclass that ``run`` takes. name:
    what a run with these is called, and its checkpoints and picture. line: what to
    print of an entry.
    """

    module: str
    options: type[Any]
    run: Callable[..., ExperimentResult]
    train: Train
    name: Callable[[Any], str]
    line: Callable[[Mapping[str, Any]], str]
    picture: Picture


OUTPUTS = (
    Parameter("plot", bool, False, "Draw this run's picture."),
    Parameter("results_dir", str, FOLDER, "Gets log, checkpoints and picture."),
    Parameter("log_path", str, "", f"The run log; {LOG} in that folder by default."),
    Parameter(
        "resume",
        bool,
        False,
        "Go on from the last checkpoint of this model, data and seed; without it the "
        "run starts anew and replaces them.",
    ),
    Parameter(
        "max_seconds",
        int,
        0,
        "Log the run as it stands after the first evaluation so many seconds from its "
        "start, 0 for never; --resume goes on from there.",
    ),
)


def main_of(command: Command, argv: Sequence[str] | None) -> int:
    """Train as the flags say; log the run, and draw it where asked."""
    own = parameters_of(command.run)
    summary = (command.options.__doc__ or "").partition("\n")[0]
    values = parse(f"python -m {command.module}", summary, [*own, *OUTPUTS], argv)
    outputs = {each.name: values.pop(each.name) for each in OUTPUTS}
    with one_line_errors(), progress_shown():
        return _train_and_keep(command, values, **outputs)


def _train_and_keep(
    command: Command,
    values: dict[str, Any],
    *,
    plot: bool,
    results_dir: str,
    log_path: str,
    resume: bool,
    max_seconds: int,
) -> int:
    check_integer("max_seconds", max_seconds, at_least=0, example=600)
    end = time.monotonic() + max_seconds if max_seconds else math.inf
    folder, name = Path(results_dir), command.name(command.options(**values))
    picture, log = folder / f"{name}.png", RunLog(log_path or folder / LOG)
    if notice := log.prepare():  # fail before the work, not after it
        _note(notice)
    if plot:
        check_picture_path(picture)
    with meter("training") as show:
        watch = Watch(
            on_step=lambda at: show(*at),
            on_entry=lambda entry: _say(command.line(entry)),
            on_notice=_note,
            paused=lambda: time.monotonic() > end,
        )
        place = folder / "checkpoints" / name
        run_here = runner(
            command.train, command.options, place, resume=resume, watch=watch
        )
        result, record = execute(run_here, values)
    log.append(record)
    _say(result.details)
    if plot:
        _say(f"saved {save_figure(command.picture.render([result]), picture)}")
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


def _note(line: str) -> None:
    print(f"note: {line}", file=sys.stderr)
