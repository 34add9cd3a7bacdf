"""The selective scan's Triton kernels, interpreted without a GPU, against the loop."""

import importlib
from functools import partial

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from ssm._errors import BackendError
from ssm.ops.selective_scan import selective_scan, selective_state_update
from tests.ssm.helpers import assert_close
from tests.ssm.ops.helpers import (
    check_against_reference,
    check_bit_equal,
    check_ragged,
    outcome,
    random,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KEEP = 4
Tensors = dict[str, Tensor]


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """States are kept every few steps: the interpreter is slow."""
    kernels = importlib.import_module("ssm.ops.selective_scan.triton")
    monkeypatch.setattr(kernels, "KEEP", KEEP)


def scan(*args: Tensor, **given: object) -> tuple[Tensor, Tensor]:
    """The operator on the kernel's device; operands and results stay where they are."""
    moved = [x.to(DEVICE) for x in args]
    named = {n: x.to(DEVICE) if isinstance(x, Tensor) else x for n, x in given.items()}
    options = {"delta_softplus": True, "backend": "triton"} | named
    y, final = selective_scan(*moved, **options)  # type: ignore[arg-type]
    return y.cpu(), final.cpu()


def operands(
    L: int, *, is_complex: bool = False, D: int = 6, N: int = 3, groups: int = 1
) -> Tensors:
    """All that a scan can take."""
    x = {
        "u": random(2, L, D, seed=1),
        "delta": random(2, L, D, seed=2),
        "A": -random(D, N, seed=3).abs(),
        "B": random(2, L, groups, N, seed=4),
        "C": random(2, L, groups, N, seed=5),
        "D": random(D, seed=6),
        "z": random(2, L, D, seed=7),
        "delta_bias": random(D, seed=8),
        "initial_state": random(2, D, N, seed=9),
    }
    if is_complex:
        for name, seed in {"A": 10, "B": 11, "initial_state": 12}.items():
            x[name] = torch.complex(x[name], 3 * random(*x[name].shape, seed=seed))
    return x


@pytest.mark.parametrize("L", [1, KEEP - 1, KEEP, 2 * KEEP + 1])
def test_values_and_every_gradient(L: int) -> None:
    check_against_reference(scan, operands(L), torch.float32)


@pytest.mark.parametrize("groups", [1, 3])
def test_a_complex_system(groups: int) -> None:
    x = operands(KEEP + 1, is_complex=True, groups=groups)
    check_against_reference(scan, x, torch.float32)


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("constant", [("B",), ("B", "C")])
def test_matrices_constant_in_time(constant: tuple[str, ...], is_complex: bool) -> None:
    x = operands(KEEP + 1, is_complex=is_complex, groups=2)
    for name in constant:
        x[name] = random(6, 3, seed=20)
    check_against_reference(scan, x, torch.float32)


@pytest.mark.parametrize("L", [1, 63, 64, 65, 97])
def test_one_state_a_channel_is_a_linear_scan(
    L: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = importlib.import_module("ssm.ops.selective_scan.triton")
    x = operands(L, D=4, N=1)
    # On a GPU the self-test, which walks, comes first.
    scan(**{n: t.float() for n, t in operands(1).items()})
    monkeypatch.setattr(kernels, "_LONG", 1)
    monkeypatch.setattr(kernels, "_forward", None)  # it is not walked
    x |= {"B": random(4, 1, seed=20), "C": random(4, 1, seed=21)}
    check_against_reference(scan, x, torch.float32)
    bare = {n: t for n, t in x.items() if n in ("u", "delta", "A", "B", "C")}
    check_against_reference(scan, bare, torch.float32)


def test_one_state_through_extreme_decays(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = importlib.import_module("ssm.ops.selective_scan.triton")
    monkeypatch.setattr(kernels, "_LONG", 1)
    x = operands(65, N=1) | {"B": random(6, 1, seed=20), "C": random(6, 1, seed=21)}
    x["A"] = -torch.tensor([[0.0], [1e-6], [1.0], [50.0], [1e4], [0.5]]).double()
    check_against_reference(scan, x, torch.float32)


def test_nothing_optional_and_no_softplus() -> None:
    x = {n: t for n, t in operands(5).items() if n in ("u", "delta", "A", "B", "C")}
    x["delta"] = x["delta"].abs()
    x["B"] = x["B"][:, :, 0]
    check_against_reference(partial(scan, delta_softplus=False), x, torch.float32)


@pytest.mark.parametrize(("D", "N"), [(1, 1), (3, 65), (140, 4)])
def test_several_blocks_and_odd_sizes(D: int, N: int) -> None:
    check_against_reference(scan, operands(2, D=D, N=N), torch.float32)


@pytest.mark.parametrize("log_decay", [0.0, -1e-6, -10.0, -1e4])
def test_any_decay_is_finite_and_right(log_decay: float) -> None:
    x = operands(6)
    x["A"] = torch.full_like(x["A"], log_decay)
    x["delta"] = 1.0 + 0.1 * x["delta"].clamp(-2, 2)
    check_against_reference(scan, x, torch.float32)


def test_sequences_of_different_lengths() -> None:
    x = operands(13, D=2, N=2)
    x |= {n: random(5, *t.shape[1:], seed=30) for n, t in x.items() if t.ndim > 2}
    x = {n: t.float() for n, t in x.items()}
    check_ragged(scan, x, {"u", "delta", "B", "C", "z"}, packed=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_have_a_float32_state(dtype: torch.dtype) -> None:
    x = {n: t.to(dtype) for n, t in operands(5).items()}
    wide = {n: t.double() for n, t in x.items()}
    found = outcome(scan, x)
    expected = outcome(scan, wide, backend="naive")
    assert found["y"].dtype == dtype
    assert found["final"].dtype == torch.float32
    for name, value in expected.items():
        assert_close(found[name], value, name=name, dtype=dtype)


def test_views_and_bit_equal_reruns() -> None:
    x = {n: t.float() for n, t in operands(5).items()}
    x["u"] = x["u"].mT.contiguous().mT
    x["B"] = x["B"][:, :1].expand_as(x["B"])
    check_bit_equal(scan, x)
    check_against_reference(scan, {n: t.double() for n, t in x.items()}, torch.float32)


def test_compiled_in_one_graph() -> None:
    """The kernel is one node, its outputs shaped by the fake kernel."""
    x = {n: t.float() for n, t in operands(2).items()}
    torch.compiler.reset()
    compiled = torch.compile(scan, backend="eager", fullgraph=True)
    for ours, expected in zip(compiled(**x), scan(**x), strict=True):
        assert torch.equal(ours, expected)


def test_a_second_derivative_says_what_to_use() -> None:
    x = {n: t.float() for n, t in operands(3).items()}
    x["u"].requires_grad_()
    y, _ = scan(**x)
    (gradient,) = torch.autograd.grad(y.square().sum(), [x["u"]], create_graph=True)
    with pytest.raises(RuntimeError, match="use backend='naive'"):
        gradient.sum().backward()


@pytest.mark.parametrize("is_complex", [False, True])
def test_one_step_for_generation(is_complex: bool) -> None:
    """The update is a scan of one step, without a gradient."""
    x = operands(1, is_complex=is_complex, groups=2)
    x["state"] = x.pop("initial_state")
    x = {n: t[:, 0] if n in ("u", "delta", "z", "B", "C") else t for n, t in x.items()}
    narrow = {
        n: t.to(torch.complex64 if t.is_complex() else torch.float32).to(DEVICE)
        for n, t in x.items()
    }
    update = partial(selective_state_update, delta_softplus=True)
    by_kernel, by_torch = (partial(update, backend=b) for b in ("triton", "torch"))
    for ours, expected in zip(by_kernel(**narrow), by_torch(**x), strict=True):
        assert_close(ours.cpu(), expected)
    narrow["u"].requires_grad_()
    with pytest.raises(BackendError, match="it has no gradient"):
        by_kernel(**narrow)
