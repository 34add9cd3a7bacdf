"""States along tokens against a plain loop in float64, gradients and all."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from lcde import _tokens
from lcde._solvers import scan_cde_solve
from lcde._structures import Dense, random_structure
from lcde._tokens import token_states

H, V = 4, 5

# Of the largest entry, for float64.
TOLERANCE = 1e-12


class Parameters(NamedTuple):
    A: Any
    B: Any
    embedding: Any
    y0: Any


def draw(
    structure: str = "dense", *, R: int, L: int, size: float = 1.0
) -> tuple[Parameters, jax.Array]:
    """Parameters in float64 and tokens; the last of V never occurs."""
    keys = jr.split(jr.key(7), 5)
    A = random_structure(structure, H + 1, H, block_size=2, rank=2, key=keys[0])
    parameters = Parameters(
        jax.tree.map(lambda leaf: size * leaf.astype(jnp.float64), A),
        jr.normal(keys[1], (H, H + 1), jnp.float64),
        jr.normal(keys[2], (V, H), jnp.float64),
        jr.normal(keys[3], (R, H), jnp.float64),
    )
    return parameters, jr.randint(keys[4], (R, L), 0, V - 1)


def naive(
    A: np.ndarray, B: np.ndarray, embedding: np.ndarray, y0: np.ndarray, tokens: Any
) -> np.ndarray:
    """y_i = y_{i-1} + (A y_{i-1}) (t_i, x_i) / L + B (t_i, x_i) / L, one by one."""
    L = tokens.shape[1]
    rows = []
    for row, y in zip(tokens, y0, strict=True):
        states = [y]
        for i in range(1, L):
            control = np.concatenate([[i / (L - 1)], embedding[row[i]]])
            field = np.stack([A_k @ y for A_k in A], axis=1)  # (H, W)
            y = y + (field @ control) / L + (B @ control) / L
            states.append(y)
        rows.append(np.stack(states))
    return np.stack(rows)


def signs(y: Any) -> Any:
    """Weights of both signs, no two alike."""
    return np.cos(np.arange(y.size) + 0.3).reshape(y.shape).astype(y.real.dtype)


def naive_gradients(p: Parameters, tokens: jax.Array) -> tuple[np.ndarray, Parameters]:
    """The states, and the gradient of their weighted sum, entry by entry.

    By the complex step: f(x + ih) = f(x) + ih f'(x) up to h^2, with h = 1e-150 exact.
    """
    given = [np.asarray(x) for x in (p.A.dense(), *p[1:])]
    rows = np.asarray(tokens)
    y = naive(*given, rows)
    gradients = []
    for n, array in enumerate(given):
        found = np.zeros_like(array)
        for index in np.ndindex(array.shape):
            moved = array.astype(complex)
            moved[index] += 1e-150j
            bent = naive(*given[:n], moved, *given[n + 1 :], rows)
            found[index] = (bent * signs(y)).sum().imag / 1e-150
        gradients.append(found)
    return y, Parameters(*gradients)


def states(p: Parameters, tokens: jax.Array) -> jax.Array:
    """Traced anew on each call: the paths are chosen while it is traced."""
    return jax.jit(lambda p: token_states(p.A, p.B, p.embedding, tokens, p.y0))(p)


def ours(p: Parameters, tokens: jax.Array) -> tuple[jax.Array, Parameters]:
    """The states, and the gradient of their weighted sum, compiled."""

    def total(p: Parameters) -> tuple[jax.Array, jax.Array]:
        y = states(p, tokens)
        return (y * signs(y)).sum(), y

    gradient, y = jax.jit(jax.grad(total, has_aux=True))(p)
    return y, gradient


def assert_close(found: Any, wanted: Any, tolerance: float = TOLERANCE) -> None:
    for one, other in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        assert one.shape == other.shape
        scale = max(float(np.abs(other).max()), 1e-300)
        error = float(np.abs(np.asarray(one) - np.asarray(other)).max()) / scale
        assert error <= tolerance, f"largest error {error:.1e} of {scale:.1e}"


# (R, L): the path of few positions, and that of the shared matrices.
@pytest.mark.parametrize(("R", "L"), [(3, 2), (1, 7), (2, 11)])
def test_states_and_gradients_are_those_of_the_equation(R: int, L: int) -> None:
    with jax.enable_x64(True):
        p, tokens = draw(R=R, L=L)
        found = ours(p, tokens)
        assert_close(found, naive_gradients(p, tokens))
        assert float(jnp.abs(found[1].embedding[V - 1]).max()) == 0  # it never occurs


@pytest.mark.parametrize(
    ("structure", "R", "L"),
    [
        ("diagonal", 3, 2),
        ("block_diagonal", 5, 3),
        ("diagonal_plus_low_rank", 5, 3),
    ],
)
def test_every_structure_is_its_dense_form(structure: str, R: int, L: int) -> None:
    with jax.enable_x64(True):
        p, tokens = draw(structure, R=R, L=L)
        dense, back = jax.vjp(lambda A: A.dense(), p.A)
        y, gradient = ours(p._replace(A=Dense(dense)), tokens)
        wanted = gradient._replace(A=back(gradient.A.dense())[0])
        assert_close(ours(p, tokens), (y, wanted))


def test_one_token_is_y0_alone() -> None:
    with jax.enable_x64(True):
        p, tokens = draw(R=4, L=1)
        np.testing.assert_array_equal(states(p, tokens), p.y0[:, None])


@pytest.mark.parametrize("size", [0.0, 1e6])
def test_extreme_matrices(size: float) -> None:
    """At 0 the states are sums; at 1e6 they reach 1e30 and stay those of the loop."""
    with jax.enable_x64(True):
        p, tokens = draw(R=3, L=6, size=size)
        wanted = naive(*(np.asarray(x) for x in (p.A.dense(), *p[1:])), tokens)
        assert_close(states(p, tokens), wanted)
        if size == 0:
            x = p.embedding[tokens[:, 1:]]
            times = jnp.broadcast_to(jnp.linspace(0, 1, 6)[1:, None], (3, 5, 1))
            drift = jnp.concatenate([times, x], -1) @ p.B.T / 6
            assert_close(states(p, tokens)[:, -1], p.y0 + drift.sum(1))


def test_matrices_of_tokens_serve_few_positions_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_tokens, "FEW", 0)
    with jax.enable_x64(True):
        p, tokens = draw(R=3, L=2)
        assert_close(ours(p, tokens), naive_gradients(p, tokens))


def test_rows_by_token_are_rows_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough rows for the other path; 0, 1, BLOCK and BLOCK + 1 rows of one token."""
    monkeypatch.setattr(_tokens, "BLOCK", 4)
    counts = [1, 4, 0, 5, 50]
    tokens = np.random.default_rng(0).permutation(np.repeat(np.arange(V), counts))
    with jax.enable_x64(True):
        p, _ = draw(R=len(tokens), L=2)
        stack = p.A.contract(jnp.pad(p.embedding, ((0, 0), (1, 0))))
        given = stack, jnp.asarray(tokens), p.y0
        matrices = np.asarray(stack.dense())[tokens]
        wanted = np.einsum("rij,rj->ri", matrices, np.asarray(p.y0))
        for apply in (_tokens._matvec_by_row, _tokens._matvec_by_token):
            assert_close(jax.jit(apply)(*given), wanted)
        two = jnp.stack([jnp.asarray(tokens), jnp.asarray(tokens[::-1])], axis=1)
        assert len(two) >= _tokens.MANY * (V + 1)
        wanted = naive(*(np.asarray(x) for x in (p.A.dense(), *p[1:])), two)
        assert_close(states(p, two), wanted)


def test_sums_of_outer_products_are_the_same_on_every_device() -> None:
    """Both ways of adding, whichever one this machine would take."""
    with jax.enable_x64(True):
        for structure in ("dense", "diagonal_plus_low_rank"):
            p, _ = draw(structure, R=1, L=1)
            stack = p.A.contract(jnp.pad(p.embedding, ((0, 0), (1, 0))))
            token = jnp.asarray([3, 0, 3, 1, 3, 0, 4])  # never 2
            adjoint, y = jr.normal(jr.key(3), (2, len(token), H), jnp.float64)
            given = stack, token, adjoint, y
            in_place = jax.jit(_tokens._sums_in_place)(*given)
            assert_close(jax.jit(_tokens._sums_by_mask)(*given), in_place)
            if structure == "dense":
                wanted = np.zeros((V, H, H))
                np.add.at(wanted, token, np.einsum("ph,pj->phj", adjoint, y))
                assert_close(in_place.dense(), wanted)


def test_states_are_those_of_the_path_whose_increments_are_the_values() -> None:
    """omega has increments (t_i, x_i) / L, solved by the package's Euler steps."""
    with jax.enable_x64(True):
        p, tokens = draw(R=2, L=7)
        times = jnp.linspace(0, 1, 7)[:, None]
        for y0, row, found in zip(p.y0, tokens, states(p, tokens), strict=True):
            increments = jnp.concatenate([times, p.embedding[row]], -1)[1:] / 7
            omega = jnp.pad(jnp.cumsum(increments, 0), ((1, 0), (0, 0)))
            assert_close(found, scan_cde_solve(p.A, p.B, omega, y0))


def test_in_float32_the_error_is_that_of_rounding() -> None:
    with jax.enable_x64(True):
        p, tokens = draw(R=5, L=13)
        wanted = naive_gradients(p, tokens)
        found = ours(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), p), tokens)
        assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(found))
        assert_close(found, wanted, 3e-5)
