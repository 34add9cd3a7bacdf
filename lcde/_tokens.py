"""A Linear CDE along tokens: one matrix for each token instead of one a position.

The published A5 model has omega = xi = the integral of (s, X_s), so that its Euler
steps of 1/L take the control's values as velocities, at positions i = 1 … L-1:

    y_i = y_{i-1} + (A(v_i) y_{i-1} + B v_i) / L,   v_i = (t_i, E[x_i]),
    A(v) = sum_k v_k A_k,   t_i = i / (L - 1).

A(v_i) is t_i A_0 + M[x_i] with M[token] = A((0, E[token])): V + 1 matrices in all, of
one matrix product, serve every position of every sequence. The gradient goes the same
way back: dy ⊗ y of all positions is added up by token, and A and E get theirs from the
V + 1 sums.

R sequences, L positions, V tokens, H states, W = H + 1 channels of omega.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lcde._structures import Structure

FEW = 8  # positions for which V + 1 matrices would be far too many
MANY = 8  # rows a matrix from which on a processor goes through them by token …
BLOCK = 32  # … and this many at once


def token_states(
    structure: Structure,
    B: Float[Array, "H W"],
    embedding: Float[Array, "V d"],
    tokens: Int[Array, "R L"],
    y0: Float[Array, "R H"],
) -> Float[Array, "R L H"]:
    """y_0 … y_{L-1} of every sequence (equations above).

    At most FEW positions in all are taken one by one. The gradient of A is then a sum
    of few outer products, which XLA forms inside the optimiser's update; it is never
    written to memory.
    """
    R, L = tokens.shape
    times = jnp.linspace(0, 1, L, dtype=y0.dtype)[1:]
    if R * (L - 1) <= FEW:
        return _one_by_one(structure, B, embedding[tokens[:, 1:]], times, y0)
    alone = jnp.pad(embedding, ((0, 1), (1, 0))).at[-1, 0].set(1) / L
    stack = structure.contract(alone).closed()
    later = _recursion(stack, alone @ B.T, tokens[:, 1:].T, times, y0)
    return jnp.concatenate([y0[:, None], later.swapaxes(0, 1)], axis=1)


def _one_by_one(
    structure: Structure,
    B: Float[Array, "H W"],
    x: Float[Array, "R n d"],
    times: Float[Array, " n"],
    y0: Float[Array, "R H"],
) -> Float[Array, "R L H"]:
    """The equations as they stand, with A_k y before the sum over k."""
    states = [y0]
    for i, t in enumerate(times):
        v = jnp.pad(x[:, i], ((0, 0), (1, 0))).at[:, 0].set(t) / (len(times) + 1)
        y = states[-1]
        states.append(y + jnp.einsum("rk,rkh->rh", v, _fields(structure, y)) + v @ B.T)
    return jnp.stack(states, axis=1)


@jax.custom_vjp
def _fields(structure: Structure, y: Float[Array, "R H"]) -> Float[Array, "R W H"]:
    """A_k y for every k and every y; the gradient of A is a sum of outer products."""
    return jax.vmap(structure.matvec)(y)


def _fields_forward(
    structure: Structure, y: Float[Array, "R H"]
) -> tuple[Float[Array, "R W H"], tuple]:
    return _fields(structure, y), (structure, y)


def _fields_backward(residuals: tuple, outer: Float[Array, "R W H"]) -> tuple:
    structure, y = residuals
    parts = (_outer(structure, *pair) for pair in zip(y, outer, strict=True))
    total = functools.reduce(lambda *two: jax.tree.map(jnp.add, *two), parts)
    return total, jax.vjp(jax.vmap(structure.matvec), y)[1](outer)[0]


_fields.defvjp(_fields_forward, _fields_backward)


# --- the recursion, with its own way back ---------------------------------------------


@jax.custom_vjp
def _recursion(
    stack: Structure,
    drift: Float[Array, "S H"],
    tokens: Int[Array, "n R"],
    times: Float[Array, " n"],
    y0: Float[Array, "R H"],
) -> Float[Array, "n R H"]:
    """y_i = y_{i-1} + (M_i + t_i M_S) y_{i-1} + (b_i + t_i b_S), M_i = stack[token_i].

    The last of ``stack`` and ``drift`` belongs to time. By itself JAX would add a
    gradient as large as the whole stack at every position.
    """

    def step(
        y: Float[Array, "R H"], at: tuple[Array, Array]
    ) -> tuple[Float[Array, "R H"], Float[Array, "R H"]]:
        token, t = at
        y = y + _increment(stack, token, t, y) + drift[token] + t * drift[-1]
        return y, y

    return jax.lax.scan(step, y0, (tokens, times))[1]


def _increment(
    stack: Structure,
    token: Int[Array, " R"],
    t: Float[Array, ""],
    y: Float[Array, "R H"],
) -> Float[Array, "R H"]:
    of_time = t * _at(stack, -1).matvec(y)
    if len(y) < MANY * _size(stack):
        return _at(stack, token).matvec(y) + of_time
    of_tokens = jax.lax.platform_dependent(
        stack, token, y, cpu=_matvec_by_token, default=_matvec_by_row
    )
    return of_tokens + of_time


def _at(stack: Structure, index: Int[Array, "*batch"] | int) -> Structure:
    return jax.tree.map(lambda leaf: leaf[index], stack)


def _size(stack: Structure) -> int:
    return len(jax.tree.leaves(stack)[0])


def _matvec_by_row(
    stack: Structure, token: Int[Array, " R"], y: Float[Array, "R H"]
) -> Float[Array, "R H"]:
    return _at(stack, token).matvec(y)


def _matvec_by_token(
    stack: Structure, token: Int[Array, " R"], y: Float[Array, "R H"]
) -> Float[Array, "R H"]:
    """The same for many rows: each product takes up to BLOCK rows of one token."""
    order = jnp.argsort(token)
    counts = jnp.bincount(token, length=_size(stack))
    blocks = (counts + BLOCK - 1) // BLOCK
    ends, last_block = jnp.cumsum(counts), jnp.cumsum(blocks)

    def one(i: Int[Array, ""], out: Float[Array, "R H"]) -> Float[Array, "R H"]:
        k = jnp.searchsorted(last_block, i, side="right")
        place = ends[k] - counts[k] + (i - last_block[k] + blocks[k]) * BLOCK
        places = place + jnp.arange(BLOCK)
        rows = jnp.where(places < ends[k], order[places], len(y))  # past it: dropped
        moved = jax.vmap(_at(stack, k).matvec)(y[rows])
        return out.at[rows].set(moved, mode="drop")

    return jax.lax.fori_loop(0, last_block[-1], one, jnp.zeros_like(y))


def _recursion_forward(
    stack: Structure,
    drift: Float[Array, "S H"],
    tokens: Int[Array, "n R"],
    times: Float[Array, " n"],
    y0: Float[Array, "R H"],
) -> tuple[Float[Array, "n R H"], tuple]:
    later = _recursion(stack, drift, tokens, times, y0)
    earlier = jnp.concatenate([y0[None], later[:-1]])
    return later, (stack, drift, tokens, times, earlier)


def _recursion_backward(residuals: tuple, outer: Float[Array, "n R H"]) -> tuple:
    """lambda_i = g_i + (I + M_i + t_i M_S)^T lambda_{i+1}; dM[k] = sum lambda ⊗ y."""
    stack, drift, tokens, times, earlier = residuals

    def step(
        adjoint: Float[Array, "R H"], at: tuple[Array, Array, Array, Array]
    ) -> tuple[Float[Array, "R H"], Float[Array, "R H"]]:
        token, t, y, g = at
        adjoint = adjoint + g
        back = jax.vjp(lambda y: _increment(stack, token, t, y), y)[1]
        return adjoint + back(adjoint)[0], adjoint

    first, adjoints = jax.lax.scan(
        step, jnp.zeros_like(outer[0]), (tokens, times, earlier, outer), reverse=True
    )
    token, adjoint, y = (_flat(x) for x in (tokens, adjoints, earlier))
    timed = _flat(times[:, None, None] * adjoints)
    by_token = jnp.zeros_like(drift)
    d_drift = by_token.at[token].add(adjoint).at[-1].add(timed.sum(0))
    sums = jax.lax.platform_dependent(
        stack, token, adjoint, y, cpu=_sums_in_place, default=_sums_by_mask
    )
    (of_time,) = jax.vjp(lambda one: one.matvec(y), _at(stack, -1))[1](timed)
    d_stack = jax.tree.map(lambda a, b: a.at[-1].add(b), sums, of_time)
    return d_stack, d_drift, None, jnp.zeros_like(times), first


_recursion.defvjp(_recursion_forward, _recursion_backward)


def _flat(x: Array) -> Array:
    return x.reshape(-1, *x.shape[2:])


def _outer(
    one: Structure, y: Float[Array, "*P H"], g: Float[Array, "*Q H"]
) -> Structure:
    """The gradient, with respect to A, of g . A y: g ⊗ y in the structure of A."""
    return jax.vjp(lambda A: A.matvec(y), one)[1](g)[0]


def _sums_in_place(
    stack: Structure,
    token: Int[Array, " P"],
    adjoint: Float[Array, "P H"],
    y: Float[Array, "P H"],
) -> Structure:
    """For each token the sum of adjoint ⊗ y over its places, one place at a time.

    In the order of the tokens, so that a processor's cache holds the sum it adds to.
    """
    order = jnp.argsort(token)

    def add(i: Int[Array, ""], sums: Structure) -> Structure:
        place = order[i]
        k = token[place]
        more = _outer(_at(stack, k), y[place], adjoint[place])
        return jax.tree.map(lambda total, x: total.at[k].add(x), sums, more)

    zeros = jax.tree.map(jnp.zeros_like, stack)
    return jax.lax.fori_loop(0, len(token), add, zeros)


def _sums_by_mask(
    stack: Structure,
    token: Int[Array, " P"],
    adjoint: Float[Array, "P H"],
    y: Float[Array, "P H"],
) -> Structure:
    """The same sums as one matrix product, of adjoints masked for each token."""

    def of_one(k: Int[Array, ""], one: Structure) -> Structure:
        return _outer(one, y, jnp.where((token == k)[:, None], adjoint, 0))

    return jax.vmap(of_one)(jnp.arange(_size(stack)), stack)
