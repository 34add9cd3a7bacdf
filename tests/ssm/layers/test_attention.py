"""Attention against an explicit softmax, in its three forms, with a ragged cache."""

import numpy as np
import pytest
import torch

from ssm._errors import ArgumentError
from ssm.layers._base import state_bytes
from ssm.layers.attention import Attention
from tests.ssm.helpers import assert_close
from tests.ssm.layers.helpers import (
    check_compiles,
    check_empty,
    check_float32,
    check_forms,
    check_kernel,
    check_lengths,
    check_reruns,
    check_step_is_pure,
    materialise,
    random_input,
    random_state,
)

KINDS = ["rotary", "sinusoidal", "learned", "none"]


def build(positions="rotary", n_kv_heads=2, d_head=None, **options) -> Attention:
    torch.manual_seed(3)
    return Attention(
        *(7, 4, n_kv_heads, positions, 90, d_head), dtype=torch.float64, **options
    )


def explicit(layer: Attention, x: np.ndarray, kind: str) -> np.ndarray:
    """One row, one head and one query at a time, in the papers' formulas."""
    p = {n: v.detach().numpy() for n, v in layer.named_parameters()}
    L, P = len(x), layer.d_head
    placed = x.copy()
    for t in range(L):
        if kind == "learned":
            placed[t] += p["positions.table"][t]
        if kind == "sinusoidal":
            angles = t * 10000.0 ** (-np.arange(4) / 4)
            placed[t] += [*np.sin(angles), *np.cos(angles)][:7]

    def turned(z: np.ndarray, t: int) -> np.ndarray:
        if kind != "rotary":
            return z
        R = P // 2
        pairs = (z[:R] + 1j * z[R : 2 * R]) * np.exp(
            1j * t * 10000.0 ** (-np.arange(R) / R)
        )
        return np.concatenate([pairs.real, pairs.imag, z[2 * R :]])

    heads = []
    for h in range(layer.n_heads):
        shared = h // (layer.n_heads // layer.n_kv_heads)
        mine, theirs = slice(h * P, (h + 1) * P), slice(shared * P, (shared + 1) * P)
        q = [turned(p["q_proj.weight"][mine] @ placed[t], t) for t in range(L)]
        k = [turned(p["k_proj.weight"][theirs] @ placed[t], t) for t in range(L)]
        v = [p["v_proj.weight"][theirs] @ x[t] for t in range(L)]
        out = []
        for t in range(L):
            weights = np.exp([q[t] @ k[s] / np.sqrt(P) for s in range(t + 1)])
            out.append(sum(w * u for w, u in zip(weights, v, strict=False)))
            out[-1] = out[-1] / weights.sum()
        heads.append(np.stack(out))
    return np.concatenate(heads, 1) @ p["out_proj.weight"].T


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n_kv_heads", "d_head"), [(2, 3), (4, 2), (1, None)])
def test_equals_an_explicit_softmax(kind, n_kv_heads, d_head):
    layer = build(kind, n_kv_heads, d_head)
    x = random_input(layer, 2, 11)
    expected = np.stack([explicit(layer, row, kind) for row in x.numpy()])
    assert_close(layer(x)[0], torch.tensor(expected))


@pytest.mark.parametrize("kind", KINDS)
def test_whole_equals_pieces_equals_steps(kind):
    check_forms(build(kind, d_head=3), 17, [0, 1, 9, 9])


@pytest.mark.parametrize(("L", "cuts"), [(1, []), (63, [30]), (65, [64])])
def test_lengths_around_a_power_of_two(L, cuts):
    check_forms(build(), L, cuts)


@pytest.mark.parametrize("kind", KINDS)
def test_kernel_matrix_is_the_layer(kind):
    check_kernel(build(kind), 13)


@pytest.mark.parametrize("kind", KINDS)
def test_contract(kind):
    layer = build(kind)
    check_lengths(layer, [0, 9, 4], 9)
    check_step_is_pure(layer)
    check_empty(layer)
    check_reruns(layer, 17)
    check_float32(layer, 33)


def test_compiles():
    check_compiles(build(), 9)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_different_lengths_go_on_from_their_own_ends(kind):
    """Ragged prefill, ragged second piece, then steps: as each row alone."""
    layer = build(kind)
    x, lengths = random_input(layer, 3, 12), torch.tensor([6, 0, 3])
    more = torch.tensor([1, 4, 2])
    ends = (lengths + more).tolist()

    def piece(starts: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        rows = torch.full((3, 6, 7), float("nan"), dtype=x.dtype)
        for i in range(3):
            a, n = int(starts[i]), int(sizes[i])
            rows[i, :n] = x[i, a : a + n]
        return rows

    _, state = layer(piece(0 * lengths, lengths), lengths=lengths)
    y, state = layer(piece(lengths, more), state, more)
    outputs = [y[i, : more[i]] for i in range(3)]
    for t in range(2):
        x_t = torch.stack([x[i, end + t] for i, end in enumerate(ends)])
        y_t, state = layer.step(x_t, state)
        outputs = [torch.cat([o, r[None]]) for o, r in zip(outputs, y_t, strict=True)]
    assert state.length.tolist() == [end + 2 for end in ends]
    for i, end in enumerate(ends):
        alone, _ = layer(x[i : i + 1, : end + 2])
        assert_close(outputs[i], alone[0, lengths[i] :])


def test_rotary_scores_depend_on_differences_of_positions():
    positions = build().positions
    q, k = torch.randn(2, 1, 5, 1, 9, dtype=torch.float64).unbind(0)
    at = torch.tensor([[0, 1, 5, 7, 30]])

    def scores(shift: int) -> torch.Tensor:
        turned = [positions.rotate(z, at + shift)[0, :, 0] for z in (q, k)]
        return turned[0] @ turned[1].T

    assert_close(scores(1000), scores(0))


def test_positions_far_out_are_exact_in_float32():
    positions = build().positions
    z = torch.randn(1, 1, 1, 8)
    at = torch.tensor([[123_457]])
    assert_close(positions.rotate(z, at), positions.rotate(z.double(), at))


def test_the_cache_grows_by_one_entry_a_step():
    layer, state = build(n_kv_heads=2), build().init_state(3)
    sizes = []
    for x_t in random_input(layer, 3, 4).unbind(1):
        _, state = layer.step(x_t, state)
        sizes.append(state_bytes(state))
    entry = 3 * 2 * layer.n_kv_heads * layer.d_head * 8
    assert sizes == [3 * 8 + entry * n for n in (1, 2, 3, 4)]


def test_learned_positions_end_with_an_error():
    layer = Attention(4, 2, positions="learned", max_positions=6)
    _, state = layer(torch.zeros(2, 4, 4))
    _, state = layer(torch.zeros(2, 3, 4), state, torch.tensor([2, 0]))  # 6 and 4
    with pytest.raises(ArgumentError, match="max_positions = 6"):
        layer.step(torch.zeros(2, 4), state)
    with pytest.raises(ArgumentError, match="reaches position 6"):
        layer(torch.zeros(1, 7, 4))
    y, _ = layer(torch.zeros(1, 9, 4), lengths=torch.tensor([6]))
    assert y[:, 6:].eq(0).all()


def test_resets_after_to_empty():
    layer = materialise(lambda: Attention(6, 3, positions="learned"))
    assert 0.015 < layer.positions.table.std() < 0.025


def test_bad_arguments():
    with pytest.raises(ArgumentError, match="n_kv_heads: got 3; expected a divisor"):
        Attention(8, 4, 3)
    with pytest.raises(ArgumentError, match="positions: got 'alibi'"):
        Attention(8, positions="alibi")
    layer = build()
    x = random_input(layer, 2, 5)
    with pytest.raises(ArgumentError, match="x: got shape"):
        layer(x[..., :6])
    with pytest.raises(ArgumentError, match="lengths: got"):
        layer(x, lengths=torch.tensor([6, 1]))
    with pytest.raises(ArgumentError, match="expected one for a batch of 2"):
        layer(x, random_state(layer, 3))
    with pytest.raises(ArgumentError, match=r"state\.k: got shape"):
        layer(x, random_state(build(n_kv_heads=4), 2))
    with pytest.raises(ArgumentError, match="state: got a tuple"):
        layer(x, tuple(random_state(layer, 2)))
