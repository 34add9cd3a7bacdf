"""RMSNorm: its formula, its precision, its errors."""

import pytest
import torch

from ssm._errors import ArgumentError
from ssm.layers.norm import RMSNorm
from tests.ssm.helpers import assert_close


def build() -> RMSNorm:
    norm = RMSNorm(7, eps=0.1, dtype=torch.float64)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-1, 2, 7))
    return norm


def test_equals_its_formula_element_by_element():
    norm = build()
    x = torch.randn(2, 3, 7, dtype=torch.float64)
    expected = torch.empty_like(x)
    for place in torch.cartesian_prod(*[torch.arange(n) for n in x.shape]).tolist():
        i, j, k = place
        mean = sum(float(v) ** 2 for v in x[i, j]) / 7
        expected[i, j, k] = x[i, j, k] / (mean + 0.1) ** 0.5 * norm.weight[k].item()
    assert_close(norm(x), expected)
    assert_close(norm(x[0, 0]), expected[0, 0])


def test_gradients():
    norm = build()
    x = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, weight: torch.func.functional_call(norm, {"weight": weight}, x),
        (x, norm.weight),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_squared_in_float32(dtype):
    norm = RMSNorm(5, dtype=dtype)
    x = torch.tensor([300.0, -1000.0, 2.0, 5000.0, 7.0], dtype=dtype)  # x^2 overflows
    y = norm(x)
    assert y.dtype == dtype
    assert_close(y, RMSNorm(5, dtype=torch.float64)(x.double()), dtype=dtype)


def test_zeros_stay_finite():
    x = torch.zeros(3, 5, requires_grad=True)
    y = RMSNorm(5)(x)
    y.sum().backward()
    assert y.eq(0).all()
    assert x.grad.isfinite().all()


def test_resets_after_to_empty():
    norm = RMSNorm(4, device="meta").to_empty(device="cpu")
    norm.reset_parameters()
    assert norm.weight.eq(1).all()


def test_wrong_width_is_refused():
    with pytest.raises(
        ArgumentError, match=r"x: got shape \(2, 6\); expected \(…, 7\)"
    ):
        build()(torch.zeros(2, 6, dtype=torch.float64))
