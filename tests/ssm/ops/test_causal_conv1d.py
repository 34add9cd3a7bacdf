"""The short causal convolution against the float64 loop over time."""

import numpy as np
import pytest
import torch

from ssm._errors import BackendError
from ssm.ops.causal_conv1d import causal_conv1d, causal_conv1d_step
from tests.ssm.helpers import assert_close
from tests.ssm.ops.helpers import (
    LENGTHS,
    check_against_reference,
    check_bit_equal,
    check_compiled,
    check_continuation,
    check_ragged,
    outcome,
    random,
)

FAST = ("cpu", "torch")
DTYPES = (torch.float64, torch.float32)


def make(B=2, L=65, D=5, W=4, dtype=torch.float64):
    return {
        "x": random(B, L, D, dtype=dtype),
        "weight": random(D, W, dtype=dtype),
        "bias": random(D, dtype=dtype),
        "initial_state": random(B, W - 1, D, seed=3, dtype=dtype),
    }


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("W", [1, 3, 4])
def test_the_naive_backend_is_the_numpy_specification(W, activation):
    from ssm.ops.causal_conv1d.naive import causal_conv1d_numpy

    inputs = make(L=7, W=W)
    y, final = causal_conv1d(**inputs, activation=activation, backend="naive")
    arrays = [x.numpy() for x in inputs.values()]
    expected = causal_conv1d_numpy(*arrays, activation == "silu")
    assert_close(y, torch.from_numpy(expected[0]))
    assert torch.equal(final, torch.from_numpy(expected[1]))


def test_it_is_the_convolution_of_pytorch():
    inputs = make()
    x, weight = inputs["x"], inputs["weight"]
    past = torch.cat([inputs["initial_state"], x], 1).transpose(1, 2)
    expected = torch.nn.functional.silu(
        torch.conv1d(past, weight[:, None], inputs["bias"], groups=5)
    )
    y, _ = causal_conv1d(**inputs, activation="silu")
    assert_close(y, expected.transpose(1, 2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("activation", [None, "silu"])
def test_values_and_gradients(backend, dtype, activation):
    for L in LENGTHS:
        check_against_reference(
            causal_conv1d, make(L=L), dtype, backend=backend, activation=activation
        )


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("W", [1, 2, 9, 70])
def test_any_width_shorter_or_longer_than_the_sequence(backend, W):
    for L in (1, 5, 66):
        check_against_reference(
            causal_conv1d,
            make(L=L, W=W, D=3),
            torch.float64,
            backend=backend,
            activation="silu",
        )


@pytest.mark.parametrize("backend", FAST)
def test_no_bias_and_no_state_are_zeros(backend):
    inputs = make()
    y, final = causal_conv1d(inputs["x"], inputs["weight"], backend=backend)
    zeros = {k: torch.zeros_like(inputs[k]) for k in ("bias", "initial_state")}
    expected = causal_conv1d(**(inputs | zeros), backend="naive")
    assert_close(y, expected[0])
    assert torch.equal(final, expected[1])


@pytest.mark.parametrize("activation", [None, "silu"])
def test_complex(activation):
    inputs = make(dtype=torch.complex128)
    check_against_reference(
        causal_conv1d, inputs, torch.float64, backend="torch", activation=activation
    )
    with pytest.raises(BackendError, match=r"computes in float32 or float64"):
        causal_conv1d(**inputs, backend="cpu")


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_in_float32(backend, dtype):
    inputs = {name: x.to(dtype) for name, x in make(L=300, D=3).items()}
    y, final = causal_conv1d(**inputs, backend=backend)
    double = {name: x.double() for name, x in inputs.items()}
    expected, _ = causal_conv1d(**double, backend="naive")
    assert y.dtype == final.dtype == dtype
    assert torch.equal(final, inputs["x"][:, -3:])  # inputs, as they came
    half_a_unit = torch.finfo(dtype).eps * expected.abs()
    assert ((y.double() - expected).abs() <= 0.51 * half_a_unit + 1e-6).all()


@pytest.mark.parametrize("backend", FAST)
def test_continuation_at_any_split(backend):
    for L in (2, 20):
        check_continuation(
            causal_conv1d, make(L=L), {"x"}, activation="silu", backend=backend
        )


def test_step_by_step_is_the_whole():
    inputs = make(L=9)

    def by_steps(x, weight, bias, initial_state):
        outputs, state = [], initial_state
        for x_t in x.unbind(1):
            y_t, state = causal_conv1d_step(x_t, weight, bias, state, "silu")
            outputs.append(y_t)
        return torch.stack(outputs, 1), state

    before = inputs["initial_state"].clone()
    stepped = outcome(by_steps, inputs)
    for name, value in outcome(causal_conv1d, inputs, activation="silu").items():
        assert_close(stepped[name], value, name=name)
    assert torch.equal(inputs["initial_state"], before)


@pytest.mark.parametrize("backend", ["cpu", "torch", "naive"])
@pytest.mark.parametrize("packed", [False, True])
def test_ragged_rows_equal_each_row_alone(backend, packed):
    inputs = make(B=5, L=13)
    check_ragged(
        causal_conv1d, inputs, {"x"}, packed, activation="silu", backend=backend
    )


@pytest.mark.parametrize("backend", FAST)
def test_strided_inputs(backend):
    inputs = make(D=6)
    wide = random(2, 65, 12)
    expected, _ = causal_conv1d(
        wide[..., :6].contiguous(), inputs["weight"], backend="naive"
    )
    weight = inputs["weight"].T.contiguous().T
    y, _ = causal_conv1d(wide[..., :6], weight, backend=backend)
    assert_close(y, expected)


@pytest.mark.parametrize("backend", FAST)
def test_two_runs_are_bit_equal(backend):
    inputs = {name: x.float() for name, x in make(L=300).items()}
    check_bit_equal(causal_conv1d, inputs, activation="silu", backend=backend)


@pytest.mark.parametrize("backend", FAST)
def test_compiled_equals_eager(backend):
    check_compiled(causal_conv1d, make(L=17), activation="silu", backend=backend)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # opcheck's own
def test_registered_operator_follows_its_rules():
    from ssm.ops.causal_conv1d.cpu import _conv

    inputs = [x.requires_grad_() for x in make(L=9).values()]
    torch.library.opcheck(_conv.overload, (*inputs, True))


def test_second_derivatives():
    inputs = [x.requires_grad_() for x in make(B=1, L=4, D=2, W=3).values()]

    def conv(backend, activation):
        def call(x, weight, bias, state):
            return causal_conv1d(
                x,
                weight,
                bias,
                initial_state=state,
                activation=activation,
                backend=backend,
            )

        return call

    for backend in ("torch", "naive"):
        assert torch.autograd.gradgradcheck(conv(backend, "silu"), inputs)
    assert torch.autograd.gradgradcheck(conv("torch", None), inputs)
    y, _ = conv("cpu", "silu")(*inputs)
    grad = torch.autograd.grad(y.square().sum(), inputs[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match=r"use backend='naive'"):
        grad.sum().backward()


def test_bad_arguments_are_named():
    inputs = make()
    cases = {
        "x: ": {"x": inputs["x"][0]},
        "weight: ": {"weight": inputs["weight"][:3]},
        "weight: got 0 taps": {"weight": inputs["weight"][:, :0]},
        "bias: ": {"bias": inputs["bias"][:3]},
        "initial_state: ": {"initial_state": inputs["initial_state"][:, 1:]},
        "activation: got 'gelu'": {"activation": "gelu"},
        "backend: ": {"backend": "fast"},
        "lengths: ": {"lengths": torch.tensor([66, 1])},
        "cu_seqlens: ": {"cu_seqlens": torch.tensor([0, 65])},
        "x: got dtype": {"x": torch.zeros(2, 65, 5, dtype=torch.int64)},
        "x: got nan": {"x": inputs["x"] * np.nan, "check_domain": True},
    }
    for message, change in cases.items():
        with pytest.raises(ValueError, match=f"^{message}"):
            causal_conv1d(**(inputs | change))
    with pytest.raises(ValueError, match=r"^x_t: "):
        causal_conv1d_step(inputs["x"], inputs["weight"], None, inputs["initial_state"])
    with pytest.raises(ValueError, match=r"^state: "):
        causal_conv1d_step(
            inputs["x"][:, 0], inputs["weight"], None, inputs["initial_state"][:1]
        )
