"""The trainer's own steps, timed: what :mod:`ssm.training` takes for one, all of it."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from ssm.ops import backends_used
from ssm.training import (
    Objective,
    Progress,
    Together,
    Trainer,
    TrainingConfig,
    device_name,
)

COMPARED = 8  # steps whose losses are kept


def timed_steps(
    model: nn.Module,
    objective: Objective,
    config: TrainingConfig,
    train: Sequence[Tensor],
    auxiliary: Sequence[Tensor] | None = None,
    *,
    steps: int,
    together: Together | None = None,
) -> dict[str, Any]:
    """Seconds a step over blocks of ``steps``, the first block apart; first losses.

    One epoch over ``train``: as many blocks as it has batches for.
    """
    ends, losses = [time.perf_counter()], []

    def on_step(at: Progress) -> None:
        if at.step <= COMPARED:
            losses.append(at.loss)
        if at.step % steps == 0:
            ends.append(time.perf_counter())

    trainer = Trainer(model, objective, config, together=together, on_step=on_step)
    val = [x[: config.batch_size] for x in train]
    with backends_used() as used:
        trainer.fit(train, val, auxiliary=auxiliary)
    taken = np.diff(ends) / steps
    return {
        "first_s": float(taken[0]),
        "median_s": float(np.median(taken[1:])),
        "min_s": float(taken[1:].min()),
        "max_s": float(taken[1:].max()),
        "losses": losses,
        "backends": sorted(used),
        "device": device_name(trainer.device) or "cpu",
    }
