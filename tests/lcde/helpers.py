"""Records of the four experiments as their logs hold them, made up for tests."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from experiments.common import ExperimentResult, make_record

Record = dict[str, Any]


def record(
    experiment: str, meta: Record, params: Record | None = None, second: int = 0
) -> Record:
    """One record, started ``second`` seconds into a day."""
    return make_record(
        ExperimentResult(experiment, "made up", meta),
        params=params or {},
        started=datetime(2025, 1, 1, 0, 0, second, tzinfo=UTC),
        duration_s=1.0,
    )


def write(path: Path, *records: Record) -> Path:
    """Write the log."""
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    return path


def random_cde(dim: int, rmse: float, *, seed: int = 0) -> Record:
    """A random Linear CDE that was fitted to paths in ``dim`` dimensions."""
    meta = {"input_dim": dim, "hidden_dim": 256, "rmse": rmse, "rmse_zero": 0.1}
    params = {"input_dim": dim, "hidden_dim": 256, "seed": seed}
    return record("lcde_toy", meta, params)


def toy(
    model: str,
    curve: dict[int, Any],
    *,
    depth: int = 2,
    nonlinear: bool = True,
    seed: int = 0,
    second: int = 0,
    **settings: Any,
) -> Record:
    """A sequence model with this RMSE by step, on paths in two dimensions."""
    cell = {"model": model, "input_dim": 2, "depth": depth, "nonlinear": nonlinear}
    entries = [{"step": step, "val_rmse": rmse} for step, rmse in curve.items()]
    meta = {**cell, "curve": entries, "rmse_zero": 0.1}
    params = {**cell, "seed": seed, "hidden_dim": 32, "lr": 1e-3, **settings}
    return record("sm_toy", meta, params, second)


def a5(
    model: str,
    length: int,
    depth: int,
    reached: bool,
    *,
    seed: int = 0,
    steps: int = 2000,
    hidden_dim: int = 64,
) -> Record:
    """A run on the word problem that passed 90 % or did not."""
    cell = {"model": model, "length": length, "depth": depth}
    meta = {
        **cell,
        "accuracy": 0.95 if reached else 0.5,
        "steps": steps,
        "reached": reached,
        "threshold": 0.9,
    }
    params = {**cell, "seed": seed, "hidden_dim": hidden_dim}
    name = "lcde_a5" if model == "LinearCDE" else "sm_a5"
    return record(name, meta, params)
