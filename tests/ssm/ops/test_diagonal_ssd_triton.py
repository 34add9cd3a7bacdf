"""The Triton kernels of diagonal_ssd against the loop in float64; without a GPU,
interpreted."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from ssm.ops._dispatch import backends_used
from ssm.ops.diagonal_ssd import diagonal_ssd
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
TRITON = {"backend": "triton"}
TIMED = ("q", "k", "v", "log_a", "a")


def operands(
    L: int,
    batch: int = 1,
    H: int = 2,
    K: int = 7,
    V: int = 5,
    decays: int | None = None,
) -> dict[str, Tensor]:
    """Signed q, k, v, a state, and logarithms of decays (``decays`` of them a head)."""
    inputs = {
        "q": random(batch, L, H, K),
        "k": random(batch, L, H, K, seed=1),
        "v": random(batch, L, H, V, seed=2),
        "log_a": -random(batch, L, H, decays or K, seed=3).exp() / 4,
        "initial_state": random(batch, H, K, V),
    }
    return {name: x.to(GPU) for name, x in inputs.items()}


def with_numbers(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Decays as numbers of both signs, 0, 1 and -1 among them."""
    inputs = dict(inputs)
    a = torch.tanh(2 * random(*inputs.pop("log_a").shape, seed=4)).to(GPU)
    a[:, 3::11] = 0
    a[:, 4::22] = 0  # two in a row
    a[:, 5::11] = -1
    a[:, 7::11] = 1
    a[:, 9::11] = 1e-30
    return inputs | {"a": a}


def narrow(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.float() for name, x in inputs.items()}


@pytest.mark.parametrize(
    ("L", "sizes"),
    [
        # few rows and heads: all chunks at once; from 4 on: one program walks
        (1, {}),
        (63, {"K": 17}),
        (65, {"batch": 2, "K": 3, "V": 16}),
        (37, {"H": 4, "decays": 1}),
    ],
)
def test_values_states_and_gradients(L, sizes):
    check_against_reference(diagonal_ssd, operands(L, **sizes), torch.float32, **TRITON)


@pytest.mark.parametrize("decays", [None, 1])
def test_decays_as_numbers(decays):
    inputs = with_numbers(operands(35, decays=decays))
    check_against_reference(diagonal_ssd, inputs, torch.float32, **TRITON)


def test_states_and_values_wider_than_a_program():
    inputs = operands(3, H=1, K=131, V=66)
    check_against_reference(diagonal_ssd, inputs, torch.float32, **TRITON)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_mild_and_strong_decays(dtype):
    """Through the middle of a chunk where decays are mild, by halving elsewhere."""
    inputs = operands(67)
    inputs["log_a"][:, 32:64, 0] *= 100
    inputs["log_a"] = inputs["log_a"].float()
    half = {
        n: x.to(torch.float32 if n in ("log_a", "initial_state") else dtype)
        for n, x in inputs.items()
    }
    fast = outcome(diagonal_ssd, half, **TRITON)
    wide = {name: x.double() for name, x in half.items()}
    slow = outcome(diagonal_ssd, wide, backend="naive")
    assert (fast["y"].dtype, fast["final"].dtype) == (dtype, torch.float32)
    for name, value in fast.items():
        assert_close(value, slow[name], name=name, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", [-50.0, -torch.inf, None])
def test_extreme_log_decays(dtype, kind):
    inputs = narrow(operands(35, H=1))
    kinds = torch.tensor([0.0, -1e-6, -50.0, -1e4, -torch.inf])
    mixed = kinds[torch.arange(inputs["log_a"].numel()) * 7 % 5]
    log_a = mixed if kind is None else torch.full_like(mixed, kind)
    inputs["log_a"] = log_a.reshape(inputs["log_a"].shape).to(GPU)
    wide = {}
    for name in ("q", "k", "v"):
        inputs[name] = inputs[name].to(dtype)
    wide = {name: x.double() for name, x in inputs.items()}
    fast = outcome(diagonal_ssd, inputs, **TRITON)
    slow = outcome(diagonal_ssd, wide, backend="naive")
    tiny = torch.finfo(torch.float32).tiny
    for name, value in slow.items():
        if value.abs().max() < tiny:  # underflows
            assert fast[name].abs().max() <= tiny, name
        else:
            assert_close(fast[name], value, name=name, dtype=dtype)


def test_continuation_from_a_slice_of_states():
    inputs = narrow(operands(40, batch=2))
    y, final = diagonal_ssd(**inputs, **TRITON)
    states = torch.zeros(4, 2, 7, 10, device=GPU)
    states[::2, ..., :5] = inputs["initial_state"]
    state, parts = states[::2, ..., :5], []
    for piece in (slice(0, 33), slice(33, 40)):
        cut = {n: x[:, piece] if n in TIMED else x for n, x in inputs.items()}
        part, state = diagonal_ssd(**(cut | {"initial_state": state}), **TRITON)
        parts.append(part)
    assert_close(torch.cat(parts, 1), y)
    assert_close(state, final)


def test_padding_is_as_if_it_were_not_there():
    inputs = narrow(operands(9, batch=2, H=1))
    for name in ("q", "k", "v", "log_a"):
        inputs[name][1, 5:] = torch.nan
    lengths = torch.tensor([9, 5], device=GPU)
    padded = outcome(diagonal_ssd, inputs, lengths=lengths, **TRITON)
    wide = {name: x.double() for name, x in inputs.items()}
    check_same(padded, outcome(diagonal_ssd, wide, lengths=lengths, backend="naive"))


def test_two_runs_are_bit_equal():
    check_bit_equal(diagonal_ssd, narrow(operands(33)), **TRITON)


def test_compiled_equals_eager():
    check_compiled(diagonal_ssd, narrow(operands(5)), **TRITON)


def test_second_derivatives_are_refused():
    inputs = narrow(operands(3))
    inputs["q"].requires_grad_()
    y, _ = diagonal_ssd(**inputs, **TRITON)
    (grad,) = torch.autograd.grad(y.pow(2).sum(), inputs["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="'triton' is differentiable once"):
        grad.sum().backward()


# --- on a GPU only --------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("sizes", [{"K": 64, "V": 64}, {"K": 128, "V": 128, "H": 40}])
def test_auto_takes_the_kernel_at_real_sizes(scale, sizes):
    inputs = operands(300, batch=4, **sizes)
    inputs["log_a"] = inputs["log_a"] * scale
    half = {n: x.bfloat16() if n in "qkv" else x.float() for n, x in inputs.items()}
    with backends_used() as names:
        fast = outcome(diagonal_ssd, half)
    assert names == {"diagonal_ssd=triton"}
    wide = {name: x.double() for name, x in half.items()}
    slow = outcome(diagonal_ssd, wide, backend="naive")
    for name, value in fast.items():
        assert_close(value, slow[name], name=name, dtype=torch.bfloat16)


@needs_gpu
def test_a_captured_graph_gives_equal_numbers():
    inputs = narrow(operands(130, batch=2, K=32, V=32))
    leaves = [x.requires_grad_() for x in inputs.values()]

    def step() -> list[Tensor]:
        y, final = diagonal_ssd(**inputs, **TRITON)
        return [y, final, *torch.autograd.grad(y.sum() + final.sum(), leaves)]

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
