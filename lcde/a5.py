"""A trained Linear CDE on the word problem of A5, or of another finite group.

    python -m lcde.a5 --length 8

Document 2, figure 2: one layer tracks the state of A5 at every length tried, where
diagonal models need more layers the longer the sequences are. ``run`` trains on one
length with one seed. The command line adds what is kept: a line in
``<results_dir>/runs.jsonl``, checkpoints from which ``--resume`` goes on, pictures.
``run_experiment.py -m LCDE -e A5`` goes through the published lengths.
"""

import dataclasses
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, PRNGKeyArray

from data_dir.groups import group
from data_dir.word_problem import FOLDER, SAMPLES, WordTask, load_words
from experiments.common import (
    COLORS,
    EXIT_FAILED_CLAIM,
    ExperimentResult,
    Parameter,
    Picture,
    RunLog,
    bad_input,
    check_integer,
    check_picture_path,
    execute,
    meter,
    new_figure,
    one_line_errors,
    parameters_of,
    parse,
    progress_shown,
    save_figure,
)
from lcde._model import Embedding, LinearCDE
from lcde._structures import STRUCTURES, random_structure
from lcde._tokens import token_states
from lcde._training import (
    CHECKPOINT_S,
    Data,
    Entry,
    Sequences,
    Trainer,
    TrainingConfig,
    stream_key,
)
from lcde._watch import Hooks, Tick, Watch
from lcde.config import LCDEA5Config

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "STRUCTURES",
    "A5LinearCDE",
    "A5Options",
    "run",
    "run_lcde_A5_experiment",
    "train",
    "train_model",
]

NAME = "lcde_a5"
CLAIM = "one Linear CDE layer passes the threshold of validation accuracy"
LOG = "runs.jsonl"
MODEL = "LinearCDE"
PAIRS = 10  # a step's second update is on a tenth as many sequences, of length 2
_EVAL_BYTES = 2**29  # of the matrices gathered for one position of an evaluation


# --- the model ------------------------------------------------------------------------


class A5LinearCDE(eqx.Module):
    """Tokens -> embedding -> Linear CDE -> relu(mix) + embedding -> norm -> logits.

    The control is the integral of (s, X_s), X the embedded tokens, solved by Euler
    steps (``lcde._tokens``); dropout before and after the mixing layer; the same linear
    readout at every position. Everything else is as published.

    Source: document 2, ``A5LinearCDE``. Differs: logits, not their softmax, which the
    loss takes again where it needs it; each part has a key of its own.
    """

    embedding: Embedding
    cde: LinearCDE
    mix: eqx.nn.Linear
    norm: eqx.nn.LayerNorm
    readout: eqx.nn.Linear
    dropout: eqx.nn.Dropout

    def __init__(
        self,
        hidden_dim: int,
        input_dim: int,
        output_dim: int,
        *,
        structure: str = "dense",
        block_size: int = 4,
        dropout: float = 0.1,
        key: PRNGKeyArray,
    ):
        """Draw the parameters.

        input_dim: tokens. output_dim: classes. structure: of A, a name in
        ``STRUCTURES``. block_size: of block_diagonal. Raises InputError.
        """
        if not 0 <= dropout < 1:
            raise bad_input("dropout", dropout, "a share of at least 0, below 1", "0.1")
        embedding_key, cde_key, mix_key, readout_key = jr.split(key, 4)
        draw = partial(random_structure, structure, block_size=block_size)
        self.embedding = Embedding(input_dim, hidden_dim, key=embedding_key)
        self.cde = LinearCDE(hidden_dim, hidden_dim, structure=draw, key=cde_key)
        self.mix = eqx.nn.Linear(hidden_dim, hidden_dim, key=mix_key)
        self.norm = eqx.nn.LayerNorm(hidden_dim)
        self.readout = eqx.nn.Linear(hidden_dim, output_dim, key=readout_key)
        self.dropout = eqx.nn.Dropout(dropout)

    def __call__(
        self, tokens: Int[Array, " L"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "L V"]:
        """Logits at every position; with a key, dropout is drawn from it, else none."""
        return self.batch(tokens[None], key=key)[0]

    def batch(
        self, tokens: Int[Array, "R L"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "R L V"]:
        """Logits of R sequences, which share the matrices of the tokens."""
        x, cde = self.embedding(tokens), self.cde
        y0 = jax.vmap(cde.initial_state)(x[:, 0])
        y = token_states(cde.A, cde.B, self.embedding.weights, tokens, y0)
        early, late = (None, None) if key is None else jr.split(key)
        mixed = jax.nn.relu(_rowwise(self.mix, self._drop(y, early)))
        z = _rowwise(self.norm, self._drop(mixed, late) + x)
        return _rowwise(self.readout, z)

    def _drop(
        self, y: Float[Array, "R L H"], key: PRNGKeyArray | None
    ) -> Float[Array, "R L H"]:
        return self.dropout(y, key=key, inference=key is None)


def _rowwise(layer: Any, x: Float[Array, "R L d"]) -> Float[Array, "R L e"]:
    return jax.vmap(jax.vmap(layer))(x)


# --- the options ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class A5Options:
    """Train a Linear CDE on words of one length, with one seed.

    Args:
        length: elements of a sequence, 3 or more (all those of 2 are trained on)
        group: a finite group, such as A5, S3 or A4xZ5
        hidden_dim: size H of the hidden state y and of the embedding
        structure: of the matrices A; dense, diagonal, block_diagonal or
            diagonal_plus_low_rank
        block_size: of block-diagonal A
        dropout: of what enters and leaves the mixing layer
        batch_size: sequences a step; a tenth as many of length 2 in a second update
        learning_rate: of AdamW
        weight_decay: of AdamW, on all parameters as published
        schedule: of the learning rate after the warm-up
        warmup: steps over which the learning rate rises
        num_steps: most steps
        eval_every: steps between validations
        threshold: validation accuracy above which the run stops
        samples: sequences, training and validation together, as published a million
        train_split: share of the sequences that is trained on
        data_dir: folder of the sequences, which are made where it has none
        precision: of matrix products, on devices that have tensorfloat32
        seed: of split, weights, batches and dropout, each a stream of its own
    """

    length: int = 8
    group: str = "A5"
    hidden_dim: int = 256
    structure: str = "dense"
    block_size: int = 4
    dropout: float = 0.1
    batch_size: int = 32
    learning_rate: float = 2e-4
    weight_decay: float = 0.01
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: int = 0
    num_steps: int = 1_000_000
    eval_every: int = 2_500
    threshold: float = 0.9
    samples: int = SAMPLES
    train_split: float = 0.8
    data_dir: str = FOLDER
    precision: Literal["float32", "tensorfloat32"] = "float32"
    seed: int = 0

    def training(self) -> TrainingConfig:
        """The part of these options that is the trainer's. Raises InputError."""
        check_integer("hidden_dim", self.hidden_dim, at_least=1, example=256)
        names = {field.name for field in dataclasses.fields(TrainingConfig)}
        own = {k: v for k, v in dataclasses.asdict(self).items() if k in names}
        rows = max(1, _EVAL_BYTES // (4 * self.hidden_dim**2))
        return TrainingConfig(
            **own, extra_batch=self.batch_size // PAIRS, eval_rows=rows
        )


def load_data(options: A5Options) -> tuple[WordTask, Data]:
    """The words to train and validate on, and all pairs. Raises InputError."""
    check_integer("length", options.length, at_least=3, example=8)
    if not options.train_split < 1:
        raise bad_input(
            "train_split", options.train_split, "a share below 1", "try 0.8"
        )
    load = partial(
        load_words, group=options.group, folder=options.data_dir, seed=options.seed
    )
    task = load(
        options.length, samples=options.samples, train_split=options.train_split
    )
    pairs = load(2, samples=group(options.group).order ** 2, train_split=1.0)
    parts = (task.train, task.val, pairs.train)
    return task, Data(*(Sequences(*map(jnp.asarray, part)) for part in parts))


def make_model(options: A5Options, n_elements: int) -> A5LinearCDE:
    """The model that ``options`` name, weights from the seed. Raises InputError."""
    return A5LinearCDE(
        options.hidden_dim,
        n_elements,
        n_elements,
        structure=options.structure,
        block_size=options.block_size,
        dropout=options.dropout,
        key=stream_key(options.seed, "init"),
    )


# --- the run --------------------------------------------------------------------------


def train_model(
    model: A5LinearCDE, data: Data, config: TrainingConfig
) -> tuple[A5LinearCDE, list[Entry]]:
    """The model trained as ``config`` says, and an entry for each evaluation."""
    trainer = Trainer(model, data, config)
    curve = trainer.fit()
    return trainer.trained(), curve


def run(options: A5Options) -> ExperimentResult:
    """Train a Linear CDE on words of one length, with one seed."""
    return train(options, None, resume=False, watch=Watch())


def train(
    options: A5Options,
    folder: Path | None,
    *,
    resume: bool,
    watch: Watch,
    checkpoint_s: float = CHECKPOINT_S,
) -> ExperimentResult:
    """As :func:`run`, with checkpoints in ``folder``, from which ``resume`` goes on.

    checkpoint_s: least seconds between two of them. Without ``resume`` those that are
    there are removed once all input is accepted.
    """
    config = options.training()
    task, data = load_data(options)
    model = make_model(options, task.n_elements)
    trainer = Trainer(
        model,
        data,
        config,
        folder=folder,
        settings=identity(options, task),
        watch=watch,
        checkpoint_s=checkpoint_s,
    )
    if folder and not resume:
        shutil.rmtree(folder, ignore_errors=True)  # all input has been accepted
    with jax.default_matmul_precision(options.precision):
        curve = trainer.fit(resume=resume)
    return _result(options, task, trainer, curve)


def _result(
    options: A5Options, task: WordTask, trainer: Trainer, curve: list[Entry]
) -> ExperimentResult:
    last, reached = curve[-1], trainer.reached
    parameters = eqx.filter(trainer.trained(), eqx.is_inexact_array)
    n_params = sum(x.size for x in jax.tree.leaves(parameters))
    metadata = {
        "model": MODEL,
        "group": options.group,
        "length": options.length,
        "depth": 1,
        "hidden_dim": options.hidden_dim,
        "structure": options.structure,
        "accuracy": last["val_accuracy"],
        "steps": last["step"],
        "reached": reached,
        "threshold": options.threshold,
        "n_params": n_params,
        "curve": curve,
        "task": task.metadata,
        "device": device_name(),
    }
    details = (
        f"{MODEL} on {options.group} at length {options.length}, seed {options.seed}, "
        f"{n_params:,} parameters: validation accuracy {last['val_accuracy']:.2%} "
        f"after {last['step']:,} steps and {last['seconds']:.0f} s, "
        f"{'above' if reached else 'not above'} {options.threshold:.0%}"
    )
    return ExperimentResult(NAME, details, metadata, passed=reached)


def identity(options: A5Options, task: WordTask) -> dict[str, Any]:
    """What a run is, wherever its data lie: these by their hash."""
    flags = dataclasses.asdict(options)
    del flags["data_dir"]
    return flags | {"data_sha256": task.metadata["sha256"]}


def device_name() -> str | None:
    """An accelerator's name; None for the processor, which the log names itself."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return None
    return f"{device.platform}: {device.device_kind}"


def problems(metadata: dict[str, Any]) -> list[str]:
    """Where a record contradicts itself."""
    found, last = [], metadata["curve"][-1]
    if (
        metadata["accuracy"] != last["val_accuracy"]
        or metadata["steps"] != last["step"]
    ):
        found.append("accuracy and steps are not those of the curve's last entry")
    if metadata["reached"] != (metadata["accuracy"] > metadata["threshold"]):
        found.append("reached is not what accuracy and threshold say")
    for entry in metadata["curve"]:
        each = entry["val_accuracy_per_position"]
        if len(each) != metadata["length"]:
            found.append(f"step {entry['step']}: {len(each)} accuracies by position")
        elif abs(sum(each) / len(each) - entry["val_accuracy"]) > 1e-9:
            found.append(f"step {entry['step']}: accuracy is not its positions' mean")
    return found


def run_lcde_A5_experiment(
    config: LCDEA5Config, *, seed: int, hooks: Hooks
) -> list[ExperimentResult]:
    """A run for each length of ``config``; those the log already holds are left out.

    The checkpoints of a run are removed once its record is kept.
    """
    results = []
    for length in config.lengths:
        options = options_of(config, length, seed)
        values = dataclasses.asdict(options)
        if hooks.done(NAME, values):
            continue
        name = f"{NAME}_{options.group}_length{length}_seed{seed}"
        folder = hooks.checkpoints(name, values)
        results.append(hooks.keep(_hooked_run(hooks, folder), values))
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
    return results


def _hooked_run(hooks: Hooks, folder: Path | None) -> Callable[..., ExperimentResult]:
    """:func:`train` with the checkpoints and reports of a driver's run."""
    resume = hooks.resume and folder is not None and folder.exists()

    def run_here(options: A5Options) -> ExperimentResult:
        return train(options, folder, resume=resume, watch=hooks.watch)

    return run_here


def options_of(config: LCDEA5Config, length: int, seed: int) -> A5Options:
    """The options of one run. Raises InputError for sizes that are not A5's."""
    n_elements = group(A5Options.group).order
    for name in ("input_dim", "output_dim"):
        if (value := getattr(config, name)) != n_elements:
            raise bad_input(name, value, f"{n_elements}, the elements of A5", "mend it")
    return A5Options(
        length=length,
        hidden_dim=config.hidden_dim,
        structure=config.structure,
        block_size=config.block_size,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        num_steps=config.num_steps,
        eval_every=config.print_steps,
        threshold=config.threshold,
        samples=config.samples,
        train_split=config.train_split,
        precision=cast("Literal['float32', 'tensorfloat32']", config.precision),
        seed=seed,
    )


# --- pictures -------------------------------------------------------------------------


def draw(results: Sequence[ExperimentResult]) -> "Figure":
    """Validation accuracy against steps, and at the end against the position."""
    figure, axes = new_figure(1, 2)
    over_steps, over_positions = axes[0]
    for i, result in enumerate(results):
        meta, color = result.metadata, COLORS[i % len(COLORS)]
        curve, label = meta["curve"], f"length {meta['length']}"
        steps = [entry["step"] for entry in curve]
        values = [entry["val_accuracy"] for entry in curve]
        over_steps.plot(steps, values, color=color, label=label, marker="o")
        each = curve[-1]["val_accuracy_per_position"]
        places = range(1, len(each) + 1)
        over_positions.plot(places, each, color=color, label=label, marker="o")
    first = results[0].metadata
    over_steps.axhline(first["threshold"], color="grey", ls="--", label="threshold")
    for ax in axes[0]:
        ax.axhline(
            first["task"]["guess_accuracy"], color="grey", ls=":", label="guessing"
        )
        ax.set(ylabel="validation accuracy", ylim=(-0.03, 1.03))
        ax.legend()
    over_steps.set(xlabel="step")
    over_positions.set(xlabel="position, at the last step")
    over_positions.xaxis.get_major_locator().set_params(integer=True)
    sizes = {
        f"{r.metadata['structure']}, H = {r.metadata['hidden_dim']}" for r in results
    }
    figure.suptitle(f"{MODEL} on {first['group']}: {'; '.join(sorted(sizes))}")
    return figure


PICTURES = (Picture(draw, "outputs/lcde/a5.png"),)


# --- the command line -----------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the flags say; log the run, and draw it where asked.

    Exit status 1 if no evaluation was above the threshold.
    """
    own = parameters_of(run)
    outputs = [
        Parameter("save_plots", bool, False, "Draw the accuracy of this run."),
        Parameter(
            "results_dir",
            str,
            "outputs/lcde",
            f"Where pictures, {LOG} and checkpoints go.",
        ),
        Parameter(
            "log_path", str, "", f"The run log; {LOG} in the folder above by default."
        ),
        Parameter(
            "resume",
            bool,
            False,
            "Go on from the last checkpoint of this group, length and seed; without it "
            "the run starts anew and replaces them.",
        ),
        Parameter(
            "checkpoint_s", float, CHECKPOINT_S, "Least seconds between checkpoints."
        ),
    ]
    summary = (A5Options.__doc__ or "").partition("\n")[0]
    values = parse("python -m lcde.a5", summary, own + outputs, argv)
    kept = {each.name: values.pop(each.name) for each in outputs}
    with one_line_errors(), progress_shown():
        return _train_and_keep(values, **kept)


def _train_and_keep(
    values: Mapping[str, Any],
    *,
    save_plots: bool,
    results_dir: str,
    log_path: str,
    resume: bool,
    checkpoint_s: float,
) -> int:
    folder = Path(results_dir)
    name = "a5_{group}_length{length}_seed{seed}".format(**values)
    picture, log = folder / f"{name}.png", RunLog(log_path or folder / LOG)
    if notice := log.prepare():  # fail before the work, not after it
        _print_notice(notice)
    if save_plots:
        check_picture_path(picture)
    with meter("training") as show:
        watch = Watch(partial(_show_tick, show), _print_entry, _print_notice)

        def run_here(options: A5Options) -> ExperimentResult:
            return train(
                options,
                folder / "checkpoints" / name,
                resume=resume,
                watch=watch,
                checkpoint_s=checkpoint_s,
            )

        result, record = execute(run_here, dict(values))
    log.append(record)
    print(result.details)
    if save_plots:
        print(f"saved {save_figure(PICTURES[0].render([result]), picture)}")
    return 0 if result.passed else EXIT_FAILED_CLAIM


def _show_tick(show: Any, tick: Tick) -> None:
    show(tick.step, tick.steps, tick.text)


def _print_notice(line: str) -> None:
    print(f"note: {line}", file=sys.stderr)


def _print_entry(entry: Entry) -> None:
    print(
        "step {step:>7,} train loss {train_loss:.4f}   validation loss {val_loss:.4f} "
        "accuracy {val_accuracy:.4f}, at the last position {last:.4f}   "
        "{seconds:.0f} s".format(last=entry["val_accuracy_per_position"][-1], **entry),
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
