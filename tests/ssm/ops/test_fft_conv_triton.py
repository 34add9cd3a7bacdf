"""The Triton kernels of the long convolution, interpreted where there is no GPU."""

import pytest
import torch

from ssm._errors import BackendError
from ssm.ops.fft_conv import fft_conv
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
from tests.ssm.ops.test_fft_conv import make

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = pytest.mark.skipif(DEVICE.type == "cpu", reason="it needs a GPU")


def convolve(**given):
    """The kernel, wherever it runs here, results on the CPU."""
    tensors = {n: x for n, x in given.items() if isinstance(x, torch.Tensor)}
    moved = {name: x.to(DEVICE) for name, x in tensors.items()}
    y, final = fft_conv(**(given | moved), backend="triton")
    return y.cpu(), final.cpu()


def check(inputs):
    """Against the naive loop in float64: values, final state, all gradients."""
    small = narrowed(inputs, torch.float32)
    wide = {name: x.double() for name, x in small.items()}
    check_same(outcome(convolve, small), outcome(fft_conv, wide, backend="naive"))


@pytest.mark.parametrize(
    ("L", "Lk", "S"),
    [(1, 1, 0), (1, 5, 4), (16, 16, 0), (17, 17, 16), (31, 7, 3), (33, 40, 9)],
)
def test_values_and_gradients(L, Lk, S):
    check(make(L=L, Lk=Lk, S=S))


@pytest.mark.parametrize("L", [63, 64, 65, 97])
def test_longer_than_a_stretch(L):
    check(make(B=1, L=L, Lk=20, S=19))


def test_several_rows_and_blocks_of_channels():
    check(make(B=5, L=9, D=70, Lk=6))


def test_no_skip_and_no_state():
    inputs = make(L=19, Lk=19)
    check({name: inputs[name] for name in ("u", "kernel")})


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e15])
def test_taps_of_extreme_size(size):
    inputs = make(B=1, L=18, Lk=18, S=0)
    inputs["kernel"][:, 5:] *= size
    check(inputs)


def test_half_precision_sums_in_float32():
    inputs = {n: x.bfloat16() for n, x in make(B=1, L=19, Lk=19, S=0).items()}
    y, _ = convolve(**inputs)
    expected, _ = fft_conv(**{n: x.double() for n, x in inputs.items()})
    assert y.dtype == torch.bfloat16
    half_a_unit = 2 * 0.51 * torch.finfo(torch.bfloat16).eps * expected.abs()
    assert ((y.double() - expected).abs() <= half_a_unit + 1e-6).all()


def test_strided_inputs_are_read_where_they_lie():
    inputs = make(L=9, D=12, Lk=4)
    halves = {name: inputs[name][..., ::2] for name in ("u", "initial_state", "D")}
    check(halves | {"kernel": inputs["kernel"].T.contiguous().T[::2]})
    wide = narrowed(inputs, torch.float32)
    u, kernel = wide["u"].to(DEVICE), wide["kernel"].to(DEVICE)[:6]
    y, _ = fft_conv(u[..., 6:], kernel, backend="triton")
    expected, _ = fft_conv(u[..., 6:].contiguous(), kernel, backend="naive")
    assert_close(y, expected)


def test_continuation_at_any_split():
    small = narrowed(make(B=1, L=5, Lk=4), torch.float32)
    check_continuation(convolve, small, {"u"})


@pytest.mark.parametrize("packed", [False, True])
def test_ragged_rows_equal_each_row_alone(packed):
    small = narrowed(make(B=5, L=13, Lk=6), torch.float32)
    check_ragged(convolve, small, {"u"}, packed)


def test_two_runs_are_bit_equal():
    check_bit_equal(convolve, narrowed(make(L=17, Lk=17, S=0), torch.float32))


def test_compiled_equals_eager():
    check_compiled(convolve, narrowed(make(L=17, Lk=17, S=0), torch.float32))


def test_more_taps_than_it_is_for():
    small = narrowed(make(B=1, L=200, Lk=200, S=0), torch.float32)
    with pytest.raises(BackendError, match="200 taps"):
        convolve(**small)
    del small["initial_state"]
    u, kernel = small["u"][:, :100], small["kernel"]  # of which 100 meet an input
    y, _ = convolve(u=u, kernel=kernel)
    assert_close(y, fft_conv(u, kernel)[0])


def test_second_derivatives_are_refused():
    small = narrowed(make(L=5, Lk=5, S=0), torch.float32)
    leaves = {name: x.requires_grad_() for name, x in small.items()}
    y, _ = convolve(**leaves)
    (first,) = torch.autograd.grad(y.square().sum(), leaves["u"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        first.square().sum().backward()


@ON_GPU
@pytest.mark.parametrize("L", [20, 100, 128])
def test_auto_takes_the_kernel_at_real_sizes(L):
    small = narrowed(make(B=32, L=L, D=256, Lk=L, S=0), torch.float32)
    moved = {name: x.to(DEVICE) for name, x in small.items()}
    wide = {name: x.double() for name, x in moved.items()}
    expected = outcome(fft_conv, wide, backend="torch")
    check_same(outcome(fft_conv, moved), expected)
