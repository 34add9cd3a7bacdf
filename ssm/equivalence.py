"""Every operator and layer in every form: one table of worst errors.

    python -m ssm.equivalence

Each row is an operator or layer with a backend and a dtype; each cell is the largest
error of that form over all lengths and over outputs, final states and all gradients,
relative to the scale of each, against the reference in double precision:

* full: the whole sequence in one call;
* chunked: another chunk size, or the sequence in equal pieces;
* steps: one step after the other;
* split: pieces cut at random places, empty ones and single steps among them;
* kernel: the materialised T x T matrix applied to its values.

The scale is the largest entry. The gradient of what every step uses (a parameter, A or
D) is a sum over the steps; where its terms cancel, rounding is as large as the terms
allow, so its scale is the root of the sum of their squares, entry by entry, if that is
larger: the size that the sum would have if their signs were random.

A form that a row does not have is named with the reason; any other empty cell, and any
error above the tolerance (1e-10 in float64, 32 units of rounding in float32), fails.
"""

import copy
import math
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from ssm._cases import BATCH, LAYERS, OPS, Draw, LayerCase, OpCase
from ssm.layers._base import apply_kernel

FORMS = ("full", "chunked", "steps", "split", "kernel")
LENGTHS = (1, 63, 64, 65, 257)
QUICK_LENGTHS = (1, 37)
PIECE = 16  # steps of the pieces, and the chunk size, of the form "chunked"
TOLERANCE = {torch.float64: 1e-10, torch.float32: 32 * 2.0**-23}

_ZERO = 1e-12  # of the largest result of a run

Results = dict[str, Tensor]


@dataclass
class Row:
    """One row of the table: form -> worst error, and why a form is absent."""

    name: str
    backend: str
    dtype: torch.dtype
    errors: dict[str, float] = field(default_factory=dict)
    worst: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    @property
    def tolerance(self) -> float:
        """The error allowed."""
        return TOLERANCE[self.dtype.to_real()]

    def problems(self) -> list[str]:
        """The cells that are missing or wrong."""
        title = f"{self.name}, {self.backend}, {_short(self.dtype)}"
        found = []
        for form in FORMS:
            if form in self.absent:
                continue
            error = self.errors.get(form)
            if error is None:
                found.append(f"{title}: the form '{form}' is missing")
            elif not error <= self.tolerance:  # NaN fails too
                where = self.worst.get(form, "")
                found.append(
                    f"{title}: '{form}' is off by {error:.1e} ({where}; "
                    f"tolerance {self.tolerance:.1e})"
                )
        return found

    def note(self, form: str, L: int, actual: Results, reference: "Reference") -> None:
        """Keep the worst error of ``form``."""
        for name, value in actual.items():
            error = relative_error(
                value, reference.results[name], reference.scales[name]
            )
            if math.isnan(error):
                error = math.inf  # the worst there is: nothing replaces it
            if error > self.errors.get(form, -1.0):
                self.errors[form] = error
                self.worst[form] = f"{name} at L = {L}"


@dataclass(frozen=True)
class Reference:
    """Results in double precision, and the scale that an error of each is judged by."""

    results: Results
    scales: dict[str, float]

    @classmethod
    def of_steps(cls, results: Results, copies: Results) -> "Reference":
        """From a run in which every step had its own copy of what is in ``copies``.

        The gradients of the copies, (L, …), are the terms of the gradient they stand
        for. A result that is rounding around an exact zero (the gradient of a softmax
        over one entry, say) is judged by the largest of all results.
        """
        terms = {f"d/d{name}": results[f"d/d{name}"] for name in copies}
        results = results | {name: each.sum(0) for name, each in terms.items()}
        scales = {name: _largest(value) for name, value in results.items()}
        for name, each in terms.items():
            scales[name] = max(
                scales[name], _largest(each.abs().square().sum(0) ** 0.5)
            )
        top = max(scales.values())
        return cls(
            results, {n: v if v > _ZERO * top else top for n, v in scales.items()}
        )


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def copies_of(tensors: Results, L: int) -> Results:
    """One copy a step of each tensor, (L, …), to differentiate by."""
    return {
        name: x.detach().expand(L, *x.shape).clone().requires_grad_()
        for name, x in tensors.items()
    }


def relative_error(actual: Tensor, reference: Tensor, scale: float) -> float:
    """max |actual - reference| / scale, in double precision."""
    if actual.shape != reference.shape:
        return float("inf")
    if not actual.numel():
        return 0.0
    wide = torch.promote_types(reference.dtype, torch.float64)
    difference = float((actual.to(wide) - reference.to(wide)).abs().max())
    return difference / scale if scale else difference


def weigh(results: Results, inputs: Results) -> Results:
    """``results`` and the gradients of an uneven sum of them, by name."""
    generator = torch.Generator().manual_seed(7)
    loss: Any = 0.0
    for value in results.values():
        if value.is_floating_point() or value.is_complex():
            weight = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            loss = loss + (weight.to(value.dtype.to_real()) * value).sum()
    loss = loss.real + loss.imag if loss.is_complex() else loss
    grads = torch.autograd.grad(
        loss, list(inputs.values()), allow_unused=True, materialize_grads=True
    )
    named = {f"d/d{n}": g for n, g in zip(inputs, grads, strict=True)}
    return {n: v.detach() for n, v in (results | named).items()}


def cuts_of(L: int, seed: int) -> list[int]:
    """Random places to cut L steps at, with an empty piece and a single step."""
    generator = random.Random(seed)  # noqa: S311  # no secrets here
    cuts = sorted(generator.randint(0, L) for _ in range(3))
    return sorted([*cuts, cuts[0], min(L, cuts[1] + 1)])


# --- operators ------------------------------------------------------------------------

Call = Callable[[Results, Results, Tensor], tuple[Tensor, Tensor]]


def in_pieces(call: Call, cuts: Sequence[int]) -> Call:
    """``call`` on pieces of time, the state carried from one to the next."""

    def run(time: Results, fixed: Results, state: Tensor) -> tuple[Tensor, Tensor]:
        pieces = {name: x.tensor_split(list(cuts), 1) for name, x in time.items()}
        outputs = []
        for i in range(len(cuts) + 1):
            y, state = call({name: p[i] for name, p in pieces.items()}, fixed, state)
            outputs.append(y)
        return torch.cat(outputs, 1), state

    return run


def op_results(
    call: Call, time: Results, fixed: Results, state: Tensor, *, final: bool = True
) -> Results:
    """Outputs, final state and gradients of an operator."""
    leaves = {n: x.detach().clone().requires_grad_() for n, x in (time | fixed).items()}
    h = state.detach().clone().requires_grad_()
    y, last = call({n: leaves[n] for n in time}, {n: leaves[n] for n in fixed}, h)
    if not final:
        return weigh({"y": y}, leaves)
    return weigh({"y": y, "final state": last}, leaves | {"h0": h})


def op_reference(
    call: Call, time: Results, fixed: Results, state: Tensor, *, final: bool = True
) -> Reference:
    """Results of ``call`` on one step after the other."""

    def run(time: Results, copies: Results, state: Tensor) -> tuple[Tensor, Tensor]:
        steps = {name: x.split(1, 1) for name, x in time.items()}
        parts = {name: x.unbind(0) for name, x in copies.items()}
        outputs = []
        for t in range(L):
            here, fixed = ({n: x[t] for n, x in xs.items()} for xs in (steps, parts))
            y, state = call(here, fixed, state)
            outputs.append(y)
        return torch.cat(outputs, 1), state

    L = next(iter(time.values())).shape[1]
    copies = copies_of(fixed, L)
    return Reference.of_steps(op_results(run, time, copies, state, final=final), copies)


def op_row(
    case: OpCase, backend: str, dtype: torch.dtype, lengths: Sequence[int]
) -> Row:
    """The row of one operator, backend and dtype."""
    row = Row(case.name, backend, dtype)
    if case.kernel is None:
        row.absent["kernel"] = case.no_kernel
    wide = torch.promote_types(dtype, torch.float64)
    for L in lengths:
        draw = Draw(torch.Generator().manual_seed(L), dtype)
        time, fixed, state = case.build(L, draw)
        wide_time, wide_fixed = (
            {n: _widen(x, wide) for n, x in named.items()} for named in (time, fixed)
        )
        naive, wide_state = _call(case, "naive"), _widen(state, wide)
        reference = op_reference(naive, wide_time, wide_fixed, wide_state)
        for form, call in _op_forms(case, backend, L).items():
            row.note(form, L, op_results(call, time, fixed, state), reference)
        if case.kernel is not None:
            zero = torch.zeros_like(state)
            applied = op_results(_through(case), time, fixed, zero, final=False)
            still = torch.zeros_like(wide_state)
            expected = op_reference(naive, wide_time, wide_fixed, still, final=False)
            row.note("kernel", L, applied, expected)
    return row


def _call(case: OpCase, backend: str, **options: Any) -> Call:
    return lambda time, fixed, state: case.run(
        time, fixed, state, backend=backend, **options
    )


def _through(case: OpCase) -> Call:
    """The operator from a zero state, through its matrix."""
    kernel = case.kernel
    assert kernel is not None, "asked only where there is one"
    return lambda time, fixed, state: (kernel(time, fixed), state)


def _op_forms(case: OpCase, backend: str, L: int) -> dict[str, Call]:
    whole = _call(case, backend)
    other = (
        _call(case, backend, chunk_size=PIECE)
        if case.has_chunks
        else in_pieces(whole, range(PIECE, L, PIECE))
    )
    return {
        "full": whole,
        "chunked": other,
        "steps": in_pieces(whole, range(1, L)),
        "split": in_pieces(whole, cuts_of(L, seed=L)),
    }


def _widen(x: Tensor, wide: torch.dtype) -> Tensor:
    return x.to(wide if x.is_complex() else wide.to_real())


# --- layers ---------------------------------------------------------------------------

Run = Callable[[Any, Tensor, Any], tuple[Tensor, Any]]


def stepwise(layer: Any, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    """``layer.step`` over all steps of x."""
    outputs = []
    for x_t in x.unbind(1):
        y_t, state = layer.step(x_t, state)
        outputs.append(y_t)
    return torch.stack(outputs, 1), state


def forward_in_pieces(cuts: Sequence[int]) -> Run:
    """``layer.forward`` on the pieces between ``cuts``."""

    def run(layer: Any, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        outputs = []
        for piece in x.tensor_split(list(cuts), 1):
            y, state = layer(piece, state)
            outputs.append(y)
        return torch.cat(outputs, 1), state

    return run


def through_matrix(layer: Any, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    """The layer from its initial state, through its matrix."""
    matrix, values = layer.kernel_matrix(x)
    return layer.readout(apply_kernel(matrix, values), x), state


class Step(nn.Module):
    """``layer.step`` as a module's forward, so that its parameters can be replaced."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x_t: Tensor, state: Any) -> Any:
        return self.layer.step(x_t, state)


def layer_results(
    layer: Any,
    run: Run,
    x: Tensor,
    state: Any,
    parameters: Mapping[str, Tensor] | None = None,
) -> Results:
    """Outputs, final states and every gradient of a layer; state None: the initial.

    Gradients are by ``parameters``, or by the layer's own.
    """
    parameters = parameters or dict(layer.named_parameters())
    x = x.detach().clone().requires_grad_()
    leaves, spec = pytree.tree_flatten(() if state is None else state)
    leaves = [
        leaf.detach().clone().requires_grad_(_differentiable(leaf)) for leaf in leaves
    ]
    start = pytree.tree_unflatten(leaves, spec)
    y, final = run(layer, x, None if state is None else start)
    results = {"y": y}
    if state is not None:
        ends = pytree.tree_leaves(final)
        results |= {f"final state {i}": leaf for i, leaf in enumerate(ends)}
    inputs = {"x": x} | {f"state {i}": leaf for i, leaf in enumerate(leaves)}
    inputs = {n: leaf for n, leaf in inputs.items() if leaf.requires_grad}
    return weigh(results, inputs | dict(parameters))


def layer_reference(layer: Any, x: Tensor, state: Any) -> Reference:
    """Results of ``layer.step`` over all steps; state None: the initial."""
    step, copies = Step(layer), copies_of(dict(layer.named_parameters()), x.shape[1])

    def run(layer: Any, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        state = layer.init_state(len(x)) if state is None else state
        parts = {f"layer.{name}": p.unbind(0) for name, p in copies.items()}
        outputs = []
        for t, x_t in enumerate(x.unbind(1)):
            here = {name: p[t] for name, p in parts.items()}
            y_t, state = functional_call(step, here, (x_t, state))
            outputs.append(y_t)
        return torch.stack(outputs, 1), state

    return Reference.of_steps(layer_results(layer, run, x, state, copies), copies)


def layer_row(
    case: LayerCase, backend: str, dtype: torch.dtype, lengths: Sequence[int]
) -> Row:
    """The row of one layer, backend and dtype."""
    row = Row(case.name, backend, dtype)
    if case.no_kernel:
        row.absent["kernel"] = case.no_kernel
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = case.build(backend, dtype)
    precise = copy.deepcopy(layer).double()
    for L in lengths:
        generator = torch.Generator().manual_seed(L)
        x = torch.randn(BATCH, L, case.d_model, generator=generator, dtype=dtype)
        past = torch.randn(BATCH, 3, case.d_model, generator=generator, dtype=dtype)
        with torch.no_grad():
            state = layer(past)[1]
        wide = pytree.tree_map(_doubled, state)
        reference = layer_reference(precise, x.double(), wide)
        forms: dict[str, Run] = {
            "full": lambda layer, x, state: layer(x, state),
            "chunked": forward_in_pieces(range(PIECE, L, PIECE)),
            "steps": stepwise,
            "split": forward_in_pieces(cuts_of(L, seed=L)),
        }
        for form, run in forms.items():
            row.note(form, L, layer_results(layer, run, x, state), reference)
        if not case.no_kernel:
            applied = layer_results(layer, through_matrix, x, None)
            expected = layer_reference(precise, x.double(), None)
            row.note("kernel", L, applied, expected)
    return row


def _differentiable(leaf: Tensor) -> bool:
    return leaf.is_floating_point() or leaf.is_complex()


def _doubled(leaf: Tensor) -> Tensor:
    if not _differentiable(leaf):
        return leaf
    return leaf.to(torch.promote_types(leaf.dtype, torch.float64))


# --- the table ------------------------------------------------------------------------


def jobs() -> list[tuple[Callable[..., Row], Any, str, torch.dtype]]:
    """(function, case, backend, dtype) of every row."""
    ops = [(op_row, c, b, t) for c in OPS for b in c.backends for t in c.dtypes]
    layers = [
        (layer_row, c, b, t)
        for c in LAYERS
        for b in c.backends
        for t in (torch.float64, torch.float32)
    ]
    return [*ops, *layers]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def show(rows: Sequence[Row]) -> None:
    """Print the table, why forms are absent, and what is wrong."""
    from rich.console import Console
    from rich.table import Table

    table = Table("operator or layer", "backend", "dtype", *FORMS)
    for row in rows:
        cells = []
        for form in FORMS:
            error = row.errors.get(form)
            if error is None:
                cells.append("-" if form in row.absent else "[bold red]missing[/]")
            else:
                good = error <= row.tolerance
                cells.append(f"{error:.1e}" if good else f"[bold red]{error:.1e}[/]")
        table.add_row(row.name, row.backend, _short(row.dtype), *cells)
    console = Console()
    console.width = max(console.width, 100)
    console.print(table)
    reasons = {(row.name, r) for row in rows for r in row.absent.values()}
    for name, reason in sorted(reasons):
        print(f"- {name} has no kernel matrix: {reason}")
    for line in [problem for row in rows for problem in row.problems()]:
        print(f"FAILED {line}")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; return 1 if a cell is missing or wrong."""
    from experiments.common import (
        Parameter,
        one_line_errors,
        parse,
        progress_shown,
        track,
    )

    parameters = (
        Parameter("quick", bool, False, f"Lengths {QUICK_LENGTHS} only."),
        Parameter("only", str, "", "Only rows whose name contains this."),
    )
    about = (__doc__ or "").strip()
    options = parse("python -m ssm.equivalence", about, parameters, argv)
    lengths = QUICK_LENGTHS if options["quick"] else LENGTHS
    wanted = [job for job in jobs() if options["only"].lower() in job[1].name.lower()]
    with one_line_errors(), progress_shown():
        rows = [
            function(case, backend, dtype, lengths)
            for function, case, backend, dtype in track(wanted, "rows")
        ]
    show(rows)
    failed = sum(bool(row.problems()) for row in rows)
    print(f"{len(rows) - failed} of {len(rows)} rows agree at lengths {lengths}")
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
