"""What attention costs: a chapter's table, the whole count, and what is measured.

The chapter's table has two columns, and each stands for less than it seems to:

    memory  4 n^2      the scores of one head, in float32, of one sequence and layer
    FLOPs   2 n^2 d    one of the two products Q K^T and P V, unmasked, d = 1024

The whole count of a causal layer of H heads, d = H P, a multiply-add being two:

    products      Q K^T and P V        4 n^2 d unmasked, 2 n (n + 1) d within the mask
    softmax       6 an entry           scale, maximum, subtract, exp, sum, divide
    projections   q, k, v and output   8 n d^2

So 2 n^2 d is also, but for 2 n d, what both products take within the mask; a kernel
that does not skip the other half takes twice that. The table's "billion" is 2^30 and
its "trillion" 2^40: in decimal they are 7 and 10 % more. And its "a trillion
operations" for a million tokens is n^2, the number of entries: each takes 2 d.

Beside it a Mamba block (E = 2 d channels, N states, R = d / 16), in which all is linear
in n: projections 2 n (2 d E + E (R + 2 N) + R E + E d), the short convolution 8 n E,
the scan n (7 E N + 4 E). Left out: activations and gates, less than 12 n E.

Counted and measured where the scores fit in memory, at other lengths computed. Products
are counted by ``FlopCounterMode``, the rest by :class:`Arithmetic`, both on what is run
here: :func:`attention`, whole and in blocks of rows that stop at the diagonal, and the
naive selective scan. Bytes are those of PyTorch's allocator. Counts must equal the
formulas exactly, and so must the bytes of the materialised form.

Sources: Vaswani et al. (2017), section 3.2; Dao et al., "FlashAttention"
(arXiv:2205.14135), section 3.1, for attention without the n x n matrix; Gu & Dao
(arXiv:2312.00752), section 3.4, for the block.
"""

import contextlib
import functools
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.profiler import profile
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from experiments.common import (
    COLORS,
    ExperimentResult,
    Picture,
    bad_input,
    check_increasing,
    check_integer,
    command_line,
    new_figure,
    track,
)
from ssm.layers.attention import Attention
from ssm.layers.mamba import Mamba
from ssm.ops.selective_scan.naive import selective_scan_loop

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "attention_cost"
CLAIM = "the counts and bytes of what is run are those of the formulas"
SOURCE_D = 1024
SOURCE = {  # length: bytes and operations as the chapter prints them
    1024: ("4 MB", "2 billion"),
    4096: ("64 MB", "32 billion"),
    16384: ("1 GB", "512 billion"),
    65536: ("16 GB", "8 trillion"),
    262144: ("256 GB", "128 trillion"),
}
UNITS = {"MB": 2**20, "GB": 2**30, "billion": 2**30, "trillion": 2**40}
PER_ENTRY = 6  # operations of the softmax on one score
CONV_WIDTH = 4  # of the Mamba block
FLOAT = 4  # bytes
MILLION = 10**6
LARGEST = 2**24

aten = torch.ops.aten
ELEMENTWISE = {
    *(aten.add, aten.add_, aten.mul, aten.mul_, aten.sub, aten.sub_),
    *(aten.div, aten.div_, aten.exp, aten.exp_),
}
REDUCTIONS = {aten.amax, aten.sum}
Counts = dict[str, int]


class Arithmetic(TorchDispatchMode):
    """Counts elementwise work: one an entry of the result, of a reduction's input.

    Knows the operations of ``ELEMENTWISE`` and ``REDUCTIONS``; copies, views and
    products (which ``FlopCounterMode`` counts) are none of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in ELEMENTWISE:
            self.total += result.numel()
        elif func.overloadpacket in REDUCTIONS:
            self.total += args[0].numel()
        return result


def attention(
    q: Float[Tensor, "B H n P"],
    k: Float[Tensor, "B H n P"],
    v: Float[Tensor, "B H n P"],
    block: int,
) -> Float[Tensor, "B H n P"]:
    """y_t = sum_{s<=t} softmax_s(q_t k_s / sqrt(P)) v_s, ``block`` rows at a time.

    The rows of a block see the columns up to its end, so that blocks far smaller than n
    do half the work; ``block`` = n is the whole n x n matrix, once, changed in place.
    """
    n, P = q.shape[-2:]
    mask = q.new_full((block, block), -math.inf).triu_(1)
    y = torch.empty_like(q)
    for start in range(0, n, block):
        stop = min(start + block, n)
        rows = stop - start
        scores = q[..., start:stop, :] @ k[..., :stop, :].mT
        scores.mul_(P**-0.5)
        scores[..., start:].add_(mask[:rows, :rows])
        scores.sub_(scores.amax(-1, keepdim=True)).exp_()
        scores.div_(scores.sum(-1, keepdim=True))
        y[..., start:stop, :] = scores @ v[..., :stop, :]
    return y


@dataclass(frozen=True)
class Sizes:
    """d channels in H heads; the Mamba block beside them has N states."""

    d: int
    H: int
    N: int

    @property
    def E(self) -> int:
        """Channels inside the Mamba block."""
        return 2 * self.d

    @property
    def R(self) -> int:
        """Rank of the Mamba block's step sizes."""
        return math.ceil(self.d / 16)


# --- formulas -------------------------------------------------------------------------


def entries(n: int, block: int) -> int:
    """Scores that :func:`attention` forms in one head: n^2 whole, near n^2 / 2 else."""
    stops = range(block, n + block, block)
    return sum((min(stop, n) - stop + block) * min(stop, n) for stop in stops)


def masked_entries(n: int, block: int) -> int:
    """Scores that it adds the mask to: the blocks on the diagonal."""
    whole, rest = divmod(n, block)
    return whole * block**2 + rest**2


def attention_counts(n: int, sizes: Sizes, block: int) -> Counts:
    """What :func:`attention` computes: products 4 n^2 d whole; elementwise work."""
    scores = sizes.H * entries(n, block)
    return {
        "products": 4 * entries(n, block) * sizes.d,
        "elementwise": PER_ENTRY * scores + sizes.H * masked_entries(n, block),
    }


def attention_layer(n: int, sizes: Sizes) -> Counts:
    """Operations of a causal layer, nothing above the diagonal computed."""
    scores = n * (n + 1) // 2
    parts = {
        "products": 4 * scores * sizes.d,
        "softmax": PER_ENTRY * sizes.H * scores,
        "projections": 8 * n * sizes.d**2,
    }
    return parts | {"layer": sum(parts.values())}


def mamba_layer(n: int, sizes: Sizes) -> Counts:
    """Operations of a Mamba block: all linear in n."""
    d, E, N, R = sizes.d, sizes.E, sizes.N, sizes.R
    parts = {
        "projections": 2 * n * (2 * d * E + E * (R + 2 * N) + R * E + E * d),
        "convolution": 2 * n * CONV_WIDTH * E,
        "scan": n * (7 * E * N + 4 * E),
    }
    return parts | {"layer": sum(parts.values())}


def bytes_of(n: int, sizes: Sizes) -> Counts:
    """float32 bytes of one sequence and layer, beyond the inputs.

    one_head: the matrix of the table. materialised: the most that :func:`attention`
    holds at once with block = n, all heads' scores, the mask, the output twice.
    fused: SDPA's output and the logarithm of each row's sum, without its workspace, a
    few blocks a thread whatever n is. cache: keys and values, for generation.
    mamba_state: the same for the Mamba block, its convolution's window included.
    """
    d, H = sizes.d, sizes.H
    return {
        "one_head": FLOAT * n**2,
        "all_heads": FLOAT * H * n**2,
        "materialised": FLOAT * ((H + 1) * n**2 + 2 * n * d),
        "fused": FLOAT * (n * d + H * n),
        "cache": FLOAT * 2 * n * d,
        "mamba_state": FLOAT * sizes.E * (sizes.N + CONV_WIDTH - 1),
    }


def crossover(sizes: Sizes) -> int:
    """The first n at which a causal attention layer takes more than a Mamba block."""
    first = next(
        e
        for e in range(64)
        if attention_layer(2**e, sizes)["layer"] > mamba_layer(2**e, sizes)["layer"]
    )
    low, high = 0, 2**first
    while high - low > 1:
        n = (low + high) // 2
        more = attention_layer(n, sizes)["layer"] > mamba_layer(n, sizes)["layer"]
        low, high = (low, n) if more else (n, high)
    return high


def source_of(n: int) -> dict[str, Any] | None:
    """The chapter's row for n in its words and in numbers, if it has one."""
    if n not in SOURCE:
        return None
    memory, operations = SOURCE[n]
    return {
        "memory": memory,
        "flops": operations,
        "bytes": _number(memory),
        "operations": _number(operations),
    }


def _number(words: str) -> int:
    value, unit = words.split()
    return int(value) * UNITS[unit]


# --- what is measured -----------------------------------------------------------------


def products(call: Callable[[], Any]) -> int:
    """Operations of the matrix products (attention kernels included) in ``call``."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def elementwise(call: Callable[[], Any]) -> int:
    """Operations of all else in ``call``; see :class:`Arithmetic`."""
    with torch.no_grad(), Arithmetic() as counter:
        call()
    return counter.total


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most bytes that ``call`` has from PyTorch's CPU allocator at once.

    What an operator frees is taken as freed at its end, so this is never too small.
    """
    tracing = profile(profile_memory=True, use_kineto=False)
    with torch.no_grad(), _quiet(), tracing as profiler:
        call()
    changes = []
    for event in profiler.function_events:
        size, span = event.self_cpu_memory_usage, event.time_range
        changes.append((span.start if size > 0 else span.end, size))
    held = most = 0
    for _, size in sorted(changes):
        held += size
        most = max(most, held)
    return most


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the profiler from telling of its start, or of a GPU that is not there."""
    name = "KINETO_LOG_LEVEL"
    before = os.environ.get(name)
    os.environ.setdefault(name, "99")  # read when the first profile of a process starts
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]


def measure(n: int, sizes: Sizes, block: int, seed: int) -> dict[str, int]:
    """Counts and bytes of every form at length n, in float32 on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(
        3, 1, sizes.H, n, sizes.d // sizes.H, generator=generator
    ).unbind()
    x = torch.randn(1, n, sizes.d, generator=generator)
    layer, mamba = _layers(sizes, seed)
    whole = functools.partial(attention, q, k, v, n)
    blocked = functools.partial(attention, q, k, v, block)
    fused = functools.partial(scaled_dot_product_attention, q, k, v, is_causal=True)
    projections = products(
        lambda: [
            linear(x) for linear in layer.children() if isinstance(linear, nn.Linear)
        ]
    )
    part = {"products": products(blocked), "elementwise": elementwise(blocked)}
    return {
        "products": products(whole),
        "elementwise": elementwise(whole),
        "blocked_products": part["products"],
        "blocked_elementwise": part["elementwise"],
        "blocked_layer": sum(part.values()) + projections,
        "attention_products": products(lambda: layer(x)),
        "mamba_products": products(lambda: mamba(x)),
        "scan": elementwise(_scan(n, sizes, generator)),
        "materialised_bytes": peak_bytes(whole),
        "blocked_bytes": peak_bytes(blocked),
        "fused_bytes": peak_bytes(fused),
        "attention_bytes": peak_bytes(lambda: layer(x)),
        "mamba_bytes": peak_bytes(lambda: mamba(x)),
    }


def expected(n: int, sizes: Sizes, block: int) -> dict[str, int]:
    """What the formulas say of the entries of :func:`measure` that they determine.

    FlopCounterMode takes SDPA's mask for no mask: its count of a layer is the full one.
    """
    whole, part = (attention_counts(n, sizes, b) for b in (n, block))
    projections = attention_layer(n, sizes)["projections"]
    return {
        **whole,
        **{f"blocked_{name}": count for name, count in part.items()},
        "blocked_layer": sum(part.values()) + projections,
        "attention_products": projections + whole["products"],
        "mamba_products": mamba_layer(n, sizes)["projections"],
        "scan": mamba_layer(n, sizes)["scan"],
        "materialised_bytes": bytes_of(n, sizes)["materialised"],
    }


def _layers(sizes: Sizes, seed: int) -> tuple[Attention, Mamba]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        mamba = Mamba(sizes.d, sizes.N, CONV_WIDTH, expand=2, dt_rank=sizes.R)
        return Attention(sizes.d, sizes.H), mamba


def _scan(n: int, sizes: Sizes, generator: torch.Generator) -> Callable[[], Any]:
    """The naive selective scan of a Mamba block, without gate and softplus."""
    E, N = sizes.E, sizes.N
    u, delta = torch.randn(2, 1, n, E, generator=generator).unbind()
    B, C = torch.randn(2, 1, n, 1, N, generator=generator).unbind()
    A, D, bias = -torch.ones(E, N), torch.ones(E), torch.ones(E)
    h = torch.zeros(1, E, N)
    return lambda: selective_scan_loop(u, delta.abs(), A, B, C, D, None, bias, False, h)


# --- the experiment -------------------------------------------------------------------


def run(
    lengths: tuple[int, ...] = (256, 1024, 4096, 16384, 65536, 262144, 1048576),
    d_model: int = SOURCE_D,
    n_heads: int = 16,
    d_state: int = 16,
    block: int = 64,
    memory_gib: float = 2.0,
    seed: int = 0,
) -> ExperimentResult:
    """Hold the chapter's table of attention's cost to the whole count and to bytes.

    Judged: at every length whose scores fit, counts and bytes equal the formulas to the
    last one, and the chapter's table is 2 n^2 d and 4 n^2 with 2^30 for a billion.

    Args:
        lengths: sequence lengths n, increasing
        d_model: channels d
        n_heads: heads H, a divisor of d_model
        d_state: states N of the Mamba block beside it
        block: rows at a time of the attention that stops at the diagonal
        memory_gib: lengths whose scores take more are computed, not measured
        seed: draws inputs and weights, on which no count depends
    """
    sizes = _checked(lengths, d_model, n_heads, d_state)
    check_integer("block", block, at_least=1, example=64)
    check_integer("seed", seed, at_least=0, example=0)
    if not 0 <= memory_gib < math.inf:
        raise bad_input("memory_gib", memory_gib, "0 or more, finite", "try 2")
    rows = []
    for n in track(lengths, "lengths"):
        row = row_of(n, sizes)
        if row["bytes"]["materialised"] <= memory_gib * 2**30:
            row["measured"] = measure(n, sizes, block, seed)
            row["expected"] = expected(n, sizes, block)
        rows.append(row)
    metadata = {
        "d_model": d_model,
        "n_heads": n_heads,
        "d_state": d_state,
        "block": block,
        "memory_gib": memory_gib,
        "seed": seed,
        "crossover": crossover(sizes),
        "rows": rows,
        "counted": "a multiply-add is two operations; one sequence, one layer, forward "
        "only, float32; bytes beyond the inputs",
    }
    broken = problems(metadata)
    return ExperimentResult(NAME, _details(metadata, broken), metadata, not broken)


def row_of(n: int, sizes: Sizes) -> dict[str, Any]:
    """Everything that the formulas and the chapter say of length n."""
    return {
        "n": n,
        "source": source_of(n),
        "one_product": 2 * n**2 * sizes.d,
        "products": 4 * n**2 * sizes.d,
        "attention": attention_layer(n, sizes),
        "mamba": mamba_layer(n, sizes),
        "bytes": bytes_of(n, sizes),
        "measured": None,
    }


def _checked(lengths: Sequence[int], d_model: int, n_heads: int, d_state: int) -> Sizes:
    check_increasing("lengths", lengths, at_least=1)
    if lengths[-1] > LARGEST:
        raise bad_input("lengths", lengths[-1], f"at most {LARGEST}", "lower them")
    for name, size in (
        ("d_model", d_model),
        ("n_heads", n_heads),
        ("d_state", d_state),
    ):
        check_integer(name, size, at_least=1, example=16)
    if d_model % n_heads:
        near = max(h for h in range(1, n_heads) if d_model % h == 0)
        raise bad_input(
            "n_heads", n_heads, f"a divisor of d_model = {d_model}", f"try {near}"
        )
    return Sizes(d_model, n_heads, d_state)


def problems(metadata: dict[str, Any]) -> list[str]:
    """The claims that a record's metadata breaks."""
    broken = []
    for row in metadata["rows"]:
        n, source = row["n"], row["source"]
        if source and (
            source["bytes"] != 4 * n**2 or source["operations"] != 2 * n**2 * SOURCE_D
        ):
            broken.append(f"the chapter's row is 4 n^2 and 2 n^2 d: not at n = {n}")
        if row["measured"]:
            broken += [
                f"{CLAIM}: {name} at n = {n} is {row['measured'][name]}, not {formula}"
                for name, formula in row["expected"].items()
                if row["measured"][name] != formula
            ]
    return broken


def _details(metadata: dict[str, Any], broken: list[str]) -> str:
    if broken:
        return f"{len(broken)} claim(s) off; {broken[0]}"
    rows = metadata["rows"]
    measured = [row["n"] for row in rows if row["measured"]]
    text = (
        f"counts and bytes equal the formulas at n = {', '.join(map(str, measured))}"
        if measured
        else "no length fitted: nothing was measured"
    )
    skipped = [row["n"] for row in rows if not row["measured"]]
    if skipped:
        text += (
            f"; computed only, scores beyond {metadata['memory_gib']:g} GiB: "
            f"{', '.join(map(str, skipped))}"
        )
    return (
        f"{text}; a causal attention layer takes more operations than a Mamba block "
        f"from n = {metadata['crossover']}"
    )


# --- the table ------------------------------------------------------------------------


def show(result: ExperimentResult) -> None:
    """Print operations and bytes by length, and what the chapter's columns are."""
    from rich.console import Console

    console = Console(stderr=True)
    console.width = max(console.width, 126)
    metadata = result.metadata
    console.print(_operations_table(metadata), _bytes_table(metadata))
    million = 2 * MILLION**2 * SOURCE_D
    for line in (
        "= counted or measured here and equal to the formula; m measured, no formula; "
        "all else is computed, not measured",
        "2 n^2 d is one of two products unmasked, or both within the causal mask; "
        "4 n^2 bytes are one head",
        "the chapter's billion is 2^30 and its trillion 2^40: decimal counts are 7 and "
        "10 % more",
        f"a million tokens: n^2 = 1e12 entries, but {million:.1e} operations "
        f"({2 * SOURCE_D} an entry), not 'a trillion'",
    ):
        console.print(f"- {line}", markup=False, highlight=False)


def _operations_table(metadata: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(
        *("n", "chapter", "2 n² d", "4 n² d", "causal", "+ softmax", "+ projections"),
        *("Mamba block", "ratio"),
        title=f"operations of one layer, d = {metadata['d_model']}, "
        f"H = {metadata['n_heads']}, N = {metadata['d_state']}",
    )
    for row in metadata["rows"]:
        parts, mamba = row["attention"], row["mamba"]["layer"]
        sums = (row["one_product"], row["products"], parts["products"])
        cells = [f"{count:.3g}" for count in sums]
        cells += [
            f"{parts['products'] + parts['softmax']:.3g}",
            f"{parts['layer']:.3g}",
        ]
        if row["measured"]:
            cells[1] += " ="
        mark = " =" if row["measured"] else ""
        table.add_row(
            length_text(row["n"]),
            row["source"]["flops"] if row["source"] else "",
            *cells,
            f"{mamba:.3g}{mark}",
            f"{parts['layer'] / mamba:.2g}",
        )
    return table


def _bytes_table(metadata: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(
        *("n", "chapter", "4 n²", "all heads", "materialised", "SDPA"),
        *("attention layer", "Mamba block", "KV cache", "Mamba state"),
        title="bytes of one sequence and layer in float32",
    )
    for row in metadata["rows"]:
        sizes, measured = row["bytes"], row["measured"]
        formulas = [byte_text(sizes[each]) for each in ("one_head", "all_heads")]
        materialised, fused = (
            byte_text(sizes["materialised"]),
            byte_text(sizes["fused"]),
        )
        layers = ["-", "-"]
        if measured:
            materialised, fused = (
                f"{materialised} =",
                _measured(measured["fused_bytes"]),
            )
            layers = [
                _measured(measured[f"{each}_bytes"]) for each in ("attention", "mamba")
            ]
        table.add_row(
            length_text(row["n"]),
            row["source"]["memory"] if row["source"] else "",
            *(*formulas, materialised, fused, *layers),
            *(byte_text(sizes[each]) for each in ("cache", "mamba_state")),
        )
    return table


def _measured(count: int) -> str:
    return f"{byte_text(count)} m"


def length_text(n: int) -> str:
    """``64K`` for 65536; others in full."""
    for size, letter in ((2**20, "M"), (2**10, "K")):
        if n % size == 0:
            return f"{n // size}{letter}"
    return str(n)


def byte_text(count: float) -> str:
    """``64 MiB``: three digits and a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"


# --- the picture ----------------------------------------------------------------------


def draw(results: list[ExperimentResult]) -> "Figure":
    """Operations and bytes against length: the chapter's, the whole, the measured."""
    metadata = results[-1].metadata
    figure, axes = new_figure(1, 2)
    _draw_operations(axes[0, 0], metadata)
    _draw_bytes(axes[0, 1], metadata)
    for ax in axes[0]:
        ax.set(xscale="log", yscale="log", xlabel="sequence length n (tokens)")
        ticks = [row["n"] for row in metadata["rows"]]
        if len(ticks) <= 8:
            ax.set_xticks(ticks, [length_text(n) for n in ticks])
            ax.set_xticks([], minor=True)
        ax.legend(loc="upper left", fontsize=7.5)
    figure.suptitle(
        f"one layer, one sequence: d = {metadata['d_model']}, {metadata['n_heads']} "
        f"heads, N = {metadata['d_state']}; lines computed, filled marks measured",
        fontsize=10,
    )
    return figure


def _draw_operations(ax: Any, metadata: dict[str, Any]) -> None:
    rows = metadata["rows"]
    n = [row["n"] for row in rows]
    whole = [row["attention"]["layer"] for row in rows]
    ax.plot(n, whole, color=COLORS[1], label="causal attention layer, all of it")
    ax.plot(
        n,
        [row["products"] for row in rows],
        *("--",),
        color=COLORS[4],
        label="both products, unmasked: 4 n² d",
    )
    ax.plot(
        n,
        [row["attention"]["projections"] for row in rows],
        *(":",),
        color=COLORS[6],
        label="its four projections: 8 n d²",
    )
    ax.plot(
        n, [row["mamba"]["layer"] for row in rows], color=COLORS[0], label="Mamba block"
    )
    _marks(ax, rows, ("products",), COLORS[4], "o")
    _marks(ax, rows, ("blocked_layer",), COLORS[1], "s")
    _marks(ax, rows, ("mamba_products", "scan"), COLORS[0], "^")
    _source_marks(ax, rows, "operations", "the chapter's: 2 n² d")
    ax.axvline(metadata["crossover"], ymax=0.6, color="#999999", linewidth=0.8)
    ax.set(ylabel="operations")
    ax.set_title(f"attention costs more than Mamba from n = {metadata['crossover']}")


def _draw_bytes(ax: Any, metadata: dict[str, Any]) -> None:
    rows = metadata["rows"]
    n = [row["n"] for row in rows]
    curves = (
        ("materialised", "all heads' scores, materialised", "-", COLORS[1]),
        ("one_head", "one head's scores: 4 n²", "--", COLORS[4]),
        ("cache", "key-value cache: 8 n d", ":", COLORS[6]),
        ("fused", "SDPA: no n × n matrix", "-", COLORS[2]),
        ("mamba_state", "Mamba's state: no n at all", "-", COLORS[0]),
    )
    for name, label, line, color in curves:
        ax.plot(n, [row["bytes"][name] for row in rows], line, color=color, label=label)
    _marks(ax, rows, ("materialised_bytes",), COLORS[1], "o")
    _marks(ax, rows, ("fused_bytes",), COLORS[2], "s")
    _source_marks(ax, rows, "bytes", "the chapter's: 4 n²")
    ax.set(ylabel="bytes (float32)")
    ax.set_title("the n × n matrix need not be stored")


def _marks(
    ax: Any, rows: Sequence[Any], names: Sequence[str], color: str, marker: str
) -> None:
    """Points at the sum of the measured ``names``."""
    there = [row for row in rows if row["measured"]]
    ax.plot(
        [row["n"] for row in there],
        [sum(row["measured"][name] for name in names) for row in there],
        marker,
        color=color,
    )


def _source_marks(ax: Any, rows: Sequence[Any], name: str, label: str) -> None:
    there = [row for row in rows if row["source"]]
    if there:
        ax.plot(
            [row["n"] for row in there],
            [row["source"][name] for row in there],
            "x",
            color=COLORS[3],
            markersize=7,
            markeredgewidth=1.8,
            label=label,
        )


PICTURES = (Picture(draw, f"outputs/{NAME}.png", by_default=True),)


@functools.wraps(run)
def _run_and_show(*args: Any, **kwargs: Any) -> ExperimentResult:
    result = run(*args, **kwargs)
    show(result)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print the tables on standard error, and the usual line."""
    return command_line(_run_and_show, pictures=PICTURES, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
