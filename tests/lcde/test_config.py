"""The YAML files hold the published values; what is wrong in one is named in a line."""

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments.common import InputError
from lcde.config import (
    A5_LENGTHS,
    LCDEA5Config,
    LCDEToyConfig,
    SMA5Config,
    SMToyConfig,
    changed,
    read_config,
    to_yaml,
)

FOLDER = Path(__file__).parents[2] / "experiment_configs"
KINDS: dict[str, type[Any]] = {
    "lcde_toy": LCDEToyConfig,
    "lcde_a5": LCDEA5Config,
    "ssm_toy": SMToyConfig,
    "ssm_a5": SMA5Config,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "lcde_toy": {
        "runs": 5,
        "hidden_dim": 256,
        "output_dim": 1,
        "batch_size": 4000,
        "input_dims": (2, 3),
    },
    "lcde_a5": {
        "hidden_dim": 256,
        "output_dim": 60,
        "batch_size": 32,
        "input_dim": 60,
        "train_split": 0.8,
        "num_steps": 1_000_000,
        "print_steps": 10_000,
        "learning_rate": 0.0002,
        "lengths": A5_LENGTHS,
    },
    "ssm_toy": {
        "runs": 5,
        "model_names": ("S4", "Mamba"),
        "input_dims": (2, 3),
        "depth_nonlinears": ((2, True), (2, False), (1, False)),
        "output_dim": 1,
        "hidden_dim": 256,
        "state_dim": 256,
        "batch_size": 32,
        "learning_rate": 0.0001,
        "num_epochs": 401,
    },
    "ssm_a5": {
        "model_names": ("Transformer", "Mamba", "RNN", "S4"),
        "lengths": A5_LENGTHS,
        "depths": (1, 2, 3, 4),
        "input_dim": 60,
        "output_dim": 60,
        "hidden_dim": 1024,
        "state_dim": 64,
        "batch_size": 32,
        "learning_rate": 0.0002,
        "num_epochs": 40,
    },
}


@pytest.mark.parametrize("stem", KINDS)
def test_the_full_files_hold_the_published_values_and_nothing_else(stem: str) -> None:
    path = FOLDER / f"{stem}.yaml"
    assert set(yaml.safe_load(path.read_text())) == set(PUBLISHED[stem])
    config = read_config(path, KINDS[stem])
    assert config == KINDS[stem]()  # the defaults are the published values too
    assert {key: getattr(config, key) for key in PUBLISHED[stem]} == PUBLISHED[stem]


@pytest.mark.parametrize("stem", KINDS)
def test_the_quick_files_ask_for_less_of_the_same(stem: str) -> None:
    quick = read_config(FOLDER / f"{stem}_quick.yaml", KINDS[stem])
    full = KINDS[stem]()
    assert quick != full
    for key in ("runs", "hidden_dim", "n_train", "num_steps", "num_epochs"):
        assert getattr(quick, key, 0) <= getattr(full, key, 0)
    for key in ("lengths", "input_dims", "depths", "model_names"):
        assert set(getattr(quick, key, ())) <= set(getattr(full, key, ()))


@pytest.mark.parametrize("stem", KINDS)
def test_what_is_written_reads_back(stem: str, tmp_path: Path) -> None:
    quick = read_config(FOLDER / f"{stem}_quick.yaml", KINDS[stem])
    path = tmp_path / "again.yaml"
    path.write_text(to_yaml(quick))
    assert read_config(path, KINDS[stem]) == quick


def test_a_rate_may_be_written_as_python_writes_it(tmp_path: Path) -> None:
    """YAML 1.1 takes 2e-4 for text, and 1 for an integer."""
    path = tmp_path / "a.yaml"
    for text, value in (("2e-4", 0.0002), ("1", 1.0), ("1.5E-3", 0.0015)):
        path.write_text(f"learning_rate: {text}\n")
        assert read_config(path, LCDEA5Config).learning_rate == value


WRONG: list[tuple[str, str, list[str]]] = [
    ("lcde_toy", "hiden_dim: 3", ["key: got 'hiden_dim'", "did you mean hidden_dim?"]),
    ("lcde_toy", "xyz: 3", ["key: got 'xyz'", "runs, hidden_dim,", "choose one"]),
    ("lcde_toy", "7: 3", ["key: got 7"]),
    ("lcde_toy", "runs: five", ["runs: got 'five'; expected an integer of at least 1"]),
    ("lcde_toy", "runs: 2.5", ["runs: got 2.5", "try runs: 5"]),
    ("lcde_toy", "runs: true", ["runs: got True"]),
    ("lcde_toy", "runs: null", ["runs: got None"]),
    ("lcde_toy", "runs: 0", ["runs: got 0"]),
    ("lcde_toy", "runs: 5\nruns: 6", ["key: got 'runs'; expected each key once"]),
    ("lcde_toy", "output_dim: 2", ["output_dim: got 2", "equal to 1"]),
    ("lcde_toy", "input_dims: [2, 4]", ["got [2, 4]", "equal to 2 or 3"]),
    ("lcde_toy", "input_dims: [2, 2]", ["got [2, 2]", "each once"]),
    ("lcde_toy", "input_dims: []", ["input_dims: got []", "try input_dims: [2, 3]"]),
    ("lcde_toy", "input_dims: 2", ["input_dims: got 2; expected a list"]),
    ("lcde_toy", "solver: exakt", ["got 'exakt'", "adaptive", "did you mean exact?"]),
    ("lcde_a5", "structure: Dense", ["'Dense'", "diagonal", "did you mean dense?"]),
    ("lcde_a5", "structure: [dense]", ["structure: got ['dense']", "a name from"]),
    ("lcde_a5", "train_split: 1.0", ["got 1.0; expected a number between 0 and 1"]),
    ("lcde_a5", "learning_rate: .nan", ["got nan; expected a number above 0"]),
    ("lcde_a5", "learning_rate: .inf", ["got inf"]),
    ("lcde_a5", "learning_rate: yes", ["got True"]),
    ("lcde_a5", "learning_rate: fast", ["got 'fast'"]),
    ("lcde_a5", f"learning_rate: 1{'0' * 400}", ["expected a number above 0"]),
    ("lcde_a5", "lengths: [5, 3]", ["got [5, 3]", "in increasing order"]),
    ("lcde_a5", "lengths: [1]", ["got [1]", "of at least 2"]),
    ("lcde_a5", "output_dim: 61", ["got 61", "equal to 60, the elements of A5"]),
    ("ssm_toy", "model_names: [S4, Mambo]", ["['S4', 'Mambo']", "mean Mamba?"]),
    ("ssm_toy", "model_names: S4", ["model_names: got 'S4'; expected a list"]),
    (
        "ssm_toy",
        "depth_nonlinears: [[2]]",
        ["got [[2]]", "[an integer of at least 1, t"],
    ),
    ("ssm_toy", "depth_nonlinears: [[2, 1]]", ["got [[2, 1]]", "true or false]"]),
    ("ssm_toy", "depth_nonlinears: [2, true]", ["got [2, True]"]),
    ("ssm_a5", "max_steps: -1", ["max_steps: got -1", "of at least 0"]),
    ("ssm_a5", "depths: [1, 1]", ["depths: got [1, 1]", "in increasing order"]),
    ("ssm_a5", "runs: 5", ["key: got 'runs'"]),
    ("lcde_toy", "", ["got 'nothing'", "key: value"]),
    ("lcde_toy", "# only a comment\n", ["got 'nothing'"]),
    ("lcde_toy", "- runs\n- 5\n", ["got 'list'"]),
    ("lcde_toy", "just words", ["got 'str'"]),
    ("lcde_toy", "runs: [1", ["not YAML (", "line 1"]),
    ("lcde_toy", "runs: !!python/object:os.system x", ["not YAML ("]),
]


@pytest.mark.parametrize(
    ("stem", "text", "said"), WRONG, ids=[w[1][:40] for w in WRONG]
)
def test_a_bad_file_is_one_line_that_names_file_and_key(
    stem: str, text: str, said: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as wrong:
        read_config(path, KINDS[stem])
    line = str(wrong.value)
    assert line.startswith(f"{path}: ")
    assert "\n" not in line
    for words in said:
        assert words in line


def test_files_that_are_none_are_named(tmp_path: Path) -> None:
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"runs: \xff\n")
    for path, said in (
        (tmp_path / "absent.yaml", "No such file"),
        (tmp_path, "Is a directory"),
        (binary, "not YAML"),
    ):
        with pytest.raises(InputError, match=said) as wrong:
            read_config(path, LCDEToyConfig)
        assert str(wrong.value).startswith(f"{path}: ")


def test_changes_are_judged_as_the_file_is_and_leave_the_rest() -> None:
    config = changed(LCDEA5Config(), {"lengths": ("--length", (4, 9))})
    assert config.lengths == (4, 9)
    assert config.num_steps == 1_000_000
    with pytest.raises(InputError, match=r"^--length: got \(9, 4\); expected a list"):
        changed(LCDEA5Config(), {"lengths": ("--length", (9, 4))})
    with pytest.raises(InputError, match="threshold"):
        changed(LCDEA5Config(), {"threshold": ("threshold", math.nan)})
