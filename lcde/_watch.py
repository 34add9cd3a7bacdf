"""What long work of this package tells, and what a driver of many runs is given."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from experiments.common import ExperimentResult, execute, to_json


class Tick(NamedTuple):
    """How many steps are done of how many, and a few words on how it goes."""

    step: int
    steps: int
    text: str


@dataclass(frozen=True)
class Watch:
    """What a run tells and is told while it goes on; the defaults tell nothing.

    on_step: after every step, or about every second where steps are compiled into
    blocks. on_entry: after every evaluation, its entry of the curve. on_notice: with
    what a user should know. paused: asked after every evaluation, whether to leave off
    until the run is resumed.
    """

    on_step: Callable[[Tick], None] = lambda _: None
    on_entry: Callable[[dict[str, Any]], None] = lambda _: None
    on_notice: Callable[[str], None] = lambda _: None
    paused: Callable[[], bool] = lambda: False


Run = Callable[..., ExperimentResult]


def _never_done(_experiment: str, _options: dict[str, Any]) -> bool:
    return False


def _just_run(run: Run, options: dict[str, Any]) -> ExperimentResult:
    return execute(run, options)[0]


@dataclass(frozen=True)
class Hooks:
    """How a driver reports and keeps its elementary runs; the defaults keep nothing.

    folder: of the results; :meth:`checkpoints` says where in it a run's checkpoints go.
    resume: go on from them. done: whether the log already holds the run of this
    experiment with these options, which is then skipped. keep: executes one run, given
    the callable and its options by name, and logs the record; where the log holds that
    run already, it may give the logged result instead.
    """

    folder: Path | None = None
    resume: bool = False
    watch: Watch = field(default_factory=Watch)
    done: Callable[[str, dict[str, Any]], bool] = _never_done
    keep: Callable[[Run, dict[str, Any]], ExperimentResult] = _just_run

    def checkpoints(self, name: str, options: dict[str, Any]) -> Path | None:
        """The folder for the checkpoints of a run; None: keep none.

        Runs of one name with different options have different folders.
        """
        if self.folder is None:
            return None
        canonical = json.dumps(to_json(options), sort_keys=True)
        digest = hashlib.sha256(canonical.encode()).hexdigest()[:8]
        return self.folder / "checkpoints" / f"{name}_{digest}"
