"""The Triton kernels of ssd against the loop in float64; without a GPU, interpreted."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from ssm.ops._dispatch import backends_used
from ssm.ops.ssd import ssd
from tests.ssm.helpers import assert_close
from tests.ssm.ops.helpers import (
    check_against_reference,
    check_bit_equal,
    check_compiled,
    check_same,
    outcome,
    random,
)

GPU = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TRITON = {"backend": "triton", "dt_softplus": True}
TIMED = {"x", "dt", "B", "C", "z"}


def operands(
    L: int, batch: int = 1, H: int = 2, G: int = 1, P: int = 5, N: int = 7
) -> dict[str, Tensor]:
    """Every operand, signed; steps of 0 and long ones among them."""
    dt = random(batch, L, H, seed=1)
    dt[:, 3::11] = 4
    dt[:, 5::11] = -40
    inputs = {
        "x": random(batch, L, H, P),
        "dt": dt,
        "A": -random(H).abs(),
        "B": random(batch, L, G, N, seed=2),
        "C": random(batch, L, G, N, seed=3),
        "D": random(H, P) if L % 2 else random(H, seed=4),
        "z": random(batch, L, H, P, seed=5),
        "dt_bias": random(H, seed=6),
        "initial_state": random(batch, H, P, N),
    }
    return {name: x.to(GPU) for name, x in inputs.items()}


@pytest.mark.parametrize(
    ("L", "sizes"),
    [
        # few rows and heads: all chunks at once; from 4 on: one program walks
        (1, {}),
        (63, {"P": 17}),
        (64, {"N": 16}),
        (65, {"batch": 2, "G": 2}),
        (37, {"H": 5}),
    ],
)
def test_values_states_and_gradients(L, sizes):
    check_against_reference(ssd, operands(L, **sizes), torch.float32, **TRITON)


def test_without_options_and_from_zero():
    inputs = operands(33, H=4)
    plain = {name: inputs[name] for name in ("x", "dt", "A", "B", "C")}
    plain["dt"] = plain["dt"].abs().clamp(max=2)
    check_against_reference(ssd, plain, torch.float32, backend="triton")


def test_states_and_values_wider_than_a_program():
    inputs = operands(3, P=130, N=131)
    del inputs["dt_bias"]  # its gradient is a sum that cancels
    check_against_reference(ssd, inputs, torch.float32, **TRITON)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_state_in_float32(dtype):
    wide = {}
    for name, x in operands(35, H=4).items():
        fixed = name in ("A", "D", "dt_bias", "initial_state")  # as models keep them
        wide[name] = x.to(torch.float32 if fixed else dtype)
    fast = outcome(ssd, wide, **TRITON)
    doubled = {name: x.double() for name, x in wide.items()}
    slow = outcome(ssd, doubled, **(TRITON | {"backend": "naive"}))
    assert (fast["y"].dtype, fast["final"].dtype) == (dtype, torch.float32)
    for name, value in fast.items():
        assert_close(value, slow[name], name=name, dtype=dtype)


@pytest.mark.parametrize("kind", [-50.0, -1e4, None])
def test_extreme_log_decays(kind):
    """dt = 1, so that A is the log-decay: 0, almost 0, far below underflow; mixed."""
    inputs = operands(35, H=5 if kind is None else 2)
    for name in ("dt_bias", "z", "D"):
        del inputs[name]
    inputs["dt"] = torch.ones_like(inputs["dt"])
    mixed = torch.tensor([0.0, -1e-6, -50.0, -1e4, -1.0], dtype=torch.float64)
    A = mixed if kind is None else torch.full_like(mixed[:2], kind)
    inputs["A"] = A.to(GPU)
    narrow = {name: x.float() for name, x in inputs.items()}
    fast = outcome(ssd, narrow, backend="triton")
    slow = outcome(ssd, {n: x.double() for n, x in narrow.items()}, backend="naive")
    tiny = torch.finfo(torch.float32).tiny
    for name, value in slow.items():
        if value.abs().max() < tiny:  # underflows
            assert fast[name].abs().max() <= tiny, name
        else:
            assert_close(fast[name], value, name=name)


def test_continuation_from_a_slice_of_states():
    inputs = operands(70, batch=2)
    y, final = ssd(**_narrow(inputs), **TRITON)
    states = torch.zeros(4, 2, 5, 14, device=GPU)
    states[::2, ..., :7] = inputs["initial_state"].float()
    state, parts = states[::2, ..., :7], []
    for piece in (slice(0, 33), slice(33, 70)):
        cut = {n: x[:, piece] if n in TIMED else x for n, x in inputs.items()}
        part, state = ssd(**(_narrow(cut) | {"initial_state": state}), **TRITON)
        parts.append(part)
    assert_close(torch.cat(parts, 1), y)
    assert_close(state, final)


def test_padding_is_as_if_it_were_not_there():
    inputs = _narrow(operands(9, batch=2, H=1))
    for name in TIMED:
        inputs[name][1, 5:] = torch.nan
    lengths = torch.tensor([9, 5], device=GPU)
    padded = outcome(ssd, inputs, lengths=lengths, **TRITON)
    wide = {name: x.double() for name, x in inputs.items()}
    check_same(
        padded, outcome(ssd, wide, lengths=lengths, **(TRITON | {"backend": "naive"}))
    )


def test_two_runs_are_bit_equal():
    check_bit_equal(ssd, _narrow(operands(33, H=4)), **TRITON)


def test_compiled_equals_eager():
    check_compiled(ssd, _narrow(operands(9)), **TRITON)


def test_second_derivatives_are_refused():
    inputs = _narrow(operands(3))
    inputs["x"].requires_grad_()
    y, _ = ssd(**inputs, **TRITON)
    (grad,) = torch.autograd.grad(y.pow(2).sum(), inputs["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="'triton' is differentiable once"):
        grad.sum().backward()


def test_no_rows_and_strided_operands():
    inputs = _narrow(operands(4))
    empty = {
        n: x[:0] if n in TIMED | {"initial_state"} else x for n, x in inputs.items()
    }
    y, final = ssd(**empty, **TRITON)
    assert (y.shape, final.shape) == ((0, 4, 2, 5), (0, 2, 5, 7))
    turned = {
        n: x.transpose(1, -1).contiguous().transpose(1, -1) if n in TIMED else x
        for n, x in inputs.items()
    }
    check_same(outcome(ssd, turned, **TRITON), outcome(ssd, inputs, **TRITON))


def _narrow(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.float() for name, x in inputs.items()}


# --- on a GPU only --------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("sizes", [{"P": 64, "N": 128}, {"H": 64, "P": 64, "N": 128}])
def test_auto_takes_the_kernel_at_real_sizes(sizes):
    inputs = operands(300, batch=4, **sizes)
    half = {n: x.bfloat16() if n in TIMED else x.float() for n, x in inputs.items()}
    with backends_used() as names:
        fast = outcome(ssd, half, dt_softplus=True)
    assert names == {"ssd=triton"}
    slow = {n: x.double() for n, x in half.items()}
    slow = outcome(ssd, slow, dt_softplus=True, backend="naive")
    for name, value in fast.items():
        assert_close(value, slow[name], name=name, dtype=torch.bfloat16)


@needs_gpu
def test_a_captured_graph_gives_equal_numbers():
    inputs = _narrow(operands(130, batch=2, P=32, N=32))
    leaves = [x.requires_grad_() for x in inputs.values()]

    def step() -> list[Tensor]:
        y, final = ssd(**inputs, **TRITON)
        loss = y.sum() + final.sum()
        return [y, final, *torch.autograd.grad(loss, leaves)]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for value, reference in zip(captured, expected, strict=True):
        assert torch.equal(value, reference)


@needs_gpu
def test_more_elements_than_32_bits_count():
    """The last row alone gives what it gives behind 2^31 elements."""
    B, L, H, P, N = 33, 4096, 128, 128, 16
    x = torch.randn(B, L, H, P, dtype=torch.bfloat16, device=GPU)
    assert x.numel() > 2**31
    dt = torch.rand(B, L, H, device=GPU)
    bc = torch.randn(2, B, L, 1, N, dtype=torch.bfloat16, device=GPU)
    A = -torch.rand(H, device=GPU)
    y, final = ssd(x, dt, A, *bc, backend="triton")
    y_row, final_row = ssd(x[-1:], dt[-1:], A, *bc[:, -1:], backend="triton")
    assert_close(y[-1:], y_row)
    assert_close(final[-1:], final_row, dtype=torch.bfloat16)
