"""Sequence models on signatures: which depths and nonlinearities learn an entry of one.

    python -m lcde.sm_toy --model S4 --depth 2 --no-nonlinear

Figure 1 of document 2: S4 and S5 without activations predict nothing at any depth, and
S4 and S5 with them, or Mamba even without, do. ``run`` trains one model with one seed;
the published settings are the defaults.
"""

import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import nn
from torch.nn.functional import mse_loss

from data_dir.toy import FOLDER, SignatureTask, load_toy
from experiments.common import COLORS, ExperimentResult, Picture, new_figure
from lcde._sequence_model import SequenceModelConfig
from lcde._sm_runs import Command, Job, as_rows, fit, keep, main_of
from lcde._watch import Hooks, Watch
from lcde.config import SMToyConfig
from ssm.training import Batch, Entry, Precision, Scores, TrainingConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "sm_toy"
CLAIM = "a sequence model's error on an entry of the signature; measured, not judged"
_EVAL_BATCH = 512  # paths scored at once, where no gradients need memory


@dataclass(frozen=True)
class SMToyOptions:
    """Train one sequence model on signatures, with one seed.

    Args:
        model: S4, S5, Mamba, RNN, Transformer, or a whole layer of ssm: S4Full, S4D,
            MambaBlock, Mamba2, GRU, RWKV or Hyena
        input_dim: dimension of the paths, 2 or 3
        depth: blocks
        nonlinear: GELU behind each block's linear map
        hidden_dim: channels
        state_dim: states a channel
        batch_size: paths a step
        learning_rate: of Adam
        num_epochs: passes over the training paths
        max_steps: most steps, 0 for as many as the epochs have
        eval_every: steps between validations; each epoch ends with one, too
        n_train: paths to train on
        n_val: paths to validate on
        data_dir: the folder of the data, generated where it has none
        device: auto, cpu, cuda or mps
        precision: of matrix products
        compile: run through torch.compile
        cuda_graph: launch each step as one CUDA graph (one process on one GPU)
        seed: of weights and batches
    """

    model: str = "S4"
    input_dim: int = 2
    depth: int = 2
    nonlinear: bool = True
    hidden_dim: int = 256
    state_dim: int = 256
    batch_size: int = 32
    learning_rate: float = 1e-4
    num_epochs: int = 401
    max_steps: int = 0
    eval_every: int = 10_000
    n_train: int = 80_000
    n_val: int = 20_000
    data_dir: str = FOLDER
    device: str = "auto"
    precision: Precision = "float32"
    compile: bool = False
    cuda_graph: bool = False
    seed: int = 2345

    def architecture(self) -> SequenceModelConfig:
        """The model: GELU, no norm, the mean over time."""
        return SequenceModelConfig(
            input_dim=self.input_dim,
            output_dim=1,
            hidden_dim=self.hidden_dim,
            state_dim=self.state_dim,
            depth=self.depth,
            model_name=self.model,
            nonlinear=self.nonlinear,
            activation="GELU",
        )

    def training(self) -> TrainingConfig:
        """Adam (AdamW without decay) at a constant rate, gradients as they come."""
        return TrainingConfig(
            epochs=self.num_epochs,
            batch_size=self.batch_size,
            lr=self.learning_rate,
            grad_clip=0.0,
            device=self.device,
            precision=self.precision,
            compile=self.compile,
            cuda_graph=self.cuda_graph,
            eval_every=self.eval_every,
            eval_batch_size=_EVAL_BATCH,
            seed=self.seed,
        )


def squared_error(model: nn.Module, batch: Batch) -> Scores:
    """(y - y_hat)^2 of every path; the mean over time is the model's."""
    paths, labels = batch
    predicted = model(paths).float().squeeze(1)
    scored = labels.new_full((), len(labels))  # no copy: a CUDA graph holds none
    return Scores(mse_loss(predicted, labels, reduction="sum"), scored, {})


def told(entry: Entry) -> dict[str, Any]:
    """An entry of the curve, with the root of the validation error."""
    return {**entry, "val_rmse": math.sqrt(entry["val_loss"])}


def run(options: SMToyOptions) -> ExperimentResult:
    """Train one sequence model on signatures; the curve is in the metadata."""
    return train(options, None, resume=False, watch=Watch())


def train(
    options: SMToyOptions, folder: Path | None, *, resume: bool, watch: Watch
) -> ExperimentResult:
    """As :func:`run`, with checkpoints in ``folder``, from which ``resume`` goes on."""
    model, training = options.architecture(), options.training()
    task = load_toy(
        options.input_dim,
        folder=options.data_dir,
        n_train=options.n_train,
        n_val=options.n_val,
    )
    job = Job(
        model=model,
        objective=squared_error,
        training=training,
        train=as_rows(task.train),
        val=as_rows(task.val),
        told=told,
        max_steps=options.max_steps,
    )
    curve, facts = fit(job, options, folder, resume=resume, watch=watch)
    return _result(options, task, curve, facts)


def _result(
    options: SMToyOptions,
    task: SignatureTask,
    curve: list[dict[str, Any]],
    facts: dict[str, Any],
) -> ExperimentResult:
    rmse, level = curve[-1]["val_rmse"], task.rmse_zero
    shown = ("model", "input_dim", "depth", "nonlinear", "hidden_dim", "state_dim")
    metadata = {name: getattr(options, name) for name in shown}
    metadata |= {"rmse": rmse, "rmse_zero": level, "n_train": options.n_train}
    metadata |= {"n_val": options.n_val, "curve": curve, "task": task.metadata, **facts}
    kind = "nonlinear" if options.nonlinear else "linear"
    details = (
        f"{options.model} on {options.input_dim}D signatures, {kind}, depth "
        f"{options.depth}, seed {options.seed}: validation RMSE {rmse:.5f} after "
        f"{facts['steps']:,} steps, {rmse / level:.3f} of predicting zero"
    )
    return ExperimentResult(NAME, details, metadata)


def problems(metadata: dict[str, Any]) -> list[str]:
    """Where a record contradicts itself; how good a model is, nothing judges here."""
    found, last = [], metadata["curve"][-1]
    if metadata["rmse"] != last["val_rmse"]:
        found.append(f"rmse is not the last of the curve, {last['val_rmse']}")
    if metadata["steps"] != last["step"]:
        found.append(f"steps is not the last of the curve, {last['step']}")
    return found


def draw(results: Sequence[ExperimentResult]) -> "Figure":
    """Validation RMSE against the step, one line a run, and the level of zero."""
    figure, axes = new_figure()
    ax = axes[0, 0]
    levels = {result.metadata["rmse_zero"] for result in results}
    for i, result in enumerate(results):
        meta = result.metadata
        kind = "nonlinear" if meta["nonlinear"] else "linear"
        points = [(entry["step"], entry["val_rmse"]) for entry in meta["curve"]]
        label = f"{meta['model']}, {meta['input_dim']}D, {kind}, depth {meta['depth']}"
        color = COLORS[i % len(COLORS)]
        ax.plot(*zip(*points, strict=True), marker="o", color=color, label=label)
    for level in levels:
        ax.axhline(level, color="grey", linestyle=":", label="predicting zero")
    ax.set(xlabel="step", ylabel="validation RMSE", yscale="log")
    ax.legend()
    return figure


PICTURES = (Picture(draw, "outputs/lcde/sm_toy.png"),)


def run_name(options: SMToyOptions) -> str:
    """What a run, its checkpoints and its picture are called."""
    kind = "nonlinear" if options.nonlinear else "linear"
    return (
        f"{NAME}_{options.model}_{options.input_dim}d_{kind}_depth{options.depth}_"
        f"hidden{options.hidden_dim}_seed{options.seed}"
    )


def run_sm_toy_experiment(
    config: SMToyConfig, *, seed: int, hooks: Hooks
) -> list[ExperimentResult]:
    """Every model, run, dimension, and pair of depth and nonlinearity of ``config``.

    Run i of ``runs`` has the seed ``seed`` + i.
    """
    seeds = range(seed, seed + config.runs)
    grid = itertools.product(
        config.model_names, seeds, config.input_dims, config.depth_nonlinears
    )
    results = []
    for name, one_seed, dim, (depth, nonlinear) in grid:
        options = SMToyOptions(
            model=name,
            input_dim=dim,
            depth=depth,
            nonlinear=nonlinear,
            hidden_dim=config.hidden_dim,
            state_dim=config.state_dim,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            num_epochs=config.num_epochs,
            eval_every=config.eval_every,
            precision=cast("Precision", config.precision),
            compile=config.compile,
            cuda_graph=config.cuda_graph,
            max_steps=config.max_steps,
            n_train=config.n_train,
            n_val=config.n_val,
            seed=one_seed,
        )
        results.append(keep(train, run_name(options), options, hooks))
    return results


def line(entry: Mapping[str, Any]) -> str:
    """An entry as the command line prints it."""
    return (
        "step {step:<8} train loss {train_loss:.6f}   validation RMSE {val_rmse:.5f}   "
        "{seconds:.0f} s".format(**entry)
    )


COMMAND = Command("lcde.sm_toy", SMToyOptions, run, train, run_name, line, PICTURES[0])


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the flags say; log the run, and draw it where asked."""
    return main_of(COMMAND, argv)


if __name__ == "__main__":
    sys.exit(main())
