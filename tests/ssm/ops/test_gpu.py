"""Where GPU kernels run, their self-test, and what it remembers, on a pretended GPU."""

import re
import warnings
from pathlib import Path

import pytest
import torch

from ssm._errors import BackendError
from ssm.ops import _gpu, _selftest
from ssm.ops._dispatch import Backend, Request, choose
from ssm.ops.linear_scan import BACKENDS

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
ON_GPU = Request(GPU, torch.float32)


class Pretended:
    """A GPU as the choice of a backend sees it; ``faults`` are the tests' results."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.capability, self.faults, self.tests = (9, 0), {}, []
        self.capturing = False
        for name, value in {
            "get_device_capability": lambda _=None: self.capability,
            "get_device_name": lambda _=None: "Pretended GPU",
            "is_current_stream_capturing": lambda: self.capturing,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(_gpu, "_MISSING", {"triton": None, "cuda": None})
        monkeypatch.setattr(_selftest, "check", self.check)
        monkeypatch.setattr(_selftest, "_known", {})
        monkeypatch.setattr(_gpu, "_say_once", _gpu._say_once.__wrapped__)
        self.forget()

    def check(self, op, backend, device, *, even=False):
        assert device == GPU
        self.tests.append((op, backend, even))
        return self.faults.get(op, "")

    def forget(self):
        """As in a new process."""
        _selftest._known.clear()
        _selftest.machine.cache_clear()
        _gpu._unusable.cache_clear()


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pretended = Pretended(monkeypatch)
    yield pretended
    pretended.forget()


def table(**limits):
    return {
        "triton": _gpu.gpu_backend("linear_scan", "triton", lambda: "fast", **limits),
        "torch": Backend(lambda: "slow"),
    }


def chosen(given=None, backend="auto", request=ON_GPU):
    return choose("linear_scan", backend, given or table(), request).run()


# --- the choice -----------------------------------------------------------------------


def test_auto_takes_a_kernel_that_passed(gpu):
    assert chosen() == "fast"
    assert chosen() == "fast"
    assert gpu.tests == [("linear_scan", "triton", False)]


def test_other_dtypes_and_devices_are_left_to_others(gpu):
    assert chosen(request=Request(GPU, torch.float64)) == "slow"
    assert chosen(request=Request(CPU, torch.float32)) == "slow"
    with pytest.raises(BackendError, match=r"in float32, not in torch.float64"):
        chosen(backend="triton", request=Request(GPU, torch.float64))
    both = table(dtypes=(torch.float32, torch.complex64))
    assert chosen(both, request=Request(GPU, torch.complex64)) == "fast"
    assert not gpu.tests[1:]


def test_limits_of_a_kernel_are_asked_with_the_sizes(gpu):
    few = table(refuses=lambda r: "too many" if r.sizes["N"] > 8 else None)
    assert chosen(few, request=Request(GPU, torch.float32, sizes={"N": 8})) == "fast"
    assert chosen(few, request=Request(GPU, torch.float32, sizes={"N": 9})) == "slow"
    with pytest.raises(BackendError, match="too many"):
        chosen(few, "triton", Request(GPU, torch.float32, sizes={"N": 9}))
    assert len(gpu.tests) == 1


def test_interpreted_kernels_run_on_the_cpu_by_name_only(gpu, monkeypatch):
    monkeypatch.setattr(_gpu, "_INTERPRETED", True)
    request = Request(CPU, torch.float32)
    assert chosen(backend="triton", request=request) == "fast"
    assert chosen(request=request) == "slow"
    monkeypatch.setattr(_gpu, "_INTERPRETED", False)
    with pytest.raises(BackendError, match=r"runs on CUDA tensors, not on cpu"):
        chosen(backend="triton", request=request)
    assert not gpu.tests


def test_an_old_gpu_falls_back_with_one_line(gpu):
    gpu.capability = (7, 5)
    message = r"^GPU kernels are off: Pretended GPU has compute capability 7.5; .* 8.0"
    with pytest.warns(RuntimeWarning, match=message):
        assert chosen() == "slow"
    with pytest.raises(BackendError, match=r"compute capability 7.5"):
        chosen(backend="triton")
    assert not gpu.tests


def test_without_triton_it_falls_back_with_one_line(gpu, monkeypatch):
    monkeypatch.setitem(_gpu._MISSING, "triton", "triton")
    with pytest.warns(RuntimeWarning, match=r"^GPU kernels are off: triton is not"):
        assert chosen() == "slow"
    assert not gpu.tests


def test_a_line_is_said_once(recwarn):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        for _ in range(3):
            _gpu.say_once("a line of this test")
    assert [str(w.message) for w in recwarn] == ["a line of this test"]


def test_the_verdict_is_a_constant_of_compiled_code(gpu):
    gpu.faults["ssd"] = "a fault"
    _selftest._known[("ssd", "triton"), 0] = "a fault"

    def f(x):
        good = _gpu.verdict("linear_scan", "triton", GPU)
        bad = _gpu.verdict("ssd", "triton", GPU)
        return x + (1 if good is None else 10) + (100 if bad == "a fault" else 1000)

    torch.compiler.reset()
    compiled = torch.compile(f, backend="eager", fullgraph=True)
    assert compiled(torch.zeros(2)).tolist() == [101, 101]
    assert gpu.tests == [("linear_scan", "triton", False)]


# --- what is remembered ---------------------------------------------------------------


def test_a_verdict_is_kept_for_the_next_process(gpu):
    gpu.faults["linear_scan"] = "the output is off by 1.0e+00 in float32"
    for _ in range(2):
        with pytest.warns(
            RuntimeWarning, match=r"switched off on Pretended GPU: .*off by"
        ):
            assert chosen() == "slow"
        gpu.forget()
    assert len(gpu.tests) == 1
    with pytest.warns(RuntimeWarning), pytest.raises(BackendError, match="off by"):
        chosen(backend="triton")


def test_another_gpu_library_or_source_is_tested_anew(gpu, monkeypatch):
    chosen()
    for patch in (
        lambda: setattr(gpu, "capability", (8, 0)),
        lambda: monkeypatch.setattr(torch, "__version__", "99"),
        lambda: monkeypatch.setattr(_selftest, "_digest", lambda: "new"),
    ):
        gpu.forget()
        patch()
        chosen()
    assert len(gpu.tests) == 4


@pytest.mark.parametrize("content", ["", "[1]", '{"a": 1}', "{"])
def test_a_spoilt_file_is_no_verdict(gpu, content):
    path = _selftest.cache_file()
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert chosen() == "fast"
    gpu.forget()
    assert chosen() == "fast"
    assert len(gpu.tests) == 1


def test_without_a_place_to_write_every_process_tests(gpu, monkeypatch, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    for _ in range(2):
        assert chosen() == "fast"
        gpu.forget()
    assert len(gpu.tests) == 2


def test_nothing_half_written_is_left(gpu):
    chosen()
    folder = _selftest.cache_file().parent
    assert list(folder.iterdir()) == [_selftest.cache_file()]


def test_the_cache_lies_where_the_system_wants_it(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: Path("/home/someone"))
    expected = "/home/someone/.cache/ssm-laboratory/gpu_kernels.json"
    assert _selftest.cache_file() == Path(expected)


def test_a_capture_trusts_and_does_not_test(gpu):
    gpu.capturing = True
    assert chosen() == "fast"
    gpu.capturing = False
    gpu.faults["linear_scan"] = "wrong"
    with pytest.warns(RuntimeWarning, match="wrong"):
        assert chosen() == "slow"


def test_a_full_memory_is_no_verdict(gpu, monkeypatch):
    def full(*_, **__):
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(_selftest, "check", full)
    assert chosen() == "fast"
    assert not _selftest.cache_file().exists()


def test_a_test_may_call_the_kernel_that_it_tests(gpu, monkeypatch):
    def nested(*_, **__):
        return "" if chosen() == "fast" else "not trusted while it is tested"

    monkeypatch.setattr(_selftest, "check", nested)
    assert chosen() == "fast"


# --- the test itself ------------------------------------------------------------------


@pytest.mark.parametrize("op", sorted(_selftest.PROBLEMS))
@pytest.mark.parametrize("even", [False, True])
def test_right_backends_pass(op, even):
    assert _selftest.check(op, "torch", CPU, even=even) == ""


def test_every_kernel_has_a_problem():
    assert {op for op, _ in _selftest.kernels()} <= set(_selftest.PROBLEMS)
    assert ("linear_scan", "triton") in set(_selftest.kernels())


def broken(fault):
    """linear_scan with one thing changed."""

    def run(decays, b, initial_state, log):
        h, final = BACKENDS["torch"].run(decays, b, initial_state, log)
        return fault(h, final, b)

    return Backend(run)


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 5), (4, 3, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_given_as_torch_gives_it(shape, dtype):
    new = _gpu.unwritten(torch.Size(shape), dtype, -1)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found, expected = new(), torch.empty(shape, dtype=dtype)
        assert (found.shape, found.dtype) == (expected.shape, dtype)
        assert found.is_contiguous()
        assert found.is_inference() == expected.is_inference()
    assert not shape or found.numel() == 0 or found.data_ptr() != new().data_ptr()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda h, f, _: (1.01 * h, f), r"the output is off by 1\..e-02 in float32"),
        (lambda h, f, _: (h, f.flip(-1)), r"the second output is off by"),
        (lambda h, f, b: (h + b - b.detach(), f), r"the gradient of b is off by"),
        (lambda h, f, _: (h * torch.nan, f), r"the output is off by nan"),
        (
            lambda h, f, _: (h * (1 + (h.dtype == torch.bfloat16)), f),
            r"the output is off by 1.0e\+00 in bfloat16",
        ),
        (lambda h, f, _: 1 / 0, r"ZeroDivisionError: division by zero"),
    ],
)
def test_faults_are_found(monkeypatch, fault, message):
    monkeypatch.setitem(BACKENDS, "broken", broken(fault))
    with torch.no_grad():  # the caller's modes do not reach the test
        found = _selftest.check("linear_scan", "broken", CPU)
    assert re.search(message, found), found
