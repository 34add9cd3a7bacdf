"""Jacobians equal closed forms and differences; rates are those of exact powers."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from experiments.common import ExperimentResult, InputError
from scaling_experiments import gradients
from scaling_experiments.gradients import (
    LAYERS,
    draw,
    gradient_norms,
    jacobians,
    problems,
    run,
    summary,
    tail_rate,
)
from ssm.layers.recurrent import RNN
from ssm.layers.s4d import S4D
from tests.ssm.helpers import assert_close

D = 8


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def layer_of(name: str) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(5)
        return LAYERS[name][0](D, 4)


# --- Jacobians


@pytest.mark.parametrize("T", [1, 2, 13, 64])
def test_a_linear_recurrence_has_the_powers_of_its_matrix(T):
    W, C = randn(D, D, seed=1) / 4, randn(D, D, seed=2)

    def layer(u: Tensor) -> Tensor:
        h, states = torch.zeros(len(u), D, dtype=torch.float64), []
        for x_t in u.unbind(1):
            h = h @ W.T + x_t
            states.append(h @ C.T)
        return torch.stack(states, 1)

    J = jacobians(layer, randn(T, D))
    expected = [C @ torch.linalg.matrix_power(W, k) for k in range(T)]
    assert_close(J, torch.stack(expected))


@pytest.mark.parametrize("T", [1, 5, 64])
def test_an_rnn_has_the_product_of_its_steps(T):
    layer, x = RNN(D, dtype=torch.float64), randn(T, D)
    W, h = layer.core.weight_hh_l0.detach(), layer(x[None])[0][0].detach()
    product, expected = torch.eye(D, dtype=torch.float64), []
    for t in reversed(range(T)):
        slope = torch.diag(1 - h[t] ** 2)
        expected.append(product @ slope @ layer.core.weight_ih_l0.detach())
        product = product @ slope @ W
    assert_close(jacobians(lambda u: layer(u)[0], x), torch.stack(expected))


@pytest.mark.parametrize("T", [1, 13, 65])
def test_s4d_has_its_kernel_on_the_diagonal(T):
    layer = S4D(D, 6, dtype=torch.float64)
    J = jacobians(lambda u: layer(u)[0], randn(T, D))
    with torch.no_grad():
        A = torch.complex(-layer.log_A_real.exp(), layer.A_imag)
        dt = layer.log_dt.exp()[:, None]
        B, C = torch.view_as_complex(layer.B), torch.view_as_complex(layer.C)
        A_bar = (dt * A).exp()
        B_bar = B * (A_bar - 1) / A
        kernel = torch.stack([2 * (C * A_bar**k * B_bar).sum(1).real for k in range(T)])
        kernel[0] += layer.D
    assert_close(J, torch.diag_embed(kernel))


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_agrees_with_differences(name):
    layer, x, step = layer_of(name), randn(11, D), 1e-6
    J = jacobians(lambda u: layer(u)[0], x)
    for lag, channel in ((0, 3), (2, 0), (10, 7)):
        above, below = x.clone(), x.clone()
        above[-1 - lag, channel] += step
        below[-1 - lag, channel] -= step
        with torch.no_grad():
            ends = [layer(u[None])[0][0, -1] for u in (above, below)]
        slope = (ends[0] - ends[1]) / (2 * step)
        torch.testing.assert_close(J[lag, :, channel], slope, rtol=1e-6, atol=1e-9)


def test_norms_are_frobenius_and_survive_what_squares_do_not():
    J = randn(5, D, D)
    expected = [math.sqrt(float((each**2).sum()) / D) for each in J]
    assert_close(gradient_norms(J), torch.tensor(expected, dtype=torch.float64))
    assert_close(gradient_norms(J * 1e-200) * 1e200, gradient_norms(J))
    assert gradient_norms(torch.zeros(2, D, D, dtype=torch.float64)).tolist() == [0, 0]


# --- rates


@pytest.mark.parametrize("rate", [0.3, 0.97, 1.0, 1.01])
def test_the_rate_of_a_power_is_its_base(rate):
    assert math.isclose(tail_rate(7.0 * rate ** np.arange(200.0)), rate, rel_tol=1e-9)


def test_lags_that_have_underflowed_are_left_out():
    g = 0.1 ** np.arange(400.0)
    assert g[-1] == 0
    assert math.isclose(tail_rate(g), 0.1, rel_tol=1e-9)


def test_bands_are_least_median_and_greatest():
    rows = np.array([0.9, 0.8, 0.5])[:, None] ** np.arange(100.0)
    found = summary(rows)
    np.testing.assert_allclose(found["rates"], [0.9, 0.8, 0.5])
    assert math.isclose(found["rate"], 0.8)
    for name, row in (("high", 0), ("median", 1), ("low", 2)):
        np.testing.assert_array_equal(found[name], rows[row])


# --- the experiment


@pytest.fixture(scope="module")
def result() -> ExperimentResult:
    return run(T=96, d_model=8, d_state=4, seeds=(0, 3))


def test_an_rnn_forgets_and_the_others_do_not(result):
    assert result.passed
    layers = result.metadata["layers"]
    assert all(len(found["rates"]) == 2 for found in layers.values())
    assert layers["rnn"]["median"][48] < 1e-6 * layers["attention"]["median"][48]


def test_seeds_are_their_own_and_nothing_else_bears_on_them(result):
    torch.manual_seed(7)
    again = run(T=96, d_model=8, d_state=4, seeds=(3,)).metadata["layers"]
    for name, found in result.metadata["layers"].items():
        assert found["rates"][1] == again[name]["rates"][0]
        assert found["rates"][0] != found["rates"][1]


@pytest.mark.parametrize(("name", "wrong"), [("rnn", 0.95), ("s4d", 0.9)])
@pytest.mark.parametrize("nan", [False, True])
def test_a_rate_beyond_its_limit_fails(result, name, wrong, nan):
    layers = dict(result.metadata["layers"])
    layers[name] = layers[name] | {"rates": [math.nan if nan else wrong]}
    (broken,) = problems(result.metadata | {"layers": layers})
    assert broken.startswith(f"{name}'s rate")


def test_the_picture_shows_each_layer_and_its_rate(result):
    figure = draw([result])
    everything, closer = figure.axes
    labels = [text.get_text() for text in everything.get_legend().get_texts()]
    layers = result.metadata["layers"]
    assert labels == [f"{name}: {layers[name]['rate']:.3f} a step" for name in LAYERS]
    assert len(closer.lines) == 3
    np.testing.assert_array_equal(
        everything.lines[0].get_ydata(), layers["rnn"]["median"]
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"T": 63}, "at least 64"),
        ({"d_model": 12}, "a multiple of 8"),
        ({"d_state": 0}, "at least 1"),
        ({"seeds": ()}, "at least one value"),
        ({"seeds": (1, 1)}, "increasing"),
        ({"seeds": tuple(range(gradients.MAX_SEEDS + 1))}, "at most 100"),
    ],
)
def test_bad_input_is_answered_in_one_line(options, said):
    with pytest.raises(InputError, match=said):
        run(**options)
