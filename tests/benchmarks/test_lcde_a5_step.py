"""The benchmark runs, judges that both sides are one function, and takes turns.

Times are not judged.
"""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from benchmarks import lcde_a5_step
from benchmarks.lcde_a5_step import OURS, PORT, port_of
from lcde.a5 import A5LinearCDE

TINY = ["--length", "3", "--hidden-dim", "5", "--batch", "10", "--steps", "2"]
TINY += ["--repeats", "2"]


def test_the_command_prints_both_sides_and_stores_the_report(tmp_path, capsys):
    path = tmp_path / "report.json"
    assert lcde_a5_step.main([*TINY, "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    printed = capsys.readouterr().out
    for text in (OURS, PORT, "aim 5", "length-2", "does not show"):
        assert text in printed
    assert report["setting"] == {"length": 3, "hidden_dim": 5, "batch": 10}
    repeats = [report["times"][name]["repeats_s"] for name in (OURS, PORT)]
    ratios = sorted(theirs / mine for mine, theirs in zip(*repeats, strict=True))
    assert report["ratio"]["min"] == pytest.approx(ratios[0])
    assert report["ratio"]["median"] == pytest.approx(sum(ratios) / 2)
    names = {
        jax.tree_util.keystr(leaf).lstrip(".")
        for leaf, _ in jax.tree_util.tree_leaves_with_path(port_of(model()))
    }
    assert {"A", "B", "embedding", "mix.weight"} <= names
    for found in report["differences"].values():  # both updates, every gradient
        assert found.keys() == names | {"loss"}
        assert max(found.values()) < report["tolerance"]


def model() -> A5LinearCDE:
    return A5LinearCDE(5, 60, 60, key=jr.key(0))


def test_the_port_is_the_model_without_dropout():
    tokens = lcde_a5_step.draw(6, 10, 1, seed=0).train.inputs[0]
    found = lcde_a5_step.port_logits(port_of(model()), tokens, None)
    wanted = eqx.filter_jit(model())(tokens)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_calls_take_turns_and_the_first_is_apart():
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name), 4) for name in "ab"}
    times = lcde_a5_step.in_turns(calls, repeats=2)
    assert order == list("ababab")
    assert all(len(times[name]["repeats_s"]) == 2 for name in "ab")


def test_another_function_is_exit_status_1(monkeypatch, capsys):
    found = {"main": {"loss": 2e-4, "A": 1e-5}, "pairs": {"loss": 0, "A": np.nan}}
    monkeypatch.setattr(lcde_a5_step, "differences", lambda *_: found)
    monkeypatch.setattr(lcde_a5_step, "in_turns", _no_times)
    assert lcde_a5_step.main(TINY) == 1
    complaint = capsys.readouterr().err.splitlines()
    assert len(complaint) == 2
    assert "loss of the main update differs by 2.0e-04" in complaint[0]
    assert "A of the pairs update differs by nan" in complaint[1]


def test_a_difference_is_of_the_largest_entry():
    one, other = jnp.asarray([1.0, -4.0, 2.0]), jnp.asarray([1.5, -5.0, 2.0])
    assert lcde_a5_step._difference(one, other) == pytest.approx(1 / 5)


def _no_times(calls, repeats):
    second = lcde_a5_step.Seconds(1.0, 1.0)
    return {name: lcde_a5_step._summary(second, second) for name in calls}


@pytest.mark.parametrize("flags", [("--repeats", "0"), ("--batch", "9")])
def test_faults_end_in_one_line_and_status_2(capsys, flags):
    with pytest.raises(SystemExit) as stop:
        lcde_a5_step.main([*TINY, *flags])
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
