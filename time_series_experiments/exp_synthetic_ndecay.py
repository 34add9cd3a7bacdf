"""A signal of K decays needs K states: models with N states against bound_N.

    python -m time_series_experiments.exp_synthetic_ndecay --N-values 1 2

x ~ N(0, 1), y_t = sum_i c_i sum_{s<=t} λ_i^(t-s) x_s + σ ε_t (``data``); bound_N is
the least error of a linear model with N states (``bound``), and the models are those of
``models``. ``run`` trains one model, with one N and one seed; the command goes through
all that its flags name and keeps a record of each in its log, ``ts_runs.jsonl``.

A model is judged by its population error, in closed form where it is linear: the error
on a validation sample lies below it about as often as above, and thus below bound_N,
too. Only ``ssm_diag_linear`` is bound by bound_N: the others have more states, a direct
path, or are not linear.
"""

import functools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from experiments.common import (
    ExperimentResult,
    Parameter,
    bad_input,
    check_increasing,
    check_integer,
    check_nonempty,
    meter,
    one_line_errors,
    parameters_of,
    parse,
    progress_shown,
    random_stream,
)
from ssm.ops import backends_used
from ssm.training import Batch, Entry, Progress, Scores, Trainer, TrainingConfig
from time_series_experiments._clean import Fit, SeedData, finish, train_first_order
from time_series_experiments._runs import LOG, OUT_DIR, Sweep, one_thread
from time_series_experiments.bound import (
    Bound,
    attainable_mse,
    hankel_singular_values,
)
from time_series_experiments.data import (
    Array,
    Mixture,
    decay_kernel,
    population_mse,
    sample,
    toeplitz,
)
from time_series_experiments.models import (
    CLEAN,
    build_regressor,
    check_represents,
    count_parameters,
    find_model,
)

NAME = "synthetic_decays"
CLAIM = "no model with N linear states is below bound_N; N = K reaches the noise"
SLACK = 1e-9  # of bound_N: rounding of the two sums that are compared
Tell = Callable[[int, int, str], None]


@dataclass(frozen=True)
class NDecayOptions:
    """Train one model with N states on a signal of K decays.

    Args:
        model: mamba_diag_exp, ssm_diag_linear, mamba, s4d, transformer or rnn
        N: states (see models; a transformer has none)
        epochs: passes over the training sequences
        T: steps a sequence
        lambdas: decays of the signal, between -1 and 1
        coeffs: a coefficient for each decay
        noise_std: deviation of the noise on the target
        n_train: sequences to train on
        n_val: sequences to validate on
        n_test: sequences for the population error of a model that is not linear
        batch_size: sequences an update
        lr: learning rate of Adam, falling to 0 as half a cosine
        d_model: channels of every model but ssm_diag_linear, which has one
        starts: ssm_diag_linear's second-order finish starts where Adam ended and from
            so many more decays; the least training loss is kept
        bound_starts: starts of the search for bound_N
        seed: of data, weights and batches, each a stream of its own
    """

    model: str = "mamba_diag_exp"
    N: int = 2
    epochs: int = 60
    T: int = 100
    lambdas: tuple[float, ...] = (0.9, 0.5)
    coeffs: tuple[float, ...] = (1.0, 0.7)
    noise_std: float = 1e-4
    n_train: int = 1000
    n_val: int = 200
    n_test: int = 2000
    batch_size: int = 50
    lr: float = 0.03
    d_model: int = 8
    starts: int = 8
    bound_starts: int = 50
    seed: int = 42

    def mixture(self) -> Mixture:
        """The signal. Raises InputError."""
        return Mixture(self.lambdas, self.coeffs, self.T, self.noise_std)

    def check(self) -> None:
        """Raise InputError for what cannot be run, before anything is."""
        self.mixture()
        find_model(self.model)
        check_represents(self.model, self.lambdas)
        sizes = ("N", "epochs", "n_train", "n_val", "n_test", "batch_size", "d_model")
        for name in (*sizes, "bound_starts"):
            check_integer(name, getattr(self, name), at_least=1, example=8)
        check_integer("starts", self.starts, at_least=0, example=8)
        check_integer("seed", self.seed, at_least=0, example=0)
        if not 0 < self.lr < math.inf:
            raise bad_input("lr", self.lr, "a number above 0", "try 0.01")


def run(options: NDecayOptions) -> ExperimentResult:
    """Train one model with N states on a signal of K decays."""
    return next(run_seeds(options, [options.seed], lambda *_: None))


def run_seeds(
    options: NDecayOptions, seeds: Sequence[int], tell: Tell
) -> Iterator[ExperimentResult]:
    """As :func:`run` for each seed; those of ssm_diag_linear are trained as one batch.

    ``tell(done, total, note)`` hears how far it is.
    """
    each = [replace(options, seed=seed) for seed in seeds]
    for one in each:
        one.check()
    with one_thread():
        yield from (_run_clean if options.model == CLEAN else _run_trained)(each, tell)


# --- the clean model ------------------------------------------------------------------


def _run_clean(each: Sequence[NDecayOptions], tell: Tell) -> Iterator[ExperimentResult]:
    started, options = time.perf_counter(), each[0]
    data = [_draw(one) for one in each]
    total = options.epochs + len(data)
    model, curves = train_first_order(
        data,
        options.N,
        epochs=options.epochs,
        batch_size=options.batch_size,
        lr=options.lr,
        on_epoch=lambda epoch: tell(epoch, total, "Adam"),
    )
    decays = model.decays.detach().numpy()
    weights = model.weights.detach().numpy()[:, 0]
    for i, (one, part) in enumerate(zip(each, data, strict=True)):
        fit = finish(part, decays[i], weights[i], starts=one.starts)
        tell(options.epochs + i + 1, total, "second order")
        yield _clean_result(one, part, fit, curves[i], time.perf_counter() - started)


def _clean_result(
    options: NDecayOptions,
    data: SeedData,
    fit: Fit,
    curve: list[dict[str, Any]],
    seconds: float,
) -> ExperimentResult:
    """Judge the fit by its population error in closed form."""
    mixture = options.mixture()
    matrix = toeplitz(decay_kernel(fit.decays, fit.weights, options.T))
    val_mse = float(((data.x_val @ matrix.T - data.y_val) ** 2).mean())
    finished = {"epoch": options.epochs, "train_mse": fit.train_mse, "finish": True}
    learned = {
        "curve": [*curve, finished | {"val_mse": val_mse}],
        "n_params": 2 * options.N,
        "finish": {
            "method": "Levenberg-Marquardt within |a| <= 1, least training loss of "
            "all starts kept",
            "starts": 1 + options.starts,
            "from": "Adam" if fit.start == 0 else f"spread decays {fit.start}",
        },
        "weights": fit.weights,
        "backends": ["float64 PyTorch and SciPy"],
        "seconds": seconds,
        "seconds_are": "since the batch of seeds began",
    }
    error = population_mse(matrix, mixture)
    measured = {"population_mse": error, "population_from": "closed form"}
    return _result(options, learned | measured, fit.decays)


# --- the others -----------------------------------------------------------------------


def _run_trained(
    each: Sequence[NDecayOptions], tell: Tell
) -> Iterator[ExperimentResult]:
    for i, options in enumerate(each):

        def on_step(at: Progress, i: int = i) -> None:
            tell(i * at.steps + at.step, len(each) * at.steps, f"loss {at.loss:.2e}")

        yield _train_one(options, on_step)


def _train_one(
    options: NDecayOptions, on_step: Callable[[Progress], None]
) -> ExperimentResult:
    data, spec = _draw(options), find_model(options.model)
    model = build_regressor(
        options.model,
        N=options.N,
        d_model=options.d_model,
        outputs=1,
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
    trainer = Trainer(model, squared_error, config, on_step=on_step)
    train, val = ((data.x, data.y), (data.x_val, data.y_val))
    with backends_used() as backends:
        entries = trainer.fit(_float32(train), _float32(val))
        measured = measure(model, options, linear=spec.linear)
    learned = {
        "curve": [_entry(entry) for entry in entries],
        "n_params": count_parameters(model),
        "backends": sorted(backends),
        "seconds": entries[-1]["seconds"],
    }
    decays = spec.decays(model).detach().numpy() if spec.decays else None
    return _result(options, learned | measured, decays)


def squared_error(model: nn.Module, batch: Batch) -> Scores:
    """The sum of (y - ŷ)² over sequences and steps."""
    x, y = batch
    error = (model(x)[..., 0] - y).square()
    return Scores(error.sum(), torch.tensor(error.numel()), {})


def measure(
    model: nn.Module, options: NDecayOptions, *, linear: bool
) -> dict[str, Any]:
    """The population error: exact for a linear model, else from a fixed sample.

    That sample is the same for every seed and model, and its targets carry no noise,
    whose variance is added instead. ``population_se`` is the standard error.
    """
    mixture = options.mixture()
    model.eval()
    if linear:
        matrix = impulse_matrix(model, options.T)
        error = population_mse(matrix, mixture)
        return {"population_mse": error, "population_from": "closed form"}
    still = replace(mixture, noise_std=0.0)
    stream = random_stream(0, "test")
    x, y = sample(still, options.n_test, stream, stream)
    with torch.no_grad():
        out = torch.cat([model(rows)[..., 0] for rows in _tensor(x).split(250)])
    errors = ((out.double().numpy() - y) ** 2).mean(1)
    return {
        "population_mse": float(errors.mean() + mixture.noise_floor),
        "population_se": float(errors.std() / math.sqrt(options.n_test)),
        "population_from": f"a fixed sample of {options.n_test} sequences",
    }


def impulse_matrix(model: nn.Module, T: int) -> Float[Array, "T T"]:
    """M of a model with ŷ = M x: column s is its answer to an impulse at step s."""
    with torch.no_grad():
        answers = model(torch.eye(T))[..., 0]
    return answers.double().numpy().T


def _entry(entry: Entry) -> dict[str, float]:
    """An entry of the trainer's curve, its losses by what they are here."""
    kept = {key: entry[key] for key in ("epoch", "step", "seconds")}
    losses = {f"{part}_mse": entry[f"{part}_loss"] for part in ("train", "val")}
    return kept | losses


def _float32(arrays: Sequence[Float[Array, "n T"]]) -> list[Tensor]:
    return [_tensor(array) for array in arrays]


def _tensor(array: Float[Array, "n T"]) -> Tensor:
    return torch.from_numpy(array).float()


# --- what all share -------------------------------------------------------------------


def _draw(options: NDecayOptions) -> SeedData:
    """Training and validation sequences, each part of each from its own stream."""
    parts = []
    for part, n in (("train", options.n_train), ("val", options.n_val)):
        streams = (random_stream(options.seed, f"{part} {s}") for s in ("x", "noise"))
        parts += [*sample(options.mixture(), n, *streams)]
    return SeedData(options.seed, *parts)


@functools.lru_cache(maxsize=64)
def _bound(mixture: Mixture, N: int, n_starts: int) -> Bound:
    return attainable_mse(mixture, N, n_starts=n_starts)


def _result(
    options: NDecayOptions,
    learned: dict[str, Any],
    decays: Float[Array, " N"] | None,
) -> ExperimentResult:
    mixture = options.mixture()
    bound = _bound(mixture, options.N, options.bound_starts)
    error = learned["population_mse"]
    metadata = {
        "model": options.model,
        "N": options.N,
        "T": options.T,
        "linear": find_model(options.model).linear,
        "stateful": find_model(options.model).stateful,
        "val_mse": learned["curve"][-1]["val_mse"],
        **learned,
        "bound": asdict(bound),
        "noise_floor": mixture.noise_floor,
        "true_decays": mixture.lambdas,
        "true_coeffs": mixture.coeffs,
        "decays": decays,
        "decay_error": None if decays is None else _decay_error(mixture, decays),
        "hankel_singular_values": hankel_singular_values(mixture),
    }
    passed = error >= bound.mse * (1 - SLACK) if options.model == CLEAN else None
    details = (
        f"{options.model}, N = {options.N}, seed {options.seed}: population MSE "
        f"{error:.4e} ({learned['population_from']}), bound_{options.N} "
        f"{bound.mse:.4e}, noise floor {mixture.noise_floor:.1e}"
    )
    return ExperimentResult(NAME, details, metadata, passed)


def _decay_error(mixture: Mixture, decays: Float[Array, " N"]) -> float:
    """The largest distance of a true decay from the nearest learned one."""
    true = np.array(mixture.lambdas)
    return float(np.abs(true[:, None] - decays).min(1).max())


def problems(metadata: dict[str, Any]) -> list[str]:
    """Where a record contradicts itself; its error is computed again."""
    found = []
    error, bound = float(metadata["population_mse"]), metadata["bound"]
    if float(bound["mse"]) < float(metadata["noise_floor"]):
        found.append("bound is below the noise floor")
    if metadata["model"] == CLEAN:
        again = _error_again(metadata)
        if not math.isclose(error, again, rel_tol=1e-6, abs_tol=1e-14):
            found.append(f"population_mse is {error}, of the kernel it is {again}")
    if float(metadata["curve"][-1]["val_mse"]) != float(metadata["val_mse"]):
        found.append("val_mse is not the last of the curve")
    return found


def _error_again(metadata: dict[str, Any]) -> float:
    """The population error of the logged kernel, as a sum over lags."""
    T = int(metadata["T"])
    weights = 1 - np.arange(T) / T
    true = decay_kernel(metadata["true_decays"], metadata["true_coeffs"], T)
    own = decay_kernel(metadata["decays"], metadata["weights"], T)
    return float(weights @ (true - own) ** 2 + metadata["noise_floor"])


# --- the command line -----------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Train every model with every N and seed that the flags name; log each run."""
    own = [p for p in parameters_of(run) if p.name not in ("model", "N")]
    sweep = [
        Parameter("models", tuple[str, ...], ("mamba_diag_exp",), "Models to train."),
        Parameter("N_values", tuple[int, ...], (1, 2), "Numbers of states."),
        Parameter(
            "seeds",
            tuple[int, ...],
            (),
            "Several seeds in the place of --seed, trained as one batch by "
            "ssm_diag_linear.",
        ),
        Parameter("log_path", str, f"{OUT_DIR}/{LOG}", "The run log."),
        Parameter("again", bool, False, "Also run what the log already holds."),
    ]
    about = (NDecayOptions.__doc__ or "").partition("\n")[0]
    name = "python -m time_series_experiments.exp_synthetic_ndecay"
    values = parse(name, about, sweep + own, argv)
    wanted = {each.name: values.pop(each.name) for each in sweep}
    with one_line_errors(), progress_shown():
        return _sweep(NDecayOptions(**values), **wanted)


def _sweep(
    options: NDecayOptions,
    *,
    models: tuple[str, ...],
    N_values: tuple[int, ...],
    seeds: tuple[int, ...],
    log_path: str,
    again: bool,
) -> int:
    check_nonempty("models", models, "--models mamba_diag_exp")
    check_increasing("N_values", N_values, at_least=1)
    seeds = tuple(dict.fromkeys(seeds)) or (options.seed,)
    cells = [
        replace(options, model=model, N=N)
        for model in dict.fromkeys(models)
        for N in (N_values if find_model(model).stateful else N_values[:1])
    ]
    for cell in cells:  # fail before the work, not after it
        for seed in seeds:
            replace(cell, seed=seed).check()
    sweep = Sweep(NAME, log_path, again=again)
    for cell in cells:
        missing = [s for s in seeds if not sweep.holds(replace(cell, seed=s))]
        with meter(f"{cell.model}, N = {cell.N}") as tell:
            each = (replace(cell, seed=seed) for seed in missing)
            sweep.keep(each, run_seeds(cell, missing, tell))
    return sweep.close()


if __name__ == "__main__":
    sys.exit(main())
