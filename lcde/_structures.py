"""Stacks of structured matrices A_1 … A_W: what a Linear CDE's vector field is made of.

A structure holds matrices with leading axes, ``(*stack, H, H)`` in the dense form. The
vector field is a stack of W; the combination of it at a velocity v,

    A.contract(v) = sum_k v_k A_k,

is of the same class again, with the leading axes of v. Storage is channel first, so
that a contraction is one matrix product. Which operations keep the structure:

                        numbers a matrix     product        exponential
    Dense               H^2                  H^3            H^3
    BlockDiagonal       H b                  H b^2          H b^2
    Diagonal            H                    H              H
    DiagonalPlusLowRank H (1 + 2 r W)        becomes Dense  becomes Dense

(The rank of a contraction of DiagonalPlusLowRank is r W: the factors of all channels
stand side by side, and applying it costs H r W as applying its A_k one by one does.)

All initial matrices have E |A_k y|^2 = |y|^2 for every y, which for Dense is the
published initialisation, standard normal / sqrt(H) (Muca Cirone et al. 2024).

Source: Walker et al., "Structured Linear CDEs: Maximally Expressive and
Parallel-in-Time Sequence Models", arXiv:2505.17761, section 4. Differs: the moment
above instead of one deviation for every structure, so that structures start alike.
"""

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from experiments.common import bad_input, check_integer

TAYLOR_DEGREE = 8  # of expm
MOST_SQUARINGS = 128  # enough for every float32; beyond it exp overflows anyhow


# --- the matrix exponential -----------------------------------------------------------


@jax.custom_vjp
def expm(M: Float[Array, "*stack n n"]) -> Float[Array, "*stack n n"]:
    """exp(M) = T_8(M / 2^s)^(2^s) of real matrices, T_8 the Taylor polynomial.

    s is chosen for each matrix by its 1-norm, so that the remainder is below the
    rounding of the dtype; T_8 takes three matrix products. The gradient is exact at the
    price of two values: the adjoint of the derivative at M is the derivative at M^T
    (Al-Mohy & Higham 2009). Of infinite or NaN entries come NaN.

    Differs: ``jax.scipy.linalg.expm`` goes through every Padé order and 16 squarings
    once it is batched.
    """
    return _scaled_taylor(M)


def _expm_forward(
    M: Float[Array, "*stack n n"],
) -> tuple[Float[Array, "*stack n n"], Float[Array, "*stack n n"]]:
    return _scaled_taylor(M), M


def _expm_backward(
    M: Float[Array, "*stack n n"], cotangent: Float[Array, "*stack n n"]
) -> tuple[Float[Array, "*stack n n"]]:
    return (jax.jvp(_scaled_taylor, (M.mT,), (cotangent,))[1],)


expm.defvjp(_expm_forward, _expm_backward)


def _scaled_taylor(M: Float[Array, "*stack n n"]) -> Float[Array, "*stack n n"]:
    norm = jax.lax.stop_gradient(jnp.abs(M).sum(-2).max(-1))
    n_terms = TAYLOR_DEGREE + 1
    largest = (float(jnp.finfo(M.dtype).eps) * math.factorial(n_terms)) ** (1 / n_terms)
    exponent = jnp.ceil(jnp.log2(jnp.maximum(norm / largest, 1)))
    squarings = jnp.clip(exponent, 0, MOST_SQUARINGS).astype(jnp.int32)[..., None, None]

    most = squarings.max(initial=0)

    def square(state: tuple[Array, Array]) -> tuple[Array, Array]:
        i, E = state
        return i + 1, jnp.where(i < squarings, E @ E, E)

    # Not ldexp of M itself, whose derivative is wrong where an entry is zero.
    scale = jnp.ldexp(jnp.ones((), M.dtype), -squarings)
    start = jnp.zeros((), jnp.int32), _taylor(scale * M)
    return jax.lax.while_loop(lambda at: at[0] < most, square, start)[1]


def _taylor(M: Float[Array, "*stack n n"]) -> Float[Array, "*stack n n"]:
    """sum_j M^j / j!, j = 0 … 8, in three products.

    (Bader, Blanes & Casas 2019, "Computing the Matrix Exponential with an Optimized
    Taylor Polynomial Approximation", equation 11 with x_3 = 2 / 3.)
    """
    root = math.sqrt(177)
    I = jnp.eye(M.shape[-1], dtype=M.dtype)  # noqa: E741
    M2 = M @ M
    M4 = M2 @ ((1 + root) / 132 * M + (1 + root) / 528 * M2)
    left = 2 / 3 * M2 + M4
    right = (
        (29 * root - 271) / 210 * I
        + 11 * (root - 1) / 840 * M
        + 11 * (root - 9) / 3360 * M2
        + (89 - root) / 2240 * M4
    )
    return left @ right + (857 - 58 * root) / 630 * M2 + M + I


def phi_1(z: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """(e^z - 1) / z, and 1 at 0, elementwise; accurate near 0, and so is its gradient.

    What a constant input adds over one unit of time: y' = z y + b from 0 ends at
    phi_1(z) b.
    """
    small = jnp.abs(z) < 0.5
    inside = jnp.where(small, z, 0.0)
    series = jnp.ones_like(z)
    for n in range(15, 1, -1):  # 0.5^15 / 16! is below the rounding of float64
        series = 1 + inside * series / n
    outside = jnp.where(small, 1.0, z)
    return jnp.where(small, series, jnp.expm1(outside) / outside)


# --- structures -----------------------------------------------------------------------


class Structure(eqx.Module):
    """Matrices of one structure, stacked along any leading axes.

    Axes broadcast as in NumPy: one vector may meet a stack of matrices.
    """

    @property
    @abstractmethod
    def size(self) -> int:
        """H, for matrices H x H."""

    @abstractmethod
    def contract(self, velocity: Float[Array, "*batch W"]) -> "Structure":
        """sum_k v_k A_k, for a stack of W matrices."""

    @abstractmethod
    def matvec(self, y: Float[Array, "*batch H"]) -> Float[Array, "*out H"]:
        """A y, of each matrix with its vector."""

    @abstractmethod
    def compose(self, earlier: Any) -> "Structure":
        """The product A_self A_earlier, of two of one class: one after the other."""

    @abstractmethod
    def dense(self) -> Float[Array, "*stack H H"]:
        """The matrices written out."""

    @abstractmethod
    def plus_identity(self) -> "Structure":
        """I + A."""

    @abstractmethod
    def flow(
        self, b: Float[Array, "*stack H"]
    ) -> tuple["Structure", Float[Array, "*stack H"]]:
        """exp(A) and phi_1(A) b: y' = A y + b takes y_0 to exp(A) y_0 + phi_1(A) b."""

    def expm(self) -> "Structure":
        """exp(A)."""
        return Dense(expm(self.dense()))

    def closed(self) -> "Structure":
        """The same matrices in a structure that products keep."""
        return self


class Dense(Structure):
    """Any matrices: ``matrix`` is (*stack, H, H)."""

    matrix: Float[Array, "*stack H H"]

    @classmethod
    def random(cls, width: int, size: int, *, key: PRNGKeyArray) -> "Dense":
        """W matrices of standard normal entries / sqrt(H)."""
        return cls(jr.normal(key, (width, size, size)) / size**0.5)

    @property
    def size(self) -> int:
        return self.matrix.shape[-1]

    def contract(self, velocity: Float[Array, "*batch W"]) -> "Dense":
        return Dense(_contract(velocity, self.matrix))

    def matvec(self, y: Float[Array, "*batch H"]) -> Float[Array, "*out H"]:
        return jnp.einsum("...ij,...j->...i", self.matrix, y)

    def compose(self, earlier: "Dense") -> "Dense":
        return Dense(self.matrix @ earlier.matrix)

    def dense(self) -> Float[Array, "*stack H H"]:
        return self.matrix

    def plus_identity(self) -> "Dense":
        return Dense(self.matrix + jnp.eye(self.size, dtype=self.matrix.dtype))

    def flow(
        self, b: Float[Array, "*stack H"]
    ) -> tuple["Dense", Float[Array, "*stack H"]]:
        E, c = _flow(self.matrix, b)
        return Dense(E), c


class Diagonal(Structure):
    """Diagonal matrices: ``diagonal`` is (*stack, H)."""

    diagonal: Float[Array, "*stack H"]

    @classmethod
    def random(cls, width: int, size: int, *, key: PRNGKeyArray) -> "Diagonal":
        """W matrices with standard normal diagonals."""
        return cls(jr.normal(key, (width, size)))

    @property
    def size(self) -> int:
        return self.diagonal.shape[-1]

    def contract(self, velocity: Float[Array, "*batch W"]) -> "Diagonal":
        return Diagonal(_contract(velocity, self.diagonal))

    def matvec(self, y: Float[Array, "*batch H"]) -> Float[Array, "*out H"]:
        return self.diagonal * y

    def compose(self, earlier: "Diagonal") -> "Diagonal":
        return Diagonal(self.diagonal * earlier.diagonal)

    def dense(self) -> Float[Array, "*stack H H"]:
        return _on_diagonal(self.diagonal)

    def plus_identity(self) -> "Diagonal":
        return Diagonal(self.diagonal + 1)

    def flow(
        self, b: Float[Array, "*stack H"]
    ) -> tuple["Diagonal", Float[Array, "*stack H"]]:
        return self.expm(), phi_1(self.diagonal) * b

    def expm(self) -> "Diagonal":
        return Diagonal(jnp.exp(self.diagonal))


class BlockDiagonal(Structure):
    """Square blocks along the diagonal: ``blocks`` is (*stack, H / b, b, b)."""

    blocks: Float[Array, "*stack n b b"]

    @classmethod
    def random(
        cls, width: int, size: int, block_size: int, *, key: PRNGKeyArray
    ) -> "BlockDiagonal":
        """W matrices with blocks of standard normal entries / sqrt(b).

        Raises InputError unless b divides H.
        """
        check_integer("block_size", block_size, at_least=1, example=4)
        if size % block_size:
            raise bad_input(
                "block_size", block_size, f"a divisor of the size {size}", "try 4"
            )
        shape = (width, size // block_size, block_size, block_size)
        return cls(jr.normal(key, shape) / block_size**0.5)

    @property
    def size(self) -> int:
        return self.blocks.shape[-3] * self.blocks.shape[-1]

    def contract(self, velocity: Float[Array, "*batch W"]) -> "BlockDiagonal":
        return BlockDiagonal(_contract(velocity, self.blocks))

    def matvec(self, y: Float[Array, "*batch H"]) -> Float[Array, "*out H"]:
        return _join(jnp.einsum("...nij,...nj->...ni", self.blocks, self._split(y)))

    def compose(self, earlier: "BlockDiagonal") -> "BlockDiagonal":
        return BlockDiagonal(self.blocks @ earlier.blocks)

    def dense(self) -> Float[Array, "*stack H H"]:
        n, b = self.blocks.shape[-3:-1]
        spread = jnp.einsum("...nij,nm->...nimj", self.blocks, jnp.eye(n))
        return spread.reshape(*spread.shape[:-4], n * b, n * b)

    def plus_identity(self) -> "BlockDiagonal":
        identity = jnp.eye(self.blocks.shape[-1], dtype=self.blocks.dtype)
        return BlockDiagonal(self.blocks + identity)

    def flow(
        self, b: Float[Array, "*stack H"]
    ) -> tuple["BlockDiagonal", Float[Array, "*stack H"]]:
        E, c = _flow(self.blocks, self._split(b))
        return BlockDiagonal(E), _join(c)

    def expm(self) -> "BlockDiagonal":
        return BlockDiagonal(expm(self.blocks))

    def _split(self, y: Float[Array, "*batch H"]) -> Float[Array, "*batch n b"]:
        return y.reshape(*y.shape[:-1], *self.blocks.shape[-3:-1])


class DiagonalPlusLowRank(Structure):
    """diag(D) + U V^T: ``diagonal`` (*stack, H), ``U`` and ``V`` (*stack, H, r).

    Products and exponentials are no longer of low rank and come out Dense.
    """

    diagonal: Float[Array, "*stack H"]
    U: Float[Array, "*stack H r"]
    V: Float[Array, "*stack H r"]

    @classmethod
    def random(
        cls, width: int, size: int, rank: int, *, key: PRNGKeyArray
    ) -> "DiagonalPlusLowRank":
        """W matrices: half of E |A y|^2 from the diagonal, half from normal U and V."""
        check_integer("rank", rank, at_least=1, example=1)
        diagonal_key, U_key, V_key = jr.split(key, 3)
        scale = (2 * size * rank) ** -0.25
        return cls(
            jr.normal(diagonal_key, (width, size)) / 2**0.5,
            jr.normal(U_key, (width, size, rank)) * scale,
            jr.normal(V_key, (width, size, rank)) * scale,
        )

    @property
    def size(self) -> int:
        return self.diagonal.shape[-1]

    def contract(self, velocity: Float[Array, "*batch W"]) -> "DiagonalPlusLowRank":
        weighted = velocity[..., None, None] * self.U
        V = jnp.broadcast_to(self.V, weighted.shape)
        diagonal = _contract(velocity, self.diagonal)
        return DiagonalPlusLowRank(diagonal, _side_by_side(weighted), _side_by_side(V))

    def matvec(self, y: Float[Array, "*batch H"]) -> Float[Array, "*out H"]:
        inner = jnp.einsum("...hr,...h->...r", self.V, y)
        return self.diagonal * y + jnp.einsum("...hr,...r->...h", self.U, inner)

    def compose(self, earlier: "DiagonalPlusLowRank") -> Dense:
        return self.closed().compose(earlier.closed())

    def dense(self) -> Float[Array, "*stack H H"]:
        return _on_diagonal(self.diagonal) + self.U @ self.V.mT

    def plus_identity(self) -> "DiagonalPlusLowRank":
        return DiagonalPlusLowRank(self.diagonal + 1, self.U, self.V)

    def flow(
        self, b: Float[Array, "*stack H"]
    ) -> tuple[Dense, Float[Array, "*stack H"]]:
        return self.closed().flow(b)

    def closed(self) -> Dense:
        return Dense(self.dense())


def _contract(
    velocity: Float[Array, "*batch W"], stack: Float[Array, "W *matrix"]
) -> Float[Array, "*out"]:
    # As one product of matrices: of tensordot's gradient XLA makes a transposed array,
    # and an optimiser's update that reads it is several times slower.
    flat = velocity @ stack.reshape(stack.shape[0], -1)
    return flat.reshape(*velocity.shape[:-1], *stack.shape[1:])


def _flow(
    M: Float[Array, "*stack n n"], b: Float[Array, "*stack n"]
) -> tuple[Float[Array, "*stack n n"], Float[Array, "*stack n"]]:
    """exp(M) and phi_1(M) b out of exp([[M, b], [0, 0]]) (Van Loan 1978)."""
    wide = jnp.concatenate([M, b[..., None]], axis=-1)
    E = expm(jnp.concatenate([wide, jnp.zeros_like(wide[..., :1, :])], axis=-2))
    return E[..., :-1, :-1], E[..., :-1, -1]


def _on_diagonal(diagonal: Float[Array, "*stack H"]) -> Float[Array, "*stack H H"]:
    return diagonal[..., None] * jnp.eye(diagonal.shape[-1], dtype=diagonal.dtype)


def _join(y: Float[Array, "*batch n b"]) -> Float[Array, "*batch H"]:
    return y.reshape(*y.shape[:-2], y.shape[-2] * y.shape[-1])


def _side_by_side(factors: Float[Array, "*batch W H r"]) -> Float[Array, "*batch H Wr"]:
    swapped = jnp.moveaxis(factors, -3, -2)
    return swapped.reshape(*swapped.shape[:-2], factors.shape[-3] * factors.shape[-1])


class _Sizes(NamedTuple):
    width: int
    size: int
    block_size: int
    rank: int


Draw = Callable[[_Sizes, PRNGKeyArray], Structure]
STRUCTURES: dict[str, Draw] = {
    "dense": lambda n, key: Dense.random(n.width, n.size, key=key),
    "diagonal": lambda n, key: Diagonal.random(n.width, n.size, key=key),
    "block_diagonal": lambda n, key: BlockDiagonal.random(
        n.width, n.size, n.block_size, key=key
    ),
    "diagonal_plus_low_rank": lambda n, key: DiagonalPlusLowRank.random(
        n.width, n.size, n.rank, key=key
    ),
}


def random_structure(
    name: str,
    width: int,
    size: int,
    *,
    block_size: int = 4,
    rank: int = 1,
    key: PRNGKeyArray,
) -> Structure:
    """A stack of W random H x H matrices of the structure called ``name``.

    block_size: b of block_diagonal. rank: r of diagonal_plus_low_rank. Raises
    InputError for an unknown name, and where b does not divide H.
    """
    if name not in STRUCTURES:
        known = ", ".join(STRUCTURES)
        raise bad_input("structure", name, f"one of {known}", "choose one")
    return STRUCTURES[name](_Sizes(width, size, block_size, rank), key)
