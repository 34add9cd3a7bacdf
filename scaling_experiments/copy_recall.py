"""What must be kept against what can be: copying, recall and a needle in noise.

    python -m scaling_experiments.copy_recall                     # minutes on a CPU
    python -m scaling_experiments.copy_recall --task recall --models ssm:8 --seeds 2

Attention keeps every token; the state of an SSM is of one size, whatever was read. So
at equal parameters and equal training attention copies every length that it is trained
on, an SSM up to a length that grows with its state, and an SSM with one layer of
attention does what attention does. The needle is the counter-example: one token is
little to keep, and an SSM finds it with a small state.

Models are two blocks without feed-forward layers, with a tied embedding; their width is
set so that each has ``n_params`` parameters (within 5 %). ``ssm:N`` is Mamba-2 with N
states a channel, ``hybrid:N`` one such block below one of attention, ``lti:N`` is S4D
with a gate, whose recurrence does not change with the input. One model learns all
lengths at once, from sequences that are never repeated, and is scored at each length on
others: the share of right answers, each given the right answers before it. Of several
learning rates that with the least loss on a third set of sequences counts, for each
model and seed.

Each training is a cell: one model, one learning rate, one seed. Every cell is a record
of the log; cells that are there are not trained again, and the picture is of all cells
in the log with equal settings. So a large grid is any number of such commands, at once
or one after the other, with one ``--log-path``, and ``--plot-only`` at the end.

What this does not show: a bound. The numbers of a state hold more bits than an SSM here
fails to keep (both are in the picture); it is what training finds in so many steps.

After Jelassi et al., "Repeat After Me: Transformers are Better than State Space Models
at Copying" (arXiv:2402.01032), section 4.
"""

import sys
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from data_dir.task import IGNORED
from experiments._cli import nearest
from experiments.common import (
    COLORS,
    EXIT_FAILED_CLAIM,
    MARKERS,
    SEQUENTIAL,
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
    to_json,
    track,
)
from scaling_experiments._tasks import (
    Mixture,
    check_lengths,
    describe,
    find_task,
    mixture,
)
from ssm.models import SequenceLM, SequenceLMConfig
from ssm.ops import backends_used
from ssm.training import (
    Batch,
    Progress,
    Scores,
    Trainer,
    TrainingConfig,
    device_name,
    stream_seed,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAME = "copy_recall"
CLAIM = "attention and a hybrid keep long sequences; a state of fixed size does not"
LOG = f"outputs/{NAME}_runs.jsonl"
HIGH, LOW = 0.95, 0.80  # accuracies that the claim names
GAIN, SLACK = 0.10, 0.03  # what more state must bring in all, and may lose at a step
PARAMETER_TOLERANCE = 0.05
LARGEST_WIDTH = 4096
N_LAYERS = 2
EVALUATIONS = 5
JUDGED = ("copy", "recall")  # the needle is measured: an SSM finds it, too
Cell = dict[str, Any]


@dataclass(frozen=True)
class CopyRecallOptions:
    """Train models on copying, recall or a needle; accuracy against length.

    Judged on copying and recall where the cells suffice: attention and hybrid at least
    95 % at the longest length, where the SSM with the least state is at most 80 %;
    every SSM at least 95 % at the shortest; and more state brings it nearer.

    Args:
        task: copy, recall or needle
        models: attention, hybrid:N, ssm:N and lti:N, with N states a channel
        seeds: of weights, data and their order; each is a training of its own
        lrs: learning rates of AdamW; the best on held-out sequences counts
        lengths: tokens to copy, pairs to recall or tokens of noise, all in one training
        vocab: different tokens, and for recall as many values again
        n_params: parameters of every model, embedding included
        steps: updates
        batch_size: sequences an update
        n_test: sequences of each length to score, and as many to choose a rate by
        device: auto, cpu, cuda or mps
    """

    task: str = "copy"
    models: tuple[str, ...] = ("attention", "hybrid:8", "ssm:8", "ssm:32")
    seeds: tuple[int, ...] = (0,)
    lrs: tuple[float, ...] = (1e-2,)
    lengths: tuple[int, ...] = (4, 8, 20)
    vocab: int = 64
    n_params: int = 60_000
    steps: int = 800
    batch_size: int = 64
    n_test: int = 256
    device: str = "auto"

    def cells(self) -> list["CopyRecallOptions"]:
        """One of these for each training."""
        return [
            replace(self, models=(model,), lrs=(lr,), seeds=(seed,))
            for seed in self.seeds
            for model in self.models
            for lr in self.lrs
        ]


_VARIED = (
    "models",
    "seeds",
    "lrs",
    "device",
)  # what cells of one picture may differ in


# --- models ---------------------------------------------------------------------------


def _mamba2(d_model: int, N: int) -> dict[str, Any]:
    """Two heads at every width."""
    return {"mamba2": {"d_state": N, "expand": 2, "headdim": d_model}}


def _attention(d_model: int) -> dict[str, Any]:
    """Two heads with rotary positions, which need even heads."""
    d_head = 2 * max(1, round(d_model / 4))
    return {"attention": {"n_heads": 2, "d_head": d_head, "positions": "rotary"}}


class Kind(NamedTuple):
    """A kind of model: its pattern, the options of its layers, numbers in its state.

    ``state_numbers(d_model, N)`` is what it keeps besides keys and values, which grow,
    and the windows of short convolutions.
    """

    pattern: str
    mixer: Callable[[int, int], dict[str, Any]]
    state_numbers: Callable[[int, int], int]
    has_state: bool = True


KINDS: dict[str, Kind] = {
    "attention": Kind("AA", lambda d, _: _attention(d), lambda _d, _N: 0, False),
    "hybrid": Kind(
        "2A", lambda d, N: _mamba2(d, N) | _attention(d), lambda d, N: 2 * d * N
    ),
    "ssm": Kind("22", _mamba2, lambda d, N: N_LAYERS * 2 * d * N),
    "lti": Kind(
        "DD", lambda _, N: {"s4d": {"d_state": N}}, lambda d, N: N_LAYERS * d * N
    ),
}


def parse_model(name: str) -> tuple[Kind, str, int]:
    """The kind, its name and N of ``ssm:16``; N is 0 for attention. InputError."""
    head, colon, size = name.partition(":")
    forms = [f"{k}:N" if kind.has_state else k for k, kind in KINDS.items()]
    if head not in KINDS:
        near = nearest(head, KINDS)
        mend = f"did you mean {near}?" if near else "choose one of those"
        raise bad_input("models", name, ", ".join(forms), mend)
    kind = KINDS[head]
    whole = size.isascii() and size.isdigit() and int(size) > 0
    if bool(colon) != kind.has_state or (colon and not whole):
        form = forms[list(KINDS).index(head)]
        raise bad_input("models", name, form, f"try {form.replace('N', '16')}")
    return kind, head, int(size or 0)


def model_config(name: str, vocab_size: int, d_model: int) -> SequenceLMConfig:
    """The model ``name`` at this width. Embeddings of deviation 1 are told apart."""
    kind, _, N = parse_model(name)
    mixer = kind.mixer(d_model, N)
    return SequenceLMConfig(
        vocab_size,
        d_model,
        N_LAYERS,
        pattern=kind.pattern,
        mixer=mixer,
        embedding_std=1.0,
    )


def count_parameters(config: SequenceLMConfig) -> int:
    """How many numbers the model learns; it is never made."""
    return SequenceLM(config, device="meta").num_parameters()


def matched_config(name: str, vocab_size: int, n_params: int) -> SequenceLMConfig:
    """The model ``name`` at the even width whose parameters are nearest ``n_params``.

    Raises InputError where the nearest is off by more than 5 %.
    """

    def at(half_width: int) -> SequenceLMConfig:
        return model_config(name, vocab_size, 2 * half_width)

    def size(half_width: int) -> int:
        return count_parameters(at(half_width))

    above = 1 + bisect_left(range(1, LARGEST_WIDTH), n_params, key=size)
    found = min(
        range(max(1, above - 1), above + 1), key=lambda h: abs(size(h) - n_params)
    )
    if abs(size(found) - n_params) > PARAMETER_TOLERANCE * n_params:
        raise bad_input(
            "n_params",
            f"{n_params}, to which {name} comes no nearer than {size(found)}",
            "a number that every model meets within 5 %",
            "raise n_params or lower N",
        )
    return at(found)


def build(config: SequenceLMConfig, seed: int) -> SequenceLM:
    """The model, weights from the seed's stream "init"; drawn on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(stream_seed(seed, "init"))
        return SequenceLM(config, device="cpu")


# --- training -------------------------------------------------------------------------


def objective(model: nn.Module, batch: Batch) -> Scores:
    """Cross entropy and accuracy where an answer is asked for."""
    inputs, targets = (x.long() for x in batch)
    logits = model(inputs).logits.float().flatten(0, 1)
    wanted = targets.flatten()
    scored = wanted != IGNORED
    loss = functional.cross_entropy(
        logits, wanted, ignore_index=IGNORED, reduction="sum"
    )
    correct = ((logits.argmax(-1) == wanted) & scored).sum()
    return Scores(loss, scored.sum(), {"accuracy": correct})


def train_cell(
    options: CopyRecallOptions,
    data: Mixture,
    on_step: Callable[[Progress], None] = lambda _: None,
) -> Cell:
    """One training and its scores: one model, learning rate and seed of ``options``."""
    (name,), (lr,), (seed,) = options.models, options.lrs, options.seeds
    config = matched_config(name, data.vocab_size, options.n_params)
    training = TrainingConfig(
        epochs=1,  # every sequence is seen once
        batch_size=options.batch_size,
        lr=lr,
        weight_decay=0.1,
        schedule="cosine",
        warmup=min(50, options.steps // 10),
        eval_every=-(-options.steps // EVALUATIONS),
        device=options.device,
        seed=seed,
    )
    model = build(config, seed)
    trainer = Trainer(
        model, objective, training, max_steps=options.steps, on_step=on_step
    )
    with backends_used() as backends:
        curve = trainer.fit(data.train, data.val)
    scores = {
        str(L): trainer.evaluate(split)["accuracy"] for L, split in data.tests.items()
    }
    kind, head, N = parse_model(name)
    return {
        "model": name,
        "kind": head,
        "d_state": N,
        "lr": lr,
        "seed": seed,
        "n_params": model.num_parameters(),
        "d_model": config.d_model,
        "state_numbers": kind.state_numbers(config.d_model, N),
        "val_loss": curve[-1]["val_loss"],
        "accuracy": scores,
        "curve": curve,
        "backends": sorted(backends),
        "device": device_name(trainer.device),
    }


def check_options(options: CopyRecallOptions) -> None:
    """Raise InputError for what no cell could be trained with."""
    check_lengths(options.task, options.lengths, options.vocab)
    for flag, example in (("models", "ssm:16"), ("seeds", "0"), ("lrs", "0.01")):
        values = getattr(options, flag)
        check_nonempty(flag, values, f"{flag} = {example}")
        if len(set(values)) < len(values):
            raise bad_input(flag, values, "each value once", "leave out the second")
    for flag in ("steps", "batch_size", "n_test", "n_params"):
        check_integer(flag, getattr(options, flag), at_least=1, example=64)
    for seed in options.seeds:
        check_integer("seeds", seed, at_least=0, example=0)
    for lr in options.lrs:
        if not 0 < lr < 1:
            raise bad_input("lrs", lr, "learning rates between 0 and 1", "try 0.01")
    vocab_size = find_task(options.task).vocab_size(options.vocab)
    for name in options.models:
        matched_config(name, vocab_size, options.n_params)


def draw_data(options: CopyRecallOptions, seed: int) -> Mixture:
    """The sequences of a seed: as many to train on as the steps take."""
    return mixture(
        options.task,
        lengths=options.lengths,
        vocab=options.vocab,
        seed=seed,
        n_train=options.steps * options.batch_size,
        n_test=options.n_test,
    )


def run(options: CopyRecallOptions) -> ExperimentResult:
    """Train every cell; see :class:`CopyRecallOptions` for what is judged."""
    check_options(options)
    cells = [_train_shown(cell) for cell in track(options.cells(), "trainings")]
    return result_of(options, cells)


def _train_shown(cell: CopyRecallOptions) -> Cell:
    label = f"{cell.models[0]}, lr {cell.lrs[0]:g}, seed {cell.seeds[0]}"
    with meter(label) as show:

        def on_step(at: Progress) -> None:
            show(at.step, at.steps, f"loss {at.loss:.3f}")

        return train_cell(cell, draw_data(cell, cell.seeds[0]), on_step)


# --- what the cells say ---------------------------------------------------------------


def settings_of(params: dict[str, Any]) -> dict[str, Any]:
    """What cells of one picture share, as JSON values."""
    return {k: to_json(v) for k, v in params.items() if k not in _VARIED}


def result_of(options: CopyRecallOptions, cells: Sequence[Cell]) -> ExperimentResult:
    """The result of these cells, trained now or before, with the verdict on them."""
    metadata = {
        **settings_of(asdict(options)),
        **describe(options.task, options.lengths, options.vocab),
        "cells": list(cells),
    }
    if device := next((cell["device"] for cell in cells if cell["device"]), None):
        metadata["device"] = device
    broken = problems(metadata)
    passed = not broken if can_be_judged(metadata) else None
    return ExperimentResult(NAME, _details(metadata, broken), metadata, passed)


def chosen(cells: Iterable[Cell]) -> list[Cell]:
    """Of each model and seed the cell whose rate had the least validation loss."""
    best: dict[tuple[str, int], Cell] = {}
    for cell in cells:
        key = cell["model"], cell["seed"]
        if key not in best or cell["val_loss"] < best[key]["val_loss"]:
            best[key] = cell
    return sorted(best.values(), key=_place)


def _place(cell: Cell) -> tuple[int, int, int]:
    """Kinds in the order of :data:`KINDS`, states and seeds by size."""
    return list(KINDS).index(cell["kind"]), cell["d_state"], cell["seed"]


def by_model(metadata: dict[str, Any]) -> dict[str, list[Cell]]:
    """The chosen cells of each model, one a seed."""
    models: dict[str, list[Cell]] = {}
    for cell in chosen(metadata["cells"]):
        models.setdefault(cell["model"], []).append(cell)
    return models


def accuracies(cells: Sequence[Cell], length: int) -> list[float]:
    """Of each seed."""
    return [cell["accuracy"][str(length)] for cell in cells]


def _mean(cells: Sequence[Cell], length: int) -> float:
    return float(np.mean(accuracies(cells, length)))


def _of_kind(models: dict[str, list[Cell]], kind: str) -> dict[str, list[Cell]]:
    return {name: own for name, own in models.items() if own[0]["kind"] == kind}


def can_be_judged(metadata: dict[str, Any]) -> bool:
    """Whether attention, a hybrid and two SSMs are there, on a task of the claim."""
    models = by_model(metadata)
    least = {"attention": 1, "hybrid": 1, "ssm": 2}
    return metadata["task"] in JUDGED and all(
        len(_of_kind(models, kind)) >= n for kind, n in least.items()
    )


def problems(metadata: dict[str, Any]) -> list[str]:
    """The claims that a record breaks; each must hold for every seed."""
    if not can_be_judged(metadata):
        return []
    models = by_model(metadata)
    short, long = min(metadata["lengths"]), max(metadata["lengths"])
    ssms = _of_kind(models, "ssm")
    broken = []
    for name, cells in (
        _of_kind(models, "attention") | _of_kind(models, "hybrid")
    ).items():
        if (got := min(accuracies(cells, long))) < HIGH:
            broken.append(f"{name} >= {HIGH:.0%} at length {long}: it has {got:.1%}")
    for name, cells in ssms.items():
        if (got := min(accuracies(cells, short))) < HIGH:
            broken.append(f"{name} >= {HIGH:.0%} at length {short}: it has {got:.1%}")
    smallest = next(iter(ssms))
    if (got := max(accuracies(ssms[smallest], long))) > LOW:
        broken.append(f"{smallest} <= {LOW:.0%} at length {long}: it has {got:.1%}")
    return broken + _growth_problems(ssms, long)


def _growth_problems(ssms: dict[str, list[Cell]], length: int) -> list[str]:
    """Where more state does not bring an SSM nearer, in the mean over seeds."""
    names, means = list(ssms), [_mean(cells, length) for cells in ssms.values()]
    broken = [
        f"more state, more kept at length {length}: {names[i + 1]} has "
        f"{means[i + 1]:.1%}, {names[i]} {means[i]:.1%}"
        for i in range(len(means) - 1)
        if means[i + 1] < means[i] - SLACK
    ]
    if means[-1] < means[0] + GAIN:
        broken.append(
            f"{names[-1]} at least {GAIN:.0%} above {names[0]} at length {length}: "
            f"{means[-1]:.1%} and {means[0]:.1%}"
        )
    return broken


def _details(metadata: dict[str, Any], broken: Sequence[str]) -> str:
    if broken:
        return f"{len(broken)} claim(s) off; {broken[0]}"
    long = max(metadata["lengths"])
    scores = ", ".join(
        f"{name} {_mean(cells, long):.1%}" for name, cells in by_model(metadata).items()
    )
    seeds = len({cell["seed"] for cell in metadata["cells"]})
    return (
        f"{metadata['task']} at {long} {metadata['unit']} after {metadata['steps']} "
        f"steps, {seeds} seed(s): {scores}"
    )


def table(metadata: dict[str, Any]) -> list[list[str]]:
    """A row a model: parameters, state, rates chosen, accuracy at every length."""
    lengths = metadata["lengths"]
    head = ["model", "parameters", "state", "seeds", "lr", *map(str, lengths)]
    rows = [head]
    for name, cells in by_model(metadata).items():
        first = cells[0]
        rates = sorted({cell["lr"] for cell in cells})
        rows.append(
            [
                name,
                f"{first['n_params']:,}",
                f"{first['state_numbers']:,}" if first["state_numbers"] else "grows",
                str(len(cells)),
                " ".join(f"{lr:g}" for lr in rates),
                *(_range_text(accuracies(cells, L)) for L in lengths),
            ]
        )
    return rows


def _range_text(values: Sequence[float]) -> str:
    """Mean in per cent, with least and greatest where there are several."""
    text = f"{100 * float(np.mean(values)):.1f}"
    if len(values) > 1:
        text += f" ({100 * min(values):.1f}-{100 * max(values):.1f})"
    return text


# --- pictures -------------------------------------------------------------------------


def draw(results: Sequence[ExperimentResult]) -> "Figure":
    """Accuracy against length; the SSM's at the longest against the size of its state.

    Repeats (one result a seed, say) are drawn as one: their cells together.
    """
    cells = [cell for result in results for cell in result.metadata["cells"]]
    metadata = results[0].metadata | {"cells": cells}
    figure, axes = new_figure(1, 2)
    _draw_lengths(axes[0, 0], metadata)
    _draw_states(axes[0, 1], metadata)
    sizes = [cell["n_params"] for cell in chosen(cells)]
    seeds = len({cell["seed"] for cell in cells})
    figure.suptitle(
        f"{metadata['task']}, vocabulary {metadata['vocab']}: {min(sizes):,} to "
        f"{max(sizes):,} parameters, {metadata['steps']:,} steps, "
        f"{seeds} seed{'s' if seeds > 1 else ''} (bars: least and greatest)"
    )
    return figure


def _styles(models: dict[str, list[Cell]]) -> dict[str, dict[str, Any]]:
    """A colour a kind; state sizes of one kind from dark to light, each its marker."""
    import matplotlib as mpl

    styles = {}
    fixed = dict(zip(KINDS, (COLORS[6], COLORS[1], "", COLORS[3]), strict=True))
    for kind, color in fixed.items():
        own = list(_of_kind(models, kind))
        for i, name in enumerate(own):
            shade = mpl.colormaps[SEQUENTIAL](0.9 * i / max(1, len(own) - 1))
            marker = MARKERS[i % len(MARKERS)]
            line = {"ssm": "-", "hybrid": "-."}.get(kind, "--")
            styles[name] = {
                "color": color or shade,
                "marker": marker,
                "linestyle": line,
            }
    return styles


def _draw_lengths(ax: "Axes", metadata: dict[str, Any]) -> None:
    models, lengths = by_model(metadata), metadata["lengths"]
    for name, style in _styles(models).items():
        rows = [accuracies(models[name], L) for L in lengths]
        ax.errorbar(lengths, *_mean_and_bars(rows), capsize=2, label=name, **style)
    ax.axhline(metadata["guess_accuracy"], color="grey", linestyle=":", label="guess")
    ax.set(xscale="log", ylim=(-0.03, 1.05), xlabel=metadata["unit"])
    ax.set(ylabel="right answers", title="against the length, one model for all")
    ax.set_xticks(lengths, [str(L) for L in lengths])
    ax.set_xticks([], minor=True)
    ax.legend(loc="lower left")


def _draw_states(ax: "Axes", metadata: dict[str, Any]) -> None:
    models, long = by_model(metadata), max(metadata["lengths"])
    styles = _styles(models)
    for name, cells in models.items():
        if cells[0]["kind"] in ("attention", "hybrid"):
            style = {k: v for k, v in styles[name].items() if k != "marker"}
            ax.axhline(_mean(cells, long), label=name, **style)
    for kind in ("ssm", "lti"):
        own = _of_kind(models, kind)
        if not own:
            continue
        sizes = [cells[0]["state_numbers"] for cells in own.values()]
        rows = [accuracies(cells, long) for cells in own.values()]
        color = {"ssm": COLORS[0], "lti": COLORS[3]}[kind]
        ax.errorbar(
            sizes, *_mean_and_bars(rows), capsize=2, marker="o", color=color, label=kind
        )
    bits = metadata["content_bits"][str(long)]
    ax.axvline(bits, color="grey", linestyle=":", label=f"{bits:.0f} bits to keep")
    ax.set(xscale="log", ylim=(-0.03, 1.05), xlabel="numbers in the state")
    ax.set(
        ylabel="right answers", title=f"against the state, {long} {metadata['unit']}"
    )
    ax.legend(loc="best")


def _mean_and_bars(rows: Sequence[Sequence[float]]) -> tuple[Any, Any]:
    """The mean of each row, and how far its values reach below and above it."""
    mean, low, high = (
        np.array([reduce(row) for row in rows]) for reduce in (np.mean, min, max)
    )
    bars = np.array([mean - low, high - mean])
    return mean, np.maximum(bars, 0)  # rounding can put the mean of equals beside them


PICTURES = (Picture(draw, f"outputs/{NAME}.png"),)


# --- the command line -----------------------------------------------------------------


OUTPUTS = (
    Parameter("log_path", str, LOG, "The run log, one record a training."),
    Parameter("plot", bool, True, "Draw what the log has at these settings."),
    Parameter("plot_path", str, PICTURES[0].path, "Where (.png, .pdf or .svg)."),
    Parameter("plot_only", bool, False, "Train nothing: table and picture of the log."),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Train the cells that the log lacks; show all that it has at these settings."""
    about = (__doc__ or "").strip()
    own = parameters_of(run)
    values = parse(
        f"python -m scaling_experiments.{NAME}", about, [*own, *OUTPUTS], argv
    )
    kept = {each.name: values.pop(each.name) for each in OUTPUTS}
    with one_line_errors(), progress_shown():
        options = CopyRecallOptions(**values)
        check_options(options)
        log = RunLog(kept["log_path"])
        if kept["plot"] or kept["plot_only"]:
            check_picture_path(kept["plot_path"])
        if not kept["plot_only"]:
            train_missing(options, log)
        result = result_of(options, cells_in(log, options))
        return _show(result, kept["plot_path"] if kept["plot"] else "")


def cells_in(log: RunLog, options: CopyRecallOptions) -> list[Cell]:
    """Every cell of the log with these settings, whatever its model, rate and seed."""
    settings = settings_of(asdict(options))
    return [
        cell
        for record in log.records()
        if record["experiment"] == NAME and settings_of(record["params"]) == settings
        for cell in record["meta"]["cells"]
    ]


def train_missing(options: CopyRecallOptions, log: RunLog) -> None:
    """Train every cell of ``options`` that ``log`` lacks; append each as it is done."""
    if notice := log.prepare():
        print(f"note: {notice}", file=sys.stderr)
    have = {(c["model"], c["lr"], c["seed"]) for c in cells_in(log, options)}
    wanted = options.cells()
    missing = [
        cell
        for cell in wanted
        if (cell.models[0], cell.lrs[0], cell.seeds[0]) not in have
    ]
    print(f"{len(wanted) - len(missing)} of {len(wanted)} trainings are in {log.path}")
    for cell in track(missing, "trainings"):
        result, record = execute(run, asdict(cell))
        log.append(record)
        (name,), (lr,), (seed,) = cell.models, cell.lrs, cell.seeds
        scores = result.metadata["cells"][0]["accuracy"]
        told = "  ".join(f"{L}: {score:.1%}" for L, score in scores.items())
        print(
            f"{name}, lr {lr:g}, seed {seed}: {told}   {record['duration_s']:.0f} s",
            flush=True,
        )


def _show(result: ExperimentResult, plot_path: str) -> int:
    """Table, verdict and picture; the exit status."""
    if not result.metadata["cells"]:
        raise bad_input(
            "log_path", "no training with these settings", "one", "train first"
        )
    print(_plain(table(result.metadata)))
    verdict = {True: "PASS", False: "FAIL", None: "measured"}[result.passed]
    print(f"[{verdict}] {result.details}")
    if plot_path:
        print(f"saved {save_figure(PICTURES[0].render([result]), plot_path)}")
    return EXIT_FAILED_CLAIM if result.passed is False else 0


def _plain(rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned by spaces."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


if __name__ == "__main__":
    sys.exit(main())
