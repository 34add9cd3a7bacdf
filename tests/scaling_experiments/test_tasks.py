"""Every task has the answers that an oracle finds; mixtures never score padding."""

import math

import numpy as np
import pytest
import torch

from data_dir.mqar import mqar_oracle
from data_dir.task import IGNORED
from experiments.common import InputError
from scaling_experiments._tasks import (
    LARGEST_VOCAB,
    TASKS,
    arrangement_bits,
    check_lengths,
    copy_oracle,
    copy_sequences,
    describe,
    find_task,
    mixture,
    needle_oracle,
    needle_sequences,
    recall_sequences,
)

VOCAB = 67


def generator(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("length", [1, 2, 13, 63, 64, 65, VOCAB])
def test_copying_asks_for_the_tokens_again(length):
    inputs, targets = copy_sequences(generator(), 20, length, VOCAB)
    assert inputs.shape == (20, 2 * length)
    assert torch.equal(targets, copy_oracle(inputs, VOCAB))
    assert int((targets != IGNORED).sum()) == 20 * length
    for row in inputs[:, :length].tolist():
        assert len(set(row)) == length


@pytest.mark.parametrize("length", [2, 3, 13, 63, 64, 65])
def test_the_needle_is_asked_for_at_the_end(length):
    inputs, targets = needle_sequences(generator(), 20, length, VOCAB)
    assert inputs.shape == (20, length + 1)
    assert torch.equal(targets, needle_oracle(inputs, VOCAB))
    assert ((inputs == VOCAB).sum(1) == 2).all()
    assert int((targets != IGNORED).sum()) == 20


def test_the_needle_lies_anywhere():
    inputs, _ = needle_sequences(generator(), 2000, 7, VOCAB)
    places = (inputs[:, :-1] == VOCAB).int().argmax(1)
    assert sorted(set(places.tolist())) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("length", [1, 5, 16])
def test_recall_asks_for_every_key(length):
    inputs, targets = recall_sequences(generator(), 20, length, VOCAB)
    assert inputs.shape == (20, 4 * length)
    assert torch.equal(targets, mqar_oracle(inputs, length))
    assert int((targets != IGNORED).sum()) == 20 * length


def test_tokens_are_below_the_size_that_the_task_states():
    for task in TASKS.values():
        split = task.draw(generator(), 200, 5, VOCAB)
        assert int(split.inputs.max()) == task.vocab_size(VOCAB) - 1 or task.distinct
        assert int(split.inputs.max()) < task.vocab_size(VOCAB)
        assert int(split.targets.max()) < task.vocab_size(VOCAB)


@pytest.mark.parametrize(("length", "vocab"), [(1, 2), (5, 7), (16, 64), (64, 64)])
def test_bits_are_the_logarithm_of_all_arrangements(length, vocab):
    exact = math.log2(math.perm(vocab, length))
    assert math.isclose(arrangement_bits(length, vocab), exact, rel_tol=1e-12)


def test_a_needle_is_as_much_to_keep_at_every_length():
    bits = describe("needle", (2, 50), 64)["content_bits"]
    assert bits == {"2": 6.0, "50": 6.0}


# --- mixtures


def a_mixture(name="copy", seed=3, **changes):
    sizes = {"lengths": (2, 5), "vocab": 11, "n_train": 300, "n_test": 40}
    return mixture(name, **sizes | changes, seed=seed)


@pytest.mark.parametrize("name", TASKS)
def test_a_mixture_has_each_length_equally_often_and_never_scores_padding(name):
    found = a_mixture(name)
    widths = {
        L: TASKS[name].draw(generator(), 1, L, 11).inputs.shape[1] for L in (2, 5)
    }
    for split, share in ((found.train, 150), (found.val, 40)):
        assert split.inputs.shape == (2 * share, widths[5])
        assert (split.targets[:share, widths[2] :] == IGNORED).all()
        scored = (split.targets != IGNORED).any(1)
        assert scored.all()
    assert {L: len(split.inputs) for L, split in found.tests.items()} == {2: 40, 5: 40}


def test_every_update_has_rows_of_its_own():
    assert len(a_mixture(n_train=301).train.inputs) >= 301


def test_the_parts_are_drawn_apart_and_from_the_seed_alone():
    found = a_mixture(lengths=(9,), n_test=300)
    parts = (found.train, found.val, found.tests[9])
    rows = [{tuple(row) for row in part.inputs.tolist()} for part in parts]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert not rows[i] & rows[j]
    torch.manual_seed(99)
    assert torch.equal(a_mixture(lengths=(9,)).train.inputs, found.train.inputs)
    other = a_mixture(lengths=(9,), seed=4)
    assert not torch.equal(other.train.inputs, found.train.inputs)


def test_a_longer_length_leaves_the_sequences_of_the_others_alone():
    wide = a_mixture(lengths=(2, 5, 7), n_train=450)
    assert torch.equal(wide.tests[5].inputs, a_mixture().tests[5].inputs)


# --- bad input


@pytest.mark.parametrize(
    ("name", "lengths", "vocab", "said"),
    [
        ("copi", (2,), 8, "did you mean copy?"),
        ("copy", (2, 9), 8, "at most vocab = 8"),
        ("recall", (9,), 8, "at most vocab = 8"),
        ("needle", (1,), 8, "at least 2"),
        ("copy", (4, 2), 8, "increasing"),
        ("copy", (), 8, "at least one value"),
        ("copy", (0,), 8, "at least 1"),
        ("copy", (1,), 1, "vocab: got 1"),
        ("copy", (1,), LARGEST_VOCAB + 1, "at most 8192"),
    ],
)
def test_bad_lengths_are_answered_in_one_line(name, lengths, vocab, said):
    with pytest.raises(InputError, match=said) as error:
        check_lengths(name, lengths, vocab)
    assert "\n" not in str(error.value)


def test_noise_may_be_longer_than_the_vocabulary():
    check_lengths("needle", (100,), 8)
    assert find_task("needle").unit == "tokens of noise"
