"""RNN and GRU against loops written from their equations."""

import numpy as np
import pytest
import torch

from ssm._errors import ArgumentError
from ssm.layers.recurrent import GRU, RNN
from tests.ssm.helpers import assert_close
from tests.ssm.layers.helpers import (
    check_empty,
    check_float32,
    check_forms,
    check_lengths,
    check_reruns,
    check_step_is_pure,
    materialise,
    random_input,
    random_state,
)


def build(kind, d_hidden=None):
    torch.manual_seed(3)
    return kind(5, d_hidden, dtype=torch.float64)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def rnn(p, x, h):
    W_x, W_h, b_x, b_h = p
    return np.tanh(W_x @ x + W_h @ h + b_x + b_h)


def gru(p, x, h):
    W, U, b, c = p
    (W_r, W_z, W_n), (U_r, U_z, U_n) = np.split(W, 3), np.split(U, 3)
    (b_r, b_z, b_n), (c_r, c_z, c_n) = np.split(b, 3), np.split(c, 3)
    r = sigmoid(W_r @ x + b_r + U_r @ h + c_r)
    z = sigmoid(W_z @ x + b_z + U_z @ h + c_z)
    n = np.tanh(W_n @ x + b_n + r * (U_n @ h + c_n))
    return (1 - z) * n + z * h


CASES = [(RNN, None, rnn), (RNN, 4, rnn), (GRU, None, gru), (GRU, 7, gru)]


@pytest.mark.parametrize(("kind", "d_hidden", "equation"), CASES)
def test_equals_its_equations_written_as_a_loop(kind, d_hidden, equation):
    layer = build(kind, d_hidden)
    p = [v.detach().numpy() for v in layer.core.parameters()]
    x, state = random_input(layer, 2, 9), random_state(layer, 2)
    rows, lasts = [], []
    for u, h in zip(x.numpy(), state.h.numpy(), strict=True):
        for u_t in u:
            h = equation(p, u_t, h)
            rows.append(h)
        lasts.append(h)
    expected = torch.tensor(np.array(rows)).reshape(2, 9, -1)
    if d_hidden is not None:
        W, b = layer.out_proj.parameters()
        expected = expected @ W.T + b
    y, final = layer(x, state)
    assert_close(y, expected)
    assert_close(final.h, torch.tensor(np.array(lasts)))


@pytest.mark.parametrize(("kind", "d_hidden"), [c[:2] for c in CASES])
def test_contract(kind, d_hidden):
    layer = build(kind, d_hidden)
    for L, cuts in [(1, []), (65, [0, 1, 30, 30]), (67, [64])]:
        check_forms(layer, L, cuts)
    check_lengths(layer, [0, 9, 4], 9)
    check_step_is_pure(layer)
    check_empty(layer)
    check_reruns(layer, 33)
    check_float32(layer, 33)


@pytest.mark.parametrize("kind", [RNN, GRU])
def test_resets_after_to_empty(kind):
    layer = materialise(lambda: kind(6, 9))
    bound = 9**-0.5
    assert all(p.abs().max() <= bound for p in layer.core.parameters())


def test_evaluation_mode_can_be_differentiated():
    """cuDNN refuses to, unless the core stays in training mode."""
    layer = build(GRU).eval()
    assert not layer.training
    assert layer.core.training
    x = random_input(layer, 1, 3).requires_grad_()
    layer(x)[0].sum().backward()
    assert x.grad.ne(0).all()


def test_bad_arguments():
    layer = build(RNN, 4)
    x = random_input(layer, 2, 5)
    with pytest.raises(ArgumentError, match="x: got shape"):
        layer(x[..., :4])
    with pytest.raises(ArgumentError, match=r"state\.h: got shape \(2, 5\)"):
        layer(x, random_state(build(RNN), 2))
    with pytest.raises(ArgumentError, match="lengths: got"):
        layer(x, lengths=torch.tensor([1, 7]))
