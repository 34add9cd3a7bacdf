"""RWKV against the papers' sums, transformers' loop and the chapter's code."""

import copy
import math

import numpy as np
import pytest
import torch
from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention_cpu

from ssm._errors import ArgumentError
from ssm.layers._base import param_groups
from ssm.layers.rwkv import (
    RWKV,
    RWKVBlock,
    RWKVChannelMix,
    RWKVState,
    WKVState,
    wkv_scan,
    wkv_step,
)
from tests.ssm.helpers import TOLERANCE, assert_close, error
from tests.ssm.layers.helpers import (
    check_compiles,
    check_empty,
    check_float32,
    check_forms,
    check_kernel,
    check_lengths,
    check_reruns,
    check_step_is_pure,
    materialise,
    random_input,
    random_state,
)


def build(kind=RWKV, **options):
    torch.manual_seed(3)
    layer = kind(7, dtype=torch.float64, **options)
    with torch.no_grad():  # signed, uneven parameters
        for name, parameter in layer.named_parameters():
            if name.startswith("mix"):
                parameter.copy_(torch.randn(7))
    return layer


def numbers(layer):
    return {n: v.detach().numpy() for n, v in layer.named_parameters()}


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def mixed(p, name, x, t):
    mu, before = p[f"mix_{name}"], x[t - 1] if t else np.zeros(7)
    return p[f"{name}.weight"] @ (mu * x[t] + (1 - mu) * before)


def test_equals_the_papers_sums():
    """arXiv:2305.13048, equations for r, k, v, wkv and o: a direct O(L^2) sum."""
    layer = build()
    p, x = numbers(layer), random_input(layer, 2, 12)
    w, u = np.exp(p["time_decay"]), p["time_first"]
    expected = np.empty(x.shape)
    for b, row in enumerate(x.numpy()):
        k = [mixed(p, "key", row, t) for t in range(12)]
        v = [mixed(p, "value", row, t) for t in range(12)]
        for t in range(12):
            weights = [np.exp(-(t - 1 - s) * w + k[s]) for s in range(t)]
            weights.append(np.exp(u + k[t]))
            wkv = sum(a * c for a, c in zip(weights, v, strict=False)) / sum(weights)
            r = sigmoid(mixed(p, "receptance", row, t))
            expected[b, t] = p["output.weight"] @ (r * wkv)
    assert_close(layer(x)[0], torch.tensor(expected))


def test_equals_transformers_loop_and_its_state():
    generator = torch.Generator().manual_seed(0)
    k, v = 3 * torch.randn(2, 2, 40, 5, generator=generator)
    decay, u = torch.randn(2, 5, generator=generator)
    state = [*torch.rand(2, 2, 5, generator=generator) + 0.5, torch.ones(2, 5)]
    expected, final = rwkv_linear_attention_cpu(decay, u, k, v, state, True)
    numerator, denominator, maximum = state
    past = WKVState(numerator / denominator, denominator, maximum)
    average, ours = wkv_scan(k, v, decay.exp(), u, past)
    assert_close(average, expected)
    final = [final[0] / final[1], *final[1:]]
    for got, want in zip(ours, final, strict=True):
        assert_close(got, want)
    stepped = past
    for t in range(40):
        average, stepped = wkv_step(k[:, t], v[:, t], decay.exp(), u, stepped)
        assert_close(average, expected[:, t])
    for got, want in zip(stepped, final, strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("backend", ["auto", "torch", "naive"])
def test_keys_of_80_neither_overflow_nor_lose_their_gradients(backend):
    layer = build(backend=backend)
    with torch.no_grad():
        layer.key.weight.copy_(torch.eye(7))
        layer.mix_key.fill_(1.0)
    x = 80 * random_input(layer, 2, 33).sign()
    x[:, 20:] = -80.0  # a large past fades behind small keys
    x.requires_grad_()
    y, state = layer(x)
    single = copy.deepcopy(layer).float()
    x32 = x.detach().float().requires_grad_()
    y32, state32 = single(x32)
    y.square().sum().backward()
    y32.square().sum().backward()
    for leaf in (*state32, x32.grad, *(p.grad for p in single.parameters())):
        assert leaf.isfinite().all()
    assert_close(y32, y)
    # A logarithm of 80 is itself known to 80 units of rounding only.
    assert error(x32.grad, x.grad) < 80 * TOLERANCE[torch.float32]
    assert state.maximum.ge(-80).all()


def test_a_large_key_takes_the_average():
    p = WKVState(torch.zeros(1, 1), torch.zeros(1, 1), torch.full((1, 1), -1e38))
    k = torch.tensor([0.0, 90.0, 0.0]).reshape(1, 3, 1)
    v = torch.tensor([1.0, 5.0, 2.0]).reshape(1, 3, 1)
    average, _ = wkv_scan(k, v, torch.tensor([0.1]), torch.tensor([0.0]), p)
    assert average.flatten().tolist() == [1.0, 5.0, 5.0]


def test_state_gradients_are_those_of_the_average_itself():
    """The maximum is a scale without gradient; what depends on it is exact."""
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 1, 6, 3, generator=generator, dtype=torch.float64)
    w, u, *start = torch.rand(5, 3, generator=generator, dtype=torch.float64)
    start = [s[None] for s in start]
    inputs = [z.clone().requires_grad_() for z in (k, v, w, u, *start)]

    def averages(k, v, w, u, *state):
        first, state = wkv_scan(k[:, :4], v[:, :4], w, u, WKVState(*state))
        return first, wkv_scan(k[:, 4:], v[:, 4:], w, u, state)[0]

    assert torch.autograd.gradcheck(averages, inputs)


def test_block_is_the_chapters_loop():
    layer = build(RWKVBlock)
    x, state = random_input(layer, 2, 11), random_state(layer, 2)
    k, v = layer.key(x), layer.value(x)
    r, s, outputs = torch.sigmoid(layer.receptance(x)), state.s, []
    for t in range(11):
        wkv = layer.time_first * k[:, t] * v[:, t] + s
        s = torch.exp(-torch.exp(layer.time_decay)) * s + k[:, t] * v[:, t]
        outputs.append(r[:, t] * wkv)
    y, final = layer(x, state)
    assert_close(y, layer.output(torch.stack(outputs, 1)))
    assert_close(final.s, s)


def test_channel_mix_is_the_papers_formula():
    layer = build(RWKVChannelMix, d_hidden=9)
    p, x = numbers(layer), random_input(layer, 2, 6)
    expected = np.empty(x.shape)
    for b, row in enumerate(x.numpy()):
        for t in range(6):
            k = np.maximum(mixed(p, "key", row, t), 0) ** 2
            r = sigmoid(mixed(p, "receptance", row, t))
            expected[b, t] = r * (p["value.weight"] @ k)
    y, state = layer(x)
    assert_close(y, torch.tensor(expected))
    assert torch.equal(state.x_prev, x[:, -1])


@pytest.mark.parametrize("kind", [RWKV, RWKVBlock, RWKVChannelMix])
@pytest.mark.parametrize(("L", "cuts"), [(1, []), (65, [0, 1, 30, 30]), (67, [64])])
def test_whole_equals_pieces_equals_steps(kind, L, cuts):
    check_forms(build(kind), L, cuts)


@pytest.mark.parametrize("kind", [RWKV, RWKVBlock])
@pytest.mark.parametrize("backend", ["torch", "naive"])
def test_backends_agree_with_steps(kind, backend):
    check_forms(build(kind, backend=backend), 11, [4])


@pytest.mark.parametrize("kind", [RWKV, RWKVBlock])
@pytest.mark.parametrize("L", [1, 13])
def test_kernel_matrix_is_the_layer(kind, L):
    check_kernel(build(kind), L)


def test_kernel_matrix_of_rwkv_is_an_average():
    matrix, _ = build().kernel_matrix(random_input(build(), 2, 9))
    assert_close(matrix.sum(-1), torch.ones(2, 7, 9, dtype=torch.float64))


@pytest.mark.parametrize("kind", [RWKV, RWKVBlock, RWKVChannelMix])
def test_contract(kind):
    layer = build(kind)
    check_lengths(layer, [0, 9, 4], 9)
    check_step_is_pure(layer)
    check_empty(layer)
    check_reruns(layer, 33)
    check_float32(layer, 65)


def test_compiles():
    check_compiles(build(), 9)


def test_starts_as_the_authors_code():
    layer = RWKV(5, layer_idx=1, n_layers=4)
    depth, fall = 1 / 3, 3 / 4
    for i in range(5):
        values = {
            "time_decay": -5 + 8 * (i / 4) ** (0.7 + 1.3 * depth),
            "time_first": math.log(0.3) + 0.5 * ((i + 1) % 3 - 1),
            "mix_key": (i / 5) ** fall,
            "mix_value": (i / 5) ** fall + 0.3 * depth,
            "mix_receptance": (i / 5) ** (0.5 * fall),
        }
        for name, value in values.items():
            assert getattr(layer, name)[i].item() == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("kind", [RWKV, RWKVBlock, RWKVChannelMix])
def test_resets_after_to_empty(kind):
    layer = materialise(lambda: kind(6))
    layer(torch.randn(1, 3, 6))


def test_decays_keep_float32_and_get_no_weight_decay():
    layer = RWKV(4, dtype=torch.bfloat16)
    assert layer.time_decay.dtype == layer.init_state(1).average.dtype
    y, state = layer(torch.randn(1, 5, 4, dtype=torch.bfloat16))
    assert (y.dtype, state.average.dtype) == (torch.bfloat16, torch.float32)
    spared = [g for g in param_groups(layer, 1e-3, 0.1) if g["weight_decay"] == 0]
    names = {
        n
        for n, p in layer.named_parameters()
        if any(p is q for q in spared[0]["params"])
    }
    assert {"time_decay", "time_first"} <= names


def test_bad_arguments():
    layer = build()
    x = random_input(layer, 2, 5)
    with pytest.raises(ArgumentError, match="x: got shape"):
        layer(x[..., :6])
    with pytest.raises(
        ArgumentError, match="got a RWKVBlockState; expected a RWKVState"
    ):
        layer(x, build(RWKVBlock).init_state(2))
    with pytest.raises(ArgumentError, match=r"state\.x_prev: got shape \(2, 3\)"):
        layer(x, RWKVState(torch.zeros(2, 3), *layer.init_state(2)[1:]))
    with pytest.raises(ArgumentError, match="expected one for a batch of 2"):
        layer.step(x[:, 0], layer.init_state(4))
    with pytest.raises(ArgumentError, match="backend: got 'cuda'"):
        build(backend="cuda")(x)
