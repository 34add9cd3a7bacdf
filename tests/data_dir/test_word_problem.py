"""Words against products of permutations, draws against chance, damaged files."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_dir.groups import group
from data_dir.word_problem import (
    WordOptions,
    draw_words,
    generate_words,
    load_words,
    running_products,
)
from experiments.common import InputError, to_json

N = 300


@pytest.fixture(scope="module")
def a5(tmp_path_factory) -> str:
    """A folder with 300 words of A5 of length 7."""
    folder = str(tmp_path_factory.mktemp("illusion"))
    generate_words(WordOptions(length=(7,), samples=N, out_dir=folder))
    return folder


def rows(words) -> list[tuple[int, ...]]:
    return [tuple(row) for row in words.inputs.tolist()]


@pytest.mark.parametrize("split", ["train", "val"])
def test_every_target_is_the_product_of_the_permutations_up_to_there(a5, split):
    words = getattr(load_words(7, samples=N, folder=a5), split)
    parts = [element[0] for element in group("A5").elements]
    for inputs, targets in zip(*words, strict=True):
        product = tuple(range(5))
        for x, t in zip(inputs, targets, strict=True):
            product = tuple(product[k] for k in parts[x])  # product after x
            assert parts[t] == product


def test_published_rows_are_read_and_their_targets_agree_with_our_numbering(tmp_path):
    """Four rows that the published generator gave for S3, seed 123."""
    published = (
        "seed,input,target\n123,5 4 2 4,5 1 4 3\n123,5 0 2 2,5 5 3 5\n"
        "123,0 5 3 1,0 5 2 3\n123,1 0 2 0,1 1 4 4\n"
    )
    (tmp_path / "S3=4.csv").write_text(published)
    task = load_words(4, group="S3", samples=4, folder=str(tmp_path), train_split=1)
    assert set(rows(task.train)) == {
        (5, 4, 2, 4),
        (5, 0, 2, 2),
        (0, 5, 3, 1),
        (1, 0, 2, 0),
    }
    assert task.metadata["data_seeds"] == [123]


@pytest.fixture
def drawn_in_blocks(monkeypatch):
    """As if these tests' few words were many."""
    monkeypatch.setattr("data_dir.word_problem._NUMBERED", 0)
    monkeypatch.setattr("data_dir.word_problem._AT_ONCE", 5)


@pytest.mark.parametrize("numbered", [True, False])
@pytest.mark.parametrize(
    ("order", "length", "samples"), [(3, 2, 4), (6, 3, 7), (2, 7, 7)]
)
def test_each_word_is_drawn_as_often_and_none_twice(
    order, length, samples, numbered, request
):
    if not numbered:
        request.getfixturevalue("drawn_in_blocks")
    rng, n_draws = np.random.default_rng(0), 4_000
    counts: Counter[tuple[int, ...]] = Counter()
    for _ in range(n_draws):
        drawn = {tuple(w) for w in draw_words(rng, order, length, samples).tolist()}
        assert len(drawn) == samples
        counts.update(drawn)
    n_words = order**length
    share = samples / n_words
    assert len(counts) == n_words
    deviation = np.sqrt(n_draws * share * (1 - share))
    scores = (np.array(list(counts.values())) - n_draws * share) / deviation
    assert np.abs(scores).max() < 5
    assert np.mean(scores**2) < 1 + 5 * np.sqrt(2 / n_words)


def test_all_words_come_where_as_many_are_drawn_as_there_are():
    words = draw_words(np.random.default_rng(0), 3, 4, 81)
    assert sorted(map(tuple, words.tolist())) == list(np.ndindex(3, 3, 3, 3))
    assert words.tolist() != sorted(words.tolist())


@pytest.mark.parametrize(
    ("order", "length"),
    [(60, 2), (60, 3), (60, 4)],  # numbered; numbered and capped; drawn in blocks
)
def test_few_words_are_the_first_of_many(order, length):
    def draw(samples: int):
        return draw_words(np.random.default_rng(3), order, length, samples)

    most = draw(250_000)
    for samples in (1, 50, 99_999, 100_001):
        few = draw(samples)
        assert np.array_equal(few, most[: len(few)])


@pytest.mark.usefixtures("drawn_in_blocks")
def test_many_small_blocks_are_drawn_until_there_are_enough():
    few, most = (
        draw_words(np.random.default_rng(3), 2, 9, samples) for samples in (6, 200)
    )
    assert np.array_equal(few, most[:6])
    assert len(set(map(tuple, most.tolist()))) == 200


def test_words_beyond_64_bits_are_drawn():
    words = draw_words(np.random.default_rng(0), 60, 40, 500)
    assert words.shape == (500, 40)
    counts = np.bincount(words.ravel(), minlength=60)
    assert len(counts) == 60
    assert np.abs(counts - 20_000 / 60).max() < 6 * np.sqrt(20_000 / 60)


def test_words_of_one_element_are_their_own_products(tmp_path):
    task = load_words(1, folder=str(tmp_path), train_split=0.5)
    assert np.array_equal(task.train.inputs, task.train.targets)
    assert len(task.train.inputs) == len(task.val.inputs) == 30
    assert task.metadata["first_only_accuracy"] == 1


def test_fewer_words_than_asked_for_are_all_taken_and_said_to_be_all(tmp_path):
    task = load_words(2, folder=str(tmp_path))
    assert (len(task.train.inputs), len(task.val.inputs)) == (2_880, 720)
    every = rows(task.train) + rows(task.val)
    assert sorted(every) == list(np.ndindex(60, 60))
    assert task.metadata["capped"]
    assert task.metadata["samples"] == 3_600


def test_the_split_follows_its_seed_alone_and_shares_nothing(a5):
    first, again, other = (
        load_words(7, samples=N, folder=a5, seed=seed) for seed in (0, 0, 1)
    )
    assert rows(first.train) == rows(again.train)
    assert rows(first.val) == rows(again.val)
    assert rows(first.train) != rows(other.train)
    for task in (first, other):
        assert (len(task.train.inputs), len(task.val.inputs)) == (240, 60)
        assert set(rows(task.train)).isdisjoint(rows(task.val))
    assert {*rows(first.train), *rows(first.val)} == {
        *rows(other.train),
        *rows(other.val),
    }


def test_fewer_samples_are_the_first_rows_of_the_file(a5):
    lines = (Path(a5) / "A5=7.csv").read_text().splitlines()[1:12]
    expected = {tuple(map(int, line.split(",")[1].split())) for line in lines}
    task = load_words(7, samples=11, folder=a5, train_split=1.0)
    assert set(rows(task.train)) == expected
    assert task.val.inputs.shape == task.val.targets.shape == (0, 7)


def test_files_follow_their_seed_group_and_length_and_no_global_generator(tmp_path):
    def written(name: str, seed: int) -> bytes:
        folder = tmp_path / name
        options = WordOptions("A4", (5,), 60, seed, str(folder))
        generate_words(options)
        return (folder / "A4=5.csv").read_bytes()

    first = written("first", 3)
    np.random.seed(1)  # noqa: NPY002  # the global one is what is meant
    assert written("again", 3) == first
    assert written("other", 4) != first


def test_a_file_made_for_few_samples_serves_many(tmp_path):
    few = load_words(3, samples=10, folder=str(tmp_path), train_split=1)
    many = load_words(3, folder=str(tmp_path), train_split=1)
    assert (len(few.train.inputs), len(many.train.inputs)) == (10, 216_000)
    assert set(rows(few.train)) < set(rows(many.train))


@pytest.mark.parametrize("seed", [0, 5])
def test_a_file_of_ours_that_is_too_short_grows_and_keeps_its_rows(tmp_path, seed):
    options = WordOptions(length=(5,), samples=40, seed=seed, out_dir=str(tmp_path))
    generate_words(options)
    few = (tmp_path / "A5=5.csv").read_text()
    task = load_words(5, samples=90, folder=str(tmp_path), train_split=1)
    many = (tmp_path / "A5=5.csv").read_text()
    assert (many[: len(few)], many.count("\n")) == (few, 91)
    assert task.metadata["data_seeds"] == [seed]
    again = load_words(5, samples=90, folder=str(tmp_path), train_split=1)
    assert again.metadata == task.metadata


def test_metadata_are_json_and_the_hash_follows_the_rows(a5):
    task = load_words(7, samples=N, folder=a5)
    assert to_json(task.metadata) == task.metadata
    assert task.n_elements == 60
    assert task.metadata["guess_accuracy"] == pytest.approx(1 / 60)
    assert task.metadata["first_only_accuracy"] == pytest.approx((1 + 6 / 60) / 7)
    other = load_words(7, samples=N - 1, folder=a5)
    assert other.metadata["sha256"] != task.metadata["sha256"]
    reseeded = load_words(7, samples=N, folder=a5, seed=9)
    assert reseeded.metadata["sha256"] == task.metadata["sha256"]


def test_products_of_an_awkward_group_equal_a_loop():
    g = group("S3xZ5")
    inputs = np.random.default_rng(0).integers(0, 30, (50, 11), dtype=np.int32)
    for x, targets in zip(inputs, running_products(g, inputs), strict=True):
        t = 0
        for i in range(11):
            t = g.table[t, x[i]]
            assert targets[i] == t


GOOD = ["seed,input,target", "0,1 2,1 4", "0,0 5,0 5", "0,3 3,3 4"]


def damaged(tmp_path, lines: list[str], end: str = "\n") -> str:
    (tmp_path / "S3=2.csv").write_text("\n".join(lines) + end)
    return str(tmp_path)


def load_three(folder: str):
    return load_words(2, group="S3", samples=3, folder=folder)


def test_the_file_that_is_damaged_below_is_good_as_it_stands(tmp_path):
    assert len(load_three(damaged(tmp_path, GOOD)).train.inputs) == 2


@pytest.mark.parametrize(
    ("line", "text", "complaint"),
    [
        (1, "input,target", ":1: got 'input,target'; expected the header"),
        (2, "0,1 2 0,1 4 4", ":2: got 3 elements in input; expected 2"),
        (3, "0,0,0", ":3: got 1 elements in input; expected 2"),
        (
            3,
            "0,0  5,0 5",
            ":3: got 2 elements in input; expected 2, separated by single",
        ),
        (4, "0,3 3,3", ":4: got 1 elements in target; expected 2"),
        (3, "0,0 5", ":3: got 2 columns; expected 3"),
        (3, "0,0 5,0 5,", ":3: got 4 columns; expected 3"),
        (3, "", ":3: got 1 columns"),
        (3, "0,0 6,0 6", ":3: got '6' as input 2; expected an element from 0 to 5"),
        (3, "0,-1 5,0 5", ":3: got '-1' as input 1"),
        (3, "0,0 x,0 5", ":3: got 'x' as input 2"),
        (3, "0,0 5.0,0 5", ":3: got '5.0' as input 2"),
        (3, "0,0 05,0 5", ":3: got '05' as input 2"),
        (3, "0,0 nan,0 5", ":3: got 'nan' as input 2"),
        (3, "0,0 5,0 9", ":3: got '9' as target 2"),
        (3, "0,0 5,0 4", ":3: got 4 as target 2; expected the product in S3"),
        (3, "0,0 5,1 5", ":3: got 1 as target 1; expected the product in S3"),
        (4, "0,1 2,1 4", ":4: the sequence of line 2 once more; expected each"),
        (3, "zero,0 5,0 5", ":3: got seed 'zero'; expected an integer"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, text, complaint):
    lines = [*GOOD]
    lines[line - 1] = text
    folder = damaged(tmp_path, lines)
    with pytest.raises(InputError) as caught:
        load_three(folder)
    assert str(caught.value).startswith(f"{folder}/S3=2.csv{complaint}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("lines", "end", "complaint"),
    [
        (GOOD, "", ":4: torn: no newline ends it"),
        ([*GOOD[:3], "0,3"], "", ":4: torn"),
        (GOOD[:1], "", ":1: torn"),
        (GOOD[:1], "\n", ":1: no row behind the header"),
        ([""], "", ":1: got ''; expected the header"),
        (["\0\x01PNG"], "\n", ":1: got '\\x00\\x01PNG'; expected the header"),
    ],
)
def test_a_torn_or_foreign_file_is_refused(tmp_path, lines, end, complaint):
    folder = damaged(tmp_path, lines, end)
    with pytest.raises(InputError) as caught:
        load_three(folder)
    assert str(caught.value).startswith(f"{folder}/S3=2.csv{complaint}")


def test_lines_that_end_as_on_windows_are_read(tmp_path):
    (tmp_path / "S3=2.csv").write_bytes("\r\n".join([*GOOD, ""]).encode())
    assert len(load_three(str(tmp_path)).val.inputs) == 1


def test_a_shorter_file_of_another_is_refused_with_the_ways_out(tmp_path):
    folder = damaged(tmp_path, GOOD)
    with pytest.raises(InputError, match=r"samples: got 4; .* the 3 .*ours.*--force"):
        load_words(2, group="S3", samples=4, folder=folder)
    assert (tmp_path / "S3=2.csv").read_text() == "\n".join([*GOOD, ""])


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"group": "Q8"}, "group: got 'Q8'"),
        ({"length": 0}, "length: got 0"),
        ({"samples": 0}, "samples: got 0"),
        ({"seed": -1}, "seed: got -1"),
        ({"train_split": 0.0}, "train_split: got 0.0"),
        ({"train_split": 1.1}, "train_split: got 1.1"),
        ({"train_split": float("nan")}, "train_split: got nan"),
        ({"train_split": 0.999}, "train_split: got 0.999"),
        ({"train_split": 0.001}, "train_split: got 0.001"),
    ],
)
def test_bad_input_is_one_line(a5, changed, complaint):
    arguments = {"length": 7, "samples": N, "folder": a5} | changed
    with pytest.raises(InputError) as caught:
        load_words(**arguments)
    assert str(caught.value).startswith(complaint)
    assert "\n" not in str(caught.value)
