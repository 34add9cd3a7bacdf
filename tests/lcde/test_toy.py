"""Features of many paths, words of increments, the fit, and the experiment."""

from pathlib import Path

import jax
import numpy as np
import pytest

from data_dir.toy import ToyOptions as DataOptions
from data_dir.toy import generate_toy
from experiments.common import ExperimentResult, InputError
from lcde import _shared, toy
from lcde._model import LinearCDE
from lcde._shared import Letters, find_letters, find_rounds, find_words
from lcde._watch import Hooks, Watch
from lcde.config import LCDEToyConfig
from lcde.toy import (
    ToyOptions,
    obtain_features_from_model,
    problems,
    run_lcde_toy_experiment,
    train_linear,
)
from tests.lcde.test_solvers import naive_exact

Array = np.ndarray
N, L, D, H = 300, 14, 2, 5


def walks(seed: int = 0) -> Array:
    """Random walks with increments from -2 to 2, divided by their largest value."""
    rng = np.random.default_rng(seed)
    X = np.cumsum(np.rint(rng.normal(0, 0.8, (N, L, D))), axis=1)
    return (X / np.abs(X).max()).astype(np.float32)


def model(solver: str = "exact", **options) -> LinearCDE:
    return LinearCDE(H, D, solver=solver, key=jax.random.key(1), **options)


def reference(cde: LinearCDE, paths: Array, lengths: Array) -> Array:
    """y_T of every path in float64, one exponential an interval."""
    W, b, A, B = map(np.float64, (cde.init_matrix, cde.init_bias, cde.A.dense(), cde.B))
    ts = np.linspace(0, 1, paths.shape[1])
    ends = []
    for X, n in zip(paths.astype(float), lengths, strict=True):
        control = np.concatenate([ts[:n, None], X[:n]], axis=1)
        ends.append(naive_exact(A, B, control, W @ X[0] + b)[-1])
    return np.array(ends)


def close(got: Array, want: Array) -> None:
    error = np.abs(got - want).max() / np.abs(want).max()
    assert error < 2e-6, f"{error:.1e} of the largest entry"


# --- features -------------------------------------------------------------------------


@pytest.mark.parametrize("uses", [10, 10**9], ids=["words", "letters"])
def test_shared_features_are_the_final_states(monkeypatch, uses):
    monkeypatch.setattr(_shared, "WORD_USES", uses)
    monkeypatch.setattr(toy, "_batched_features", None)  # must not be needed
    cde, paths = model(), walks()
    got = obtain_features_from_model(cde, paths)
    assert got.dtype == np.float32
    close(got[:40], reference(cde, paths[:40], np.full(40, L)))


def test_lengths_are_each_paths_own(monkeypatch):
    monkeypatch.setattr(_shared, "WORD_USES", 10)
    cde, paths = model(), walks()
    lengths = np.random.default_rng(2).integers(1, L + 1, N)
    padded = np.where(np.arange(L)[:, None] < lengths[:, None, None], paths, np.nan)
    wanted = reference(cde, paths[:30], lengths[:30])
    close(obtain_features_from_model(cde, padded, lengths=lengths)[:30], wanted)
    monkeypatch.setattr(toy, "exact_final_states", lambda *_: None)
    batched = obtain_features_from_model(cde, padded, lengths=lengths, batch_size=77)
    close(batched[:30], wanted)
    close(
        batched, obtain_features_from_model(model("parallel"), padded, lengths=lengths)
    )


def test_paths_that_share_nothing_are_solved_one_by_one(monkeypatch):
    paths = np.random.default_rng(0).normal(0, 0.2, (90, L, D)).astype(np.float32)
    cde = model()
    monkeypatch.setattr(_shared, "_advance", None)  # must not be needed
    got = obtain_features_from_model(cde, paths, batch_size=40)
    close(got[:30], reference(cde, paths[:30], np.full(30, L)))


def test_one_path_of_one_point_stays_where_it_starts():
    cde, paths = model(), walks()[:1, :1]
    want = np.asarray(cde.init_matrix) @ paths[0, 0] + np.asarray(cde.init_bias)
    np.testing.assert_allclose(obtain_features_from_model(cde, paths)[0], want, 1e-6)


def test_paths_that_are_not_finite_are_refused():
    paths = walks()
    paths[7, 3, 1] = np.nan
    with pytest.raises(InputError, match="paths: got 'NaN or infinity'"):
        obtain_features_from_model(model(), paths)


# --- letters, words, rounds -----------------------------------------------------------


def test_letters_are_the_distinct_increments_and_their_exact_values():
    integers = np.random.default_rng(1).integers(-3, 4, (50, 9, 2))
    X = (np.cumsum(integers, axis=1) / 51).astype(np.float32)
    letters = find_letters(tuple(np.moveaxis(X, 2, 0)), 4096)
    assert letters is not None
    steps = np.rint(letters.table * 51)
    assert len({tuple(row) for row in steps}) == len(letters.table)
    assert np.array_equal(steps[letters.steps], integers[:, 1:])
    assert np.abs(letters.table * 51 - steps).max() < 1e-5


def test_more_letters_than_there_may_be_are_none():
    channels = tuple(np.moveaxis(walks(), 2, 0))
    letters = find_letters(channels, 4096)
    assert letters is not None
    assert find_letters(channels, len(letters.table) - 1) is None


def spelt(words: _shared.Words, word: int) -> list[int]:
    letters: list[int] = []
    while word >= 0:
        letters.insert(0, int(words.letter[word]))
        word = int(words.parent[word])
    return letters


def test_the_rounds_spell_every_path_out_of_words_that_occur_often():
    rng = np.random.default_rng(3)
    steps = rng.choice(5, (200, 11), p=[0.5, 0.25, 0.15, 0.07, 0.03]).astype(np.int32)
    words = find_words(Letters(np.zeros((5, 1)), steps), uses=40, most=4096)
    text = [tuple(row) for row in steps.tolist()]
    for word in range(5, len(words.parent)):
        letters = tuple(spelt(words, word))
        m = len(letters)
        occurrences = [t[i : i + m] for t in text for i in range(len(t) - m + 1)]
        assert occurrences.count(letters) >= 40
    longest = max(len(spelt(words, word)) for word in range(len(words.parent)))
    assert longest >= 4
    read: list[list[int]] = [[] for _ in steps]
    rounds = list(find_rounds(words))
    for paths, word in rounds:
        assert (np.diff(word) >= 0).all()
        for path, m in zip(paths, word, strict=True):
            read[path] += spelt(words, int(m))
    assert np.array_equal(read, steps)
    assert len(rounds) < steps.shape[1]


def test_the_most_frequent_words_are_kept_where_there_is_no_room_for_all():
    steps = np.tile(np.array([[0, 0, 0, 1, 1]], np.int32), (10, 1))
    words = find_words(Letters(np.zeros((2, 1)), steps), uses=10, most=3)
    assert [spelt(words, m) for m in range(len(words.parent))] == [[0], [1], [0, 0]]


# --- the fit and the experiment -------------------------------------------------------


def test_least_squares_finds_a_linear_map_through_nearly_collinear_features():
    rng = np.random.default_rng(0)
    y = rng.standard_normal((80, 3)).astype(np.float32)
    y[:, 2] = y[:, 1] + np.float32(1e-3) * y[:, 2]
    labels = (y.astype(float) @ [1.5, -2.0, 0.5] + 0.25).astype(np.float32)
    fit = train_linear(y[:50], labels[:50], y[50:], labels[50:])
    np.testing.assert_allclose(fit.coefficients, [1.5, -2.0, 0.5], atol=1e-3)
    assert fit.intercept == pytest.approx(0.25, abs=1e-6)
    assert fit.rmse < 1e-6
    shifted = train_linear(y[:50], labels[:50], y[50:], labels[50:] + 2)
    assert shifted.rmse == pytest.approx(2, abs=1e-6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    out = tmp_path_factory.mktemp("toy")
    generate_toy(DataOptions((2,), n_paths=1500, length=20, out_dir=str(out)))
    return str(out)


def options(folder: str, **changes) -> ToyOptions:
    sizes = {"hidden_dim": 24, "n_train": 1200, "n_val": 300, "data_dir": folder}
    return ToyOptions(**(sizes | changes))


def test_a_random_cde_of_24_states_explains_the_signature(folder):
    result = toy.run(options(folder))
    assert problems(result.metadata) == []
    assert result.metadata["rmse"] < 0.3 * result.metadata["rmse_zero"]
    assert result.metadata["rmse_train"] < result.metadata["rmse"]
    again = toy.run(options(folder))
    assert again.metadata["rmse"] == result.metadata["rmse"]
    other = toy.run(options(folder, seed=1))
    assert other.metadata["rmse"] != result.metadata["rmse"]
    assert other.metadata["rmse_zero"] == result.metadata["rmse_zero"]


def test_solvers_agree_on_the_error(folder):
    exact = toy.run(options(folder)).metadata["rmse"]
    parallel = toy.run(options(folder, solver="parallel", batch_size=500))
    assert parallel.metadata["rmse"] == pytest.approx(exact, rel=0.02)


def test_problems_name_an_error_that_is_no_fit():
    good = {"rmse": 1e-3, "rmse_zero": 0.1}
    assert problems(good) == []
    assert "not below" in problems(good | {"rmse": 0.2})[0]
    assert "rmse is nan" in problems(good | {"rmse": "NaN"})[0]


def test_the_driver_runs_every_dimension_and_seed_that_is_not_done():
    kept, shown = [], []

    def keep(run, options):
        kept.append((options["input_dim"], options["seed"]))
        return ExperimentResult(toy.NAME, str(kept[-1]))

    watch = Watch(on_step=lambda at: shown.append(at.step))
    hooks = Hooks(
        watch=watch, done=lambda name, o: (name, o["seed"]) == (toy.NAME, 8), keep=keep
    )
    config = LCDEToyConfig(runs=3, hidden_dim=7)
    results = run_lcde_toy_experiment(config, seed=7, hooks=hooks)
    assert kept == [(2, 7), (3, 7), (2, 9), (3, 9)]
    assert [result.details for result in results] == list(map(str, kept))
    assert shown == list(range(7))
    with pytest.raises(InputError, match="output_dim: got 2"):
        run_lcde_toy_experiment(LCDEToyConfig(output_dim=2), seed=0, hooks=hooks)


def test_the_command_prints_one_line_and_refuses_in_one(folder, capsys, monkeypatch):
    flags = ["--data-dir", folder, "--n-train", "1200", "--n-val", "300"]
    assert toy.command_line(toy.run, argv=[*flags, "--hidden-dim", "8"]) == 0
    assert "validation RMSE" in capsys.readouterr().out
    for bad, said in (
        (["--solver", "rk4"], "solver: got 'rk4'"),
        (["--n-val", "301"], "n_train + n_val: got 1501"),
        (["--batch-size", "0"], "batch_size: got 0"),
        (["--hidden-dim", "0"], "hidden_dim: got 0"),
    ):
        with pytest.raises(SystemExit) as stop:
            toy.command_line(toy.run, argv=[*flags, *bad])
        assert stop.value.code == 2
        line = capsys.readouterr().err
        assert said in line
        assert line.count("\n") == 1
    assert sorted(path.name for path in Path(folder).glob("*.npy")) == [
        "data_2.npy",
        "labels_2.npy",
    ]
