"""Training side by side: data against oracles, loss, runs, resumption, the command."""

import json
import math
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from data_dir._corpora import words_of
from experiments.common import InputError, parse_line
from scaling_experiments import train_lm
from scaling_experiments._train_lm_data import (
    encode,
    entropy,
    load_tokenizer,
    text_of,
    unigram_loss,
    wikitext2_task,
    windows,
)
from scaling_experiments._train_lm_models import (
    MODELS,
    Sizes,
    build,
    check_name,
    cross_entropy_sum,
)
from scaling_experiments.train_lm import (
    LOG,
    PICTURES,
    TrainLMOptions,
    levels,
    problems,
    run,
    train,
)
from ssm.models import SequenceLM
from tests.ssm.helpers import assert_close

DATA = Path(__file__).parents[3] / "shared" / "data"
HAS_DATA = (DATA / "gpt2").is_dir() and (DATA / "wikitext2").is_dir()
Meta = dict[str, Any]

# Text with a rule in it, which the frequencies of its tokens do not show.
LINES = ["", "= Abc =", "", "a b c d e f g h", "a b c d e f g h , and ."]
TRAIN = "".join(f" {line} \n" if line else " \n" for line in LINES * 12)
VAL = "".join(f" {line} \n" if line else " \n" for line in LINES * 5)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A folder with two texts, and one with a byte-level tokenizer made from them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("places")
    (folder / "text").mkdir()
    (folder / "text" / "valid.txt").write_text(TRAIN)
    (folder / "text" / "test.txt").write_text(VAL)
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator([TRAIN], trainers.BpeTrainer(vocab_size=40))
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(folder / "bpe")
    return {"data_dir": str(folder / "text"), "tokenizer": str(folder / "bpe")}


@pytest.fixture
def tiny(places: dict[str, Any]) -> TrainLMOptions:
    """Seconds to train; batches of 7 and a rest."""
    return TrainLMOptions(**places, seq_len=9, batch_size=7, lr=0.01, device="cpu")


# --- the data -------------------------------------------------------------------------


def test_the_text_is_made_again_from_its_words() -> None:
    assert text_of(words_of(TRAIN)) == TRAIN
    assert text_of([]) == ""


@pytest.mark.skipif(not HAS_DATA, reason="WikiText-2 is not beside this checkout")
def test_wikitext2_in_gpt2s_tokens_is_the_issues() -> None:
    for split in ("valid", "test"):
        text = (DATA / "wikitext2" / f"{split}.txt").read_text()
        assert text_of(words_of(text)) == text
    task = wikitext2_task(
        load_tokenizer(str(DATA / "gpt2")),
        seq_len=128,
        val_max_samples=0,
        data_dir=str(DATA / "wikitext2"),
    )
    assert task.vocab_size == 50_257
    assert task.metadata["train"] == {"n_tokens": 258_659, "n_windows": 258_658 // 128}
    assert task.metadata["corpus"]["splits"] == {"train": "valid", "val": "test"}


def test_tokens_decode_to_the_text(places: dict[str, Any]) -> None:
    tokenizer = load_tokenizer(places["tokenizer"])
    tokens = encode(tokenizer, TRAIN)
    assert len(tokens) > 2 * len(LINES)
    assert tokenizer.decode(tokens) == TRAIN


@pytest.mark.parametrize("seq_len", [1, 4, 63, 64, 65])
@pytest.mark.parametrize("extra", [1, 2])
def test_windows_are_the_stream(seq_len: int, extra: int) -> None:
    tokens = np.arange(100, 100 + 3 * seq_len + extra)
    split = windows(tokens, seq_len, "a text")
    n = 3 if extra < 2 or seq_len > 1 else 4
    assert split.inputs.flatten().tolist() == tokens[: n * seq_len].tolist()
    assert torch.equal(split.targets, split.inputs + 1)
    assert split.inputs.shape == (n, seq_len)


def test_a_text_too_short_is_refused() -> None:
    assert windows(np.arange(6), 5, "a text").inputs.shape == (1, 5)
    with pytest.raises(InputError, match="a text: got 5; expected at least 6 tokens"):
        windows(np.arange(5), 5, "a text")


def test_the_unigrams_loss_counted_by_hand() -> None:
    train, targets = np.array([0, 2, 2, 1, 2]), np.array([2, 2, 3, 0])
    seen, V = Counter(train.tolist()), 5
    by_hand = [-math.log((seen[w] + 1) / (len(train) + V)) for w in targets.tolist()]
    found = unigram_loss(train, targets, V)
    assert found == pytest.approx(sum(by_hand) / 4, rel=1e-12)


def test_no_context_free_guess_is_below_the_entropy() -> None:
    """Of 1/2, 1/4, 1/4 it is 1.5 bits; other guesses cost more (Gibbs)."""
    targets = np.array([7, 3, 7, 0, 3, 7, 7, 0])
    assert entropy(targets) == pytest.approx(1.5 * math.log(2), rel=1e-12)
    guesses = np.random.default_rng(0).dirichlet(np.ones(8), size=200)
    losses = -np.log(guesses)[:, targets].mean(1)
    assert losses.min() > entropy(targets)


def test_validation_windows_are_spread_over_the_text(places: dict[str, Any]) -> None:
    tokenizer = load_tokenizer(places["tokenizer"])

    def task(most: int) -> Any:
        return wikitext2_task(
            tokenizer, seq_len=9, val_max_samples=most, data_dir=places["data_dir"]
        )

    every, some = task(0), task(4)
    there = len(every.val.inputs)
    rows = [i * there // 4 for i in range(4)]
    assert rows[-1] > there // 2
    assert torch.equal(some.val.inputs, every.val.inputs[rows])
    assert torch.equal(some.val.targets, every.val.targets[rows])
    assert task(there + 1).metadata == every.metadata
    targets = some.val.targets.numpy().ravel()
    train = encode(tokenizer, TRAIN)
    expected = unigram_loss(train, targets, every.vocab_size)
    assert some.metadata["unigram_loss"] == expected
    assert some.metadata["val_entropy"] == entropy(targets)


# --- the loss -------------------------------------------------------------------------


def head(bias: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = {"y": (23, 6), "weight": (11, 6)} | ({"bias": (11,)} if bias else {})
    return {
        name: torch.randn(*shape, generator=generator, requires_grad=True)
        for name, shape in shapes.items()
    }


class LargestResult(TorchDispatchMode):
    """The most numbers that one operation gave."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.most = max(self.most, tensor.numel())
        return out


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("at_once", [1, 11, 70, 11 * 22, 11 * 23, 10_000])
def test_the_loss_in_pieces_is_the_loss(at_once: int, bias: bool) -> None:
    targets = torch.arange(23) * 7 % 11
    parts = head(bias)
    logits = functional.linear(parts["y"], parts["weight"], parts.get("bias"))
    expected = functional.cross_entropy(logits, targets, reduction="sum")
    found = cross_entropy_sum(
        parts["y"], targets, parts["weight"], parts.get("bias"), at_once
    )
    assert_close(found, expected, name="loss")
    inputs = list(parts.values())
    pairs = zip(
        parts,
        torch.autograd.grad(found, inputs),
        torch.autograd.grad(expected, inputs),
        strict=True,
    )
    for name, gradient, wanted in pairs:
        assert_close(gradient, wanted, name=name)


def test_no_more_logits_than_asked_for_exist_at_once() -> None:
    """Neither forward nor backward: nothing is larger than a piece, or than W."""
    parts = head(bias=True)
    with LargestResult() as seen:
        cross_entropy_sum(
            parts["y"].repeat(9, 1),
            torch.zeros(207, dtype=torch.int64),
            parts["weight"].repeat(10, 1),
            parts["bias"].repeat(10),
            110 * 3,
        ).backward()
    assert seen.most == 207 * 6  # the hidden states themselves; logits are 110 * 207


NAMES = (*MODELS, "mamba", "transformer", "MA+", "M*")


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_of_every_model_is_that_of_its_logits(name: str) -> None:
    module = build(name, Sizes(19, 8, 2), seed=3)
    tokens = torch.arange(2 * 13).reshape(2, 13) % 19
    loss, balance = module(tokens, (tokens + 1) % 19)
    inner: Any = module.model
    out = inner(tokens)
    logits = out.logits if isinstance(inner, SequenceLM) else out[0]
    expected = functional.cross_entropy(
        logits.flatten(0, 1), (tokens.flatten() + 1) % 19, reduction="sum"
    )
    assert_close(loss, expected)
    assert (balance is not None) == ("*" in name)
    if balance is not None:
        assert torch.equal(balance, out.auxiliary_loss)


def test_weights_come_from_the_seed_alone() -> None:
    def weights(seed: int) -> Tensor:
        module = build("MambaModel", Sizes(19, 8, 2), seed=seed)
        return torch.cat([p.detach().flatten() for p in module.parameters()])

    first = weights(1)
    before = torch.random.get_rng_state()
    torch.rand(3)
    assert torch.equal(weights(1), first)
    assert not torch.equal(weights(2), first)
    torch.random.set_rng_state(before)
    weights(5)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "mend"),
    [
        ("mambamodel", "did you mean MambaModel?"),
        ("transformr", "did you mean transformer?"),
        ("MQ", "did you mean|see ssm.models.patterns"),
    ],
)
def test_an_unknown_model_is_answered_with_the_nearest(name: str, mend: str) -> None:
    with pytest.raises(InputError, match=mend) as stop:
        check_name(name)
    assert "MambaModel, SmallTransformer, mamba, " in str(stop.value)


# --- runs -----------------------------------------------------------------------------


def told(meta: Meta) -> Meta:
    """What a run found, without what the clock says and where this process computed."""
    models = {
        name: found
        | {"curve": [{**entry, "seconds": 0} for entry in found["curve"]]}
        | {"backends": []}
        for name, found in meta["models"].items()
    }
    return meta | {"models": models}


def test_two_models_learn_what_the_unigram_cannot(tiny: TrainLMOptions) -> None:
    result = run(replace(tiny, epochs=4))
    meta = result.metadata
    assert list(meta["models"]) == ["MambaModel", "SmallTransformer"]
    assert meta["below_unigram"] == {"MambaModel": True, "SmallTransformer": True}
    assert meta["models"]["MambaModel"]["backends"] != []
    assert problems(meta) == []
    assert result.passed is None
    for found in meta["models"].values():
        assert [entry["epoch"] for entry in found["curve"]] == [1, 2, 3, 4]
        assert found["curve"][-1]["val_loss"] == found["last"]["val_loss"]
    assert "valid trains, test validates" in result.details
    json.dumps(meta, allow_nan=False)


def test_a_model_trains_the_same_alone_and_beside_others(
    tiny: TrainLMOptions,
) -> None:
    both = told(run(replace(tiny, epochs=1)).metadata)["models"]
    alone = replace(tiny, epochs=1, models=("SmallTransformer",))
    assert told(run(alone).metadata)["models"] == {
        "SmallTransformer": both["SmallTransformer"]
    }


@pytest.mark.parametrize("max_steps", [2, 37])
def test_max_steps_decides_whatever_epochs_says(
    tiny: TrainLMOptions, max_steps: int
) -> None:
    asked = replace(tiny, models=("M",), d_model=8, n_layers=1, epochs=1)
    a_pass = run(asked).metadata["models"]["M"]["last"]["step"]
    assert 2 < a_pass < 37
    found = run(replace(asked, max_steps=max_steps)).metadata["models"]["M"]
    assert found["last"]["step"] == max_steps
    assert found["last"]["epoch"] == pytest.approx(max_steps / a_pass)


class KilledError(Exception):
    """Stands for the end of the process."""


def test_a_killed_run_goes_on_to_the_same_numbers(
    tiny: TrainLMOptions, tmp_path: Path
) -> None:
    options = replace(tiny, models=("MambaModel", "M*"), d_model=8, n_layers=1)
    silent = lambda _: train_lm.Watch()  # noqa: E731
    expected = told(run(options).metadata)

    def killed_in(name: str) -> train_lm.Watch:
        def on_entry(entry: Meta) -> None:
            if name == "M*" and entry["epoch"] == 2:
                raise KilledError

        return train_lm.Watch(on_entry=on_entry)

    with pytest.raises(KilledError):
        train(options, tmp_path, resume=False, watch_of=killed_in)
    again = train(options, tmp_path, resume=True, watch_of=silent)
    assert told(again.metadata) == expected
    with pytest.raises(InputError, match="lr"):
        train(replace(options, lr=0.02), tmp_path, resume=True, watch_of=silent)
    anew = train(replace(options, lr=0.02), tmp_path, resume=False, watch_of=silent)
    assert told(anew.metadata) != expected


def test_document_3s_loss_is_a_level_only_for_its_training_split() -> None:
    meta: Meta = {"unigram_loss": 6.4, "val_entropy": 6.1}
    meta["source"] = {"loss": 5.5, "comparable": False}
    assert [level for level, *_ in levels(meta)] == [6.4, 6.1]
    meta["source"]["comparable"] = True
    assert [level for level, *_ in levels(meta)] == [6.4, 6.1, 5.5]
    for split, comparable in (("train", True), ("valid", False)):
        task = {"corpus": {"splits": {"train": split, "val": "test"}}}
        assert train_lm.trained_as_the_source(task) is comparable


def test_contradictions_of_a_record_are_found(tiny: TrainLMOptions) -> None:
    meta = run(replace(tiny, models=("M",), d_model=8, epochs=2)).metadata
    assert problems(meta) == []
    meta["models"]["M"]["best"]["val_loss"] += 0.5
    meta["below_unigram"]["M"] = not meta["below_unigram"]["M"]
    assert [line.partition(" ")[0] for line in problems(meta)] == ["M:", "M:"]


# --- the command ----------------------------------------------------------------------


def words(options: TrainLMOptions, folder: Path) -> list[str]:
    """The flags as they would be typed, with outputs in ``folder``."""
    flags = []
    for name, value in asdict(options).items():
        several = value if isinstance(value, tuple) else (value,)
        flags += [f"--{name.replace('_', '-')}", *map(str, several)]
    return [*flags, "--out-dir", str(folder), "--plot-path", str(folder / "a.png")]


def test_the_command_logs_draws_and_resumes(
    tiny: TrainLMOptions, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = replace(tiny, models=("MambaModel", "M"), d_model=8, epochs=1)
    assert train_lm.main(words(options, tmp_path)) == 0
    said = capsys.readouterr()
    assert said.err == ""
    lines = said.out.splitlines()
    assert [line.split()[0] for line in lines] == ["MambaModel", "M", "best", "saved"]
    record = parse_line((tmp_path / LOG).read_text())
    assert record["params"] == {**asdict(options), "models": ["MambaModel", "M"]}
    assert record["details"] == lines[2]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert train_lm.main([*words(options, tmp_path), "--resume", "--no-plot"]) == 0
    assert "going on from" in capsys.readouterr().err
    first, second = map(parse_line, (tmp_path / LOG).read_text().splitlines())
    assert told(second["meta"]) == told(first["meta"])


_UNIGRAM = "unigram of the training text"


def test_the_picture_shows_every_model_and_the_unigram(tiny: TrainLMOptions) -> None:
    result = run(replace(tiny, models=("MambaModel", "M"), d_model=8, epochs=2))
    figure = PICTURES[0].render([result])
    for ax, key in zip(figure.axes, ("step", "seconds"), strict=True):
        lines = {line.get_label(): line for line in ax.get_lines()}
        curve = result.metadata["models"]["M"]["curve"]
        drawn = np.asarray(lines["M, validation"].get_xydata()).tolist()
        assert drawn == [[entry[key], entry["val_loss"]] for entry in curve]
        unigram = result.metadata["unigram_loss"]
        level = np.asarray(lines[f"{_UNIGRAM}: {unigram:.3f}"].get_ydata())
        assert level.tolist() == [unigram, unigram]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"models": ("Mambamodel",)}, "did you mean MambaModel?"),
        ({"models": ("M", "M")}, "models: got 'M M'; expected each name once"),
        ({"models": ("MMM",)}, "MMM: pattern: got 'MMM', 3 layers"),
        ({"seq_len": 0}, "seq_len: got 0"),
        ({"seq_len": 100_000}, "expected at least 100001 tokens"),
        ({"max_steps": -1}, "max_steps: got -1"),
        ({"batch_size": 0, "max_steps": 3}, "batch_size: got 0"),
        ({"lr": 0.0}, "lr: got 0.0"),
        ({"data_dir": "nowhere"}, "data_dir: got 'nowhere'"),
        ({"device": "tpu"}, "device: got 'tpu'"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    changed: Meta,
    said: str,
    tiny: TrainLMOptions,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stop:
        train_lm.main(words(replace(tiny, **changed), tmp_path))
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert said in line
    assert len(line.splitlines()) == 1
    assert not list(tmp_path.rglob("checkpoint-*")) + list(tmp_path.glob("*.png"))


def test_a_folder_without_tokenizer_says_what_to_do(
    tiny: TrainLMOptions, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    options = replace(tiny, tokenizer=str(tmp_path / "empty"))
    with pytest.raises(SystemExit) as stop:
        train_lm.main(words(options, tmp_path))
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert len(line.splitlines()) == 1
    assert "the folder holds no tokenizer" in line
    assert "--tokenizer FOLDER" in line
