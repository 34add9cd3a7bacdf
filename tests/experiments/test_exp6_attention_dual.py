"""exp6: decisions and duals as theory has them, and a suite that can fail."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import exp6_attention_dual as exp6
from experiments.attention_dual import attention_dual, new_columns
from experiments.common import InputError
from experiments.kernels import recurrence

ROOT = Path(__file__).resolve().parents[2]


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 17), st.integers(1, 12), st.integers(0, 10**6))
def test_every_decision_is_theorys_and_every_dual_verifies(T, N, seed):
    result = exp6.run(T=T, N=N, seed=seed)
    assert result.passed, exp6.problems(result.metadata)
    for record in result.metadata["kernels"]:
        assert record["exact"]
        assert record["difference"] <= 1e-10
        assert not record["narrower_dual"]


@pytest.mark.parametrize(("T", "N"), [(1, 1), (24, 3), (6, 24), (30, 4)])
def test_width_n_suffices_for_n_states_and_two_do_not_for_the_counterexamples(T, N):
    records = exp6.run(T=T, N=N).metadata["kernels"]
    by_name = {(record["name"], record["T"]): record for record in records}
    most = min(N, (T + 1) // 2)
    assert by_name["diagonal SSM", T]["new_columns"] == [most]
    assert by_name["diagonal SSM", T]["has_dual"]
    assert by_name["random content", T]["new_columns"] == [most]
    for length in {4, max(T, 4)}:
        for name in ("2I + subdiagonal", "I + E[T, 1]", "decays 1 and 0"):
            record = by_name[name, length]
            assert record["new_columns"] == [length - 1]
            assert record["semiseparable_rank"] == record["state_size"] == 2
            assert not record["has_dual"]
            assert record["constructed_width"] == length - 1


@pytest.mark.parametrize("T", [4, 5, 11])
def test_counterexamples_are_what_their_names_say(T):
    E = np.zeros((T, T), int)
    E[T - 1, 0] = 1
    bidiagonal, corner, zero_decay = (
        make(T).M for make in (exp6.bidiagonal, exp6.corner, exp6.zero_decay)
    )
    assert (bidiagonal == 2 * np.eye(T) + np.diag(np.ones(T - 1), -1)).all()
    assert (corner == np.eye(T) + E).all()
    assert (zero_decay == np.tril(np.ones((T, T))) + np.eye(T)).all()


@pytest.mark.parametrize("make", [exp6.bidiagonal, exp6.corner, exp6.zero_decay])
@pytest.mark.parametrize("T", [4, 9])
def test_counterexamples_are_recurrences_of_two_states(make, T):
    example = make(T)
    ssm = (array.astype(float) for array in (example.a, example.b, example.c))
    responses, _ = recurrence(*ssm, np.eye(T))  # to an impulse at each step
    assert (responses == example.M).all()


def test_diagonal_ssm_is_the_impulse_response_of_distinct_nonzero_decays():
    T, N = 9, 4
    M, count = exp6.diagonal_ssm(T, N)
    decays = np.array([8, 7, 6, 5]) / 9
    ones = np.ones((T, N))
    responses, _ = recurrence(ones * decays, ones, ones, np.eye(T))
    np.testing.assert_allclose(M.astype(float), responses, rtol=0, atol=1e-14)
    assert count == len(new_columns(M)) == 4


@pytest.mark.parametrize(
    "perturb",
    [
        lambda M: M * (1 + 1e-6),
        lambda M: M + 1e-6,
        lambda M: M + 1e-6 * np.eye(len(M)) * np.abs(M).max(),
    ],
)
def test_a_perturbed_kernel_fails_the_run(monkeypatch, perturb):
    kernel = exp6.dual_kernel
    monkeypatch.setattr(exp6, "dual_kernel", lambda dual: perturb(kernel(dual)))
    result = exp6.run(T=8, N=2)
    assert result.passed is False
    assert all("misses the kernel" in line for line in exp6.problems(result.metadata))


def test_a_decision_that_always_finds_a_dual_fails_the_run(monkeypatch):
    monkeypatch.setattr(
        exp6,
        "attention_dual",
        lambda M, N: attention_dual(M, max(N, len(M))),
    )
    result = exp6.run(T=8, N=2)
    assert result.passed is False
    assert any("has_dual is True" in line for line in exp6.problems(result.metadata))
    assert any("narrower" in line for line in exp6.problems(result.metadata))


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("has_dual", True, "has_dual"),
        ("new_columns", [2], "new_columns"),
        ("blocks", [[0, 1], [1, 4]], "blocks"),
        ("narrower_dual", True, "narrower"),
        ("exact", False, "not exactly"),
        ("difference", 1.1e-10, "misses"),
        ("difference", "NaN", "misses"),
        ("difference", "Infinity", "misses"),
        ("semiseparable_rank", 3, "semiseparable rank"),
        ("ssm_difference", 1e-300, "another kernel"),
    ],
)
def test_a_record_that_breaks_the_claim_is_named(key, value, complaint):
    metadata = json.loads(json.dumps(exp6.run(T=5, N=2).metadata))
    assert exp6.problems(metadata) == []
    record = next(r for r in metadata["kernels"] if r["name"] == "2I + subdiagonal")
    record[key] = value
    (line,) = exp6.problems(metadata)
    assert complaint in line
    assert "2I + subdiagonal (T = 4, width 2)" in line


def test_a_record_without_kernels_shows_nothing():
    metadata = exp6.run(T=2, N=1).metadata
    assert exp6.problems(metadata | {"kernels": []})


def test_the_seed_draws_the_kernels_and_nothing_else_does():
    first, again, other = (exp6.examples(9, 3, seed) for seed in (1, 1, 2))
    for index, random in enumerate([False, True, False, True]):
        assert (first[index].M == again[index].M).all()
        assert (first[index].M == other[index].M).all() == (not random)


def test_the_picture_shows_kernel_mask_and_completion():
    result = exp6.run(T=12, N=3)
    figure = exp6.draw([result])
    kernel, mask, content = (
        np.ma.filled(ax.images[0].get_array(), np.nan) for ax in figure.axes[:3]
    )
    M = exp6.blocks_of_ssms(12, 3).M.astype(float)
    np.testing.assert_allclose(np.nan_to_num(kernel), M, rtol=0, atol=1e-12)
    assert (np.isnan(mask) == (M == 0)).all()
    assert (np.isnan(content) == ((M + M.T) == 0)).all()
    lower = M != 0
    np.testing.assert_allclose((mask * content)[lower], M[lower], rtol=0, atol=1e-12)
    for start, stop in exp6.blocks_of_ssms(12, 3).blocks:
        block = content[start:stop, start:stop]
        assert not np.isnan(block).any()
        assert np.linalg.matrix_rank(block) <= 3


@pytest.mark.parametrize(
    ("name", "value"), [("T", 0), ("T", -3), ("N", 0), ("T", 129), ("N", 10**9)]
)
def test_a_size_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(InputError, match=rf"{name}: got {value}"):
        exp6.run(**{name: value})


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--T", "0"], "T: got 0; expected an integer of at least 1"),
        (["--T", "abc"], "abc"),
        (["--N", "0"], "N: got 0; expected an integer of at least 1"),
        (["--T", "1000000"], "at most 128"),
        (["--seed", "-1"], "seed: got -1"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, told):
    done = _command(*arguments)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_more_states_than_steps_and_a_single_step_work():
    for arguments in (["--T", "3", "--N", "7"], ["--T", "1"]):
        done = _command(*arguments)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("[PASS] exp6_attention_dual")


def _command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "experiments.exp6_attention_dual", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
