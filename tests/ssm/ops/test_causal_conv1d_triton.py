"""The Triton kernels of the short convolution, interpreted where there is no GPU."""

import pytest
import torch

from ssm._errors import BackendError
from ssm.ops import causal_conv1d
from ssm.ops.causal_conv1d import BACKENDS, causal_conv1d_step
from tests.ssm.helpers import assert_close
from tests.ssm.ops.helpers import (
    check_bit_equal,
    check_compiled,
    check_continuation,
    check_ragged,
    check_same,
    narrowed,
    outcome,
)
from tests.ssm.ops.test_causal_conv1d import make

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = pytest.mark.skipif(DEVICE.type == "cpu", reason="it needs a GPU")


def convolve(**given):
    """The kernel, wherever it runs here, results on the CPU."""
    tensors = {n: x for n, x in given.items() if isinstance(x, torch.Tensor)}
    moved = {name: x.to(DEVICE) for name, x in tensors.items()}
    y, final = causal_conv1d(**(given | moved), backend="triton")
    return y.cpu(), final.cpu()


def check(inputs, **options):
    """Against the naive loop in float64: values, final state, all gradients."""
    small = narrowed(inputs, torch.float32)
    wide = {name: x.double() for name, x in small.items()}
    expected = outcome(causal_conv1d, wide, backend="naive", **options)
    check_same(outcome(convolve, small, **options), expected)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize(
    ("L", "W"), [(1, 4), (2, 4), (17, 4), (31, 1), (16, 2), (5, 9)]
)
def test_values_and_gradients(L, W, activation):
    check(make(B=1, L=L, W=W), activation=activation)


def test_several_rows_stretches_and_blocks_of_channels():
    check(make(L=33, D=19, W=3), activation="silu")


def test_no_bias_and_no_state():
    inputs = {name: x for name, x in make(L=18).items() if name in ("x", "weight")}
    check(inputs, activation="silu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_in_float32(dtype):
    inputs = {name: x.to(dtype) for name, x in make(B=1, L=19, D=3).items()}
    y, final = convolve(**inputs)
    double = {name: x.double() for name, x in inputs.items()}
    expected, _ = causal_conv1d(**double, backend="naive")
    assert y.dtype == final.dtype == dtype
    assert torch.equal(final, inputs["x"][:, -3:])
    half_a_unit = 0.51 * torch.finfo(dtype).eps * expected.abs()
    if dtype == torch.bfloat16 and DEVICE.type == "cpu":
        half_a_unit *= 2  # the interpreter cuts the digits off
    assert ((y.double() - expected).abs() <= half_a_unit + 1e-6).all()


def test_half_precision_inputs_with_float32_parameters():
    inputs = {name: x.float() for name, x in make(B=1, L=9).items()}
    inputs["x"] = inputs["x"].bfloat16()
    results = outcome(convolve, inputs, activation="silu")
    assert results["y"].dtype == results["gradient of x (both)"].dtype == torch.bfloat16
    assert results["final"].dtype == torch.float32  # of the wider of x and the state
    wide = {name: x.double() for name, x in inputs.items()}
    expected = outcome(causal_conv1d, wide, activation="silu", backend="naive")
    for name in ("weight", "bias", "initial_state"):
        which = f"gradient of {name} (state)"
        assert_close(results[which], expected[which], name=which)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
def test_extreme_sums_saturate_the_activation():
    inputs = make(B=1, L=9)
    inputs["x"] *= 1e4
    check(inputs, activation="silu")


def test_strided_inputs_are_read_where_they_lie():
    inputs = make(L=9, D=12)
    halves = {name: inputs[name][..., ::2] for name in ("x", "initial_state")}
    others = {
        "weight": inputs["weight"].T.contiguous().T[::2],
        "bias": inputs["bias"][::2],
    }
    check(halves | others, activation="silu")
    wide = inputs["x"].float().to(DEVICE)
    weight = inputs["weight"][:6].float().to(DEVICE)
    y, _ = causal_conv1d(wide[..., 6:], weight, backend="triton")
    expected, _ = causal_conv1d(wide[..., 6:].contiguous(), weight, backend="naive")
    assert_close(y, expected)


def test_continuation_at_any_split():
    small = narrowed(make(B=1, L=4), torch.float32)
    check_continuation(convolve, small, {"x"}, activation="silu")


@pytest.mark.parametrize("packed", [False, True])
def test_ragged_rows_equal_each_row_alone(packed):
    small = narrowed(make(B=5, L=13), torch.float32)
    check_ragged(convolve, small, {"x"}, packed, activation="silu")


def test_two_runs_are_bit_equal():
    small = narrowed(make(L=17), torch.float32)
    check_bit_equal(convolve, small, activation="silu")


def test_compiled_equals_eager():
    small = narrowed(make(B=1, L=9), torch.float32)
    check_compiled(convolve, small, activation="silu")


def test_it_is_differentiable_once_and_says_so():
    x, weight, *_ = (t.float().to(DEVICE) for t in make(B=1, L=5).values())
    x.requires_grad_()
    y, _ = causal_conv1d(x, weight, backend="triton")
    grad = torch.autograd.grad(y.square().sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match=r"'triton' is differentiable once"):
        grad.sum().backward()


def test_what_it_does_not_serve_it_refuses():
    inputs = {name: x.to(DEVICE) for name, x in make(W=17).items()}
    with pytest.raises(
        BackendError, match=r"computes in float32, not in torch.float64"
    ):
        causal_conv1d(**inputs, backend="triton")
    small = {name: x.float() for name, x in inputs.items()}
    with pytest.raises(BackendError, match=r"at most 16 taps in registers, not 17"):
        causal_conv1d(**small, backend="triton")


def test_nothing_to_do():
    for empty in (make(B=0, L=5), make(L=0), make(D=0, L=3)):
        check(empty, activation="silu")


@ON_GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_the_sequence_of_one(dtype):
    x, weight, bias, state = (t.to(DEVICE, dtype) for t in make(L=1).values())
    y, final = causal_conv1d_step(x[:, 0], weight, bias, state, "silu")
    expected = causal_conv1d(
        x, weight, bias, initial_state=state, activation="silu", backend="torch"
    )
    assert_close(y, expected[0][:, 0])
    assert torch.equal(final, expected[1])


@ON_GPU
def test_a_tensor_of_more_than_two_billion_elements():
    L = 2**31 // 1024 + 3
    x = torch.zeros(1, L, 1024, dtype=torch.bfloat16, device=DEVICE)
    x[0, -5:] = torch.arange(5.0, device=DEVICE, dtype=torch.bfloat16)[:, None]
    weight = torch.ones(1024, 4, device=DEVICE)
    y, final = causal_conv1d(x, weight, backend="triton")
    assert y[0, -5:, 0].tolist() == [0, 1, 3, 6, 10]
    assert y[0, -5:].float().std(-1).max() == 0
    assert torch.equal(final, x[:, -3:])


@ON_GPU
def test_auto_takes_the_kernel():
    from ssm.ops import backends_used

    inputs = {name: x.float().to(DEVICE) for name, x in make().items()}
    with backends_used() as names:
        causal_conv1d(**inputs)
    assert names == {"causal_conv1d=triton"}
    assert BACKENDS["triton"].gpu
