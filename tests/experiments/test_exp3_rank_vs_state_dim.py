"""Experiment 3: theory on every set, decided by fractions; faults; perturbation."""

import itertools
import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import exp3_rank_vs_state_dim as exp3
from experiments.common import InputError

MODULE = "experiments.exp3_rank_vs_state_dim"


def fraction_rank(matrix):
    rows, rank = [list(row) for row in matrix], 0
    for column in range(len(rows[0]) if rows else 0):
        pivot = next((r for r in range(rank, len(rows)) if rows[r][column]), None)
        if pivot is None:
            continue
        rows[rank], rows[pivot] = rows[pivot], rows[rank]
        for r in range(rank + 1, len(rows)):
            factor = rows[r][column] / rows[rank][column]
            rows[r] = [x - factor * y for x, y in zip(rows[r], rows[rank], strict=True)]
        rank += 1
    return rank


def rational_ranks(a, b, c, T):
    """All three ranks over the rationals, the second over every choice of rows."""
    a, b, c = ([Fraction(float(x)) for x in values] for values in (a, b, c))
    states = list(zip(a, b, c, strict=True))
    lag = [sum((z * x**k * y for x, y, z in states), Fraction(0)) for k in range(T)]
    M = [[lag[t - s] if s <= t else Fraction(0) for s in range(T)] for t in range(T)]
    choices = itertools.chain.from_iterable(
        itertools.combinations(range(T), size) for size in range(1, T + 1)
    )
    semiseparable = max(
        fraction_rank([M[t][: rows[0] + 1] for t in rows]) for rows in choices
    )
    generator = fraction_rank([[x**t for x in a] for t in range(T)])
    return {
        "generator": generator,
        "semiseparable": semiseparable,
        "ordinary": fraction_rank(M),
    }


def system(a, b, c):
    return exp3.System(
        "test", np.array(a, float), np.array(b, float), np.array(c, float)
    )


entries = st.tuples(
    st.sampled_from([-1.0, -0.5, 0.0, 0.25, 0.5, 0.75, 1.0]),
    st.sampled_from([1.0, 2.0, -1.0, 0.0]),
    st.sampled_from([1.0, -1.0, 0.5]),
)


@settings(deadline=None, max_examples=80)
@given(st.lists(entries, min_size=1, max_size=6), st.integers(1, 6))
def test_theory_and_exact_ranks_against_brute_force(states, T):
    test = system(*zip(*states, strict=True))
    expected = rational_ranks(test.a, test.b, test.c, T)
    assert exp3.exact_ranks(test, T) == expected
    theory = exp3.theory(test, T)
    row = exp3.row_of(test, T, 0)
    assert (theory["generator"], theory["ordinary"]) == (
        expected["generator"],
        expected["ordinary"],
    )
    if row["semiseparable_relation"] == "=":
        assert theory["semiseparable"] == expected["semiseparable"]
    else:
        assert theory["semiseparable"] > 0
        assert expected["semiseparable"] <= theory["semiseparable"]


def test_beyond_the_ceiling_equality_needs_positive_weights():
    cancelling = system((1.0, -1.0), (1.0, 1.0), (1.0, -1.0))  # T = 1: M = [0]
    assert exp3.row_of(cancelling, 1, 0)["semiseparable_relation"] == "<="
    assert exp3.exact_ranks(cancelling, 1)["semiseparable"] == 0
    positive = system((1.0, -1.0), (1.0, 1.0), (1.0, 1.0))
    assert exp3.row_of(positive, 1, 0)["semiseparable_relation"] == "="


# set: generator, semiseparable and ordinary rank at T = 15, from the paper's theory
AT_15 = {
    "distinct": (4, 4, 15),
    "repeated": (2, 2, 15),
    "nearly equal": (3, 3, 15),
    "one zero": (3, 3, 15),
    "all zero": (1, 1, 15),
    "negative": (4, 4, 15),
    "signs": (2, 2, 15),
    "complex pairs": (4, 4, 15),
    "N > ceiling": (10, 8, 15),
    "N > T": (15, 8, 15),
    "silent state": (3, 2, 15),
    "zero diagonal": (2, 2, 14),
    "cancelled": (1, 0, 0),
    "roots of unity": (5, 5, 15),
}


def test_every_hand_made_set():
    result = exp3.run(T_values=(15,), seeds=(3,), random_n=())
    rows = {row["set"]: row for row in result.metadata["rows"]}
    assert rows.keys() == AT_15.keys()
    for name, expected in AT_15.items():
        assert tuple(rows[name]["exact"][rank] for rank in exp3.RANKS) == expected, name
    assert result.passed
    # three decays within 2e-9 of one another: floating point sees fewer
    assert rows["nearly equal"]["float"]["semiseparable"] < 3


@pytest.mark.parametrize("T", [1, 2, 3, 5])
def test_short_sequences_pass(T):
    assert exp3.run(T_values=(T,), seeds=(0, 5), random_n=(1, 4)).passed


def test_a_perturbed_kernel_fails(monkeypatch):
    kernel = exp3.ssm_kernel

    def perturbed(*args):
        M = kernel(*args)
        return M * (1 + 1e-6 * np.random.default_rng(0).standard_normal(M.shape))

    monkeypatch.setattr(exp3, "ssm_kernel", perturbed)
    result = exp3.run(T_values=(15,), seeds=(0,), random_n=())
    assert result.passed is False
    assert exp3.CLAIM in exp3.problems(result.metadata)[0]


@pytest.mark.parametrize("rank", exp3.RANKS)
def test_a_forged_record_is_found(rank):
    metadata = exp3.run(T_values=(9,), seeds=(0,), random_n=(2,)).metadata
    forged = json.loads(json.dumps(metadata))
    assert exp3.problems(forged) == []
    forged["rows"][0]["exact"][rank] += 1
    assert len(exp3.problems(forged)) == 1


def test_decays_travel_as_json_and_the_picture_shows_each_set():
    result = exp3.run(T_values=(9,), seeds=(0,), random_n=())
    pairs = next(r for r in result.metadata["rows"] if r["set"] == "complex pairs")
    assert pairs["decays"][0] == "0.8+0.3j"
    figure = exp3.draw([result])
    names = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert [name.rpartition(" ")[0] for name in names] == list(AT_15)


def test_bad_arguments():
    with pytest.raises(InputError, match="random_n: got 0"):
        exp3.run(random_n=(0,))
    with pytest.raises(InputError, match="seeds: got"):
        exp3.run(seeds=(1, 1))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--T-values 30 15", "T_values: got (30, 15)"),
        ("--T-values 15 15", "T_values: got (15, 15)"),
        ("--T-values", "T_values: got ()"),
        ("--T-values 0", "T_values: got 0"),
        ("--T-values abc", "abc"),
        ("--seeds", "seeds: got ()"),
        ("--seeds -1", "seeds: got -1"),
        ("--T-values 5 --plot --plot-path {file}/x.png", "x.png"),
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
