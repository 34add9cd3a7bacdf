"""Accuracies and correlations of MQAR, each found a second way, and the picture."""

import json
import math

import numpy as np
import pytest

from experiments.common import InputError
from mamba_experiments.cmds import plot_mqar as mqar
from mamba_experiments.cmds._runs import EXPERIMENT, read_runs
from tests.mamba_experiments.cmds.helpers import curve, record, write

SIZES, PAIRS, SEEDS = (4, 8, 16), (1, 2, 16), (0, 1, 2)


def accuracy(size, pairs, seed):
    """More state helps, more pairs harm, and seeds overlap where states are near."""
    return 1 / (1 + pairs / size) + 0.02 * seed


def run(model="s4d", *, size=4, seed=0, pairs=PAIRS, accuracies=None, **settings):
    """A run whose evaluations were all better than its end."""
    if accuracies is None:
        accuracies = [accuracy(size, n, seed) for n in pairs]
    guesses = {
        str(n): {"guess_accuracy": 1 / 64, "guess_shown_accuracy": 1 / n, "seed": seed}
        for n in pairs
    }
    return record(
        model,
        seed=seed,
        dataset="mqar",
        n_state=size,
        n_pairs=list(pairs),
        curve=curve([2.0, 1.0], [1.0, 1.0]),
        parts={
            str(n): {"loss": 1.0, "accuracy": each}
            for n, each in zip(pairs, accuracies, strict=True)
        },
        task={"guess_accuracy": 1 / 64, "parts": guesses},
        n_params=100 + size,
        **settings,
    )


def grid():
    """All sizes and seeds, largest size first, and attention."""
    runs = [run(size=n, seed=s) for n in reversed(SIZES) for s in SEEDS]
    return [*runs, *(run("transformer", seed=s, accuracies=[1, 1, 1]) for s in SEEDS)]


@pytest.fixture
def log(tmp_path):
    return str(write(tmp_path / "train_runs.jsonl", *grid()))


def scores_of(log, model="s4d"):
    return mqar.scores_of([r for r in read_runs(log) if r.model == model])


def made(**lines):
    """Scores by state size (n4=...) from rows of seeds, at two numbers of pairs."""
    return mqar.Scores(
        [2, 4], {int(n.removeprefix("n")): np.array(v) for n, v in lines.items()}
    )


def test_a_run_counts_at_its_end_for_each_number_of_pairs(log):
    scores = scores_of(log)
    assert scores.pairs == list(PAIRS)
    assert list(scores.lines) == list(SIZES)
    for size, line in scores.lines.items():
        assert line.tolist() == [[accuracy(size, n, s) for n in PAIRS] for s in SEEDS]
    attention = scores_of(log, "transformer").lines
    assert {size: line.tolist() for size, line in attention.items()} == {
        None: [[1, 1, 1]] * 3
    }


def test_the_command_prints_tables_and_writes_the_picture(run_module, log, tmp_path):
    path = tmp_path / "new" / "mqar.png"
    done = run_module(
        "mamba_experiments.cmds.plot_mqar", "--log-path", log, "--out", path
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert path.read_bytes().startswith(b"\x89PNG")
    accuracies, extremes, correlations, saved = done.stdout.split("\n\n")
    assert saved == f"saved {path}\n"
    (row,) = (line for line in accuracies.splitlines() if "s4d, state 8 " in line)
    for n in PAIRS:
        found = [100 * accuracy(8, n, s) for s in SEEDS]
        assert f"{found[1]:.1f} ({found[0]:.1f} .. {found[-1]:.1f}), 3" in row
    easiest, hardest = 100 * accuracy(16, 1, 1), 100 * accuracy(4, 16, 1)
    (row,) = (line for line in extremes.splitlines() if line.startswith("s4d"))
    assert f"{easiest:.1f} (state 16, 1 pair)" in row
    assert row.endswith(f"{hardest:.1f} (state 4, 16 pairs)")
    (row,) = (line for line in extremes.splitlines() if line.startswith("transf"))
    assert " 100.0 (1 pair) " in row
    assert row.endswith(" 100.0 (16 pairs)")
    assert len(accuracies.splitlines()) == 1 + 3 + 1
    assert len(correlations.splitlines()) == 1 + 1


def test_correlations_are_scipys_over_means_and_runs(log):
    stats = pytest.importorskip("scipy.stats")
    found = mqar.correlations(scores_of(log))
    assert list(found) == ["1", "2", "16", "average"]
    averages = [PAIRS[:1], PAIRS[1:2], PAIRS[2:], PAIRS]
    for key, pairs in zip(found, averages, strict=True):
        runs = [
            (n, sum(accuracy(n, p, s) for p in pairs)) for n in SIZES for s in SEEDS
        ]
        expected = stats.spearmanr(*zip(*runs, strict=True)).statistic
        assert found[key] == pytest.approx((1, expected))
        assert expected < 1  # ties in state size among the seeds


def test_the_average_weighs_each_number_of_pairs_alike():
    """Accuracy falls with state at 2 pairs and rises more at 4."""
    scores = made(n4=[[0.9, 0.1]], n8=[[0.8, 0.5], [0.8, 0.3]], n16=[[0.7, 0.9]])
    found = mqar.correlations(scores)
    assert found["2"][0] == pytest.approx(-1)
    assert found["4"][0] == pytest.approx(1)
    assert found["average"] == pytest.approx((1, found["4"][1]))


def test_saturation_leaves_no_rank_to_correlate():
    full = [[1.0, 1.0], [1.0, 1.0]]
    found = mqar.correlations(made(n4=full, n8=full))
    assert all(math.isnan(rho) for pair in found.values() for rho in pair)
    rows = mqar.correlation_rows({"s4d": made(n4=full, n8=full), "s5": made(n4=full)})
    assert rows[1:] == [["s4d", "-", "-", "-"]]


def test_the_same_accuracies_in_another_order_of_seeds_are_a_tie():
    some = [[0.1, 0.1], [0.2, 0.2], [0.3, 0.3]]
    assert np.mean(some, axis=0)[0] != np.mean(some[::-1], axis=0)[0]  # by rounding
    found = mqar.correlations(made(n4=some, n8=some[::-1]))
    assert all(math.isnan(of_means) for of_means, _ in found.values())


def test_equal_seeds_whose_mean_is_rounded_are_drawn():
    equal = np.full((3, 2), 0.998)
    assert equal.mean(axis=0)[0] != 0.998
    (ax,) = mqar.draw({"s4d": mqar.Scores([2, 4], {4: equal})}, mqar.levels_of([])).axes
    _, _, (bars,) = ax.containers[0].lines
    heights = [np.ptp(segment[:, 1]) for segment in bars.get_segments()]
    np.testing.assert_allclose(heights, 0, atol=1e-12)


def test_the_picture_has_every_mean_range_and_seed(log):
    scores = {model: scores_of(log, model) for model in ("s4d", "transformer")}
    levels = mqar.levels_of(read_runs(log))
    assert levels == {
        "guess": dict.fromkeys(PAIRS, 1 / 64),
        "guess of those shown": {1: 1, 2: 0.5, 16: 1 / 16},
    }
    figure = mqar.draw(scores, levels)
    (ax,) = figure.axes
    containers = {c.get_label(): c for c in ax.containers}
    assert set(containers) == {"state 4", "state 8", "state 16", "transformer"}
    for size in SIZES:
        line, _, (bars,) = containers[f"state {size}"].lines
        drawn = np.array([[accuracy(size, n, s) for s in SEEDS] for n in PAIRS])
        assert line.get_xdata().tolist() == list(PAIRS)
        np.testing.assert_allclose(line.get_ydata(), drawn.mean(axis=1))
        ends = [segment[:, 1] for segment in bars.get_segments()]
        np.testing.assert_allclose(ends, drawn[:, [0, -1]])
    points = np.concatenate(
        [c.get_offsets() for c in ax.collections if hasattr(c, "get_sizes")]
    )
    every = [(1.06 * p, accuracy(n, p, s)) for n in SIZES for p in PAIRS for s in SEEDS]
    every += [(1.06 * p, 1.0) for p in PAIRS for _ in SEEDS]
    np.testing.assert_allclose(sorted(points.tolist()), sorted(every))
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        *("state 4", "state 8", "state 16"),
        *("guess", "guess of those shown", "transformer"),
    ]


@pytest.mark.parametrize(("n_models", "shape"), [(1, (1, 1)), (4, (2, 2)), (5, (2, 3))])
def test_each_model_with_states_has_a_panel(n_models, shape):
    line = [[0.5, 0.4]]
    scores = {f"m{i}": made(n4=line, n8=line) for i in range(n_models)}
    attention = mqar.Scores([2, 4], {None: np.array(line)})
    figure = mqar.draw({**scores, "transformer": attention}, mqar.levels_of([]))
    assert [ax.get_title() for ax in figure.axes] == [f"{m} (1 seed)" for m in scores]
    grid = figure.axes[0].get_subplotspec().get_gridspec()
    assert (grid.nrows, grid.ncols) == shape


def test_attention_alone_is_one_panel(tmp_path):
    log = str(write(tmp_path / "a.jsonl", run("transformer")))
    assert mqar.main(["--log-path", log, "--out", str(tmp_path / "a.svg")]) == 0
    assert (tmp_path / "a.svg").read_text().endswith("</svg>\n")


def test_a_loop_over_states_counts_attention_once_a_seed(tmp_path, capsys):
    runs = [run("transformer", size=n, seed=s) for n in SIZES for s in SEEDS]
    log = str(write(tmp_path / "a.jsonl", *runs))
    kept = mqar.runs_of(log, [], [], [])
    assert sorted(run.seed for run in kept) == list(SEEDS)
    assert "6 runs left out" in capsys.readouterr().err


def test_models_may_be_let_differ_in_their_numbers_of_pairs(tmp_path, capsys):
    runs = [run(size=n) for n in SIZES] + [run("transformer", pairs=(2, 32), lr=0.1)]
    log = str(write(tmp_path / "a.jsonl", *runs))
    out = ["--out", str(tmp_path / "a.png"), "--may-differ", "n_pairs", "lr"]
    assert mqar.main(["--log-path", log, *out]) == 0
    accuracies, _ = capsys.readouterr().out.split("\n\n", 1)
    head, *_, row = (line.split("  ") for line in accuracies.splitlines())
    cells = [[cell.strip() for cell in line if cell.strip()] for line in (head, row)]
    assert cells[0][1:] == ["1 pair", "2 pairs", "16 pairs", "32 pairs"]
    shown = [f"{100 * accuracy(4, n, 0):.1f}" for n in (2, 32)]
    assert [cell.split()[0] for cell in cells[1][1:]] == ["-", shown[0], "-", shown[1]]


def test_a_model_without_runs_is_said(log, tmp_path, capsys):
    out = ["--out", str(tmp_path / "a.png")]
    assert mqar.main(["--log-path", log, "--models", "s4d", "mamba2", *out]) == 0
    assert capsys.readouterr().err == "note: no run of mamba2\n"


@pytest.mark.parametrize(
    ("more", "flags", "said"),
    [
        ([run(seed=7, lr=0.1)], [], "lr: 0.001, 0.1; expected equal"),
        ([run(seed=7, pairs=(1, 2))], [], "n_pairs: [1, 2, 16], [1, 2]; expected"),
        ([run("mamba2", lr=0.1)], [], "let models differ with --may-differ lr"),
        ([], ["--models", "mamba2"], "no runs of dataset=mqar mamba2"),
        ([], ["--out", "a.txt"], "a file ending in .png, .pdf or .svg"),
    ],
)
def test_each_fault_is_one_line_and_status_2(tmp_path, capsys, more, flags, said):
    log = str(write(tmp_path / "a.jsonl", *grid(), *more))
    out = [] if "--out" in flags else ["--out", str(tmp_path / "a.png")]
    with pytest.raises(SystemExit) as stop:
        mqar.main(["--log-path", log, *flags, *out])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


@pytest.mark.parametrize(
    "spoil",
    [
        lambda record: record["params"].pop("n_pairs"),
        lambda record: record["params"].pop("n_state"),
        lambda record: record["params"].update(n_pairs=2),
        lambda record: record["meta"]["parts"].pop("2"),
        lambda record: record["meta"]["parts"]["2"].pop("accuracy"),
        lambda record: record["meta"]["task"].pop("parts"),
        lambda record: record["meta"]["task"]["parts"]["2"].pop("guess_accuracy"),
    ],
)
def test_a_record_without_scores_at_each_number_of_pairs_is_refused(
    tmp_path, capsys, spoil
):
    lacking = json.loads(json.dumps(run()))
    spoil(lacking)
    log = str(write(tmp_path / "a.jsonl", lacking))
    with pytest.raises(SystemExit):
        mqar.main(["--log-path", log, "--out", str(tmp_path / "a.png")])
    (line,) = capsys.readouterr().err.splitlines()
    assert f"run {lacking['run_id']} lacks n_state, or scores at each of" in line


# --- what the trainer and its models say ----------------------------------------------


def test_models_without_state_sizes_are_those_that_ignore_n_state():
    models = pytest.importorskip("mamba_experiments.models")
    sizes = {"vocab_size": 50, "d_model": 32, "n_layers": 2}
    same = {
        name
        for name in models.MODELS
        if models.build_config(name, n_state=16, **sizes)
        == models.build_config(name, n_state=32, **sizes)
    }
    assert same == mqar.UNSIZED


def test_the_trainers_own_records_are_read(tmp_path, capsys):
    """Two states of the trainer's smallest model, scored at each number of pairs."""
    pytest.importorskip("torch")
    from mamba_experiments import train

    assert train.NAME == EXPERIMENT
    flags = (
        "--dataset mqar --seq-len 16 --n-pairs 1 2 --n-keys 4 --d-model 8 --epochs 1"
    )
    flags += " --n-layers 1 --train-max-samples 40 --val-max-samples 20 --model s4d"
    for size in ("2", "4"):
        own = ["--n-state", size, "--plot-dir", str(tmp_path)]
        assert train.main([*flags.split(), *own]) == 0
    log, out = str(tmp_path / train.LOG), str(tmp_path / "a.png")
    assert mqar.main(["--log-path", log, "--out", out]) == 0
    runs = read_runs(log)
    scores = mqar.scores_of(runs)
    assert (scores.pairs, list(scores.lines)) == ([1, 2], [2, 4])
    for run in runs:  # 10 queries at one pair and 20 at two are the 30 of the curve
        (one, two) = scores.lines[run.params["n_state"]][0]
        whole = run.curve[-1]["val_accuracy"]
        assert (10 * one + 20 * two) / 30 == pytest.approx(whole)
    assert mqar.levels_of(runs)["guess"] == {1: 1 / 4, 2: 1 / 4}
    assert f"saved {out}" in capsys.readouterr().out


def test_of_searched_settings_the_least_loss_is_shown_for_each_seed(tmp_path):
    """Two rates, each the better one for one of two seeds; accuracies tell them."""
    losses = {(0, 0.01): 1.0, (0, 0.1): 2.0, (1, 0.01): 2.0, (1, 0.1): 1.0}
    runs = []
    for (seed, lr), loss in losses.items():
        own = run(seed=seed, lr=lr, accuracies=[lr, lr, lr])
        own["meta"]["curve"][-1]["val_loss"] = loss
        runs.append(own)
    log = str(write(tmp_path / "train_runs.jsonl", *runs))
    with pytest.raises(InputError, match=r"lr: 0\.01, 0\.1; expected equal ones"):
        mqar.runs_of(log, [], [], [])
    found = mqar.scores_of(mqar.runs_of(log, [], [], [], ["lr"]))
    assert found.lines[4].tolist() == [[0.01] * 3, [0.1] * 3]
    with pytest.raises(InputError, match=r"best-of: got 'lrr'.*did you mean lr"):
        mqar.runs_of(log, [], [], [], ["lrr"])
