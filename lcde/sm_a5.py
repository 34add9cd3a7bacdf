"""Sequence models on words in A5: how many blocks a length needs.

    python -m lcde.sm_a5 --model RNN --length 8 --depth 1

Figure 2 of document 2: an RNN tracks the state of words of any length with one block;
S4, Mamba and Transformers need more blocks the longer the words are. ``run`` trains one
model of one depth on words of one length with one seed; the published settings are the
defaults. Each step adds the gradient of a batch of words of length 2.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from torch.nn import functional

from data_dir.word_problem import FOLDER, SAMPLES, WordTask, load_words
from experiments.common import (
    COLORS,
    ExperimentResult,
    Picture,
    bad_input,
    new_figure,
)
from lcde._sequence_model import SequenceModelConfig
from lcde._sm_runs import Command, Job, as_rows, fit, keep, main_of
from lcde._watch import Hooks, Watch
from lcde.config import SMA5Config
from ssm.training import (
    Batch,
    Entry,
    Precision,
    Scores,
    TrainingConfig,
    stream_seed,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "sm_a5"
CLAIM = "a sequence model's accuracy on running products in A5; measured, not judged"
_PLACE = "accuracy_at_"
_EVAL_BATCH = 1_024  # words scored at once, where no gradients need memory


@dataclass(frozen=True)
class SMA5Options:
    """Train one sequence model on words of one length, with one seed.

    Args:
        model: Transformer, Mamba, RNN, S4, S5, or a whole layer of ssm: S4Full, S4D,
            MambaBlock, Mamba2, GRU, RWKV or Hyena
        length: elements in a word
        depth: blocks
        hidden_dim: channels
        state_dim: states a channel; heads of a Transformer
        dropout: behind every layer and every activation
        batch_size: words a step, and as many of length 2
        learning_rate: of AdamW
        weight_decay: of every parameter, as published
        decay_all: else A, D, dt, norms and biases are spared
        num_epochs: passes over the training words
        max_steps: most steps, 0 for as many as the epochs have
        eval_every: steps between validations; each epoch ends with one, too
        threshold: validation accuracy above which the run ends
        samples: words, training and validation together, as published a million
        train_split: share of the words that is trained on
        group: of the elements; a product of S, A and Z groups such as S3xZ2
        data_dir: the folder of the words, generated where it has none
        device: auto, cpu, cuda or mps
        precision: of matrix products
        compile: run through torch.compile
        cuda_graph: launch each step as one CUDA graph (one process on one GPU)
        seed: of weights, batches, dropout and the split
    """

    model: str = "RNN"
    length: int = 3
    depth: int = 1
    hidden_dim: int = 1024
    state_dim: int = 64
    dropout: float = 0.1
    batch_size: int = 32
    learning_rate: float = 2e-4
    weight_decay: float = 0.01
    decay_all: bool = True
    num_epochs: int = 40
    max_steps: int = 0
    eval_every: int = 10_000
    threshold: float = 0.9
    samples: int = SAMPLES
    train_split: float = 0.8
    group: str = "A5"
    data_dir: str = FOLDER
    device: str = "auto"
    precision: Precision = "float32"
    compile: bool = False
    cuda_graph: bool = False
    seed: int = 2345

    def architecture(self, n_elements: int) -> SequenceModelConfig:
        """The model: a table of elements, GLU, LayerNorm, logits at every position."""
        return SequenceModelConfig(
            input_dim=n_elements,
            output_dim=n_elements,
            hidden_dim=self.hidden_dim,
            state_dim=self.state_dim,
            depth=self.depth,
            model_name=self.model,
            continuous_output=True,
            embedding=True,
            use_layernorm=True,
            dropout=self.dropout,
        )

    def training(self) -> TrainingConfig:
        """AdamW at a constant rate, gradients as they come."""
        return TrainingConfig(
            epochs=self.num_epochs,
            batch_size=self.batch_size,
            lr=self.learning_rate,
            weight_decay=self.weight_decay,
            decay_all=self.decay_all,
            grad_clip=0.0,
            device=self.device,
            precision=self.precision,
            compile=self.compile,
            cuda_graph=self.cuda_graph,
            eval_every=self.eval_every,
            eval_batch_size=_EVAL_BATCH,
            seed=self.seed,
        )

    def words(self, length: int) -> WordTask:
        """The words of some length, split by a stream of this seed."""
        return load_words(
            length,
            group=self.group,
            samples=self.samples,
            folder=self.data_dir,
            train_split=self.train_split,
            seed=stream_seed(self.seed, f"words {length}"),
        )


def token_accuracy(model: nn.Module, batch: Batch) -> Scores:
    """Cross entropy and accuracy of every position of (B, L) words.

    In evaluation the accuracy of each position t, too, as "accuracy_at_t".
    """
    words, products = batch
    return _scored(model(words), products, each=not model.training)


def _scored(logits: Tensor, products: Tensor, *, each: bool) -> Scores:
    """Sums over all positions; with ``each``, accuracies of single ones, too."""
    logits = logits.float()
    loss = functional.cross_entropy(
        logits.flatten(0, 1), products.flatten(), reduction="sum"
    )
    correct = logits.argmax(-1) == products
    sums = {"accuracy": correct.sum()}
    if each:
        L = products.shape[1]  # a position is scored once in L
        at = L * correct.sum(0)
        sums |= {f"{_PLACE}{t}": at[t] for t in range(L)}
    scored = loss.new_full((), correct.numel())  # no copy: a CUDA graph holds none
    return Scores(loss, scored, sums)


def token_accuracies(model: nn.Module, parts: Sequence[Batch]) -> list[Scores]:
    """:func:`token_accuracy` of parts with words of different lengths, by one call."""
    logits = model(*(words for words, _ in parts))
    return [
        _scored(of_part, products, each=False)
        for of_part, (_, products) in zip(logits, parts, strict=True)
    ]


def told(entry: Entry) -> dict[str, Any]:
    """An entry of the curve, with the accuracies of all positions in one list."""
    prefix = f"val_{_PLACE}"
    kept = {k: v for k, v in entry.items() if not k.startswith(prefix)}
    L = len(entry) - len(kept)
    return {
        **kept,
        "val_accuracy_per_position": [entry[f"{prefix}{t}"] for t in range(L)],
    }


def run(options: SMA5Options) -> ExperimentResult:
    """Train one sequence model on words of one length; the curve is in the metadata."""
    return train(options, None, resume=False, watch=Watch())


def train(
    options: SMA5Options, folder: Path | None, *, resume: bool, watch: Watch
) -> ExperimentResult:
    """As :func:`run`, with checkpoints in ``folder``, from which ``resume`` goes on."""
    check(options)
    training, task = options.training(), options.words(options.length)
    job = Job(
        model=options.architecture(task.n_elements),
        objective=token_accuracy,
        training=training,
        train=as_rows(task.train),
        val=as_rows(task.val),
        told=told,
        auxiliary=as_rows(options.words(2).train),
        max_steps=options.max_steps,
        stop=lambda entry: entry["val_accuracy"] > options.threshold,
        together=token_accuracies,
    )
    curve, facts = fit(job, options, folder, resume=resume, watch=watch)
    return _result(options, task, curve, facts)


def check(options: SMA5Options) -> None:
    """Raise InputError for what neither data, model nor trainer would refuse."""
    if not 0 < options.threshold <= 1:
        raise bad_input("threshold", options.threshold, "above 0, at most 1", "try 0.9")
    if not 0 < options.train_split < 1:
        mend = "try 0.8, so that some words are left to validate"
        raise bad_input("train_split", options.train_split, "above 0, below 1", mend)


def _result(
    options: SMA5Options,
    task: WordTask,
    curve: list[dict[str, Any]],
    facts: dict[str, Any],
) -> ExperimentResult:
    accuracy = curve[-1]["val_accuracy"]
    shown = ("model", "length", "depth", "hidden_dim", "state_dim", "threshold")
    metadata = {name: getattr(options, name) for name in shown}
    reached = accuracy > options.threshold
    metadata |= {"accuracy": accuracy, "reached": reached, "curve": curve}
    metadata |= {"group": task.group, "task": task.metadata, **facts}
    passed = "above" if reached else "not above"
    details = (
        f"{options.model} on {options.group}, length {options.length}, depth "
        f"{options.depth}, seed {options.seed}: validation accuracy {accuracy:.2%} "
        f"after {facts['steps']:,} steps, {passed} {options.threshold:.0%}"
    )
    return ExperimentResult(NAME, details, metadata)


def problems(metadata: dict[str, Any]) -> list[str]:
    """Where a record contradicts itself; how good a model is, nothing judges here."""
    found, last = [], metadata["curve"][-1]
    if metadata["accuracy"] != last["val_accuracy"]:
        found.append(f"accuracy is not the last of the curve, {last['val_accuracy']}")
    if metadata["reached"] != (metadata["accuracy"] > metadata["threshold"]):
        found.append("reached is not whether accuracy is above the threshold")
    for entry in metadata["curve"]:
        places = entry["val_accuracy_per_position"]
        if abs(sum(places) / len(places) - entry["val_accuracy"]) > 1e-6:
            found.append(f"step {entry['step']}: positions do not average to accuracy")
    return found


def draw(results: Sequence[ExperimentResult]) -> "Figure":
    """Validation accuracy against the step, and at the end against the position."""
    figure, axes = new_figure(1, 2)
    over_steps, over_places = axes[0]
    for i, result in enumerate(results):
        meta, color = result.metadata, COLORS[i % len(COLORS)]
        label = f"{meta['model']}, length {meta['length']}, depth {meta['depth']}"
        points = [(entry["step"], entry["val_accuracy"]) for entry in meta["curve"]]
        over_steps.plot(*zip(*points, strict=True), marker="o", color=color)
        places = meta["curve"][-1]["val_accuracy_per_position"]
        positions = range(1, len(places) + 1)
        over_places.plot(positions, places, marker="o", color=color, label=label)
    for threshold in {result.metadata["threshold"] for result in results}:
        over_steps.axhline(threshold, color="grey", linestyle=":")
    over_steps.set(xlabel="step", ylabel="validation accuracy", ylim=(0, 1.02))
    over_places.set(xlabel="position", ylabel="validation accuracy", ylim=(0, 1.02))
    over_places.legend()
    return figure


PICTURES = (Picture(draw, "outputs/lcde/sm_a5.png"),)


def run_name(options: SMA5Options) -> str:
    """What a run, its checkpoints and its picture are called."""
    return (
        f"{NAME}_{options.model}_length{options.length}_depth{options.depth}_"
        f"hidden{options.hidden_dim}_seed{options.seed}"
    )


def run_sm_A5_experiment(
    config: SMA5Config, *, seed: int, hooks: Hooks
) -> list[ExperimentResult]:
    """For each model and length, the depths of ``config`` until one passes.

    Depths are tried in increasing order, lengths too, and a depth that failed at a
    shorter length is not tried at a longer one.
    """
    results = []
    for name in config.model_names:
        depths = sorted(config.depths)
        for length in sorted(config.lengths):
            while depths:
                options = _options(config, name, length, depths[0], seed)
                result = keep(train, run_name(options), options, hooks)
                results.append(result)
                if result.metadata["reached"]:
                    break
                del depths[0]
    return results


def _options(
    config: SMA5Config, model: str, length: int, depth: int, seed: int
) -> SMA5Options:
    return SMA5Options(
        model=model,
        length=length,
        depth=depth,
        hidden_dim=config.hidden_dim,
        state_dim=config.state_dim,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        num_epochs=config.num_epochs,
        max_steps=config.max_steps,
        eval_every=config.eval_every,
        precision=cast("Precision", config.precision),
        compile=config.compile,
        cuda_graph=config.cuda_graph,
        threshold=config.threshold,
        samples=config.samples,
        seed=seed,
    )


def line(entry: Mapping[str, Any]) -> str:
    """An entry as the command line prints it."""
    return (
        "step {step:<8} train loss {train_loss:.4f} accuracy {train_accuracy:.4f}   "
        "validation loss {val_loss:.4f} accuracy {val_accuracy:.4f}   {seconds:.0f} s"
    ).format(**entry)


COMMAND = Command("lcde.sm_a5", SMA5Options, run, train, run_name, line, PICTURES[0])


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the flags say; log the run, and draw it where asked."""
    return main_of(COMMAND, argv)


if __name__ == "__main__":
    sys.exit(main())
