"""Sequence models on signatures: what is scored, what is run, and figure 1 in small."""

import math
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from experiments.common import ExperimentResult, InputError
from lcde import sm_toy
from lcde._sequence_model import SequenceModel
from lcde._watch import Hooks, Watch
from lcde.config import SMToyConfig
from lcde.sm_toy import SMToyOptions, run, run_sm_toy_experiment, squared_error, train

Array = np.ndarray


def levy_term(paths: Array) -> Array:
    """int_{s<t} dX^1_s dX^2_t of piecewise linear paths, in float64."""
    steps = np.diff(paths.astype(np.float64), axis=1)
    before = paths[:, :-1, 0] - paths[:, :1, 0]  # of X^1, where each piece begins
    return ((before + steps[..., 0] / 2) * steps[..., 1]).sum(1)


def write_paths(folder: Path, n: int, length: int, seed: int = 0) -> Path:
    """Random walks in 2 dimensions and their labels, as the published files hold them.

    Walks start at their first point, and nothing is added before it.
    """
    rng = np.random.default_rng(seed)
    paths = rng.normal(size=(n, length, 2)).round().cumsum(1)
    labels = levy_term(paths)
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in (("data", paths), ("labels", labels)):
        scaled = values / np.abs(values).max()
        np.save(folder / f"{name}_2.npy", scaled.astype(np.float32))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_paths(tmp_path_factory.mktemp("paths"), n=60, length=9)


def options(data: Path, **changed: Any) -> SMToyOptions:
    tiny: dict[str, Any] = {"hidden_dim": 6, "state_dim": 4, "batch_size": 7}
    tiny |= {"n_train": 30, "n_val": 13, "num_epochs": 2, "eval_every": 3}
    tiny |= {"learning_rate": 1e-2, "device": "cpu", "data_dir": str(data)}
    return SMToyOptions(**tiny | changed)


def test_published_settings_are_the_defaults() -> None:
    ours, published = asdict(SMToyOptions()), asdict(SMToyConfig())
    shared = ours.keys() & published.keys()
    assert len(shared) == 12
    assert {k: ours[k] for k in shared} == {k: published[k] for k in shared}
    asked = SMToyOptions()
    model, training = asked.architecture(), asked.training()
    assert (model.activation, model.use_layernorm, model.dropout) == ("GELU", False, 0)
    assert not model.continuous_output
    assert not model.embedding
    assert (training.weight_decay, training.grad_clip) == (0, 0)
    assert (training.lr, training.epochs, training.schedule) == (1e-4, 401, "constant")


class Constant(nn.Module):
    """Predicts 0.5 of everything."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.full((len(x), 1), 0.5)


def test_the_error_is_the_mean_of_squares() -> None:
    labels = torch.tensor([0.5, -1.0, 2.0])
    scores = squared_error(Constant(), (torch.zeros(3, 5, 2), labels))
    assert float(scores.loss) == pytest.approx(1.5**2 + 1.5**2)
    assert float(scores.scored) == 3


def test_the_error_reported_is_that_of_the_model_kept(
    data: Path, tmp_path: Path
) -> None:
    asked = options(data, model="S5")
    watch = Watch()
    meta = train(asked, tmp_path, resume=False, watch=watch).metadata
    assert [entry["step"] for entry in meta["curve"]] == [3, 5, 6, 9, 10]
    assert meta["steps"] == 10
    kept = SequenceModel(asked.architecture())
    kept.load_state_dict(load_file(max(tmp_path.iterdir()) / "model.safetensors"))
    paths = np.load(data / "data_2.npy")[-13:]
    labels = np.load(data / "labels_2.npy")[-13:]
    with torch.no_grad():
        errors = kept(torch.from_numpy(paths))[:, 0].numpy() - labels
    assert meta["rmse"] == pytest.approx(np.sqrt((errors**2).mean()), rel=1e-5)
    assert meta["rmse_zero"] == pytest.approx(np.sqrt((labels**2).mean()), rel=1e-6)
    assert sm_toy.problems(meta) == []
    assert sm_toy.problems(meta | {"rmse": 0.0})
    assert sm_toy.problems(meta | {"steps": 9})
    shown = ("model", "input_dim", "depth", "nonlinear", "hidden_dim", "state_dim")
    assert [meta[k] for k in shown] == [asdict(asked)[k] for k in shown]


def test_a_run_is_of_its_seed_and_ends_where_asked(data: Path) -> None:
    asked = options(data, max_steps=4, depth=1)
    first, again = (run(asked).metadata["curve"] for _ in range(2))
    other = run(replace(asked, seed=1)).metadata["curve"]
    assert [entry["step"] for entry in first] == [3, 4]
    for a, b, c in zip(first, again, other, strict=True):
        assert a | {"seconds": 0} == b | {"seconds": 0}
        assert a["val_rmse"] == math.sqrt(a["val_loss"])
        assert a["val_rmse"] != c["val_rmse"]


def test_the_driver_runs_every_combination_with_its_own_seed() -> None:
    asked: list[dict[str, Any]] = []

    def keep(run: Any, values: dict[str, Any]) -> ExperimentResult:
        asked.append(values)
        return ExperimentResult("sm_toy", "made up")

    config = SMToyConfig(runs=2, model_names=("S5", "Mamba"), hidden_dim=7, n_val=9)
    hooks = Hooks(keep=keep)
    results = run_sm_toy_experiment(config, seed=5, hooks=hooks)
    assert len(results) == len(asked) == 2 * 2 * 2 * 3
    names = ("model", "seed", "input_dim", "depth", "nonlinear")
    assert {tuple(values[k] for k in names) for values in asked} == {
        (model, seed, dim, depth, nonlinear)
        for model in ("S5", "Mamba")
        for seed in (5, 6)
        for dim in (2, 3)
        for depth, nonlinear in ((2, True), (2, False), (1, False))
    }
    same = asdict(config).keys() & asked[0].keys()
    for values in asked:
        assert {k: values[k] for k in same} == {k: asdict(config)[k] for k in same}


WRONG = [
    ({"model": "S6"}, "model: got 'S6'"),
    ({"depth": 0}, "depth: got 0"),
    ({"input_dim": 4}, "dimension: got 4"),
    ({"n_train": 48}, "n_train + n_val: got 61"),
    ({"learning_rate": 0.0}, "lr: got 0.0"),
    ({"max_steps": -1}, "max_steps: got -1"),
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


def test_the_picture_shows_every_curve_and_the_level_of_zero(data: Path) -> None:
    results = [run(options(data, num_epochs=1, depth=depth)) for depth in (1, 2)]
    (ax,) = sm_toy.PICTURES[0].render(results).axes
    for line, result in zip(ax.lines, results, strict=False):
        points = [(e["step"], e["val_rmse"]) for e in result.metadata["curve"]]
        assert np.asarray(line.get_xydata()).tolist() == [list(p) for p in points]
    assert np.unique(ax.lines[2].get_ydata()) == results[0].metadata["rmse_zero"]
    assert len(ax.lines) == 3


def test_options_say_what_each_is() -> None:
    told = SMToyOptions.__doc__ or ""
    assert all(f"        {field.name}: " in told for field in fields(SMToyOptions))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["S4", "S5"])
def test_only_nonlinear_depth_2_learns_a_signature(model: str, tmp_path: Path) -> None:
    """Figure 1 in small, against the level of predicting zero (published: 1.00, 1.00
    and 0.32 of it after 10,000 steps at 256 channels)."""
    write_paths(tmp_path, n=5_000, length=20)
    levels = {}
    for depth, nonlinear in ((1, False), (2, False), (2, True)):
        asked = SMToyOptions(
            model=model,
            depth=depth,
            nonlinear=nonlinear,
            hidden_dim=32,
            state_dim=32,
            learning_rate=3e-3,
            num_epochs=10,
            n_train=4_000,
            n_val=1_000,
            eval_every=0,
            device="cpu",
            data_dir=str(tmp_path),
        )
        meta = run(asked).metadata
        levels[depth, nonlinear] = meta["rmse"] / meta["rmse_zero"]
    assert 0.97 < levels[1, False] < 1.1, levels
    assert 0.97 < levels[2, False] < 1.1, levels
    assert levels[2, True] < 0.6, levels
