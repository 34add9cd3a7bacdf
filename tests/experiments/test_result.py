"""Results are strict JSON; random streams are named, independent and stable."""

import json
import subprocess
import sys
from dataclasses import FrozenInstanceError
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.common import (
    ExperimentResult,
    InputError,
    format_complex,
    random_stream,
    to_json,
)

ROOT = Path(__file__).parents[2]


@given(st.complex_numbers())
@settings(deadline=None)
def test_complex_values_survive_their_syntax(z):
    back = complex(format_complex(z))
    np.testing.assert_array_equal([back.real, back.imag], [z.real, z.imag])
    assert np.signbit(back.imag) == np.signbit(z.imag) or np.isnan(z.imag)


@given(st.floats())
@settings(deadline=None)
def test_floats_survive_strict_json(x):
    line = json.dumps(to_json([x, np.float64(x)]), allow_nan=False)
    for back in json.loads(line):
        np.testing.assert_array_equal(float(back), x)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (float("nan"), "NaN"),
        (np.float32("inf"), "Infinity"),
        (-np.inf, "-Infinity"),
        (np.int8(-3), -3),
        (np.bool_(True), True),
        (True, True),
        (0.5 - 2j, "0.5-2.0j"),
        (Fraction(1, 3), "1/3"),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        (np.array(2.5), 2.5),
        ((1, (2.5, None)), [1, [2.5, None]]),
        ({"a": {"b": np.array([np.nan])}}, {"a": {"b": ["NaN"]}}),
        (Path("a") / "b", str(Path("a") / "b")),
    ],
)
def test_each_kind_of_value_has_one_json_form(value, expected):
    found = to_json(value)
    assert found == expected
    assert type(found) is type(expected)
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("value", [object(), {1: 2}, {1, 2}, b"bytes", [object()]])
def test_other_values_are_refused(value):
    with pytest.raises(TypeError):
        to_json(value)


def test_a_result_is_frozen_and_holds_json():
    result = ExperimentResult("x", "", {"a": np.arange(2), "z": 1j}, True)
    assert result.metadata == {"a": [0, 1], "z": "0.0+1.0j"}
    with pytest.raises(FrozenInstanceError):
        result.passed = False


def test_a_stream_depends_on_seed_and_name_alone():
    first = random_stream(3, "data").standard_normal(8)
    np.random.default_rng(0).standard_normal(99)
    random_stream(3, "init").standard_normal(99)
    np.testing.assert_array_equal(first, random_stream(3, "data").standard_normal(8))
    for seed, name in ((4, "data"), (3, "init"), (3, "Data")):
        assert not np.any(first == random_stream(seed, name).standard_normal(8))


def test_streams_are_uncorrelated():
    names = [f"stream {index}" for index in range(6)]
    draws = np.array([random_stream(0, name).standard_normal(4096) for name in names])
    correlation = np.corrcoef(draws) - np.eye(6)
    assert np.abs(correlation).max() < 5 / np.sqrt(4096)  # five standard deviations


def test_a_stream_is_the_same_in_every_process():
    code = (
        "from experiments.common import random_stream as r; "
        "print(r(7, 'data').integers(0, 2**63, 4).tolist())"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1")
    }
    assert told == {f"{random_stream(7, 'data').integers(0, 2**63, 4).tolist()}\n"}


def test_a_negative_seed_is_bad_input():
    with pytest.raises(InputError, match="seed: got -1"):
        random_stream(-1, "data")
