"""MoE against a loop over tokens; its loss against the formula."""

import pytest
import torch
from torch import Tensor

from ssm._errors import ArgumentError
from ssm.layers.moe import MoE
from tests.ssm.helpers import assert_close


def build(n_experts: int = 5, top_k: int = 2) -> MoE:
    torch.manual_seed(0)
    return MoE(3, n_experts, top_k, 4, dtype=torch.float64)


def token_by_token(layer: MoE, x: Tensor) -> tuple[Tensor, Tensor]:
    """The definition: each token by itself, its k best experts one after the other."""
    rows, counts = [], torch.zeros(layer.n_experts, dtype=x.dtype)
    mean = torch.zeros(layer.n_experts, dtype=x.dtype)
    for token in x:
        p = (layer.router.weight @ token).softmax(0)
        best = sorted(range(layer.n_experts), key=lambda e: -p[e].item())
        best = best[: layer.top_k]
        total = sum(p[e] for e in best)
        rows.append(sum(p[e] / total * layer.experts[e](token) for e in best))
        counts[best] += 1
        mean = mean + p / len(x)
    fraction = counts / (len(x) * layer.top_k)
    return torch.stack(rows), layer.n_experts * (fraction * mean).sum()


def results(layer: MoE, x: Tensor, y: Tensor, loss: Tensor) -> list[Tensor]:
    weight = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape)
    inputs = [x, *layer.parameters()]
    total = (weight * y).sum() + 3 * loss
    grads = torch.autograd.grad(
        total, inputs, allow_unused=True, materialize_grads=True
    )
    return [y.detach(), loss.detach(), *grads]


@pytest.mark.parametrize(("n_experts", "top_k"), [(5, 2), (4, 1), (3, 3), (1, 1)])
@pytest.mark.parametrize("tokens", [1, 13])
def test_equals_a_loop_over_tokens_with_all_gradients(n_experts, top_k, tokens):
    layer = build(n_experts, top_k)
    x = torch.randn(tokens, 3, dtype=torch.float64, requires_grad=True)
    expected = results(layer, x, *token_by_token(layer, x))
    for got, want in zip(results(layer, x, *layer(x)), expected, strict=True):
        assert_close(got, want)


def test_a_step_equals_the_same_step_of_a_sequence():
    layer = build()
    x = torch.randn(2, 7, 3, dtype=torch.float64)
    y, _ = layer(x)
    for t in range(7):
        assert_close(layer(x[:, t])[0], y[:, t])


def test_padding_is_no_token():
    layer = build()
    x = torch.randn(2, 6, 3, dtype=torch.float64)
    x[0, 4:] = x[1, 1:] = float("nan")
    x.requires_grad_()
    valid = torch.arange(6) < torch.tensor([[4], [1]])
    y, loss = layer(x, valid)
    alone, alone_loss = layer(x[valid])
    assert_close(y[valid], alone)
    assert_close(loss, alone_loss)
    assert y[~valid].eq(0).all()
    for grad in results(layer, x, y, loss):
        assert grad.isfinite().all()


def test_loss_is_one_when_the_router_is_balanced_and_n_when_it_has_collapsed():
    layer = build(4, 1)
    x = torch.rand(50, 3, dtype=torch.float64) + 0.1
    with torch.no_grad():
        layer.router.weight.zero_()
        assert_close(layer(x)[1], torch.tensor(1.0, dtype=torch.float64))
        layer.router.weight[2] = 1e4
        assert_close(layer(x)[1], torch.tensor(4.0, dtype=torch.float64))


def test_no_tokens():
    y, loss = build()(torch.zeros(2, 0, 3, dtype=torch.float64))
    assert y.shape == (2, 0, 3)
    assert loss.item() == 0
    y, loss = build()(
        torch.full((2, 3), float("nan"), dtype=torch.float64), torch.zeros(2).bool()
    )
    assert y.eq(0).all()
    assert loss.item() == 0


def test_two_runs_are_bit_equal():
    layer = build()
    x = torch.randn(40, 3, dtype=torch.float64, requires_grad=True)
    first, second = (results(layer, x, *layer(x)) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_routes_in_float32(dtype):
    layer = build().to(dtype)
    x = torch.randn(9, 3).to(dtype)
    y, loss = layer(x)
    assert (y.dtype, loss.dtype) == (dtype, torch.float32)
    exact = build().to(dtype).double()
    assert_close(y, exact(x.double())[0], dtype=dtype)


def test_bad_arguments():
    with pytest.raises(
        ArgumentError, match="top_k: got 4; expected 1 to n_experts = 3"
    ):
        MoE(4, 3, 4)
    with pytest.raises(ArgumentError, match="x: got shape"):
        build()(torch.zeros(2, 4))
    with pytest.raises(ArgumentError, match="valid: got shape"):
        build()(torch.zeros(2, 3, dtype=torch.float64), torch.ones(3).bool())
