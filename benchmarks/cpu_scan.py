"""Selective scan on the CPU against mambapy's, and a training step against GPT-2's.

    python -m benchmarks.cpu_scan

Everything is float32, in one process, in turns: a block of calls of one, then of the
other, so that a slow spell of the machine falls on both; ratios are of neighbours in
time.

* mambapy: its parallel scan as its MambaBlock uses it (deltaA = exp(delta A), deltaB u,
  hs = pscan(deltaA, deltaB u), y = hs C + D u). Outputs and every gradient are compared
  before anything is timed. "cold" is the first call in this process; compilation, once
  on a machine, and loading what was compiled are timed apart in fresh processes.
* Peak memory: a fresh process for each; the largest resident size (Linux's VmHWM, set
  back just before) during forward and backward less the size before, large blocks
  being given back at once (MALLOC_MMAP_THRESHOLD_). The bound is the project's own:
  1.5 times (the states at chunk boundaries + the buffers of one chunk + the gradients)
  beyond inputs and outputs.
* A training step (forward, backward, AdamW) of a language model of two Mamba blocks
  and of transformers' GPT-2 of the same width, vocabulary and batch, dropout off.

The claim judged is agreement with mambapy; times are reported, not judged.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

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
    track,
)
from ssm.models import SequenceLM, SequenceLMConfig
from ssm.ops import selective_scan
from ssm.ops.selective_scan._cpu_kernels import W

BLOCK = 5
TOLERANCE = 1e-4  # between two float32 results, of the largest entry
TARGETS: dict[tuple[int, ...], int] = {
    (4, 512, 512, 16): 20,
    (1, 256, 4096, 16): 20,
    (8, 128, 128, 16): 15,
}
MEMORY_TARGET = 5
NOT_SHOWN = """\
What this does not show: GPUs, 16-bit numbers, other machines or more cores, long
training runs, or that the models learn equally well. A busy machine (see its load
above) slows code on all cores most: threads wait for each other."""


class Shape(NamedTuple):
    """Rows, channels, length and state size of a scan."""

    B: int
    D: int
    L: int
    N: int


class Operands(NamedTuple):
    """What both scans take."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor


Scan = Callable[[Operands], Tensor]


def draw(shape: Shape, seed: int) -> Operands:
    """Operands like Mamba's at the start of training; all want gradients."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    B, D, L, N = shape
    delta = functional.softplus(normal(B, L, D) - 4)
    A = -torch.arange(1.0, N + 1).repeat(D, 1)
    operands = (normal(B, L, D), delta, A, normal(B, L, N), normal(B, L, N), normal(D))
    return Operands(*(x.requires_grad_() for x in operands))


def ours(x: Operands) -> Tensor:
    """The scan of this project."""
    y, _ = selective_scan(*x, backend="cpu")
    return y


def mambapy(x: Operands) -> Tensor:
    """mambapy's MambaBlock.selective_scan."""
    from mambapy.pscan import pscan

    decay = torch.exp(x.delta.unsqueeze(-1) * x.A)
    inputs = x.delta.unsqueeze(-1) * x.B.unsqueeze(2) * x.u.unsqueeze(-1)
    states = pscan(decay, inputs)
    return (states @ x.C.unsqueeze(-1)).squeeze(3) + x.D * x.u


SCANS: dict[str, Scan] = {"ours": ours, "mambapy": mambapy}


def check_installed() -> None:
    """Raise InputError where mambapy is missing."""
    if importlib.util.find_spec("mambapy") is None:
        raise InputError("mambapy is not installed; it comes with the extra 'bench'")


def forward_backward(scan: Scan, x: Operands, dy: Tensor) -> tuple[Tensor, ...]:
    """y and the gradients of all operands."""
    y = scan(x)
    return y.detach(), *torch.autograd.grad(y, x, dy)


# --- time -----------------------------------------------------------------------------


def in_turns(
    calls: Mapping[str, Callable[[], object]], repeats: int, block: int = BLOCK
) -> dict[str, dict[str, Any]]:
    """Times of every call, a block of each in turn; the first, cold ones apart.

    A repeat is the median of ``block`` calls in a row, after one that is not counted
    and brings back a side's own caches and threads: a scan is called again and again
    in training, not once after half a second of the other's work. With ``block = 1``,
    for calls of seconds, every call counts.
    """
    seconds = {name: [timed(call)] for name, call in calls.items()}
    for _ in track(range(repeats), "turns"):
        for name, call in calls.items():
            if block > 1:
                call()
            seconds[name].append(float(np.median([timed(call) for _ in range(block)])))
    return {
        name: {
            "cold_s": first,
            "median_s": float(np.median(warm)),
            "min_s": min(warm),
            "max_s": max(warm),
            "repeats_s": warm,
        }
        for name, (first, *warm) in seconds.items()
    }


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def ratio(times: Mapping[str, dict[str, Any]]) -> dict[str, float]:
    """How many times as long the second takes as the first: pair by pair."""
    first, second = (entry["repeats_s"] for entry in times.values())
    ratios = [slow / fast for fast, slow in zip(first, second, strict=True)]
    return {"median": float(np.median(ratios)), "min": min(ratios), "max": max(ratios)}


def compare(shape: Shape, repeats: int, seed: int) -> dict[str, Any]:
    """Agreement of both scans, then their times, with and without gradients."""
    x = draw(shape, seed)
    dy = torch.randn_like(x.u)
    trained = in_turns(
        {name: partial(forward_backward, scan, x, dy) for name, scan in SCANS.items()},
        repeats,
    )
    found = [forward_backward(scan, x, dy) for scan in SCANS.values()]
    names = ("y", *Operands._fields)
    differences = {
        name: float((a - b).abs().max() / b.abs().max())
        for name, a, b in zip(names, *found, strict=True)
    }
    with torch.no_grad():
        alone = in_turns(
            {name: partial(scan, x) for name, scan in SCANS.items()}, repeats
        )
    return {
        **shape._asdict(),
        "target": TARGETS.get(tuple(shape)),
        "differences": differences,
        "forward": {"times": alone, "ratio": ratio(alone)},
        "forward + backward": {"times": trained, "ratio": ratio(trained)},
    }


# --- fresh processes ------------------------------------------------------------------


def in_fresh_process(call: str, *arguments: object, **environment: str) -> Any:
    """The value of ``call(*arguments)`` of this module, computed in a new process."""
    program = (
        "import json, sys; from benchmarks import cpu_scan; "
        f"print(json.dumps(cpu_scan.{call}(*json.loads(sys.argv[1]))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
        cwd=Path(__file__).parent.parent,
    )
    if done.returncode:
        raise RuntimeError(f"{call} failed in a fresh process:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def first_call() -> float:
    """Seconds of the first forward and backward of a small scan in this process."""
    x = draw(Shape(1, 8, 8, 4), 0)
    start = time.perf_counter()
    forward_backward(ours, x, torch.ones_like(x.u))
    return time.perf_counter() - start


def compilation() -> dict[str, float]:
    """The first call with an empty cache, and with what that one left in it."""
    with tempfile.TemporaryDirectory() as folder:
        compiled, loaded = (
            in_fresh_process("first_call", NUMBA_CACHE_DIR=folder) for _ in range(2)
        )
    return {"compiled_s": compiled, "loaded_s": loaded}


def peak_bytes(side: str, shape: Sequence[int], threads: int, seed: int) -> int:
    """What forward and backward add to the resident size of this process, at most."""
    scan = SCANS[side]
    small = draw(Shape(1, 4, 4, 2), seed)
    with threads_of_both(threads):
        forward_backward(scan, small, torch.ones_like(small.u))  # code and threads
        x = draw(Shape(*shape), seed)
        dy = torch.randn_like(x.u)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
        before = _memory("VmRSS")
        forward_backward(scan, x, dy)
        return _memory("VmHWM") - before


def _memory(kind: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (size,) = (line.split()[1] for line in lines if line.startswith(kind + ":"))
    return 1024 * int(size)


def memory(shape: Shape, chunk: int, threads: int, seed: int) -> dict[str, Any] | None:
    """Peak bytes of both, and ours beside its bound; None where there is no Linux."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    peaks = {
        side: in_fresh_process(
            "peak_bytes", side, shape, threads, seed, MALLOC_MMAP_THRESHOLD_="65536"
        )
        for side in SCANS
    }
    B, D, L, N = shape
    parts = {
        "states at chunk boundaries": 4 * B * D * N * -(-L // chunk),
        "buffers of one chunk": threads * 4 * 2 * chunk * N * W,
        "gradients": 4 * (2 * B * L * D + 2 * B * L * N + D * N + D),
    }
    return {
        **shape._asdict(),
        "peak_bytes": peaks,
        "ratio": peaks["mambapy"] / max(1, peaks["ours"]),
        "outputs_bytes": 4 * (B * L * D + B * D * N),
        "bound_bytes": {**parts, "bound": int(1.5 * sum(parts.values()))},
    }


# --- a training step ------------------------------------------------------------------


def training_steps(
    batch: int, L: int, d_model: int, vocabulary: int, seed: int
) -> dict[str, Callable[[], None]]:
    """A step of two Mamba blocks and of two GPT-2 blocks on the same tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        mamba = SequenceLM(
            SequenceLMConfig(
                vocabulary, d_model, 2, "mamba", mixer={"mamba": {"d_state": 16}}
            )
        )
        config = GPT2Config(
            vocab_size=vocabulary,
            n_positions=L,
            n_embd=d_model,
            n_layer=2,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
        gpt2 = GPT2LMHeadModel(config)
        tokens = torch.randint(vocabulary, (batch, L + 1))
    models = {"Mamba (ours)": mamba, "GPT-2": gpt2}
    return {name: training_step(model, tokens) for name, model in models.items()}


def training_step(model: torch.nn.Module, tokens: Tensor) -> Callable[[], None]:
    """Forward, backward and AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].flatten()

    def step() -> None:
        logits = model(inputs).logits.flatten(0, 1)
        optimizer.zero_grad()
        functional.cross_entropy(logits, targets).backward()
        optimizer.step()

    return step


# --- the report -----------------------------------------------------------------------


@contextmanager
def threads_of_both(n: int) -> Iterator[None]:
    """PyTorch and Numba on ``n`` threads."""
    before = torch.get_num_threads(), numba.get_num_threads()
    torch.set_num_threads(n)
    numba.set_num_threads(min(n, before[1]))
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        numba.set_num_threads(before[1])


def benchmark(
    shapes: tuple[int, ...] = (4, 512, 512, 16, 1, 256, 4096, 16, 8, 128, 128, 16),
    repeats: int = 11,
    step_repeats: int = 11,
    batch: int = 8,
    length: int = 128,
    d_model: int = 64,
    vocabulary: int = 2000,
    threads: int = 2,
    seed: int = 0,
) -> dict[str, Any]:
    """Selective scan against mambapy's in time and memory; a step against GPT-2's.

    Args:
        shapes: four numbers a shape: batch, channels, length, state size; memory is
            measured at the first
        repeats: warm blocks of calls of each scan
        step_repeats: warm blocks of each training step
        batch: sequences in a training step
        length: of the sequences in a training step
        d_model: width of both models
        vocabulary: tokens of both models
        threads: of PyTorch and of Numba
        seed: draws operands, weights and tokens
    """
    sizes = {"repeats": repeats, "step-repeats": step_repeats, "batch": batch}
    sizes |= {"length": length, "d-model": d_model, "vocabulary": vocabulary}
    for name, value in (sizes | {"threads": threads}).items():
        check_integer(name, value, at_least=1, example=8)
    fours = [Shape(*shapes[i : i + 4]) for i in range(0, len(shapes) - 3, 4)]
    if not fours or len(shapes) % 4 or min(shapes) < 1:
        raise InputError("shapes: give four numbers from 1 a shape: B D L N")
    check_installed()
    load = os.getloadavg()[0]
    with threads_of_both(threads):
        rows = [compare(shape, repeats, seed) for shape in track(fours, "shapes")]
        steps = training_steps(batch, length, d_model, vocabulary, seed)
        times = in_turns(steps, step_repeats)
    return {
        "torch": torch.__version__,
        "numba": numba.__version__,
        "threads": threads,
        "seed": seed,
        "load": load,
        "repeats": repeats,
        "tolerance": TOLERANCE,
        "scans": rows,
        "compilation": compilation(),
        "memory": memory(fours[0], 64, threads, seed),
        "training_step": {
            "batch": batch,
            "L": length,
            "d_model": d_model,
            "V": vocabulary,
            "times": times,
            "ratio": ratio(times),
        },
    }


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    return "\n".join(
        [
            f"float32, {report['threads']} threads, {report['repeats']} blocks of "
            f"{BLOCK} warm calls in turns, load of the machine before "
            f"{report['load']:.1f}; milliseconds",
            "",
            *_scan_lines(report),
            "",
            *_memory_lines(report["memory"]),
            "",
            *_step_lines(report["training_step"]),
            "",
            NOT_SHOWN,
        ]
    )


def _scan_lines(report: dict[str, Any]) -> list[str]:
    lines = [
        f"{'(B, D, L, N)':<20}{'':<20}{'scan':<10}{'median':>9}{'min':>9}{'max':>9}"
        f"{'cold':>9}  times as fast"
    ]
    for row in report["scans"]:
        shape = str(tuple(row[name] for name in Shape._fields))
        for kind in ("forward", "forward + backward"):
            pair = _pair(row[kind], shape, kind)
            aim = row["target"] if kind == "forward + backward" else None
            pair[-1] += f", aim {aim}" if aim else ""
            lines += pair
        worst = max(row["differences"], key=row["differences"].__getitem__)
        lines.append(
            f"  largest difference: {row['differences'][worst]:.1e} of the largest "
            f"entry ({worst})"
        )
    first = report["compilation"]
    lines.append(
        f"ours, first call of a process: {first['loaded_s']:.1f} s; the very first on "
        f"a machine, which compiles: {first['compiled_s']:.1f} s"
    )
    return lines


def _pair(row: dict[str, Any], *labels: str) -> list[str]:
    lines = []
    for name, times in row["times"].items():
        kinds = ("median_s", "min_s", "max_s", "cold_s")
        cells = "".join(f"{1e3 * times[kind]:>9.2f}" for kind in kinds)
        lines.append("".join(f"{label:<20}" for label in labels) + f"{name:<13}{cells}")
    found = row["ratio"]
    lines[-1] += f"  {found['median']:.2f} ({found['min']:.2f} .. {found['max']:.2f})"
    return lines


def _memory_lines(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return ["peak memory: not measured (it is read from Linux's /proc)"]
    mega = {name: size / 1e6 for name, size in found["bound_bytes"].items()}
    peaks = {name: size / 1e6 for name, size in found["peak_bytes"].items()}
    bound = mega.pop("bound")
    extra = peaks["ours"] - found["outputs_bytes"] / 1e6
    parts = " + ".join(f"{size:.1f} ({name})" for name, size in mega.items())
    return [
        f"peak memory of forward + backward at {tuple(found.values())[:4]}: ours "
        f"{peaks['ours']:.1f} MB, mambapy {peaks['mambapy']:.1f} MB, "
        f"{found['ratio']:.1f} times as much, aim {MEMORY_TARGET}",
        f"  ours beyond inputs and outputs {extra:.1f} MB; bound {bound:.1f} MB = 1.5 "
        f"x ({parts})",
    ]


def _step_lines(row: dict[str, Any]) -> list[str]:
    title = (
        f"training step, 2 blocks, d_model {row['d_model']}, batch {row['batch']}, "
        f"length {row['L']}, vocabulary {row['V']}"
    )
    return [title, *_pair(row)]


def disagreements(report: dict[str, Any]) -> list[str]:
    """Where a result differs from mambapy's by more than rounding."""
    return [
        f"{name} differs by {difference:.1e} at {tuple(row.values())[:4]}"
        for row in report["scans"]
        for name, difference in row["differences"].items()
        if not difference <= TOLERANCE
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print the tables, store the report where ``--json`` names a file.

    Exit status 1 if a result differs from mambapy's; times are not judged.
    """
    about = "Write the whole report here, for example outputs/cpu_scan.json."
    parameters = [*parameters_of(benchmark), Parameter("json", str, "", about)]
    summary = (benchmark.__doc__ or "").partition("\n")[0]
    values = parse("python -m benchmarks.cpu_scan", summary, parameters, argv)
    path = values.pop("json")
    with one_line_errors():
        with progress_shown():
            report = benchmark(**values)
        print(table(report))
        if path:
            store(report, path)
    found = disagreements(report)
    print(*found, sep="\n", file=sys.stderr, end="\n" if found else "")
    return EXIT_FAILED_CLAIM if found else 0


if __name__ == "__main__":
    sys.exit(main())
