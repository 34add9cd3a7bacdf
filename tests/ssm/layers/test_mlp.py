"""GLUMLP: its formula, its sizes, its errors."""

import math

import numpy as np
import pytest
import torch

from ssm._errors import ArgumentError
from ssm.layers.mlp import GLUMLP, default_hidden
from tests.ssm.helpers import assert_close

FORMULAS = {
    "silu": lambda z: z / (1 + np.exp(-z)),
    "gelu": np.vectorize(lambda z: z * 0.5 * (1 + math.erf(z / math.sqrt(2)))),
}


@pytest.mark.parametrize("activation", FORMULAS)
def test_equals_its_formula(activation):
    torch.manual_seed(0)
    layer = GLUMLP(5, 9, activation, dtype=torch.float64)
    x = 4 * torch.randn(2, 3, 5, dtype=torch.float64)
    gate, up, down = (p.detach().numpy() for p in layer.parameters())
    n = x.numpy()
    expected = (FORMULAS[activation](n @ gate.T) * (n @ up.T)) @ down.T
    assert_close(layer(x), torch.tensor(expected))
    assert_close(layer(x[0, 1]), torch.tensor(expected[0, 1]))


def test_default_hidden_is_eight_thirds_rounded_up_to_eight():
    assert [default_hidden(d) for d in (3, 4, 6, 64, 768)] == [8, 16, 16, 176, 2048]
    assert GLUMLP(6).d_hidden == 16


def test_sizes_that_differ_from_its_own_are_refused():
    with pytest.raises(ArgumentError, match="x: got shape"):
        GLUMLP(4)(torch.zeros(2, 5))
    with pytest.raises(ArgumentError, match="activation: got 'relu'"):
        GLUMLP(4, activation="relu")
