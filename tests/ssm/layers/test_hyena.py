"""Hyena against its definition as a loop; its filter; its growing state."""

from functools import partial

import numpy as np
import pytest
import torch

from ssm._errors import ArgumentError
from ssm.layers._base import state_bytes
from ssm.layers.hyena import Hyena
from tests.ssm.helpers import assert_close
from tests.ssm.layers.helpers import (
    check_compiles,
    check_empty,
    check_float32,
    check_forms,
    check_kernel,
    check_lengths,
    check_reruns,
    check_step_is_pure,
    join_rows,
    materialise,
    random_input,
)

join_histories = partial(join_rows, left=True)


def build(order=2, short_width=3, **options) -> Hyena:
    torch.manual_seed(3)
    return Hyena(5, order, 6, short_width, 20.0, dtype=torch.float64, **options)


@pytest.mark.parametrize(("order", "short_width"), [(1, 4), (2, 3), (3, 1)])
def test_equals_its_definition_as_a_loop(order, short_width):
    layer, D, L = build(order, short_width), 5, 14
    p = {n: v.detach().numpy() for n, v in layer.named_parameters()}
    h = layer.filter(L).detach().numpy()
    x = random_input(layer, 2, L)
    expected = np.empty(x.shape)
    for b, row in enumerate(x.numpy()):
        projected = row @ p["in_proj.weight"].T + p["in_proj.bias"]
        z = np.tile(p["short_bias"], (L, 1))
        for t in range(L):
            for j in range(min(short_width, t + 1)):
                z[t] += p["short_weight"][:, short_width - 1 - j] * projected[t - j]
        v = z[:, order * D :]
        for n in range(order):
            convolved = p["skip"][n] * v
            for t in range(L):
                for s in range(t + 1):
                    convolved[t] += h[n, :, t - s] * v[s]
            v = z[:, n * D : (n + 1) * D] * convolved
        expected[b] = v @ p["out_proj.weight"].T + p["out_proj.bias"]
    assert_close(layer(x)[0], torch.tensor(expected))


def test_filter_is_its_formula():
    layer = build().filter
    p = {n: v.detach().numpy() for n, v in layer.named_parameters()}
    h = layer(40)
    for j in (0, 1, 17, 39):
        angles = j * 10000.0 ** (-np.arange(8) / 8)
        z = np.array([np.log(1 + j), *np.sin(angles), *np.cos(angles)])
        for i in range(3):
            a = p[f"hidden.{i}.weight"] @ z + p[f"hidden.{i}.bias"]
            z = np.sin(p["frequency"] * a)
        rate = np.exp(p["log_rate"])
        window = np.sqrt(2 * rate) * np.exp(-rate * j)
        expected = window * (p["out.weight"] @ z).reshape(2, 5)
        assert_close(h[..., j], torch.tensor(expected))


def test_filter_at_a_lag_does_not_depend_on_the_length():
    layer = build().filter
    long = layer(300)
    for L in (0, 1, 2, 63, 299):
        assert_close(layer(L), long[..., :L])


def test_windows_fall_to_one_percent_in_four_steps_to_the_reach():
    layer = Hyena(6, reach=500.0).filter
    rate = layer.log_rate.exp()
    assert_close((-4 * rate[:, 0]).exp(), torch.full((2,), 0.01))
    assert_close((-500 * rate[:, -1]).exp(), torch.full((2,), 0.01))
    assert rate.diff(dim=1).lt(0).all()


@pytest.mark.parametrize(("order", "short_width"), [(1, 4), (2, 3), (3, 1)])
@pytest.mark.parametrize(("L", "cuts"), [(1, []), (33, [0, 1, 30, 30])])
def test_whole_equals_pieces_equals_steps(order, short_width, L, cuts):
    check_forms(build(order, short_width), L, cuts)


@pytest.mark.parametrize(("L", "cuts"), [(63, [30]), (64, []), (67, [64])])
def test_lengths_around_a_power_of_two(L, cuts):
    check_forms(build(), L, cuts)


def test_the_naive_backend_agrees():
    check_forms(build(backend="naive"), 9, [4])


@pytest.mark.parametrize("order", [1, 2, 3])
def test_kernel_matrix_is_the_layer(order):
    check_kernel(build(order), 13)
    check_kernel(build(order), 1)


@pytest.mark.parametrize("order", [1, 2])
def test_contract(order):
    layer = build(order)
    check_lengths(layer, [0, 9, 4], 9, join_histories)
    check_step_is_pure(layer)
    check_empty(layer)
    check_reruns(layer, 33)
    check_float32(layer, 65)


def test_compiles():
    check_compiles(build(), 9)


def test_the_state_grows_by_one_input_a_convolution_and_step():
    layer = build()
    state, sizes = layer.init_state(3), []
    for x_t in random_input(layer, 3, 4).unbind(1):
        _, state = layer.step(x_t, state)
        sizes.append(state_bytes(state))
    short, entry = 3 * 2 * 15 * 8, 3 * 2 * 5 * 8
    assert sizes == [short + entry * n for n in (1, 2, 3, 4)]


def test_resets_after_to_empty():
    layer = materialise(lambda: Hyena(6))
    layer(torch.randn(1, 3, 6))


def test_bad_arguments():
    layer = build()
    x = random_input(layer, 2, 5)
    with pytest.raises(ArgumentError, match="order: got 0"):
        Hyena(4, 0)
    with pytest.raises(ArgumentError, match="short_width: got 0"):
        Hyena(4, short_width=0)
    with pytest.raises(ArgumentError, match="x: got shape"):
        layer(x[..., :4])
    with pytest.raises(ArgumentError, match=r"state\.long: got shape"):
        layer(x, build(3).init_state(2)._replace(short=layer.init_state(2).short))
    with pytest.raises(ArgumentError, match=r"state\.short: got shape"):
        layer.step(x[:, 0], build(2, 4).init_state(2))
