"""Mamba: three forms agree, transformers' MambaMixer agrees, checkpoints' names."""

import pytest
import torch
from torch.nn.functional import silu, softplus
from transformers import MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer

from ssm._errors import ArgumentError
from ssm.layers._base import param_groups
from ssm.layers.mamba import Mamba, ShortConv
from ssm.layers.selective_ssm import fixed_rates
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


def build(**options) -> Mamba:
    torch.manual_seed(5)
    return Mamba(5, 3, dtype=torch.float64, **options)


@pytest.mark.parametrize(
    ("L", "cuts"), [(1, []), (2, [1]), (63, [2, 40]), (65, [1, 30, 30]), (67, [64])]
)
def test_whole_equals_pieces_equals_steps(L, cuts):
    check_forms(build(), L, cuts)


@pytest.mark.parametrize(
    "options",
    [
        {"bias": True, "conv_bias": False},
        {"d_conv": 1},
        {"d_conv": 7, "expand": 3, "dt_rank": 2},
        {"backend": "torch"},
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
    check_bfloat16(lambda **options: Mamba(6, 5, **options))


def peer(**options) -> MambaMixer:
    config = MambaConfig(
        hidden_size=20, state_size=5, num_hidden_layers=1, vocab_size=8, **options
    )
    torch.manual_seed(1)
    mixer = MambaMixer(config, layer_idx=0)
    for parameter in mixer.parameters():  # nothing at a symmetric value
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return mixer.eval()


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({}, {}),
        (
            {"use_bias": True, "use_conv_bias": False, "conv_kernel": 3, "expand": 3},
            {"bias": True, "conv_bias": False, "d_conv": 3, "expand": 3},
        ),
    ],
)
def test_transformers_mixer_agrees(theirs, ours):
    mixer = peer(**theirs)
    layer = Mamba(20, 5, **ours)
    layer.load_state_dict(mixer.state_dict())  # every name, nothing left over
    x = torch.randn(2, 37, 20, requires_grad=True)
    grads = []
    for output in (mixer(x), layer(x)[0]):
        wanted = [x, *(mixer if not grads else layer).parameters()]
        grads.append((output, torch.autograd.grad(output.square().sum(), wanted)))
    (y_peer, grads_peer), (y, grads_ours) = grads
    torch.testing.assert_close(y, y_peer, atol=1e-4, rtol=1e-4)
    names = ["x", *(n for n, _ in mixer.named_parameters())]
    by_name = dict(
        zip(["x", *(n for n, _ in layer.named_parameters())], grads_ours, strict=True)
    )
    for name, expected in zip(names, grads_peer, strict=True):
        scale = float(expected.abs().max())
        torch.testing.assert_close(
            by_name[name], expected, atol=1e-4 * scale, rtol=1e-4
        )


def test_the_usual_size_is_built_with_the_names_of_checkpoints():
    with torch.device("meta"):
        layer = Mamba(d_model=2048, d_state=16, d_conv=4, expand=2)
    assert {n: tuple(p.shape) for n, p in layer.named_parameters()} == {
        "A_log": (4096, 16),
        "D": (4096,),
        "in_proj.weight": (8192, 2048),
        "conv1d.weight": (4096, 1, 4),
        "conv1d.bias": (4096,),
        "x_proj.weight": (128 + 32, 4096),
        "dt_proj.weight": (4096, 128),
        "dt_proj.bias": (4096,),
        "out_proj.weight": (2048, 4096),
    }


def test_steps_start_within_their_range_after_to_empty():
    dt = softplus(materialise(lambda: Mamba(65)).dt_proj.bias).detach()
    assert dt.min() >= 0.001 * (1 - 1e-4)
    assert dt.max() <= 0.1 * (1 + 1e-4)


def test_steps_with_rates_formed_once_are_the_same_steps():
    layer = build()
    x, state = random_input(layer, 2, 1)[:, 0], layer.init_state(2)
    with torch.no_grad():
        state = layer.step(x, state)[1]  # the rates act on what is there
        expected = layer.step(x, state)[0]
        with fixed_rates([layer, torch.nn.Identity()]) as (A,):
            assert torch.equal(A, -layer.A_log.exp())
            assert torch.equal(layer.step(x, state)[0], expected)
            A.mul_(2)  # it is what is read
            assert not torch.equal(layer.step(x, state)[0], expected)
        assert torch.equal(layer.step(x, state)[0], expected)


def test_decay_spares_A_D_and_biases():
    layer = build()
    names = {id(p): n for n, p in layer.named_parameters()}
    spared = {
        names[id(p)]
        for group in param_groups(layer, 1e-3, 0.1)
        for p in group["params"]
        if group["weight_decay"] == 0
    }
    assert spared == {"A_log", "D", "dt_proj.bias", "conv1d.bias"}


def test_short_conv_is_torch_conv1d():
    torch.manual_seed(0)
    ours, theirs = ShortConv(6, 4), torch.nn.Conv1d(6, 6, 4, groups=6, padding=3)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 9, 6)
    with torch.no_grad():
        expected = silu(theirs(x.mT)[..., :9]).mT
        assert_close(ours(x, None, None)[0], expected)


def test_bad_arguments_are_named():
    layer = build()
    with pytest.raises(ArgumentError, match="expand: got 0"):
        Mamba(8, expand=0)
    with pytest.raises(ArgumentError, match=r"x: got shape \(1, 2, 10\)"):
        layer(torch.zeros(1, 2, 10))
    other = Mamba(5, 4, dtype=torch.float64).init_state(2)
    with pytest.raises(ArgumentError, match=r"state: got shape \(2, 10, 4\)"):
        layer(random_input(layer, 2, 3), other)
    with pytest.raises(ArgumentError, match="expected a MambaState"):
        layer.step(torch.zeros(2, 5, dtype=torch.float64), (None, None))
    with pytest.raises(ArgumentError, match="backend: got 'fast'"):
        build(backend="fast")(random_input(layer, 2, 3))
