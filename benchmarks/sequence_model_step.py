"""A training step of document 2's sequence models, as the trainer takes it.

    python -m benchmarks.sequence_model_step

At the published sizes: words in A5 (length 20, hidden 1024, state 64, batch 32, and the
gradient of 32 pairs) and signatures (length 100, hidden and state 256, batch 32). On a
GPU each step is one CUDA graph, the data are there already, and factors of matrix
products are rounded to tensorfloat32 unless ``--precision`` says otherwise.

A time is the trainer's own, batch after batch, with everything it does between two
steps: the median and range over ``--blocks`` blocks of ``--steps`` steps. "kernel by
kernel" is the same trainer without a graph. Beside them stands the published code's
step, as measured on an H100 in another run: a guide, not a ratio of one run.

The claim judged is that both trainers see the same losses; times are reported.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks._steps import COMPARED, timed_steps
from benchmarks.ssd_scaling import store
from experiments.common import (
    EXIT_FAILED_CLAIM,
    Parameter,
    bad_input,
    check_integer,
    one_line_errors,
    parameters_of,
    parse,
    progress_shown,
    random_stream,
    track,
)
from lcde._sequence_model import SequenceModelConfig, build
from lcde.sm_a5 import SMA5Options, token_accuracies, token_accuracy
from lcde.sm_toy import SMToyOptions, squared_error
from ssm.training import Objective, Together

ELEMENTS = 60  # of A5
TOLERANCE = {"float32": 1e-4, "tensorfloat32": 2e-3, "bfloat16": 2e-2}  # of a loss
NOT_SHOWN = """\
What this does not show: validation, other sizes, or the published code beside ours."""


class Row(NamedTuple):
    """A model on a task, its published milliseconds a step, and the most asked here."""

    options: SMA5Options | SMToyOptions
    published: float
    target: float


ROWS = {
    "a5-Mamba": Row(SMA5Options("Mamba", length=20, depth=4), 22.1, 2.5),
    "a5-S4": Row(SMA5Options("S4", length=20, depth=4), 23.4, 2.5),
    "a5-Transformer": Row(SMA5Options("Transformer", length=20, depth=4), 28.1, 3.0),
    "a5-RNN": Row(SMA5Options("RNN", length=20, depth=1), 7.0, 1.0),
    "signature-Mamba": Row(SMToyOptions("Mamba"), 6.3, 1.2),
    "signature-S4": Row(SMToyOptions("S4"), 5.9, 1.2),
}


class Task(NamedTuple):
    """A model, what scores it as its runs do, random rows of the task's shapes."""

    model: SequenceModelConfig
    objective: Objective
    train: list[Tensor]
    auxiliary: list[Tensor] | None
    together: Together | None


def task_of(options: SMA5Options | SMToyOptions, n: int, seed: int) -> Task:
    """``n`` random rows: no time depends on what they hold."""
    rng = random_stream(seed, "data")

    def draw(length: int) -> list[Tensor]:
        words = rng.integers(ELEMENTS, size=(2, n, length))
        return [torch.from_numpy(side) for side in words]

    if isinstance(options, SMA5Options):
        model = options.architecture(ELEMENTS)
        words, pairs = draw(options.length), draw(2)
        return Task(model, token_accuracy, words, pairs, token_accuracies)
    paths, labels = (rng.standard_normal((n, *s)) for s in ((100, 2), ()))
    rows = [torch.from_numpy(x.astype(np.float32)) for x in (paths, labels)]
    return Task(options.architecture(), squared_error, rows, None, None)


def stepped(
    row: Row, *, graph: bool, steps: int, blocks: int, **training: Any
) -> dict[str, Any]:
    """Seconds a step, and the first losses."""
    config = replace(row.options.training(), epochs=1, cuda_graph=graph, **training)
    task = task_of(row.options, (blocks + 1) * steps * config.batch_size, config.seed)
    model = build(task.model, seed=config.seed)
    return timed_steps(
        model,
        task.objective,
        config,
        task.train,
        task.auxiliary,
        steps=steps,
        together=task.together,
    )


def benchmark(
    rows: tuple[str, ...] = tuple(ROWS),
    precision: Literal["float32", "tensorfloat32", "bfloat16"] = "tensorfloat32",
    compiled: bool = False,
    device: str = "auto",
    steps: int = 100,
    blocks: int = 7,
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """Time training steps of sequence models, as CUDA graphs where there is a GPU.

    Args:
        rows: task and model, by name
        precision: of matrix products on a GPU
        compiled: run the models through torch.compile
        device: auto, cpu, cuda or mps
        steps: in a block
        blocks: that are timed, after one that is not
        seed: of weights and data
    """
    check_integer("steps", steps, at_least=COMPARED, example=100)
    check_integer("blocks", blocks, at_least=1, example=7)
    for name in rows:
        if name not in ROWS:
            raise bad_input("rows", name, f"among {', '.join(ROWS)}", "choose there")
    shared: dict[str, Any] = {"precision": precision, "device": device}
    shared["compile"] = compiled
    shared |= {"seed": seed, "steps": steps, "blocks": blocks}
    for name in track(rows, "rows"):
        sides = {"kernel by kernel": stepped(ROWS[name], graph=False, **shared)}
        if sides["kernel by kernel"]["device"].startswith("cuda"):
            sides["as one graph"] = stepped(ROWS[name], graph=True, **shared)
        about = {"row": name, "torch": torch.__version__} | shared
        yield about | {"sides": sides, "difference": _apart(sides)}


def _apart(sides: Mapping[str, Mapping[str, Any]]) -> float:
    """The largest relative difference between the sides' first losses."""
    losses = np.array([side["losses"] for side in sides.values()])
    return float((np.ptp(losses, axis=0) / np.abs(losses).max(0)).max())


def lines(report: Mapping[str, Any]) -> list[str]:
    """One row as text."""
    row = ROWS[report["row"]]
    device = next(iter(report["sides"].values()))["device"]
    found = [
        f"{report['row']}, {report['precision']}, {device}: published code on an H100 "
        f"{row.published} ms, target {row.target} ms"
    ]
    for name, side in report["sides"].items():
        low, middle, high = (1e3 * side[k] for k in ("min_s", "median_s", "max_s"))
        used = ", ".join(side["backends"]) or "no operator of ours"
        found.append(
            f"  {name:<17} {middle:.3f} ms ({low:.3f}-{high:.3f}), "
            f"{row.published / middle:.1f} times as fast; first block "
            f"{1e3 * side['first_s']:.3f} [{used}]"
        )
    return [*found, f"  first losses differ by {report['difference']:.1e}"]


def problems(report: Mapping[str, Any]) -> list[str]:
    """Whether the two sides of a row are not one function."""
    most, apart = TOLERANCE[report["precision"]], report["difference"]
    if apart <= most:
        return []
    return [f"{report['row']}: losses differ by {apart:.1e} (tolerance {most})"]


def main(argv: Sequence[str] | None = None) -> int:
    """Print row after row, store all where ``--json`` names a file."""
    about = "Write the whole report here."
    parameters = [*parameters_of(benchmark), Parameter("json", str, "", about)]
    summary = (__doc__ or "").strip()
    values = parse(
        "python -m benchmarks.sequence_model_step", summary, parameters, argv
    )
    path, reports = values.pop("json"), []
    with one_line_errors(), progress_shown():
        for report in benchmark(**values):
            print("\n".join(lines(report)), flush=True)
            reports.append(report)
        if path:
            store({"rows": reports}, path)
    print(NOT_SHOWN)
    wrong = [problem for report in reports for problem in problems(report)]
    for problem in wrong:
        print(f"FAILED {problem}")
    return EXIT_FAILED_CLAIM if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
