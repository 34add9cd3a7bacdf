"""The Linear CDE as a model, and the embedding that feeds it tokens."""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, PRNGKeyArray

from experiments.common import bad_input, check_integer
from lcde._solvers import SOLVERS, Length
from lcde._structures import Dense, Structure

Draw = Callable[..., Structure]  # (width, size, *, key) -> a stack of W matrices


class Embedding(eqx.Module):
    """token -> its row of ``weights``, drawn standard normal as published."""

    weights: Float[Array, "V H"]

    def __init__(self, num_embeddings: int, embedding_dim: int, *, key: PRNGKeyArray):
        self.weights = jr.normal(key, (num_embeddings, embedding_dim))

    def __call__(self, tokens: Int[Array, "*shape"]) -> Float[Array, "*shape H"]:
        return self.weights[tokens]


class LinearCDE(eqx.Module):
    """y_t = y_0 + int A y dω + int B dξ, with ω = ξ = (t, X) and y_0 = W X_0 + b.

    X (L, d) -> y_T (H,), or all of y at the knots (L, H) with ``continuous_output``.
    One path at a time; ``jax.vmap`` for many. W (``init_matrix``), b (``init_bias``)
    and B are standard normal, A standard normal / sqrt(H).

    Source: Muca Cirone et al. 2024, sections 3 and 5. Differs: no ``label_dim``, which
    the published class takes and does not use: a readout is trained apart.
    """

    init_matrix: Float[Array, "H d"]
    init_bias: Float[Array, " H"]
    A: Structure
    B: Float[Array, "H W"]
    solver: str = eqx.field(static=True)
    continuous_output: bool = eqx.field(static=True)

    def __init__(
        self,
        hidden_dim: int,
        input_dim: int,
        *,
        structure: Draw = Dense.random,
        solver: str = "exact",
        continuous_output: bool = False,
        key: PRNGKeyArray,
    ):
        """Draw the parameters; W = d + 1 channels of control.

        structure: draws A, for example ``partial(BlockDiagonal.random, block_size=4)``
        or ``partial(random_structure, "diagonal")``. solver: a name in ``SOLVERS``.
        Raises InputError for an unknown solver and for sizes below 1.
        """
        check_integer("hidden_dim", hidden_dim, at_least=1, example=256)
        check_integer("input_dim", input_dim, at_least=1, example=2)
        if solver not in SOLVERS:
            raise bad_input("solver", solver, f"one of {', '.join(SOLVERS)}", "try one")
        init_matrix_key, init_bias_key, A_key, B_key = jr.split(key, 4)
        self.init_matrix = jr.normal(init_matrix_key, (hidden_dim, input_dim))
        self.init_bias = jr.normal(init_bias_key, (hidden_dim,))
        self.A = structure(input_dim + 1, hidden_dim, key=A_key)
        self.B = jr.normal(B_key, (hidden_dim, input_dim + 1))
        self.solver = solver
        self.continuous_output = continuous_output

    @property
    def hidden_dim(self) -> int:
        return len(self.init_bias)

    def __call__(
        self,
        X: Float[Array, "L d"],
        *,
        ts: Float[Array, " L"] | None = None,
        length: Length | None = None,
    ) -> Float[Array, "*L H"]:
        """y_T, or y at the knots.

        ts: times of the knots, increasing; [0, 1] in equal parts by default. Irregular
        ones change the solution, for time is a channel of ω. length: the knots that
        count; ``ys[-1]`` and y_T are the state at the last of them.
        """
        solve = SOLVERS[self.solver]
        path, y0 = self.control(X, ts=ts), self.initial_state(X[0])
        ys = solve(self.A, self.B, path, y0, length=length)
        return ys if self.continuous_output else ys[-1]

    def control(
        self, X: Float[Array, "L d"], *, ts: Float[Array, " L"] | None = None
    ) -> Float[Array, "L W"]:
        """ω at the knots: time, then the data."""
        if ts is None:
            ts = default_times(len(X), X)
        return jnp.concatenate([ts[:, None], X], axis=-1)

    def initial_state(self, x0: Float[Array, " d"]) -> Float[Array, " H"]:
        """y_0 = W X_0 + b."""
        return self.init_matrix @ x0 + self.init_bias


def default_times(length: int, like: Float[Array, "*shape"]) -> Float[Array, " L"]:
    """[0, 1] in equal parts, in the dtype of ``like``."""
    return jnp.linspace(0, 1, length, dtype=like.dtype)
