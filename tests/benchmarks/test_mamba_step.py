"""The benchmark runs, judges that all sides are one function, and times them in turns.

Times are not judged.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cpu_scan, mamba_step
from benchmarks.mamba_step import OURS, PEER
from mamba_experiments.models import build, build_config

TINY = ["--batch", "3", "--length", "9", "--d-model", "8", "--n-state", "4"]
TINY += ["--vocabulary", "30", "--repeats", "2", "--threads", "1"]


@pytest.fixture
def sides(tmp_path: Path) -> dict[str, mamba_step.Side]:
    config = build_config(
        "mamba_simple", vocab_size=30, d_model=8, n_state=4, n_layers=2
    )
    build(config, seed=0).save_pretrained(tmp_path, layout="hugging_face")
    with mamba_step.quiet_peer():
        return mamba_step.load_sides(tmp_path)


def test_the_command_prints_every_side_and_stores_the_report(tmp_path, capsys):
    path = tmp_path / "report.json"
    assert mamba_step.main([*TINY, "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    printed = capsys.readouterr().out
    for text in (OURS, PEER, "aim 10", "reference loop", "does not show"):
        assert text in printed
    assert report["setting"]["vocabulary"] == 30
    for name, times in report["times"].items():
        assert len(times["repeats_s"]) == 2
        assert len(report["losses"][name]) == 3  # the cold one is a step too
    pairs = zip(*(report["times"][n]["repeats_s"] for n in (OURS, PEER)), strict=True)
    ratios = sorted(theirs / mine for mine, theirs in pairs)
    assert report["ratios"][PEER]["min"] == pytest.approx(ratios[0])
    assert report["ratios"][PEER]["median"] == pytest.approx(sum(ratios) / 2)


def test_logits_are_those_of_the_last_position_on_every_side(sides):
    tokens = mamba_step.draw(30, 3, 9, seed=1).inputs
    model: Any = sides[PEER].model
    whole = model(tokens).logits
    for side in sides.values():
        logits = side.forward(tokens)
        assert logits.shape == (3, 30)
        torch.testing.assert_close(logits, whole[:, -1], rtol=1e-5, atol=1e-6)
        assert side.model.training


def test_every_parameter_and_the_logits_are_compared(sides):
    batch = mamba_step.draw(30, 3, 9, seed=1)
    names = {"logits", *(name for name, _ in sides[OURS].model.named_parameters())}
    for found in mamba_step.differences(sides, batch).values():
        assert found.keys() == names
        assert max(found.values()) < mamba_step.TOLERANCE


def test_a_step_is_adamws_first_in_closed_form(sides):
    """Every entry moves a rate against its gradient's sign, and decays by 1 % of it."""
    batch, losses = mamba_step.draw(30, 3, 9, seed=1), []
    for side in sides.values():
        before = {n: p.detach().clone() for n, p in side.model.named_parameters()}
        step = mamba_step.training_step(side, batch, losses)
        step()
        for name, parameter in side.model.named_parameters():
            g = parameter.grad
            moved = 1e-3 * g / (g.abs() + 1e-8)
            expected = (1 - 1e-5) * before[name] - moved
            torch.testing.assert_close(parameter.detach(), expected)
        step()
    assert all(b < a for a, b in zip(losses[::2], losses[1::2], strict=True))


def test_the_peers_warnings_are_kept_back_for_the_time_of_the_benchmark():
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with mamba_step.quiet_peer():
        assert logging.get_verbosity() == logging.ERROR
        assert not logging.is_progress_bar_enabled()
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_calls_take_turns_and_the_first_is_apart():
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    times = cpu_scan.in_turns(calls, repeats=2, block=1)
    assert order == list("abcabcabc")
    assert all(len(times[name]["repeats_s"]) == 2 for name in "abc")


def test_another_function_is_exit_status_1(monkeypatch, capsys):
    peer = mamba_step._peer

    def wrong(folder, *, use_mambapy):
        side = peer(folder, use_mambapy=use_mambapy)
        with torch.no_grad():
            side.model.backbone.layers[1].mixer.A_log.mul_(1.1)
        return side

    monkeypatch.setattr(mamba_step, "_peer", wrong)
    assert mamba_step.main(TINY) == 1
    complaint = capsys.readouterr().err
    assert f"from that of {PEER}" in complaint
    assert "blocks.1.mixer.A_log differs by" in complaint


def test_an_environment_with_cuda_kernels_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(mamba_step.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(SystemExit) as stop:
        mamba_step.main(TINY)
    assert stop.value.code == 2
    assert "leave out the extra 'cuda'" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [("--repeats", "0"), ("--d-model", "-1")])
def test_faults_end_in_one_line_and_status_2(capsys, flags):
    with pytest.raises(SystemExit) as stop:
        mamba_step.main([*TINY, *flags])
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
