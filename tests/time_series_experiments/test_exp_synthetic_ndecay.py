"""What the issue asks to be shown; the command as typed, again, and led astray."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments.common import InputError, RunLog
from experiments.registry import Entry, load
from time_series_experiments import exp_synthetic_ndecay as experiment
from time_series_experiments.data import Mixture, decay_kernel, population_mse, toeplitz
from time_series_experiments.exp_synthetic_ndecay import (
    NDecayOptions,
    measure,
    problems,
    run,
    run_seeds,
)
from time_series_experiments.models import MODELS, build_regressor

CLEAN = NDecayOptions(model="ssm_diag_linear", epochs=4, n_train=400, n_val=50)
FOUR = {"lambdas": (0.95, 0.8, 0.5, 0.2), "coeffs": (1.0, 0.7, 0.5, 0.3)}
TINY = NDecayOptions(epochs=2, T=9, n_train=20, n_val=7, n_test=11, batch_size=8)
SEEDS = range(5)


def metas(options: NDecayOptions, seeds: Any = SEEDS) -> list[dict[str, Any]]:
    results = list(run_seeds(options, list(seeds), lambda *_: None))
    assert all(result.passed for result in results)
    assert not any(problems(result.metadata) for result in results)
    return [result.metadata for result in results]


def test_two_decays_need_two_states() -> None:
    noise = CLEAN.noise_std**2
    errors = {}
    for N in (1, 2, 3):
        found = metas(replace(CLEAN, N=N))
        bound = found[0]["bound"]["mse"]
        errors[N] = [each["population_mse"] for each in found]
        assert min(errors[N]) >= bound * (1 - 1e-9)
        if N == 1:
            assert max(errors[N]) <= 1.1 * bound
        if N == 2:
            assert max(errors[N]) <= 4 * noise
            assert max(each["decay_error"] for each in found) < 1e-3
    assert min(errors[3]) >= min(errors[2]) - noise


@pytest.mark.parametrize("N", [1, 2, 3])
def test_four_decays_come_within_a_tenth_of_the_bound(N: int) -> None:
    options = replace(CLEAN, N=N, n_train=1000, epochs=1, **FOUR)
    for each in metas(options):
        assert each["population_mse"] <= 1.1 * each["bound"]["mse"]


def test_a_sampled_loss_may_lie_below_the_bound_and_the_exact_one_may_not() -> None:
    found = metas(replace(CLEAN, N=1, n_val=20), range(12))
    bound = found[0]["bound"]["mse"]
    below = [each["val_mse"] < bound for each in found]
    assert any(below)
    assert not all(below)


def test_a_seed_is_the_same_alone_and_in_company() -> None:
    options = replace(CLEAN, epochs=2, n_train=60)
    together = metas(options, [0, 7])[1]
    (alone,) = metas(replace(options, seed=7), [7])
    assert run(replace(options, seed=7)).metadata["decays"] == alone["decays"]
    assert together["population_mse"] == pytest.approx(alone["population_mse"])
    np.testing.assert_allclose(together["decays"], alone["decays"], rtol=1e-6)
    first = together["curve"][0]["val_mse"]
    assert first == pytest.approx(alone["curve"][0]["val_mse"], rel=1e-9)


def test_data_do_not_depend_on_the_model_or_on_global_randomness() -> None:
    one = experiment._draw(TINY)
    torch.manual_seed(0)
    other = experiment._draw(replace(TINY, model="rnn", N=5, epochs=1))
    for mine, theirs in zip(one[1:], other[1:], strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("name", [name for name in MODELS if name != CLEAN.model])
def test_every_model_learns(name: str) -> None:
    options = replace(TINY, model=name, N=3, epochs=5, n_train=64)
    result = run(options)
    curve = result.metadata["curve"]
    assert curve[-1]["train_mse"] < 0.9 * curve[0]["train_mse"]
    assert result.passed is None
    assert problems(result.metadata) == []
    again = run(options)
    assert again.metadata["population_mse"] == result.metadata["population_mse"]


def test_population_errors_of_sample_and_closed_form_agree() -> None:
    options = replace(TINY, model="s4d", noise_std=0.3, n_test=40_000)
    model = build_regressor("s4d", N=2, d_model=4, outputs=1, seed=0)
    exact = measure(model, options, linear=True)["population_mse"]
    sampled = measure(model, options, linear=False)
    distance = abs(sampled["population_mse"] - exact)
    assert distance < 5 * sampled["population_se"]
    assert sampled["population_se"] < 0.02 * exact


def test_a_record_with_another_error_than_its_kernel_s_is_found_out() -> None:
    (meta,) = metas(replace(CLEAN, epochs=1, n_train=60), [0])
    kernel = decay_kernel(meta["decays"], meta["weights"], 100)
    mixture = Mixture(CLEAN.lambdas, CLEAN.coeffs, 100, CLEAN.noise_std)
    exact = population_mse(toeplitz(kernel), mixture)
    assert meta["population_mse"] == pytest.approx(exact, rel=1e-9)
    assert "of the kernel" in problems(meta | {"population_mse": 2 * exact})[0]
    assert "noise floor" in problems(meta | {"noise_floor": 1.0})[0]


def test_the_registry_can_load_it() -> None:
    entry = Entry("synthetic_decays", experiment.__name__, "", "torch", ("torch",))
    assert load(entry).defaults()["T"] == 100


# --- the command ----------------------------------------------------------------------

SIZES = {"epochs": 1, "T": 9, "n-train": 20, "n-val": 7, "n-test": 11}
SIGNAL = ("--lambdas", "0.9", "0.5", "--coeffs", "1.0", "0.7", "--noise_std", "1e-4")
WORDS = ["--N_values", "1", "2", *SIGNAL]
WORDS += [word for name, n in SIZES.items() for word in (f"--{name}", str(n))]


def records(folder: Path) -> list[dict[str, Any]]:
    return list(RunLog(folder / "ts_runs.jsonl").records())


def test_each_run_is_kept_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*WORDS, "--models", "mamba_diag_exp", "transformer", "ssm_diag_linear"]
    words += ["--log_path", str(tmp_path / "ts_runs.jsonl"), "--seeds", "3", "4"]
    assert experiment.main(words) == 0
    cells = [
        (r["params"]["model"], r["params"]["N"], r["seed"]) for r in records(tmp_path)
    ]
    sized = ("mamba_diag_exp", "ssm_diag_linear")
    expected = {(m, N, s) for m in sized for N in (1, 2) for s in (3, 4)}
    # A transformer has no N: it is trained once.
    assert set(cells) == expected | {("transformer", 1, s) for s in (3, 4)}
    assert len(cells) == 10
    assert len(capsys.readouterr().out.splitlines()) == 10
    assert experiment.main([*words[:-1], "4", "5"]) == 0
    assert len(records(tmp_path)) == 15
    assert "10 runs are in" in capsys.readouterr().err
    assert experiment.main([*words, "--again"]) == 0
    assert len(records(tmp_path)) == 25


def test_a_stopped_command_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*WORDS, "--models", "rnn", "--log-path", str(tmp_path / "ts_runs.jsonl")]
    own, seen = experiment._train_one, []

    def stop_second(options: NDecayOptions, on_step: Any) -> Any:
        seen.append(options.N)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return own(options, on_step)

    monkeypatch.setattr(experiment, "_train_one", stop_second)
    with pytest.raises(SystemExit) as stop:
        experiment.main(words)
    assert stop.value.code == 130
    assert len(records(tmp_path)) == 1
    assert experiment.main(words) == 0
    assert seen == [1, 2, 2]
    assert [r["params"]["N"] for r in records(tmp_path)] == [1, 2]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--lambdas 0.9 --coeffs 1 2", "1 decays and 2 coefficients"),
        ("--lambdas 1.0 0.5", "|λ| < 1"),
        ("--lambdas -0.5 0.5", "mamba_diag_exp, whose states decay"),
        ("--models mamba --lambdas -0.5 0.5", "choose one of ssm_diag_linear"),
        ("--N-values 0", "at least 1"),
        ("--N-values 2 1", "strictly increasing"),
        ("--models mamba2", "did you mean mamba"),
        ("--epochs 0", "epochs: got 0"),
        ("--lr 0", "lr: got 0"),
        ("--T 0", "T: got 0"),
        ("--noise-std -1", "noise_std: got -1"),
        ("--n-trian 3", "did you mean --n-train"),
        ("--seed -1", "seed: got -1"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    words: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        experiment.main(
            [*words.split(), "--log-path", str(tmp_path / "new" / "ts_runs.jsonl")]
        )
    told = capsys.readouterr()
    assert stop.value.code == 2
    assert said in told.err
    assert told.err.startswith("error: ")
    assert len(told.err.splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_metadata_are_strict_json() -> None:
    (meta,) = metas(replace(CLEAN, epochs=1, n_train=60), [0])
    assert json.loads(json.dumps(meta, allow_nan=False)) == meta
    with pytest.raises(InputError, match="models: got 'none'"):
        run(replace(CLEAN, model="none"))
