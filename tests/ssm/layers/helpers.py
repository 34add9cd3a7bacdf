"""What the layer contract asks, checked on any layer: one meaning in every form."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ssm.equivalence import forward_in_pieces as split_at
from ssm.equivalence import stepwise
from ssm.layers._base import KernelLayer, SequenceLayer, apply_kernel
from tests.ssm.helpers import assert_close

Run = Callable[[SequenceLayer, Tensor, Any], tuple[Tensor, Any]]


def whole(layer: SequenceLayer, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    return layer(x, state)


def random_state(layer: SequenceLayer, batch: int, seed: int = 1) -> Any:
    """Random numbers; where the state grows, counts or does not start at zero: what a
    random past, not equally long in each row, leaves behind."""
    start = layer.init_state(batch)
    if any(leaf.numel() == 0 or leaf.any() or _counts(leaf) for leaf in start):
        lengths = torch.tensor([5 - i % 3 for i in range(batch)])
        with torch.no_grad():
            return layer(random_input(layer, batch, 5, seed), lengths=lengths)[1]
    generator = torch.Generator().manual_seed(seed)
    return pytree.tree_map(
        lambda leaf: torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype),
        start,
    )


def _counts(tensor: Tensor) -> bool:
    return tensor.dtype == torch.int64


def random_input(layer: SequenceLayer, batch: int, L: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(
        batch, L, layer.d_model, generator=generator, dtype=torch.float64
    )


def everything(
    layer: SequenceLayer, x: Tensor, state: Any, run: Run, *, output: bool = True
) -> dict[str, Tensor]:
    """Outputs, final states and every gradient of one run, by name.

    The loss weighs every output (unless ``output`` is False) and final state unevenly.
    """
    x = x.clone().requires_grad_()
    leaves, spec = pytree.tree_flatten(state)
    leaves = [leaf.clone().requires_grad_(not _counts(leaf)) for leaf in leaves]
    y, final = run(layer, x, pytree.tree_unflatten(leaves, spec))
    results = {"y": y} | {
        f"final state {i}": leaf for i, leaf in enumerate(pytree.tree_leaves(final))
    }
    generator = torch.Generator().manual_seed(7)
    loss = torch.zeros((), dtype=x.dtype)
    for name, result in results.items():
        if _counts(result):
            continue
        weight = torch.randn(result.shape, generator=generator, dtype=result.dtype)
        if output or name != "y":
            loss = loss + (weight * result).sum().real
    inputs = {"x": x} | {f"state {i}": leaf for i, leaf in enumerate(leaves)}
    inputs = {name: leaf for name, leaf in inputs.items() if leaf.requires_grad}
    inputs |= dict(layer.named_parameters())
    grads = torch.autograd.grad(
        loss, list(inputs.values()), allow_unused=True, materialize_grads=True
    )
    return results | {
        f"gradient of {name}": grad for name, grad in zip(inputs, grads, strict=True)
    }


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        if _counts(value):
            assert torch.equal(value, expected[name]), name
        else:
            assert_close(value.detach(), expected[name].detach(), name=name)


def check_forms(layer: SequenceLayer, L: int, cuts: Iterable[int] = ()) -> None:
    """Whole, in pieces and stepwise, from a random state: all values and gradients."""
    x, state = random_input(layer, 2, L), random_state(layer, 2)
    reference = everything(layer, x, state, stepwise)
    assert_same(everything(layer, x, state, whole), reference)
    assert_same(everything(layer, x, state, split_at(cuts)), reference)
    reference = everything(layer, x, state, stepwise, output=False)
    assert_same(everything(layer, x, state, whole, output=False), reference)


def check_kernel(layer: KernelLayer, L: int) -> None:
    """The materialised matrix, applied, is the layer: values and gradients."""

    def through_matrix(layer: KernelLayer, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        matrix, values = layer.kernel_matrix(x)
        assert matrix.shape[2:] == (L, L)
        assert matrix.triu(1).eq(0).all()  # causal
        return layer.readout(apply_kernel(matrix, values), x), ()

    def outputs(layer: KernelLayer, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        return layer(x)[0], ()

    x = random_input(layer, 2, L)
    assert_same(
        everything(layer, x, (), through_matrix), everything(layer, x, (), outputs)
    )


def join_rows(*leaves: Tensor, left: bool = False) -> Tensor:
    """Rows of one tensor; where their sizes differ, zeros behind (or before) them."""
    if leaves[0].ndim < 3:
        return torch.cat(leaves)
    longest = max(leaf.shape[1] for leaf in leaves)
    grown = []
    for leaf in leaves:
        missing = leaf.new_zeros(1, longest - leaf.shape[1], *leaf.shape[2:])
        grown.append(torch.cat([missing, leaf] if left else [leaf, missing], 1))
    return torch.cat(grown)


def check_lengths(
    layer: SequenceLayer,
    lengths: list[int],
    L: int,
    join: Callable[..., Tensor] = join_rows,
) -> None:
    """Padded rows with NaN behind them equal each row alone, gradients too.

    One row is L long; ``join`` puts the rows of a state together.
    """
    x, state = random_input(layer, len(lengths), L), random_state(layer, len(lengths))
    for i, length in enumerate(lengths):
        x[i, length:] = float("nan")

    def padded(layer: SequenceLayer, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        return layer(x, state, torch.tensor(lengths))

    def alone(layer: SequenceLayer, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        outputs, finals = [], []
        for i, length in enumerate(lengths):
            row = pytree.tree_map(lambda leaf, i=i: leaf[i : i + 1], state)
            y, final = layer(x[i : i + 1, :length], row)
            outputs.append(torch.nn.functional.pad(y, (0, 0, 0, L - length)))
            finals.append(final)
        return torch.cat(outputs), pytree.tree_map(join, *finals)

    assert_same(everything(layer, x, state, padded), everything(layer, x, state, alone))


def check_step_is_pure(layer: SequenceLayer) -> None:
    """A step changes neither the parameters nor the state that it was given."""
    state = random_state(layer, 3)
    kept = pytree.tree_map(torch.clone, state)
    parameters = {n: p.detach().clone() for n, p in layer.named_parameters()}
    x = random_input(layer, 3, 2)
    for x_t in x.unbind(1):
        _, new = layer.step(x_t, state)
    assert type(new) is type(state)
    for before, after in zip(kept, state, strict=True):
        assert torch.equal(before, after)
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameters[name], parameter), name


def check_empty(layer: SequenceLayer) -> None:
    """No steps: the state as it was."""
    state = random_state(layer, 2)
    y, final = layer(random_input(layer, 2, 0), state)
    assert y.shape == (2, 0, layer.d_model)
    for before, after in zip(state, final, strict=True):
        assert torch.equal(before, after)


def check_compiles(layer: SequenceLayer, L: int) -> None:
    """One graph, the same numbers, forward and backward."""
    x, state = random_input(layer, 2, L), random_state(layer, 2)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")

    def run(layer: SequenceLayer, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        return compiled(x, state)

    assert_same(everything(layer, x, state, run), everything(layer, x, state, whole))
    torch.compiler.reset()


def check_reruns(layer: SequenceLayer, L: int) -> None:
    """Two runs are bit-equal, gradients included."""
    x, state = random_input(layer, 2, L), random_state(layer, 2)
    first = everything(layer, x, state, whole)
    second = everything(layer, x, state, whole)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def check_bfloat16(build: Callable[..., KernelLayer]) -> None:
    """16-bit weights and inputs: 16-bit outputs, a float32 state, forms that agree."""
    layer = build(dtype=torch.bfloat16)
    x = random_input(layer, 2, 9).bfloat16()
    with torch.no_grad():
        y, state = layer(x)
        stepped, by_steps = stepwise(layer, x, layer.init_state(2))
        mixed = apply_kernel(*layer.kernel_matrix(x))
        assert y.dtype == stepped.dtype == torch.bfloat16
        assert state.ssm.dtype == by_steps.ssm.dtype == torch.float32
        assert_close(stepped, y.double(), name="steps")
        assert_close(layer.readout(mixed, x), y.double(), name="kernel matrix")
        assert_close(by_steps.ssm, state.ssm, name="state", dtype=torch.bfloat16)


def materialise(build: Callable[[], SequenceLayer]) -> SequenceLayer:
    """Built on the meta device, given memory (NaN), reset module by module."""
    with torch.device("meta"):
        layer = build()
    assert all(p.is_meta for p in layer.parameters())
    layer.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(float("nan"))
    for module in layer.modules():  # in the order in which frameworks do
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
    for name, parameter in layer.named_parameters():
        assert parameter.isfinite().all(), name
    return layer


def check_float32(layer: SequenceLayer, L: int) -> None:
    """float32 against float64 of the same parameters: values and gradients."""
    single = copy.deepcopy(layer).float()
    results = []
    for version in (copy.deepcopy(single).double(), single):
        x = random_input(layer, 2, L).float().to(next(version.parameters()).dtype)
        y, state = version(x.requires_grad_())
        inputs = {"x": x} | dict(version.named_parameters())
        grads = torch.autograd.grad(
            y.square().sum(),
            list(inputs.values()),
            allow_unused=True,
            materialize_grads=True,
        )
        leaves = pytree.tree_leaves(state)
        results.append(
            {"y": y}
            | {f"final state {i}": leaf for i, leaf in enumerate(leaves)}
            | {f"gradient of {n}": g for n, g in zip(inputs, grads, strict=True)}
        )
    for name, value in results[1].items():
        assert_close(value, results[0][name], name=name, dtype=torch.float32)
