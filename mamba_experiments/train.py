"""Train one model on one dataset, with one seed.

    python -m mamba_experiments.train --model mamba_simple --dataset recall

``run`` trains and returns the curve. The command line adds what is kept of it: a line
in ``<plot_dir>/train_runs.jsonl``, checkpoints from which ``--resume`` goes on, plots.
Loops over models and seeds are the shell's, or those of ``experiments.run_and_log``
with ``--grid mamba_train.model=… mamba_train.seed=…``; ``mamba_experiments.cmds`` makes
figures and tables of their logs.

Over several processes: ``torchrun --nproc-per-node 2 -m mamba_experiments.train …``.
"""

import hashlib
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn
from torch.nn import functional

from data_dir.mqar import mqar_mixture
from data_dir.recall import recall
from data_dir.task import IGNORED, TokenTask
from data_dir.text import text_task
from experiments.common import (
    COLORS,
    ExperimentResult,
    Parameter,
    Picture,
    RunLog,
    bad_input,
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
from mamba_experiments.models import (
    build,
    build_config,
    count_parameters,
    matched_config,
)
from ssm.layers.moe import BALANCE
from ssm.models import SequenceLM
from ssm.ops import backends_used
from ssm.training import (
    Batch,
    Entry,
    Objective,
    Precision,
    Progress,
    Scores,
    Trainer,
    TrainingConfig,
    Watch,
    device_name,
    is_first_process,
    with_perplexity,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "mamba_train"
CLAIM = "a model's loss and accuracy over training; measured, not judged"
LOG = "train_runs.jsonl"
_PLACES = ("device", "data_dir")
MATCHED_TO = "mamba_simple"


@dataclass(frozen=True)
class TrainOptions:
    """Train one model on one dataset, with one seed.

    Args:
        model: mamba_simple, mamba_SSD_diag_exp, mamba_SSD_diag_selective, mamba2,
            mamba2_fixed_decay, s4d, rwkv, transformer or jamba
        dataset: recall, mqar, wikitext2 or python_docs
        seq_len: tokens a sequence
        gap: recall: least number of steps from the value to the query
        n_pairs: mqar: key-value pairs a sequence; equally many sequences of each number
        n_keys: mqar: different keys, and as many values
        max_vocab: text: words in the vocabulary, the rest being <unk>
        stride: text: words from one window to the next; 0 for the largest that gives
            as many windows as are asked for
        data_dir: text: a folder with the corpus as text files, instead of a download
        train_max_samples: sequences to train on
        val_max_samples: sequences to validate on
        objective: predict the last token or every token; auto is last, every for mqar
        d_model: width of the residual stream
        n_state: size of the state of each channel or head, where a model has one
        n_layers: blocks
        match_params: give the model as many parameters outside the embedding as
            mamba_simple has with the same flags
        dropout: of what each layer adds to the residual stream
        embedding_std: deviation of new embeddings; 0 for 1 on recall and mqar, where
            0.02 leaves some seeds at chance, and 0.02 on text
        epochs: passes over the training sequences
        batch_size: sequences an update, over all processes
        lr: learning rate of AdamW
        weight_decay: of matrices; A, D, dt, norms and biases are spared
        schedule: of the learning rate after the warm-up
        warmup: updates over which the learning rate rises
        grad_clip: largest norm of all gradients together; 0 for no limit
        precision: of matrix products
        compile: run through torch.compile
        cuda_graph: launch each step as one CUDA graph (one process on one GPU)
        device: auto, cpu, cuda or mps
        eval_every: updates between validations; 0 for once an epoch
        deterministic: PyTorch's deterministic algorithms (CUDA; a CPU always is)
        seed: of data, weights, batches and dropout, each a stream of its own
    """

    model: str = "mamba_simple"
    dataset: str = "recall"
    seq_len: int = 64
    gap: int = 8
    n_pairs: tuple[int, ...] = (1, 2, 4, 8)
    n_keys: int = 64
    max_vocab: int = 20_000
    stride: int = 0
    data_dir: str = ""
    train_max_samples: int = 10_000
    val_max_samples: int = 2_000
    objective: Literal["auto", "last", "every"] = "auto"
    d_model: int = 64
    n_state: int = 16
    n_layers: int = 2
    match_params: bool = False
    dropout: float = 0.0
    embedding_std: float = 0.0
    epochs: int = 5
    batch_size: int = 16
    lr: float = 3e-3
    weight_decay: float = 0.1
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    warmup: int = 50
    grad_clip: float = 1.0
    precision: Precision = "float32"
    compile: bool = False
    cuda_graph: bool = False
    device: str = "auto"
    eval_every: int = 0
    deterministic: bool = False
    seed: int = 0

    def training(self) -> TrainingConfig:
        """The part of these options that is the trainer's."""
        own = {field.name for field in fields(self)}
        names = [each.name for each in fields(TrainingConfig) if each.name in own]
        return TrainingConfig(**{name: getattr(self, name) for name in names})


# --- what is trained on what ----------------------------------------------------------


def _recall(options: TrainOptions) -> TokenTask:
    return recall(
        seq_len=options.seq_len,
        gap=options.gap,
        seed=options.seed,
        n_train=options.train_max_samples,
        n_val=options.val_max_samples,
    )


def _mqar(options: TrainOptions) -> TokenTask:
    return mqar_mixture(
        seq_len=options.seq_len,
        n_pairs=options.n_pairs,
        n_keys=options.n_keys,
        n_values=options.n_keys,
        seed=options.seed,
        n_train=options.train_max_samples,
        n_val=options.val_max_samples,
    )


def _text(options: TrainOptions) -> TokenTask:
    return text_task(
        options.dataset,
        seq_len=options.seq_len,
        max_vocab=options.max_vocab,
        stride=options.stride,
        objective="every" if options.objective == "every" else "last",
        train_max_samples=options.train_max_samples,
        val_max_samples=options.val_max_samples,
        data_dir=options.data_dir,
        seed=options.seed,
    )


@dataclass(frozen=True)
class Dataset:
    """How a dataset is made, its objectives, the deviation of its new embeddings.

    With a tied embedding that deviation also sets the size of the first logits: 1 is
    good for few tokens that must be told apart, and far too sure for 20,000 words.
    """

    make: Callable[[TrainOptions], TokenTask]
    objectives: tuple[str, ...]
    embedding_std: float


DATASETS: dict[str, Dataset] = {
    "recall": Dataset(_recall, ("last",), 1.0),
    "mqar": Dataset(_mqar, ("every",), 1.0),
    "wikitext2": Dataset(_text, ("last", "every"), 0.02),
    "python_docs": Dataset(_text, ("last", "every"), 0.02),
}


def make_task(options: TrainOptions) -> TokenTask:
    """The data that ``options`` name. Raises InputError."""
    names = ", ".join(DATASETS)
    if options.dataset not in DATASETS:
        raise bad_input("dataset", options.dataset, f"one of {names}", "choose one")
    dataset = DATASETS[options.dataset]
    if options.objective not in ("auto", *dataset.objectives):
        raise bad_input(
            "objective",
            options.objective,
            f"{' or '.join(dataset.objectives)} for {options.dataset}",
            "leave it out",
        )
    return dataset.make(options)


def make_model(options: TrainOptions, task: TokenTask) -> SequenceLM:
    """The model that ``options`` name, weights from the seed. Raises InputError."""
    sizes: dict[str, Any] = {
        "vocab_size": task.vocab_size,
        "d_model": options.d_model,
        "n_state": options.n_state,
        "n_layers": options.n_layers,
        "dropout": options.dropout,
        "embedding_std": options.embedding_std
        or DATASETS[options.dataset].embedding_std,
    }
    make = partial(matched_config, MATCHED_TO) if options.match_params else build_config
    return build(make(options.model, **sizes), seed=options.seed)


def token_objective(last_only: bool) -> Objective:
    """Cross entropy and accuracy of the next token, where there is one to predict."""

    def objective(model: nn.Module, batch: Batch) -> Scores:
        inputs, targets = batch
        out = model(inputs, last_only=last_only)
        wanted = targets[:, -1] if last_only else targets.flatten()
        logits = out.logits.float().reshape(len(wanted), -1)
        scored = wanted != IGNORED
        loss = functional.cross_entropy(
            logits, wanted, ignore_index=IGNORED, reduction="sum"
        )
        correct = ((logits.argmax(-1) == wanted) & scored).sum()
        penalty = BALANCE * out.auxiliary_loss
        return Scores(loss, scored.sum(), {"accuracy": correct}, penalty)

    return objective


# --- the run --------------------------------------------------------------------------


def run(options: TrainOptions) -> ExperimentResult:
    """Train one model on one dataset, with one seed; the curve is in the metadata."""
    return train(options, None, resume=False, watch=Watch())


def train(
    options: TrainOptions, folder: Path | None, *, resume: bool, watch: Watch
) -> ExperimentResult:
    """As :func:`run`, with checkpoints in ``folder``, from which ``resume`` goes on.

    Without ``resume`` those that are there are removed once all input is accepted.
    """
    task, config = make_task(options), options.training()
    model = make_model(options, task)
    trainer = Trainer(
        model,
        token_objective(task.last_only),
        config,
        folder=folder,
        settings=identity(options, task),
        on_step=watch.on_step,
        on_entry=lambda entry: watch.on_entry(with_perplexity(entry)),
        on_notice=watch.on_notice,
    )
    if folder and not resume and trainer.accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)  # all input has been accepted
    with backends_used() as backends:
        entries = trainer.fit(task.train, task.val, resume=resume)
        parts = {name: trainer.evaluate(part) for name, part in task.parts.items()}
    curve = [with_perplexity(entry) for entry in entries]
    best = min(curve, key=lambda entry: entry["val_loss"])
    found = count_parameters(model.config)
    counts = {"total": found.total, **found._asdict()}
    metadata = {
        "model": options.model,
        "dataset": options.dataset,
        "n_params": counts,
        "best": {k: best[k] for k in ("epoch", "step", "val_loss", "val_accuracy")},
        "curve": curve,
        "parts": parts,
        "task": task.metadata,
        "config": model.config.to_dict(),
        "backends": sorted(backends),
        "processes": trainer.accelerator.num_processes,
        "device": device_name(trainer.device),
    }
    details = (
        f"{options.model} on {options.dataset}, seed {options.seed}, "
        f"{counts['total']:,} parameters: best validation loss {best['val_loss']:.4f}, "
        f"accuracy {best['val_accuracy']:.2%}, at epoch {best['epoch']:g}"
    )
    return ExperimentResult(NAME, details, metadata)


def problems(metadata: dict[str, Any]) -> list[str]:
    """Where a record contradicts itself; how good a model is, nothing judges here."""
    found = []
    least = min(float(entry["val_loss"]) for entry in metadata["curve"])
    if float(metadata["best"]["val_loss"]) != least:
        found.append(f"best val_loss is not the least of the curve, {least}")
    counts = metadata["n_params"]
    if counts["total"] != counts["embedding"] + counts["rest"]:
        found.append("n_params: total is not embedding + rest")
    return found


def identity(options: TrainOptions, task: TokenTask) -> dict[str, Any]:
    """What a run is, wherever it runs and its data lie: the data by their hash."""
    flags = {k: v for k, v in asdict(options).items() if k not in _PLACES}
    digest = hashlib.sha256()
    for tensor in (*task.train, *task.val):
        digest.update(tensor.numpy().tobytes())
    return flags | {"data_sha256": digest.hexdigest()}


# --- pictures -------------------------------------------------------------------------


def draw(results: Sequence[ExperimentResult]) -> "Figure":
    """Loss and accuracy over the epochs, training beside validation."""
    figure, axes = new_figure(1, 2)
    for ax, kind in zip(axes[0], ("loss", "accuracy"), strict=True):
        for i, result in enumerate(results):
            curve = result.metadata["curve"]
            epochs = [entry["epoch"] for entry in curve]
            for split, color in zip(("train", "val"), COLORS, strict=False):
                values = [entry[f"{split}_{kind}"] for entry in curve]
                label = split if i == 0 else None
                ax.plot(epochs, values, color=color, label=label, marker="o")
        guess = results[0].metadata["task"].get("guess_accuracy")
        if kind == "accuracy" and guess is not None:
            ax.axhline(guess, color="grey", linestyle=":", label="guessing")
        ax.set(xlabel="epoch", ylabel=kind)
        ax.legend()
    shown = {f"{r.metadata['model']} on {r.metadata['dataset']}" for r in results}
    runs = f" ({len(results)} runs)" if len(results) > 1 else ""
    figure.suptitle(", ".join(sorted(shown)) + runs)
    return figure


PICTURES = (Picture(draw, "outputs/mamba_experiments/train.png"),)


# --- the command line -----------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the flags say; log the run, and draw it where asked."""
    own = parameters_of(run)
    outputs = [
        Parameter("save_plots", bool, False, "Draw loss and accuracy of this run."),
        Parameter(
            "plot_dir",
            str,
            "outputs/mamba_experiments",
            f"Where plots, {LOG} and checkpoints go.",
        ),
        Parameter(
            "log_path", str, "", f"The run log; {LOG} in the folder above by default."
        ),
        Parameter(
            "resume",
            bool,
            False,
            "Go on from the last checkpoint of this model, dataset and seed; without "
            "it the run starts anew and replaces them.",
        ),
    ]
    summary = (TrainOptions.__doc__ or "").partition("\n")[0]
    values = parse("python -m mamba_experiments.train", summary, own + outputs, argv)
    kept = {each.name: values.pop(each.name) for each in outputs}
    with one_line_errors(), progress_shown():
        return _train_and_keep(values, **kept)


def _train_and_keep(
    values: Mapping[str, Any],
    *,
    save_plots: bool,
    plot_dir: str,
    log_path: str,
    resume: bool,
) -> int:
    folder, first = Path(plot_dir), is_first_process()
    name = "{model}_{dataset}_seed{seed}".format(**values)
    picture, log = folder / f"{name}.png", RunLog(log_path or folder / LOG)
    checkpoints = folder / "checkpoints" / name
    if first:  # fail before the work, not after it
        if notice := log.prepare():
            _print_notice(notice)
        if save_plots:
            check_picture_path(picture)
    with meter("training") as show:
        watch = Watch(
            on_step=partial(_show_step, show, values["seq_len"]),
            on_entry=_print_entry if first else Watch.on_entry,
            on_notice=_print_notice if first else Watch.on_notice,
        )

        def run_here(options: TrainOptions) -> ExperimentResult:
            return train(options, checkpoints, resume=resume, watch=watch)

        result, record = execute(run_here, dict(values))
    if first:
        log.append(record)
        print(result.details)
        if save_plots:
            print(f"saved {save_figure(PICTURES[0].render([result]), picture)}")
    return 0


def _show_step(
    show: Callable[[int, int, str], None], length: int, at: Progress
) -> None:
    pace = at.examples_per_s * length
    show(at.step, at.steps, f"loss {at.loss:.3f}  {pace:,.0f} tokens/s")


def _print_notice(line: str) -> None:
    print(f"note: {line}", file=sys.stderr)


def _print_entry(entry: Entry) -> None:
    print(
        "epoch {epoch:<5g} train loss {train_loss:.4f} accuracy {train_accuracy:.4f}   "
        "validation loss {val_loss:.4f} accuracy {val_accuracy:.4f} perplexity "
        "{val_perplexity:.1f}   {seconds:.0f} s".format(**entry),
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
