"""Random Linear CDE, then least squares, on the signature data: Figure 1's best row.

    X -> y_T of a Linear CDE that is never trained -> a linear map, fitted once

    python -m lcde.toy --input-dim 2

Signature terms are linear in the state of a wide enough random Linear CDE (theorem 4.1
and section 5.1 of Muca Cirone et al. 2024), so that ordinary least squares on the
features y_T predicts them; the published means of the validation RMSE over 5 runs are
2.07e-4 in two dimensions and 6.85e-3 in three.
"""

import math
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from data_dir.toy import FOLDER, load_toy
from experiments.common import (
    ExperimentResult,
    bad_input,
    check_integer,
    command_line,
    random_stream,
    track,
)
from lcde._model import LinearCDE
from lcde._shared import exact_final_states
from lcde._structures import Dense
from lcde._watch import Hooks, Tick
from lcde.config import LCDEToyConfig

NAME = "lcde_toy"
CLAIM = "least squares on a random Linear CDE's final state gives the signature term"

NDArray = np.ndarray


@dataclass(frozen=True)
class ToyOptions:
    """Fit one random Linear CDE to the signature data, with one seed.

    Args:
        input_dim: dimension d of the paths, 2 or 3
        hidden_dim: size H of the hidden state y
        batch_size: paths solved at once, by solvers that share nothing between paths
        solver: exact, parallel, euler or adaptive
        n_train: paths that the least squares fits
        n_val: paths that the error is measured on
        data_dir: folder of the data, drawn there on first use
        seed: draws the Linear CDE
    """

    input_dim: int = 2
    hidden_dim: int = 256
    batch_size: int = 4000
    solver: str = "exact"
    n_train: int = 80_000
    n_val: int = 20_000
    data_dir: str = FOLDER
    seed: int = 0


class LinearFit(NamedTuple):
    """y -> y . coefficients + intercept, and its errors."""

    coefficients: NDArray
    intercept: float
    rmse_train: float
    rmse: float


def run(options: ToyOptions) -> ExperimentResult:
    """Fit one random Linear CDE to the signature data; the RMSE is in the metadata."""
    check_integer("batch_size", options.batch_size, at_least=1, example=4000)
    model = make_model(options)
    task = load_toy(
        options.input_dim,
        folder=options.data_dir,
        n_train=options.n_train,
        n_val=options.n_val,
    )
    clock = time.perf_counter()
    paths = np.concatenate([task.train.paths, task.val.paths])
    features = obtain_features_from_model(model, paths, batch_size=options.batch_size)
    seconds_features = time.perf_counter() - clock
    clock = time.perf_counter()
    train, val = features[: options.n_train], features[options.n_train :]
    fit = train_linear(train, task.train.labels, val, task.val.labels)
    metadata = {
        "input_dim": options.input_dim,
        "hidden_dim": options.hidden_dim,
        "solver": options.solver,
        "n_train": options.n_train,
        "n_val": options.n_val,
        "rmse": fit.rmse,
        "rmse_train": fit.rmse_train,
        "rmse_zero": task.rmse_zero,
        "seconds_features": seconds_features,
        "seconds_fit": time.perf_counter() - clock,
        "task": task.metadata,
    }
    details = (
        f"random Linear CDE, H = {options.hidden_dim}, on {options.input_dim}D paths, "
        f"seed {options.seed}: validation RMSE {fit.rmse:.3e}, "
        f"{fit.rmse / task.rmse_zero:.2e} of predicting zero; features of "
        f"{options.n_train + options.n_val:,} paths in {seconds_features:.1f} s"
    )
    return ExperimentResult(NAME, details, metadata)


def make_model(options: ToyOptions) -> LinearCDE:
    """The Linear CDE that the options draw. Raises InputError."""
    stream = random_stream(options.seed, f"{NAME}/init")
    return LinearCDE(
        options.hidden_dim,
        options.input_dim,
        solver=options.solver,
        key=jax.random.key(int(stream.integers(2**32))),
    )


def obtain_features_from_model(
    model: LinearCDE,
    paths: Float32[NDArray, "n L d"],
    *,
    lengths: Int[NDArray, " n"] | None = None,
    batch_size: int = 4000,
) -> Float32[NDArray, "n H"]:
    """y_T of every path.

    With the exact solver and dense A, increments that repeat share their exponentials
    and paths their matrix products (``lcde._shared``); otherwise ``batch_size`` paths
    are solved at a time. lengths: knots of each path that count. Raises InputError for
    paths that are not finite.
    """
    if lengths is not None:
        knots = np.minimum(np.arange(paths.shape[1]), np.asarray(lengths)[:, None] - 1)
        paths = np.take_along_axis(paths, knots[:, :, None], axis=1)
    if not np.isfinite(paths).all():
        raise bad_input("paths", "NaN or infinity", "finite numbers", "mend the data")
    if model.solver == "exact" and isinstance(model.A.closed(), Dense):
        shared = _shared_features(model, paths, lengths)
        if shared is not None:
            return shared
    return _batched_features(model, paths, lengths, batch_size)


def _shared_features(
    model: LinearCDE,
    paths: Float32[NDArray, "n L d"],
    lengths: Int[NDArray, " n"] | None,
) -> Float32[NDArray, "n H"] | None:
    L = paths.shape[1]
    times = np.linspace(0, 1, L)[None]
    if lengths is not None:
        times = times[0][np.minimum(np.arange(L), np.asarray(lengths)[:, None] - 1)]
    channels = (times, *np.moveaxis(paths, 2, 0))
    W, b = np.asarray(model.init_matrix), np.asarray(model.init_bias)
    return exact_final_states(model.A, model.B, channels, paths[:, 0] @ W.T + b)


@eqx.filter_jit
def _final_states(
    model: LinearCDE, X: Float[Array, "n L d"], lengths: Int[Array, " n"]
) -> Float[Array, "n H"]:
    def final(X: Array, length: Array) -> Array:
        y = model(X, length=length)
        return y[-1] if model.continuous_output else y

    return jax.vmap(final)(X, lengths)


def _batched_features(
    model: LinearCDE,
    paths: Float32[NDArray, "n L d"],
    lengths: Int[NDArray, " n"] | None,
    batch_size: int,
) -> Float32[NDArray, "n H"]:
    n, L = paths.shape[:2]
    knots = np.full(n, L) if lengths is None else np.asarray(lengths)
    size = min(batch_size, n)
    features = np.empty((n, model.hidden_dim), np.float32)
    for start in track(range(0, n, size), "features"):
        first = min(start, n - size)  # the last batch overlaps: one shape, one program
        here = slice(first, first + size)
        y = _final_states(model, jnp.asarray(paths[here]), jnp.asarray(knots[here]))
        features[here] = np.asarray(y)
    return features


def train_linear(
    features_train: Float32[NDArray, "n H"],
    labels_train: Float32[NDArray, " n"],
    features_val: Float32[NDArray, "m H"],
    labels_val: Float32[NDArray, " m"],
) -> LinearFit:
    """argmin over c, c_0 of sum |y . c + c_0 - label|^2, and the RMSE on both parts.

    In float64 and by singular values, not normal equations: features of one random
    system are nearly collinear.
    """
    from sklearn.linear_model import LinearRegression

    regression = LinearRegression()
    regression.fit(features_train.astype(np.float64), labels_train.astype(np.float64))

    def rmse(features: NDArray, labels: NDArray) -> float:
        errors = regression.predict(features.astype(np.float64)) - labels
        return math.sqrt(np.mean(errors**2))

    return LinearFit(
        regression.coef_,
        float(regression.intercept_),
        rmse(features_train, labels_train),
        rmse(features_val, labels_val),
    )


def problems(metadata: dict[str, Any]) -> list[str]:
    """Where a record's errors are not those of a fit to these labels."""
    errors = {name: float(metadata[name]) for name in ("rmse", "rmse_zero")}
    found = [
        f"{name} is {error}; expected a positive finite number"
        for name, error in errors.items()
        if not 0 < error < math.inf
    ]
    if not found and errors["rmse"] >= errors["rmse_zero"]:
        found.append(
            f"{CLAIM}: the RMSE {errors['rmse']:.2e} is not below that of predicting "
            f"zero, {errors['rmse_zero']:.2e}"
        )
    return found


def run_lcde_toy_experiment(
    config: LCDEToyConfig, *, seed: int = 0, hooks: Hooks | None = None
) -> list[ExperimentResult]:
    """Every run and dimension of ``config``; run i has seed + i. Raises InputError.

    Runs that the log already holds are left out.
    """
    hooks = hooks or Hooks()
    if config.output_dim != 1:
        raise bad_input("output_dim", config.output_dim, "1, the labels' size", "use 1")
    wanted = [
        asdict(_options(config, input_dim, seed + i))
        for i in range(config.runs)
        for input_dim in config.input_dims
    ]
    results = []
    for step, options in enumerate(wanted):
        at = f"{options['input_dim']}D paths, seed {options['seed']}"
        hooks.watch.on_step(Tick(step, len(wanted), at))
        if not hooks.done(NAME, options):
            results.append(hooks.keep(run, options))
    hooks.watch.on_step(Tick(len(wanted), len(wanted), "done"))
    return results


def _options(config: LCDEToyConfig, input_dim: int, seed: int) -> ToyOptions:
    return ToyOptions(
        input_dim=input_dim,
        hidden_dim=config.hidden_dim,
        batch_size=config.batch_size,
        solver=config.solver,
        n_train=config.n_train,
        n_val=config.n_val,
        seed=seed,
    )


if __name__ == "__main__":
    sys.exit(command_line(run))
