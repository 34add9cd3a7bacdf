"""The CUDA kernels of the short convolution: on a GPU, or else as they run on a CPU."""

import importlib
import re
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from ssm._errors import BackendError
from ssm.ops import _selftest, backends_used, causal_conv1d
from tests.ssm.helpers import assert_close
from tests.ssm.ops.cuda_on_cpu.helpers import emulated
from tests.ssm.ops.helpers import (
    check_bit_equal,
    check_captured,
    check_compiled,
    check_same,
    narrowed,
    outcome,
    random,
)

cuda: Any = importlib.import_module("ssm.ops.causal_conv1d.cuda")
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
on_gpu = pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")
runs = pytest.mark.usefixtures("somewhere")


@pytest.fixture(params=[False] if ON_GPU else [False, True], ids=str)
def somewhere(request: Any) -> Iterator[None]:
    """Without a GPU: copies done as late, and as early, as a GPU may."""
    with nullcontext() if ON_GPU else emulated("causal_conv1d", eager=request.param):
        yield


def convolve(**given: Any) -> tuple[Tensor, Tensor]:
    """The kernels, wherever they run here; results on the CPU."""
    moved = {n: x.to(DEVICE) for n, x in given.items() if isinstance(x, Tensor)}
    y, final = causal_conv1d(**(given | moved), backend="cuda")
    return y.cpu(), final.cpu()


def make(L: int, D: int = 40, W: int = 4, B: int = 1) -> dict[str, Tensor]:
    """All that the kernels take, in float64."""
    return {
        "x": random(B, L, D, seed=1),
        "weight": random(D, W, seed=2),
        "bias": random(D, seed=3),
    }


def check(inputs: dict[str, Tensor], **options: Any) -> None:
    """Against the naive loop in float64: values, final state, all gradients."""
    small = narrowed(inputs, torch.float32)
    wide = {name: x.double() for name, x in small.items()}
    expected = outcome(causal_conv1d, wide, backend="naive", **options)
    check_same(outcome(convolve, small, **options), expected)


@runs
@pytest.mark.parametrize("L", [1, 2, 3, 63, 64, 65, 97])
def test_values_and_gradients(L: int) -> None:
    check(make(L), activation="silu")


@runs
@pytest.mark.parametrize(("W", "activation"), [(2, None), (3, "silu")])
def test_fewer_taps(W: int, activation: Any) -> None:
    check(make(67, W=W), activation=activation)


@runs
def test_several_rows_pieces_of_time_and_blocks_of_channels() -> None:
    """261 steps of 72 channels: two warps wide, the last half empty, and two blocks."""
    check(make(261, D=72, B=2), activation="silu")


@runs
def test_no_bias() -> None:
    inputs = make(18)
    del inputs["bias"]
    check(inputs, activation="silu")


@runs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_in_float32(dtype: torch.dtype) -> None:
    inputs = {n: t.float() for n, t in make(70).items()}
    inputs["x"] = inputs["x"].to(dtype)
    found = outcome(convolve, inputs, activation="silu")
    assert found["y"].dtype == found["final"].dtype == dtype
    assert torch.equal(found["final"], inputs["x"][:, -3:])
    wide = {n: t.double() for n, t in inputs.items()}
    expected = outcome(causal_conv1d, wide, activation="silu", backend="naive")
    for name, value in expected.items():
        assert_close(found[name], value, name=name, dtype=dtype)
    for name in ("weight", "bias"):  # these are sums in float32 of exact products
        which = f"gradient of {name} (both)"
        assert found[which].dtype == torch.float32
        close = (found[which].double() - expected[which]).norm()
        assert close <= 1e-3 * expected[which].norm()


@runs
def test_extreme_sums_saturate_the_activation() -> None:
    inputs = make(9)
    inputs["x"] *= 1e4
    check(inputs, activation="silu")


@runs
def test_parts_of_a_projection_need_no_copies() -> None:
    """Rows of x beside others have strides of their own; odd places are copied."""
    inputs = {n: t.float() for n, t in make(30, B=2).items()}
    expected = outcome(convolve, inputs, activation="silu")
    beside = torch.cat([inputs["x"], inputs["x"]], -1)[..., 40:]
    shifted = torch.cat([inputs["x"][..., :1], inputs["x"]], -1)[..., 1:]
    assert cuda._placed(beside) is beside
    assert cuda._placed(shifted) is not shifted
    for x in (beside, shifted):
        y, final = convolve(**(inputs | {"x": x}), activation="silu")
        assert torch.equal(y, expected["y"])
        assert torch.equal(final, expected["final"])


@runs
@pytest.mark.parametrize("even", [False, True])
def test_they_pass_their_self_test(even: bool) -> None:
    assert _selftest.check("causal_conv1d", "cuda", DEVICE, even=even) == ""


@runs
@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 3, 0)])
def test_nothing_to_do(shape: tuple[int, int, int]) -> None:
    B, L, D = shape
    check(make(L, D=D, B=B), activation="silu")


@runs
def test_it_is_differentiable_once_and_says_so() -> None:
    x, weight, bias = (t.float() for t in make(5).values())
    x.requires_grad_()
    y, _ = convolve(x=x, weight=weight, bias=bias)
    grad = torch.autograd.grad(y.square().sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match=r"'cuda' is differentiable once"):
        grad.sum().backward()


# --- the host side --------------------------------------------------------------------


def test_the_host_packs_what_the_kernels_unpack() -> None:
    """As many fields of eight bytes as the struct has, pointers first."""
    source = cuda.SOURCE.read_text(encoding="utf-8")
    (body,) = re.findall(r"struct Args \{(.*?)\};", source, re.DOTALL)
    statements = [s.split() for s in re.sub(r"//.*", "", body).split(";") if s.split()]
    fields = [
        name
        for words in statements
        for name in " ".join(w for w in words if w != "const")
        .split(" ", 1)[1]
        .split(", ")
    ]
    assert [name.startswith("*") for name in fields] == 11 * [True] + 9 * [False]
    assert len(cuda._pack(*range(20))) == 8 * len(fields)


@pytest.mark.parametrize("plan", [cuda.FORWARD, cuda.BACKWARD])
@pytest.mark.parametrize("L", [1, 64, 1000, 2048])
@pytest.mark.parametrize("B", [1, 8])
def test_stretches_cover_time_and_fill_the_gpu(plan: Any, L: int, B: int) -> None:
    steps, pieces, blocks = cuda.tiling(plan, B, L, 2048, 132)
    assert steps * plan.WARPS * (pieces - 1) < L <= steps * plan.WARPS * pieces
    assert blocks == B * pieces * 2048 // 64
    assert blocks >= plan.BLOCKS * 132 or steps == min(plan.steps)


@pytest.mark.parametrize("itemsize", [2, 4])
def test_blocks_need_no_more_shared_memory_than_every_gpu_gives(itemsize: int) -> None:
    for name in ("forward", "backward", "add_up"):
        assert cuda.shared_memory(name, itemsize, 4) <= 48 * 1024


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"W": 5}, r"it takes 2 to 4 taps, not 5"),
        ({"D": 12}, r"it takes channels in eights, not 12"),
    ],
)
def test_what_it_does_not_serve_it_refuses(given: Any, reason: str) -> None:
    op: Any = importlib.import_module("ssm.ops.causal_conv1d.op")
    request = op.Request(torch.device("cuda"), torch.float32, sizes=given)
    assert re.fullmatch(reason, op._refuses_cuda(request))


def test_a_state_is_left_to_others() -> None:
    op: Any = importlib.import_module("ssm.ops.causal_conv1d.op")
    sizes = {"W": 4, "D": 8, "state": 1}
    request = op.Request(torch.device("cuda"), torch.float32, sizes=sizes)
    assert "from zeros" in op._refuses_cuda(request)
    x = random(1, 5, 8).float()
    with pytest.raises(BackendError, match=r"CUDA tensors|is not installed|not on cpu"):
        causal_conv1d(x, random(8, 4).float(), backend="cuda")


@pytest.mark.parametrize("io", [16, 17, 32])
def test_the_kernels_compile_without_a_gpu(
    io: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    pytest.importorskip("cuda.core")
    nvrtc: Any = importlib.import_module("ssm.ops._nvrtc")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    definitions = tuple(cuda.definitions(cuda.FORWARD, io, 4, silu=True).items())
    code = nvrtc.machine_code(cuda.SOURCE, definitions, (8, 0))
    assert code.startswith(b"\x7fELF")


# --- on a GPU -------------------------------------------------------------------------


@on_gpu
def test_two_runs_are_bit_equal() -> None:
    check_bit_equal(
        convolve, narrowed(make(1500, D=72, B=2), torch.float32), activation="silu"
    )


@on_gpu
def test_compiled_equals_eager() -> None:
    check_compiled(convolve, narrowed(make(9), torch.float32), activation="silu")


@on_gpu
def test_captured_in_a_cuda_graph() -> None:
    options: Any = {"activation": "silu", "backend": "cuda"}
    check_captured(causal_conv1d, make(300, 64), **options)


@on_gpu
def test_a_tensor_of_more_than_two_billion_elements() -> None:
    L = 2**31 // 1024 + 3
    x = torch.zeros(1, L, 1024, dtype=torch.bfloat16, device="cuda")
    x[0, -5:] = torch.arange(5.0, device="cuda", dtype=torch.bfloat16)[:, None]
    weight = torch.ones(1024, 4, device="cuda")
    x.requires_grad_()
    y, final = causal_conv1d(x, weight, backend="cuda")
    assert y[0, -5:, 0].tolist() == [0, 1, 3, 6, 10]
    assert y[0, -5:].float().std(-1).max() == 0
    assert torch.equal(final, x[:, -3:])
    (dx,) = torch.autograd.grad(y[:, -1].float().sum(), x)
    assert dx[0, -5:, 0].tolist() == [0, 1, 1, 1, 1]
    assert float(dx.float().sum()) == 4 * 1024


@on_gpu
def test_auto_takes_the_kernels() -> None:
    inputs = {n: t.float().cuda() for n, t in make(5).items()}
    with backends_used() as used:
        causal_conv1d(**inputs)
    assert used == {"causal_conv1d=cuda"}
