"""The linear scan against the float64 loop over time, on every backend."""

import numpy as np
import pytest
import torch

from ssm.ops.linear_scan import linear_scan
from ssm.ops.linear_scan.naive import linear_scan_numpy
from tests.ssm.helpers import assert_close
from tests.ssm.ops.helpers import (
    LENGTHS,
    check_against_reference,
    check_bit_equal,
    check_compiled,
    check_continuation,
    check_ragged,
    narrowed,
    outcome,
    random,
)

BACKENDS = ("cpu", "torch", "naive")
FAST = ("cpu", "torch")
DTYPES = (torch.float64, torch.float32)


def signed(*shape, dtype=torch.float64):
    """Decays between 0.9 and 1 in size, of either sign (any phase if complex)."""
    size = 0.9 + 0.1 * random(*shape, seed=8).sigmoid()
    phase = random(*shape, seed=9, dtype=dtype)
    return size * phase / phase.abs()


def make(B=2, L=65, channels=(5,), dtype=torch.float64):
    return {
        "a": signed(B, L, *channels, dtype=dtype),
        "b": random(B, L, *channels, dtype=dtype),
        "initial_state": random(B, *channels, seed=3, dtype=dtype),
    }


def in_logs(b, log_a, initial_state, **options):
    return linear_scan(None, b, log_a=log_a, initial_state=initial_state, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_is_the_numpy_specification(backend, dtype):
    inputs = make(dtype=dtype)
    expected = linear_scan_numpy(*(x.numpy() for x in inputs.values()))
    h, final = linear_scan(**inputs, backend=backend)
    assert_close(h, torch.from_numpy(expected[0]))
    assert_close(final, torch.from_numpy(expected[1]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("L", [*LENGTHS, 31, 32, 33, 1061])
def test_values_and_gradients(L, backend, dtype):
    inputs = make(L=L)
    check_against_reference(linear_scan, inputs, dtype, backend=backend)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("channels", [(), (1,), (3, 7), (130,), (2, 1, 3), (0,)])
def test_any_channels(backend, channels):
    check_against_reference(
        linear_scan, make(L=40, channels=channels), torch.float64, backend=backend
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", FAST)
def test_complex(backend, dtype):
    inputs = make(dtype=torch.complex128)
    check_against_reference(linear_scan, inputs, dtype, backend=backend)
    for name in ("a", "b", "initial_state"):
        real = {k: x.real.contiguous() for k, x in inputs.items() if k != name}
        h, final = linear_scan(**(inputs | real), backend=backend)
        assert h.dtype == final.dtype == torch.complex128
        assert_close(h, linear_scan(**(inputs | real), backend="naive")[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("decay", [0.0, 1.0, -1.0, -0.5, 1e-30, 1.01])
def test_special_decays(decay, backend, dtype):
    """Also one special step among ordinary ones: gradients at zero are exact."""
    inputs = make(L=70)
    inputs["a"] = torch.full_like(inputs["a"], decay)
    check_against_reference(linear_scan, inputs, dtype, backend=backend)
    inputs["a"] = signed(2, 70, 5)
    inputs["a"][:, 30 if decay == 1e-30 else slice(None, None, 7)] = decay
    check_against_reference(linear_scan, inputs, dtype, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", FAST)
def test_decays_in_logs(backend, dtype):
    for value in (0.0, -1e-6, -0.05, -50.0, -1e4, -torch.inf):
        inputs = make(L=70)
        log_a = torch.full_like(inputs.pop("a"), value)
        if value not in (0.0, -torch.inf):
            log_a = log_a * (1 + 0.1 * random(2, 70, 5).tanh())
        inputs["log_a"] = log_a
        check_against_reference(in_logs, inputs, dtype, backend=backend)
        assert all(
            torch.isfinite(x).all()
            for x in outcome(in_logs, inputs, backend=backend).values()
        )


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_a_float32_state(backend, dtype):
    inputs = {name: x.to(dtype) for name, x in make(L=300).items()}
    h, final = linear_scan(**inputs, backend=backend)
    double = {name: x.double() for name, x in inputs.items()}
    expected = linear_scan(**double, backend="naive")
    assert (h.dtype, final.dtype) == (dtype, torch.float32)
    assert_close(h, expected[0])
    assert_close(final, expected[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_logs_are_widened_before_the_exponential(backend):
    log_a = torch.full((1, 1000, 1), -1e-3, dtype=torch.bfloat16)
    b = torch.zeros_like(log_a)
    _, final = in_logs(b, log_a, torch.ones(1, 1), backend=backend)
    expected = np.exp(1000 * log_a[0, 0, 0].item())  # a thousand roundings of exp
    assert float(final) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_continuation_at_any_split(backend):
    check_continuation(linear_scan, make(L=70), {"a", "b"}, backend=backend)
    check_continuation(linear_scan, make(L=2), {"a", "b"}, backend=backend)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_ragged_rows_equal_each_row_alone(backend, packed):
    for channels in ((5,), ()):
        inputs = make(B=5, L=13, channels=channels)
        check_ragged(linear_scan, inputs, {"a", "b"}, packed, backend=backend)
    inputs["log_a"] = -inputs.pop("a").abs()
    check_ragged(in_logs, inputs, {"log_a", "b"}, packed, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_steps_and_no_rows(backend):
    inputs = make(L=0)
    h, final = linear_scan(**inputs, backend=backend)
    assert h.shape == (2, 0, 5)
    assert torch.equal(final, inputs["initial_state"])
    h, final = linear_scan(**make(B=0), backend=backend)
    assert (h.shape, final.shape) == ((0, 65, 5), (0, 5))


@pytest.mark.parametrize("backend", FAST)
def test_no_state_is_zeros(backend):
    inputs = make()
    zeros = inputs | {"initial_state": torch.zeros(2, 5, dtype=torch.float64)}
    expected, _ = linear_scan(**zeros, backend="naive")
    assert_close(linear_scan(inputs["a"], inputs["b"], backend=backend)[0], expected)


@pytest.mark.parametrize("backend", FAST)
def test_strided_and_broadcast_inputs(backend):
    a = signed(5, 1).T.expand(2, 65, 5)
    b = random(5, 65, 2).permute(2, 1, 0)
    state = random(5, 2).T
    copies = [x.contiguous() for x in (a, b, state)]
    expected = linear_scan(*copies[:2], initial_state=copies[2], backend="naive")
    h, final = linear_scan(a, b, initial_state=state, backend=backend)
    assert_close(h, expected[0])
    assert_close(final, expected[1])


@pytest.mark.parametrize("backend", FAST)
def test_inputs_are_left_as_they_were(backend):
    inputs = make()
    before = {name: x.clone() for name, x in inputs.items()}
    linear_scan(**inputs, backend=backend)
    assert all(torch.equal(x, before[name]) for name, x in inputs.items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivatives(backend, dtype):
    inputs = make(B=1, L=4, channels=(2,), dtype=dtype)
    inputs["a"][:, 2] = 0
    leaves = [x.requires_grad_() for x in inputs.values()]

    def scan(a, b, state):
        return linear_scan(a, b, initial_state=state, backend=backend)

    assert torch.autograd.gradcheck(scan, leaves)
    assert torch.autograd.gradgradcheck(scan, leaves)


@pytest.mark.parametrize("backend", FAST)
def test_two_runs_are_bit_equal(backend):
    inputs = narrowed(make(L=300, channels=(70,)), torch.float32)
    check_bit_equal(linear_scan, inputs, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_equals_eager(backend):
    check_compiled(linear_scan, make(L=37), backend=backend)


def test_compiled_with_lengths_and_logs():
    inputs = make(L=37)
    inputs["log_a"] = -inputs.pop("a").abs()
    check_compiled(in_logs, inputs, lengths=torch.tensor([37, 5]))


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # opcheck's own
def test_registered_operator_follows_its_rules():
    from ssm.ops.linear_scan.cpu import _linear_scan

    inputs = [x.requires_grad_() for x in make(L=9).values()]
    torch.library.opcheck(_linear_scan.overload, inputs)


def test_bad_arguments_are_named():
    inputs = make()
    cases = {
        "a: got shape": {"a": inputs["a"][:, :3]},
        "a, log_a: got both": {"log_a": inputs["a"]},
        "a, log_a: got neither": {"a": None},
        "log_a: got shape": {"a": None, "log_a": inputs["a"][0]},
        "b: got shape": {"a": inputs["a"][0, :, 0], "b": inputs["b"][0, :, 0]},
        "initial_state: got shape": {"initial_state": inputs["initial_state"][:1]},
        "initial_state: got dtype": {"initial_state": torch.zeros(2, 5).long()},
        "backend: got 'fast'": {"backend": "fast"},
        "lengths: got .66, 1": {"lengths": torch.tensor([66, 1])},
        "cu_seqlens: ": {"cu_seqlens": torch.tensor([0, 65])},
        "a: got dtype": {"a": torch.zeros(2, 65, 5, dtype=torch.int64)},
        "a: got nan": {"a": inputs["a"] * np.nan, "check_domain": True},
        "b: got inf": {"b": inputs["b"].abs() / 0, "check_domain": True},
        "a: got a tensor on meta": {"a": inputs["a"].to("meta")},
    }
    for message, change in cases.items():
        with pytest.raises(ValueError, match=f"^{message}"):
            linear_scan(**(inputs | change))


@pytest.mark.parametrize(
    "change", ["initial_state", "padding", "packed"], ids=lambda x: f"check_{x}"
)
def test_the_domain_check_sees_the_state_and_spares_the_padding(change):
    inputs = make()
    if change == "initial_state":
        inputs["initial_state"][1, 2] = torch.nan
        with pytest.raises(ValueError, match=r"^initial_state: got nan at index"):
            linear_scan(**inputs, check_domain=True)
    elif change == "padding":
        inputs["b"][1, 5:] = torch.nan
        lengths = torch.tensor([65, 5])
        h, _ = linear_scan(**inputs, lengths=lengths, check_domain=True)
        assert torch.isfinite(h).all()
    else:
        one = {name: x[:1] for name, x in inputs.items()}
        one["b"][0, 7, 0] = torch.nan
        with pytest.raises(ValueError, match=r"^b: got nan"):
            linear_scan(**one, cu_seqlens=torch.tensor([0, 65]), check_domain=True)
