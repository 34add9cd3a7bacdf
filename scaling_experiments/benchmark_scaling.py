"""Time and memory against length: document 3's SSM in four forms, and attention.

    scan, chunked     h_t = exp(delta_t A) h_{t-1} + delta_t B_t         O(L)
    convolution       the same sizes with constant delta, by FFT         O(L log L)
    dual              the L x L matrix of every state, materialised      O(L^2)
    naive_loop        document 3's own Python loop                       O(L)
    attention         PyTorch's fused causal attention                   O(L^2)

One layer alone ("mixing") and the whole models with their head of 50,257 tokens, which
at any of these lengths costs far more than the mixing does: forward, forward +
backward, and one token behind the others ("step": attention with its KV cache). All
contestants of a length take turns. Document 3's published table is printed beside ours.

Judged is that the scan and the chunked form give the naive loop's outputs at every
length where it runs. Times, memory, exponents and crossovers are measured.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, Literal

import torch

from experiments.common import (
    ExperimentResult,
    Picture,
    check_increasing,
    check_integer,
    meter,
    random_stream,
    track,
)
from scaling_experiments._contestants import (
    ATTENTION,
    FORMS_OF,
    LEARNED,
    NAIVE,
    Contest,
    Point,
    label,
    make_contest,
    points_at,
)
from scaling_experiments._fits import (
    crossover,
    crossover_text,
    exponents,
    exponents_text,
)
from scaling_experiments._report import command_with_tables
from scaling_experiments._scaling_report import Entries, curve_of, draw, tables
from scaling_experiments._timing import (
    Budget,
    Call,
    ShortOfMemoryError,
    can_see_peaks,
    check_device,
    check_limits,
    in_fresh_process,
    in_turns,
    memory_errors_told,
    peak_bytes,
    seconds_of,
    short_of_memory,
    threads,
    too_slow,
    usable_bytes,
)

NAME = "benchmark_scaling"
MODULE = f"scaling_experiments.{NAME}"
CLAIM = "the scan and the chunked form give the outputs of document 3's loop"
TOLERANCE = 1e-5  # of the largest entry, in float32
EQUAL_FORMS = ("scan", "chunked")


@dataclass(frozen=True)
class ScalingOptions:
    """Time and memory against length: SSM forms, document 3's loop, attention.

    Args:
        lengths: sequence lengths, increasing; to 131072 and beyond on a GPU
        batch: sequences at a time
        device: where to run
        naive_max_length: longest length for document 3's own loop
        seconds_per_point: warm time for each contestant at each length (at least 5
            repeats, up to 4 times it); calls expected to take 16 times it are left out
        memory_gb: most memory that a call may need, in GB; 0 for 80 % of what is free
        peaks: measure peak memory too, on a CPU in a process of its own
        threads: on a CPU; 0 for as many as PyTorch takes. Where other programs run, 1:
            threads that wait for each other cost milliseconds each time
        seed: draws weights and inputs
    """

    lengths: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
    batch: int = 1
    device: Literal["cpu", "cuda"] = "cpu"
    naive_max_length: int = 4096
    seconds_per_point: float = 0.2
    memory_gb: float = 0.0
    peaks: bool = True
    threads: int = 0
    seed: int = 0

    def check(self) -> torch.device:
        """The device. Raises InputError for values that make no sense."""
        check_increasing("lengths", self.lengths, at_least=1)
        check_integer("batch", self.batch, at_least=1, example=1)
        check_integer("naive-max-length", self.naive_max_length, at_least=0, example=64)
        check_integer("threads", self.threads, at_least=0, example=1)
        check_integer("seed", self.seed, at_least=0, example=0)
        check_limits(self.seconds_per_point, self.memory_gb)
        return check_device(self.device)


def run(options: ScalingOptions) -> ExperimentResult:
    """Time and memory against length: SSM forms, document 3's loop, attention."""
    device = options.check()
    contest = make_contest(options.batch, device, options.seed)
    race = Race(contest, options)
    n_threads = options.threads or torch.get_num_threads()
    first_scan_s = race.warm_up()
    with threads(n_threads):
        race.times()
        if options.peaks:
            race.measure_peaks()
    metadata = {
        **{key: getattr(options, key) for key in ScalingOptions.__dataclass_fields__},
        "device": str(device),
        "torch": torch.__version__,
        "threads": n_threads,
        "first_scan_s": first_scan_s,
        "parameters": {
            "MambaModel": contest.mamba.num_parameters(),
            "SmallTransformer": contest.transformers["learned"].num_parameters(),
        },
        "measured": what_was_measured(device),
        "tolerance": TOLERANCE,
        "differences": race.differences,
        "skipped": race.skipped,
        **summarise(race.found, options.seed),
    }
    broken = problems(metadata)
    passed = not broken if race.differences else None
    return ExperimentResult(NAME, _details(metadata, broken), metadata, passed)


def what_was_measured(device: torch.device) -> dict[str, str]:
    """How times and peaks were obtained, and what was compared."""
    peak = (
        "the most that PyTorch's allocator held during one call, less what it held "
        "before (torch.cuda.max_memory_allocated)"
        if device.type == "cuda"
        else "growth of the resident size during one call, in one fresh process for "
        "all points (Linux's VmHWM, set back before each)"
    )
    clock = "CUDA events" if device.type == "cuda" else "time.perf_counter"
    return {
        "time": f"{clock}; float32; first call apart (cold), then warm ones in turns "
        "with all contestants of the length; a call below 10 ms follows one that is "
        "not counted",
        "peak": peak,
        "forward": "no gradients",
        "forward + backward": "all gradients, of the next token's cross-entropy for "
        "whole models; no optimiser",
        "step": "one token behind `length` others: the SSM from its state, attention "
        "from a KV cache that is copied at each step (ssm.layers.attention), filled "
        "with random numbers; a prefill costs the forward pass",
        "mixing": "one SSM layer (64 -> 128 states) or one attention layer (128, 4 "
        "heads), projections included",
        "whole": "embedding, mixing, head of 50257; the transformer has 2 blocks with "
        "feed-forward layers",
        "convolution": "a time-invariant SSM of the same sizes: not the same outputs",
        "positions": f"learned below length {LEARNED}, rotary from there on",
    }


# --- measuring ------------------------------------------------------------------------


class Race:
    """What has been found so far: times, peaks, differences, and what was left out."""

    def __init__(self, contest: Contest, options: ScalingOptions) -> None:
        self.contest, self.options = contest, options
        self.found: dict[Point, dict[str, Any]] = {}
        self.differences: list[dict[str, Any]] = []
        self.skipped: list[dict[str, Any]] = []
        self.budget = Budget(options.seconds_per_point)

    def warm_up(self) -> float:
        """Seconds of the first scan here, which loads compiled code and its threads."""
        call = self.contest.call(Point("mixing", "forward", "scan", 1))
        return seconds_of(call, self.contest.device)

    def times(self) -> None:
        """Time every point, length by length."""
        n = len(self.options.lengths)
        with meter("lengths") as show:
            for done, length in enumerate(self.options.lengths):
                self._at(length, partial(show, done, n))

    def _at(self, length: int, tell: Callable[[str], None]) -> None:
        """All points of one length, in turns; then whether outputs are equal."""
        calls = dict(self._calls(points_at(length, self.options.naive_max_length)))
        named = {label(point): call for point, call in calls.items()}
        times, lost = in_turns(named, self.contest.device, self.budget, tell)
        for point in calls:
            if (name := label(point)) in times:
                self.found[point] = {"length": length, **times[name]}
            else:
                self._skip(point, lost[name])
        if Point("mixing", "forward", NAIVE, length) in self.found:
            self.differences.append(differences(self.contest, length))

    def _calls(self, points: Sequence[Point]) -> Iterator[tuple[Point, Call]]:
        limit = usable_bytes(self.options.memory_gb, self.contest.device)
        for point in points:
            needed = self.contest.needed_bytes(point)
            why = short_of_memory(needed, limit) or self._too_slow(point)
            if why is None:
                try:
                    with memory_errors_told():
                        call = self.contest.call(point)
                except ShortOfMemoryError as error:
                    why = str(error)
                else:
                    yield point, call
            if why is not None:
                self._skip(point, why)

    def _too_slow(self, point: Point) -> str | None:
        """Why the call would take too long, from the same contestant's last lengths."""
        if point.passed == "step":
            return None
        past = [
            (p.length, entry["median_s"])
            for p, entry in self.found.items()
            if p[:3] == point[:3]
        ]
        power, seconds = self.contest.power(point), self.options.seconds_per_point
        return too_slow(past, point.length, power, seconds)

    def _skip(self, point: Point, why: str) -> None:
        self.skipped.append({"what": label(point), "at": point.length, "why": why})

    def measure_peaks(self) -> None:
        """Peak bytes of every point that was timed; on a CPU in a fresh process."""
        points = list(self.found)
        request = {
            "batch": self.options.batch,
            "device": self.options.device,
            "seed": self.options.seed,
            "threads": torch.get_num_threads(),
            "points": points,
        }
        if self.contest.device.type == "cuda":
            peaks = _peaks(self.contest, points)
        elif can_see_peaks():
            peaks = in_fresh_process(MODULE, "peaks_here", request)
        else:
            why = "it is read from Linux's /proc"
            self.skipped.append({"what": "peak memory", "at": "all", "why": why})
            return
        told = zip(points, track(peaks, "peak memory", len(points)), strict=False)
        for point, peak in told:
            self.found[point]["peak_bytes"] = peak
        missing = [point for point in points if "peak_bytes" not in self.found[point]]
        for point in missing[:1]:
            why = f"the process ended; {len(missing)} points are without"
            what = f"peak memory, {label(point)}"
            self.skipped.append({"what": what, "at": point.length, "why": why})


def peaks_here(request: dict[str, Any]) -> Iterator[int | None]:
    """Peak bytes of every point of the request, one after the other."""
    device = torch.device(request["device"])
    contest = make_contest(request["batch"], device, request["seed"])
    contest.call(
        Point("mixing", "forward", "scan", 1)
    )()  # threads, before their number
    with threads(request["threads"]):
        yield from _peaks(contest, [Point(*point) for point in request["points"]])


def _peaks(contest: Contest, points: Sequence[Point]) -> Iterator[int | None]:
    """None where memory ran out after all."""
    seen = set()
    for point in points:
        if point[:3] not in seen:  # code, threads and tables that stay
            seen.add(point[:3])
            contest.call(point._replace(length=min(point.length, 64)))()
        peak = None
        with suppress(ShortOfMemoryError), memory_errors_told():
            peak = peak_bytes(contest.call(point), contest.device)
        yield peak


def differences(contest: Contest, length: int) -> dict[str, Any]:
    """How far the forms' outputs are from the naive loop's, of its largest entry."""
    outputs = {}
    with torch.no_grad():
        for form in (NAIVE, *EQUAL_FORMS):
            _, mix, x = contest.mixer(Point("mixing", "forward", form, length))
            outputs[form] = mix(x)
    naive = outputs[NAIVE]
    scale = naive.abs().max()
    off = {form: (outputs[form] - naive).abs().max() / scale for form in EQUAL_FORMS}
    return {"length": length, **{form: float(value) for form, value in off.items()}}


# --- what it comes to -----------------------------------------------------------------


def summarise(found: dict[Point, dict[str, Any]], seed: int) -> dict[str, Any]:
    """Curves with exponents; crossovers of scan and attention; loop over scan."""
    curves = []
    for (scope, passed, form), points in groupby(
        sorted(found, key=lambda p: (order(p), p.length)), key=lambda p: p[:3]
    ):
        entries = [found[point] for point in points]
        lengths = [entry["length"] for entry in entries]
        fit = exponents(lengths, [entry["median_s"] for entry in entries])
        key = {"scope": scope, "pass": passed, "form": form}
        curves.append({**key, "points": entries, "exponents": fit})
    return {
        "curves": curves,
        "crossovers": [
            {"scope": scope, "pass": passed, **_crossover(pair, seed)}
            for scope, passed in FORMS_OF
            if (pair := _pair(curves, scope, passed, ATTENTION))
        ],
        "loop_over_scan": [
            {"scope": scope, "pass": passed, "ratios": _ratios(pair)}
            for scope, passed in FORMS_OF
            if (pair := _pair(curves, scope, passed, NAIVE))
        ],
    }


def order(point: Point) -> tuple[int, int]:
    """The place of a curve in tables and figures."""
    group = (point.scope, point.passed)
    return list(FORMS_OF).index(group), FORMS_OF[group].index(point.form)


def _pair(
    curves: Entries, scope: str, passed: str, other: str
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(the scan's point, the other's) at every length that both have."""
    scan, rival = (curve_of(curves, scope, passed, form) for form in ("scan", other))
    if scan is None or rival is None:
        return []
    by_length = {point["length"]: point for point in rival["points"]}
    return [
        (point, by_length[point["length"]])
        for point in scan["points"]
        if point["length"] in by_length
    ]


def _crossover(
    pair: list[tuple[dict[str, Any], dict[str, Any]]], seed: int
) -> dict[str, Any]:
    scan, rival = ([p["repeats_s"] for p in side] for side in zip(*pair, strict=True))
    lengths = [point["length"] for point, _ in pair]
    return crossover(lengths, scan, rival, random_stream(seed, "bootstrap"))


def _ratios(pair: list[tuple[dict[str, Any], dict[str, Any]]]) -> Entries:
    """How many times as long the other takes: of medians, and between quartiles."""
    return [
        {
            "length": scan["length"],
            "median": rival["median_s"] / scan["median_s"],
            "low": rival["low_s"] / scan["high_s"],
            "high": rival["high_s"] / scan["low_s"],
        }
        for scan, rival in pair
    ]


def problems(metadata: dict[str, Any]) -> list[str]:
    """The claims that a record's metadata breaks; NaN breaks one."""
    tolerance = float(metadata["tolerance"])
    return [
        f"{CLAIM}: {form} is off by {float(entry[form]):.1e} at length "
        f"{entry['length']}"
        for entry in metadata["differences"]
        for form in EQUAL_FORMS
        if not float(entry[form]) <= tolerance
    ]


def _details(metadata: dict[str, Any], broken: list[str]) -> str:
    if broken:
        return f"{len(broken)} claim(s) off; {broken[0]}"
    told = []
    if metadata["differences"]:
        worst = max(e[form] for e in metadata["differences"] for form in EQUAL_FORMS)
        told.append(f"scan and chunked equal the naive loop to {worst:.0e}")
    fits = [
        f"{form} {exponents_text(curve['exponents'])}"
        for form in ("scan", ATTENTION)
        if (curve := curve_of(metadata["curves"], "mixing", "forward", form))
    ]
    told.append(f"mixing alone, forward, time ~ L^p, p [95 %]: {', '.join(fits)}")
    if metadata["crossovers"]:
        first = metadata["crossovers"][0]
        told.append(crossover_text(first, "the scan", "attention"))
    if metadata["skipped"]:
        told.append(f"{len(metadata['skipped'])} points left out")
    return "; ".join(told)


PICTURES = (Picture(draw, "outputs/scaling_benchmark.png", by_default=True),)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: tables, the picture, the run log."""
    return command_with_tables(run, tables, pictures=PICTURES, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
