"""The selective scan on every backend against the loop in float64."""

import itertools
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ssm._errors import ArgumentError, BackendError
from ssm.ops._dispatch import backends_used
from ssm.ops.selective_scan import selective_scan
from ssm.ops.selective_scan.naive import selective_scan_loop, selective_scan_numpy
from tests.ssm.helpers import assert_close
from tests.ssm.ops.helpers import (
    LENGTHS,
    check_against_reference,
    check_bit_equal,
    check_compiled,
    check_same,
    outcome,
    random,
)

BATCH, D, N = 2, 6, 5
REAL = [("cpu", False), ("torch", False)]
ALL = [*REAL, ("torch", True)]
scan = partial(selective_scan, delta_softplus=True, chunk_size=16)


def operands(L: int, is_complex: bool = False, groups: int = 2) -> dict[str, Tensor]:
    """Everything that a scan can take; B in groups, C shared by all channels."""
    A = -random(D, N, seed=3).abs()
    x = {
        "u": random(BATCH, L, D, seed=1),
        "delta": random(BATCH, L, D, seed=2),
        "A": A,
        "B": random(BATCH, L, groups, N, seed=4),
        "C": random(BATCH, L, N, seed=5),
        "D": random(D, seed=6),
        "z": random(BATCH, L, D, seed=7),
        "delta_bias": random(D, seed=8),
        "initial_state": random(BATCH, D, N, seed=9),
    }
    if is_complex:
        for name, seed in {"A": 10, "B": 11, "initial_state": 12}.items():
            x[name] = torch.complex(x[name], 3 * random(*x[name].shape, seed=seed))
    return x


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("softplus", [False, True])
def test_the_torch_loop_is_the_numpy_specification(
    softplus: bool, is_complex: bool
) -> None:
    x = operands(9, is_complex)
    x["delta"] = 40 * x["delta"] if softplus else x["delta"].abs()  # over the threshold
    x["C"] = x["C"][:, :, None]
    for absent in ([], ["D"], ["z", "delta_bias"]):
        names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
        given = [None if n in absent else x[n] for n in names]
        h = x["initial_state"]
        arrays = [None if t is None else t.numpy() for t in given]
        expected = selective_scan_numpy(*arrays, softplus, h.numpy())
        found = selective_scan_loop(*given, softplus, h)
        for ours, spec in zip(found, expected, strict=True):
            assert_close(ours, torch.from_numpy(spec))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("L", LENGTHS)
@pytest.mark.parametrize(("backend", "is_complex"), ALL)
def test_values_and_every_gradient(
    backend: str, is_complex: bool, L: int, dtype: torch.dtype
) -> None:
    check_against_reference(scan, operands(L, is_complex), dtype, backend=backend)


@pytest.mark.parametrize(("backend", "is_complex"), ALL)
def test_constant_system_and_odd_sizes(backend: str, is_complex: bool) -> None:
    """B (D, N), C in as many groups as channels; nothing optional."""
    x = operands(19, is_complex)
    constant = {
        "u": x["u"],
        "delta": x["delta"],
        "A": x["A"],
        "B": random(D, N, seed=20),
        "C": random(BATCH, 19, D, N, seed=21),
    }
    check_against_reference(scan, constant, torch.float64, backend=backend)
    groups = constant | {
        "B": random(BATCH, 19, 3, N, seed=22),
        "C": random(BATCH, 19, 2, N, seed=23),
    }
    check_against_reference(scan, groups, torch.float64, backend=backend)
    one = {n: t[..., :1] for n, t in groups.items() if n in ("u", "delta")}
    one |= {n: random(1, 1, seed=s) for n, s in {"B": 1, "C": 2}.items()}
    one["A"] = x["A"][:1, :1]
    check_against_reference(scan, one, torch.float64, backend=backend)


@pytest.mark.parametrize("chunk_size", [1, 7, 64, 512])
@pytest.mark.parametrize("log_decay", [0.0, -1e-6, -50.0, -1e4])
@pytest.mark.parametrize(("backend", "is_complex"), ALL)
def test_any_decay_and_chunk_size_is_finite_and_right(
    backend: str, is_complex: bool, log_decay: float, chunk_size: int
) -> None:
    x = operands(70, is_complex)
    A = torch.full((D, N), log_decay, dtype=torch.float64)
    x["A"] = torch.complex(A, x["A"].imag) if is_complex else A
    x["delta"] = 1.0 + 0.1 * x["delta"].clamp(-2, 2)
    del x["delta_bias"], x["z"]
    options = {"delta_softplus": False, "chunk_size": chunk_size}
    run = partial(selective_scan, **options)
    check_against_reference(run, x, torch.float32, backend=backend)


@pytest.mark.parametrize(("backend", "is_complex"), [*ALL, ("naive", False)])
def test_pieces_continue_and_states_are_those_after_the_steps(
    backend: str, is_complex: bool
) -> None:
    L, cuts, steps = 41, (0, 1, 14, 30, 41), [13, 40, 0, 13]
    x = operands(L, is_complex)

    def whole(**given: Tensor) -> tuple[Tensor, Tensor]:
        y, final, states = scan(**given, states_at=steps, backend=backend)
        return y, torch.cat([final[:, None], states], 1)

    def in_pieces(**given: Tensor) -> tuple[Tensor, Tensor]:
        h, ys, after = given.pop("initial_state"), [], {}
        for start, end in itertools.pairwise(cuts):
            part = {n: t[:, start:end] if t.ndim > 2 else t for n, t in given.items()}
            y, h = scan(**part, initial_state=h, backend=backend)
            ys.append(y)
            after[end - 1] = h
        return torch.cat(ys, 1), torch.stack([h, *(after[t] for t in steps)], 1)

    check_same(outcome(whole, x), outcome(in_pieces, x))


@pytest.mark.parametrize(("backend", "is_complex"), [*ALL, ("naive", False)])
def test_zero_steps_return_the_state(backend: str, is_complex: bool) -> None:
    x = operands(0, is_complex)
    y, final, states = scan(**x, backend=backend, states_at=[])
    assert y.shape == (BATCH, 0, D)
    assert torch.equal(final, x["initial_state"])
    assert states.shape == (BATCH, 0, D, N)
    rowless = {n: t[:0] if t.shape[0] == BATCH else t for n, t in operands(3).items()}
    y, final = scan(**rowless, lengths=torch.zeros(0).long(), backend=backend)
    assert (y.shape, final.shape) == ((0, 3, D), (0, D, N))


def alone(given: dict[str, Tensor], sizes: list[int], backend: str) -> tuple[Any, Any]:
    """Each row by itself, unpadded; zeros behind it."""
    L, ys, finals = given["u"].shape[1], [], []
    for i, size in enumerate(sizes):
        row = {
            n: t[i : i + 1] if n == "initial_state" else t[i : i + 1, :size]
            for n, t in given.items()
            if t.ndim > 2
        }
        y, final = scan(**(given | row), backend=backend)
        ys.append(torch.cat([y, y.new_zeros(1, L - size, D)], 1))
        finals.append(final)
    return torch.cat(ys), torch.cat(finals)


@pytest.mark.parametrize(("backend", "is_complex"), [*ALL, ("naive", False)])
def test_padding_is_neutral_even_when_it_is_nan(backend: str, is_complex: bool) -> None:
    sizes, L = [23, 0], 37
    x = operands(L, is_complex)
    for name in ("u", "delta", "B", "C", "z"):
        for i, size in enumerate(sizes):
            x[name][i, size:] = torch.nan
    lengths = torch.tensor(sizes)
    found = outcome(scan, x, lengths=lengths, backend=backend)
    expected = outcome(lambda **given: alone(given, sizes, backend), x)
    check_same(found, expected)
    _, final, states = scan(**x, lengths=lengths, states_at=[5, 30], backend=backend)
    assert torch.equal(states[0, 1], final[0]), "the state is held on padding"
    assert torch.equal(states[1, 0], x["initial_state"][1])
    assert not found["y"][0, 23:].any()
    assert scan(**x, lengths=lengths, backend=backend, check_domain=True)


@pytest.mark.parametrize(("backend", "is_complex"), ALL)
def test_packed_sequences_are_sequences_alone(backend: str, is_complex: bool) -> None:
    sizes, S = [5, 0, 11, 1], 4
    x = operands(sum(sizes), is_complex)
    x = {n: t[:1] if t.ndim > 2 else t for n, t in x.items()}
    x["initial_state"] = random(S, D, N, seed=30).to(x["A"].dtype)
    bounds = torch.tensor([0, 5, 5, 16, 17])

    def each(**given: Tensor) -> tuple[Tensor, Tensor]:
        ys, finals = [], []
        for i in range(S):
            cut = {
                n: t[i : i + 1]
                if n == "initial_state"
                else t[:, bounds[i] : bounds[i + 1]]
                for n, t in given.items()
                if t.ndim > 2
            }
            y, final = scan(**(given | cut), backend=backend)
            ys.append(y)
            finals.append(final)
        return torch.cat(ys, 1), torch.cat(finals)

    packed = partial(scan, cu_seqlens=bounds, backend=backend)
    check_same(outcome(packed, x), outcome(each, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("backend", "is_complex"), ALL)
def test_narrow_inputs_have_a_float32_state(
    backend: str, is_complex: bool, dtype: torch.dtype
) -> None:
    """As good as float32 up to the rounding of y: states and sums are not rounded."""
    x = operands(65, is_complex)
    x = {n: t.to(dtype) if not t.is_complex() else t.cfloat() for n, t in x.items()}
    wide = {n: t.to(torch.promote_types(t.dtype, torch.float64)) for n, t in x.items()}
    y, final = scan(**x, backend=backend)
    expected_y, expected_final = scan(**wide, backend="naive")
    assert y.dtype == dtype
    assert final.dtype == (torch.complex64 if is_complex else torch.float32)
    assert_close(y, expected_y)
    assert_close(final, expected_final)
    grads = outcome(scan, x, backend=backend)
    for name, value in outcome(scan, wide, backend="naive").items():
        assert_close(grads[name], value, name=name, dtype=dtype)


@pytest.mark.parametrize(("backend", "is_complex"), ALL)
def test_non_contiguous_operands(backend: str, is_complex: bool) -> None:
    x = operands(17, is_complex)
    strided = {
        n: t.movedim(0, -1).contiguous().movedim(-1, 0).requires_grad_()
        for n, t in x.items()
    }
    assert not strided["u"].is_contiguous()
    straight = {n: t.clone().requires_grad_() for n, t in x.items()}
    results = []
    for given in (strided, straight):
        y, final = scan(**given, backend=backend)
        loss = (y * y).sum() + final.abs().square().sum()
        results.append([y, final, *torch.autograd.grad(loss, list(given.values()))])
    for a, b in zip(*results, strict=True):
        assert_close(a.detach(), b.detach())


@pytest.mark.parametrize(("backend", "is_complex"), ALL)
def test_compiled_in_one_graph(backend: str, is_complex: bool) -> None:
    x, run = operands(7, is_complex), partial(scan, chunk_size=4, backend=backend)
    check_compiled(run, x)
    check_compiled(run, x, lengths=torch.tensor([7, 2]))


@pytest.mark.parametrize(("backend", "is_complex"), ALL)
def test_training_keeps_the_states_between_chunks_only(
    backend: str, is_complex: bool
) -> None:
    """What a forward pass leaves allocated: y, final state and L / 16 states."""
    L = 256
    x = {n: t.requires_grad_() for n, t in operands(L, is_complex, groups=1).items()}
    scan(**x, backend=backend)  # what is allocated once is not counted
    with torch.profiler.profile(profile_memory=True) as profiler:
        y, final = scan(**x, backend=backend)
    kept = sum(event.self_cpu_memory_usage for event in profiler.key_averages())
    expected = y.nbytes + final.nbytes * (1 + L // 16)
    assert y.nbytes < kept <= 1.5 * expected


@pytest.mark.parametrize(("backend", "is_complex"), ALL)
def test_two_runs_are_bit_equal(backend: str, is_complex: bool) -> None:
    check_bit_equal(scan, operands(65, is_complex), backend=backend)


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("backend", ["torch", "naive"])
def test_double_backward(backend: str, is_complex: bool) -> None:
    x = operands(3, is_complex, groups=1)
    x |= {n: x[n][:1, :, :2] for n in ("u", "delta", "z")}
    x |= {n: x[n][:1, ..., :2] for n in ("B", "C")}
    x |= {"A": x["A"][:2, :2], "D": x["D"][:2], "delta_bias": x["delta_bias"][:2]}
    x["initial_state"] = x["initial_state"][:1, :2, :2]
    names = list(x)

    def run(*given: Tensor) -> Tensor:
        y, final = selective_scan(
            **dict(zip(names, given, strict=True)),
            delta_softplus=True,
            chunk_size=2,
            backend=backend,
        )
        return y.square().sum() + final.abs().square().sum()

    inputs = tuple(t.clone().requires_grad_() for t in x.values())
    assert torch.autograd.gradgradcheck(run, inputs, atol=1e-4)


def test_cpu_says_that_it_has_no_second_derivative() -> None:
    x = operands(5)
    u = x.pop("u").requires_grad_()
    (grad,) = torch.autograd.grad(
        scan(u, **x, backend="cpu")[0].square().sum(), u, create_graph=True
    )
    with pytest.raises(RuntimeError, match="backend='naive'"):
        grad.sum().backward()


@pytest.mark.parametrize(("backend", "is_complex"), ALL)
def test_a_constant_system_is_a_convolution(backend: str, is_complex: bool) -> None:
    """y = K * u with K_j = 2 Re(C exp(A)^j B) (real A: C exp(A)^j B), by powers."""
    L, x = 33, operands(33, is_complex)
    B, C = random(D, N, seed=40), random(D, N, seed=41)
    u = x["u"]
    y, _ = selective_scan(
        u, torch.ones_like(u), x["A"], B, C, chunk_size=8, backend=backend
    )
    kernel = torch.stack([(C * torch.exp(x["A"]) ** j * B).sum(1) for j in range(L)])
    kernel = 2 * kernel.real if is_complex else kernel
    expected = [
        np.convolve(u[b, :, d].numpy(), kernel[:, d].numpy())[:L]
        for b in range(BATCH)
        for d in range(D)
    ]
    assert_close(y, torch.tensor(np.array(expected)).reshape(BATCH, D, L).mT)


def test_auto_takes_the_compiled_backend_where_it_can() -> None:
    with backends_used() as used:
        scan(**operands(3))
    assert used == {"selective_scan=cpu"}
    with backends_used() as used:
        scan(**operands(3, is_complex=True))
    assert used == {"selective_scan=torch"}
    with pytest.raises(BackendError, match="float32 or float64"):
        scan(**operands(3, is_complex=True), backend="cpu")


BAD = {
    "u": lambda x: x["u"].long(),
    "delta": lambda x: x["delta"][:, 1:],
    "A": lambda x: x["A"][1:],
    "B": lambda x: x["B"][:, :, [0, 0, 1, 1]],
    "C": lambda x: x["C"][..., 1:],
    "D": lambda x: x["D"][1:],
    "z": lambda x: x["z"].mT,
    "delta_bias": lambda x: x["delta_bias"].to("meta"),
    "initial_state": lambda x: x["initial_state"].mT,
    "lengths": lambda x: torch.tensor([4, 1]),
    "cu_seqlens": lambda x: torch.tensor([0, 3]),
    "states_at": lambda x: [0, 3],
    "chunk_size": lambda x: 0,
    "backend": lambda x: "fast",
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name: str) -> None:
    x = operands(3)
    with pytest.raises(ArgumentError, match=f"^{name}: got "):
        scan(**(x | {name: BAD[name](x)}))


@pytest.mark.parametrize("name", ["u", "B", "C", "initial_state"])
def test_complex_operands_need_the_right_place(name: str) -> None:
    x = operands(3)
    with pytest.raises(ArgumentError, match=f"^{name}: got dtype torch.complex"):
        scan(**(x | {name: x[name].to(torch.complex128)}))


def test_lengths_and_bounds_exclude_each_other() -> None:
    x = {n: t[:1] if t.ndim > 2 else t for n, t in operands(3).items()}
    given = {"lengths": torch.tensor([3]), "cu_seqlens": torch.tensor([0, 3])}
    with pytest.raises(ArgumentError, match="cu_seqlens"):
        scan(**x, **given)


@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "z", "initial_state"])
def test_check_domain_finds_nan(name: str) -> None:
    x = operands(3)
    x[name].view(-1)[1] = torch.nan
    with pytest.raises(ArgumentError, match=f"^{name}: got nan"):
        scan(**x, check_domain=True)


@pytest.mark.parametrize("is_complex", [False, True])
def test_check_domain_finds_growth(is_complex: bool) -> None:
    x = operands(3, is_complex)
    assert scan(**x, check_domain=True)
    with pytest.raises(ArgumentError, match=r"^A: got a real part of"):
        scan(**(x | {"A": -x["A"]}), check_domain=True)
    with pytest.raises(ArgumentError, match=r"^delta: got a step of -"):
        selective_scan(**x, check_domain=True)
    zero = x | {"delta": -x["delta_bias"].expand_as(x["delta"])}
    assert selective_scan(**zero, check_domain=True)
