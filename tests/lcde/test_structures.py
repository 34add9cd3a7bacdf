"""Structures are their dense matrices; the exponential is SciPy's, gradients included.

Float64 throughout, but for the rows that say float32.
"""

from decimal import Decimal, localcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from experiments.common import InputError
from lcde._structures import (
    STRUCTURES,
    expm,
    phi_1,
    random_structure,
)

W, H = 3, 6
NAMES = list(STRUCTURES)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def stack(name: str, seed: int = 0):
    return random_structure(name, W, H, block_size=2, rank=2, key=jax.random.key(seed))


def normal(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def close(got, want, rtol=1e-12):
    np.testing.assert_allclose(got, want, rtol=rtol, atol=rtol * np.abs(want).max())


# --- expm and phi_1 -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "rtol"), [(np.float32, 2e-6), (np.float64, 1e-13)], ids=["f32", "f64"]
)
def test_expm_is_scipys_for_norms_from_zero_to_fifty(dtype, rtol):
    scales = np.array([0, 1e-9, 0.03, 1, 8, 50])
    M = normal(6, 5, 5) / np.linalg.norm(normal(6, 5, 5), 2, axis=(1, 2), keepdims=True)
    M = (M * scales[:, None, None]).astype(dtype)
    got = np.asarray(jax.jit(expm)(M))
    assert got.dtype == dtype
    for E, matrix, scale in zip(got, M, scales, strict=True):
        close(E, scipy.linalg.expm(matrix.astype(float)), rtol * (1 + scale))


def test_expm_has_the_gradient_that_frechet_derivatives_give():
    M, G = 2 * normal(3, 4, 4), normal(3, 4, 4, seed=2)
    M[0] = np.triu(M[0])
    M[1] = 0
    got = jax.jit(jax.grad(lambda M: (expm(M) * G).sum()))(jnp.asarray(M))
    for gradient, matrix, cotangent in zip(got, M, G, strict=True):
        wanted = scipy.linalg.expm_frechet(matrix.T, cotangent, compute_expm=False)
        close(gradient, wanted)


def test_expm_of_entries_that_are_not_finite_ends_and_is_not_finite():
    M = np.ones((2, 5, 5)) * np.array([np.nan, np.inf])[:, None, None]
    assert not np.isfinite(jax.jit(expm)(M)).any()


def test_expm_of_a_nilpotent_matrix_is_its_polynomial():
    N = np.diag([1e6, 1e6], 1)
    close(jax.jit(expm)(N), np.eye(3) + N + N @ N / 2)


Z = [0.0, 1e-300, 1e-9, -1e-4, 0.3, -0.499, 0.501, 1.7, -40.0, 30.0]


def test_phi_1_and_its_derivative_keep_their_digits():
    got = jax.jit(jax.vmap(jax.value_and_grad(phi_1)))(np.array(Z))
    for z, value, slope in zip(Z, *got, strict=True):
        with localcontext(prec=700):
            x = Decimal(z) or Decimal("1e-310")
            wanted = (x.exp() - 1) / x, ((x - 1) * x.exp() + 1) / x**2
        assert float(value) == pytest.approx(float(wanted[0]), rel=1e-14)
        assert float(slope) == pytest.approx(float(wanted[1]), rel=1e-13)


# --- the structures -------------------------------------------------------------------


@jax.jit
def everything(A, B, v, y, b):
    """What the operations give for two stacks combined at v (4, W), as dense arrays."""
    C, D = A.contract(v), B.contract(v)
    E, c = C.flow(b)
    return {
        "stacks": (A.dense(), B.dense()),
        "contract": (C.dense(), D.dense()),
        "contract one": A.contract(v[0]).dense(),
        "matvec": C.matvec(y),
        "matvec of one vector": A.matvec(y[0]),
        "compose": C.compose(D).dense(),
        "plus_identity": C.plus_identity().dense(),
        "closed": C.closed().dense(),
        "expm": C.expm().dense(),
        "flow": (E.dense(), c),
    }


def operands(name: str):
    v, y, b = (jnp.asarray(normal(4, n, seed=n)) for n in (W, H, H + 1))
    return stack(name, 1), stack(name, 2), v, y, b[:, :H]


@pytest.mark.parametrize("name", NAMES)
def test_operations_are_those_of_the_dense_matrices(name):
    given = operands(name)
    got = jax.tree.map(np.asarray, everything(*given))
    v, y, b = map(np.asarray, given[2:])
    first, second = (np.einsum("nk,kij->nij", v, each) for each in got["stacks"])
    close(got["contract"][0], first)
    close(got["contract"][1], second)
    close(got["contract one"], first[0])
    close(got["matvec"], np.einsum("nij,nj->ni", first, y))
    close(got["matvec of one vector"], got["stacks"][0] @ y[0])
    close(got["compose"], first @ second)
    close(got["plus_identity"], first + np.eye(H))
    close(got["closed"], first)
    for i, matrix in enumerate(first):
        wide = np.zeros((H + 1, H + 1))
        wide[:-1] = np.concatenate([matrix, b[i, :, None]], axis=1)
        wanted = scipy.linalg.expm(wide)
        close(got["expm"][i], wanted[:-1, :-1])
        close(got["flow"][0][i], wanted[:-1, :-1])
        close(got["flow"][1][i], wanted[:-1, -1])


@pytest.mark.parametrize("name", NAMES)
def test_a_combination_has_the_class_of_its_stack_and_closed_stays_in_its_own(name):
    A = stack(name)
    combined = jax.eval_shape(lambda A: A.contract(jnp.ones(W)), A)
    closed = jax.eval_shape(lambda A: (A.closed(), A.closed().compose(A.closed())), A)
    assert type(combined) is type(A)
    assert type(closed[0]) is type(closed[1])
    assert A.size == combined.size == closed[0].size == H


@pytest.mark.parametrize("name", NAMES)
def test_gradients_through_the_flow_are_central_differences(name):
    given = operands(name)
    weights, more = normal(4, H, H), normal(4, H, seed=8)

    def loss(*operands):
        E, c = everything(*operands)["flow"]
        return (E * weights).sum() + (c * more).sum()

    gradients = jax.jit(jax.grad(loss, (0, 2, 4)))(*given)
    leaves, tree = jax.tree.flatten((given[0], given[2], given[4]))
    for i, gradient in enumerate(jax.tree.leaves(gradients)):
        direction = normal(*leaves[i].shape, seed=9)

        def along(h: float, i: int = i, direction: np.ndarray = direction) -> float:
            moved = [x + h * direction if j == i else x for j, x in enumerate(leaves)]
            A, v, b = jax.tree.unflatten(tree, moved)
            E, c = jax.tree.map(
                np.asarray, everything(A, given[1], v, given[3], b)["flow"]
            )
            return float((E * weights).sum() + (c * more).sum())

        h = 1e-3
        slope = (8 * (along(h) - along(-h)) - along(2 * h) + along(-2 * h)) / (12 * h)
        got = float((np.asarray(gradient) * direction).sum())
        assert got == pytest.approx(slope, rel=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_random_matrices_keep_the_mean_square_of_every_vector(name):
    A = random_structure(name, 4000, 8, block_size=4, rank=3, key=jax.random.key(3))
    y = np.array([2.0, 0, 0, -1, 3, 0, 0, 0])
    images = jax.jit(lambda A: A.matvec(jnp.asarray(y)))(A)
    mean = np.square(np.asarray(images)).sum(-1).mean()
    assert mean == pytest.approx(y @ y, rel=0.1)


def test_unknown_structures_and_sizes_that_do_not_fit_are_named():
    key = jax.random.key(0)
    with pytest.raises(InputError, match=r"'densee'.*block_diagonal"):
        random_structure("densee", W, H, key=key)
    with pytest.raises(InputError, match=r"4.*divisor of the size 6"):
        random_structure("block_diagonal", W, H, block_size=4, key=key)
    with pytest.raises(InputError, match="rank"):
        random_structure("diagonal_plus_low_rank", W, H, rank=0, key=key)
