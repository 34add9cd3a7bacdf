"""Forecasts of sunspots and of carbon dioxide: our blocks beside two baselines.

    python -m time_series_experiments.exp_real_series --task sunspots

At every step a model gives the next H values at once (no forecast is fed back). Parts
follow each other in time: 70 % to train, 10 % to watch, 20 % to test; scaling, and the
baselines' coefficients and order, come from the training part alone. Nothing is chosen
on the test part. The baselines: the value one season before, and an AR(p), p by AIC.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from experiments.common import (
    ExperimentResult,
    Parameter,
    bad_input,
    check_integer,
    check_nonempty,
    meter,
    one_line_errors,
    parameters_of,
    parse,
    progress_shown,
)
from ssm.ops import backends_used
from ssm.training import Batch, Progress, Scores, Trainer, TrainingConfig
from time_series_experiments._runs import LOG, OUT_DIR, Sweep, one_thread
from time_series_experiments.data import Array
from time_series_experiments.models import (
    build_regressor,
    count_parameters,
    find_model,
)
from time_series_experiments.series import (
    Series,
    autoregression,
    load_series,
    restored,
    scaled,
    scores,
    seasonal_naive,
    targets,
)

NAME = "real_series"
CLAIM = "forecasts beside seasonal-naive and AR; measured, not judged"
WINDOWS = 400  # about so many overlapping windows are trained on
Tell = Callable[[int, int, str], None]


@dataclass(frozen=True)
class RealSeriesOptions:
    """Forecast a real series with one model.

    Args:
        task: sunspots (yearly) or co2 (weekly)
        model: ssm_diag_linear, mamba_diag_exp, mamba, s4d, transformer or rnn
        N: states (see models; a transformer has none)
        horizon: steps ahead, all forecast at once; 0 for a season (11 and 52)
        context: steps that a model sees; 0 for four seasons and two (44 and 104)
        epochs: passes over the training windows
        batch_size: windows an update
        lr: learning rate of Adam, falling to 0 as half a cosine
        d_model: channels of every model but ssm_diag_linear, which has one
        seed: of weights and batches
    """

    task: str = "sunspots"
    model: str = "ssm_diag_linear"
    N: int = 8
    horizon: int = 0
    context: int = 0
    epochs: int = 40
    batch_size: int = 32
    lr: float = 0.01
    d_model: int = 16
    seed: int = 0


@dataclass(frozen=True)
class Problem:
    """What is learned from: the series, H, the context and the origins of each part."""

    series: Series
    horizon: int
    context: int

    def origins(self, part: int) -> Int[Array, " m"]:
        """The last known steps of forecasts all within part 0, 1 or 2, and context."""
        ends = (0, *self.series.ends, len(self.series.x))
        first = max(ends[part], self.context) - 1
        return np.arange(first, ends[part + 1] - self.horizon)


def make_problem(options: RealSeriesOptions) -> Problem:
    """The task that ``options`` name. Raises InputError."""
    series = load_series(options.task)
    find_model(options.model)
    for name in ("N", "epochs", "batch_size", "d_model"):
        check_integer(name, getattr(options, name), at_least=1, example=8)
    for name in ("horizon", "context", "seed"):
        check_integer(name, getattr(options, name), at_least=0, example=0)
    if not 0 < options.lr < math.inf:
        raise bad_input("lr", options.lr, "a number above 0", "try 0.01")
    context = options.context or (2 if series.differenced else 4) * series.period
    problem = Problem(series, options.horizon or series.period, context)
    shortest = series.ends[1] - series.ends[0]
    if problem.horizon > shortest:
        raise bad_input(
            "horizon",
            problem.horizon,
            f"at most {shortest} steps, the validation part of {options.task}",
            "lower it",
        )
    if problem.context + problem.horizon > series.ends[0] // 2:
        raise bad_input(
            "context",
            problem.context,
            f"with the horizon at most {series.ends[0] // 2} steps, half of the "
            "training part",
            "lower it",
        )
    return problem


def run(options: RealSeriesOptions) -> ExperimentResult:
    """Forecast a real series with one model."""
    return train(options, lambda *_: None)


def train(options: RealSeriesOptions, tell: Tell) -> ExperimentResult:
    """As :func:`run`; ``tell(done, total, note)`` hears how far it is."""
    problem = make_problem(options)
    model = build_regressor(
        options.model,
        N=options.N,
        d_model=options.d_model,
        outputs=problem.horizon,
        seed=options.seed,
    )
    config = TrainingConfig(
        epochs=options.epochs,
        batch_size=options.batch_size,
        lr=options.lr,
        schedule="cosine",
        device="cpu",
        seed=options.seed,
    )

    def on_step(at: Progress) -> None:
        tell(at.step, at.steps, f"loss {at.loss:.3f}")

    with backends_used() as backends, one_thread():
        trainer = Trainer(model, window_error, config, on_step=on_step)
        curve = trainer.fit(windows(problem, 0), windows(problem, 1))
        forecast = forecasts(model, problem)
    learned = {"n_params": count_parameters(model), "backends": sorted(backends)}
    learned["curve"] = [
        {
            "epoch": entry["epoch"],
            "train_mse": entry["train_loss"],
            "val_mse": entry["val_loss"],
            "seconds": entry["seconds"],
        }
        for entry in curve
    ]
    return _result(options, problem, forecast, learned)


def windows(problem: Problem, part: int) -> list[Tensor]:
    """Inputs (W, context) of a part, and their targets (W, context, H)."""
    series = problem.series
    z, _ = scaled(series)
    origins = problem.origins(part)
    ends = origins[:: max(1, len(origins) // WINDOWS)]
    index = ends[:, None] - np.arange(problem.context)[::-1]
    ahead = targets(z, index.ravel(), problem.horizon, summed=series.differenced)
    y = ahead.reshape(*index.shape, problem.horizon)
    return [torch.from_numpy(array).float() for array in (z[index], y)]


def window_error(model: nn.Module, batch: Batch) -> Scores:
    """(y - ŷ)² over the second half of each window, where enough has been seen."""
    x, y = batch
    half = x.shape[1] // 2
    error = (model(x) - y)[:, half:].square()
    return Scores(error.sum(), torch.tensor(error.numel()), {})


def forecasts(model: nn.Module, problem: Problem) -> Float[Array, "m H"]:
    """x̂ for every origin of the test part, from the context before it."""
    z, scaling = scaled(problem.series)
    origins = problem.origins(2)
    index = origins[:, None] - np.arange(problem.context)[::-1]
    model.eval()
    with torch.no_grad():
        last = model(torch.from_numpy(z[index]).float())[:, -1]
    return restored(problem.series, scaling, origins, last.double().numpy())


def _result(
    options: RealSeriesOptions,
    problem: Problem,
    forecast: Float[Array, "m H"],
    learned: dict[str, Any],
) -> ExperimentResult:
    series, origins = problem.series, problem.origins(2)
    ar, order = autoregression(series, origins, problem.horizon)
    others = {
        "seasonal naive": seasonal_naive(series, origins, problem.horizon),
        f"AR({order}), by AIC": ar,
    }
    own = scores(series, origins, forecast)
    split = dict(zip(("train", "val"), series.ends, strict=True))
    metadata = {
        **learned,
        "model": options.model,
        "N": options.N,
        "horizon": problem.horizon,
        "context": problem.context,
        "scores": own,
        "baselines": {k: scores(series, origins, f) for k, f in others.items()},
        "forecasts": {
            options.model: _shown(forecast),
            **{name: _shown(each) for name, each in others.items()},
        },
        "series": {
            "unit": series.unit,
            "period": series.period,
            "differenced": series.differenced,
            "interpolated": series.filled,
            "n": len(series.x),
            "split_ends": split,
            "scaling": scaled(series)[1]._asdict(),
            "origins": origins,
            "years": series.years[origins[0] :],
            "x": series.x[origins[0] :],
        },
    }
    baselines = ", ".join(
        f"{name} {s['one_step']['mase']:.3f} and {s['all_steps']['mase']:.3f}"
        for name, s in metadata["baselines"].items()
    )
    details = (
        f"{options.model} on {options.task}, seed {options.seed}: MASE "
        f"{own['one_step']['mase']:.3f} one step ahead, "
        f"{own['all_steps']['mase']:.3f} over {problem.horizon}; {baselines}"
    )
    return ExperimentResult(NAME, details, metadata)


def _shown(forecast: Float[Array, "m H"]) -> dict[str, Any]:
    """What the picture needs: one step ahead, and paths from every H-th origin."""
    H = forecast.shape[1]
    return {"one_step": forecast[:, 0], "paths": forecast[::H]}


def problems(metadata: dict[str, Any]) -> list[str]:
    """Where a record contradicts itself; no forecast is judged here."""
    x = np.array(metadata["series"]["x"], dtype=float)
    one = np.array(metadata["forecasts"][metadata["model"]]["one_step"], dtype=float)
    again = float(np.abs(one - x[1 : len(one) + 1]).mean())
    said = float(metadata["scores"]["one_step"]["mae"])
    if not math.isclose(again, said, rel_tol=1e-9):
        return [f"one-step mae is {said}, of the forecasts it is {again}"]
    return []


# --- the command line -----------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Forecast with every model and seed that the flags name; log each run."""
    own = [p for p in parameters_of(run) if p.name != "model"]
    models = ("ssm_diag_linear", "mamba_diag_exp", "s4d")
    sweep = [
        Parameter("models", tuple[str, ...], models, "Models to train."),
        Parameter("seeds", tuple[int, ...], (), "Instead of --seed, several."),
        Parameter("log_path", str, f"{OUT_DIR}/{LOG}", "The run log."),
        Parameter("again", bool, False, "Also run what the log already holds."),
    ]
    about = (RealSeriesOptions.__doc__ or "").partition("\n")[0]
    name = "python -m time_series_experiments.exp_real_series"
    values = parse(name, about, sweep + own, argv)
    wanted = {each.name: values.pop(each.name) for each in sweep}
    with one_line_errors(), progress_shown():
        return _sweep(RealSeriesOptions(**values), **wanted)


def _sweep(
    options: RealSeriesOptions,
    *,
    models: tuple[str, ...],
    seeds: tuple[int, ...],
    log_path: str,
    again: bool,
) -> int:
    check_nonempty("models", models, "--models ssm_diag_linear")
    cells = [
        replace(options, model=model, seed=seed)
        for model in dict.fromkeys(models)
        for seed in dict.fromkeys(seeds or (options.seed,))
    ]
    for cell in cells:  # fail before the work, not after it
        make_problem(cell)
    sweep = Sweep(NAME, log_path, again=again)
    missing = [cell for cell in cells if not sweep.holds(cell)]
    with meter(options.task) as tell:
        sweep.keep(missing, _results(missing, tell))
    return sweep.close()


def _results(
    cells: Sequence[RealSeriesOptions], tell: Tell
) -> Iterator[ExperimentResult]:
    for cell in cells:
        yield train(cell, tell)


if __name__ == "__main__":
    sys.exit(main())
