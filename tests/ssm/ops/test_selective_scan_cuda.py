"""The selective scan's CUDA kernels: their host side everywhere, the rest on a GPU."""

import ctypes
import gc
import importlib
import re
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from ssm._errors import BackendError
from ssm.ops._dispatch import backends_used
from ssm.ops.selective_scan import selective_scan
from tests.ssm.helpers import assert_close
from tests.ssm.ops.cuda_on_cpu.helpers import HOPPER, emulated
from tests.ssm.ops.helpers import (
    check_against_reference,
    check_bit_equal,
    check_captured,
    check_compiled,
    check_continuation,
    check_ragged,
    outcome,
    random,
)

cuda: Any = importlib.import_module("ssm.ops.selective_scan.cuda")
KEEP = cuda.KEEP
PLANS = [*cuda.FORWARD, *cuda.BACKWARD]
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
runs = pytest.mark.usefixtures("somewhere")
on_gpu = pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")
Operands = dict[str, Any]


@pytest.fixture
def somewhere() -> Iterator[None]:
    """On the GPU, or as the kernels run on the CPU."""
    with nullcontext() if ON_GPU else emulated("selective_scan"):
        yield


def scan(**given: Any) -> tuple[Tensor, Tensor]:
    """The kernels, wherever they run here; results on the CPU."""
    options = {"delta_softplus": True, "backend": "cuda"} | given
    if options["backend"] == "cuda":  # the reference stays where it always is
        moved = {n: x.to(DEVICE) for n, x in given.items() if isinstance(x, Tensor)}
        options |= moved
    y, final = selective_scan(**options)
    return y.cpu(), final.cpu()


def operands(
    L: int, D: int = 6, N: int = 5, groups: int = 1, rows: int = 2
) -> Operands:
    """All that the kernels take."""
    return {
        "u": random(rows, L, D, seed=1),
        "delta": random(rows, L, D, seed=2),
        "A": -random(D, N, seed=3).abs(),
        "B": random(rows, L, groups, N, seed=4),
        "C": random(rows, L, groups, N, seed=5),
        "D": random(D, seed=6),
        "z": random(rows, L, D, seed=7),
        "delta_bias": random(D, seed=8),
        "initial_state": random(rows, D, N, seed=9),
    }


# --- without a GPU --------------------------------------------------------------------


def test_the_host_packs_what_the_kernels_unpack() -> None:
    """As many pointers, then numbers, as the struct has fields, in their order."""
    source = cuda.SOURCE.read_text(encoding="utf-8")
    (body,) = re.findall(r"struct Args \{(.*?)\};", source, re.DOTALL)
    body = re.sub(r"//.*", "", body)
    statements = [" ".join(s.split()) for s in body.split(";") if s.strip()]
    fields = []
    for statement in statements:
        names = re.sub(r"^(const )?(void|float|i64) ", "", statement).split(", ")
        fields += [(name.strip("*"), name.startswith("*")) for name in names]
    pointers = [name for name, is_pointer in fields if is_pointer]
    numbers = [name for name, is_pointer in fields if not is_pointer]
    assert [is_pointer for _, is_pointer in fields] == sorted(
        (is_pointer for _, is_pointer in fields), reverse=True
    )
    assert len(pointers) == cuda._POINTERS
    assert tuple(pointers[-6:]) == cuda._WORKSPACE
    assert len(numbers) == 21
    assert numbers[14:] == [
        *("rows", "L", "channels", "N", "groups"),
        *("segment", "segments"),
    ]


@pytest.mark.parametrize("plan", PLANS)
def test_plans_keep_every_thread_busy(plan: Any) -> None:
    """What kernels.cu asserts, and the shared memory of a Hopper multiprocessor."""
    threads, pairs = 32 * plan.warps, plan.channels // 2
    tile = KEEP if plan in cuda.BACKWARD else plan.tile
    assert threads % pairs == 0
    assert tile % (threads // pairs) == 0
    assert threads % (plan.states // 2) == 0
    assert tile * plan.states // 2 % threads == 0
    shared = cuda._shared(plan, plan in cuda.BACKWARD)
    assert shared * plan.blocks <= HOPPER
    assert plan.sub % plan.flush == 0


@pytest.mark.parametrize("plans", [cuda.FORWARD, cuda.BACKWARD])
def test_every_number_of_states_has_the_smallest_plan(plans: tuple[Any, ...]) -> None:
    for N in range(1, 257):
        for channels in (1, 10**6):
            plan = cuda.plan_for(plans, N, channels, 132, HOPPER)
            assert plan.states >= N
            least = 160 * 1024 if N > 32 else 99 * 1024  # of the smallest GPUs
            modest = cuda.plan_for(plans, N, channels, 132, least)
            assert modest.states == plan.states
            assert cuda._shared(modest, plans is cuda.BACKWARD) <= least
            assert plan.states <= max(4, 2 * (N - 1))


@pytest.mark.parametrize("L", [1, KEEP, 1000, 16384])
@pytest.mark.parametrize("room", [0, 1, 4, 1000])
def test_segments_cover_time_and_keep_the_chunks_whole(L: int, room: int) -> None:
    steps, segments = cuda._segments(L, room)
    assert steps % KEEP == 0
    assert steps * (segments - 1) < L <= steps * segments
    assert segments <= max(1, room)


def test_a_backend_asked_for_by_name_says_why_it_cannot_run() -> None:
    x = {n: t.float() for n, t in operands(3).items()}
    with pytest.raises(BackendError, match=r"CUDA tensors|is not installed"):
        partial(selective_scan, backend="cuda")(**x)


@pytest.mark.parametrize("name", ["FORWARD", "BACKWARD"])
def test_the_kernels_compile_without_a_gpu(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """The smallest plan, for the oldest GPU served; the second time from the file."""
    pytest.importorskip("cuda.core")
    nvrtc: Any = importlib.import_module("ssm.ops._nvrtc")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    plan = getattr(cuda, name)[0]
    definitions = tuple(
        cuda.definitions(
            plan, name == "BACKWARD", io=16, paired=False, gated=False, softplus=False
        ).items()
    )
    code = nvrtc.machine_code(cuda.SOURCE, definitions, (8, 0))
    assert code.startswith(b"\x7fELF")
    monkeypatch.setattr(nvrtc, "_compile", lambda *_: pytest.fail("compiled again"))
    assert nvrtc.machine_code(cuda.SOURCE, definitions, (8, 0)) == code


def test_a_thread_without_a_context_is_given_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Autograd's threads may launch before they have used the device."""
    nvrtc: Any = importlib.import_module("ssm.ops._nvrtc")
    answers, packed = ["none", "done"], b"numbers"
    given: list[int] = []

    def launch(*arguments: Any) -> tuple[str]:
        pointer = ctypes.cast(arguments[-2], ctypes.POINTER(ctypes.c_void_p))
        address = pointer.contents.value
        assert address is not None
        assert ctypes.string_at(address, len(packed)) == packed
        return (answers.pop(0),)

    monkeypatch.setattr(nvrtc, "_make_current", given.append)
    kernel = object.__new__(nvrtc.Kernel)
    kernel._launch, kernel._function = launch, None
    kernel._success, kernel._no_context = "done", "none"
    kernel._device, kernel._threads, kernel._shared = 3, 32, 0
    kernel(1, packed, 0)
    assert (answers, given) == ([], [3])
    answers.append("out of memory")
    with pytest.raises(RuntimeError, match="1 blocks was refused: out of memory"):
        kernel(1, packed, 0)


# --- on a GPU, or else as they run on a CPU -------------------------------------------


@runs
@pytest.mark.parametrize("L", [1, KEEP - 1, KEEP, KEEP + 1, 97])
def test_values_and_every_gradient(L: int) -> None:
    check_against_reference(scan, operands(L), torch.float32)


@runs
@pytest.mark.parametrize(
    ("D", "N", "groups"),
    [
        *[(1, 1, 1), (64, 16, 1), (66, 16, 1), (37, 16, 1), (200, 3, 1), (130, 8, 2)],
        *[(36, 30, 3), (128, 64, 2), (20, 100, 1), (64, 256, 1), (5, 200, 5)],
    ],
)
def test_every_plan_and_its_edges(D: int, N: int, groups: int) -> None:
    check_against_reference(scan, operands(67, D, N, groups), torch.float32)


@runs
@pytest.mark.parametrize("absent", [["D"], ["z", "delta_bias"], ["initial_state"]])
@pytest.mark.parametrize("softplus", [False, True])
def test_options(absent: list[str], softplus: bool) -> None:
    x = {n: t for n, t in operands(40, 64, 16).items() if n not in absent}
    x["delta"] = 10 * x["delta"] if softplus else x["delta"].abs()
    x.get("delta_bias", x["delta"]).abs_()
    run = partial(scan, delta_softplus=softplus)
    check_against_reference(run, x, torch.float32)


@runs
@pytest.mark.parametrize("N", [16, 64])
def test_segments_of_time(N: int) -> None:
    """One row and few channels: time is cut, forward and backward."""
    chunks, D = (20, 24) if ON_GPU else (8, 8)
    x = operands(chunks * KEEP + 5, D, N, rows=1)
    x["delta"] = x["delta"] - 3  # so that states last over segments
    check_against_reference(scan, x, torch.float32)


@runs
@pytest.mark.parametrize("log_decay", [0.0, -1e-6, -1.0, -1e4])
def test_any_decay_is_finite_and_right(log_decay: float) -> None:
    x = operands(70, 8, 16)
    x["A"] = torch.full_like(x["A"], log_decay)
    x["delta"] = 1.0 + 0.1 * x["delta"].clamp(-2, 2)
    del x["delta_bias"]
    check_against_reference(partial(scan, delta_softplus=False), x, torch.float32)


@runs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("D", [64, 37])
def test_narrow_inputs_have_a_float32_state(dtype: torch.dtype, D: int) -> None:
    x = {n: t.to(dtype) for n, t in operands(65, D, 16).items()}
    wide = {n: t.double() for n, t in x.items()}
    found = outcome(scan, x)
    assert (found["y"].dtype, found["final"].dtype) == (dtype, torch.float32)
    for name, value in outcome(scan, wide, backend="naive").items():
        assert_close(found[name], value, name=name, dtype=dtype)


@runs
@pytest.mark.parametrize("packed", [False, True])
def test_sequences_of_different_lengths(packed: bool) -> None:
    x = operands(13, rows=5)
    x = {n: t.float() for n, t in x.items()}
    check_ragged(scan, x, {"u", "delta", "B", "C", "z"}, packed)


@runs
def test_a_sequence_may_be_cut_anywhere() -> None:
    x = {n: t.float() for n, t in operands(70, 10, 16).items()}
    check_continuation(scan, x, {"u", "delta", "B", "C", "z"})


@runs
def test_parts_of_a_projection_need_no_copies() -> None:
    """Rows of u and z side by side, B and C behind a step: strides of their own."""
    x = {n: t.float() for n, t in operands(40, 32, 16).items()}
    views = dict(x)
    views["u"], views["z"] = torch.cat([x["u"], x["z"]], -1).chunk(2, -1)
    for name in "BC":
        flat = x[name].flatten(2)
        views[name] = torch.cat([flat, flat], -1)[..., : flat.shape[-1]].unflatten(
            -1, (1, -1)
        )
    for name, value in outcome(scan, x).items():
        assert torch.equal(value, outcome(scan, views)[name]), name


# --- calls alike ----------------------------------------------------------------------


def here() -> Operands:
    """What goes to the kernels as it is, on their device."""
    return {n: t.float().to(DEVICE) for n, t in operands(40, 32, 16).items()}


def placed(x: Tensor, gap: int, offset: int) -> Tensor:
    """x in other memory: so many elements behind each row, and before the first."""
    rows = x.flatten(0, -2)
    room = x.new_zeros(offset + rows.shape[0] * (rows.shape[1] + gap))
    rows = room[offset:].view(rows.shape[0], -1)[:, : rows.shape[1]]
    return rows.unflatten(0, x.shape[:-1]).copy_(x)


@runs
def test_calls_that_differ_in_memory_alone_are_told_apart() -> None:
    """Dense, with gaps, begun in the middle of a pair; each anew, then remembered."""
    x = {n: t.float() for n, t in operands(40, 32, 16).items()}
    wide = {n: t.double() for n, t in x.items()}
    expected = outcome(scan, wide, backend="naive")
    places = [(0, 0), (2, 0), (0, 1), (1, 0), (2, 2)]
    for gap, offset in [*places, *places]:
        for names in (["u"], ["z", "B"], ["delta", "C"]):
            moved = x | {n: placed(x[n], gap, offset) for n in names}
            for name, value in outcome(scan, moved).items():
                assert_close(value, expected[name], name=name)


@runs
@pytest.mark.parametrize("wanted", [["A"], ["u", "D"], ["z", "initial_state"]])
def test_gradients_are_given_where_they_are_asked_for(wanted: list[str]) -> None:
    """With and without, between calls that want all and calls that want none."""
    run = partial(selective_scan, delta_softplus=True, backend="cuda")
    every = {n: t.requires_grad_() for n, t in here().items()}
    y, final = run(**every)
    leaves = list(every.values())
    expected = torch.autograd.grad([y.sum() + final.sum()], leaves)
    some = {n: t.detach().requires_grad_(n in wanted) for n, t in every.items()}
    y_some, final_some = run(**some)
    (y_some.sum() + final_some.sum()).backward()
    for (name, leaf), gradient in zip(some.items(), expected, strict=True):
        if name in wanted:
            assert_close(leaf.grad, gradient, name=name)
        else:
            assert leaf.grad is None, name
    with torch.no_grad():
        assert not run(**every)[0].requires_grad
    assert not run(**{n: t.detach() for n, t in every.items()})[0].requires_grad


@runs
@pytest.mark.parametrize("used", ["y", "final", "both"])
def test_gradients_of_either_output(used: str) -> None:
    """The other's gradient is not there; that of a sum has no strides of its own."""

    def total(backend: str, x: Operands) -> Tensor:
        run = partial(selective_scan, delta_softplus=True, backend=backend)
        y, final = run(**x)
        parts = {"y": y.sum(), "final": final.sum(), "both": y.sum() + final.sum()}
        return parts[used]

    x = {n: t.requires_grad_() for n, t in here().items()}
    wide = {n: t.detach().cpu().double().requires_grad_() for n, t in x.items()}
    ask: Any = partial(torch.autograd.grad, allow_unused=True)
    expected = ask(total("naive", wide), list(wide.values()))
    for _ in range(2):
        found = ask(total("cuda", x), list(x.values()))
        for name, value, right in zip(x, found, expected, strict=True):
            right = torch.zeros_like(wide[name]) if right is None else right
            assert_close(value.cpu(), right, name=name)


@runs
@pytest.mark.parametrize("name", ["u", "A", "delta_bias"])
def test_an_operand_changed_before_the_backward_pass_is_noticed(name: str) -> None:
    x = {n: t.requires_grad_() for n, t in here().items()}
    x[name] = x[name] * 1.0  # no leaf: it may be changed
    y, _ = partial(selective_scan, delta_softplus=True, backend="cuda")(**x)
    x[name].mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@runs
def test_saved_tensors_may_come_back_elsewhere() -> None:
    """As where autograd's hooks keep them on another device meanwhile."""

    def gradients() -> tuple[Tensor, ...]:
        x = {n: t.requires_grad_() for n, t in here().items()}
        y, final = partial(selective_scan, delta_softplus=True, backend="cuda")(**x)
        return torch.autograd.grad(y.square().sum() + final.sum(), list(x.values()))

    expected = gradients()

    def moved(x: Tensor) -> Tensor:
        return placed(x, 2, 2) if x.ndim == 3 or x.shape == (2, 40, 1, 16) else x

    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, moved):
        for value, right in zip(gradients(), expected, strict=True):
            assert torch.equal(value, right)


@runs
def test_nothing_outlives_the_backward_pass() -> None:
    x = {n: t.requires_grad_() for n, t in here().items()}
    y, final = partial(selective_scan, delta_softplus=True, backend="cuda")(**x)
    node = weakref.ref(y.grad_fn)
    total = y.sum() + final.sum()
    total.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        total.backward()
    gc.disable()
    try:
        del y, final, total
        assert node() is None
    finally:
        gc.enable()


@runs
def test_a_second_derivative_is_refused() -> None:
    x = {n: t.requires_grad_() for n, t in here().items()}
    y, _ = partial(selective_scan, delta_softplus=True, backend="cuda")(**x)
    (gradient,) = torch.autograd.grad(y.square().sum(), [x["u"]], create_graph=True)
    with pytest.raises(RuntimeError, match="use backend='naive'"):
        gradient.sum().backward()


# --- what only a GPU does -------------------------------------------------------------


@on_gpu
def test_two_runs_are_bit_equal() -> None:
    x = {n: t.float() for n, t in operands(700, 128, 16).items()}
    check_bit_equal(scan, x)


@on_gpu
def test_compiled_in_one_graph() -> None:
    x = {n: t.float() for n, t in operands(7, 8, 4).items()}
    check_compiled(scan, x)


@on_gpu
def test_captured_in_a_cuda_graph() -> None:
    options: Any = {"delta_softplus": True, "backend": "cuda"}
    check_captured(selective_scan, operands(40, 64, 16), **options)


@on_gpu
def test_a_thread_may_begin_with_the_kernels() -> None:
    """Backward alone on autograd's thread: no other operation makes it ready."""
    x = {n: t.float().cuda() for n, t in operands(40, 64, 16).items()}
    x["u"].requires_grad_()
    run = partial(selective_scan, delta_softplus=True, backend="cuda")
    with ThreadPoolExecutor(1) as alone:
        y, _ = alone.submit(run, **x).result()
    gradient = torch.autograd.grad(y, x["u"], torch.ones_like(y))[0]
    again = torch.autograd.grad(run(**x)[0], x["u"], torch.ones_like(y))[0]
    assert torch.equal(gradient, again)


@on_gpu
def test_auto_takes_the_kernels_and_a_second_derivative_is_refused() -> None:
    x = {n: t.float().cuda() for n, t in operands(5).items()}
    x["u"].requires_grad_()
    with backends_used() as used:
        y, _ = partial(selective_scan, delta_softplus=True)(**x)
    assert used == {"selective_scan=cuda"}
    (gradient,) = torch.autograd.grad(y.square().sum(), [x["u"]], create_graph=True)
    with pytest.raises(RuntimeError, match="use backend='naive'"):
        gradient.sum().backward()


@on_gpu
def test_more_elements_than_32_bits_count() -> None:
    """2^31 elements and more: whole and in two parts the same."""
    D, L = 2048, (1 << 20) + 96
    u = torch.randn(1, L, D, device="cuda", dtype=torch.bfloat16)
    delta = torch.full((1, 1, 1), -3.0, device="cuda", dtype=u.dtype).expand(1, L, D)
    delta = delta.contiguous()
    A = -torch.rand(D, 4, device="cuda") - 0.5
    B, C = torch.randn(2, 1, L, 4, device="cuda", dtype=u.dtype)
    run = partial(selective_scan, A=A, delta_softplus=True, backend="cuda")
    with torch.no_grad():
        y, final = run(u, delta, B=B, C=C)
        cut = L - 200
        _, state = run(u[:, :cut], delta[:, :cut], B=B[:, :cut], C=C[:, :cut])
        tail = (u[:, cut:], delta[:, cut:])
        y_tail, end = run(*tail, B=B[:, cut:], C=C[:, cut:], initial_state=state)
    assert_close(y[:, cut:].float(), y_tail.float(), name="y", dtype=u.dtype)
    assert_close(final, end, name="final")
