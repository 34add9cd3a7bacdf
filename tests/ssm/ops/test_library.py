"""Kernels as operators: called directly where nothing watches, else dispatched."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ssm.ops._library import operator

CALLS: list[str] = []


@operator("twice_for_a_test")
def twice(x: Tensor, by: float) -> Tensor:
    CALLS.append("kernel")
    return 2 * by * x


@twice.register_fake
def _(x: Tensor, by: float) -> Tensor:
    return torch.empty_like(x)


@operator("twice_for_a_test_backward")
def twice_back(dy: Tensor, by: float) -> Tensor:
    CALLS.append("backward")
    return 2 * by * dy


@twice_back.register_fake
def _(dy: Tensor, by: float) -> Tensor:
    return torch.empty_like(dy)


def _save(ctx, inputs, output):
    ctx.by = inputs[1]


def _back(ctx, dy):
    return twice_back(dy, ctx.by), None


twice.register_autograd(_back, setup_context=_save)
twice_back.refuse_backward("twice")


class Seen(TorchDispatchMode):
    """The names of all operators that are dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _fresh():
    CALLS.clear()


@pytest.mark.parametrize("kind", [torch.Tensor, torch.nn.Parameter])
def test_values_and_gradients_of_direct_calls(kind):
    x = torch.rand(3)
    x = torch.nn.Parameter(x) if kind is torch.nn.Parameter else x.requires_grad_()
    y = twice(x, 3.0)
    assert torch.equal(y, 6 * x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.tolist() == [6, 6, 6]
    assert CALLS == ["kernel", "backward"]


def test_direct_and_dispatched_calls_agree():
    x = torch.rand(3, requires_grad=True)
    direct, dispatched = twice(x, 0.5), twice.overload(x, 0.5)
    assert torch.equal(direct, dispatched)
    gradients = [torch.autograd.grad(y.sum(), x)[0] for y in (direct, dispatched)]
    assert torch.equal(*gradients)
    with torch.no_grad():
        assert not twice(x, 0.5).requires_grad


def test_a_mode_sees_the_operator():
    with Seen() as mode:
        twice(torch.rand(3), 1.0)
    assert "ssm.twice_for_a_test.default" in mode.names


def test_tensors_without_numbers_go_to_the_fake_kernel():
    assert twice(torch.empty(3, device="meta"), 1.0).is_meta
    assert CALLS == []


def test_a_compiler_sees_one_node():
    torch.compiler.reset()
    compiled = torch.compile(
        lambda x: twice(x, 2.0) + 1, backend="aot_eager", fullgraph=True
    )
    x = torch.rand(3)
    assert torch.equal(compiled(x), 4 * x + 1)


def test_gradients_of_gradients_are_refused_either_way():
    x = torch.rand(3, requires_grad=True)
    for y in (twice(x, 1.0), twice.overload(x, 1.0)):
        (gradient,) = torch.autograd.grad((y * x).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.autograd.grad(gradient.sum(), x)
