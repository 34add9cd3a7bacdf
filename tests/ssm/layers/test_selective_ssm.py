"""SelectiveSSM: S6 in its three forms, its initialisation and its errors."""

import numpy as np
import pytest
import torch
from torch.nn.functional import softplus

from ssm._errors import ArgumentError
from ssm.layers._base import param_groups
from ssm.layers.selective_ssm import SelectiveSSM, segment_sums
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
    random_state,
)


def build(**options) -> SelectiveSSM:
    torch.manual_seed(3)
    return SelectiveSSM(7, 5, dt_max=1.0, dtype=torch.float64, **options)


def test_equals_the_equations_written_as_a_loop():
    layer, batch, L = build(), 2, 19
    x, state = random_input(layer, batch, L), random_state(layer, batch)
    p = {n: v.detach().numpy() for n, v in layer.named_parameters()}
    A, rank, N = -np.exp(p["A_log"]), layer.dt_rank, layer.d_state
    h, u = state.ssm.numpy().copy(), x.numpy()
    expected = np.empty_like(u)
    for b in range(batch):
        for t in range(L):
            projected = p["x_proj.weight"] @ u[b, t]
            steps, B, C = np.split(projected, [rank, rank + N])
            delta = np.log1p(np.exp(p["dt_proj.weight"] @ steps + p["dt_proj.bias"]))
            h[b] = np.exp(delta[:, None] * A) * h[b] + np.outer(delta * u[b, t], B)
            expected[b, t] = h[b] @ C + p["D"] * u[b, t]
    with torch.no_grad():
        y, final = layer(x, state)
    assert_close(y, torch.tensor(expected))
    assert_close(final.ssm, torch.tensor(h))


@pytest.mark.parametrize(("L", "cuts"), [(1, []), (65, [1, 30, 30]), (67, [64])])
def test_whole_equals_pieces_equals_steps(L, cuts):
    check_forms(build(), L, cuts)


@pytest.mark.parametrize("backend", ["torch", "naive"])
def test_backends_agree_with_steps(backend):
    check_forms(build(backend=backend), 11, [4])


@pytest.mark.parametrize("L", [1, 13])
def test_kernel_matrix_is_the_layer(L):
    check_kernel(build(), L)


def test_contract():
    layer = build()
    check_lengths(layer, [0, 9, 4], 9)
    check_step_is_pure(layer)
    check_empty(layer)
    check_reruns(layer, 33)
    check_compiles(layer, 9)


def test_bfloat16():
    torch.manual_seed(0)
    check_bfloat16(lambda **options: SelectiveSSM(7, 5, **options))


def test_steps_start_within_their_range_after_to_empty():
    layer = materialise(lambda: SelectiveSSM(300, 6, dt_min=0.002, dt_max=0.3))
    dt = softplus(layer.dt_proj.bias).detach()
    assert dt.min() >= 0.002 * (1 - 1e-4)
    assert dt.max() <= 0.3 * (1 + 1e-4)
    logs = dt.log()
    uniform = (torch.tensor(0.3).log() - torch.tensor(0.002).log()) / 12**0.5
    assert abs(float(logs.std() / uniform) - 1) < 0.15  # log-uniform
    assert_close(
        layer.A_log.detach().exp(),
        torch.arange(1.0, 7.0).expand(300, 6),
        name="S4D-real",
    )
    assert layer.D.eq(1).all()


def test_parameters_that_set_decays_are_kept_wide():
    layer = SelectiveSSM(8, 4, dtype=torch.bfloat16)
    for parameter in (layer.A_log, layer.D, layer.dt_proj.bias):
        assert parameter.dtype == torch.float32


def test_decay_spares_A_D_and_the_bias_of_the_step():
    layer = build()
    spared = {id(layer.A_log), id(layer.D), id(layer.dt_proj.bias)}
    for group in param_groups(layer, 1e-3, 0.1):
        for parameter in group["params"]:
            assert (group["weight_decay"] == 0) == (id(parameter) in spared)


def test_segment_sums_keep_the_digits_of_short_segments():
    x = torch.full((1, 300, 1), 40.0)
    x[0, -1, 0] = 1e-6
    sums = segment_sums(x)[0, 0]
    assert sums[299, 298] == x[0, -1, 0]
    assert sums[5, 2] == 120
    assert sums.triu().eq(0).all()


def test_bad_arguments_are_named():
    layer = build()
    with pytest.raises(ArgumentError, match="d_state: got 0"):
        SelectiveSSM(4, 0)
    with pytest.raises(ArgumentError, match="dt_min, dt_max"):
        SelectiveSSM(4, 2, dt_min=1.0, dt_max=0.1)
    with pytest.raises(ArgumentError, match=r"x: got shape \(2, 3, 5\)"):
        layer(torch.zeros(2, 3, 5))
    with pytest.raises(ArgumentError, match="x_t: got shape"):
        layer.step(torch.zeros(2, 8), layer.init_state(2))
    with pytest.raises(ArgumentError, match="state: got a NoneType"):
        layer.step(torch.zeros(2, 7), None)
    with pytest.raises(ArgumentError, match="one for a batch of 2"):
        layer(random_input(layer, 2, 3), layer.init_state(3))
    with pytest.raises(ArgumentError, match="lengths"):
        layer(random_input(layer, 2, 3), None, torch.tensor([1, 4]))
