"""DiagonalSSD: a sum of exponentials, or input-dependent decays, in three forms."""

import pytest
import torch
from torch.nn.functional import softplus

from ssm._errors import ArgumentError
from ssm.layers._base import param_groups
from ssm.layers.diagonal_ssd import DiagonalSSD
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


def build(selective: bool = False, **options) -> DiagonalSSD:
    torch.manual_seed(5)
    defaults = {"d_state": 3, "headdim": 5}
    layer = DiagonalSSD(
        5, **defaults | options, selective=selective, dtype=torch.float64
    )
    with torch.no_grad():  # nothing at a symmetric value
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer


@pytest.mark.parametrize("selective", [False, True])
@pytest.mark.parametrize(
    ("L", "cuts"), [(1, []), (2, [1]), (65, [1, 30, 30]), (67, [64])]
)
def test_whole_equals_pieces_equals_steps(selective, L, cuts):
    check_forms(build(selective), L, cuts)


@pytest.mark.parametrize("selective", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"d_conv": 0},
        {"d_conv": 1, "headdim": 1},
        {"headdim": 10, "chunk_size": 4},
        {"expand": 3, "d_state": 1},
        {"rate_min": 1e-5, "rate_max": 40.0},
        {"backend": "naive"},
    ],
)
def test_options(selective, options):
    layer = build(selective, **options)
    check_forms(layer, 11, [2, 5])
    check_kernel(layer, 9)
    check_lengths(layer, [0, 9, 2], 9)


@pytest.mark.parametrize("selective", [False, True])
def test_contract(selective):
    layer = build(selective)
    check_kernel(layer, 1)
    check_lengths(layer, [0, 1, 12, 7], 12)
    check_step_is_pure(layer)
    check_empty(layer)
    check_reruns(layer, 33)
    check_compiles(layer, 9)
    check_bfloat16(lambda **options: DiagonalSSD(5, 3, selective=selective, **options))


def test_the_kernel_is_a_sum_of_exponentials_of_the_time_between():
    layer, L = build(), 12
    with torch.no_grad():
        matrix, _ = layer.kernel_matrix(random_input(layer, 2, L))
        a = (-softplus(layer.dt_bias)).exp()
        coefficients = layer.C * layer.B * (1 - a)
        lag = torch.arange(L, dtype=torch.float64)
        kernel = (coefficients[..., None] * a[..., None] ** lag).sum(1)
        kernel[:, 0] += layer.D
    assert torch.equal(matrix[0], matrix[1])  # whatever the input
    for t in range(L):
        for s in range(t + 1):
            assert_close(matrix[0, :, t, s], kernel[:, t - s], name=f"{t}, {s}")


def test_the_rank_below_the_diagonal_is_the_number_of_decays():
    layer = DiagonalSSD(2, 3, headdim=4, rate_min=0.05, dtype=torch.float64)
    assert layer.nheads == 1
    with torch.no_grad():
        matrix, _ = layer.kernel_matrix(random_input(layer, 1, 16))
    assert torch.linalg.matrix_rank(matrix[0, 0, 8:, :8], rtol=1e-13) == 3


def test_selectivity_without_weights_has_fixed_decays():
    """Selective decays reduce to the fixed ones where the input does not move them."""
    layer = build(selective=True)
    with torch.no_grad():
        layer.in_proj.weight[-layer.nheads * layer.d_state :] = 0
        x = random_input(layer, 1, 1)
        layer.conv1d.weight.zero_()  # B and C are then the convolution's bias
        matrix, _ = layer.kernel_matrix(x.expand(1, 6, 5))
        B, C = torch.nn.functional.silu(layer.conv1d.bias[-6:]).split(3)
        a = (-softplus(layer.dt_bias)).exp()
    assert_close(matrix[0, :, 5, 1], (C * B * (1 - a) * a**4).sum(-1))


def test_a_slow_state_holds_the_mean_of_a_constant_input():
    """h' = rate (v - h): each state tends to B v, however slow its decay."""
    layer = build(d_conv=0, rate_min=0.3)
    x = torch.ones(1, 400, 5, dtype=torch.float64)
    with torch.no_grad():
        _, state = layer(x)
        v = (layer.in_proj(x[:, 0]).split(layer.sizes, -1)[1]).unflatten(-1, (2, 5))
        assert_close(state.ssm, layer.B[None, :, :, None] * v[:, :, None])


def test_initial_values_after_to_empty():
    layer = materialise(lambda: DiagonalSSD(64, 8, rate_min=0.01, rate_max=2.0))
    rates = softplus(layer.dt_bias).detach()
    assert rates.min() >= 0.01 * (1 - 1e-4)
    assert rates.max() <= 2.0 * (1 + 1e-4)


@pytest.mark.parametrize("selective", [False, True])
def test_decay_spares_decays_and_skip(selective):
    layer = build(selective)
    names = {id(p): n for n, p in layer.named_parameters()}
    spared = {
        names[id(p)]
        for group in param_groups(layer, 1e-3, 0.1)
        for p in group["params"]
        if group["weight_decay"] == 0
    }
    couplings = set() if selective else {"B", "C"}
    assert spared == {"dt_bias", "D", "conv1d.bias"} | couplings


def test_bad_arguments_are_named():
    layer = build()
    with pytest.raises(ArgumentError, match=r"headdim: got 4.*nearest is"):
        DiagonalSSD(5, headdim=4)
    with pytest.raises(ArgumentError, match="d_state"):
        DiagonalSSD(5, 0)
    x = random_input(layer, 2, 3)
    with pytest.raises(ArgumentError, match=r"state: got shape"):
        layer(x, build(d_state=4).init_state(2))
    with pytest.raises(ArgumentError, match="expected a DiagonalState"):
        layer.step(x[:, 0], tuple(layer.init_state(2)))
