"""The benchmark runs, tells times and bytes, and judges the bytes alone."""

import json

import numpy as np
import pytest
import torch

from benchmarks import generation
from experiments.exp4_time_scaling import t_quantile
from ssm.models.cache import MambaCache

TINY = ["--tokens", "40", "--contexts", "8", "16", "32", "--runs", "2", "--steps", "3"]
TINY += ["--d-model", "8", "--n-layers", "1"]


def curve_of(report, model):
    return next(c for c in report["at_contexts"] if c["model"] == model)


def test_the_command_prints_draws_and_stores_the_report(run_module, tmp_path):
    path, picture = tmp_path / "new folder" / "report.json", tmp_path / "picture.png"
    flags = ("--json", path, "--picture", picture)
    done = run_module("benchmarks.generation", *TINY, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    for word in ("late/early", "prefill", "per 1000 tokens", "does not show"):
        assert word in done.stdout
    report = json.loads(path.read_text())
    assert report["windows"] == {"early": [2, 6], "late": [36, 40]}
    for entry in report["long_generation"]:
        assert len(entry["runs"]) == 2
        assert all(run["ratio"] > 0 for run in entry["runs"])
        assert all(
            run["bytes_differ"] == (entry["model"] == "transformer")
            for run in entry["runs"]
        )
    sizes = {point["bytes"] for point in curve_of(report, "mamba")["points"]}
    assert len(sizes) == 1
    assert curve_of(report, "mamba")["slope_bytes"]["slope"] == 0


def test_attention_keeps_two_vectors_a_token(monkeypatch):
    lms = generation.models(d_model=8, n_layers=3, seed=0)
    with torch.inference_mode():
        curves = generation.at_contexts(lms, (4, 8, 12), steps=1, seed=0)
    slope = curve_of({"at_contexts": curves}, "transformer")["slope_bytes"]
    assert slope["slope"] == pytest.approx(3 * 2 * 8 * 4)  # layers, k and v, d, float32
    assert slope["ci95"] == pytest.approx([slope["slope"]] * 2)


def test_a_cache_that_grows_is_exit_status_1(monkeypatch, capsys):
    true = MambaCache.bytes.fget
    calls = []
    growing = property(lambda cache: true(cache) + len(calls.append(0) or calls))
    monkeypatch.setattr(MambaCache, "bytes", growing)
    assert generation.main([*TINY, "--picture", ""]) == 1
    assert "FAILED the cache of mamba changed size" in capsys.readouterr().out


def test_the_windows_are_those_of_the_claim():
    assert generation.window(generation.EARLY, 2000) == slice(100, 300)
    assert generation.window(generation.LATE, 2000) == slice(1800, 2000)


def test_the_line_is_that_of_the_textbook():
    x = np.array([1.0, 2.0, 4.0, 7.0])
    y = 3 * x + np.array([0.1, -0.2, 0.3, 0.0])
    fit = generation.fit_line(x.tolist(), y.tolist())
    u = x - x.mean()
    slope = u @ y / (u @ u)
    residual = y - y.mean() - slope * u
    half = t_quantile(2) * np.sqrt(residual @ residual / 2 / (u @ u))
    assert fit["slope"] == pytest.approx(slope, rel=1e-12)
    assert fit["ci95"] == pytest.approx([slope - half, slope + half], rel=1e-10)
    assert generation.fit_line([1, 2], [3, 4]) == {"slope": None, "ci95": None}


def test_models_have_about_equally_many_parameters():
    lms = generation.models(d_model=128, n_layers=2, seed=0)
    counts = {name: lm.num_parameters() for name, lm in lms.items()}
    assert 0.8 < counts["mamba"] / counts["transformer"] < 1.25, counts


@pytest.mark.parametrize(
    "flags",
    [
        ("--tokens", "3"),
        ("--contexts", "9", "3"),
        ("--steps", "0"),
        ("--picture", "picture.txt"),
        ("--widht", "8"),
    ],
)
def test_faults_end_in_one_line_and_status_2(capsys, flags):
    with pytest.raises(SystemExit) as stop:
        generation.main([*TINY, *flags])
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
