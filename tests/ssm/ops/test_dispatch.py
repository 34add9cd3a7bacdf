"""The choice of a backend is explicit, visible and never switched silently."""

from functools import partial

import pytest
import torch

from ssm._errors import ArgumentError, BackendError
from ssm.ops import _dispatch
from ssm.ops._dispatch import (
    Backend,
    Request,
    backends_used,
    choose,
    explain,
    find,
    forget,
    remembered,
)
from ssm.ops._dtypes import compute_dtype
from ssm.ops._numba import refuses, refuses_real
from ssm.ops.diagonal_ssd import diagonal_ssd
from ssm.ops.linear_scan import linear_scan

CPU = torch.device("cpu")
REQUEST = Request(CPU, torch.float32)
TABLE = {
    "fast": Backend(
        lambda: "fast", lambda r: f"no {r.dtype}" if r.needs_grad else None
    ),
    "slow": Backend(lambda: "slow"),
}


def test_auto_takes_the_first_that_can():
    assert choose("op", "auto", TABLE, REQUEST).run() == "fast"
    needy = Request(CPU, torch.float32, needs_grad=True)
    assert choose("op", "auto", TABLE, needy).run() == "slow"
    assert choose("op", "slow", TABLE, REQUEST).run() == "slow"


def test_a_named_backend_runs_or_says_why_not():
    needy = Request(CPU, torch.float32, needs_grad=True)
    message = r"^op: backend 'fast' cannot run: no torch.float32$"
    with pytest.raises(BackendError, match=message):
        choose("op", "fast", TABLE, needy)
    with pytest.raises(ArgumentError, match=r"^backend: got 'x'; expected auto, fast"):
        choose("op", "x", TABLE, REQUEST)
    assert explain(TABLE, needy) == {"fast": "no torch.float32", "slow": None}


def test_backends_used_are_collected_and_blocks_nest():
    a = torch.rand(1, 3, 2)
    with backends_used() as outer:
        linear_scan(a, a, backend="torch")
        with backends_used() as inner:
            linear_scan(a, a, backend="naive")
        linear_scan(a, a)
    linear_scan(a, a, backend="naive")
    assert outer == {"linear_scan=torch", "linear_scan=cpu"}
    assert inner == {"linear_scan=naive"}


def test_a_refused_call_is_not_counted():
    with backends_used() as names, pytest.raises(BackendError):
        choose("op", "fast", TABLE, Request(CPU, torch.float32, needs_grad=True))
    assert names == set()


def test_numba_refuses_other_devices_and_dtypes():
    assert refuses(REQUEST) is None
    assert "cuda" in refuses(Request(torch.device("cuda"), torch.float32))
    assert "complex64" in refuses_real(Request(CPU, torch.complex64))
    assert refuses_real(REQUEST) is None


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((torch.bfloat16,), torch.float32),
        ((torch.float16, torch.bfloat16), torch.float32),
        ((torch.float32, torch.bfloat16), torch.float32),
        ((torch.bfloat16, torch.float64), torch.float64),
        ((torch.float32, torch.complex64), torch.complex64),
        ((torch.float64, torch.complex64), torch.complex128),
        ((torch.bfloat16, torch.complex64), torch.complex64),
        ((torch.float64,), torch.float64),
    ],
)
def test_states_are_float32_at_least(dtypes, expected):
    tensors = [torch.zeros(1, dtype=dtype) for dtype in dtypes]
    assert compute_dtype(*tensors) == expected
    assert compute_dtype(*tensors[::-1], None) == expected


# --- calls alike are settled once -----------------------------------------------------


@pytest.fixture
def settled():
    """(a remembered choice, the arguments that it was asked for)."""
    asked = []

    @remembered
    def settle(*arguments):
        asked.append(arguments)
        if arguments[-1] == "wrong":
            raise ArgumentError("wrong")
        return find("op", "slow", TABLE, REQUEST)

    return settle, asked


def test_calls_alike_are_settled_once_and_others_anew(settled):
    settle, asked = settled
    x = torch.rand(2, 3)
    for _ in range(3):
        assert settle(x, None, 64).backend is TABLE["slow"]
        assert settle(torch.rand(2, 3), None, 64).name == "op=slow"
    assert len(asked) == 1
    others = [(x.double(), None, 64), (x.mT, None, 64), (x.to("meta"), None, 64)]
    others += [(x, x, 64), (x, None, 64.0), (x, None, True), (x, None, 1)]
    for arguments in others:
        settle(*arguments)
    assert len(asked) == 1 + len(others)
    forget()
    settle(x, None, 64)
    assert len(asked) == 2 + len(others)


def test_calls_alike_in_memory_have_what_the_backend_made_of_the_first():
    made = []

    def direct(*arguments):
        made.append(arguments)
        return f"number {len(made)}"

    table = {"kernel": Backend(lambda: 0, direct=direct), "other": TABLE["slow"]}

    @partial(remembered, in_place=True)
    def settle(x, z, name):
        return find("op", name, table, REQUEST)

    room = torch.rand(64)
    x = room[:12].view(3, 4)
    first = settle(x, None, "kernel").direct
    assert first == settle(torch.rand(3, 4), None, "kernel").direct == "number 1"
    others = [room[1:13].view(3, 4), room[:24].view(3, 8)[:, :4], x[:1].expand(3, 4)]
    for i, other in enumerate([*others, *others]):
        assert settle(other, None, "kernel").direct == f"number {2 + i % 3}"
    for i, other in enumerate([*others, *others]):
        assert settle(x, other, "kernel").direct == f"number {5 + i % 3}"
    assert settle(x, None, "other").direct is None
    assert len(made) == 7


def test_a_transform_settles_anew_and_gets_nothing_for_ordinary_tensors():
    direct = []
    table = {"kernel": Backend(lambda: 0, direct=lambda *_: "made")}

    @partial(remembered, in_place=True)
    def settle(x):
        direct.append(find("op", "kernel", table, REQUEST).direct)
        return find("op", "kernel", table, REQUEST)

    def inside(x):
        direct.append(settle(x).direct)
        return x

    torch.func.vmap(inside)(torch.rand(2, 3))
    assert direct == [None, None]
    assert settle(torch.rand(3)).direct == "made"


def test_errors_and_options_of_no_use_are_not_remembered(settled):
    settle, asked = settled
    for _ in range(2):
        with pytest.raises(ArgumentError):
            settle(torch.rand(1), "wrong")
        settle(torch.rand(1), [64])  # cannot be looked up
    assert len(asked) == 4


def test_what_hangs_on_a_test_to_come_is_settled_anew():
    verdicts = [False, True]
    table = {"kernel": Backend(lambda: 0, tested=lambda _: verdicts.pop(0))}
    calls = []

    @remembered
    def settle(x):
        calls.append(x)
        return find("op", "auto", table, REQUEST)

    for _ in range(4):
        settle(torch.rand(1))
    assert len(calls) == 2


def test_not_more_kinds_are_kept_than_fit(settled, monkeypatch):
    settle, _ = settled
    monkeypatch.setattr(_dispatch, "_MOST", 3)
    for n in range(10):
        settle(torch.rand(n))
        assert len(_dispatch._remembered) <= 3


def test_backends_used_hears_of_remembered_calls():
    a = torch.rand(1, 3, 2, 2)
    for _ in range(2):
        with backends_used() as names:
            diagonal_ssd(a, a, a, a, backend="naive")
        assert names == {"diagonal_ssd=naive"}
