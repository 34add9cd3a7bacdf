"""Mamba2: three forms agree, transformers' Mamba2Mixer agrees, any size is taken."""

import pytest
import torch
from torch.nn.functional import softplus
from transformers import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from ssm._errors import ArgumentError
from ssm.layers._base import param_groups
from ssm.layers.mamba2 import GatedRMSNorm, Mamba2
from tests.ssm.helpers import assert_close
from tests.ssm.layers.helpers import (
    check_bfloat16,
    check_compiles,
    check_empty,
    check_forms,
    check_kernel,
    check_lengths,
    check_reruns,
    check_step_is_pure,
    materialise,
    random_input,
)


def build(d_model: int = 6, **options) -> Mamba2:
    torch.manual_seed(5)
    return Mamba2(
        d_model, 5, **{"headdim": 3, "ngroups": 2} | options, dtype=torch.float64
    )


@pytest.mark.parametrize(
    ("L", "cuts"), [(1, []), (2, [1]), (63, [2, 40]), (65, [1, 30, 30]), (67, [64])]
)
def test_whole_equals_pieces_equals_steps(L, cuts):
    check_forms(build(), L, cuts)


@pytest.mark.parametrize(
    "options",
    [
        {"bias": True, "conv_bias": False},
        {"d_conv": 1, "ngroups": 1},
        {"d_conv": 6, "expand": 3, "chunk_size": 4, "norm_eps": 0.1},
        {"dt_limit": (0.01, 0.05), "A_init_range": (20.0, 90.0)},
        {"backend": "naive"},
    ],
)
def test_options(options):
    layer = build(**options)
    check_forms(layer, 11, [2, 5])
    check_kernel(layer, 9)
    check_lengths(layer, [0, 9, 2], 9)


@pytest.mark.parametrize("L", [1, 13])
def test_kernel_matrix_is_the_layer(L):
    check_kernel(build(), L)


def test_contract():
    layer = build()
    check_lengths(layer, [0, 1, 12, 7], 12)
    check_step_is_pure(layer)
    check_empty(layer)
    check_reruns(layer, 33)
    check_compiles(layer, 9)


def test_bfloat16():
    torch.manual_seed(0)
    check_bfloat16(lambda **options: Mamba2(6, 5, ngroups=2, **options))


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"n_groups": 2}, {"ngroups": 2}),
        (
            {
                "n_groups": 1,
                "use_bias": True,
                "use_conv_bias": False,
                "conv_kernel": 3,
                "layer_norm_epsilon": 0.01,
                "time_step_limit": (0.02, 0.2),
            },
            {
                "bias": True,
                "conv_bias": False,
                "d_conv": 3,
                "norm_eps": 0.01,
                "dt_limit": (0.02, 0.2),
            },
        ),
    ],
)
def test_transformers_mixer_agrees(theirs, ours):
    config = Mamba2Config(
        hidden_size=12,
        state_size=5,
        num_hidden_layers=1,
        vocab_size=8,
        head_dim=4,
        num_heads=6,
        chunk_size=16,
        **theirs,
    )
    torch.manual_seed(1)
    mixer = Mamba2Mixer(config, layer_idx=0).eval()
    for parameter in mixer.parameters():  # nothing at a symmetric value
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    layer = Mamba2(12, 5, headdim=4, **ours)
    layer.load_state_dict(mixer.state_dict())  # every name, nothing left over
    x = torch.randn(2, 37, 12, requires_grad=True)
    results = []
    for module, y in ((mixer, mixer(x)), (layer, layer(x)[0])):
        names, parameters = zip(*module.named_parameters(), strict=True)
        grads = torch.autograd.grad(y.square().sum(), [x, *parameters])
        results.append({"y": y} | dict(zip(["x", *names], grads, strict=True)))
    peer, own = results
    assert peer.keys() == own.keys()
    for name, expected in peer.items():
        atol = 1e-4 * max(1.0, float(expected.detach().abs().max()))
        torch.testing.assert_close(own[name], expected, atol=atol, rtol=1e-4)


def test_norm_is_group_wise_and_after_the_gate():
    torch.manual_seed(0)
    norm = GatedRMSNorm(6, 2, eps=0.3)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(6))
        y, z = torch.randn(2, 4, 6)
        h = y * z / (1 + torch.exp(-z))
        expected = torch.cat(
            [
                g / (g.square().mean(-1, keepdim=True) + 0.3).sqrt()
                for g in h.split(3, 1)
            ],
            1,
        )
        assert_close(norm(y, z), norm.weight * expected)


@pytest.mark.parametrize(
    ("d_model", "ngroups", "headdim"),
    [(16, 1, 32), (64, 1, 64), (37, 1, 37), (48, 3, 32)],
)
def test_any_size_is_taken(d_model, ngroups, headdim):
    layer = Mamba2(d_model, 4, ngroups=ngroups)
    assert layer.headdim == headdim
    y, state = layer(torch.randn(1, 3, d_model))
    assert y.shape == (1, 3, d_model)
    assert state.ssm.shape == (1, 2 * d_model // headdim, headdim, 4)


def test_an_illegal_headdim_is_answered_with_the_nearest():
    with pytest.raises(ArgumentError, match=r"headdim: got 64.*nearest is 32"):
        Mamba2(16, headdim=64)
    with pytest.raises(ArgumentError, match=r"headdim: got 16.*nearest is 12"):
        Mamba2(12, ngroups=2, headdim=16)
    with pytest.raises(ArgumentError, match=r"ngroups: got 5.*nearest is 4"):
        Mamba2(6, ngroups=5)


def test_initial_values_after_to_empty():
    layer = materialise(lambda: Mamba2(70, headdim=1, dt_min=0.01, dt_max=0.5))
    dt, A = softplus(layer.dt_bias).detach(), layer.A_log.exp().detach()
    assert dt.min() >= 0.01 * (1 - 1e-4)
    assert dt.max() <= 0.5 * (1 + 1e-4)
    assert A.min() >= 1 - 1e-4
    assert A.max() <= 16 * (1 + 1e-4)
    assert A.std() > 3


def test_decay_spares_vectors():
    layer = build()
    names = {id(p): n for n, p in layer.named_parameters()}
    spared = {
        names[id(p)]
        for group in param_groups(layer, 1e-3, 0.1)
        for p in group["params"]
        if group["weight_decay"] == 0
    }
    assert spared == {"A_log", "D", "dt_bias", "norm.weight", "conv1d.bias"}


def test_bad_states_are_named():
    layer = build()
    x = random_input(layer, 2, 3)
    with pytest.raises(ArgumentError, match=r"state: got shape"):
        layer(x, build(headdim=2).init_state(2))
    with pytest.raises(ArgumentError, match="expected a Mamba2State"):
        layer.step(x[:, 0], tuple(layer.init_state(2)))
