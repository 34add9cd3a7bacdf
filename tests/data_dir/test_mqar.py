"""Multi-query recall against its oracle, and its draws against Zoology's law."""

from collections import Counter

import numpy as np
import pytest
import torch

from data_dir.mqar import mqar, mqar_mixture, mqar_oracle
from data_dir.task import IGNORED
from experiments.common import InputError, to_json


def build(**changed):
    sizes = {"seq_len": 40, "n_pairs": 4, "seed": 0, "n_train": 3_000, "n_val": 100}
    return mqar(**sizes | {"n_keys": 9, "n_values": 11} | changed)


def slots(task) -> np.ndarray:
    """(n, n_pairs): in the order of the pairs, the slot in which each key is asked."""
    P = task.metadata["n_pairs"]
    found = []
    for tokens in task.train.inputs.tolist():
        behind = tokens[2 * P :]
        assert all(behind.count(key) == 1 for key in tokens[0 : 2 * P : 2])
        found.append([behind.index(key) for key in tokens[0 : 2 * P : 2]])
    places = np.array(found)
    assert not (places % 2).any()
    return places // 2


def law(n_slots: int, power_a: float) -> np.ndarray:
    p = np.arange(1, n_slots + 1) ** (power_a - 1)
    return p / p.sum()


def is_close(counts, p, n: int) -> bool:
    """Each count within five standard deviations of n p."""
    deviation = np.sqrt(n * p * (1 - p)) + 1e-9
    return bool((np.abs(counts - n * p) < 5 * deviation).all())


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"seq_len": 41, "n_pairs": 1},
        {"seq_len": 36, "n_pairs": 9, "n_keys": 9, "n_values": 9},
        {"seq_len": 4, "n_pairs": 1, "n_keys": 1, "n_values": 1},
        {"seq_len": 128, "n_pairs": 16, "n_keys": 4096, "n_values": 4096},
    ],
)
def test_the_oracle_gives_every_target(sizes):
    task = build(n_train=200, **sizes)
    P = task.metadata["n_pairs"]
    assert not task.last_only
    for split in (task.train, task.val):
        assert torch.equal(split.targets, mqar_oracle(split.inputs, P))
        assert split.targets.ne(IGNORED).sum(1).eq(P).all()
        assert 0 <= split.inputs.min() <= split.inputs.max() < task.vocab_size


def test_pairs_are_keys_and_values_each_once_and_drawn_uniformly():
    task = build()
    pairs = task.train.inputs[:, :8].reshape(-1, 4, 2).numpy()
    for tokens, first, size in ((pairs[..., 0], 0, 9), (pairs[..., 1], 9, 11)):
        assert tokens.min() == first
        assert tokens.max() == first + size - 1
        assert all(len(set(row)) == 4 for row in tokens.tolist())
        for column in tokens.T:  # in each place, or the order would tell them apart
            counts = np.bincount(column - first, minlength=size)
            assert is_close(counts, np.full(size, 1 / size), len(column))


def test_values_do_not_follow_from_keys():
    pairs = build().train.inputs[:, :2].numpy()
    joint = Counter(map(tuple, pairs.tolist()))
    counts = np.array(
        [joint[key, 9 + value] for key in range(9) for value in range(11)]
    )
    assert is_close(counts, np.full(99, 1 / 99), len(pairs))


@pytest.mark.parametrize("power_a", [0.01, 1.0, 2.5])
def test_one_query_follows_the_power_law(power_a):
    task = build(n_pairs=1, seq_len=22, n_train=20_000, power_a=power_a)
    counts = np.bincount(slots(task)[:, 0], minlength=10)
    assert is_close(counts, law(10, power_a), 20_000)


def test_two_queries_are_drawn_one_after_the_other_without_replacement():
    """P(slots {i, j}) = p_i p_j / (1 - p_i) + p_j p_i / (1 - p_j), either key first."""
    n = 20_000
    drawn = slots(build(n_pairs=2, seq_len=14, n_train=n))
    p = law(5, 0.01)
    pair = p[:, None] * p / (1 - p[:, None])
    either = (pair + pair.T) / 2
    np.fill_diagonal(either, 0)
    counts = np.zeros((5, 5))
    np.add.at(counts, (drawn[:, 0], drawn[:, 1]), 1)
    assert is_close(counts.ravel(), either.ravel(), n)


def test_every_order_of_the_queries_is_equally_likely():
    order = np.argsort(slots(build(n_pairs=3)), axis=1)
    counts = Counter(map(tuple, order.tolist()))
    assert len(counts) == 6
    assert is_close(np.array(list(counts.values())), np.full(6, 1 / 6), len(order))


def test_fillers_are_every_token_but_the_own_keys_equally_often():
    inputs = build().train.inputs.numpy()
    keys, behind = inputs[:, 0:8:2], inputs[:, 8:]
    own = (behind[:, :, None] == keys[:, None, :]).any(2)
    assert (own.sum(1) == 4).all()  # the queries themselves
    counts = np.bincount(behind[~own], minlength=20)
    taken = np.bincount(keys.ravel(), minlength=20)  # sequences that it cannot fill
    places = 28 * (len(inputs) - taken)
    deviation = np.sqrt(places / 16 * 15 / 16)  # 16 of the 20 tokens are free
    assert (np.abs(counts - places / 16) < 5 * deviation).all()


def test_bytes_follow_the_seed_and_no_global_generator():
    def data_bytes(seed):
        task = build(seed=seed, n_train=50)
        return b"".join(t.numpy().tobytes() for t in (*task.train, *task.val))

    first = data_bytes(0)
    with torch.random.fork_rng():
        torch.manual_seed(123)
        np.random.seed(123)  # noqa: NPY002  # the global one is what is meant
        assert data_bytes(0) == first
    assert data_bytes(1) != first


def test_splits_have_streams_of_their_own_and_share_no_sequence():
    task = build(n_val=3_000)
    assert torch.equal(task.train.inputs, build(n_val=7).train.inputs)
    rows = {tuple(row) for row in task.train.inputs.tolist()}
    assert rows.isdisjoint(tuple(row) for row in task.val.inputs.tolist())


def test_metadata_are_json_with_both_levels_of_guessing():
    metadata = build(n_train=9).metadata
    assert to_json(metadata) == metadata
    assert metadata["guess_accuracy"] == 1 / 11
    assert metadata["guess_shown_accuracy"] == 1 / 4


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"seq_len": 15}, "seq_len: got 15; expected at least 16 "),
        ({"seq_len": 1, "n_pairs": 1}, "seq_len: got 1; expected at least 4 "),
        ({"n_pairs": 0}, "n_pairs: got 0"),
        ({"n_keys": 3}, "n_keys: got 3; expected at least n_pairs = 4"),
        ({"n_values": 3}, "n_values: got 3; expected at least n_pairs = 4"),
        ({"n_train": 0}, "n_train: got 0"),
        ({"n_val": 0}, "n_val: got 0"),
        ({"power_a": 0.0}, "power_a: got 0.0"),
        ({"power_a": float("nan")}, "power_a: got nan"),
    ],
)
def test_bad_input_is_one_line(changed, complaint):
    with pytest.raises(InputError) as caught:
        build(**changed)
    assert str(caught.value).startswith(complaint)
    assert "\n" not in str(caught.value)


# --- several numbers of pairs ---------------------------------------------------------


def mixture(*n_pairs: int, **changed):
    sizes = {"seq_len": 40, "seed": 0, "n_train": 20, "n_val": 12}
    sizes |= {"n_keys": 9, "n_values": 11}
    return mqar_mixture(n_pairs=n_pairs, **sizes | changed)


def test_a_mixture_has_equally_many_sequences_of_each_number_of_pairs():
    task = mixture(1, 4, 9)
    for split, each in ((task.train, 20 // 3), (task.val, 12 // 3)):
        assert len(split.inputs) == len(split.targets) == 3 * each
        asked = split.targets.ne(IGNORED).sum(1)
        assert Counter(asked.tolist()) == {1: each, 4: each, 9: each}
        for inputs, targets, P in zip(*split, asked.tolist(), strict=True):
            assert torch.equal(targets[None], mqar_oracle(inputs[None], P))
    assert task.vocab_size == 20
    assert not task.last_only


def test_parts_are_slices_of_the_validation_split_and_known_to_the_oracle():
    task = mixture(2, 5, 7)
    assert [*task.parts] == ["2", "5", "7"]
    for name, part in task.parts.items():
        assert part.inputs.shape == (4, 40)
        assert torch.equal(part.targets, mqar_oracle(part.inputs, int(name)))
    for column in (0, 1):  # inputs, targets
        joined = torch.cat([part[column] for part in task.parts.values()])
        assert torch.equal(joined, task.val[column])


def test_numbers_of_pairs_do_not_change_each_others_sequences():
    two, three = mixture(3, 6, n_val=12), mixture(3, 5, 6, n_val=18)
    for name in ("3", "6"):
        assert torch.equal(two.parts[name].inputs, three.parts[name].inputs)
    alone = build(n_pairs=6, n_train=1, n_val=6).val
    assert torch.equal(two.parts["6"].inputs, alone.inputs)
    other = mixture(3, 6, seed=1)
    assert not torch.equal(two.val.inputs, other.val.inputs)


def test_the_metadata_of_a_mixture_hold_those_of_each_part():
    metadata = mixture(2, 4).metadata
    assert to_json(metadata) == metadata
    assert metadata["guess_accuracy"] == 1 / 11
    assert [*metadata["parts"]] == ["2", "4"]
    for n in (2, 4):
        part = metadata["parts"][str(n)]
        assert (part["n_pairs"], part["n_train"], part["n_val"]) == (n, 10, 6)
        assert part["guess_shown_accuracy"] == 1 / n


def test_fewer_sequences_than_numbers_of_pairs_still_give_one_of_each():
    task = mixture(1, 2, 3, n_train=2, n_val=1)
    for split in (task.train, task.val):
        assert split.targets.ne(IGNORED).sum(1).tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("n_pairs", "complaint"),
    [
        ((), "n_pairs: got (); expected at least one"),
        ((2, 2), "n_pairs: got (2, 2); expected values in strictly increasing"),
        ((4, 2), "n_pairs: got (4, 2); expected values in strictly increasing"),
        ((0, 2), "n_pairs: got 0"),
        ((2, 10), "n_keys: got 9; expected at least n_pairs = 10"),
    ],
)
def test_a_mixture_that_cannot_be_made_is_one_line(n_pairs, complaint):
    with pytest.raises(InputError) as caught:
        mixture(*n_pairs)
    assert str(caught.value).startswith(complaint)
    assert "\n" not in str(caught.value)
