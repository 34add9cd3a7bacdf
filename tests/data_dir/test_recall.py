"""Recall against its oracle, and its draws against the distributions promised."""

from collections import Counter

import numpy as np
import pytest
import torch

from data_dir.recall import N_KEYS, N_NOISE, recall, recall_oracle
from data_dir.task import IGNORED
from experiments.common import InputError, to_json

FIRST_NOISE = N_KEYS + 32


def chi_square_is_small(counts, expected) -> bool:
    """Within five standard deviations of the statistic's mean, the freedom."""
    freedom = len(counts) - 1
    statistic = np.sum((np.asarray(counts) - expected) ** 2 / np.asarray(expected))
    return bool(statistic < freedom + 5 * np.sqrt(2 * freedom))


def pairs(inputs: torch.Tensor) -> list[tuple[int, int, int]]:
    """(key, value, the value's position) of each sequence, by a scan for key tokens."""
    found = []
    for tokens in inputs.tolist():
        keys = [i for i, token in enumerate(tokens) if token < N_KEYS]
        assert len(keys) == 2, "no key but the pair's and the query"
        assert keys[1] == len(tokens) - 1
        assert tokens[keys[0]] == tokens[keys[1]]
        found.append((tokens[keys[0]], tokens[keys[0] + 1], keys[0] + 1))
    return found


@pytest.mark.parametrize(("seq_len", "gap"), [(64, 8), (17, 1), (3, 1), (40, 37)])
def test_the_oracle_finds_every_answer_and_nothing_else_is_scored(seq_len, gap):
    task = recall(seq_len=seq_len, gap=gap, seed=3, n_train=400, n_val=150)
    assert task.last_only
    for split, n in ((task.train, 400), (task.val, 150)):
        assert split.inputs.shape == split.targets.shape == (n, seq_len)
        assert torch.equal(split.targets[:, -1], recall_oracle(split.inputs))
        assert split.targets[:, :-1].eq(IGNORED).all()
        assert 0 <= split.inputs.min() <= split.inputs.max() < task.vocab_size


def test_the_pair_is_drawn_uniformly_and_stands_gap_steps_before_the_query():
    L, gap, n = 24, 5, 10_000
    found = pairs(recall(seq_len=L, gap=gap, seed=0, n_train=n).train.inputs)
    keys, values, places = (Counter(column) for column in zip(*found, strict=True))
    assert set(places) == set(range(1, L - gap))
    for counts, size in ((keys, N_KEYS), (values, 32), (places, L - 1 - gap)):
        assert len(counts) == size
        assert chi_square_is_small(list(counts.values()), np.full(size, n / size))


def test_distractors_are_values_and_noise_alike_so_that_the_key_is_needed():
    inputs = recall(seq_len=24, gap=5, seed=1).train.inputs
    counts = Counter(inputs.flatten().tolist())
    for key, value, _ in pairs(inputs):
        counts.subtract([key, value, key])
    assert not any(counts[key] for key in range(N_KEYS))
    distractors = [counts[token] for token in range(N_KEYS, FIRST_NOISE + N_NOISE)]
    assert sum(distractors) == 10_000 * 21
    assert chi_square_is_small(distractors, np.full(64, 10_000 * 21 / 64))


def test_a_fixed_lag_stays_at_the_level_that_the_draw_implies():
    """Right where the value stands there, or a distractor is that value by chance."""
    L, gap, n_val = 64, 8, 4_000
    metadata = recall(seq_len=L, gap=gap, seed=0, n_val=n_val).metadata
    there = 1 / (L - 1 - gap)
    expected = there + (1 - there) / 64
    deviation = np.sqrt(expected * (1 - expected) / n_val)
    assert abs(metadata["fixed_lag_accuracy"] - expected) < 4 * deviation
    assert metadata["guess_accuracy"] == 1 / 32


def test_a_fixed_lag_solves_the_task_where_only_one_place_is_legal():
    metadata = recall(seq_len=11, gap=9, seed=0, n_train=50, n_val=50).metadata
    assert (metadata["fixed_lag"], metadata["fixed_lag_accuracy"]) == (9, 1)


def test_the_controls_equal_their_definitions_on_a_small_draw():
    task = recall(seq_len=9, gap=2, seed=5, n_train=60, n_val=70, n_values=4)
    rows = [[*r, v] for r, v in zip(*inputs_and_answers(task.train), strict=True)]
    hits = {k: sum(r[8 - k] == r[-1] for r in rows) for k in range(1, 9)}
    assert task.metadata["fixed_lag"] == max(hits, key=lambda k: (hits[k], -k))

    right = lagged = 0
    for tokens, answer in zip(*inputs_and_answers(task.val), strict=True):
        seen = Counter(token for token in tokens if N_KEYS <= token < N_KEYS + 4)
        right += answer == min(seen, key=lambda token: (-seen[token], token))
        lagged += answer == tokens[8 - task.metadata["fixed_lag"]]
    metadata = task.metadata
    assert metadata["most_frequent_value_accuracy"] == pytest.approx(right / 70)
    assert metadata["fixed_lag_accuracy"] == pytest.approx(lagged / 70)


def inputs_and_answers(split):
    return split.inputs.tolist(), split.targets[:, -1].tolist()


def data_bytes(task) -> bytes:
    tensors = (*task.train, *task.val)
    return b"".join(tensor.numpy().tobytes() for tensor in tensors)


def test_bytes_follow_the_seed_and_no_global_generator():
    first = data_bytes(recall(seq_len=20, gap=3, seed=4, n_train=99, n_val=9))
    with torch.random.fork_rng():
        torch.manual_seed(123)
        np.random.seed(123)  # noqa: NPY002  # the global one is what is meant
        again = data_bytes(recall(seq_len=20, gap=3, seed=4, n_train=99, n_val=9))
    other = data_bytes(recall(seq_len=20, gap=3, seed=5, n_train=99, n_val=9))
    assert first == again
    assert first != other


def test_splits_have_streams_of_their_own_and_share_no_sequence():
    task = recall(seq_len=64, gap=8, seed=0, n_train=2_000, n_val=2_000)
    shorter = recall(seq_len=64, gap=8, seed=0, n_train=2_000, n_val=7)
    assert torch.equal(task.train.inputs, shorter.train.inputs)
    rows = {tuple(row) for row in task.train.inputs.tolist()}
    assert rows.isdisjoint(tuple(row) for row in task.val.inputs.tolist())


def test_metadata_are_json_and_name_the_parts_of_the_vocabulary():
    task = recall(seq_len=20, gap=3, seed=4, n_train=9, n_val=9, n_values=33)
    assert to_json(task.metadata) == task.metadata
    parts = [task.metadata[part] for part in ("n_keys", "n_values", "n_noise")]
    assert task.vocab_size == sum(parts) == 8 + 33 + 32


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"seq_len": 9}, "seq_len: got 9; expected at least 10 "),
        ({"gap": 0}, "gap: got 0"),
        ({"n_values": 1}, "n_values: got 1"),
        ({"n_train": 0}, "n_train: got 0"),
        ({"n_val": 0}, "n_val: got 0"),
        ({"seed": -1}, "seed: got -1"),
    ],
)
def test_bad_input_is_one_line(changed, complaint):
    with pytest.raises(InputError) as caught:
        recall(**{"seq_len": 64, "gap": 8, "seed": 0} | changed)
    assert str(caught.value).startswith(complaint)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tokens", [[3, 20, 3, 21, 3], [20, 21, 3], [20, 3, 3]])
def test_the_oracle_refuses_what_has_no_single_answer(tokens):
    with pytest.raises(ValueError, match="expected it once before"):
        recall_oracle(torch.tensor([tokens]))
