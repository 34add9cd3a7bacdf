"""The long convolution against the float64 loop over time."""

import numpy as np
import pytest
import torch

from ssm.ops.fft_conv import fft_conv
from ssm.ops.fft_conv.torch import fast_length
from tests.ssm.helpers import assert_close
from tests.ssm.ops.helpers import (
    LENGTHS,
    check_against_reference,
    check_bit_equal,
    check_compiled,
    check_continuation,
    check_ragged,
    narrowed,
    random,
)

DTYPES = (torch.float64, torch.float32)


def make(B=2, L=65, D=3, Lk=65, S=None, dtype=torch.float64):
    return {
        "u": random(B, L, D, dtype=dtype),
        "kernel": random(D, Lk, dtype=dtype),
        "D": random(D, dtype=dtype),
        "initial_state": random(B, Lk - 1 if S is None else S, D, seed=3, dtype=dtype),
    }


@pytest.mark.parametrize(
    ("L", "Lk", "S"), [(7, 3, 2), (7, 3, 5), (7, 12, 4), (1, 1, 0)]
)
def test_the_naive_backend_is_the_numpy_specification(L, Lk, S):
    from ssm.ops.fft_conv.naive import fft_conv_numpy

    inputs = make(L=L, Lk=Lk, S=S)
    y, final = fft_conv(**inputs, backend="naive")
    skip = inputs.pop("D")
    expected = fft_conv_numpy(*(x.numpy() for x in inputs.values()))
    assert_close(y, torch.from_numpy(expected[0]) + skip * inputs["u"])
    assert torch.equal(final, torch.from_numpy(expected[1]))


def test_it_is_a_causal_convolution():
    u, kernel = random(1, 30, 1), random(1, 11)
    y, final = fft_conv(u, kernel)
    expected = np.convolve(u[0, :, 0], kernel[0])[:30]
    assert_close(y[0, :, 0], torch.from_numpy(expected))
    assert torch.equal(final, u[:, -10:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("L", LENGTHS)
def test_values_and_gradients(L, dtype):
    for Lk, S in ((L, 0), (1, 0), (L, L - 1), (17, 16), (17, 5), (17, 40), (150, 60)):
        check_against_reference(fft_conv, make(L=L, Lk=Lk, S=S), dtype, backend="torch")


def test_complex():
    inputs = make(Lk=20, dtype=torch.complex128)
    check_against_reference(fft_conv, inputs, torch.float64, backend="torch")
    check_against_reference(fft_conv, inputs, torch.float32, backend="torch")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_computes_in_float32(dtype):
    inputs = {name: x.to(dtype) for name, x in make(L=60, Lk=90).items()}
    y, final = fft_conv(**inputs)
    double = {name: x.double() for name, x in inputs.items()}
    expected, past = fft_conv(**double, backend="naive")
    assert y.dtype == final.dtype == dtype
    assert torch.equal(final.double(), past)
    rounded = expected.abs() * torch.finfo(dtype).eps
    assert ((y.double() - expected).abs() <= 0.51 * rounded + 1e-4).all()


def test_float32_stays_accurate_over_long_sequences():
    """Slow kernels, offsets and growing inputs: where transforms lose digits first."""
    t = torch.arange(4096.0, dtype=torch.float64)
    u = random(1, 4096, 2) * torch.exp(5 * t / 4096)[:, None] + 3.0
    kernel = torch.exp(-t / 1000) * random(2, 1)
    inputs = narrowed({"u": u, "kernel": kernel}, torch.float32)
    y, _ = fft_conv(**inputs)
    expected, _ = fft_conv(inputs["u"].double(), inputs["kernel"].double())
    assert_close(y, expected)
    impulse = torch.zeros(1, 4096, 2, dtype=torch.float64)
    impulse[:, 0] = 1
    assert_close(fft_conv(impulse, kernel)[0], kernel.T[None])


def test_continuation_at_any_split():
    for L, Lk in ((9, 30), (30, 9), (8, 1)):
        check_continuation(fft_conv, make(L=L, Lk=Lk), {"u"})


@pytest.mark.parametrize("backend", ["torch", "naive"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("Lk", "S"), [(4, 3), (30, 7), (13, 12), (3, 5)])
def test_ragged_rows_equal_each_row_alone(backend, packed, Lk, S):
    inputs = make(B=5, L=13, Lk=Lk, S=S)
    check_ragged(fft_conv, inputs, {"u"}, packed, backend=backend)


def test_no_steps_return_the_state():
    inputs = make(L=0, Lk=6)
    y, final = fft_conv(**inputs)
    assert y.shape == (2, 0, 3)
    assert torch.equal(final, inputs["initial_state"])
    _, final = fft_conv(**(inputs | {"initial_state": None}))
    assert torch.equal(final, torch.zeros(2, 5, 3, dtype=torch.float64))


def test_strided_inputs():
    wide, kernel = random(2, 65, 6), random(65, 3)
    expected, _ = fft_conv(
        wide[..., ::2].contiguous(), kernel.T.contiguous(), backend="naive"
    )
    assert_close(fft_conv(wide[..., ::2], kernel.T)[0], expected)


def test_two_runs_are_bit_equal():
    check_bit_equal(fft_conv, narrowed(make(L=300), torch.float32))


def test_compiled_equals_eager():
    check_compiled(fft_conv, make(L=17, Lk=9))


@pytest.mark.parametrize("backend", ["torch", "naive"])
def test_second_derivatives(backend):
    inputs = [x.requires_grad_() for x in make(B=1, L=4, D=2, Lk=3).values()]

    def conv(u, kernel, D, state):
        return fft_conv(u, kernel, D, initial_state=state, backend=backend)

    assert torch.autograd.gradgradcheck(conv, inputs)


def test_fast_lengths_have_small_factors_and_are_the_next():
    def smooth(n):
        for prime in (2, 3, 5):
            while n % prime == 0:
                n //= prime
        return n == 1

    for n in range(1, 700):
        assert fast_length(n) == next(m for m in range(n, 2 * n + 1) if smooth(m))


def test_bad_arguments_are_named():
    inputs = make()
    cases = {
        "u: ": {"u": inputs["u"][0]},
        "kernel: ": {"kernel": inputs["kernel"][:2]},
        "kernel: got 0 taps": {"kernel": inputs["kernel"][:, :0]},
        "D: ": {"D": inputs["D"][:2]},
        "initial_state: ": {"initial_state": inputs["initial_state"][:1]},
        "backend: ": {"backend": "cpu"},
        "lengths: ": {"lengths": torch.tensor([66, 1])},
        "cu_seqlens: ": {"cu_seqlens": torch.tensor([0, 65])},
        "u: got dtype": {"u": torch.zeros(2, 65, 3, dtype=torch.int64)},
        "kernel: got nan": {"kernel": inputs["kernel"] * np.nan, "check_domain": True},
    }
    for message, change in cases.items():
        with pytest.raises(ValueError, match=f"^{message}"):
            fft_conv(**(inputs | change))
