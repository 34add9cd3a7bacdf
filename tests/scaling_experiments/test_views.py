"""views: ranks of matrices whose ranks are known, states by hand, claims that fail."""

import json
from typing import NamedTuple

import numpy as np
import pytest
import torch

from experiments.common import InputError, command_line
from experiments.ranks import roots_of_unity, ssm_kernel
from scaling_experiments import views
from ssm._cases import LAYERS
from ssm.layers import S4D, Attention, SelectiveSSM

KERNELS = {case.name: case for case in LAYERS if not case.no_kernel}
STATES = {  # of one head: N; twice for conjugate pairs; one for S5's modes and RWKV
    "S4": 6,
    "S4D (lin, zoh)": 6,
    "S4D (legs, bilinear)": 6,
    "S5": 1,
    "SelectiveSSM": 3,
    "Mamba": 3,
    "Mamba2": 3,
    "DiagonalSSD": 3,
    "DiagonalSSD (selective)": 3,
    "RWKV": 1,
    "RWKVBlock": 1,
}
INVARIANT = {
    *("S4", "S4D (lin, zoh)", "S4D (legs, bilinear)", "S5", "DiagonalSSD"),
}
T = 37


@pytest.fixture(scope="module")
def result():
    return views.run(T=9)


def ranks_of(matrix):
    return np.array([views.rank_profile(M) for M in matrix.numpy()])


def ceiling(T):
    return np.minimum(np.arange(1, T), T - np.arange(1, T))


def test_every_layer_with_a_matrix_is_shown_and_within_its_state(result):
    assert result.passed, views.problems(result.metadata)
    assert [view["layer"] for view in result.metadata["views"]] == list(KERNELS)
    assert {"RWKVChannelMix", "RNN", "GRU"} <= set(result.metadata["without"])
    for view in result.metadata["views"]:
        assert len(view["ranks_most"]) == 8
        assert [len(row) for row in view["matrix"]] == list(range(1, 10))


@pytest.mark.parametrize("N", [1, 3, 5])
def test_the_profile_of_n_modes_is_n_away_from_the_ends(N):
    a = roots_of_unity(N)
    M = ssm_kernel(a, np.ones(N), np.arange(1.0, N + 1), 23)
    assert views.rank_profile(M) == np.minimum(ceiling(23), N).tolist()


def test_the_profile_of_any_matrix_is_the_size_of_its_blocks():
    M = np.tril(np.random.default_rng(5).standard_normal((24, 24)))
    assert views.rank_profile(M) == ceiling(24).tolist()
    assert views.rank_profile(np.eye(7)) == [0] * 6
    assert views.rank_profile(np.zeros((3, 3))) == [0, 0]


@pytest.mark.parametrize("name", list(KERNELS))
def test_the_state_of_a_head_is_that_of_the_table_by_hand(name):
    layer, matrix, values = views.materialise(KERNELS[name], 5, 0)
    assert views.state_of_a_head(layer, matrix, values) == STATES.get(name)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", list(STATES))
def test_no_rank_exceeds_the_state(name, seed):
    _, matrix, _ = views.materialise(KERNELS[name], T, seed)
    ranks = ranks_of(matrix)
    assert (ranks <= np.minimum(ceiling(T), STATES[name])).all()
    if not name.startswith("S4"):  # slow pairs of modes lie below the tolerance
        assert (ranks[:, 2:-2] == min(STATES[name], 3)).all()


def test_generic_modes_reach_the_state():
    """Decays and frequencies far apart: every head of S4D has rank N."""
    layer = S4D(4, 6, dt_min=0.5, dt_max=1.0, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        layer.log_A_real.copy_(torch.rand(4, 3, generator=generator) - 3)
        layer.A_imag.copy_(torch.tensor([0.3, 1.5, 3.0]).expand(4, 3))
    x = torch.randn(1, T, 4, dtype=torch.float64, generator=generator)
    ranks = ranks_of(layer.kernel_matrix(x)[0][0].detach())
    assert (ranks == np.minimum(ceiling(T), 6)).all()


@pytest.mark.parametrize("positions", ["rotary", "none"])
def test_attention_has_the_rank_of_its_blocks(positions):
    """Above its head's width 2 and any state here: the exponential has no bound."""
    torch.manual_seed(3)
    layer = Attention(6, 3, positions=positions, dtype=torch.float64)
    with torch.no_grad():
        layer.q_proj.weight.mul_(4)
        x = torch.randn(1, 25, 6, dtype=torch.float64)
        matrix = layer.kernel_matrix(x)[0][0]
    assert (ranks_of(matrix).max(1) == 12).all()


@pytest.mark.parametrize("name", list(KERNELS))
def test_which_layers_are_time_invariant(name):
    """M[t, s] depends on t - s alone, or (where it is selective) does not."""
    _, matrix, _ = views.materialise(KERNELS[name], 17, 2)
    same = torch.allclose(matrix[:, 1:, 1:], matrix[:, :-1, :-1], rtol=1e-10)
    assert same == (name in INVARIANT)


def test_a_matrix_of_higher_rank_is_caught(monkeypatch):
    honest = SelectiveSSM._kernel
    noise = torch.randn(40, 40, generator=torch.Generator().manual_seed(0))

    def wrong(self, u):
        L = u.shape[1]
        return honest(self, u) + 1e-4 * noise[:L, :L].tril(-1).double()

    monkeypatch.setattr(SelectiveSSM, "_kernel", wrong)
    monkeypatch.setattr(views, "LAYERS", [KERNELS["SelectiveSSM"]])
    result = views.run(T=12)
    assert result.passed is False
    found = views.problems(result.metadata)
    assert found[0] == "SelectiveSSM: a rank of 6 below the diagonal, state 3"
    assert "the form 'matrix' is off" in found[1]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("above_diagonal", 1e-30),
        ("above_diagonal", "NaN"),
        ("ranks_most", [1, 2, 7, 1, 1, 1, 1, 1]),
        ("errors", {"full": 0.0, "steps": 1e-9, "kernel": 0.0}),
        ("errors", {"full": 0.0, "steps": 0.0, "kernel": "NaN"}),
    ],
)
def test_a_forged_record_is_found(result, name, value):
    forged = json.loads(json.dumps(result.metadata))
    assert views.problems(forged) == []
    forged["views"][0][name] = value
    assert len(views.problems(forged)) == 1


def test_a_state_of_unknown_parts_is_named():
    class Strange(NamedTuple):
        memory: torch.Tensor

    layer, matrix, values = views.materialise(KERNELS["SelectiveSSM"], 3, 0)
    state = Strange(torch.zeros(1, 5))
    layer.init_state = lambda batch_size: state
    layer.step = lambda x_t, state: (x_t, state)
    with pytest.raises(AssertionError, match="Strange has memory; name the part"):
        views.state_of_a_head(layer, matrix, values)


def test_entries_are_relative_to_the_largest_below_the_diagonal():
    M = np.array([[8.0, 0.0], [-2.0, 0.123456]])
    assert views.lower_rows(M) == [[4.0], [-1.0, 0.0617]]
    assert views.lower_rows(np.zeros((1, 1))) == [[0.0]]


def test_the_picture_shows_every_layer(result):
    figure = views.PICTURES[0].render([result])
    titles = [ax.get_title() for ax in figure.axes]
    for name in KERNELS:
        assert any(title.startswith(f"{name}\n") for title in titles), name
    assert any("state grows" in title for title in titles)


def test_the_command_draws(tmp_path, capsys, monkeypatch):
    path = tmp_path / "views.png"
    monkeypatch.setattr(views, "LAYERS", [KERNELS["RWKVBlock"], KERNELS["Hyena"]])
    argv = ["--T", "5", "--plot-path", str(path)]
    assert command_line(views.run, pictures=views.PICTURES, argv=argv) == 0
    assert capsys.readouterr().out.startswith("[PASS] views: 1 layers within")
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"T": 3}, "T: got 3"),
        ({"T": 129}, "T: got 129; expected at most 128"),
        ({"seed": -1}, "seed: got -1"),
    ],
)
def test_bad_input_is_named(options, words):
    with pytest.raises(InputError, match=words):
        views.run(**options)
