"""Checkpoints of a run: whole or not there, and what is said of those gone wrong."""

import errno
import json
import math
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from experiments.common import InputError
from ssm import _checkpoints as checkpoints
from ssm.training import Batch, Scores, Trainer, TrainingConfig
from tests.ssm.models.helpers import tiny

FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


def store(folder: Path, step: int, value: float | None = None) -> Path:
    """The checkpoint of ``step``, whose numbers say which it is."""
    number = torch.tensor([float(step) if value is None else value, 0.5])
    files = {"model": {"w": number}, "optimizer": {"0.exp_avg": -number}}
    state = {"step": step, "epoch": step // 10, "curve": [{"loss": 1 / 3}]}
    return checkpoints.write(folder, step, files, state | {"settings": {}})


def found_in(folder: Path) -> tuple[checkpoints.Checkpoint, list[str]]:
    found, notices = checkpoints.newest(folder)
    assert found is not None
    return found, notices


def one_line(call: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- what is written is what is read --------------------------------------------------


def test_tensors_of_every_kind_come_back_as_they_were(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(4, 3, generator=generator)
    tied = torch.randn(2, 2, generator=generator)
    model: dict[str, Tensor] = {
        "float64": torch.tensor([math.pi, -0.0, 5e-324], dtype=torch.float64),
        "bfloat16": whole.bfloat16(),
        "complex64": torch.complex(whole, -whole),
        "int64": torch.tensor([2**62 + 1]),
        "bool": whole > 0,
        "scalar": torch.tensor(3.0),
        "empty": whole[:0],
        "transposed": whole.T,
        "part": whole[1:3, ::2],
        "tied": tied,
        "tied_too": tied,
        "learned": nn.Parameter(tied.clone()),
    }
    state = {"step": 7, "epoch": 1, "curve": [{"loss": 0.1 + 0.2}], "settings": {}}
    checkpoints.write(tmp_path / "new" / "folder", 7, {"model": model}, state)
    found, notices = found_in(tmp_path / "new" / "folder")
    assert not notices
    assert found.state == state
    for name, x in model.items():
        y = found.tensors["model"][name]
        assert (y.dtype, y.shape) == (x.dtype, x.shape), name
        assert torch.equal(y, x), name


def test_files_are_json_and_safetensors_and_the_last_two_stay(tmp_path: Path) -> None:
    for step in (1, 20, 300, 10**8 - 1):
        store(tmp_path, step)
    assert names(tmp_path) == ["checkpoint-00000300", "checkpoint-99999999"]
    for folder, step in zip(sorted(tmp_path.iterdir()), (300, 10**8 - 1), strict=True):
        assert names(folder) == list(FILES)
        assert load_file(folder / FILES[0])["w"][0] == step
        assert load_file(folder / FILES[1])["0.exp_avg"][0] == -step
        assert json.loads((folder / FILES[2]).read_text())["step"] == step


def test_a_run_begun_anew_replaces_the_checkpoints_of_the_one_before(
    tmp_path: Path,
) -> None:
    for step in (30, 40):
        store(tmp_path, step, 1.0)
    for step in (30, 10, 20):
        store(tmp_path, step, 2.0)
        found, _ = found_in(tmp_path)
        assert found.state["step"] == step
        assert found.tensors["model"]["w"][0] == 2.0
    assert names(tmp_path) == ["checkpoint-00000010", "checkpoint-00000020"]


# --- damage -------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def flipped(path: Path) -> None:
    """One bit of the last number (or of the last brace)."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def of_another_kind(path: Path) -> None:
    path.write_text("[1, 2]")


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE = (cut, emptied, flipped, of_another_kind, Path.unlink, a_folder)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    damage: Callable[[Path], None], file: str, tmp_path: Path
) -> None:
    paths = [store(tmp_path, step) for step in (10, 20)]
    damage(paths[1] / file)
    found, notices = found_in(tmp_path)
    assert found.path == paths[0]
    assert found.tensors["model"]["w"].tolist() == [10, 0.5]
    assert len(notices) == 1
    assert str(paths[1]) in notices[0]
    assert "the one before" in notices[0]
    damage(paths[0] / file)
    text = one_line(lambda: checkpoints.newest(tmp_path))
    assert text.startswith(f"resume: no checkpoint in {tmp_path} is whole; expected")


@pytest.mark.parametrize("was", ['"step": 20', '"epoch": 2', "0.3333333333333333"])
def test_a_changed_number_in_the_state_is_noticed(was: str, tmp_path: Path) -> None:
    store(tmp_path, 10)
    path = store(tmp_path, 20) / "state.json"
    text = path.read_text()
    assert text.count(was) == 1
    path.write_text(text.replace(was, was[:-1] + "1"))
    assert found_in(tmp_path)[0].state["step"] == 10


def test_a_folder_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert checkpoints.newest(tmp_path) == (None, [])
    assert checkpoints.newest(tmp_path / "absent") == (None, [])


# --- writers that fail --------------------------------------------------------------


@pytest.mark.parametrize("good", range(len(FILES)))
def test_a_full_disk_leaves_the_checkpoints_before(
    good: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (10, 20):
        store(tmp_path, step)
    flush, flushed = os.fsync, []

    def fills_up(file: int) -> None:
        flushed.append(file)
        if len(flushed) > good:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fills_up)
        text = one_line(lambda: store(tmp_path, 30))
    assert "(No space left on device)" in text
    assert "checkpoint-00000030 cannot be written" in text
    assert names(tmp_path) == ["checkpoint-00000010", "checkpoint-00000020"]
    assert found_in(tmp_path)[0].state["step"] == 20
    store(tmp_path, 30)
    assert found_in(tmp_path)[0].state["step"] == 30


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    text = one_line(lambda: store(tmp_path / "file" / "folder", 1))
    assert "expected a writable folder" in text


def test_what_killed_writers_left_is_ignored_and_cleared_away(tmp_path: Path) -> None:
    store(tmp_path, 10)
    for process in (os.getpid(), 1):  # in containers the number is often the same
        left = tmp_path / f".partial-checkpoint-00000020.{process}"
        left.mkdir()
        (left / "model.safetensors").write_bytes(b"\0" * 100)
    found, notices = found_in(tmp_path)
    assert found.state["step"] == 10
    assert not notices
    store(tmp_path, 20)
    assert names(tmp_path) == ["checkpoint-00000010", "checkpoint-00000020"]
    assert found_in(tmp_path)[0].state["step"] == 20


# --- through the trainer ------------------------------------------------------------

X = torch.linspace(-1, 1, 36, dtype=torch.float64).reshape(12, 3)
DATA = [X, X.flip(1)[:, :2].sin()]


def squares(model: nn.Module, batch: Batch) -> Scores:
    x, y = batch
    errors = (model(x) - y) ** 2
    return Scores(errors.sum(), torch.tensor(len(x)), {})


def linear(width: int = 2) -> nn.Module:
    model = nn.Sequential(nn.Linear(3, width), nn.Dropout(0.2), nn.Linear(width, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.linspace(-0.4, 0.7, parameter.numel()).view_as(parameter)
            )
    return model.double()


class Run:
    """Three epochs of three steps, and what was told."""

    def __init__(self, folder: Path | None, **changes: Any) -> None:
        self.notices: list[str] = []
        model = changes.pop("model", None) or linear()
        config = TrainingConfig(epochs=3, batch_size=4, lr=0.05, device="cpu")
        self.trainer = Trainer(
            model,
            changes.pop("objective", squares),
            config,
            folder=folder,
            on_notice=self.notices.append,
            settings={"lr": 0.05, "sizes": (3, 2), "name": "linear"} | changes,
        )

    def fit(self, *, resume: bool = False) -> list[dict[str, float]]:
        curve = self.trainer.fit(DATA, DATA, resume=resume)
        return [{k: v for k, v in e.items() if k != "seconds"} for e in curve]

    def resumed(self) -> list[dict[str, float]]:
        return self.fit(resume=True)


@pytest.mark.parametrize("file", FILES)
def test_a_run_resumed_from_the_checkpoint_before_ends_alike(
    file: str, tmp_path: Path
) -> None:
    before = Run(tmp_path)
    curve = before.fit()
    last = tmp_path / "checkpoint-00000009"
    cut(last / file)
    run = Run(tmp_path)
    assert run.resumed() == curve
    assert run.notices[0].startswith(f"{last} is damaged")
    assert run.notices[1] == (
        f"going on from {tmp_path / 'checkpoint-00000006'}, after epoch 2"
    )
    expected = before.trainer.model.state_dict()
    found, notices = found_in(tmp_path)
    assert (found.path, notices) == (last, [])  # written again, whole
    for name, x in found.tensors["model"].items():
        assert torch.equal(x, expected[name]), name


def test_with_nothing_to_resume_a_run_begins_and_says_so(tmp_path: Path) -> None:
    run = Run(tmp_path / "new")
    assert run.resumed() == Run(None).fit()
    assert run.notices == [
        f"no checkpoint in {tmp_path / 'new'}: starting from the beginning"
    ]


def test_resuming_needs_a_folder() -> None:
    assert one_line(Run(None).resumed).startswith("resume: got no folder; expected")


def test_other_settings_are_refused_and_listed(tmp_path: Path) -> None:
    Run(tmp_path).fit()
    run = Run(tmp_path, lr=0.1, name="linear", dropout=None)
    before = {k: x.clone() for k, x in run.trainer.model.state_dict().items()}
    text = one_line(run.resumed)
    assert "lr: 0.05 then, 0.1 now" in text
    assert "dropout: 'absent' then, None now" in text
    assert "name" not in text.replace("in another folder", "")
    assert "sizes" not in text  # a tuple then, a list now
    for name, x in run.trainer.model.state_dict().items():
        assert torch.equal(x, before[name])
    many = {f"key{i}": i for i in range(8)}
    assert "and 3 more" in one_line(Run(tmp_path, **many).resumed)


@pytest.mark.parametrize("other", [lambda: linear(5), lambda: nn.Linear(3, 2).double()])
def test_a_checkpoint_of_another_model_is_refused(
    other: Callable[[], nn.Module], tmp_path: Path
) -> None:
    Run(tmp_path).fit()
    text = one_line(Run(tmp_path, model=other()).resumed)
    assert str(tmp_path / "checkpoint-00000009") in text
    assert "expected a checkpoint of the same model" in text


def test_a_disk_that_fills_up_in_training_keeps_the_last_epoch(tmp_path: Path) -> None:
    wide = 2_000  # a checkpoint is larger than the limit, which a real write hits
    Run(tmp_path, model=linear(wide)).trainer._save()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    run = Run(tmp_path, model=linear(wide))
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
        text = one_line(run.fit)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "(File too large)" in text
    assert names(tmp_path) == ["checkpoint-00000000"]
    resumed = Run(tmp_path, model=linear(wide))
    assert resumed.resumed() == Run(None, model=linear(wide)).fit()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))[:, :2]


def test_tied_weights_are_kept_and_stay_tied(tmp_path: Path) -> None:
    runs = [Run(folder, model=Tied().double()) for folder in (tmp_path, tmp_path)]
    curve = runs[0].fit()
    assert runs[1].resumed() == curve
    model = runs[1].trainer.model
    assert model.a.weight is model.b.weight
    assert torch.equal(model.a.weight, runs[0].trainer.model.a.weight)


def sums(model: nn.Module, batch: Batch) -> Scores:
    squared = sum((p.abs() ** 2).sum() for p in model.parameters())
    return Scores(squared * len(batch[0]), torch.tensor(len(batch[0])), {})


@pytest.mark.parametrize(
    "pattern", ["mamba", "s4", "s5", "rwkv", "striped_hyena", "jamba"]
)
def test_states_of_every_kind_of_model_are_kept(pattern: str, tmp_path: Path) -> None:
    first = Run(tmp_path, model=tiny(pattern), objective=sums)
    curve = first.fit()
    again = Run(tmp_path, model=tiny(pattern, seed=1), objective=sums)
    assert again.resumed() == curve
    states = [run.trainer.optimizer.state_dict() for run in (first, again)]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    for i, entries in states[0]["state"].items():
        for name, x in entries.items():
            assert torch.equal(x, states[1]["state"][i][name]), (i, name)
    for name, x in first.trainer.model.state_dict().items():
        assert torch.equal(x, again.trainer.model.state_dict()[name]), name
