"""The model is its equation: ω = (t, X), y_0 = W X_0 + b, and the published laws."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common import InputError
from lcde import linear_cde
from lcde._model import Embedding, LinearCDE
from lcde._structures import BlockDiagonal, random_structure
from tests.lcde.test_solvers import naive_exact

TS = np.array([0.0, 0.5, 0.6, 2.0, 2.5], np.float32)


def paths(n: int, L: int = 5, d: int = 2) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.cumsum(rng.standard_normal((n, L, d)), axis=1).astype(np.float32) / L


def model(**options) -> LinearCDE:
    return LinearCDE(6, 2, key=jax.random.key(3), **options)


def reference(cde: LinearCDE, X: np.ndarray, ts: np.ndarray) -> np.ndarray:
    W, b, A, B = map(np.float64, (cde.init_matrix, cde.init_bias, cde.A.dense(), cde.B))
    control = np.concatenate([ts[:, None], X], axis=1).astype(float)
    return naive_exact(A, B, control, W @ X[0] + b)


def test_the_state_is_the_solution_along_time_and_data():
    X = paths(1)[0]
    cde = model(continuous_output=True)
    ys = eqx.filter_jit(cde)(X)
    wanted = reference(cde, X, np.linspace(0, 1, 5))
    np.testing.assert_allclose(ys, wanted, rtol=1e-4, atol=1e-5)
    assert np.array_equal(eqx.filter_jit(model())(X), ys[-1])


def test_irregular_times_act_through_the_channel_of_time():
    X = paths(1)[0]
    cde = model(continuous_output=True, structure=partial(random_structure, "diagonal"))
    ys = eqx.filter_jit(cde)(X, ts=jnp.asarray(TS))
    np.testing.assert_allclose(ys, reference(cde, X, TS), rtol=1e-4, atol=1e-5)
    assert np.abs(ys - eqx.filter_jit(cde)(X)).max() > 0.1


def test_a_batch_has_its_own_lengths():
    X, lengths = paths(3), jnp.array([2, 5, 1])
    cde = model(structure=partial(BlockDiagonal.random, block_size=3))
    ends = jax.jit(jax.vmap(lambda X, n: cde(X, length=n)))(X, lengths)
    for x, length, end in zip(X, lengths, ends, strict=True):
        wanted = reference(cde, x[:length], np.linspace(0, 1, 5)[:length])[-1]
        np.testing.assert_allclose(end, wanted, rtol=1e-4, atol=1e-5)


def test_parameters_have_the_published_laws_and_share_no_draw():
    cde = LinearCDE(256, 3, key=jax.random.key(0))
    scaled = {
        "W": cde.init_matrix,
        "b": cde.init_bias,
        "A": np.asarray(cde.A.dense()) * 16,
        "B": cde.B,
    }
    heads = set()
    for name, values in scaled.items():
        entries = np.asarray(values).ravel()
        # five standard errors of the mean and of the variance of normal numbers
        assert abs(entries.mean()) < 5 * len(entries) ** -0.5, name
        assert abs(entries.var() - 1) < 5 * (2 / len(entries)) ** 0.5, name
        heads.add(round(float(entries[0]), 4))
    assert len(heads) == 4
    assert cde.hidden_dim == 256
    assert cde.A.dense().shape == (4, 256, 256)


def test_tokens_are_embedded_as_rows():
    embedding = Embedding(5, 3, key=jax.random.key(0))
    tokens = jnp.array([[4, 0], [2, 2]])
    assert np.array_equal(embedding(tokens), np.asarray(embedding.weights)[tokens])


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        ((0, 2), {}, "hidden_dim: got 0"),
        ((4, 0), {}, "input_dim: got 0"),
        ((4, 2), {"solver": "rk4"}, "solver: got 'rk4'; expected one of exact"),
    ],
)
def test_what_cannot_be_is_named(arguments, options, said):
    with pytest.raises(InputError, match=said):
        LinearCDE(*arguments, key=jax.random.key(0), **options)


def test_the_module_of_document_2_has_its_names():
    names = [
        "Embedding",
        "LinearCDE",
        "A5LinearCDE",
        "adaptive_cde_solve",
        "scan_cde_solve",
        "train_model",
        "train_linear",
        "obtain_features_from_model",
        "run_lcde_toy_experiment",
        "run_lcde_A5_experiment",
        "exact_cde_solve",
        "parallel_cde_solve",
    ]
    assert set(names) <= set(linear_cde.__all__)
    assert all(callable(getattr(linear_cde, name)) for name in linear_cde.__all__)
    assert not jax.config.jax_enable_x64
