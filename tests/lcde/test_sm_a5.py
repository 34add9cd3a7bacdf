"""Sequence models on words: what is scored, when runs end, which depths are tried."""

from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from data_dir.word_problem import load_words
from experiments.common import ExperimentResult, InputError
from lcde import sm_a5
from lcde._sequence_model import MODELS, SequenceModel, build
from lcde._watch import Hooks, Watch
from lcde.config import SMA5Config
from lcde.sm_a5 import (
    SMA5Options,
    run,
    run_sm_A5_experiment,
    token_accuracies,
    token_accuracy,
    train,
)
from tests.ssm.helpers import assert_close

N_WORDS = 6**3  # of length 3 in S3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All words of lengths 2 and 3 in S3."""
    folder = tmp_path_factory.mktemp("words")
    for length in (2, 3):
        load_words(length, group="S3", folder=str(folder))
    return folder


def options(data: Path, **changed: Any) -> SMA5Options:
    tiny: dict[str, Any] = {"hidden_dim": 8, "state_dim": 4, "batch_size": 32}
    tiny |= {"num_epochs": 2, "eval_every": 4, "learning_rate": 1e-2, "group": "S3"}
    return SMA5Options(**tiny | {"data_dir": str(data), "device": "cpu"} | changed)


def test_published_settings_are_the_defaults() -> None:
    ours, published = asdict(SMA5Options()), asdict(SMA5Config())
    shared = ours.keys() & published.keys()
    assert len(shared) == 12
    assert {k: ours[k] for k in shared} == {k: published[k] for k in shared}
    asked = SMA5Options()
    model, training = asked.architecture(60), asked.training()
    assert (model.activation, model.use_layernorm, model.dropout) == ("GLU", True, 0.1)
    assert model.continuous_output
    assert model.embedding
    assert (model.input_dim, model.output_dim) == (60, 60)
    assert (training.weight_decay, training.decay_all) == (0.01, True)
    assert training.grad_clip == 0
    assert (training.lr, training.schedule) == (2e-4, "constant")


class Scripted(nn.Module):
    """Puts out the logits that it was given, whatever it is asked."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.logits[: len(words)]


def test_scores_are_sums_over_words_and_positions() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 3, 4, generator=generator)
    products = torch.randint(4, (50, 3), generator=generator)
    model = Scripted(logits).eval()
    scores = token_accuracy(model, (products, products))
    shares = logits.double().softmax(-1).numpy()
    places = np.indices((50, 3))
    likely = shares[places[0], places[1], products.numpy()]
    assert float(scores.loss) == pytest.approx(-np.log(likely).sum(), rel=1e-5)
    correct = shares.argmax(-1) == products.numpy()
    assert float(scores.scored) == 150
    assert float(scores.sums["accuracy"]) == correct.sum()
    entry = {f"val_{k}": float(v) / 150 for k, v in scores.sums.items()}
    told = sm_a5.told(entry | {"step": 7})
    assert told.keys() == {"step", "val_accuracy", "val_accuracy_per_position"}
    assert told["val_accuracy_per_position"] == pytest.approx(correct.mean(0).tolist())
    assert told["val_accuracy"] == pytest.approx(correct.mean())
    model.train()
    assert token_accuracy(model, (products, products)).sums.keys() == {"accuracy"}


def test_the_accuracy_reported_is_that_of_the_model_kept(
    data: Path, tmp_path: Path
) -> None:
    asked = options(data, num_epochs=3, threshold=1.0)
    meta = train(asked, tmp_path, resume=False, watch=Watch()).metadata
    n_train = round(0.8 * N_WORDS)
    an_epoch = -(-n_train // 32)
    steps = {*range(4, 3 * an_epoch + 1, 4), *(an_epoch * k for k in (1, 2, 3))}
    assert [entry["step"] for entry in meta["curve"]] == sorted(steps)
    kept = SequenceModel(asked.architecture(6)).eval()
    kept.load_state_dict(load_file(max(tmp_path.iterdir()) / "model.safetensors"))
    inputs, targets = asked.words(3).val
    with torch.no_grad():
        answers = kept(torch.from_numpy(inputs).long()).argmax(-1).numpy()
    assert len(inputs) == N_WORDS - n_train
    assert meta["accuracy"] == pytest.approx((answers == targets).mean())
    at = meta["curve"][-1]["val_accuracy_per_position"]
    assert at == pytest.approx((answers == targets).mean(0).tolist())
    assert meta["task"]["n_train"] == n_train
    assert sm_a5.problems(meta) == []
    assert sm_a5.problems(meta | {"accuracy": 2.0})
    assert sm_a5.problems(meta | {"reached": not meta["reached"]})
    wrong = {**meta["curve"][0], "val_accuracy_per_position": [1.0, 1.0, 1.0]}
    assert sm_a5.problems(meta | {"curve": [wrong, *meta["curve"][1:]]})


def test_every_step_learns_from_pairs_too(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, ...]] = []
    score = sm_a5.token_accuracy

    def watched(model: nn.Module, batch: Any) -> Any:
        if model.training:
            shapes.append(tuple(batch[0].shape))
        return score(model, batch)

    monkeypatch.setattr(sm_a5, "token_accuracy", watched)
    meta = run(options(data, max_steps=5, batch_size=16)).metadata
    # 29 of the 36 pairs train: batches of 16 and 13.
    assert shapes == [(16, 3), (16, 2), (16, 3), (13, 2)] * 2 + [(16, 3), (16, 2)]
    assert meta["steps"] == 5


def test_a_run_ends_once_it_is_good_enough(data: Path) -> None:
    curve = run(options(data, threshold=0.999)).metadata["curve"]
    assert len(curve) > 2
    good = curve[1]["val_accuracy"]
    for threshold, entries in ((good, 3), (good - 1e-6, 2)):
        meta = run(options(data, threshold=threshold)).metadata
        first = next(i for i, e in enumerate(curve) if e["val_accuracy"] > threshold)
        assert len(meta["curve"]) == first + 1 <= entries
        assert meta["reached"] is True
        assert meta["steps"] == curve[first]["step"]
    meta = run(options(data, threshold=1.0)).metadata
    assert meta["reached"] is False


def test_seeds_split_words_and_pairs_their_own_ways(data: Path) -> None:
    first, again, other = (
        options(data, seed=seed).words(3).val.inputs for seed in (0, 0, 1)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    curves = [run(options(data, seed=seed)).metadata["curve"] for seed in (0, 1)]
    assert curves[0][0]["val_loss"] != curves[1][0]["val_loss"]


# --- the driver -----------------------------------------------------------------------


def tried(needed: dict[int, int | None], **changed: Any) -> list[tuple[int, int]]:
    """(length, depth) of every run, if a length needs so many blocks (None: more)."""
    seen: list[tuple[int, int]] = []

    def keep(run: Any, values: dict[str, Any]) -> ExperimentResult:
        length, depth = values["length"], values["depth"]
        seen.append((length, depth))
        least = needed[length]
        reached = least is not None and depth >= least
        return ExperimentResult("sm_a5", "made up", {"reached": reached})

    lengths = tuple(needed)
    config = SMA5Config(model_names=("S4",), lengths=lengths, **changed)
    results = run_sm_A5_experiment(config, seed=3, hooks=Hooks(keep=keep))
    assert len(results) == len(seen)
    return seen


def test_depths_that_failed_are_not_tried_at_longer_lengths() -> None:
    needed = {3: 1, 4: 2, 5: 2, 6: 4, 8: 3, 9: None, 10: None}
    runs = [(3, 1), (4, 1), (4, 2), (5, 2), (6, 2), (6, 3), (6, 4), (8, 4), (9, 4)]
    assert tried(needed) == runs
    shuffled = {length: needed[length] for length in (9, 3, 6, 5, 4, 8, 10)}
    assert tried(shuffled, depths=(4, 2, 1, 3)) == runs


def test_every_model_starts_from_the_smallest_depth_with_the_settings_asked() -> None:
    asked: list[dict[str, Any]] = []

    def keep(run: Any, values: dict[str, Any]) -> ExperimentResult:
        asked.append(values)
        return ExperimentResult("sm_a5", "made up", {"reached": values["depth"] == 2})

    config = SMA5Config(("RNN", "S4"), (3,), hidden_dim=7, max_steps=9, threshold=0.5)
    run_sm_A5_experiment(config, seed=3, hooks=Hooks(keep=keep))
    assert [(v["model"], v["depth"]) for v in asked] == [
        (name, depth) for name in ("RNN", "S4") for depth in (1, 2)
    ]
    same = asdict(config).keys() & asked[0].keys()
    assert {"hidden_dim", "max_steps", "threshold", "samples"} <= same
    for values in asked:
        assert {k: values[k] for k in same} == {k: asdict(config)[k] for k in same}
        assert values["seed"] == 3


WRONG = [
    ({"model": "Rnn2"}, "model: got 'Rnn2'"),
    ({"length": 0}, "length: got 0"),
    ({"group": "B5"}, "group: got 'B5'"),
    ({"threshold": 0.0}, "threshold: got 0.0"),
    ({"train_split": 1.0}, "train_split: got 1.0"),
    ({"dropout": -0.1}, "dropout: got -0.1"),
    ({"model": "Transformer", "state_dim": 3}, "state_dim: got 3"),
    ({"num_epochs": 0}, "epochs: got 0"),
]


@pytest.mark.parametrize(("wrong", "said"), WRONG)
def test_bad_options_are_one_line_and_no_checkpoint_is_lost(
    wrong: dict[str, Any], said: str, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "kept").touch()
    with pytest.raises(InputError) as caught:
        train(options(data, **wrong), tmp_path, resume=False, watch=Watch())
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "kept").exists()


def test_the_picture_shows_steps_and_positions(data: Path) -> None:
    results = [run(options(data, depth=depth)) for depth in (1, 2)]
    steps, places = sm_a5.PICTURES[0].render(results).axes
    for i, result in enumerate(results):
        curve = result.metadata["curve"]
        drawn = np.asarray(steps.lines[i].get_xydata()).tolist()
        assert drawn == [[e["step"], e["val_accuracy"]] for e in curve]
        last = np.asarray(places.lines[i].get_ydata()).tolist()
        assert last == curve[-1]["val_accuracy_per_position"]
    assert np.unique(steps.lines[2].get_ydata()) == 0.9


def test_options_say_what_each_is() -> None:
    told = SMA5Options.__doc__ or ""
    assert all(f"        {field.name}: " in told for field in fields(SMA5Options))


# Narrower models take a higher rate, larger batches fewer minutes; the Transformer has
# dropout of its own.
QUICK: dict[str, dict[str, Any]] = {
    "RNN": {"batch_size": 256},
    "Transformer": {"batch_size": 64, "state_dim": 16, "dropout": 0.0},
}


@pytest.mark.slow
@pytest.mark.parametrize("model", QUICK)
def test_one_block_learns_words_of_length_3_in_a5(model: str, tmp_path: Path) -> None:
    """Figure 2's first column, at a quarter of its width."""
    asked = SMA5Options(
        model=model,
        hidden_dim=256,
        learning_rate=1e-3,
        eval_every=0,
        device="cpu",
        data_dir=str(tmp_path),
    )
    meta = run(replace(asked, **QUICK[model])).metadata
    at = meta["curve"][-1]["val_accuracy_per_position"]
    assert sum(at) / 3 > 0.9, (meta["steps"], at)
    assert meta["reached"]


@pytest.mark.parametrize("name", MODELS)
def test_parts_by_one_call_are_scored_as_one_by_one(name: str) -> None:
    """Behind a word's end stands what no position of it can see."""
    config = SMA5Options(name, hidden_dim=8, state_dim=4, depth=2, dropout=0.0)
    model = build(config.architecture(60), seed=0).double().eval()
    generator = torch.Generator().manual_seed(1)
    parts = [(torch.randint(60, (3, L), generator=generator),) * 2 for L in (7, 2)]
    model.train()  # with accuracies of whole parts only
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout | torch.nn.MultiheadAttention):
            module.dropout = module.p = 0.0
    together = token_accuracies(model, parts)
    apart = [token_accuracy(model, part) for part in parts]
    parameters = [p for p in model.parameters() if p.requires_grad]
    for one, other in zip(together, apart, strict=True):
        assert one.sums.keys() == other.sums.keys()
        assert float(one.scored) == float(other.scored)
        assert float(one.sums["accuracy"]) == float(other.sums["accuracy"])
        assert_close(one.loss, other.loss)
        gradients = [
            torch.autograd.grad(
                scores.loss, parameters, retain_graph=True, materialize_grads=True
            )
            for scores in (one, other)
        ]
        for first, second in zip(*gradients, strict=True):
            assert_close(first, second)
