"""Statistics against a second way, levels from the metadata, tables as text."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.common import InputError
from mamba_experiments.cmds import _stats
from tests.mamba_experiments.cmds.helpers import curve, read, record

numbers = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=9)


@given(numbers)
def test_deviation_is_that_of_all_pairs(values):
    """sum of (x - mean)^2 / (n - 1) is the mean of (x - y)^2 / 2 over pairs x, y."""
    mean, sd = _stats.mean_and_sd(np.array(values))
    pairs = list(itertools.combinations(values, 2))
    variance = sum((x - y) ** 2 / 2 for x, y in pairs) / len(pairs)
    assert float(sd) ** 2 == pytest.approx(variance, rel=1e-9, abs=1e-9)
    assert float(mean) == pytest.approx(math.fsum(values) / len(values), abs=1e-9)


def test_one_seed_has_no_deviation_and_infinity_none():
    mean, sd = _stats.mean_and_sd(np.array([[1.0, 2.0]]))
    assert mean.tolist() == [1.0, 2.0]
    assert np.isnan(sd).all()
    mean, sd = _stats.mean_and_sd(np.array([[1.0], [np.inf]]))
    assert (mean[0], np.isnan(sd[0])) == (np.inf, True)


few = st.lists(
    st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=12
)  # small integers, so that ties are common


@given(few)
def test_spearman_is_scipys(points):
    stats = pytest.importorskip("scipy.stats")
    x, y = (np.array(side, float) for side in zip(*points, strict=True))
    ours = _stats.spearman(x, y)
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert math.isnan(ours)
    else:
        assert ours == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)


def test_spearman_without_ties_is_the_formula_of_rank_differences():
    x, y = np.array([4.0, 8, 16, 32]), np.array([0.1, 0.9, 0.5, 1.0])
    assert _stats.spearman(x, y) == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert math.isnan(_stats.spearman(x, np.array([0.1, np.nan, 0.5, 1.0])))


def test_the_best_evaluation_is_the_lowest_finite_loss(tmp_path):
    losses = ["NaN", 3.0, 1.5, 2.0, "Infinity"]
    accuracies = [0.1, 0.2, 0.3, 0.4, "NaN"]
    (run,) = read(tmp_path, record(curve=curve(losses, accuracies)))
    assert _stats.best_entry(run)["epoch"] == 3.0


def test_levels_are_read_from_the_metadata(tmp_path):
    tasks = [
        {"unigram_loss": 6.0, "unigram_accuracy": 0.05, "fixed_lag_accuracy": x}
        for x in (0.25, 0.5)
    ]
    runs = read(tmp_path, *(record(task=task, seed=i) for i, task in enumerate(tasks)))
    assert _stats.baselines(runs) == [
        _stats.Baseline("unigram", 6.0, 0.05),
        _stats.Baseline("fixed lag", None, 0.375),
    ]
    assert _stats.baselines(read(tmp_path / "2", record())) == []


def test_an_unknown_metric_is_answered_with_the_nearest(tmp_path):
    runs = read(tmp_path, record(), record(seed=1))
    _stats.check_metric("val_accuracy", runs)
    with pytest.raises(InputError, match="did you mean val_loss"):
        _stats.check_metric("valloss", runs)
    partial = record(seed=2)
    del partial["meta"]["curve"][-1]["val_accuracy"]
    with pytest.raises(InputError, match="val_accuracy"):
        _stats.check_metric("val_accuracy", [*runs, *read(tmp_path / "2", partial)])


def test_tables_keep_their_cells_and_columns():
    rows = [["model", "loss"], ["a", "10.5"], ["longer name", "2"]]
    lines = _stats.plain_table(rows).splitlines()
    assert [line.split("  ")[0].strip() for line in lines] == [
        "model",
        "a",
        "longer name",
    ]
    assert {len(line) for line in lines} == {len("longer name") + 2 + 4}
    marked = _stats.markdown_table(rows).splitlines()
    assert marked[1] == "| --- | ---: |"
    assert [cell.strip() for cell in marked[3].split("|")[1:-1]] == rows[2]
