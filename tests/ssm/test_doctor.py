"""The doctor says what runs, why the rest does not, and catches what does not."""

import json

import pytest
import torch

from ssm import doctor
from ssm._cases import OPS, Draw, OpCase
from ssm._errors import BackendError
from ssm.ops import backends_used
from ssm.ops._dispatch import Backend
from ssm.ops.linear_scan.op import BACKENDS as LINEAR_SCAN
from ssm.ops.linear_scan.op import _widened
from ssm.ops.linear_scan.torch import linear_scan_torch

LIBRARIES = ("python", "torch", "numba", "triton", "transformers", "mamba_ssm")


def case_named(name: str) -> OpCase:
    return next(case for case in OPS if case.name == name)


def test_the_command_prints_every_operator_and_why_some_do_not_run(run_module):
    done = run_module("ssm.doctor", "--quick")
    assert done.returncode == 0, done.stderr
    for word in (*LIBRARIES, *doctor.operators(), "causal_conv1d", "cpu", "cuda"):
        assert word in done.stdout
    assert "it computes in float32 or float64, not torch.complex64" in done.stdout
    assert "self-check" not in done.stdout


def test_importing_it_prints_nothing_and_needs_no_torch(run_module):
    program = "import sys, ssm.doctor; assert 'torch' not in sys.modules"
    done = run_module("timeit", "-n", "1", "-r", "1", "-s", program, "pass")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 1  # timeit's own


def test_every_operator_has_a_small_real_problem():
    unchecked = doctor.unchecked(doctor.choices(doctor.operators()))
    assert not [line for line in unchecked if "float32" in line]


def test_auto_takes_what_the_table_says():
    for choice in doctor.choices(doctor.operators()):
        if choice.device != "cpu":
            continue
        for case in doctor.cases(choice):
            kind = getattr(torch, choice.dtype)
            drawn = case.build(3, Draw(torch.Generator().manual_seed(0), kind))
            with backends_used() as used:
                case.run(*drawn, backend="auto")
            assert used == {f"{choice.op}={choice.auto}"}, case.name


def test_as_json_it_has_choices_reasons_and_errors(capsys):
    assert doctor.main(["--json", "--only", "linear_scan"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert set(told["versions"]) >= set(LIBRARIES)
    assert {row["op"] for row in told["backends"]} == {"linear_scan"}
    checked = {(r["backend"], r["dtype"]) for r in told["self_check"] if r["passed"]}
    everywhere = [name for name, backend in LINEAR_SCAN.items() if not backend.gpu]
    assert checked >= {(b, t) for b in everywhere for t in doctor.DTYPES}
    for row in told["self_check"]:
        assert 0 < row["error"] <= row["tolerance"] < 1e-5
        assert row["cold_s"] > 0 < row["warm_s"]


def backward_with_another_sign(a, b, initial_state):
    """Right values, the gradient of ``a`` with the wrong sign."""
    return linear_scan_torch(2 * a.detach() - a, b, initial_state)


def raising(a, b, initial_state):
    raise OSError("undefined symbol:\n _ZN3c10")


def nan_at_one_place(a, b, initial_state):
    """All gradients are right; values are checked before them."""
    h = linear_scan_torch(a, b, initial_state)
    return h + torch.nan * (torch.arange(h.numel()).reshape(h.shape) == 5)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (backward_with_another_sign, "in d/da"),
        (raising, "OSError: undefined symbol: _ZN3c10"),
        (nan_at_one_place, "off by nan in y"),
    ],
)
def test_a_backend_that_is_not_what_it_says_is_exit_status_1(
    monkeypatch, capsys, broken, said
):
    monkeypatch.setitem(LINEAR_SCAN, "planted", Backend(_widened(broken)))
    assert doctor.main(["--only", "linear_scan"]) == 1
    failures = [
        line for line in capsys.readouterr().out.splitlines() if "FAILED" in line
    ]
    assert len(failures) == len(doctor.DTYPES)
    assert all("'planted'" in line and said in line for line in failures)


def test_a_backend_without_initial_state_is_checked_from_zero(monkeypatch):
    def from_zero_only(a, b, initial_state):
        if initial_state.any() or initial_state.requires_grad:
            raise BackendError("it takes no initial state")
        return linear_scan_torch(a, b, initial_state)

    monkeypatch.setitem(LINEAR_SCAN, "planted", Backend(_widened(from_zero_only)))
    row = doctor.check(case_named("linear_scan"), "planted", "cpu", "float32")
    assert row.passed, row.verdict
    assert row.note == "it takes no initial state"


def test_a_refusal_becomes_a_footnote_once(monkeypatch):
    monkeypatch.setitem(
        LINEAR_SCAN, "planted", Backend(raising, lambda request: "no such device")
    )
    chosen = doctor.choices(["linear_scan"])
    notes = doctor.footnotes(chosen)
    assert "no such device" in notes
    assert list(notes.values()) == list(range(1, len(notes) + 1))
    assert all("planted" not in choice.running for choice in chosen)


def test_a_broken_library_is_named_with_its_error(monkeypatch):
    def import_module(name):
        raise ImportError(f"{name}: undefined symbol\n in a second line")

    assert "importing it fails" not in doctor.versions()["torch"]
    monkeypatch.setattr(doctor.importlib, "import_module", import_module)
    told = doctor.versions()["torch"]
    assert "importing it fails: ImportError: torch: undefined symbol in" in told
    assert doctor._version("no_such_package", "no-such-package") == "not installed"


def test_without_torch_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "has_torch", lambda: False)
    assert doctor.main([]) == 1
    assert "uv sync --extra torch" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [("--only", "nothing"), ("--slow",)])
def test_faults_end_in_one_line_and_status_2(run_module, flags):
    done = run_module("ssm.doctor", *flags)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
