"""Patterns and configs: what they stand for, and what they refuse."""

import dataclasses
import json
import math

import pytest

from ssm._errors import ArgumentError
from ssm.models import patterns
from ssm.models.config import SequenceLMConfig
from ssm.models.kinds import FEED_FORWARDS, MIXERS
from ssm.models.patterns import NAMED_PATTERNS, Unit, parse_pattern, resolve_pattern
from tests.ssm.models.helpers import tiny_config


def test_jamba_attends_in_every_eighth_layer_and_has_experts_in_every_layer() -> None:
    units = resolve_pattern("jamba", 32)
    for i, unit in enumerate(units):
        assert unit.mixer == ("attention" if i % 8 == 7 else "mamba")
        assert unit.feed_forward == "moe"


@pytest.mark.parametrize(("moe_every", "experts"), [(2, {1, 3, 5, 7}), (0, set())])
def test_moe_every_makes_the_other_layers_dense(
    moe_every: int, experts: set[int]
) -> None:
    units = resolve_pattern("jamba", 8, moe_every)
    for i, unit in enumerate(units):
        assert unit.feed_forward == ("moe" if i in experts else "mlp")
    assert resolve_pattern("M+A", 4, moe_every) == resolve_pattern("M+A", 4)


def test_other_names() -> None:
    striped = resolve_pattern("striped_hyena", 5)
    assert [unit.mixer for unit in striped] == [
        "attention" if i % 2 else "hyena" for i in range(5)
    ]
    assert resolve_pattern("transformer", 2) == [Unit("attention", "mlp")] * 2
    assert resolve_pattern("rwkv", 2) == [Unit("rwkv", "channel_mix")] * 2
    for name in ("mamba", "mamba2", "s4", "s4d", "s5"):
        assert resolve_pattern(name, 3) == [Unit(name)] * 3


def test_letters_are_repeated_or_exact() -> None:
    assert resolve_pattern("MMA+", 5) == [
        Unit("mamba"),
        Unit("mamba"),
        Unit("attention", "mlp"),
        Unit("mamba"),
        Unit("mamba"),
    ]
    exact = resolve_pattern("2SD5GARKHNU", 11)
    assert {unit.mixer for unit in exact} | {"mamba"} == MIXERS.keys()


def test_the_table_of_signs_is_complete_and_signs_are_unambiguous() -> None:
    table = (patterns.__doc__ or "").splitlines()
    signs = [kind.sign for kind in (*MIXERS.values(), *FEED_FORWARDS.values())]
    assert len(set(signs)) == len(signs)
    for name, kind in MIXERS.items():
        assert any(line.split()[:2] == [kind.sign, name] for line in table), name
    for name, kind in FEED_FORWARDS.items():
        assert any(f" {kind.sign}       {name}" in line for line in table), name
    for name in NAMED_PATTERNS:  # a name can never be read as signs
        with pytest.raises(ArgumentError):
            parse_pattern(name)


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("jambda", "did you mean 'jamba'"),
        ("MXA", "'X' at 1"),
        ("M++", "'+' at 2"),
        ("+M", "'+' at 0"),
        ("", "at least one layer"),
        ("MAMA", "at most n_layers = 3"),
    ],
)
def test_bad_patterns(pattern: str, said: str) -> None:
    with pytest.raises(ArgumentError, match="pattern") as caught:
        resolve_pattern(pattern, 3)
    assert said in str(caught.value)


def test_a_config_is_resolved_and_survives_json() -> None:
    config = SequenceLMConfig(
        11,
        8,
        4,
        "M2*",
        mixer={"mamba2": {"A_init_range": [1, 2]}},
        tie_embeddings=False,
    )
    assert config.mixer["mamba"]["d_state"] == 16  # a default
    assert config.mixer["mamba2"]["dt_limit"] == (0.0, math.inf)
    assert config.feed_forward.keys() == {"moe"}
    text = config.to_json()
    json.loads(text, parse_constant=pytest.fail)  # strict: no bare Infinity
    assert SequenceLMConfig.from_json(text) == config
    assert json.loads(text).keys() == {f.name for f in dataclasses.fields(config)}


@pytest.mark.parametrize("pattern", [*NAMED_PATTERNS, "GKNU"])
def test_every_pattern_survives_json(pattern: str) -> None:
    config = tiny_config(pattern, n_layers=8)
    assert SequenceLMConfig.from_json(config.to_json()) == config


def test_unknown_keys_name_the_nearest() -> None:
    sizes = {"vocab_size": 11, "d_model": 8, "n_layers": 2}
    with pytest.raises(ArgumentError, match="did you mean 'n_layers'") as caught:
        SequenceLMConfig.from_dict(sizes | {"n_layer": 2})
    assert "\n" not in str(caught.value)
    assert "'tie_embeddings'" in str(caught.value)  # all valid ones are listed
    with pytest.raises(ArgumentError, match="did you mean 'd_state'"):
        SequenceLMConfig(11, 8, 2, mixer={"mamba": {"dstate": 4}})
    with pytest.raises(ArgumentError, match="did you mean 'mamba'"):
        SequenceLMConfig(11, 8, 2, mixer={"mambo": {}})
    with pytest.raises(ArgumentError, match="pattern does not have"):
        SequenceLMConfig(11, 8, 2, "transformer", mixer={"mamba": {}})
    with pytest.raises(ArgumentError, match=r"feed_forward\['mlp'\]"):
        SequenceLMConfig(11, 8, 2, "A+", feed_forward={"mlp": {"layer_idx": 1}})


@pytest.mark.parametrize(
    "entry",
    [
        {"vocab_size": 0},
        {"d_model": 8.0},
        {"n_layers": True},
        {"moe_every": -1},
        {"dropout": 1.0},
        {"norm_eps": 0.0},
        {"norm_eps": math.nan},
    ],
)
def test_bad_values_are_named(entry: dict[str, float]) -> None:
    sizes = {"vocab_size": 11, "d_model": 8, "n_layers": 2}
    with pytest.raises(ArgumentError, match=next(iter(entry))):
        SequenceLMConfig.from_dict(sizes | entry)


def test_configs_that_are_no_configs() -> None:
    with pytest.raises(ArgumentError, match="no d_model"):
        SequenceLMConfig.from_dict({"vocab_size": 11})
    with pytest.raises(ArgumentError, match="not JSON"):
        SequenceLMConfig.from_json('{"vocab_size": 1')
    with pytest.raises(ArgumentError, match="a JSON list"):
        SequenceLMConfig.from_json("[]")
