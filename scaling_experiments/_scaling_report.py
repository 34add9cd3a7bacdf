"""Tables and picture of benchmark_scaling, made of a record's metadata alone."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from experiments.common import COLORS, MARKERS, ExperimentResult, new_figure
from scaling_experiments._contestants import (
    ATTENTION,
    BOTH_WAYS,
    FORMS_OF,
    NAIVE,
    SSM_FORMS,
    group_label,
    shown,
)
from scaling_experiments._fits import crossover_text, exponents_text
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

# Document 3: length -> seconds of its Mamba, of its transformer, and the speedup.
PUBLISHED = {
    64: (0.004, 0.005, 1.2),
    128: (0.007, 0.009, 1.3),
    256: (0.012, 0.013, 1.1),
    512: (0.022, 0.030, 1.4),
    1024: (0.049, 0.087, 1.8),
}
NOT_SHOWN = """\
What this does not show: 16-bit numbers, trained weights, wider models (a wider head or
more layers move every crossover), or another machine. Quartiles and bootstrap intervals
say how far calls of this run differed, not how far another run would. Document 3 states
neither its device nor its batch; its two columns are to be compared by their ratio."""


Entries = list[dict[str, Any]]


def curve_of(
    curves: Sequence[dict[str, Any]], scope: str, passed: str, form: str
) -> dict[str, Any] | None:
    """The curve of that name, if any of its points was measured."""
    key = (scope, passed, form)
    named = (c for c in curves if (c["scope"], c["pass"], c["form"]) == key)
    return next(named, None)


# --- tables ---------------------------------------------------------------------------


def tables(metadata: dict[str, Any]) -> list[Any]:
    """Every time with its spread, document 3's beside ours, and the findings."""
    curves = metadata["curves"]
    parts: list[Any] = [
        f"{metadata['device']}, {metadata['threads']} threads, batch "
        f"{metadata['batch']}, float32. Milliseconds: median of warm calls ± half of "
        f"what lies between the quartiles; * fewer than {Budget(1).at_least} calls"
    ]
    parts += [_time_table(metadata, *group) for group in FORMS_OF]
    parts += [
        _cold_table(metadata),
        f"the very first scan here, which loads compiled code: "
        f"{metadata['first_scan_s']:.1f} s",
    ]
    parts += [_published_table(curves)]
    parts += skipped_lines(metadata["skipped"])
    for entry in metadata["loop_over_scan"]:
        ratios = ", ".join(
            f"{r['median']:.1f} [{r['low']:.1f}, {r['high']:.1f}] at {r['length']}"
            for r in entry["ratios"]
        )
        group = group_label((entry["scope"], entry["pass"]))
        parts.append(f"{group}: naive_loop over scan: {ratios}")
    for entry in metadata["crossovers"]:
        told = crossover_text(entry, "the SSM's scan", "attention")
        group = group_label((entry["scope"], entry["pass"]))
        parts.append(f"{group}: {told}")
    return [*parts, NOT_SHOWN]


def _time_table(metadata: dict[str, Any], scope: str, passed: str) -> Any:
    forms = FORMS_OF[scope, passed]
    curves = [curve_of(metadata["curves"], scope, passed, form) for form in forms]
    rows = []
    for length in metadata["lengths"]:
        cells = [milliseconds(_point(c, length), Budget(1).at_least) for c in curves]
        rows.append([str(length), *cells])
    fits = [curve["exponents"] if curve else None for curve in curves]
    rows.append(["p of L^p", *(exponents_text(fit) if fit else "-" for fit in fits)])
    local = [fit["local"] if fit else [] for fit in fits]
    rows.append(["its last step", *(f"{p[-1]:.2f}" if p else "-" for p in local)])
    title = f"{group_label((scope, passed))} (p: upper half of lengths)"
    return table(title, ["length", *(shown(form, scope) for form in forms)], rows)


def _cold_table(metadata: dict[str, Any]) -> Any:
    """First calls at the shortest length and at the longest that was timed."""
    rows = []
    for scope, passed in FORMS_OF:
        cells = []
        for form in (*SSM_FORMS, ATTENTION):
            curve = curve_of(metadata["curves"], scope, passed, form)
            points = curve["points"] if curve else []
            ends = [f"{1e3 * points[i]['cold_s']:.1f}" for i in (0, -1) if points]
            cells.append(" .. ".join(ends) or "-")
        rows.append([f"{scope}, {passed}", *cells])
    title = "first calls (ms): at the shortest length .. at the longest that was timed"
    return table(title, ["", *SSM_FORMS, ATTENTION], rows)


def _point(curve: dict[str, Any] | None, length: int) -> dict[str, Any] | None:
    points = curve["points"] if curve else []
    return next((point for point in points if point["length"] == length), None)


def _published_table(curves: Entries) -> Any:
    """Document 3's seconds and speedup, and ours: its loop's, and with our scan."""
    rows = []
    ours = [curve_of(curves, "whole", "forward", f) for f in (NAIVE, "scan", ATTENTION)]
    for length, (mamba, transformer, speedup) in PUBLISHED.items():
        points = [_point(curve, length) for curve in ours]
        loop, scan, attention = (p["median_s"] if p else None for p in points)
        rows.append(
            [
                str(length),
                f"{mamba:.3f}",
                f"{transformer:.3f}",
                f"{speedup:.1f}",
                *(f"{s:.4f}" if s else "-" for s in (loop, scan, attention)),
                *(
                    f"{attention / s:.2f}" if s and attention else "-"
                    for s in (loop, scan)
                ),
            ]
        )
    headings = ["length", "doc. 3 Mamba (s)", "Transf. (s)", "speedup"]
    headings += ["our port of its loop (s)", "scan (s)", "Transf. (s)"]
    headings += ["speedup, loop", "speedup, scan"]
    return table("document 3's table beside ours: whole model, forward", headings, rows)


# --- picture --------------------------------------------------------------------------


def draw(results: list[ExperimentResult]) -> "Figure":
    """Time against length for layers and whole models, and the memory of both."""
    metadata = results[-1].metadata
    figure, axes = new_figure(2, 3)
    panels = {
        ("mixing", "forward"): axes[0, 0],
        ("mixing", "forward + backward"): axes[0, 1],
        ("whole", "forward"): axes[1, 0],
        ("whole", "forward + backward"): axes[1, 1],
    }
    for (scope, passed), ax in panels.items():
        _draw_times(ax, metadata, scope, passed)
        ax.set_title(group_label((scope, passed)))
    _draw_peaks(axes[0, 2], metadata)
    _draw_steps(axes[1, 2], metadata)
    for ax in axes.flat:
        finish_axes(ax, metadata["lengths"], "sequence length L (tokens)")
    figure.suptitle(_finding(metadata))
    return figure


COLOR_OF = dict(zip((*SSM_FORMS, ATTENTION), (0, 5, 2, 3, 4, 1), strict=True))
STYLES = {
    form: {"color": COLORS[color], "marker": MARKERS[i]}
    for i, (form, color) in enumerate(COLOR_OF.items())
}
SMALLEST_PEAK = 1e6  # bytes: below, what the process kept from before hides the growth


def _draw_times(ax: Any, metadata: dict[str, Any], scope: str, passed: str) -> None:
    for form in FORMS_OF[scope, passed]:
        if curve := curve_of(metadata["curves"], scope, passed, form):
            exponent = curve["exponents"]["exponent"]
            law = "" if exponent is None else f": $L^{{{exponent:.2f}}}$"
            _draw_curve(ax, curve, STYLES[form], f"{shown(form, scope)}{law}")
    ax.set_ylabel("time per call (ms), median and quartiles")


def _draw_steps(ax: Any, metadata: dict[str, Any]) -> None:
    for scope, line in (("mixing", "-"), ("whole", "--")):
        for form in FORMS_OF[scope, "step"]:
            if curve := curve_of(metadata["curves"], scope, "step", form):
                style = {**STYLES[form], "linestyle": line}
                name = shown(form, scope) + (", whole" if scope == "whole" else "")
                _draw_curve(ax, curve, style, name)
    ax.set(ylabel="time per token (ms)", title="one token behind L others, KV cache")


def _draw_curve(
    ax: Any, curve: dict[str, Any], style: dict[str, Any], name: str
) -> None:
    lengths = [point["length"] for point in curve["points"]]
    errorbars(ax, lengths, curve["points"], 1e3, {**style, "label": name})


def _draw_peaks(ax: Any, metadata: dict[str, Any]) -> None:
    for scope, line in (("mixing", "-"), ("whole", "--")):
        for form in FORMS_OF[scope, BOTH_WAYS]:
            curve = curve_of(metadata["curves"], scope, BOTH_WAYS, form)
            points = [
                (point["length"], point["peak_bytes"] / 1e6)
                for point in (curve["points"] if curve else [])
                if (point.get("peak_bytes") or 0) >= SMALLEST_PEAK
            ]
            if points:
                name = shown(form, scope) + (", whole" if scope == "whole" else "")
                x, y = zip(*points, strict=True)
                ax.plot(x, y, linestyle=line, label=name, **STYLES[form])
    ax.set(ylabel="peak memory of a call (MB)", title="memory, forward + backward")


def _finding(metadata: dict[str, Any]) -> str:
    """The title: exponents of the mixing alone, and where the curves cross."""
    told = []
    for form in ("scan", ATTENTION):
        curve = curve_of(metadata["curves"], "mixing", "forward", form)
        if curve and curve["exponents"]["exponent"] is not None:
            told.append(f"{form} ~ L^{curve['exponents']['exponent']:.2f}")
    crossings = [
        crossover_text(entry, "the scan", "attention")
        for entry in metadata["crossovers"][:1]
    ]
    where = f"{metadata['device']}, batch {metadata['batch']}, float32"
    return f"Mixing alone, forward: {', '.join(told)}; {'; '.join(crossings)} ({where})"
