"""A matrix against a few vectors, and a sum with its norm: what a single step needs."""

import pytest
import torch

from ssm._errors import ArgumentError, BackendError
from ssm.ops import add_norm, linear_step
from tests.ssm.helpers import assert_close
from tests.ssm.ops.helpers import random

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def results(op, operands, **options):
    """Outputs and all gradients, on the CPU."""
    leaves = [x.detach().clone().requires_grad_() for x in operands]
    found = op(*leaves, **options)
    outputs = found if isinstance(found, tuple) else (found,)
    every = torch.cat([y.double().flatten() for y in outputs])
    loss = (every * torch.arange(every.numel(), device=every.device).cos()).sum()
    gradients = torch.autograd.grad(loss, leaves)
    return [x.detach().cpu() for x in (*outputs, *gradients)]


def check(op, operands, backend):
    """Against the definition in float64."""
    found = results(op, [x.to(DEVICE) for x in operands], backend=backend)
    expected = results(op, [x.double() for x in operands], backend="naive")
    for value, right in zip(found, expected, strict=True):
        assert_close(value, right)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(
    ("rows", "N", "K"),
    [(1, 1, 1), (1, 80, 97), (2, 65, 48), (3, 7, 513), (4, 130, 1100)],
)
def test_a_product(rows, N, K, backend):
    shapes = ((rows, K), (N, K), (N,))
    check(linear_step, [random(*s, dtype=torch.float32) for s in shapes], backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_product_of_half_precision_sums_in_float32(dtype):
    x, weight = (random(*s).to(dtype) for s in ((2, 300), (70, 300)))
    y = linear_step(x.to(DEVICE), weight.to(DEVICE), backend="triton").cpu()
    exact = x.double() @ weight.double().T
    unit = torch.finfo(dtype).eps * exact.abs()  # the interpreter cuts digits off
    assert y.dtype == dtype
    assert ((y.double() - exact).abs() <= unit + 1e-5).all()


def test_operands_are_read_where_they_lie():
    x, weight = random(2, 90, dtype=torch.float32), random(60, 90, dtype=torch.float32)
    x, weight = x.to(DEVICE), weight.to(DEVICE)
    y = linear_step(x[:, 5:35], weight[::2, 5:35], backend="triton")
    assert_close(y, x[:, 5:35] @ weight[::2, 5:35].T)
    y = linear_step(x[:, ::3], weight[:, ::3], backend="triton")
    assert_close(y, x[:, ::3] @ weight[:, ::3].T)


def test_what_a_product_refuses():
    x, weight = torch.zeros(5, 3, device=DEVICE), torch.zeros(2, 3, device=DEVICE)
    with pytest.raises(BackendError, match="4 rows at most, not 5"):
        linear_step(x, weight, backend="triton")
    assert linear_step(x, weight).shape == (5, 2)
    with pytest.raises(ArgumentError, match="weight"):
        linear_step(x, weight[:, :2])
    with pytest.raises(ArgumentError, match="float32, as x"):
        linear_step(x, weight.double())


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 64), (2, 3, 97)])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_a_sum_and_its_norm(shape, size, backend):
    x, added = (size * random(*shape, seed=i, dtype=torch.float32) for i in (1, 2))
    check(add_norm, [x, added, random(shape[-1], dtype=torch.float32)], backend)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_the_residual_stream_keeps_its_precision(backend):
    x, added, weight = random(2, 48).float(), random(2, 48).bfloat16(), random(48)
    operands = [t.to(DEVICE) for t in (x, added, weight.bfloat16())]
    total, normed = add_norm(*operands, backend=backend)
    assert total.dtype == torch.float32
    assert normed.dtype == torch.bfloat16
    assert torch.equal(total.cpu(), x + added)
    alone, same = add_norm(total, None, operands[2], backend=backend)
    assert torch.equal(alone, total)
    assert torch.equal(same, normed)


def test_a_norm_is_of_root_mean_square_one():
    x = random(4, 33, dtype=torch.float32).to(DEVICE)
    _, normed = add_norm(x, None, torch.ones(33, device=DEVICE), 0.0, backend="triton")
    assert_close(normed.square().mean(-1), torch.ones(4, device=DEVICE))


def test_what_a_norm_refuses():
    x = torch.zeros(2, 4, device=DEVICE)
    with pytest.raises(ArgumentError, match="added"):
        add_norm(x, x[:1], torch.ones(4, device=DEVICE))
    with pytest.raises(ArgumentError, match="weight"):
        add_norm(x, None, torch.ones(3, device=DEVICE))
    with pytest.raises(BackendError, match="16384 channels"):
        add_norm(
            torch.zeros(1, 16385, device=DEVICE),
            None,
            torch.ones(16385, device=DEVICE),
            backend="triton",
        )
