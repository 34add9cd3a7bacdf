"""The warm-up names every kernel and what is wrong; without a GPU it says so."""

import pytest
import torch

from ssm import warmup
from ssm.ops import _gpu, _selftest


def pretend(monkeypatch, faults):
    """A GPU on which the tests find these faults; the calls of the test."""
    calls = []

    def judge(op, name, index, *, whole=False):
        calls.append((op, name, index, whole))
        return faults.get((op, name))

    monkeypatch.setattr(_selftest, "judge", judge)
    monkeypatch.setattr(_selftest, "kernels", lambda: iter(KERNELS))
    monkeypatch.setattr(
        _gpu, "refuses_place", lambda name, _: "no NVRTC" if name == "cuda" else None
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Pretended GPU")
    return calls


KERNELS = [("ssd", "triton"), ("selective_scan", "cuda"), ("linear_scan", "triton")]


def test_every_kernel_is_tested_at_all_sizes_where_it_can_run(monkeypatch, capsys):
    calls = pretend(monkeypatch, {("linear_scan", "triton"): "y is off by 1.0e+00"})
    assert warmup.main([]) == 1
    assert calls == [("ssd", "triton", 0, True), ("linear_scan", "triton", 0, True)]
    title, *lines = capsys.readouterr().out.splitlines()
    assert title == "cuda:0 Pretended GPU"
    for line, (op, name), end in zip(
        lines,
        KERNELS,
        ["right", "off: no NVRTC", "off: y is off by 1.0e+00"],
        strict=True,
    ):
        assert line.split("  ")[1] == f"{op} ({name})"
        assert line.endswith(end)


def test_a_missing_package_is_no_failure(monkeypatch):
    pretend(monkeypatch, {})
    assert warmup.main([]) == 0


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert warmup.main([]) == 0
    assert capsys.readouterr().out == warmup.NO_GPU + "\n"


def test_bad_flags_are_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        warmup.main(["--fast"])
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
