"""The Triton kernels of the linear scan, interpreted where there is no GPU."""

import pytest
import torch

from ssm._errors import BackendError
from ssm.ops import linear_scan
from tests.ssm.helpers import assert_close
from tests.ssm.ops.helpers import (
    check_bit_equal,
    check_compiled,
    check_continuation,
    check_ragged,
    check_same,
    narrowed,
    outcome,
    random,
)

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = pytest.mark.skipif(DEVICE.type == "cpu", reason="it needs a GPU")


def make(B=2, L=65, *channels):
    """Signed decays, zeros among them."""
    shape = (B, L, *(channels or (5,)))
    a = torch.tanh(random(*shape))
    a[:, 3::7] = 0
    state = random(B, *shape[2:], seed=4)
    return {"a": a, "b": random(*shape, seed=2), "initial_state": state}


def make_log(*sizes):
    inputs = make(*sizes)
    return inputs | {"a": None, "log_a": -0.1 * inputs["a"].abs()}


def scan(**given):
    """The kernel, wherever it runs here, results on the CPU."""
    tensors = {n: x for n, x in given.items() if isinstance(x, torch.Tensor)}
    moved = {name: x.to(DEVICE) for name, x in tensors.items()}
    h, final = linear_scan(**({"a": None} | given | moved), backend="triton")
    return h.cpu(), final.cpu()


def naive(**given):
    """The definition."""
    return linear_scan(**({"a": None} | given), backend="naive")


def check(inputs):
    """Against the naive loop in float64: values, final state, all gradients."""
    given = {name: x for name, x in inputs.items() if x is not None}
    small = narrowed(given, torch.float32)
    wide = {name: x.double() for name, x in small.items()}
    # a product of L decays: each, and each product, may be rounded
    L = inputs["b"].shape[1]
    check_same(outcome(scan, small), outcome(naive, wide), least=2 * L * 2.0**-24)


@pytest.mark.parametrize("L", [1, 63, 64, 65, 97])
def test_values_and_gradients(L):
    check(make(1, L, 3))
    check(make_log(1, L, 3))


def test_time_in_segments():
    """One row and few channels: several segments, whose ends are scanned first."""
    from ssm.ops.linear_scan.triton import _Cut

    assert _Cut.of(1, 257, 2).segments == 3
    check(make(1, 257, 2))
    check(make_log(1, 257, 2))


def test_several_rows_and_blocks_of_channels_of_any_shape():
    check(make(2, 5, 5, 7))
    check(make(2, 9))


def test_extreme_decays():
    """Nothing overflows: 0, 1, a tiny rest, and states that vanish in one step."""
    inputs = make(1, 66)
    a = torch.tensor([0.0, 1.0, 1 - 1e-6, 1e-30, -1.0], dtype=torch.float64)
    check(inputs | {"a": a.expand(1, 66, 5)})
    inputs = make_log(1, 66)
    log_a = -torch.tensor([0.0, 1e-6, 50.0, 1e4, 0.5], dtype=torch.float64)
    check(inputs | {"log_a": log_a.expand(1, 66, 5)})


def test_logarithms_in_half_precision_widen_first():
    log_a = torch.full((1, 64, 1), -0.001, dtype=torch.bfloat16)
    b = torch.ones(1, 64, 1, dtype=torch.bfloat16)
    h, final = scan(log_a=log_a, b=b)
    assert h.dtype == torch.bfloat16
    assert final.dtype == torch.float32
    expected = naive(log_a=log_a.double(), b=b.double())
    assert_close(final, expected[1])
    inputs = {"log_a": log_a, "b": b, "initial_state": torch.ones(1, 1)}
    half = outcome(scan, inputs)
    wide = outcome(naive, {name: x.double() for name, x in inputs.items()})
    for name, value in half.items():  # two roundings: of h, and of what is made of it
        error = (value.double() - wide[name]).norm() / wide[name].norm()
        assert error < 2 * torch.finfo(torch.bfloat16).eps, name


def test_strided_inputs_are_read_where_they_lie():
    inputs = make(2, 9, 12)
    check(inputs | {name: inputs[name][..., 1::2] for name in inputs})
    check(inputs | {name: inputs[name][..., 6:] for name in inputs})


def test_continuation_at_any_split():
    small = narrowed(make(1, 6), torch.float32)
    check_continuation(scan, small, {"a", "b"})


@pytest.mark.parametrize("packed", [False, True])
def test_ragged_rows_equal_each_row_alone(packed):
    check_ragged(scan, narrowed(make(5, 13), torch.float32), {"a", "b"}, packed)


def test_two_runs_are_bit_equal():
    check_bit_equal(scan, narrowed(make(1, 200, 3), torch.float32))


def test_compiled_equals_eager():
    check_compiled(scan, narrowed(make(1, 9), torch.float32))


def test_it_is_differentiable_once_and_says_so():
    a, b, _ = (x.float().to(DEVICE).requires_grad_() for x in make(1, 5).values())
    h, _ = linear_scan(a, b, backend="triton")
    grad = torch.autograd.grad(h.square().sum(), b, create_graph=True)[0]
    with pytest.raises(RuntimeError, match=r"'triton' is differentiable once"):
        grad.sum().backward()


def test_complex_and_double_numbers_are_left_to_others():
    for dtype in (torch.complex64, torch.float64):
        x = torch.ones(1, 3, 2, dtype=dtype, device=DEVICE)
        with pytest.raises(BackendError, match=rf"in float32, not in {dtype}"):
            linear_scan(x, x, backend="triton")


def test_nothing_to_do():
    for empty in (make(0, 5), make(1, 0), make(2, 3, 0)):
        check(empty)


@ON_GPU
def test_a_tensor_of_more_than_two_billion_elements():
    L = 2**31 // 1024 + 3
    b = torch.zeros(1, L, 1024, dtype=torch.bfloat16, device=DEVICE)
    b[0, -5:] = 1
    h, final = linear_scan(torch.ones_like(b), b, backend="triton")
    assert h[0, -5:, 7].tolist() == [1, 2, 3, 4, 5]
    assert (final == 5).all()
