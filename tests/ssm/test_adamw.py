"""The recorded steps' optimiser against PyTorch's in double precision.

Its kernels run as emulated CUDA here, and on a GPU where there is one.
"""

import re
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from ssm import _adamw
from ssm._adamw import GuardedAdamW
from tests.ssm.ops.cuda_on_cpu import helpers

SIZES = (1, 2, 63, 64, 65, 4095, 4096, 4097, 9001)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(params=["library", "emulated", pytest.param("cuda", marks=needs_gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the kernels run: nowhere, as emulated CUDA, on a GPU."""
    if request.param == "cuda":
        return "cuda"
    if request.param == "emulated":
        if helpers.COMPILER is None:
            pytest.skip("needs a C++ compiler")
        monkeypatch.setattr(_adamw, "_is_served", lambda _: True)
        monkeypatch.setattr(_adamw, "kernel", helpers.kernel)
        monkeypatch.setattr(_adamw, "on_device_of", lambda _: nullcontext())
        monkeypatch.setattr(
            torch._C, "_cuda_getCurrentRawStream", lambda _: 0, raising=False
        )
    return "cpu"


def normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def groups(
    sizes: Sequence[int], device: str, dtype: torch.dtype
) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Parameters, and two groups of them: with a decay, and with a rate of its own."""
    drawn = [normal(n, seed=i) for i, n in enumerate(sizes)]
    parameters = [x.to(device, dtype).requires_grad_() for x in drawn]
    rates = [torch.tensor(rate, device=device) for rate in (1e-2, 3e-3)]
    return parameters, [
        {"params": parameters[::2], "lr": rates[0], "weight_decay": 0.1},
        {"params": parameters[1::2], "lr": rates[1], "weight_decay": 0.0},
    ]


def set_gradients(parameters: Sequence[Tensor], step: int, scale: float) -> None:
    for i, p in enumerate(parameters):
        drawn = scale * normal(len(p), seed=1000 * step + i)
        p.grad = drawn.to(p.device, p.dtype)


@pytest.mark.parametrize("clip", [0.0, 0.5, 1e6])
@pytest.mark.parametrize("sizes", [SIZES, (7, 5) * 60], ids=["awkward", "many"])
def test_steps_are_those_of_adamw(
    device: str, sizes: Sequence[int], clip: float
) -> None:
    """Weights and moments after some steps; norms, as they are before clipping."""
    parameters, own = groups(sizes, device, torch.float32)
    wide, theirs = groups(sizes, "cpu", torch.float64)
    for group in theirs:
        group["lr"] = group["lr"].double()
    ours, reference = GuardedAdamW(own), torch.optim.AdamW(theirs)
    for step, scale in enumerate((1.0, 1e-4, 30.0, 1.0)):
        set_gradients(parameters, step, scale)
        set_gradients(wide, step, scale)
        norm = ours.update(torch.ones((), device=device), clip)
        expected = torch.nn.utils.get_total_norm([p.grad for p in wide])
        if clip:
            torch.nn.utils.clip_grad_norm_(wide, clip)
        reference.step()
        assert float(norm) == pytest.approx(float(expected), rel=1e-6)
    for p, q in zip(parameters, wide, strict=True):
        torch.testing.assert_close(p.cpu().double(), q, rtol=2e-6, atol=2e-7)
        for name in ("exp_avg", "exp_avg_sq", "step"):
            x, y = ours.state[p][name].cpu().double(), reference.state[q][name]
            torch.testing.assert_close(x, y.double(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_changes_nothing_any_more(
    device: str, where: str, bad: float
) -> None:
    parameters, own = groups((5, 4097), device, torch.float32)
    ours, loss = GuardedAdamW(own), torch.ones((), device=device)
    kept = []
    for step in range(3):
        set_gradients(parameters, step, 1.0)
        gradient = parameters[1].grad
        assert gradient is not None
        if step == 1 and where == "gradient":
            gradient[4096] = bad
        given = loss * bad if step == 1 and where == "loss" else loss
        ours.update(given, 1.0)
        states = [x for p in parameters for x in ours.state[p].values()]
        kept.append([x.clone() for x in (*parameters, *states)])
    for first, second, third in zip(*kept, strict=True):
        assert torch.equal(second, first)
        assert torch.equal(third, first)


def test_parameters_without_a_gradient_stay(device: str) -> None:
    parameters, own = groups((5, 6), device, torch.float32)
    before = parameters[1].detach().clone()
    set_gradients(parameters[:1], 0, 1.0)
    ours = GuardedAdamW(own)
    ours.update(torch.ones((), device=device), 0.0)
    assert torch.equal(parameters[1], before)
    assert list(ours.state) == [parameters[0]]


def test_the_kernels_and_the_host_agree_on_the_arguments() -> None:
    body = re.search(r"struct Args \{(.*?)\n\};", _adamw.SOURCE.read_text(), re.DOTALL)
    assert body is not None
    lines = re.sub(r"//.*", "", body[1])
    names = (name for line in lines.split(";") for name in line.split(","))
    fields = [name for name in names if name.strip()]
    arrays = sum("[TENSORS]" in name for name in fields)
    expected = 8 * (arrays * _adamw.TENSORS + len(fields) - arrays)
    packed = _adamw._PACK(*[0] * (9 * _adamw.TENSORS + 14))
    assert len(packed) == expected <= 4096
