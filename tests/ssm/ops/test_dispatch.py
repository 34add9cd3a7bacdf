"""The choice of a backend is explicit, visible and never switched silently."""

import pytest
import torch

from ssm._errors import ArgumentError, BackendError
from ssm.ops._dispatch import Backend, Request, backends_used, choose, explain
from ssm.ops._dtypes import compute_dtype
from ssm.ops._numba import refuses, refuses_real
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
