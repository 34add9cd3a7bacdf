"""Texts, vocabularies and windows against counts made by hand or a second way."""

import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch

from data_dir.task import IGNORED
from data_dir.text import read_corpus, text_task, vocabulary, window_stride
from experiments.common import InputError, to_json

ROOT = Path(__file__).parents[2]
WIKITEXT = ROOT.parent / "shared" / "data" / "wikitext2"
needs_wikitext = pytest.mark.skipif(
    not (WIKITEXT / "valid.txt").is_file(), reason="WikiText-2 is not there"
)


def lines_of(first: int, count: int, width: int = 7) -> str:
    """``count`` words w<first> …, none of them twice, some to a line."""
    words = [f"w{i}" for i in range(first, first + count)]
    rows = [words[i : i + width] for i in range(0, count, width)]
    return "".join(" ".join(row) + "\n" for row in rows)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two texts that share no word: any window that crosses them is seen."""
    (tmp_path / "train.txt").write_text(lines_of(0, 700))
    (tmp_path / "valid.txt").write_text(lines_of(1000, 350))
    return tmp_path


def build(folder, **changed):
    options = {"seq_len": 10, "max_vocab": 2_000, "seed": 0, "data_dir": str(folder)}
    options |= {"train_max_samples": 30, "val_max_samples": 20}
    return text_task("wikitext2", **options | changed)


def windows_of(split) -> list[list[int]]:
    """The window behind each sequence of an "every" task."""
    first, rest = split.inputs[:, :1], split.targets
    return torch.cat([first, rest], 1).tolist()


def test_words_stand_between_white_space_and_lines_end(tmp_path):
    (tmp_path / "train.txt").write_text(" \n = A b = \n\nthe  Cat\tsat .\n")
    (tmp_path / "valid.txt").write_text("no newline at the end")
    corpus = read_corpus("wikitext2", str(tmp_path))
    expected = "<eos> = A b = <eos> <eos> the Cat sat . <eos>"
    assert corpus.train == expected.split()
    assert corpus.val == ["no", "newline", "at", "the", "end", "<eos>"]


@needs_wikitext
def test_wikitext_has_as_many_tokens_as_its_paper_says():
    corpus = read_corpus("wikitext2", str(WIKITEXT))
    assert (len(corpus.train), len(corpus.val)) == (217_646, 245_569)
    assert corpus.metadata["splits"] == {"train": "valid", "val": "test"}


@needs_wikitext
def test_a_real_text_as_the_published_setting_cuts_it():
    task = text_task(
        "wikitext2",
        seq_len=128,
        max_vocab=20_000,
        train_max_samples=5_000,
        val_max_samples=1_000,
        data_dir=str(WIKITEXT),
        seed=0,
    )
    words = (WIKITEXT / "valid.txt").read_text().split()
    assert task.vocab_size == len(set(words) | {"<eos>"})
    assert task.train.inputs.shape == (5_000, 128)
    assert task.metadata["train"]["unknown_share"] == words.count("<unk>") / 217_646
    assert task.metadata["unigram_loss"] < math.log(task.vocab_size)


@pytest.mark.parametrize(
    ("names", "used"),
    [
        (("train.txt", "valid.txt", "test.txt"), (0, 1)),
        (("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"), (0, 1)),
        (("wiki.train.raw", "wiki.valid.raw"), (0, 1)),
        (("train", "validation", "test"), (0, 1)),
        (("valid.txt", "test.txt"), (0, 1)),
        (("test", "validation.txt"), (1, 0)),
    ],
)
def test_a_folder_gives_its_best_two_texts(tmp_path, names, used):
    for i, name in enumerate(names):
        (tmp_path / name).write_text(f"text{i}\n" * 9)
    corpus = read_corpus("wikitext2", str(tmp_path))
    assert (corpus.train[0], corpus.val[0]) == tuple(f"text{i}" for i in used)
    files = corpus.metadata["files"]
    assert (files["train"], files["val"]) == tuple(names[i] for i in used)
    train, val = (corpus.metadata["splits"][split] for split in ("train", "val"))
    assert train in names[used[0]]
    assert val in names[used[1]]


def test_hashes_and_sizes_are_those_of_the_files(folder):
    texts = read_corpus("wikitext2", str(folder)).metadata["texts"]
    for split, name in (("train", "train.txt"), ("val", "valid.txt")):
        data = (folder / name).read_bytes()
        assert texts[split]["sha256"] == hashlib.sha256(data).hexdigest()
        assert texts[split]["bytes"] == len(data)


def test_python_docs_are_the_topics_and_say_which():
    corpus = read_corpus("python_docs")
    n, out = corpus.metadata["n_topics"], corpus.metadata["n_topics_left_out"]
    assert n["train"] + n["val"] + out == len(topics)
    assert n["val"] == (n["train"] + n["val"]) // 10
    assert corpus.metadata["python"] == ".".join(map(str, sys.version_info[:3]))
    assert json.loads(json.dumps(corpus.metadata)) == corpus.metadata

    names = iter(sorted(topics))
    for split, words in (("train", corpus.train), ("val", corpus.val)):
        rest, whole = [word for word in words if word != "<eos>"], 0
        while rest:  # topic after topic, each whole and in its place
            own = topics[next(names)].split()
            if rest[: len(own)] == own:
                rest, whole = rest[len(own) :], whole + 1
        assert whole == n[split]


def test_python_docs_validate_on_other_topics_than_they_train_on():
    """The topic "with" is a section of "compound": with both kept, it would be seen."""

    def seen(train: list[str], val: list[str]) -> float:
        train_lines, val_lines = (
            [line for line in map(str.strip, lines) if line] for lines in (train, val)
        )
        known = set(train_lines)
        return sum(line in known for line in val_lines) / len(val_lines)

    corpus = read_corpus("python_docs")
    lines = [" ".join(words).split("<eos>") for words in (corpus.train, corpus.val)]
    names = sorted(topics)
    n = len(names) // 10
    everything = [
        [" ".join(li.split()) for name in part for li in topics[name].split("\n")]
        for part in (names[:-n], names[-n:])
    ]
    assert seen(*lines) < 0.1
    assert seen(*lines) < seen(*everything) / 2


def test_the_vocabulary_is_the_most_frequent_words_with_ties_by_word():
    words = [*"bacbad", "<unk>", "<unk>", "<unk>"]
    assert vocabulary(words, 4) == {"<unk>": 0, "a": 1, "b": 2, "c": 3}
    assert list(vocabulary(words, 99)) == ["<unk>", "a", "b", "c", "d"]
    assert vocabulary(words, 2) == {"<unk>": 0, "a": 1}


def test_the_vocabulary_knows_the_training_text_alone(tmp_path):
    (tmp_path / "train.txt").write_text("a b a <unk>\n" * 20)
    (tmp_path / "valid.txt").write_text("a z <unk> b\n" * 20)
    task = build(tmp_path, objective="every")
    assert task.vocab_size == 4  # <unk>, a, b, <eos>
    assert task.metadata["train"]["unknown_share"] == 1 / 5
    assert task.metadata["val"]["unknown_share"] == 2 / 5
    capped = build(tmp_path, max_vocab=2, objective="every")
    assert capped.vocab_size == 2
    assert capped.metadata["train"]["unknown_share"] == 3 / 5  # all but the a's


@pytest.mark.parametrize("stride", [0, 1, 4, 10, 25])
def test_windows_are_consecutive_words_of_one_split(folder, stride):
    task = build(folder, stride=stride, objective="every")
    corpus = read_corpus("wikitext2", str(folder))
    token_of = vocabulary(corpus.train, 2_000)
    for split, words in (("train", corpus.train), ("val", corpus.val)):
        tokens = [token_of.get(word, 0) for word in words]
        facts = task.metadata[split]
        step = facts["stride"]
        every = [tokens[i : i + 11] for i in range(0, len(tokens) - 10, step)]
        got = windows_of(getattr(task, split))
        assert facts["n_windows_at_stride"] == len(every)
        assert facts["n_windows"] == len(got) == min(len(every), facts["max_samples"])
        assert all(window in every for window in got)
        assert step == (stride or window_stride(len(tokens), 10, facts["max_samples"]))


def test_training_windows_are_drawn_by_the_seed_without_repetition(folder):
    first, again, other = (
        windows_of(
            build(
                folder, stride=1, seed=seed, objective="every", train_max_samples=700
            ).train
        )
        for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other
    assert len({tuple(window) for window in first}) == 700


def test_validation_windows_are_spread_evenly_and_alike_for_every_seed(tmp_path):
    text = lines_of(0, 700)
    for name in ("train.txt", "valid.txt"):  # the same words, so that all are known
        (tmp_path / name).write_text(text)
    tasks = [build(tmp_path, stride=1, seed=seed, objective="every") for seed in (0, 1)]
    words = read_corpus("wikitext2", str(tmp_path)).val
    token_of = vocabulary(words, 2_000)
    tokens = [token_of[word] for word in words]
    every = [tokens[i : i + 11] for i in range(len(tokens) - 10)]
    spread = [every[i * len(every) // 20] for i in range(20)]
    assert windows_of(tasks[0].val) == windows_of(tasks[1].val) == spread


def test_the_two_objectives_score_the_same_windows(folder):
    last = build(folder)
    every = build(folder, objective="every")
    assert (last.last_only, every.last_only) == (True, False)
    for name in ("train", "val"):
        one, all_ = getattr(last, name), getattr(every, name)
        assert torch.equal(one.inputs, all_.inputs)
        assert torch.equal(one.targets[:, -1], all_.targets[:, -1])
        assert one.targets[:, :-1].eq(IGNORED).all()
        assert torch.equal(all_.targets[:, :-1], all_.inputs[:, 1:])


@pytest.mark.parametrize("n_words", [11, 12, 57, 1000, 4001])
@pytest.mark.parametrize("max_samples", [1, 2, 7, 40, 5000])
def test_the_stride_is_the_largest_that_yields_the_windows(n_words, max_samples):
    L = 10

    def yields(stride: int) -> int:
        return len(range(0, n_words - L, stride))

    stride = window_stride(n_words, L, max_samples)
    enough = [s for s in range(1, L + 1) if yields(s) >= max_samples]
    assert stride == max(enough, default=1)


@pytest.mark.parametrize("objective", ["last", "every"])
def test_the_unigram_baseline_equals_a_count_by_hand(tmp_path, objective):
    (tmp_path / "train.txt").write_text("a b a c a\nb d\n" * 10)
    (tmp_path / "valid.txt").write_text("b a e\na c\n" * 10)
    task = build(tmp_path, seq_len=4, max_vocab=4, stride=3, objective=objective)
    counts = {"a": 30, "b": 20, "<eos>": 20, "<unk>": 20}  # c and d are past the cap
    val = ["b", "a", "<unk>", "<eos>", "a", "<unk>", "<eos>"] * 10
    starts = range(0, len(val) - 4, 3)
    ends = [starts[k * len(starts) // 20] + 5 for k in range(20)]
    first = {"last": 1, "every": 4}[objective]
    scored = [word for end in ends for word in val[end - first : end]]
    loss = [-math.log((counts[word] + 1) / (90 + 4)) for word in scored]
    assert task.metadata["n_val_targets"] == len(scored)
    assert task.metadata["unigram_loss"] == pytest.approx(np.mean(loss))
    assert task.metadata["unigram_accuracy"] == scored.count("a") / len(scored)


def test_metadata_are_json(folder):
    metadata = build(folder).metadata
    assert to_json(metadata) == metadata


def test_bytes_follow_no_global_generator(folder):
    def data_bytes():
        task = build(folder, stride=1)
        return b"".join(t.numpy().tobytes() for t in (*task.train, *task.val))

    first = data_bytes()
    with torch.random.fork_rng():
        torch.manual_seed(123)
        np.random.seed(123)  # noqa: NPY002  # the global one is what is meant
        assert data_bytes() == first


@pytest.mark.parametrize(
    ("train", "found"),
    [("", 0), ("\n \n\n", 0), ("one line\n", 3), ("w " * 9, 10)],
)
@pytest.mark.parametrize("short", ["training", "validation"])
def test_a_text_shorter_than_a_window_says_what_it_holds(folder, train, found, short):
    (folder / {"training": "train.txt"}.get(short, "valid.txt")).write_text(train)
    with pytest.raises(InputError) as caught:
        build(folder)
    said = f"wikitext2, {short} text: got {found}; expected at least 11 words"
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"seq_len": 0}, "seq_len: got 0"),
        ({"max_vocab": 1}, "max_vocab: got 1"),
        ({"stride": -1}, "stride: got -1"),
        ({"train_max_samples": 0}, "train_max_samples: got 0"),
        ({"val_max_samples": 0}, "val_max_samples: got 0"),
        ({"seed": -1}, "seed: got -1"),
        ({"objective": "first"}, "objective: got 'first'; expected last or every"),
        ({"data_dir": "/no/such/folder"}, "data_dir: got '/no/such/folder'"),
    ],
)
def test_bad_input_is_one_line(folder, changed, complaint):
    with pytest.raises(InputError) as caught:
        build(folder, **changed)
    assert str(caught.value).startswith(complaint)
    assert "\n" not in str(caught.value)


def test_an_unknown_corpus_is_answered_with_the_known_ones():
    with pytest.raises(
        InputError, match="got 'ptb'; expected one of python_docs, wiki"
    ):
        read_corpus("ptb")


def test_python_docs_take_no_folder(folder):
    with pytest.raises(InputError, match="expected none for python_docs"):
        read_corpus("python_docs", str(folder))


@pytest.mark.parametrize(
    ("names", "held"),
    [
        ([], "holds nothing; expected train.txt and valid.txt, or"),
        (["test.txt", "train.txt"], "holds test.txt, train.txt; expected"),
        (
            [f"{i}.md" for i in range(9)],
            "holds 0.md, 1.md, 2.md, 3.md, 4.md, 5.md and 3 ",
        ),
    ],
)
def test_a_folder_without_the_texts_is_answered_with_what_it_holds(
    tmp_path, names, held
):
    for name in names:
        (tmp_path / name).write_text("a b\n")
    with pytest.raises(InputError) as caught:
        read_corpus("wikitext2", str(tmp_path))
    assert held in str(caught.value)


def test_files_that_are_no_text_and_no_folder_are_named(folder):
    with pytest.raises(InputError, match=r"train.txt.*give its folder"):
        read_corpus("wikitext2", str(folder / "train.txt"))
    (folder / "valid.txt").write_bytes(b"caf\xe9 au lait\n")
    with pytest.raises(InputError, match=r"valid.txt: not UTF-8 text \(byte 3\)"):
        read_corpus("wikitext2", str(folder))


FILL_CACHE = """
import sys
from pathlib import Path
import datasets
from datasets.arrow_writer import ArrowWriter

rows = {"train": ["", " = A = \\n", "the cat \\n"], "validation": ["a dog \\n"]}
folder = Path(sys.argv[1], "Salesforce___wikitext/wikitext-2-v1/0.0.0", "a" * 40)
folder.mkdir(parents=True)
features = datasets.Features({"text": datasets.Value("string")})
splits = datasets.SplitDict()
for split, texts in rows.items():
    path = str(folder / f"wikitext-{split}.arrow")
    writer = ArrowWriter(path=path, features=features)
    for text in texts:
        writer.write({"text": text})
    n, size = writer.finalize()
    splits.add(datasets.SplitInfo(split, size, n, dataset_name="wikitext"))
datasets.DatasetInfo(
    features=features, splits=splits, builder_name="parquet",
    dataset_name="wikitext", config_name="wikitext-2-v1", version="0.0.0",
).write_to_directory(str(folder))
"""
READ = """
import json
from data_dir.text import read_corpus
from experiments.common import InputError

try:
    corpus = read_corpus("wikitext2")
    print(json.dumps([corpus.train, corpus.val, corpus.metadata["splits"]]))
except InputError as error:
    print(json.dumps(str(error)))
"""


def in_process(script: str, cache: Path, *arguments: object):
    """Run offline, with everything that Hugging Face stores in ``cache``."""
    places = {"HF_HOME": str(cache), "HF_DATASETS_CACHE": str(cache)}
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | places | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout


def test_without_a_folder_or_network_the_cache_is_used_or_the_way_out_told(tmp_path):
    told = json.loads(in_process(READ, tmp_path))
    for way in ("--data-dir FOLDER", "run once with internet", "--dataset python_docs"):
        assert way in told
    assert "\n" not in told

    in_process(FILL_CACHE, tmp_path, tmp_path)
    train, val, splits = json.loads(in_process(READ, tmp_path))
    assert " ".join(train) == "<eos> = A = <eos> the cat <eos>"
    assert " ".join(val) == "a dog <eos>"
    assert splits == {"train": "train", "val": "valid"}
