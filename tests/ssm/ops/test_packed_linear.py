"""A product of many rows whose bias has a gradient of its own."""

import pytest
import torch

from ssm._errors import ArgumentError
from ssm.ops import _selftest, packed_linear
from tests.ssm.helpers import assert_close
from tests.ssm.ops.helpers import random

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = ("torch", "triton")
NAMES = ("y", "dx", "dweight", "dbias")


def operands(T, N, K, dtype=torch.float32):
    return [random(*shape).to(dtype) for shape in ((T, K), (N, K), (N,))]


def outcome(given, backend):
    """The values, and the gradients of an uneven loss, on the CPU."""
    leaves = [x.detach().clone().requires_grad_() for x in given]
    y = packed_linear(*[x.to(DEVICE) for x in leaves], backend=backend).cpu()
    loss = (y.double() * random(*y.shape, seed=1)).sum()
    return [y.detach(), *torch.autograd.grad(loss, leaves)]


def check(given, backend):
    """Against the products in float64."""
    x, weight, bias = (z.double() for z in given)
    found, dy = outcome(given, backend), random(len(x), len(bias), seed=1)
    dy = dy.to(given[0].dtype).double()  # as what comes back is rounded
    right = [x @ weight.T + bias, dy @ weight, dy.T @ x, dy.sum(0)]
    for name, mine, theirs in zip(NAMES, found, right, strict=True):
        assert mine.dtype == given[0].dtype
        assert_close(mine, theirs, name=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("T", "N", "K"),
    [(1, 1, 1), (2, 8, 5), (63, 9, 3), (64, 37, 4), (704, 40, 8), (2500, 17, 2)],
)
def test_values_and_gradients(T, N, K, backend):
    check(operands(T, N, K), backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_in_float32(dtype):
    check(operands(704, 24, 3, dtype), "triton")
    ones = torch.ones(1100, 20, dtype=dtype)
    given = [torch.zeros(1100, 2, dtype=dtype), *operands(1, 20, 2, dtype)[1:]]
    leaf = given[2].to(DEVICE).requires_grad_()
    y = packed_linear(given[0].to(DEVICE), given[1].to(DEVICE), leaf, backend="triton")
    (found,) = torch.autograd.grad(y, leaf, ones.to(DEVICE))
    assert_close(found.cpu(), torch.full((20,), 1100.0).double())


def test_no_rows_and_no_gradients():
    _, dx, dweight, dbias = outcome(operands(0, 3, 2), "triton")
    assert dx.shape == (0, 2)
    assert not dweight.any()
    assert not dbias.any()
    x, weight, bias = (z.to(DEVICE) for z in operands(5, 3, 2))
    y = packed_linear(x.requires_grad_(), weight, bias, backend="triton")
    (found,) = torch.autograd.grad(y.sum(), x)
    assert_close(found.cpu(), weight.sum(0).expand(5, 2).cpu())


@pytest.mark.parametrize("above", ["expanded", "transposed"])
def test_gradients_from_above_are_read_where_they_lie(above):
    x, weight, bias = (z.to(DEVICE) for z in operands(33, 24, 5))
    dy = random(24, 33, dtype=torch.float32).to(DEVICE).T
    dy = dy[:, :1].expand(33, 24) if above == "expanded" else dy
    y = packed_linear(x, weight, bias.requires_grad_(), backend="triton")
    (found,) = torch.autograd.grad(y, bias, dy)
    assert_close(found.cpu(), dy.double().sum(0).cpu())


def test_two_runs_are_bit_equal():
    runs = [outcome(operands(704, 24, 3), "triton") for _ in range(2)]
    assert all(map(torch.equal, *runs))


def test_gradients_of_gradients():
    x, weight, bias = (z.to(DEVICE).requires_grad_() for z in operands(7, 3, 2))
    found = []
    for backend in BACKENDS:
        y = packed_linear(x, weight, bias, backend=backend)
        first = torch.autograd.grad(y.pow(3).sum(), (weight, bias), create_graph=True)
        loss = sum((z**2).sum() for z in first)
        found.append(torch.autograd.grad(loss, (x, weight, bias)))
    for mine, theirs in zip(found[1], found[0], strict=True):
        assert_close(mine.cpu(), theirs.cpu())


def test_autocast_is_left_to_pytorch():
    x, weight, bias = (z.to(DEVICE) for z in operands(7, 3, 2))
    with torch.autocast(DEVICE.type, torch.bfloat16):
        y = packed_linear(x, weight, bias)
    assert y.dtype == torch.bfloat16
    assert_close(y.cpu(), (x.double() @ weight.double().T + bias).cpu())


def test_asked_for_by_name_it_computes_in_its_operands_dtype():
    leaves = [z.to(DEVICE).requires_grad_() for z in operands(7, 3, 2)]
    alone = packed_linear(*leaves, backend="triton")
    with torch.autocast(DEVICE.type, torch.bfloat16):
        within = packed_linear(*leaves, backend="triton")
    assert torch.equal(within, alone)
    gradients = [torch.autograd.grad(y.square().sum(), leaves) for y in (alone, within)]
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("backend", ["auto", "triton"])  # PyTorch's, and the kernel
def test_compiled_equals_eager(backend):
    def run(*given):
        return packed_linear(*given, backend=backend)

    torch.compiler.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    results = []
    for function in (run, compiled):
        leaves = [z.to(DEVICE).requires_grad_() for z in operands(9, 4, 3)]
        y = function(*leaves)
        results.append([y, *torch.autograd.grad((y**2).sum(), leaves)])
    for mine, theirs in zip(*results, strict=True):
        assert_close(mine.cpu(), theirs.cpu())


def test_the_self_test_finds_nothing():
    for even in (False, True):
        assert not _selftest.check("packed_linear", "triton", DEVICE, even=even)


def test_what_is_refused():
    x, weight, bias = operands(5, 3, 2)
    with pytest.raises(ArgumentError, match="weight: got shape"):
        packed_linear(x, weight[:, :1], bias)
    with pytest.raises(ArgumentError, match="bias: got shape"):
        packed_linear(x, weight, bias[:2])
    with pytest.raises(ArgumentError, match="float32, as x"):
        packed_linear(x, weight.double(), bias)
