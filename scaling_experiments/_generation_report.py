"""Tables and picture of benchmark_generation, made of a record's metadata alone."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from experiments.common import COLORS, MARKERS, ExperimentResult, new_figure
from scaling_experiments._fits import crossover_text, slope_text
from scaling_experiments._report import (
    errorbars,
    finish_axes,
    milliseconds,
    skipped_lines,
    table,
)
from scaling_experiments._timing import Budget

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAMBA, TRANSFORMER = "mamba", "transformer"
Entry = dict[str, Any]
# Document 4, 19.6.2: (what, context) -> Mamba, transformer, as they stand there.
PUBLISHED = {
    ("inference", 1024): ("1.0x", "1.0x"),
    ("inference", 8192): ("1.0x", "2.5x (KV cache)"),
    ("inference", 65536): ("1.0x", "10x+ (KV cache)"),
    ("training", 1024): ("0.9x", "1.0x"),
    ("training", 8192): ("0.7x", "1.0x"),
    ("training", 65536): ("0.5x", "3.0x (memory bound)"),
}
NOT_SHOWN = """\
Document 4's models have 3 billion parameters and its table no unit: ours is read as
time per token, in units of the transformer's at 1K. What this does not show: weights
that learned something, 16-bit numbers, models whose matrix products outweigh the
interpreter's share of a step (much of it here), or other machines. Intervals say how
far calls of this run differed, not how far another run would."""


def curve_of(curves: Sequence[Entry], name: str, batch: int) -> Entry | None:
    """The curve of a model and a batch, if any of its points was measured."""
    return next((c for c in curves if (c["model"], c["batch"]) == (name, batch)), None)


def crossover_line(entry: Entry) -> str:
    """``batch 1: mamba is faster from about 900 on``."""
    return f"batch {entry['batch']}: {crossover_text(entry, MAMBA, TRANSFORMER)}"


# --- tables ---------------------------------------------------------------------------


def tables(metadata: Entry) -> list[Any]:
    """Steps, prefills and training; document 4's table beside ours."""
    models = ", ".join(
        f"{name} ({made['layers']} blocks, {made['parameters']:,} parameters)"
        for name, made in metadata["models"].items()
    )
    parts: list[Any] = [
        f"{models}; d_model {metadata['d_model']}, vocabulary "
        f"{metadata['vocabulary']}, {metadata['device']}, "
        f"{metadata['threads']} threads, float32. Milliseconds: "
        f"median of warm calls ± half of what lies between the quartiles; * fewer than "
        f"{Budget(1).at_least} calls",
        *(_step_table(metadata, batch) for batch in metadata["batches"]),
        _sequence_table("prefill, batch 1 (ms)", metadata["prefills"], "context"),
        _sequence_table("training, batch 1 (ms)", metadata["trainings"], "length"),
        _published_table(metadata),
        *skipped_lines(metadata["skipped"]),
    ]
    parts += [
        f"{curve['model']}, batch {curve['batch']}: per 1000 tokens of context "
        f"{slope_text(curve['slope_s'], 1e6, '.4f')} ms and "
        f"{slope_text(curve['slope_bytes'], 1e3, ',.0f')} bytes (95 %)"
        for curve in metadata["curves"]
    ]
    parts += [crossover_line(entry) for entry in metadata["crossovers"]]
    return [*parts, NOT_SHOWN]


def _step_table(metadata: Entry, batch: int) -> Any:
    curves = [curve_of(metadata["curves"], n, batch) for n in (MAMBA, TRANSFORMER)]
    rows = []
    for context in metadata["contexts"]:
        row = [str(context)]
        for curve in curves:
            point = _at(curve["points"] if curve else [], context)
            first = f"{1e3 * point['cold_s']:.1f}" if point else "-"
            size = f"{point['bytes'] / 1e6:.2f}" if point else "-"
            row += [milliseconds(point, Budget(1).at_least), first, size]
        rows.append(row)
    headings = ["context"]
    for name in (MAMBA, TRANSFORMER):
        headings += [f"{name} (ms)", "first call", "cache (MB)"]
    return table(f"one token behind a context, batch {batch}", headings, rows)


def _sequence_table(title: str, entries: Sequence[Entry], what: str) -> Any:
    rows = []
    for context in sorted({entry["context"] for entry in entries}):
        row = [str(context)]
        for name in (MAMBA, TRANSFORMER):
            found = _at([e for e in entries if e["model"] == name], context)
            per_token = 1e6 * found["median_s"] / context if found else None
            row += [
                milliseconds(found, Budget(1).at_least),
                f"{found['cold_s'] * 1e3:.1f}" if found else "-",
                f"{per_token:.1f}" if per_token else "-",
            ]
        rows.append(row)
    headings = [what]
    for name in (MAMBA, TRANSFORMER):
        headings += [name, "first call", "µs a token"]
    return table(title, headings, rows)


def _published_table(metadata: Entry) -> Any:
    """Times per token over the transformer's at 1K: batch of the first curve."""
    batch = metadata["batches"][0]
    times = {
        ("inference", curve["model"]): {
            point["context"]: point["median_s"] for point in curve["points"]
        }
        for curve in metadata["curves"]
        if curve["batch"] == batch
    }
    for entry in metadata["trainings"]:
        per_length = times.setdefault(("training", entry["model"]), {})
        per_length[entry["context"]] = entry["per_token_s"]
    rows = []
    for (what, context), published in PUBLISHED.items():
        unit = times.get((what, TRANSFORMER), {}).get(1024)
        ours = [
            times.get((what, name), {}).get(context) for name in (MAMBA, TRANSFORMER)
        ]
        cells = [f"{s / unit:.2f}" if s and unit else "-" for s in ours]
        rows.append([f"{what} at {context // 1024}K", *published, *cells])
    headings = ["", "doc. 4 Mamba", "doc. 4 transformer", "our mamba"]
    title = "document 4's table, which gives no unit, beside ours (time per token)"
    return table(title, [*headings, "our transformer"], rows)


def _at(points: Sequence[Entry], context: int) -> Entry | None:
    return next((point for point in points if point["context"] == context), None)


# --- picture --------------------------------------------------------------------------


def draw(results: list[ExperimentResult]) -> "Figure":
    """Time of a token and bytes of the cache against context; training per token."""
    metadata = results[-1].metadata
    figure, axes = new_figure(1, 3)
    times, sizes, training = axes[0]
    for curve in metadata["curves"]:
        style = _style(metadata, curve)
        x = [point["context"] for point in curve["points"]]
        errorbars(times, x, curve["points"], 1e3, style)
        megabytes = [point["bytes"] / 1e6 for point in curve["points"]]
        sizes.plot(x, megabytes, **style)
    for name in (MAMBA, TRANSFORMER):
        entries = [e for e in metadata["trainings"] if e["model"] == name]
        style = {**_style(metadata, {"model": name, "batch": None}), "label": name}
        scaled = [
            {k: e[k] / e["context"] for k in ("median_s", "low_s", "high_s")}
            for e in entries
        ]
        errorbars(training, [e["context"] for e in entries], scaled, 1e6, style)
    times.set(ylabel="time of the next token (ms)", title="decoding: one more token")
    sizes.set(ylabel="cache (MB)", title="what generation carries along")
    training.set(ylabel="µs per token", title="training, forward + backward")
    for ax in (times, sizes):
        finish_axes(ax, metadata["contexts"], "context (tokens)")
    finish_axes(training, metadata["train_lengths"], "sequence length (tokens)")
    lines = [crossover_line(entry) for entry in metadata["crossovers"]]
    device = metadata["device"]
    figure.suptitle(f"One more token ({device}, float32): {'; '.join(lines)}")
    return figure


def _style(metadata: Entry, curve: Entry) -> dict[str, Any]:
    """A colour for each model, a line for each batch."""
    which = (MAMBA, TRANSFORMER).index(curve["model"])
    batches = list(metadata["batches"])
    place = batches.index(curve["batch"]) if curve["batch"] in batches else 0
    return {
        "color": COLORS[which],
        "marker": MARKERS[which],
        "linestyle": ("-", "--", ":", "-.")[place % 4],
        "label": f"{curve['model']}, batch {curve['batch']}",
    }
