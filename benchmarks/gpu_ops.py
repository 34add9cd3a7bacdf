"""Our GPU kernels beside their peers': errors first, then times in turns, and floors.

    python -m benchmarks.gpu_ops

bfloat16 operands on one GPU. For every operator: errors of the output and of all
gradients against our PyTorch form in float64 (||x - reference|| / ||reference||, the
largest; at smaller sizes where the large ones would not fit), ours and the peer's. Then
both are timed, forward, and forward with backward, each in the layout that it likes
best: in turns, so that a slow spell of the card falls on both. A time is the median of
a turn between device events, with a cold cache; a ratio is that of neighbours in time,
and the median and range of the ratios are shown. "replayed" is forward with backward
recorded as a CUDA graph: the GPU's time alone, without what Python and PyTorch take to
launch it. A floor is what the card's ceilings
leave (3.02 TB/s, 4.05e12 exponentials a second, 790e12 operations a second: measured on
an H100).

``train`` and ``decode`` are a language model of Mamba-130M's shape beside mamba_ssm's
with the same weights; ``trainer`` is document 1's training (width 64, 16 states, 2
layers, 64 windows of 128 tokens) with our layers and with mamba_ssm's; ``cold`` is the
first call in a new process, with nothing compiled or tested before, and with it. A peer
that is not installed is said, and ours is shown alone. The claim judged is that ours is
right; times are reported.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import _gpu_models as models
from benchmarks._gpu_rows import ROWS, Named, Peer, Row
from experiments.common import (
    EXIT_FAILED_CLAIM,
    InputError,
    Parameter,
    bad_input,
    check_integer,
    one_line_errors,
    parameters_of,
    parse,
    progress_shown,
    to_json,
    track,
    unwritable,
)
from ssm.ops import backends_used

DEVICE = "cuda"
TOLERANCE = 2e-2  # of bfloat16 results: several roundings, of which one is 4e-3
MODELS = ("train", "decode")
EVERY = (*ROWS, *MODELS, "trainer", "cold")
MODEL_TARGET, COLD_TARGET = 0.8, 10.0
NOT_SHOWN = """\
What this does not show: other cards, float32, ragged batches, or whole trainings. The
peer's times are of its version here; floors are of an H100 and count every operand
once, and no other arithmetic than exponentials and matrix products."""
COLD = """\
import time
import torch
from ssm.ops import selective_scan
torch.zeros(1, device="cuda")
start = time.perf_counter()
def draw(*shape):
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
u, delta, B, C = (draw(2, 512, n) for n in (256, 256, 16, 16))
A = -torch.rand(256, 16, device="cuda")
y, _ = selective_scan(u, delta, A, B, C, delta_softplus=True)
y.sum().backward()
torch.cuda.synchronize()
print(time.perf_counter() - start)
"""

Run = Callable[[], object]


# --- errors ---------------------------------------------------------------------------


def results(call: Callable[[Named], Tensor], operands: Named) -> Named:
    """The output and every gradient of an uneven sum of it."""
    leaves = {name: x.detach().requires_grad_() for name, x in operands.items()}
    y = call(leaves)
    weights = torch.arange(y.numel(), device=y.device).mul(0.7).cos().view(y.shape)
    gradients = torch.autograd.grad((y * weights).sum(), list(leaves.values()))
    return {"y": y.detach()} | dict(zip(leaves, gradients, strict=True))


def errors(row: Row, seed: int) -> tuple[dict[str, Any], Named]:
    """Ours against float64, and the reference itself, at the sizes checked."""
    operands = row.draw(row.checked, _generator(seed))
    wide = {name: x.double() for name, x in operands.items()}
    reference = results(row.ours, wide)
    with backends_used() as used:
        found = results(row.ours, operands)
    return {"backend": sorted(used), "errors": compared(found, reference)}, reference


def peer_errors(row: Row, peer: Peer, seed: int, reference: Named) -> dict[str, float]:
    """The peer's output and gradients against the same reference."""
    operands = row.draw(row.checked, _generator(seed))
    if peer.has_backward:
        found = results(lambda x: peer.call(peer.prepare(x)), operands)
    else:
        found = {"y": peer.call(peer.prepare(operands))}
    return compared(found, reference)


def checked(
    row: Row, peer: Peer, seed: int, reference: Named
) -> tuple[dict[str, float], Peer, str | None]:
    """The peer's errors, and what of it runs: without a backward pass that fails."""
    try:
        return peer_errors(row, peer, seed, reference), peer, None
    except Exception as error:
        if not peer.has_backward:
            raise
        half = replace(peer, has_backward=False)
        reason = f"it fails: {_in_one_line(error)}"
        return peer_errors(row, half, seed, reference), half, reason


def compared(found: Named, reference: Named) -> dict[str, float]:
    """Name -> relative error in the Euclidean norm."""
    return {
        name: float((x.double() - reference[name]).norm() / reference[name].norm())
        for name, x in found.items()
    }


def _generator(seed: int) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


# --- times ----------------------------------------------------------------------------


def median_s(run: Run) -> float:
    """Median seconds of a call between device events, the cache cold at each."""
    from triton.testing import do_bench

    return float(do_bench(run, warmup=20, rep=80, return_mode="median")) / 1e3


def in_turns(runs: Mapping[str, Run], turns: int) -> dict[str, list[float]]:
    """Median seconds of each run in each turn."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(turns):
        for name, run in runs.items():
            found[name].append(median_s(run))
    return found


def forward(call: Callable[[Named], Tensor], operands: Named) -> Run:
    """A forward pass without gradients."""

    def run() -> object:
        with torch.no_grad():
            return call(operands)

    return run


def both(call: Callable[[Named], Tensor], operands: Named) -> Run:
    """A forward and a backward pass, to the gradients of all operands."""
    leaves = {name: x.detach().requires_grad_() for name, x in operands.items()}
    dy = torch.randn_like(call(leaves))

    def run() -> object:
        return torch.autograd.grad(call(leaves), list(leaves.values()), dy)

    return run


def replayed(run: Run) -> Run | None:
    """``run`` recorded as a CUDA graph; None where it cannot be, or without a GPU."""
    if DEVICE != "cuda":
        return None
    graph, aside = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(aside):
            run()
        torch.cuda.current_stream().wait_stream(aside)
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:  # it waits for the GPU, say
        return None
    return graph.replay


def times(row: Row, peers: Mapping[str, Peer], turns: int, seed: int) -> dict[str, Any]:
    """Seconds of ours and of each peer, both ways, and the floors."""
    operands = row.draw(row.sizes, _generator(seed))
    floors = row.floors(operands, row.ours(operands))
    found: dict[str, Any] = {}
    for i, (name, kind) in enumerate((("forward", forward), ("both", both))):
        runs = {"ours": kind(row.ours, operands)}
        for label, peer in peers.items():
            if name == "forward" or peer.has_backward:
                runs[label] = kind(peer.call, peer.prepare(operands))
        found[name] = summary(in_turns(runs, turns)) | {"floor_s": floors[i]}
    recorded = {name: replayed(run) for name, run in runs.items()}
    able = {name: run for name, run in recorded.items() if run is not None}
    if "ours" in able:
        found["replayed"] = summary(in_turns(able, turns)) | {"floor_s": floors[1]}
    return found


def summary(seconds: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Medians and ranges; ratios of ours to the fastest peer, turn by turn."""
    report: dict[str, Any] = {
        "seconds": {
            name: {"median": float(np.median(s)), "min": min(s), "max": max(s)}
            for name, s in seconds.items()
        }
    }
    rivals = {name: s for name, s in seconds.items() if name != "ours"}
    if rivals:
        best = min(rivals, key=lambda name: float(np.median(rivals[name])))
        ratios = [a / b for a, b in zip(seconds["ours"], rivals[best], strict=True)]
        low, high = min(ratios), max(ratios)
        median = float(np.median(ratios))
        report["ratio"] = {"to": best, "median": median, "min": low, "max": high}
    return report


# --- rows -----------------------------------------------------------------------------


def missing(package: str) -> str | None:
    """Why this peer cannot be imported, or None."""
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    try:
        importlib.import_module(package)
    except Exception as error:  # noqa: BLE001  # extensions raise whatever they like
        return f"{package} cannot be imported: {_in_one_line(error)}"
    return None


def operator_row(name: str, turns: int, seed: int) -> dict[str, Any]:
    """Errors and times of one operator and its peers."""
    row = ROWS[name]
    report, reference = errors(row, seed)
    running, theirs = {}, {}
    refused: dict[str, str] = {}
    for label, peer in row.peers.items():
        try:
            reason = missing(peer.package)
            if reason is None:
                theirs[label], running[label], half = checked(
                    row, peer, seed, reference
                )
                refused |= {} if half is None else {f"{label}, backward": half}
        except Exception as error:  # noqa: BLE001  # a peer fails as it likes
            reason = f"it fails: {_in_one_line(error)}"
        if reason is not None:
            refused[label] = reason
    del reference
    torch.cuda.empty_cache()
    report |= {"peer_errors": theirs, "no_peer": refused, "sizes": dict(row.sizes)}
    targets = {"forward": row.target.forward, "both": row.target.both}
    return report | times(row, running, turns, seed) | {"targets": targets}


def model_row(name: str, turns: int, seed: int) -> dict[str, Any]:
    """The language models' training step, or their time of one more token."""
    device = torch.device(DEVICE)
    own = models.ours(device, seed)
    refused = missing("mamba_ssm")
    sides: dict[str, Any] = {"ours": own}
    if refused is None:
        sides["mamba_ssm"] = models.mamba_ssm(own)
    report: dict[str, Any] = {
        "no_peer": {} if refused is None else {"mamba_ssm": refused}
    }
    with backends_used() as used:
        if name == "train":
            report |= _train(sides, device, turns, seed)
        else:
            report |= _decode(sides, device, turns, seed)
    return report | {"backend": sorted(used), "targets": {name: MODEL_TARGET}}


def _train(
    sides: Mapping[str, Any], device: torch.device, turns: int, seed: int
) -> dict[str, Any]:
    batch = models.tokens(device, seed, models.BATCH, models.LENGTH + 1)
    steps = {n: models.training_step(model, batch) for n, model in sides.items()}
    losses = {n: [float(step()) for _ in range(3)] for n, step in steps.items()}
    report = {"losses": losses, "train": summary(in_turns(steps, turns))}
    if "mamba_ssm" in losses:
        pairs = zip(losses["ours"], losses["mamba_ssm"], strict=True)
        report["errors"] = {"loss": max(abs(a - b) / b for a, b in pairs)}
    return report


def _decode(
    sides: Mapping[str, Any], device: torch.device, turns: int, seed: int
) -> dict[str, Any]:
    prompt = models.tokens(device, seed, 1, models.PROMPT)
    decoders = {"ours": models.decode_ours, "mamba_ssm": models.decode_mamba_ssm}
    runs = {
        name: lambda n, name=name, model=model: decoders[name](model.eval(), prompt, n)
        for name, model in sides.items()
    }
    found: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run(models.FEW)  # compiles, captures
    for _ in range(turns):
        for name, run in runs.items():
            found[name].append(models.seconds_a_token(run))
    return {"decode": summary(found)}


def trainer_row(seed: int) -> dict[str, Any]:
    """Our trainer with our layers and with mamba_ssm's, plain and as CUDA graphs."""
    refused = missing("mamba_ssm")
    sides = {}
    for theirs in (False, True) if refused is None else (False,):
        for graph in (False, True):
            name = ("mamba_ssm" if theirs else "ours") + (", as a graph" * graph)
            model = models.small_model(seed, theirs=theirs)
            sides[name] = models.small_training(model, cuda_graph=graph, seed=seed)
    first = [side["losses"] for side in sides.values()]
    apart = float((np.ptp(first, axis=0) / np.abs(first).max(0)).max())
    missed = {} if refused is None else {"mamba_ssm": refused}
    return {"trainer": sides, "errors": {"loss": apart}, "no_peer": missed}


def cold_row() -> dict[str, Any]:
    """Seconds of a first scan, forward and backward, in fresh processes."""
    with tempfile.TemporaryDirectory() as folder:
        caches = ("XDG_CACHE_HOME", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH")
        environment = os.environ | {name: f"{folder}/{name}" for name in caches}
        seconds = {}
        for state in ("nothing kept", "all kept"):
            done = subprocess.run(
                [sys.executable, "-c", COLD],
                env=environment,
                capture_output=True,
                text=True,
                check=True,
            )
            seconds[state] = float(done.stdout.split()[-1])
    return {"cold": seconds, "targets": {"cold": COLD_TARGET}}


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


# --- the report -----------------------------------------------------------------------


def benchmark(
    rows: tuple[str, ...] = EVERY, turns: int = 5, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """Time our GPU kernels beside their peers', row after row.

    Args:
        rows: which rows, by name
        turns: how often each side is timed
        seed: draws operands, weights and tokens
    """
    check_integer("turns", turns, at_least=1, example=5)
    for name in rows:
        if name not in EVERY:
            raise bad_input("rows", name, f"among {', '.join(EVERY)}", "choose there")
    about = card() | {"torch": torch.__version__, "turns": turns, "seed": seed}
    for name in track(rows, "rows"):
        start = time.perf_counter()
        if name == "cold":
            found = cold_row()
        elif name == "trainer":
            found = trainer_row(seed)
        elif name in MODELS:
            found = model_row(name, turns, seed)
        else:
            found = operator_row(name, turns, seed)
        torch.cuda.empty_cache()
        took = time.perf_counter() - start
        yield {"row": name} | about | found | {"took_s": took}


def card() -> dict[str, str]:
    """The GPU and its compiler. Raises InputError where there is no GPU."""
    if not torch.cuda.is_available():
        raise InputError("no CUDA device is visible to PyTorch: nothing can be timed")
    from triton import __version__ as triton

    return {"gpu": torch.cuda.get_device_name(), "triton": triton}


def lines(report: Mapping[str, Any]) -> list[str]:
    """One row of the benchmark as text."""
    sizes = " ".join(f"{name}{n}" for name, n in report.get("sizes", {}).items())
    used = ", ".join(report.get("backend", []))
    found = [" ".join(filter(None, (report["row"], sizes, used and f"[{used}]")))]
    for kind in ("forward", "both", "replayed", *MODELS):
        if kind in report:
            found += _time_lines(kind, report[kind], report["targets"].get(kind))
    for side, timed in report.get("trainer", {}).items():
        rates = [models.SMALL_TOKENS / timed[k] for k in ("median_s", "max_s", "min_s")]
        found.append("  {:<21} {:,.0f} tokens/s ({:,.0f}-{:,.0f})".format(side, *rates))
    for state, seconds in report.get("cold", {}).items():
        found.append(f"  first call, {state}: {seconds:.1f} s (target {COLD_TARGET:g})")
    sides = {"ours": report.get("errors", {})} | report.get("peer_errors", {})
    for side, named in sides.items():
        if named:
            worst = max(named, key=lambda name: named[name])
            found.append(f"  error of {side}: at most {named[worst]:.1e} ({worst})")
    found += [f"  no {who}: {why}" for who, why in report.get("no_peer", {}).items()]
    return found


def _time_lines(kind: str, timed: Mapping[str, Any], target: float | None) -> list[str]:
    parts = [
        f"{name} {1e3 * s['median']:.3f} ({1e3 * s['min']:.3f}-{1e3 * s['max']:.3f})"
        for name, s in timed["seconds"].items()
    ]
    if floor := timed.get("floor_s"):
        times_floor = timed["seconds"]["ours"]["median"] / floor
        parts.append(f"floor {1e3 * floor:.3f} (ours {times_floor:.1f} times)")
    found = [f"  {kind:<8} ms: " + "; ".join(parts)]
    if ratio := timed.get("ratio"):
        aim = "" if target is None else f", target {target:.2f}"
        found.append(
            f"           ours / {ratio['to']}: {ratio['median']:.2f} "
            f"({ratio['min']:.2f}-{ratio['max']:.2f}{aim})"
        )
    return found


def problems(report: Mapping[str, Any]) -> list[str]:
    """Where ours was not right."""
    return [
        f"{report['row']}: {name} is off by {error:.1e} (tolerance {TOLERANCE})"
        for name, error in report.get("errors", {}).items()
        if not error <= TOLERANCE  # NaN fails too
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Print row after row, append each to ``--json``; 1 if a result is wrong."""
    parameters = [
        *parameters_of(benchmark),
        Parameter("json", str, "", "Append each row here, one line of JSON."),
    ]
    values = parse(
        "python -m benchmarks.gpu_ops", (__doc__ or "").strip(), parameters, argv
    )
    path, wrong = values.pop("json"), []
    with one_line_errors(), progress_shown():
        for report in benchmark(**values):
            print("\n".join(lines(report)), flush=True)
            wrong += problems(report)
            if path:
                append(report, path)
    print(NOT_SHOWN)
    for problem in wrong:
        print(f"FAILED {problem}")
    return EXIT_FAILED_CLAIM if wrong else 0


def append(report: Mapping[str, Any], path: str) -> None:
    """Add one line. Raises InputError if it cannot be written."""
    line = json.dumps(to_json(report), allow_nan=False) + "\n"
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(line)
    except OSError as error:
        raise unwritable(path, error) from None


if __name__ == "__main__":
    sys.exit(main())
