"""hippo: exact references, claims that hold and that can fail, the picture."""

import json
from decimal import Decimal
from fractions import Fraction

import pytest
import torch

from experiments.common import InputError
from scaling_experiments import hippo_conditioning as hippo
from ssm.layers.hippo import (
    compute_kernel,
    discretize_A,
    discretize_B,
    make_hippo_input,
    make_hippo_matrix,
)

MODULE = "scaling_experiments.hippo_conditioning"


@pytest.fixture(scope="module")
def result():
    return hippo.run(N_values=(1, 4, 8, 16, 24, 32), length=50)


def test_plain_diagonalisation_fails_and_dplr_does_not(result):
    assert result.passed, hippo.problems(result.metadata)
    rows = {row["N"]: row for row in result.metadata["rows"]}
    assert rows[8]["condition"] == pytest.approx(7.7e4, rel=1e-2)
    assert rows[16]["condition"] == pytest.approx(8.3e10, rel=1e-2)
    for row in rows.values():
        assert row["dplr_condition"] == pytest.approx(1, abs=1e-12)
        assert row["dplr_error"] < 1e-12
    for name in ("lapack_error", "rounded_error"):
        assert rows[8][name] < 1e-9 < rows[16][name] < 1e-3
        assert rows[32][name] > 1
    assert rows[32]["condition"] > 1e22 > 1e21 > rows[32]["float_condition"]
    assert "even with exact eigenvectors" in result.details


@pytest.mark.parametrize("N", [1, 3, 20, 48])
def test_the_exact_kernel_is_that_of_dense_powers(N):
    C = torch.randn(N, dtype=torch.float64, generator=torch.Generator().manual_seed(N))
    A = make_hippo_matrix(N, torch.float64)
    B = make_hippo_input(N, torch.float64)
    A_bar = discretize_A(A, 0.1, "bilinear")
    B_bar = discretize_B(A, B, 0.1, "bilinear")
    dense = compute_kernel(A_bar, B_bar, C, 40)
    exact = hippo.exact_kernel(C, 0.1, 40)
    assert float((dense - exact).abs().max() / exact.abs().max()) < 1e-11


def test_the_exact_kernel_of_one_mode_in_fractions():
    C = torch.tensor([1.5], dtype=torch.float64)
    found = hippo.exact_kernel(C, 0.25, 6)
    for j in range(6):
        expected = Fraction(3, 2) * Fraction(2, 9) * Fraction(7, 9) ** j
        assert Decimal(found[j].item()) == Decimal(float(expected))


@pytest.mark.parametrize(
    "options",
    [
        {"length": 1, "delta": 1.0, "seed": 3},
        {"length": 16, "delta": 1e-3, "seed": 5},
        {"length": 20, "delta": 100.0, "seed": 7},
    ],
)
def test_it_holds_at_other_steps_lengths_and_readouts(options):
    result = hippo.run(N_values=(2, 32, 40), **options)
    assert result.passed, hippo.problems(result.metadata)


@pytest.mark.parametrize(
    ("row", "name", "value"),
    [
        (3, "condition", 1.0),
        (3, "condition", 1e13),
        (0, "dplr_condition", 1.5),
        (0, "dplr_error", float("nan")),
        (1, "dplr_error", 1e-6),
        (5, "rounded_error", 1e-9),
        (5, "lapack_error", float("nan")),
    ],
)
def test_a_forged_record_is_found(result, row, name, value):
    forged = json.loads(json.dumps(result.metadata))
    assert hippo.problems(forged) == []
    forged["rows"][row][name] = value
    assert len(hippo.problems(forged)) == 1


def test_a_wrong_dplr_kernel_fails(monkeypatch):
    kernel = hippo.dplr_kernel
    monkeypatch.setattr(
        hippo, "dplr_kernel", lambda system, L: kernel(system, L) * (1 + 1e-7)
    )
    result = hippo.run(N_values=(4,), length=5)
    assert result.passed is False
    assert result.details.startswith("1 claim(s) off; DPLR's kernel")


def test_small_states_say_that_nothing_is_lost_yet():
    result = hippo.run(N_values=(2, 4), length=8)
    assert result.passed
    assert "right to 1e-03 too" in result.details


def test_the_picture_is_drawn_by_default(tmp_path, run_module):
    path = tmp_path / "conditioning.png"
    flags = f"--N-values 2 24 --length 9 --plot-path {path}".split()
    done = run_module(MODULE, *flags)
    assert done.returncode == 0, done.stderr
    assert path.read_bytes().startswith(b"\x89PNG")
    assert hippo.PICTURES[0].path == "outputs/hippo_conditioning.png"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"N_values": ()}, "N_values: got"),
        ({"N_values": (4, 2)}, "N_values: got"),
        ({"N_values": (4, 300)}, "N_values: got .*at most 256"),
        ({"length": 0}, "length: got 0"),
        ({"delta": 0.0}, "delta: got 0.0"),
        ({"delta": float("nan")}, "delta: got nan"),
        ({"seed": -1}, "seed: got -1"),
    ],
)
def test_bad_input_is_named(options, words):
    with pytest.raises(InputError, match=words):
        hippo.run(**options)
