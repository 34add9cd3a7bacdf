"""Experiment 5: softmax against its definition, exact weights, controls, faults."""

import json
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import exp5_softmax_rank_growth as exp5
from experiments.common import InputError
from experiments.exact import PRIME, field_rank
from experiments.ranks import ceiling, exact_semiseparable_rank

MODULE = "experiments.exp5_softmax_rank_growth"


@pytest.fixture(scope="module")
def result():
    return exp5.run(T_values=(20, 40, 80), d_k=16, N=6, seed=1)


def test_ranks_of_softmax_and_of_both_controls(result):
    assert result.passed
    for row in result.metadata["rows"]:
        T = row["T"]
        assert row["softmax_semiseparable_exact"] == math.floor((T + 1) / 2)
        assert row["softmax_semiseparable"] == math.floor((T + 1) / 2)
        assert (row["uniform_semiseparable"], row["uniform_ordinary"]) == (1, T)
        assert (row["ssm_semiseparable"], row["ssm_ordinary"]) == (6, T)


def test_softmax_is_its_definition_row_by_row():
    logits = np.random.default_rng(0).normal(0, 3, (7, 7))
    M = exp5.causal_softmax(logits)
    for t in range(7):
        total = sum(math.exp(logits[t, r]) for r in range(t + 1))
        for s in range(7):
            expected = math.exp(logits[t, s]) / total if s <= t else 0.0
            assert M[t, s] == pytest.approx(expected, rel=1e-13, abs=0)


def test_softmax_does_not_overflow():
    M = exp5.causal_softmax(np.array([[1e6, 0.0], [1e6, -1e6]]))
    np.testing.assert_array_equal(M, [[1, 0], [1, 0]])


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 7), st.integers(1, 3), st.integers(0, 10**6))
def test_exact_weights_are_powers_of_a_generator(T, d_k, seed):
    q, k = exp5.queries_and_keys(T, d_k, seed)
    g = 31  # generates the multiplicative group of the field
    weights = exp5.exact_weights(q, k)
    for t in range(T):
        for s in range(T):
            n = sum(int(x) * int(y) for x, y in zip(q[t], k[s], strict=True))
            assert weights[t, s] == (pow(g, n, PRIME) if s <= t else 0)


def test_small_integer_softmax_has_the_rank_of_fractions():
    """Weights 2^(q k) as fractions; a repeated key makes the rank fall short."""
    q, k = [1, 2, -1, 3, 0, 4, -2], [0, 1, 2, 1, 3, -1, 2]
    M = [[Fraction(2) ** (x * y) for y in k[: t + 1]] for t, x in enumerate(q)]
    block = [row[:4] for row in M[3:]]  # the keys 0, 1, 2, 1: rank 3
    weights = exp5.exact_weights(np.array(q)[:, None], np.array(k)[:, None])
    determinant_rank = np.linalg.matrix_rank(np.array(block, float))
    assert determinant_rank == field_rank(weights[3:, :4]) == 3


def test_equal_keys_keep_the_exact_rank_at_1():
    q, _ = exp5.queries_and_keys(15, 4, 0)
    k = np.ones((15, 4), np.int64)
    assert exact_semiseparable_rank(exp5.exact_weights(q, k)) == 1


def test_inputs_are_standard_normal_and_a_shorter_T_is_a_prefix():
    q, k = exp5.queries_and_keys(400, 16, 3)
    shorter, _ = exp5.queries_and_keys(100, 16, 3)
    np.testing.assert_array_equal(q[:100], shorter)
    for values in (q * exp5.GRID, k * exp5.GRID):
        assert abs(values.mean()) < 0.05
        assert abs(values.std() - 1) < 0.05
    np.testing.assert_allclose(
        exp5.scores(q, k)[2, 5], (q[2] @ k[5]) * 2.0**-40 / 4, rtol=1e-12
    )


def test_one_dimension_is_exactly_full_rank_but_not_in_floats():
    outcome = exp5.run(T_values=(40, 80), d_k=1, N=4)
    last = outcome.metadata["rows"][-1]
    assert outcome.passed
    assert last["softmax_semiseparable_exact"] == ceiling(80)
    assert last["softmax_semiseparable"] < ceiling(80) / 2


def test_the_floating_point_rank_falls_with_the_tolerance(result):
    for row in result.metadata["temperatures"]:
        ranks = list(row["central_block_rank"].values())
        assert ranks == sorted(ranks)
    cold = result.metadata["temperatures"][0]
    assert cold["temperature"] == 0.01
    assert cold["central_block_rank"]["1e-13"] < ceiling(80)


@pytest.mark.parametrize(
    ("rank", "value"),
    [
        ("softmax_semiseparable_exact", 39),
        ("softmax_semiseparable", 20),
        ("uniform_semiseparable", 2),
        ("uniform_ordinary", 79),
        ("ssm_semiseparable", 7),
    ],
)
def test_a_forged_record_is_found(result, rank, value):
    forged = json.loads(json.dumps(result.metadata))
    assert exp5.problems(forged) == []
    forged["rows"][-1][rank] = value
    assert len(exp5.problems(forged)) == 1


@pytest.mark.parametrize("name", ["causal_softmax", "ssm_kernel"])
def test_a_perturbed_kernel_fails(monkeypatch, name):
    kernel = getattr(exp5, name)

    def perturbed(*args):
        M = kernel(*args)
        return M * (1 + 1e-6 * np.random.default_rng(0).standard_normal(M.shape))

    monkeypatch.setattr(exp5, name, perturbed)
    assert exp5.run(T_values=(20, 40), d_k=8, N=4).passed is False


def test_the_picture_draws_the_ceiling(result):
    line = exp5.draw([result]).axes[0].lines[0]
    assert list(line.get_xdata()) == [20, 40, 80]
    assert list(line.get_ydata()) == [10, 20, 40]


def test_a_control_above_the_ceiling_is_refused():
    with pytest.raises(
        InputError, match=r"N: got 8; expected at most .* = 5 at T = 10"
    ):
        exp5.run(T_values=(10, 20))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--T-values 30 15", "T_values: got (30, 15)"),
        ("--T-values 15 15", "T_values: got (15, 15)"),
        ("--T-values", "T_values: got ()"),
        ("--d-k 0", "d_k: got 0"),
        ("--N 0", "N: got 0"),
        ("--seed -1", "seed: got -1"),
        ("--plot --plot-path {file}/x.png", "x.png"),
    ],
)
def test_faults_are_one_line(flags, words, tmp_path, run_module):
    (tmp_path / "file").write_text("a regular file")
    argv = flags.format(file=tmp_path / "file").split()
    done = run_module(MODULE, *argv)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr
