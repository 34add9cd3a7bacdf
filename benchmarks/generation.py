"""What one more token costs: with Mamba the same at every context, with attention more.

    python -m benchmarks.generation

Two language models with about equally many parameters, generating on this machine's
CPU in one process:

* long generations: the median time of late tokens (1800 to 2000 of 2000) over that of
  early ones (100 to 300), and the bytes of the cache at every token. Two generations of
  the same model, one at its late and one at its early tokens, take turns token by
  token: in one generation the two windows lie seconds apart, in which this machine's
  speed changes by more than a tenth;
* one step at given contexts: the prompt is read in one call (timed apart, "prefill"),
  then the next token is timed, again and again from that same cache, so that the
  context is exact. Models and contexts take turns, so that a slow spell of the machine
  falls on all of them, each with an untimed step ahead of the timed one. Slopes are
  least squares of the medians on the context.

The claim judged is that Mamba's cache keeps its size; times are reported, not judged.
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from experiments.common import (
    COLORS,
    EXIT_FAILED_CLAIM,
    MARKERS,
    ExperimentResult,
    Parameter,
    Picture,
    check_increasing,
    check_integer,
    check_picture_path,
    new_figure,
    one_line_errors,
    parameters_of,
    parse,
    progress_shown,
    save_figure,
    to_json,
    track,
    unwritable,
)
from scaling_experiments._fits import fit_line
from scaling_experiments._timing import threads as using_threads
from ssm.models.cache import MambaCache
from ssm.models.config import SequenceLMConfig
from ssm.models.generate import generate_stream
from ssm.models.lm import SequenceLM

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VOCABULARY = 256
PROMPT = 16  # tokens before a long generation
WARM_UP = 20  # tokens, untimed, before the first of them
# Equal parts of the generation: tokens 100-300 and 1800-2000 of 2000.
EARLY, LATE = (0.05, 0.15), (0.9, 1.0)
FIXED = "mamba"  # the model whose cache must keep its size
NOT_SHOWN = """\
What this does not show: GPUs, batches, trained weights, 16-bit numbers, or models of a
useful size, whose matrix products outweigh the interpreter's share of a step (much of
it here). Attention's cache, which grows, is copied at each step: one allocated
beforehand would have a smaller slope, not a slope of zero. Intervals say how straight
the lines are, not how far another machine would differ."""


def models(d_model: int, n_layers: int, seed: int) -> dict[str, SequenceLM]:
    """Mamba with twice as many blocks as the transformer: about equal parameters."""
    configs = {
        "mamba": SequenceLMConfig(VOCABULARY, d_model, 2 * n_layers, "mamba"),
        "transformer": SequenceLMConfig(
            VOCABULARY,
            d_model,
            n_layers,
            "transformer",
            mixer={"attention": {"positions": "rotary"}},
        ),
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return {name: SequenceLM(config).eval() for name, config in configs.items()}


# --- one long generation --------------------------------------------------------------


def long_generation(
    model: SequenceLM, n_tokens: int
) -> tuple[list[float], list[float], list[int]]:
    """Seconds of early and of late tokens, in turns; the cache bytes of each token."""
    early_window, late_window = (window(span, n_tokens) for span in (EARLY, LATE))
    late, early = generation(model, n_tokens), generation(model, n_tokens)
    sizes = [next(late)[1] for _ in range(late_window.start)]
    for _ in range(early_window.start):
        next(early)
    early_s, late_s = [], []
    for _ in range(late_window.start, late_window.stop):
        early_s.append(next(early)[0])
        seconds, size = next(late)
        late_s.append(seconds)
        sizes.append(size)
    return early_s, late_s, sizes


def generation(model: SequenceLM, n_tokens: int) -> Iterator[tuple[float, int]]:
    """Seconds and cache bytes of every token but the first, which reads the prompt."""
    prompt = torch.arange(PROMPT)[None] % VOCABULARY
    steps = generate_stream(model, prompt, n_tokens + 1, greedy=True)
    next(steps)
    for _ in range(n_tokens):
        start = time.perf_counter()
        step = next(steps)
        yield time.perf_counter() - start, step.state.bytes


def window(span: tuple[float, float], n_tokens: int) -> slice:
    """The tokens of this part of the generation."""
    return slice(*(round(part * n_tokens) for part in span))


def late_over_early(
    lms: dict[str, SequenceLM], n_tokens: int, runs: int
) -> list[dict[str, Any]]:
    """For every model the early and late times and cache sizes of ``runs`` runs."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in lms}
    for _ in track(range(runs), "long generations"):
        for name, model in lms.items():
            early_s, late_s, sizes = long_generation(model, n_tokens)
            early, late = float(np.median(early_s)), float(np.median(late_s))
            run = {"early_s": early, "late_s": late, "ratio": late / early}
            run |= {"bytes_first": sizes[0], "bytes_last": sizes[-1]}
            found[name].append(run | {"bytes_differ": len(set(sizes)) > 1})
    return [{"model": name, "runs": list_} for name, list_ in found.items()]


# --- one step at a context ------------------------------------------------------------


def prefill(model: SequenceLM, context: int, seed: int) -> tuple[MambaCache, float]:
    """The cache behind ``context`` random tokens, and the seconds that it took."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (1, context), generator=generator)
    start = time.perf_counter()
    cache = model(tokens, last_only=True).state
    return cache, time.perf_counter() - start


def at_contexts(
    lms: dict[str, SequenceLM], contexts: Sequence[int], steps: int, seed: int
) -> list[dict[str, Any]]:
    """For every model the times of a step, and the cache's bytes, at each context."""
    pairs = [(name, context) for name in lms for context in contexts]
    caches, prefills = {}, {}
    for name, context in track(pairs, "prefill"):
        made = prefill(lms[name], context, seed)
        caches[name, context], prefills[name, context] = made
    seconds: dict[tuple[str, int], list[float]] = {pair: [] for pair in pairs}
    token = torch.zeros(1, dtype=torch.int64)
    for _ in track(range(steps), "steps"):
        for name, context in pairs:
            lms[name].step(
                token, caches[name, context]
            )  # fetches what others drove out
            start = time.perf_counter()
            lms[name].step(token, caches[name, context])
            seconds[name, context].append(time.perf_counter() - start)
    curves = []
    for name in lms:
        points = [
            {
                "context": context,
                **_spread(seconds[name, context]),
                "prefill_s": prefills[name, context],
                "bytes": caches[name, context].bytes,
            }
            for context in contexts
        ]
        curves.append({"model": name, "points": points, **slopes(points)})
    return curves


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    low, median, high = np.percentile(seconds, (25, 50, 75))
    return {"median_s": float(median), "low_s": float(low), "high_s": float(high)}


def slopes(points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Seconds and bytes per token of context."""
    contexts = [point["context"] for point in points]
    return {
        f"slope_{kind}": fit_line(contexts, [point[kind] for point in points])
        for kind in ("median_s", "bytes")
    }


# --- the report -----------------------------------------------------------------------


def benchmark(
    tokens: int = 2000,
    contexts: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384),
    runs: int = 5,
    steps: int = 48,
    d_model: int = 128,
    n_layers: int = 2,
    threads: int = 1,
    seed: int = 0,
) -> dict[str, Any]:
    """Time generation with Mamba and with attention; watch the size of their caches.

    Args:
        tokens: length of the long generations
        contexts: tokens in the cache when a step is timed; three or more for a slope
        runs: long generations by each model
        steps: timed steps at each context
        d_model: width of both models
        n_layers: blocks of the transformer; Mamba has twice as many
        threads: one token is too little work to share, and where other programs run,
            threads that wait for each other cost milliseconds each time
        seed: draws weights and prompts
    """
    check_integer("tokens", tokens, at_least=40, example=2000)
    check_increasing("contexts", contexts, at_least=1)
    sizes = {"runs": runs, "steps": steps, "d-model": d_model, "n-layers": n_layers}
    for name, value in (sizes | {"threads": threads}).items():
        check_integer(name, value, at_least=1, example=5)
    lms = models(d_model, n_layers, seed)
    with torch.inference_mode():
        for model in lms.values():
            long_generation(model, WARM_UP)
        with using_threads(threads):
            long = late_over_early(lms, tokens, runs)
            curves = at_contexts(lms, contexts, steps, seed)
    return {
        "tokens": tokens,
        "steps": steps,
        "d_model": d_model,
        "seed": seed,
        "torch": torch.__version__,
        "threads": threads,
        "models": {
            name: {"layers": len(lm.layers), "parameters": lm.num_parameters()}
            for name, lm in lms.items()
        },
        "windows": {
            name: [window(span, tokens).start, window(span, tokens).stop]
            for name, span in (("early", EARLY), ("late", LATE))
        },
        "long_generation": long,
        "at_contexts": curves,
    }


def problems(report: dict[str, Any]) -> list[str]:
    """Where the cache of fixed size was not of fixed size."""
    runs, points = (
        next(entry[part] for entry in report[kind] if entry["model"] == FIXED)
        for kind, part in (("long_generation", "runs"), ("at_contexts", "points"))
    )
    found = []
    if any(run["bytes_differ"] for run in runs):
        found.append(f"the cache of {FIXED} changed size during a generation")
    sizes = {point["bytes"] for point in points} | {run["bytes_last"] for run in runs}
    if len(sizes) > 1:
        found.append(f"the cache of {FIXED} has a size for each context: {sizes}")
    return found


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    names = ", ".join(
        f"{name} ({made['layers']} blocks, {made['parameters']:,} parameters)"
        for name, made in report["models"].items()
    )
    lines = [
        f"{names}; d_model {report['d_model']}, vocabulary {VOCABULARY}, batch 1, "
        f"float32, threads: {report['threads']}",
        "",
        *_long_lines(report),
        "",
        *_context_lines(report),
        "",
        NOT_SHOWN,
    ]
    return "\n".join(lines)


def _long_lines(report: dict[str, Any]) -> list[str]:
    (first, second), (third, last) = report["windows"].values()
    lines = [
        f"{report['tokens']} tokens: median ms of tokens {first}-{second} and of "
        f"{third}-{last}, run by run",
        f"{'model':<13}{'early':>9}{'late':>9}{'late/early':>12}{'cache bytes':>26}",
    ]
    for entry in report["long_generation"]:
        for run in entry["runs"]:
            sizes = f"{run['bytes_first']:,}"
            sizes += f" .. {run['bytes_last']:,}" if run["bytes_differ"] else ", always"
            lines.append(
                f"{entry['model']:<13}{1e3 * run['early_s']:>9.3f}"
                f"{1e3 * run['late_s']:>9.3f}{run['ratio']:>12.3f}{sizes:>26}"
            )
        ratios = [run["ratio"] for run in entry["runs"]]
        lines.append(
            f"  late/early: median {np.median(ratios):.3f}, "
            f"{min(ratios):.3f} to {max(ratios):.3f}"
        )
    return lines


def _context_lines(report: dict[str, Any]) -> list[str]:
    lines = [
        f"one step at a context: median and quartiles of {report['steps']} (ms)",
        f"{'model':<13}{'context':>8}{'median':>9}{'quartiles':>18}"
        f"{'cache bytes':>14}{'prefill (s)':>13}",
    ]
    for curve in report["at_contexts"]:
        for point in curve["points"]:
            low, median, high = (
                1e3 * point[kind] for kind in ("low_s", "median_s", "high_s")
            )
            spread = f"{low:.3f} .. {high:.3f}"
            lines.append(
                f"{curve['model']:<13}{point['context']:>8}{median:>9.3f}{spread:>18}"
                f"{point['bytes']:>14,}{point['prefill_s']:>13.3f}"
            )
        lines.append(
            f"  per 1000 tokens of context [95 %]: "
            f"{slope_text(curve['slope_median_s'], 1e6, '.4f')} ms, "
            f"{slope_text(curve['slope_bytes'], 1e3, ',.0f')} bytes"
        )
    return lines


def slope_text(fit: dict[str, Any], unit: float, spec: str) -> str:
    """``0.12 [0.10, 0.14]``; ``-`` where there are too few contexts."""
    if fit["slope"] is None:
        return "-"
    slope, low, high = (unit * x for x in (fit["slope"], *fit["ci95"]))
    return f"{slope:{spec}} [{low:{spec}}, {high:{spec}}]"


def draw(results: list[ExperimentResult]) -> "Figure":
    """Time of a step, and bytes of the cache, against the context."""
    (result,) = results
    report = result.metadata
    figure, ((times, sizes),) = new_figure(1, 2)
    for curve, color, marker in zip(
        report["at_contexts"], COLORS, MARKERS, strict=False
    ):
        points = curve["points"]
        contexts = [point["context"] for point in points]
        low, ms, high = (
            np.array([1e3 * point[kind] for point in points])
            for kind in ("low_s", "median_s", "high_s")
        )
        label = f"{curve['model']}, {report['models'][curve['model']]['layers']} blocks"
        style: Any = {"color": color, "marker": marker, "label": label}
        times.errorbar(contexts, ms, [ms - low, high - ms], capsize=2, **style)
        sizes.plot(contexts, [point["bytes"] for point in points], **style)
    times.set(
        xlabel="tokens of context",
        ylabel="time of the next token (ms)",
        title=f"median and quartiles of {report['steps']} steps",
        ylim=(0, None),
    )
    sizes.set(
        xlabel="tokens of context",
        ylabel="bytes of the cache",
        title="what generation carries along",
        xscale="log",
        yscale="log",
    )
    for ax in (times, sizes):
        ax.legend(loc="upper left")
    return figure


def store(report: dict[str, Any], path: str) -> None:
    """Write the report as JSON. Raises InputError if it cannot be written."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(to_json(report), allow_nan=False) + "\n")
    except OSError as error:
        raise unwritable(path, error) from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print the table, draw the picture, store the report where asked.

    Exit status 1 if Mamba's cache changes its size; times are not judged.
    """
    picture = Picture(draw, "outputs/generation.png")
    parameters = [
        *parameters_of(benchmark),
        Parameter("picture", str, picture.path, "Where the picture goes; '' for none."),
        Parameter("json", str, "", "Write the whole report here, as JSON."),
    ]
    summary = (benchmark.__doc__ or "").partition("\n")[0]
    values = parse("python -m benchmarks.generation", summary, parameters, argv)
    picture_path, json_path = values.pop("picture"), values.pop("json")
    with one_line_errors():
        if picture_path:  # fail before the work, not after it
            check_picture_path(picture_path)
        with progress_shown():
            report = benchmark(**values)
        print(table(report))
        if json_path:
            store(report, json_path)
        if picture_path:
            result = ExperimentResult("generation", "", report, not problems(report))
            save_figure(picture.render([result]), picture_path)
            print(f"saved {picture_path}", file=sys.stderr)
    for problem in problems(report):
        print(f"FAILED {problem}")
    return EXIT_FAILED_CLAIM if problems(report) else 0


if __name__ == "__main__":
    sys.exit(main())
