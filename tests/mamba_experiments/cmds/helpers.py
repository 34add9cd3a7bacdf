"""Training records as the trainer writes them, made up."""

import json
from datetime import UTC, datetime, timedelta

from experiments.common import ExperimentResult, make_record
from mamba_experiments.cmds._runs import EXPERIMENT, read_runs

START = datetime(2025, 1, 1, tzinfo=UTC)


def curve(losses, accuracies):
    """One evaluation an epoch."""
    return [
        {"step": 10 * e, "epoch": float(e), "val_loss": loss, "val_accuracy": accuracy}
        for e, (loss, accuracy) in enumerate(zip(losses, accuracies, strict=True), 1)
    ]


CURVE = curve((2.0, 1.0), (0.2, 0.3))


def record(
    model="mamba_simple",
    *,
    seed=0,
    second=0,
    curve=CURVE,
    n_params=100,
    task=None,
    parts=None,
    **settings,
):
    """A record of a run that started ``second`` seconds after the others."""
    params = {
        "model": model,
        "dataset": "wikitext2",
        "seed": seed,
        "n_state": 16,
        "d_model": 64,
        "n_pairs": [1, 2],
        "epochs": 5,
        "batch_size": 64,
        "lr": 1e-3,
        "precision": "float32",
        "device": "auto",
        "data_dir": "a",
    } | settings
    meta = {
        "model": model,
        "dataset": params["dataset"],
        "n_params": {"total": n_params, "embedding": 50, "rest": n_params - 50},
        "curve": [dict(entry) for entry in curve],
        "parts": parts or {},
        "task": task or {},
    }
    return make_record(
        ExperimentResult(EXPERIMENT, "made up", meta),
        params=params,
        started=START + timedelta(seconds=second),
        duration_s=1.0,
    )


def write(path, *records):
    """A log of ``records``, one a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    return path


def read(folder, *records):
    """The runs of ``records``, through a log in ``folder``."""
    return read_runs(str(write(folder / "runs.jsonl", *records)))
