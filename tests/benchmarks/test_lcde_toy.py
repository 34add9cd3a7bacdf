"""The benchmark runs, judges the features it times, and scales the peer honestly."""

import json

import jax
import numpy as np
import pytest

from benchmarks import lcde_toy
from data_dir.toy import ToyOptions as DataOptions
from data_dir.toy import generate_toy
from lcde.toy import ToyOptions, make_model, obtain_features_from_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    out = tmp_path_factory.mktemp("toy")
    generate_toy(DataOptions((2,), n_paths=60, length=9, out_dir=str(out)))
    return str(out)


def test_the_command_prints_both_sides_and_stores_the_report(folder, tmp_path, capsys):
    path = tmp_path / "report.json"
    flags = ["--input-dims", "2", "--hidden-dim", "6", "--paths", "60", "--batch", "7"]
    flags += ["--compared", "5", "--repeats", "2", "--data-dir", folder]
    assert lcde_toy.main([*flags, "--json", str(path)]) == 0
    (row,) = json.loads(path.read_text())["rows"]
    assert (row["paths"], row["batch"], row["compared"]) == (60, 7, 5)
    assert row["difference"] < 1e-5
    for ratio, mine, theirs in zip(
        row["ratios"], row["turns_s"]["ours"], row["turns_s"]["adaptive"], strict=True
    ):
        assert ratio == pytest.approx(theirs / 7 * 60 / mine)
    printed = capsys.readouterr().out
    for text in ("2D", "60 paths", "7 paths", "aim 25", "does not show"):
        assert text in printed


def test_features_that_are_off_are_found(monkeypatch):
    def exact(model, X, tolerance):  # compiles faster than the adaptive solve
        assert tolerance == lcde_toy.TIGHT
        assert X.dtype == np.float64
        return jax.vmap(model)(X)

    monkeypatch.setattr(lcde_toy, "adaptive_states", exact)
    model = make_model(ToyOptions(hidden_dim=6))
    paths = np.zeros((4, 9, 2), np.float32)
    features = obtain_features_from_model(model, paths)
    difference = lcde_toy.difference_from_tight(model, paths, 1.001 * features)
    assert difference == pytest.approx(1e-3, rel=1e-2)
    report = {"tolerance": lcde_toy.TOLERANCE, "rows": [{"input_dim": 2}]}
    report["rows"][0]["difference"] = difference
    assert "2D: features differ by 1.0e-03" in lcde_toy.problems(report)[0]
    report["rows"][0]["difference"] = float("nan")
    assert lcde_toy.problems(report)
