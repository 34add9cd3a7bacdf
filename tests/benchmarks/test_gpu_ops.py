"""The GPU benchmark without a GPU: tiny rows on the CPU, and a pretended clock."""

import copy
import dataclasses
import json

import pytest
import torch

from benchmarks import gpu_ops
from benchmarks._gpu_rows import ROWS, Peer, Target
from ssm import ops
from ssm.models import SequenceLMConfig

TINY = {"B": 2, "D": 3, "L": 9, "N": 2, "H": 2, "P": 2, "K": 2, "V": 3, "W": 3, "C": 4}


def tiny(row):
    sizes = {name: TINY[name] for name in row.sizes}
    return dataclasses.replace(row, sizes=sizes, checked=sizes)


@pytest.fixture
def on_the_cpu(monkeypatch):
    """Rows of a few numbers; a call's time is told by a counter."""
    clock = iter(range(1, 10**6))

    def median_s(run):
        run()
        return 1e-3 * next(clock)

    monkeypatch.setattr(gpu_ops, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_ops, "median_s", median_s)
    monkeypatch.setattr(gpu_ops, "ROWS", {n: tiny(row) for n, row in ROWS.items()})
    monkeypatch.setattr(gpu_ops, "card", lambda: {"gpu": "none"})


def with_peer(monkeypatch, call, package="torch", **options):
    row = gpu_ops.ROWS["linear"]
    peer = Peer(package, call, **options)
    changed = dataclasses.replace(row, peers={"a peer": peer}, target=Target(0.5))
    monkeypatch.setitem(gpu_ops.ROWS, "linear", changed)


def run(capsys, *flags):
    status = gpu_ops.main([*flags, "--turns", "2"])
    return status, capsys.readouterr().out


def test_every_kind_of_row_runs_and_is_right(on_the_cpu, capsys, tmp_path):
    """One of each operator and way to draw: the others have other sizes alone."""
    kinds = {(row.op, row.draw): name for name, row in ROWS.items()}
    path = tmp_path / "new folder" / "rows.jsonl"
    flags = ("--rows", *kinds.values(), "--json", str(path))
    status, out = run(capsys, *flags)
    assert status == 0, out
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["row"] for record in records] == list(kinds.values())
    assert len(records) == 6
    for record in records:
        operands = ROWS[record["row"]].draw(
            record["sizes"], torch.Generator().manual_seed(0)
        )
        assert set(record["errors"]) == {"y", *operands}
        assert set(record["forward"]["seconds"]) == {"ours"}
        assert record["both"]["floor_s"] > record["forward"]["floor_s"] > 0
    assert "no fla chunk_gla: fla is not installed" in out
    assert "does not show" in out


def test_a_peer_is_checked_timed_and_compared(on_the_cpu, monkeypatch, capsys):
    with_peer(monkeypatch, lambda x: ops.linear_scan(**x, backend="naive")[0])
    status, out = run(capsys, "--rows", "linear")
    assert status == 0
    # turns by the counter: ours 1 ms, the peer 2 ms; then 3 and 4
    assert "ours 2.000 (1.000-3.000); a peer 3.000 (2.000-4.000)" in out
    assert "ours / a peer: 0.62 (0.50-0.75, target 0.50)" in out
    assert "error of a peer: at most" in out


def test_a_peer_that_fails_or_is_missing_is_said(on_the_cpu, monkeypatch, capsys):
    def failing(_):
        raise RuntimeError("not on\nthis card")

    with_peer(monkeypatch, failing)
    status, out = run(capsys, "--rows", "linear")
    assert status == 0
    assert "no a peer: it fails: RuntimeError: not on this card" in out
    with_peer(monkeypatch, failing, "no_such_package")
    assert "no_such_package is not installed" in run(capsys, "--rows", "linear")[1]


def test_a_peer_without_backward_is_timed_forward(on_the_cpu, monkeypatch, capsys):
    with_peer(
        monkeypatch,
        lambda x: ops.linear_scan(**x, backend="naive")[0].detach(),
        has_backward=False,
    )
    _, out = run(capsys, "--rows", "linear")
    assert out.count("ours / a peer") == 1


def test_a_peer_whose_backward_fails_is_timed_forward(on_the_cpu, monkeypatch, capsys):
    with_peer(monkeypatch, lambda x: ops.linear_scan(**x, backend="naive")[0].detach())
    status, out = run(capsys, "--rows", "linear")
    assert status == 0
    assert out.count("ours / a peer") == 1
    assert "no a peer, backward: it fails: RuntimeError: element 0 of tensors" in out


def test_a_wrong_result_is_exit_status_1(on_the_cpu, monkeypatch, capsys):
    row = gpu_ops.ROWS["linear"]

    def wrong(x):  # in bfloat16 alone
        h = row.ours(x)
        return h if h.dtype == torch.float64 else 1.1 * h

    changed = dataclasses.replace(row, ours=wrong)
    monkeypatch.setitem(gpu_ops.ROWS, "linear", changed)
    status, out = run(capsys, "--rows", "linear")
    assert status == 1
    assert "FAILED linear: y is off by 1.0e-01 (tolerance 0.02)" in out


def test_floors_are_those_of_the_hardware():
    forward, both = floors("scan")  # exponentials: of 16 states, softplus and gate
    assert forward == pytest.approx(8 * 2048 * 2048 * 18 / 4.05e12, rel=1e-6)
    # bytes: u, delta, z and dy read, three gradients written
    assert both - forward == pytest.approx(7 * 67.1e6 / 3.02e12, rel=1e-2)
    forward, both = floors("conv")  # x and y; then x, dy and dx: 67 MB each
    assert forward == pytest.approx(2 * 67.1e6 / 3.02e12, rel=2e-3)
    assert both == pytest.approx(5 * 67.1e6 / 3.02e12, rel=2e-3)


def floors(name):
    """Without the memory that the operands would take."""
    row = ROWS[name]
    sizes = {**row.sizes}
    with torch.device("meta"):
        operands = {
            n: torch.empty(x.shape, dtype=x.dtype)
            for n, x in row.draw(
                sizes | {"B": 1}, torch.Generator().manual_seed(0)
            ).items()
        }
        whole = {
            n: x.expand(sizes["B"], *x.shape[1:]).contiguous() if x.ndim == 3 else x
            for n, x in operands.items()
        }
        y = torch.empty(sizes["B"], sizes["L"], sizes["D"], dtype=torch.bfloat16)
        return row.floors(whole, y)


def test_models_train_and_decode(on_the_cpu, monkeypatch, capsys):
    small = SequenceLMConfig(vocab_size=24, d_model=8, n_layers=1, pattern="mamba")
    for name, value in {"CONFIG": small, "LENGTH": 5, "FEW": 2, "MANY": 4}.items():
        monkeypatch.setattr(gpu_ops.models, name, value)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(gpu_ops, "missing", lambda _: None)
    made = []

    def same_weights(model):
        made.append(copy.deepcopy(model))
        return made[-1]

    monkeypatch.setattr(gpu_ops.models, "mamba_ssm", same_weights)
    monkeypatch.setattr(gpu_ops.models, "decode_mamba_ssm", gpu_ops.models.decode_ours)
    status, out = run(capsys, "--rows", "train", "decode")
    assert status == 0, out
    assert "error of ours: at most 0.0e+00 (loss)" in out  # the same weights and steps
    assert "train    ms: ours 2.000" in out
    assert "decode   ms: ours" in out
    assert out.count("ours / mamba_ssm") == 2
    assert len(made) == 2


def test_bad_input_is_one_line(capsys):
    for flags, said in (
        (["--rows", "scan", "x"], "rows: got 'x'; expected among scan,"),
        (["--turns", "0"], "turns"),
        (["--rows", "scan"], "no CUDA device is visible"),
    ):
        with pytest.raises(SystemExit) as stop:
            gpu_ops.main(flags)
        assert stop.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
