"""A training step of mamba_simple on the CPU against transformers' Mamba.

    python -m benchmarks.mamba_step

A step is forward, cross entropy at the last position, backward and AdamW, of two
blocks at the setting of document 1's WikiText-2 runs, with logits formed at the last
position only on every side. Everything is float32, in one process, from the same
weights and on the same batch.

* transformers: ``MambaForCausalLM`` as it comes. Without mamba_ssm (whose kernels are
  for GPUs) its scan is a loop over time in PyTorch, which it warns of; the warning is
  kept back and said in the table.
* transformers, mambapy: the same with ``use_mambapy=True``, its option of a parallel
  scan by mambapy. Timed where mambapy is installed.
* A turn is one step of every side, so that a slow spell of the machine falls on all;
  ratios are of neighbours in time. Each step is counted: ours has to fetch again what
  the others' seconds drove out of the caches, which a training run would not. "cold"
  is a side's first step.
* Logits and every gradient of the sides are compared on some of the sequences, from
  the checkpoint from which all started, and so are the losses of every step taken.

The claim judged is that all sides are one function; times are reported, not judged.
"""

import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.cpu_scan import TOLERANCE, in_turns, ratio, threads_of_both
from benchmarks.ssd_scaling import store
from experiments.common import (
    EXIT_FAILED_CLAIM,
    InputError,
    Parameter,
    check_integer,
    one_line_errors,
    parameters_of,
    parse,
    progress_shown,
    random_stream,
)
from mamba_experiments.models import build, build_config
from ssm.models import SequenceLM

TARGET = 10  # times as fast as transformers as it comes
OURS, PEER, PEER_MAMBAPY = "ours", "transformers", "transformers, mambapy"
COMPARED = 8  # sequences on which gradients are compared
NOT_SHOWN = """\
What this does not show: GPUs, 16-bit numbers, other machines or more cores, logits at
every position (whose cost all sides share), transformers under torch.compile (which
scans in parallel), or a whole training run. A busy machine (see its load above) slows
code on all cores most: threads wait for each other."""

Forward = Callable[[Tensor], Tensor]


class Side(NamedTuple):
    """A model, and its logits (B, V) at the last position of tokens (B, L)."""

    model: nn.Module
    forward: Forward


class Batch(NamedTuple):
    """Tokens, and the one that follows each row."""

    inputs: Tensor
    targets: Tensor


# --- the sides ------------------------------------------------------------------------


def check_peer() -> None:
    """Raise InputError where transformers' Mamba would not run on a CPU."""
    if importlib.util.find_spec("mamba_ssm") is not None:
        raise InputError(
            "mamba_ssm: got an environment with it; expected one without, because "
            "transformers would call its CUDA kernels; leave out the extra 'cuda'"
        )


@contextmanager
def quiet_peer() -> Iterator[None]:
    """transformers without warnings and bars: what they say stands in the report."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def load_sides(folder: Path) -> dict[str, Side]:
    """Every side from one checkpoint in Hugging Face's layout, ready to train."""
    sides = {OURS: _ours(folder), PEER: _peer(folder, use_mambapy=False)}
    if importlib.util.find_spec("mambapy") is not None:
        sides[PEER_MAMBAPY] = _peer(folder, use_mambapy=True)
    return sides


def _ours(folder: Path) -> Side:
    model = SequenceLM.from_pretrained(folder)
    return Side(model, lambda tokens: model(tokens, last_only=True).logits)


def _peer(folder: Path, *, use_mambapy: bool) -> Side:
    from transformers import MambaForCausalLM

    model = MambaForCausalLM.from_pretrained(folder, use_mambapy=use_mambapy).train()

    def forward(tokens: Tensor) -> Tensor:
        return model(tokens, use_cache=False, logits_to_keep=1).logits[:, 0]

    return Side(model, forward)


def draw(vocabulary: int, batch: int, length: int, seed: int) -> Batch:
    """Tokens without any structure: time does not depend on them."""
    rng = random_stream(seed, "data")
    tokens = torch.from_numpy(rng.integers(vocabulary, size=(batch, length + 1)))
    return Batch(tokens[:, :-1], tokens[:, -1])


# --- agreement ------------------------------------------------------------------------


def logits_and_gradients(side: Side, batch: Batch) -> dict[str, Tensor]:
    """By our names: the logits, and the gradient of every parameter."""
    logits = side.forward(batch.inputs)
    functional.cross_entropy(logits, batch.targets).backward()
    found = {"logits": logits.detach()}
    for name, parameter in side.model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, f"{name} has no gradient"
        found[_our_name(name)] = gradient
    return found


def _our_name(name: str) -> str:
    for theirs, ours in (
        ("backbone.embeddings", "embedding"),
        ("backbone.layers", "blocks"),
        ("backbone.norm_f", "norm"),
    ):
        name = name.replace(theirs, ours)
    return name


def differences(sides: Mapping[str, Side], batch: Batch) -> dict[str, dict[str, float]]:
    """Largest differences of each peer from ours, of the largest entry."""
    found = {name: logits_and_gradients(side, batch) for name, side in sides.items()}
    mine = found.pop(OURS)
    return {
        peer: {
            name: float((mine[name] - entry).abs().max() / entry.abs().max())
            for name, entry in theirs.items()
        }
        for peer, theirs in found.items()
    }


# --- time -----------------------------------------------------------------------------


def training_step(side: Side, batch: Batch, losses: list[float]) -> Callable[[], None]:
    """Forward, backward and AdamW; the loss is put into ``losses``."""
    optimizer = torch.optim.AdamW(side.model.parameters(), lr=1e-3)

    def step() -> None:
        loss = functional.cross_entropy(side.forward(batch.inputs), batch.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    return step


def measure(folder: Path, batch: Batch, repeats: int) -> dict[str, Any]:
    """Times, ratios, losses and differences of the sides, from one checkpoint."""
    with quiet_peer():
        sides = load_sides(folder)
        losses: dict[str, list[float]] = {name: [] for name in sides}
        steps = {
            name: training_step(side, batch, losses[name])
            for name, side in sides.items()
        }
        times = in_turns(steps, repeats, block=1)
        few = Batch(*(tensor[:COMPARED] for tensor in batch))
        found = differences(load_sides(folder), few)
    return {
        "times": times,
        "ratios": {
            name: ratio({OURS: times[OURS], name: times[name]}) for name in found
        },
        "losses": losses,
        "differences": found,
        "parameters": {
            name: sum(p.numel() for p in side.model.parameters())
            for name, side in sides.items()
        },
    }


# --- the report -----------------------------------------------------------------------


def benchmark(
    batch: int = 64,
    length: int = 128,
    d_model: int = 64,
    n_state: int = 16,
    n_layers: int = 2,
    vocabulary: int = 20_000,
    repeats: int = 3,
    threads: int = 2,
    seed: int = 0,
) -> dict[str, Any]:
    """A training step of mamba_simple against transformers' Mamba, and agreement.

    Args:
        batch: sequences in a step
        length: tokens of a sequence
        d_model: width of the residual stream
        n_state: states of each channel
        n_layers: blocks
        vocabulary: tokens that there are
        repeats: turns of one warm step a side; transformers' takes up to a minute
        threads: of PyTorch and of Numba
        seed: draws weights and tokens
    """
    sizes = {"batch": batch, "length": length, "repeats": repeats, "threads": threads}
    for name, value in sizes.items():
        check_integer(name, value, at_least=1, example=2)
    config = build_config(
        "mamba_simple",
        vocab_size=vocabulary,
        d_model=d_model,
        n_state=n_state,
        n_layers=n_layers,
    )
    check_peer()
    import transformers

    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder, threads_of_both(threads):
        build(config, seed=seed).save_pretrained(folder, layout="hugging_face")
        tokens = draw(vocabulary, batch, length, seed)
        measured = measure(Path(folder), tokens, repeats)
    return {
        "versions": {
            "torch": torch.__version__,
            "numba": numba.__version__,
            "transformers": transformers.__version__,
        },
        "setting": {
            "batch": batch,
            "length": length,
            "d_model": d_model,
            "n_state": n_state,
            "n_layers": n_layers,
            "vocabulary": vocabulary,
        },
        "repeats": repeats,
        "threads": threads,
        "seed": seed,
        "load": load,
        "target": TARGET,
        "tolerance": TOLERANCE,
        **measured,
    }


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    setting = ", ".join(f"{name} {size}" for name, size in report["setting"].items())
    return "\n".join(
        [
            "a training step of Mamba, logits at the last position:",
            setting,
            f"float32, threads: {report['threads']}, warm turns: {report['repeats']}, "
            f"load of the machine before {report['load']:.1f}; milliseconds",
            "",
            *_time_lines(report),
            f"transformers {report['versions']['transformers']} without mamba_ssm "
            "scans by its reference loop in PyTorch;",
            "with use_mambapy=True (mambapy installed) by mambapy's parallel scan",
            "",
            *_agreement_lines(report),
            "",
            NOT_SHOWN,
        ]
    )


def _time_lines(report: dict[str, Any]) -> list[str]:
    lines = [
        f"{'':<23}{'median':>10}{'min':>10}{'max':>10}{'cold':>10}"
        "  times as long as ours"
    ]
    for name, times in report["times"].items():
        kinds = ("median_s", "min_s", "max_s", "cold_s")
        line = f"{name:<23}" + "".join(f"{1e3 * times[k]:>10.1f}" for k in kinds)
        if found := report["ratios"].get(name):
            low, median, high = (found[k] for k in ("min", "median", "max"))
            line += f"  {median:.1f} ({low:.1f} .. {high:.1f})"
        line += f", aim {report['target']}" if name == PEER else ""
        lines.append(line)
    return lines


def _agreement_lines(report: dict[str, Any]) -> list[str]:
    lines = [
        f"parameters of every side: {report['parameters'][OURS]:,}",
        f"{'largest difference from':<23}{'logits':>10}{'gradients':>10}{'losses':>10}"
        "  of the largest entry",
    ]
    for peer, found in report["differences"].items():
        gradients = {name: x for name, x in found.items() if name != "logits"}
        worst = max(gradients, key=gradients.__getitem__)
        entries = (found["logits"], found[worst], loss_difference(report, peer))
        cells = "".join(f"{entry:>10.1e}" for entry in entries)
        lines.append(f"{peer:<23}{cells}  (gradient of {worst})")
    return lines


def loss_difference(report: dict[str, Any], peer: str) -> float:
    """The largest, over the steps, between ours and a peer's, of the peer's loss."""
    mine, theirs = (np.array(report["losses"][name]) for name in (OURS, peer))
    return float(np.max(np.abs(mine - theirs) / np.abs(theirs)))


def problems(report: dict[str, Any]) -> list[str]:
    """Where a peer differs from ours by more than rounding."""
    tolerance = report["tolerance"]
    found = []
    for peer, entries in report["differences"].items():
        every = entries | {"loss of the steps": loss_difference(report, peer)}
        found += [
            f"{name} differs by {difference:.1e} from that of {peer}"
            for name, difference in every.items()
            if not difference <= tolerance
        ]
    counts = report["parameters"]
    if len(set(counts.values())) > 1:
        found.append(f"the sides have different numbers of parameters: {counts}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print the table, store the report where ``--json`` names a file.

    Exit status 1 if the sides are not one function; times are not judged.
    """
    about = "Write the whole report here, for example outputs/mamba_step.json."
    parameters = [*parameters_of(benchmark), Parameter("json", str, "", about)]
    summary = (benchmark.__doc__ or "").partition("\n")[0]
    values = parse("python -m benchmarks.mamba_step", summary, parameters, argv)
    path = values.pop("json")
    with one_line_errors():
        with progress_shown():
            report = benchmark(**values)
        print(table(report))
        if path:
            store(report, path)
    found = problems(report)
    print(*found, sep="\n", file=sys.stderr, end="\n" if found else "")
    return EXIT_FAILED_CLAIM if found else 0


if __name__ == "__main__":
    sys.exit(main())
