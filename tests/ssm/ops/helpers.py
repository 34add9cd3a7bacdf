"""An operator's outputs and every gradient, to be set beside the reference's."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.ssm.helpers import assert_close

LENGTHS = (1, 63, 64, 65, 97)
Operator = Callable[..., tuple[Tensor, Tensor]]

_NARROW = {torch.float64: torch.float32, torch.complex128: torch.complex64}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers of both signs, the same for the same shape and seed."""
    generator = torch.Generator().manual_seed(seed + 1000 * len(shape) + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=dtype)


def narrowed(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Double-precision inputs as float32 (complex64) where ``dtype`` is float32."""
    if dtype == torch.float64:
        return inputs
    return {name: x.to(_NARROW[x.dtype]) for name, x in inputs.items()}


def outcome(op: Operator, inputs: dict[str, Tensor], **options: Any) -> dict[str, Any]:
    """Outputs, and gradients of random losses on both outputs and on the state only."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    y, final = op(**leaves, **options)
    losses = {
        "state": _dot(final, random(*final.shape, seed=2)),
        "both": _dot(final, random(*final.shape, seed=2))
        + _dot(y, random(*y.shape, seed=1)),
    }
    found = {"y": y.detach(), "final": final.detach()}
    for which, loss in losses.items():
        grads = torch.autograd.grad(
            loss, list(leaves.values()), retain_graph=True, materialize_grads=True
        )
        for name, grad in zip(leaves, grads, strict=True):
            found[f"gradient of {name} ({which})"] = grad
    return found


def check_against_reference(
    op: Operator, inputs: dict[str, Tensor], dtype: torch.dtype, **options: Any
) -> None:
    """``op`` in ``dtype`` against its own naive backend in float64: everything."""
    small = narrowed(inputs, dtype)
    wide = {name: x.to(inputs[name].dtype) for name, x in small.items()}
    check_same(
        outcome(op, small, **options),
        outcome(op, wide, **(options | {"backend": "naive"})),
    )


def check_same(
    actual: dict[str, Tensor], expected: dict[str, Tensor], least: float = 0.0
) -> None:
    """Every entry agrees, within the tolerance of the actual one's dtype."""
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert_close(value, expected[name], name=name, least=least)


def check_bit_equal(op: Operator, inputs: dict[str, Tensor], **options: Any) -> None:
    """Two runs give the same bits, gradients included."""
    first, second = (outcome(op, inputs, **options) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def check_compiled(op: Operator, inputs: dict[str, Tensor], **options: Any) -> None:
    """The compiled operator, in one graph, gives the eager numbers."""
    torch.compiler.reset()
    compiled = torch.compile(op, backend="aot_eager", fullgraph=True)
    check_same(outcome(compiled, inputs, **options), outcome(op, inputs, **options))


def check_captured(op: Operator, inputs: dict[str, Tensor], **options: Any) -> None:
    """Forward and backward as a CUDA graph, replayed on new numbers in its memory."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        x = {n: t.float().cuda().requires_grad_() for n, t in inputs.items()}

        def step() -> list[Tensor]:
            y, final = op(**x, **options)
            loss = y.square().sum() + final.sum()
            return [y, final, *torch.autograd.grad(loss, list(x.values()))]

        step()  # compiles
        with torch.cuda.graph(graph, stream=stream):
            captured = step()
        with torch.no_grad():
            for t in x.values():
                t.mul_(0.9)
        graph.replay()
        for a, b in zip(captured, step(), strict=True):
            assert torch.equal(a, b)


def check_continuation(
    op: Operator, inputs: dict[str, Tensor], over_time: set[str], **options: Any
) -> None:
    """Cut in two anywhere, the sequence gives what it gives whole."""
    L = next(inputs[name].shape[1] for name in over_time)
    whole = outcome(op, inputs, **options)
    for split in sorted({0, 1, L // 3, L - 1, L}):

        def in_two(split: int = split, **given: Tensor) -> tuple[Tensor, Tensor]:
            head, tail = dict(given), dict(given)
            for name in over_time:
                head[name], tail[name] = given[name].tensor_split([split], 1)
            first, tail["initial_state"] = op(**head, **options)
            second, state = op(**tail, **options)
            return torch.cat([first, second], 1), state

        check_same(outcome(in_two, inputs), whole)


def check_ragged(
    op: Operator,
    inputs: dict[str, Tensor],
    over_time: set[str],
    packed: bool,
    **options: Any,
) -> None:
    """Padded with NaN, or packed, five rows give what each gives alone."""
    lengths = torch.tensor([6, 1, 0, 13, 2])
    inputs = dict(inputs)
    for name in over_time:
        assert inputs[name].shape[:2] == (5, 13), "five rows of 13 steps"

    def alone(**given: Tensor) -> tuple[Tensor, Tensor]:
        rows = []
        for i, n in enumerate(lengths.tolist()):
            row = dict(given)
            for name in over_time | {"initial_state"}:
                row[name] = given[name][i : i + 1]
            row |= {name: row[name][:, :n] for name in over_time}
            rows.append(op(**row, **options))
        outputs = [y for y, _ in rows]
        if not packed:
            outputs = [_padded(y, 13) for y in outputs]
        y = torch.cat(outputs, 1 if packed else 0)
        return y, torch.cat([state for _, state in rows])

    valid = torch.arange(13) < lengths[:, None]
    expected = outcome(alone, inputs)
    if not packed:
        given = dict(inputs)
        for name in over_time:
            given[name] = given[name].clone()
            given[name][~valid] = torch.nan
        check_same(outcome(op, given, lengths=lengths, **options), expected)
        return

    def together(**given: Tensor) -> tuple[Tensor, Tensor]:
        given |= {name: given[name][valid][None] for name in over_time}
        bounds = torch.cat([lengths[:1] * 0, lengths.cumsum(0)])
        return op(**given, cu_seqlens=bounds, **options)

    check_same(outcome(together, inputs), expected)


def _padded(y: Tensor, L: int) -> Tensor:
    return torch.cat([y, y.new_zeros(1, L - y.shape[1], *y.shape[2:])], 1)


def _dot(x: Tensor, weights: Tensor) -> Tensor:
    weights = weights.to(x.device)
    if x.is_complex():  # both parts count
        return (torch.view_as_real(x) * weights[..., None]).sum() + x.imag.sum()
    return (x.double() * weights).sum()
