"""Texts by name, as words: WikiText-2 from a folder or the Hub, and Python's own docs.

Words are what stands between white space, and ``<eos>`` ends each line, empty ones
included; so counted, WikiText-2 has the 2,088,628 + 217,646 + 245,569 tokens of its
paper (Merity et al. 2016, arXiv:1609.07843, table 1). Case is kept.
"""

import hashlib
import logging
import platform
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from experiments.common import InputError, bad_input

END_OF_LINE = "<eos>"
HUB_NAME, HUB_CONFIG = "Salesforce/wikitext", "wikitext-2-v1"
COPIED = 0.9  # a topic with this share of its lines in a longer one is a copy

_BASE_NAMES = {"train": ["train"], "valid": ["valid", "validation"], "test": ["test"]}
_FILE_FORMS = ("{}.txt", "wiki.{}.tokens", "wiki.{}.raw", "{}")
_USES = (("train", "valid"), ("valid", "test"))  # (training, validation), best first


@dataclass(frozen=True)
class Corpus:
    """The words of two texts that share none, and where they come from."""

    train: list[str]
    val: list[str]
    metadata: dict[str, Any]


class _Texts(NamedTuple):
    train: str
    val: str
    metadata: dict[str, Any]


def read_corpus(name: str, data_dir: str = "") -> Corpus:
    """The words of the corpus ``name``, with the SHA-256 and size of its texts.

    wikitext2: from the text files in the folder ``data_dir``, or without one through
    ``datasets`` (its cache or the Hub). The training text is train and the validation
    text valid; a folder without train gives valid and test instead, and the metadata
    say so ("splits"). python_docs: ``pydoc_data.topics`` of the running Python.

    Raises InputError for an unknown name, and where the text cannot be had, with what
    to do about it.
    """
    if name not in _READERS:
        known = ", ".join(sorted(_READERS))
        raise bad_input("dataset", name, f"one of {known}", "try python_docs")
    train, val, metadata = _READERS[name](data_dir)
    sizes = {
        split: {
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
            "bytes": len(text.encode()),
        }
        for split, text in (("train", train), ("val", val))
    }
    return Corpus(words_of(train), words_of(val), {**metadata, "texts": sizes})


def words_of(text: str) -> list[str]:
    """The words of each line and ``<eos>`` behind them; nothing for a blank text."""
    if not text.strip():
        return []
    lines = text.removesuffix("\n").split("\n")
    return [word for line in lines for word in (*line.split(), END_OF_LINE)]


def _wikitext2(data_dir: str) -> _Texts:
    return _from_folder(Path(data_dir).expanduser()) if data_dir else _from_hub()


def _from_folder(folder: Path) -> _Texts:
    """The two texts of a folder, read as UTF-8."""
    needed = "train.txt and valid.txt, or valid.txt and test.txt"
    if not folder.is_dir():
        mend = "check the path" if not folder.exists() else "give its folder"
        raise bad_input("data_dir", str(folder), f"a folder with {needed}", mend)
    files = {split: _file_of(folder, split) for split in _BASE_NAMES}
    for use in _USES:
        train, val = (files[split] for split in use)
        if train and val:
            metadata = {
                "source": "folder",
                "splits": dict(zip(("train", "val"), use, strict=True)),
                "files": {"train": train.name, "val": val.name},
            }
            return _Texts(_read(train), _read(val), metadata)
    raise InputError(
        f"data_dir: {folder} holds {_listing(folder)}; expected {needed} (also as "
        "wiki.train.tokens and so on); put the text files there"
    )


def _file_of(folder: Path, split: str) -> Path | None:
    """The first file that holds the split, in the order of ``_FILE_FORMS``."""
    names = (form.format(b) for b in _BASE_NAMES[split] for form in _FILE_FORMS)
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _listing(folder: Path, most: int = 6) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    if not names:
        return "nothing"
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not UTF-8 text (byte {error.start}); expected a text file; "
            "convert it, or name the right folder"
        ) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def _from_hub() -> _Texts:
    """WikiText-2 from the cache of ``datasets``, or downloaded into it."""
    import datasets
    from huggingface_hub.errors import HTTPError

    try:
        with _quiet_retries():
            rows = datasets.load_dataset(HUB_NAME, HUB_CONFIG)
    except (OSError, ValueError, HTTPError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"dataset wikitext2: {HUB_NAME} is neither in the cache nor to be had "
            f"({reason}); give its text files with --data-dir FOLDER, or run once with "
            "internet, or take --dataset python_docs"
        ) from None
    metadata = {
        "source": f"{HUB_NAME}, {HUB_CONFIG}",
        "splits": {"train": "train", "val": "valid"},
    }
    return _Texts(
        _joined(rows["train"]["text"]), _joined(rows["validation"]["text"]), metadata
    )


@contextmanager
def _quiet_retries() -> Iterator[None]:
    """Without the Hub's warning for each attempt: the last failure is what is told."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _joined(lines: Iterable[str]) -> str:
    return "".join(line.removesuffix("\n") + "\n" for line in lines)


def _python_docs(data_dir: str) -> _Texts:
    """The help topics in alphabetic order; the last tenth of them is for validation.

    Many topics are sections of a longer one ("with" of "compound"). Those are left out,
    since a model would be validated on what it was trained on.
    """
    from pydoc_data.topics import topics

    if data_dir:
        mend = "leave --data-dir out, or take --dataset wikitext2"
        raise bad_input("data_dir", data_dir, "none for python_docs", mend)
    kept = _without_copies(topics)
    n_val = max(len(kept) // 10, 1)
    train, val = kept[:-n_val], kept[-n_val:]
    metadata = {
        "source": "pydoc_data.topics",
        "python": platform.python_version(),
        "n_topics": {"train": len(train), "val": len(val)},
        "n_topics_left_out": len(topics) - len(kept),
        "splits": {"train": "the first topics", "val": "the last tenth of the topics"},
    }
    return _Texts(
        "\n".join(topics[name] for name in train),
        "\n".join(topics[name] for name in val),
        metadata,
    )


def _without_copies(topics: dict[str, str]) -> list[str]:
    """The sorted names of the topics that are not ``COPIED`` from a longer one."""
    lines = {
        name: {line.strip() for line in text.splitlines()} - {""}
        for name, text in topics.items()
    }

    def copied(name: str) -> bool:
        own = lines[name]
        return any(
            len(topics[other]) > len(topics[name])
            and len(own & lines[other]) >= COPIED * len(own)
            for other in topics
        )

    return sorted(name for name in topics if not copied(name))


_READERS: dict[str, Callable[[str], _Texts]] = {
    "wikitext2": _wikitext2,
    "python_docs": _python_docs,
}
