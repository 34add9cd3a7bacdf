"""The training command: as typed, killed, resumed, split over processes, led astray."""

import json
import math
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data_dir.task import IGNORED, TokenTask
from experiments import check_logs, run_and_log
from experiments.common import parse_line
from experiments.registry import find, load
from mamba_experiments import train as training
from mamba_experiments.models import MATCH_TOLERANCE, MODELS
from mamba_experiments.train import (
    DATASETS,
    PICTURES,
    TrainOptions,
    Watch,
    make_model,
    make_task,
    run,
    token_objective,
    train,
)
from ssm.models import SequenceLM, SequenceLMConfig
from ssm.training import Progress, TrainingConfig

ROOT = Path(__file__).parents[2]
WIKITEXT = ROOT.parent / "shared" / "data" / "wikitext2"
MODULE = "mamba_experiments.train"
NAME = "mamba_simple_recall_seed0"

Meta = dict[str, Any]
Done = subprocess.CompletedProcess[str]
RunModule = Callable[..., Done]

# Batches of 7, 7, 6: seconds to train, and uneven between processes.
TINY: Meta = {
    "seq_len": 12,
    "gap": 3,
    "train_max_samples": 20,
    "val_max_samples": 11,
    "batch_size": 7,
    "d_model": 8,
    "n_state": 3,
    "n_layers": 1,
    "epochs": 3,
    "warmup": 2,
    "dropout": 0.1,
    "embedding_std": 0.02,
    "device": "cpu",
}


def options(**changed: Any) -> TrainOptions:
    return TrainOptions(**TINY | changed)


def words_of(values: Mapping[str, Any]) -> list[str]:
    """The flags as they would be typed."""
    words = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            several = isinstance(value, tuple)
            words += [f"--{flag}", *map(str, value if several else (value,))]
    return words


def tiny_words(folder: Path, **changed: Any) -> list[str]:
    return words_of({**TINY, "plot_dir": folder, **changed})


def records(folder: Path) -> list[Meta]:
    text = (folder / "train_runs.jsonl").read_text()
    assert text == "" or text.endswith("\n")
    return [parse_line(line) for line in text.splitlines()]


def told(meta: Meta) -> Meta:
    """What a run found, without what the clock says."""
    entries = [{k: v for k, v in e.items() if k != "seconds"} for e in meta["curve"]]
    return meta | {"curve": entries}


def files(folder: Path) -> dict[str, bytes]:
    """Every file under ``folder``, by its relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def checkpoints(folder: Path, name: str = NAME) -> list[Path]:
    return sorted((folder / "checkpoints" / name).glob("checkpoint-*"))


def assert_one_line_error(stderr: str, *said: str) -> None:
    assert stderr.startswith("error: "), stderr
    assert len(stderr.splitlines()) == 1, stderr
    for words in said:
        assert words in stderr


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Callable[[Sequence[str]], str]:
    """The one line that the command answers bad input with."""

    def of(words: Sequence[str]) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            training.main(words)
        said = capsys.readouterr()
        assert stop.value.code == 2
        assert_one_line_error(said.err)
        assert said.out == ""
        return said.err

    return of


# --- flags ----------------------------------------------------------------------------


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Meta]:
    """What the command makes of its words, without doing it."""

    def of(words: str) -> Meta:
        seen: list[Meta] = []

        def keep(values: Meta, **outputs: Any) -> int:
            seen.append(values | outputs)
            return 0

        monkeypatch.setattr(training, "_train_and_keep", keep)
        assert training.main(words.split()) == 0
        return seen[0]

    return of


DOCUMENTED = (
    "--model mamba_simple --dataset recall --seq-len 64 --gap 8 --epochs 5 "
    "--save-plots --plot-dir logs/recall",
    "--model mamba_SSD_diag_exp --dataset wikitext2 --seq-len 128 --max-vocab 20000 "
    "--train-max-samples 10000 --val-max-samples 2000",
    "--model mamba_simple --dataset wikitext2 --seq-len 128 --max-vocab 20000 "
    "--train-max-samples 5000 --val-max-samples 1000 --d-model 64 --n-state 16 "
    "--n-layers 2 --epochs 10 --batch-size 64 --lr 1e-3 --seed 7 --save-plots "
    "--plot-dir outputs/compare",
)
OUTPUTS = {
    "save_plots": False,
    "plot_dir": "outputs/mamba_experiments",
    "log_path": "",
    "resume": False,
}


@pytest.mark.parametrize("words", DOCUMENTED)
def test_the_commands_of_document_1_are_understood(
    words: str, parsed: Callable[[str], Meta]
) -> None:
    expected: Meta = asdict(TrainOptions()) | OUTPUTS
    for flag in words.split("--")[1:]:
        name, *value = flag.split()
        name = name.replace("-", "_")
        kind = type(expected[name])
        expected[name] = kind(*value) if value else True
    assert expected["dataset"] in words
    assert parsed(words) == expected


# A value for each flag that is not its default.
OTHER: Meta = {
    "model": "jamba",
    "dataset": "mqar",
    "seq_len": 70,
    "gap": 9,
    "n_pairs": (2, 3),
    "n_keys": 33,
    "embedding_std": 0.3,
    "max_vocab": 99,
    "stride": 5,
    "data_dir": "here",
    "train_max_samples": 17,
    "val_max_samples": 18,
    "objective": "every",
    "d_model": 24,
    "n_state": 5,
    "n_layers": 3,
    "match_params": True,
    "dropout": 0.2,
    "epochs": 7,
    "batch_size": 9,
    "lr": 0.02,
    "weight_decay": 0.3,
    "schedule": "linear",
    "warmup": 4,
    "grad_clip": 0.5,
    "precision": "bfloat16",
    "compile": True,
    "cuda_graph": True,
    "device": "cpu",
    "eval_every": 6,
    "deterministic": True,
    "seed": 8,
    "save_plots": True,
    "plot_dir": "there",
    "log_path": "there/log.jsonl",
    "resume": True,
}


def test_every_flag_reaches_the_options(parsed: Callable[[str], Meta]) -> None:
    defaults = asdict(TrainOptions()) | OUTPUTS
    assert OTHER.keys() == defaults.keys()
    assert not [name for name in OTHER if OTHER[name] == defaults[name]]
    assert parsed(" ".join(words_of(OTHER))) == OTHER
    for name, value in OTHER.items():  # underscores are hyphens
        words = [f"--{name}", *words_of({name: value})[1:]]
        assert parsed(" ".join(words)) == defaults | {name: value}


def test_every_option_reaches_what_it_is_for() -> None:
    given = {k: v for k, v in OTHER.items() if k not in OUTPUTS}
    asked = TrainOptions(**given | {"match_params": False})
    wanted = asdict(TrainingConfig())
    assert asdict(asked.training()) == {k: OTHER.get(k, v) for k, v in wanted.items()}
    assert wanted.keys() - OTHER.keys() == {"decay_all", "eval_batch_size"}
    task = make_task(asked)
    assert task.train.inputs.shape == (2 * (17 // 2), 70)
    assert task.val.inputs.shape == (2 * (18 // 2), 70)
    assert task.vocab_size == 66
    assert [*task.parts] == ["2", "3"]
    config = make_model(asked, task).config
    assert (config.vocab_size, config.d_model, config.n_layers) == (66, 24, 3)
    assert config.dropout == 0.2
    assert config.mixer["mamba"]["d_state"] == 5
    lone = make_task(options(gap=5, seq_len=9)).metadata
    assert (lone["gap"], lone["seq_len"], lone["n_train"], lone["n_val"]) == (
        5,
        9,
        20,
        11,
    )


def test_data_and_weights_follow_the_seed() -> None:
    task, other = (make_task(options(seed=seed)) for seed in (0, 1))
    assert not torch.equal(task.train.inputs, other.train.inputs)
    first, again, third = (
        make_model(options(seed=seed), task).embedding.weight for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, third)


def test_text_options_reach_the_text(tmp_path: Path) -> None:
    write_text(tmp_path, "a b c d e f g\n" * 60)
    task = make_task(
        options(
            dataset="wikitext2",
            data_dir=str(tmp_path),
            max_vocab=5,
            stride=3,
            objective="every",
        )
    )
    facts = task.metadata
    assert (facts["vocab_size"], facts["train"]["stride"]) == (5, 3)
    assert (facts["train"]["n_windows"], facts["val"]["n_windows"]) == (20, 11)
    assert (facts["objective"], task.last_only) == ("every", False)


# --- the command ----------------------------------------------------------------------

LONG = 60  # epochs of three steps: seconds, so that a run can be killed in the midst


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Done, Path]:
    """The first command of document 1 with tiny sizes: what it said, and its folder."""
    folder = tmp_path_factory.mktemp("recall")
    words = ["--model", "mamba_simple", "--dataset", "recall", "--save-plots"]
    command = [sys.executable, "-m", MODULE, *words, *long_words(folder)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    return done, folder


def long_words(folder: Path) -> list[str]:
    return tiny_words(folder, epochs=LONG, eval_every=2)


def test_the_command_leaves_a_record_a_picture_and_checkpoints(
    finished: tuple[Done, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    done, folder = finished
    assert (done.returncode, done.stderr) == (0, "")
    (record,) = records(folder)
    assert check_logs.main([str(folder / "train_runs.jsonl")]) == 0
    assert "1 records" in capsys.readouterr().out
    assert (record["experiment"], record["seed"]) == ("mamba_train", 0)
    assert record["params"] == json.loads(json.dumps(asdict(long_options())))
    assert record["meta"]["processes"] == 1
    assert {"selective_scan=cpu", "causal_conv1d=cpu"} == {*record["meta"]["backends"]}

    curve = record["meta"]["curve"]
    assert [entry["step"] for entry in curve[:4]] == [2, 3, 4, 6]
    assert [entry["epoch"] for entry in curve[:4]] == pytest.approx(
        [2 / 3, 1, 4 / 3, 2]
    )
    *printed, details, saved = done.stdout.splitlines()
    assert len(printed) == len(curve) == 2 * LONG
    for line, entry in zip(printed, curve, strict=True):
        assert line.startswith(f"epoch {entry['epoch']:g}")
        assert f"validation loss {entry['val_loss']:.4f}" in line
        assert f"perplexity {entry['val_perplexity']:.1f}" in line
    assert details == record["details"]
    best = min(curve, key=lambda entry: entry["val_loss"])
    assert record["meta"]["best"] == {k: best[k] for k in record["meta"]["best"]}
    assert f"best validation loss {best['val_loss']:.4f}" in details

    picture = folder / f"{NAME}.png"
    assert saved == f"saved {picture}"
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    last = [f"checkpoint-{entry['step']:08d}" for entry in curve[-2:]]
    assert [path.name for path in checkpoints(folder)] == last


def long_options() -> TrainOptions:
    return options(epochs=LONG, eval_every=2)


def test_a_run_killed_at_any_moment_goes_on_to_the_same_record(
    finished: tuple[Done, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    enough = random.Random().randint(1, LONG // 3)
    command = [sys.executable, "-m", MODULE, *long_words(tmp_path)]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as victim:
        try:
            deadline = time.monotonic() + 100
            first = f"checkpoint-{3 * enough:08d}"
            while not [p for p in checkpoints(tmp_path) if p.name >= first]:
                assert victim.poll() is None, victim.communicate()[1]
                assert time.monotonic() < deadline, "no checkpoint"
                time.sleep(0.005)
            time.sleep(random.Random().uniform(0, 0.05))  # an epoch or so
        finally:
            victim.kill()
    assert victim.returncode == -9
    assert records(tmp_path) == []
    last = int(checkpoints(tmp_path)[-1].name.partition("-")[2])
    assert 3 * enough <= last < 3 * LONG

    # Here: the run that was killed and the one beside it were processes of their own.
    assert training.main([*long_words(tmp_path), "--resume"]) == 0
    said = capsys.readouterr()
    (note,) = said.err.splitlines()
    assert note.startswith("note: going on from ")
    place = f"step {last}" if last % 3 else f"epoch {last // 3}"
    assert note.endswith(f", after {place}")
    (record,) = records(tmp_path)
    left = [e for e in record["meta"]["curve"] if e["step"] > last]
    assert len(said.out.splitlines()) == len(left) + 1
    (reference,) = records(finished[1])
    assert told(record["meta"]) == told(reference["meta"])
    for name in ("params", "details", "seed", "experiment"):
        assert record[name] == reference[name]
    one, other = (checkpoints(folder)[-1] for folder in (tmp_path, finished[1]))
    assert files(one).keys() == files(other).keys()
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_two_processes_train_as_one_and_write_once(
    run_module: RunModule, tmp_path: Path
) -> None:
    """Every step's loss to 1e-6: 24 steps, each with a row more for the first."""
    alike = {"dropout": 0.0, "epochs": 8, "eval_every": 1}
    launcher = ["--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    launcher += ["--master-port", str(free_port()), "-m", MODULE]
    words = tiny_words(tmp_path, **alike, save_plots=True)
    done = run_module("torch.distributed.run", *launcher, *words)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    (record,) = records(tmp_path)
    alone = run(options(**alike)).metadata
    assert (alone["processes"], record["meta"]["processes"]) == (1, 2)
    curve = told(alone)["curve"]
    assert len(curve) == 24
    assert curve[-1]["train_loss"] < curve[0]["train_loss"]
    for entry, wanted in zip(told(record["meta"])["curve"], curve, strict=True):
        assert entry == pytest.approx(wanted, rel=1e-6)
    assert len(done.stdout.splitlines()) == 24 + 2
    assert done.stdout.count("saved ") == 1
    assert [path.name for path in checkpoints(tmp_path)] == [
        "checkpoint-00000021",
        "checkpoint-00000024",
    ]


def test_processes_but_the_first_say_and_log_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RANK", "1")
    words = tiny_words(tmp_path, resume=True, save_plots=True)
    assert training.main(words) == 0
    assert capsys.readouterr() == ("", "")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


# --- what a run is --------------------------------------------------------------------


def global_state() -> list[list[int]]:
    """Without that of ``random``, from which the type checker of this run draws."""
    numpy_state: Any = np.random.get_state()  # noqa: NPY002  # the global one is meant
    return [torch.get_rng_state().tolist(), numpy_state[1].tolist()]


def test_a_run_follows_its_options_alone_and_leaves_no_trace(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    found = []
    for seed, elsewhere in ((0, 1), (0, 2), (3, 1)):
        torch.manual_seed(elsewhere)
        np.random.seed(elsewhere)  # noqa: NPY002
        random.seed(elsewhere)
        before = global_state()
        result = run(options(seed=seed, dropout=0.3))
        assert global_state() == before
        assert result.passed is None
        found.append(told(result.metadata))
    assert found[0] == found[1]
    assert found[0]["curve"] != found[2]["curve"]
    assert capfd.readouterr() == ("", "")
    assert [*tmp_path.iterdir()] == []


def last_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(max(folder.glob("checkpoint-*")) / "model.safetensors")


def plain_scores(model: SequenceLM, split: Any) -> tuple[float, float]:
    """Mean loss and accuracy, sequence by sequence and position by position."""
    losses, hits = [], []
    for tokens, targets in zip(split.inputs, split.targets, strict=True):
        with torch.no_grad():
            logits = model(tokens[None]).logits[0].double()
        for position, target in enumerate(targets.tolist()):
            if target == IGNORED:
                continue
            scores = logits[position].tolist()
            top = max(scores)
            total = math.log(math.fsum(math.exp(x - top) for x in scores)) + top
            losses.append(total - scores[target])
            hits.append(scores.index(top) == target)
    return math.fsum(losses) / len(losses), sum(hits) / len(hits)


@pytest.mark.parametrize(
    "chosen",
    [
        {"dataset": "recall"},
        {"dataset": "recall", "model": "mamba_SSD_diag_exp"},
        {"dataset": "mqar", "n_pairs": (1, 3), "n_keys": 4, "lr": 0.02},
        {"dataset": "python_docs", "max_vocab": 20},
        {"dataset": "python_docs", "max_vocab": 20, "objective": "every"},
        {"dataset": "mqar", "n_pairs": (1, 3), "model": "jamba", "n_layers": 2},
    ],
    ids=lambda chosen: " ".join(map(str, chosen.values())),
)
def test_scores_are_those_of_a_plain_loop(chosen: Meta, tmp_path: Path) -> None:
    asked = options(**{"epochs": 2, "lr": 0.01} | chosen)
    meta = train(asked, tmp_path, resume=False, watch=Watch()).metadata
    task = make_task(asked)
    model = SequenceLM(SequenceLMConfig.from_dict(meta["config"])).eval()
    model.load_state_dict(last_weights(tmp_path))

    loss, accuracy = plain_scores(model, task.val)
    last = meta["curve"][-1]
    assert last["val_loss"] == pytest.approx(loss, rel=1e-5)
    assert last["val_accuracy"] == pytest.approx(accuracy, rel=1e-12)
    assert last["val_perplexity"] == pytest.approx(math.e**loss, rel=1e-4)
    assert meta["parts"].keys() == task.parts.keys()
    for name, part in task.parts.items():
        loss, accuracy = plain_scores(model, part)
        assert meta["parts"][name] == pytest.approx(
            {"loss": loss, "accuracy": accuracy}, rel=1e-5
        )
    total = sum(x.numel() for x in model.parameters())
    embedding = task.vocab_size * asked.d_model
    assert meta["n_params"] == {
        "total": total,
        "embedding": embedding,
        "rest": total - embedding,
    }
    assert meta["task"] == task.metadata


def test_the_balance_of_experts_is_a_hundredth_of_what_is_minimised() -> None:
    task = make_task(options())
    for name, balanced in (("jamba", True), ("mamba_simple", False)):
        model = make_model(options(model=name, n_layers=2), task).eval()
        with torch.no_grad():
            penalty = token_objective(task.last_only)(model, task.train).penalty
            wanted = 0.01 * model(task.train.inputs).auxiliary_loss
        assert penalty is not None
        assert float(penalty) == pytest.approx(float(wanted), rel=1e-6)
        assert (float(penalty) > 0) is balanced


def test_only_the_last_logits_are_formed_where_only_they_are_scored() -> None:
    for dataset, rows in (("recall", 20), ("mqar", 20 * 12)):
        asked = options(dataset=dataset, n_pairs=(1, 3))
        task = make_task(asked)
        model = make_model(asked, task)
        seen: list[torch.Size] = []
        model.register_forward_hook(
            lambda _m, _i, out, to=seen: to.append(out.logits.shape)
        )
        token_objective(task.last_only)(model, task.train)
        (shape,) = seen
        assert math.prod(shape[:-1]) == rows


def test_more_perplexity_than_a_float_holds_is_infinite() -> None:
    entry = training.with_perplexity({"val_loss": 1e4})
    assert entry["val_perplexity"] == math.inf
    assert training.with_perplexity({"val_loss": 600.0})["val_perplexity"] > 1e260


# --- what is learnt -------------------------------------------------------------------


def test_mamba_learns_recall_where_fixed_lags_and_bags_of_words_do_not() -> None:
    """Of 8 tokens, at any of 5 places; 6 epochs of 32 updates."""
    meta = run(
        TrainOptions(
            seq_len=8,
            gap=2,
            d_model=32,
            n_state=8,
            train_max_samples=1_000,
            val_max_samples=200,
            lr=1e-2,
            weight_decay=0.0,
            embedding_std=0.02,
            epochs=6,
        )
    ).metadata
    assert meta["best"]["val_accuracy"] > 0.95
    assert meta["task"]["fixed_lag_accuracy"] < 0.5
    assert meta["task"]["most_frequent_value_accuracy"] < 0.5
    assert meta["curve"][-1]["train_loss"] < 0.1 * meta["curve"][0]["train_loss"]


def write_text(folder: Path, text: str) -> None:
    for name in ("train.txt", "valid.txt"):
        (folder / name).write_text(text)


@pytest.mark.parametrize("objective", ["last", "every"])
def test_a_text_whose_words_follow_from_the_last_is_learnt(
    objective: str, tmp_path: Path
) -> None:
    write_text(tmp_path, "a b c d e f g h i j\n" * 60)
    meta = run(
        options(
            dataset="wikitext2",
            data_dir=str(tmp_path),
            objective=objective,
            d_model=16,
            n_layers=1,
            lr=0.03,
            dropout=0.0,
            weight_decay=0.0,
            train_max_samples=200,
            batch_size=20,
        )
    ).metadata
    assert meta["task"]["unigram_loss"] > 2
    assert meta["best"]["val_loss"] < 0.2
    assert meta["best"]["val_accuracy"] == 1


@pytest.mark.skipif(not (WIKITEXT / "valid.txt").is_file(), reason="no WikiText-2 here")
def test_the_text_command_of_document_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = tiny_words(
        tmp_path,
        model="mamba_SSD_diag_exp",
        dataset="wikitext2",
        data_dir=WIKITEXT,
        max_vocab=50,
        train_max_samples=200,
        val_max_samples=40,
        batch_size=16,
        lr=0.02,
    )
    assert training.main(words) == 0
    assert capsys.readouterr().err == ""
    (record,) = records(tmp_path)
    task, best = record["meta"]["task"], record["meta"]["best"]
    assert task["corpus"]["splits"] == {"train": "valid", "val": "test"}
    assert (task["train"]["n_windows"], task["n_val_targets"]) == (200, 40)
    assert task["vocab_size"] == 50
    assert best["val_loss"] < 0.9 * math.log(50)  # that of guessing, where it began


# --- parameters -----------------------------------------------------------------------


def rest(model: SequenceLM) -> int:
    named = model.named_parameters()
    return sum(x.numel() for name, x in named if "embedding" not in name)


@pytest.fixture(scope="module")
def small_task() -> TokenTask:
    return make_task(options())


@pytest.mark.parametrize("name", MODELS)
def test_matched_models_have_as_many_parameters_outside_the_embedding(
    name: str, small_task: TokenTask
) -> None:
    sizes = {"d_model": 32, "n_state": 8, "n_layers": 2}
    target = rest(make_model(options(**sizes), small_task))
    asked = options(model=name, match_params=True, **sizes)
    assert rest(make_model(asked, small_task)) == pytest.approx(
        target, rel=MATCH_TOLERANCE
    )


def test_models_differ_in_parameters_unless_matched(small_task: TokenTask) -> None:
    found = {
        name: rest(make_model(options(model=name), small_task))
        for name in ("mamba_simple", "mamba2", "transformer")
    }
    target = found.pop("mamba_simple")
    off = [abs(n - target) / target for n in found.values()]
    assert min(off) > MATCH_TOLERANCE
    meta = run(options(model="transformer", match_params=True)).metadata
    assert meta["n_params"]["rest"] == pytest.approx(target, rel=MATCH_TOLERANCE)


# --- resumed --------------------------------------------------------------------------


@pytest.fixture
def begun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """The folder of a run of three epochs, whose last two are kept."""
    assert training.main(tiny_words(tmp_path)) == 0
    capsys.readouterr()
    return tmp_path


def test_other_settings_are_refused_and_listed(
    begun: Path, refusal: Callable[[Sequence[str]], str]
) -> None:
    before = files(begun)
    line = refusal([*tiny_words(begun, lr=0.02, dropout=0.2), "--resume"])
    assert "lr: 0.003 then, 0.02 now" in line
    assert "dropout: 0.1 then, 0.2 now" in line
    assert "d_model" not in line
    assert files(begun) == before


def test_a_setting_that_is_not_known_is_refused_and_listed(
    begun: Path,
    refusal: Callable[[Sequence[str]], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As by a version that had an option more."""
    ours = training.identity
    monkeypatch.setattr(training, "identity", lambda *o: ours(*o) | {"momentum": 0.5})
    shutil.rmtree(begun / "checkpoints")
    assert training.main(tiny_words(begun)) == 0
    monkeypatch.setattr(training, "identity", ours)
    line = refusal([*tiny_words(begun), "--resume"])
    assert "momentum: 0.5 then, 'absent' now" in line


def test_nothing_to_resume_starts_from_the_beginning_and_says_so(
    begun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(begun / "checkpoints")
    assert training.main([*tiny_words(begun), "--resume"]) == 0
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith("note: no checkpoint in ")
    assert line.endswith("starting from the beginning")
    assert len(said.out.splitlines()) == 3 + 1
    first, again = records(begun)
    assert told(first["meta"]) == told(again["meta"])
    assert first["run_id"] != again["run_id"]


def test_a_finished_run_resumed_reports_it_again(
    begun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert training.main([*tiny_words(begun), "--resume"]) == 0
    said = capsys.readouterr()
    assert said.err.endswith("checkpoint-00000009, after epoch 3\n")
    assert len(said.out.splitlines()) == 1
    first, again = records(begun)
    assert first["meta"]["curve"] == again["meta"]["curve"]  # the seconds, too


def test_without_resume_the_checkpoints_of_that_name_are_replaced(
    begun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = begun / "checkpoints" / "mamba_simple_recall_seed1"
    shutil.copytree(checkpoints(begun)[0].parent, other)
    kept = files(other)
    assert training.main(tiny_words(begun, epochs=1, batch_size=2)) == 0
    assert capsys.readouterr().err == ""
    assert [path.name for path in checkpoints(begun)] == ["checkpoint-00000010"]
    assert files(other) == kept


@pytest.mark.parametrize(
    "wrong", [{"lr": -1.0}, {"gap": 40}, {"d_model": 0}, {"device": "abacus"}]
)
def test_a_refused_command_replaces_no_checkpoint(
    begun: Path, wrong: Meta, refusal: Callable[[Sequence[str]], str]
) -> None:
    before = files(begun)
    refusal(tiny_words(begun, **wrong))
    assert files(begun) == before


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", [cut_off, flip_a_bit, Path.unlink])
@pytest.mark.parametrize("name", ["model.safetensors", "state.json"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(
    begun: Path,
    damage: Callable[[Path], None],
    name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(checkpoints(begun)[-1] / name)
    assert training.main([*tiny_words(begun), "--resume"]) == 0
    first_line, second = capsys.readouterr().err.splitlines()
    assert "checkpoint-00000009 is damaged (" in first_line
    assert first_line.endswith("; falling back to the one before")
    assert second.endswith("checkpoint-00000006, after epoch 2")
    first, again = records(begun)
    assert told(first["meta"]) == told(again["meta"])


def test_checkpoints_of_which_none_is_whole_are_refused(
    begun: Path, refusal: Callable[[Sequence[str]], str]
) -> None:
    for path in checkpoints(begun):
        cut_off(path / "model.safetensors")
    before = files(begun)
    assert "is whole" in refusal([*tiny_words(begun), "--resume"])
    assert files(begun) == before


# --- bad input ------------------------------------------------------------------------

WRONG: list[tuple[Meta, list[str]]] = [
    ({"model": "mamba_simpel"}, ["model: got 'mamba_simpel'", "mean mamba_simple?"]),
    ({"model": "Mamba2"}, ["did you mean mamba2?"]),
    ({"model": "xyz"}, [*MODELS, "choose one"]),
    ({"dataset": "ptb"}, ["dataset: got 'ptb'", *DATASETS]),
    ({"seq_len": 4}, ["seq_len: got 4; expected at least 5 ", "lower gap from 3"]),
    ({"seq_len": 7, "dataset": "mqar", "n_pairs": (2,)}, ["seq_len: got 7", "least 8"]),
    ({"n_pairs": (2, 1), "dataset": "mqar"}, ["n_pairs: got (2, 1)", "increasing"]),
    ({"n_keys": 1, "n_pairs": (2,), "dataset": "mqar"}, ["n_keys: got 1"]),
    ({"objective": "every"}, ["objective: got 'every'", "last for recall"]),
    ({"objective": "last", "dataset": "mqar"}, ["objective: got 'last'", "every for"]),
    ({"objective": "first"}, ["--objective", "first"]),
    ({"schedule": "step"}, ["--schedule", "step"]),
    ({"epochs": 0}, ["epochs: got 0"]),
    ({"epochs": "many"}, ["--epochs", "many"]),
    ({"lr": 0.0}, ["lr: got 0.0"]),
    ({"dropout": 1.5}, ["dropout: got 1.5"]),
    ({"seed": -1}, ["seed: got -1"]),
    ({"device": "abacus"}, ["device: got 'abacus'"]),
    ({"n_layers": 1, "model": "jamba"}, ["n_layers of jamba: got 1"]),
    ({"dataset": "python_docs", "data_dir": "x"}, ["none for python_docs"]),
    ({"dataset": "wikitext2", "data_dir": "/no/folder"}, ["data_dir: got '/no/folder"]),
    ({"learning_rate": 0.1}, ["unknown flag --learning-rate"]),
]


@pytest.mark.parametrize(("wrong", "said"), WRONG, ids=lambda x: str(x)[:30])
def test_bad_input_is_one_line_and_nothing_is_written(
    wrong: Meta,
    said: list[str],
    tmp_path: Path,
    refusal: Callable[[Sequence[str]], str],
) -> None:
    line = refusal(tiny_words(tmp_path, save_plots=True, **wrong))
    for words in said:
        assert words in line
    assert set(files(tmp_path).values()) <= {b""}  # the log, still without a line
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "got 0"), ("\n\n", "got 0"), ("one line\n", "got 3"), ("w " * 11, "got 12")],
)
@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_corpus_shorter_than_a_window_is_refused(
    split: str,
    text: str,
    said: str,
    tmp_path: Path,
    refusal: Callable[[Sequence[str]], str],
) -> None:
    write_text(tmp_path, "the cat sat on the mat\n" * 9)
    (tmp_path / f"{split}.txt").write_text(text)
    words = tiny_words(tmp_path / "out", dataset="wikitext2", data_dir=tmp_path)
    line = refusal(words)
    assert {"train": "training", "valid": "validation"}[split] in line
    assert f"{said}; expected at least 13 words" in line
    assert set(files(tmp_path / "out").values()) <= {b""}


def test_wikitext_without_data_or_network_is_told_how_to_get_it(
    run_module: RunModule, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("HF_HOME", "HF_DATASETS_CACHE", "HF_HUB_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    words = tiny_words(tmp_path / "out", dataset="wikitext2")
    done = run_module(MODULE, *words)
    assert done.returncode == 2
    assert done.stdout == ""
    ways = ("--data-dir FOLDER", "run once with internet", "--dataset python_docs")
    assert_one_line_error(done.stderr, "dataset wikitext2: ", *ways)
    assert set(files(tmp_path / "out").values()) <= {b""}


def make_folder(path: Path) -> None:
    path.mkdir(parents=True)


def make_file(path: Path) -> None:
    path.parent.write_text("not a folder")


@pytest.mark.parametrize("name", [f"{NAME}.png", "train_runs.jsonl"])
@pytest.mark.parametrize("obstacle", [make_folder, make_file])
def test_outputs_that_cannot_be_written_fail_before_the_training(
    name: str,
    obstacle: Callable[[Path], None],
    tmp_path: Path,
    refusal: Callable[[Sequence[str]], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps: list[Progress] = []
    monkeypatch.setattr(training, "_show_step", lambda *a: steps.append(a[-1]))
    folder = tmp_path / "out"
    obstacle(folder / name)
    assert "cannot be written" in refusal(tiny_words(folder, save_plots=True))
    assert steps == []
    assert not (folder / "checkpoints").exists()


def test_another_file_in_the_place_of_the_log_is_left_alone(
    tmp_path: Path, refusal: Callable[[Sequence[str]], str]
) -> None:
    log = tmp_path / "train_runs.jsonl"
    log.write_text('{"schema": 99}\n')
    assert "expected a run log" in refusal(tiny_words(tmp_path))
    assert log.read_text() == '{"schema": 99}\n'
    assert not (tmp_path / "checkpoints").exists()


def test_a_diverging_run_keeps_its_last_good_checkpoint(
    begun: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Weights become infinite after epoch 2, as if a step had been too long."""
    shutil.rmtree(begun / "checkpoints")
    made: list[SequenceLM] = []
    make = training.make_model

    def remembered(*given: Any) -> SequenceLM:
        made.append(make(*given))
        return made[0]

    def spoil(*given: Any) -> None:
        if given[-1].step == 6 + 1:
            with torch.no_grad():
                made[0].embedding.weight.fill_(math.inf)

    monkeypatch.setattr(training, "make_model", remembered)
    monkeypatch.setattr(training, "_show_step", spoil)
    with pytest.raises(SystemExit) as stop:
        training.main(tiny_words(begun))
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert_one_line_error(line, "at step 8", "the output of embedding")
    assert str(checkpoints(begun)[-1]) in line
    assert checkpoints(begun)[-1].name == "checkpoint-00000006"
    assert len(records(begun)) == 1


# --- pictures, progress, registry -----------------------------------------------------


def test_the_picture_shows_the_curve_and_the_level_of_guessing() -> None:
    result = run(options())
    curve = result.metadata["curve"]
    loss, accuracy = PICTURES[0].render([result]).axes
    for ax, kind in ((loss, "loss"), (accuracy, "accuracy")):
        for line, split in zip(ax.lines, ("train", "val"), strict=False):
            drawn = np.asarray([line.get_xdata(), line.get_ydata()]).T.tolist()
            assert drawn == [[e["epoch"], e[f"{split}_{kind}"]] for e in curve]
    assert len(loss.lines) == 2
    (guessing,) = accuracy.lines[2:]
    assert np.unique(guessing.get_ydata()) == 1 / 32


def test_progress_shows_the_loss_and_tokens_a_second() -> None:
    shown: list[tuple[int, int, str]] = []
    at = Progress(step=3, steps=9, loss=1.2345, examples_per_s=20.0)
    training._show_step(lambda *told: shown.append(told), 64, at)
    ((step, steps, note),) = shown
    assert (step, steps) == (3, 9)
    assert "loss 1.234" in note
    assert "1,280 tokens/s" in note


def test_the_common_runner_trains_over_models_and_seeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = load(find("mamba_train"))
    assert experiment.run is run
    assert experiment.defaults() == asdict(TrainOptions())
    log = tmp_path / "runs.jsonl"
    grid = ["mamba_train.model=mamba_simple,s4d", "mamba_train.n_pairs=[1,3]"]
    fixed = {"epochs": 1, "dataset": "mqar"}
    small = TINY | fixed
    grid += [f"mamba_train.{name}={value}" for name, value in small.items()]
    words = ["--experiment", "mamba_train", "--repeats", "2", "--grid", *grid]
    words += ["--log-path", str(log)]
    for already in (0, 4):
        assert run_and_log.main(words) == 0
        assert f"{already} of 4 already in" in capsys.readouterr().out
    found = [parse_line(line) for line in log.read_text().splitlines()]
    asked = [(r["params"]["model"], r["seed"]) for r in found]
    assert asked == [(m, s) for m in ("mamba_simple", "s4d") for s in (0, 1)]
    assert check_logs.main([str(log)]) == 0
    alone = run(TrainOptions(**small | {"model": "s4d", "n_pairs": (1, 3), "seed": 1}))
    assert told(found[-1]["meta"]) == told(alone.metadata)


@pytest.mark.parametrize(
    ("dataset", "expected"), [("recall", 1.0), ("mqar", 1.0), ("python_docs", 0.02)]
)
def test_new_embeddings_are_as_large_as_the_dataset_wants(
    dataset: str, expected: float
) -> None:
    """The deviation of thousands of normal numbers, within 5 standard errors."""
    chosen = TrainOptions(dataset=dataset, seq_len=32, train_max_samples=50)
    task = training.make_task(chosen)
    for asked, deviation in ((0.0, expected), (0.5, 0.5)):
        model = training.make_model(replace(chosen, embedding_std=asked), task)
        weight = model.embedding.weight.detach()
        assert float(weight.std()) == pytest.approx(
            deviation, rel=5 / (2 * weight.numel()) ** 0.5
        )


def test_resuming_on_other_data_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two texts of the same words: every flag but --data-dir is the same."""
    words = "a b c d e f g h i j"
    for name, text in (("one", words), ("two", " ".join(reversed(words.split())))):
        (tmp_path / name).mkdir()
        write_text(tmp_path / name, f"{text}\n" * 9)
    flags = {"dataset": "wikitext2", "epochs": 1, "data_dir": tmp_path / "one"}
    assert training.main(tiny_words(tmp_path / "out", **flags)) == 0
    flags |= {"data_dir": tmp_path / "two", "resume": True}
    with pytest.raises(SystemExit) as stop:
        training.main(tiny_words(tmp_path / "out", **flags))
    assert stop.value.code == 2
    assert "data_sha256" in capsys.readouterr().err


def test_a_record_that_contradicts_itself_is_found() -> None:
    honest = run(options(epochs=2)).metadata
    assert training.problems(honest) == []
    assert training.problems(honest | {"best": {**honest["best"], "val_loss": 0.0}})
    assert training.problems(honest | {"n_params": {**honest["n_params"], "total": 1}})


def test_the_log_may_lie_elsewhere(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "all.jsonl"
    assert training.main(tiny_words(tmp_path / "out", log_path=log, epochs=1)) == 0
    (record,) = map(parse_line, log.read_text().splitlines())
    assert record["experiment"] == "mamba_train"
    assert not (tmp_path / "out" / "train_runs.jsonl").exists()
