"""Train document 3's two models, or others, side by side on WikiText-2.

    python -m scaling_experiments.train_lm --models MambaModel SmallTransformer

Document 3's task: GPT-2's tokens, the next one at every position, sequences of 128,
batches of 32, Adam at 3e-4, 3 epochs. Every model sees the same batches in the same
order. The level to beat is the cross entropy of the unigram, counted in the training
text, which needs no context at all; a loss below the validation text's own entropy no
predictor without context can have. The 5.5 nats that document 3 reports are of
WikiText-2's own training split, and are compared with nothing trained on less.

``run`` trains and returns the curves. The command line adds what is kept: a line in the
log, checkpoints from which ``--resume`` goes on, and the picture.
"""

import hashlib
import math
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from torch import nn

from data_dir.task import TokenTask
from experiments.common import (
    COLORS,
    ExperimentResult,
    Parameter,
    Picture,
    RunLog,
    bad_input,
    check_integer,
    check_nonempty,
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
from scaling_experiments._train_lm_data import load_tokenizer, wikitext2_task
from scaling_experiments._train_lm_models import NextToken, Sizes, build, check_name
from ssm.layers.moe import BALANCE
from ssm.ops import backends_used
from ssm.training import (
    Batch,
    Entry,
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
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAME = "train_lm"
CLAIM = "validation loss beside the unigram's cross-entropy; measured, not judged"
LOG = "train_lm_runs.jsonl"
SOURCE_LOSS = 5.5  # nats; document 3, after 3 epochs of the real training split
_PLACES = ("device", "data_dir", "tokenizer", "models")


@dataclass(frozen=True)
class TrainLMOptions:
    """Train language models side by side on WikiText-2, in GPT-2's tokens.

    Args:
        models: MambaModel, SmallTransformer, a pattern of ssm.models (mamba, mamba2,
            s4, s4d, s5, transformer, rwkv, jamba, striped_hyena), or signs of layers
            such as MMA+
        data_dir: a folder with WikiText-2 as text files, instead of a download; if it
            has valid and test alone, valid trains and test validates
        tokenizer: a name on the Hub or in the cache, or a folder with tokenizer.json
        seq_len: tokens a sequence
        batch_size: sequences an update, over all processes
        epochs: passes over the training sequences
        max_steps: end after so many updates, whatever epochs says, with as many passes
            as it takes; 0 for epochs
        lr: learning rate of Adam
        d_model: width of models made from a pattern; document 3's two have their own
        n_layers: blocks of models made from a pattern
        val_max_samples: sequences to validate on, spread over the text; 0 for all
        eval_every: updates between validations; 0 for once an epoch
        device: auto, cpu, cuda or mps
        seed: of weights and batches, each a stream of its own
    """

    models: tuple[str, ...] = ("MambaModel", "SmallTransformer")
    data_dir: str = ""
    tokenizer: str = "gpt2"
    seq_len: int = 128
    batch_size: int = 32
    epochs: int = 3
    max_steps: int = 0
    lr: float = 3e-4
    d_model: int = 128
    n_layers: int = 2
    val_max_samples: int = 0
    eval_every: int = 0
    device: str = "auto"
    seed: int = 0

    def training(self, n_train: int) -> TrainingConfig:
        """The trainer's part; Adam is AdamW without decay."""
        epochs = self.epochs
        if self.max_steps:
            a_pass = max(1, n_train // max(1, self.batch_size))
            epochs = math.ceil(self.max_steps / a_pass)
        return TrainingConfig(
            epochs=epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            grad_clip=0.0,
            device=self.device,
            eval_every=self.eval_every,
            seed=self.seed,
        )


# --- the run --------------------------------------------------------------------------

WatchOf = Callable[[str], Watch]


def run(options: TrainLMOptions) -> ExperimentResult:
    """Train language models side by side; their curves are in the metadata."""
    return train(options, None, resume=False, watch_of=lambda _: Watch())


def train(
    options: TrainLMOptions, folder: Path | None, *, resume: bool, watch_of: WatchOf
) -> ExperimentResult:
    """As :func:`run`, with checkpoints of each model in a folder of its own.

    ``resume`` goes on from them; without it they are removed, once all input is
    accepted. watch_of: who is told of the training of the model so called.
    """
    _check(options)
    task = wikitext2_task(
        load_tokenizer(options.tokenizer),
        seq_len=options.seq_len,
        val_max_samples=options.val_max_samples,
        data_dir=options.data_dir,
    )
    sizes = Sizes(task.vocab_size, options.d_model, options.n_layers)
    for name in options.models:  # all input is accepted before the first is trained
        build(name, sizes, seed=options.seed)
    found = {}
    for name in options.models:
        model = build(name, sizes, seed=options.seed)
        place = folder and folder / quote(name, safe="")
        found[name] = _train_one(
            model, name, task, options, place, resume=resume, watch=watch_of(name)
        )
    unigram = task.metadata["unigram_loss"]
    metadata = {
        "models": found,
        "task": task.metadata,
        "unigram_loss": unigram,
        "val_entropy": task.metadata["val_entropy"],
        "below_unigram": {k: v["best"]["val_loss"] < unigram for k, v in found.items()},
        "source": {
            "loss": SOURCE_LOSS,
            "comparable": trained_as_the_source(task.metadata),
        },
        "device": found[options.models[0]]["device"],
    }
    return ExperimentResult(NAME, _details(metadata), metadata)


def _check(options: TrainLMOptions) -> None:
    check_nonempty("models", options.models, "models = MambaModel")
    check_integer("max_steps", options.max_steps, at_least=0, example=1767)
    for name in options.models:
        check_name(name)
    if len(set(options.models)) < len(options.models):
        got = " ".join(options.models)
        raise bad_input("models", got, "each name once", "leave out what is repeated")


def _train_one(
    model: NextToken,
    name: str,
    task: TokenTask,
    options: TrainLMOptions,
    folder: Path | None,
    *,
    resume: bool,
    watch: Watch,
) -> dict[str, Any]:
    """The curve of one model, and facts about it."""
    trainer = Trainer(
        model,
        objective,
        options.training(len(task.train.inputs)),
        folder=folder,
        settings=identity(name, options, task),
        max_steps=options.max_steps,
        on_step=watch.on_step,
        on_entry=lambda entry: watch.on_entry(with_perplexity(entry)),
        on_notice=watch.on_notice,
    )
    if folder and not resume and trainer.accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
    with backends_used() as backends:
        entries = trainer.fit(task.train, task.val, resume=resume)
    curve = [with_perplexity(entry) for entry in entries]
    best = min(curve, key=lambda entry: entry["val_loss"])
    return {
        "n_params": model.num_parameters(),
        "best": {key: best[key] for key in ("epoch", "step", "val_loss")},
        "last": {key: curve[-1][key] for key in ("epoch", "step", "val_loss")},
        "curve": curve,
        "backends": sorted(backends),
        "processes": trainer.accelerator.num_processes,
        "device": device_name(trainer.device),
    }


def objective(model: nn.Module, batch: Batch) -> Scores:
    """Cross entropy of the next token at every position; experts are kept balanced."""
    loss, balance = model(*batch)
    scored = loss.new_full((), batch[1].numel())
    return Scores(loss, scored, {}, None if balance is None else BALANCE * balance)


def identity(name: str, options: TrainLMOptions, task: TokenTask) -> dict[str, Any]:
    """What the training of one model is, wherever it runs: the data by their hash."""
    flags = {k: v for k, v in asdict(options).items() if k not in _PLACES}
    digest = hashlib.sha256()
    for tensor in (*task.train, *task.val):
        digest.update(tensor.numpy().tobytes())
    return flags | {"model": name, "data_sha256": digest.hexdigest()}


def trained_as_the_source(task: Mapping[str, Any]) -> bool:
    """Whether it was WikiText-2's own training split, as document 3's."""
    return task["corpus"]["splits"]["train"] == "train"


def _details(metadata: dict[str, Any]) -> str:
    """The best losses beside the unigram's, and which split did what."""
    each = ", ".join(
        f"{name} {found['best']['val_loss']:.4f} at step {found['best']['step']}"
        for name, found in metadata["models"].items()
    )
    splits = metadata["task"]["corpus"]["splits"]
    return (
        f"best validation loss {each}; unigram {metadata['unigram_loss']:.4f} "
        f"({splits['train']} trains, {splits['val']} validates)"
    )


def problems(metadata: dict[str, Any]) -> list[str]:
    """Where a record contradicts itself; how good a model is, nothing judges here."""
    found = []
    for name, model in metadata["models"].items():
        least = min(float(entry["val_loss"]) for entry in model["curve"])
        if float(model["best"]["val_loss"]) != least:
            found.append(f"{name}: best val_loss is not the least of the curve")
        if metadata["below_unigram"][name] != (least < metadata["unigram_loss"]):
            found.append(f"{name}: below_unigram is not what its curve says")
    return found


# --- the picture ----------------------------------------------------------------------

_ABSCISSAE = {"step": "updates", "seconds": "time, validations included (s)"}


def draw(results: Sequence[ExperimentResult]) -> "Figure":
    """Validation and training loss of each model, against updates and against time."""
    metadata = results[0].metadata
    figure, axes = new_figure(1, 2)
    for ax, (key, label) in zip(axes[0], _ABSCISSAE.items(), strict=True):
        for result in results:
            for i, (name, found) in enumerate(result.metadata["models"].items()):
                color = COLORS[i % len(COLORS)]
                _draw_model(ax, key, found["curve"], name, color)
        for loss, text, style in levels(metadata):
            ax.axhline(loss, color="0.35", linestyle=style, linewidth=1.2, label=text)
        ax.set(xlabel=label, ylabel="cross entropy (nats a token)")
    handles = dict(zip(*axes[0, 0].get_legend_handles_labels()[::-1], strict=True))
    # Each name once, repeats or not.
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3)
    figure.suptitle(_title(metadata))
    return figure


def _draw_model(
    ax: "Axes", key: str, curve: list[Entry], name: str, color: str
) -> None:
    x = [entry[key] for entry in curve]
    val, train = ([entry[f"{part}_loss"] for entry in curve] for part in _PARTS)
    marker = "o" if len(curve) < 10 else None
    ax.plot(x, val, color=color, marker=marker, label=f"{name}, validation")
    ax.plot(x, train, color=color, linestyle="--", alpha=0.6, label=f"{name}, training")


_PARTS = ("val", "train")


def levels(metadata: dict[str, Any]) -> list[tuple[float, str, Any]]:
    """What losses are compared with: level, name, line style.

    Document 3's loss is one of them only where its training split was trained on.
    """
    unigram, source = metadata["unigram_loss"], metadata["source"]
    least = metadata["val_entropy"]
    found: list[tuple[float, str, Any]] = [
        (unigram, f"unigram of the training text: {unigram:.3f}", ":"),
        (least, f"least without context: {least:.3f}", "-."),
    ]
    if source["comparable"]:
        found.append((source["loss"], f"document 3: {source['loss']}", (0, (5, 1))))
    return found


def _title(metadata: dict[str, Any]) -> str:
    losses = ", ".join(
        f"{name} {found['best']['val_loss']:.2f}"
        for name, found in metadata["models"].items()
    )
    splits = metadata["task"]["corpus"]["splits"]
    return (
        f"best validation loss: {losses}; unigram "
        f"{metadata['unigram_loss']:.2f}\n(WikiText-2 in GPT-2's tokens, "
        f"{splits['train']} trains, {splits['val']} validates)"
    )


PICTURES = (Picture(draw, "outputs/train_lm.png"),)


# --- the command line -----------------------------------------------------------------

_OUTPUTS = (
    Parameter("plot", bool, True, "Draw the curves."),
    Parameter("plot_path", str, PICTURES[0].path, "Where the picture goes."),
    Parameter("out_dir", str, "outputs/train_lm", f"Where {LOG} and checkpoints go."),
    Parameter(
        "log_path", str, "", f"The run log; {LOG} in the folder above by default."
    ),
    Parameter(
        "resume",
        bool,
        False,
        "Go on from the last checkpoints of these models and this seed; without it "
        "the run starts anew and replaces them.",
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the flags say; log the run, and draw it."""
    summary = (TrainLMOptions.__doc__ or "").partition("\n")[0]
    parameters = [*parameters_of(run), *_OUTPUTS]
    values = parse("python -m scaling_experiments.train_lm", summary, parameters, argv)
    kept = {each.name: values.pop(each.name) for each in _OUTPUTS}
    with one_line_errors(), progress_shown():
        return _train_and_keep(values, **kept)


def _train_and_keep(
    values: dict[str, Any],
    *,
    plot: bool,
    plot_path: str,
    out_dir: str,
    log_path: str,
    resume: bool,
) -> int:
    folder, first = Path(out_dir), is_first_process()
    log = RunLog(log_path or folder / LOG)
    if first:  # fail before the work, not after it
        if notice := log.prepare():
            _print_notice(notice)
        if plot:
            check_picture_path(plot_path)
    place = folder / "checkpoints" / f"seed{values['seed']}"
    with meter("training") as show:

        def watch_of(name: str) -> Watch:
            return _watch(name, show, values["seq_len"], first=first)

        def run_here(options: TrainLMOptions) -> ExperimentResult:
            return train(options, place, resume=resume, watch_of=watch_of)

        result, record = execute(run_here, values)
    if first:
        log.append(record)
        print(result.details)
        if plot:
            print(f"saved {save_figure(PICTURES[0].render([result]), plot_path)}")
    return 0


def _watch(
    name: str, show: Callable[[int, int, str], None], length: int, *, first: bool
) -> Watch:
    """The bar, and in the first process a line for each validation of ``name``."""

    def on_step(at: Progress) -> None:
        pace = at.examples_per_s * length
        show(at.step, at.steps, f"{name} loss {at.loss:.3f}  {pace:,.0f} tokens/s")

    def on_entry(entry: Entry) -> None:
        print(f"{name:<17} {_ENTRY.format(**entry)}", flush=True)

    if not first:
        return Watch(on_step)
    return Watch(on_step, on_entry, _print_notice)


_ENTRY = (
    "step {step:<5} epoch {epoch:<5.3g} train loss {train_loss:.4f}   validation loss "
    "{val_loss:.4f} perplexity {val_perplexity:.1f}   {seconds:.0f} s"
)


def _print_notice(line: str) -> None:
    print(f"note: {line}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
