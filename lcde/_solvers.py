"""Solvers of the Linear CDE dy = sum_k A_k y dω^k + B dω along a piecewise-linear path.

Between two knots ω moves along the straight line to ω + Δ, and there the equation is
y' = M y + b over one unit of time, M = sum_k Δ_k A_k and b = B Δ. So

    exact     y <- exp(M) y + phi_1(M) b     nothing is lost but rounding
    Euler     y <- y + M y + b               order 1 in the size of the steps
    adaptive  Tsitouras 5(4) with a PID step control, for any tolerance

Only the increments of ω matter, not the times of its knots: a CDE is invariant under
reparametrisation. Time acts where it is a channel of ω, as in ``lcde.LinearCDE``.

    A      W structured matrices H x H (``lcde._structures``)
    B      (H, W)
    path   (L, W): ω at its knots, time included where it is to act
    y0     (H,)
    ys     (L, H): the solution at the knots, ys[0] = y0

All are functions of one path; ``jax.vmap`` makes them functions of many. ``length``, of
which each path may have its own, is the number of knots that count: behind them the
path stands still and so does y, whatever the padding holds, NaN included; so ys[-1] is
the final state of every path.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from experiments.common import bad_input
from lcde._structures import Structure

Length = int | Int[Array, ""]
Tolerance = float | Float[Array, ""]


class Affine(NamedTuple):
    """y -> A y + c, of one matrix and vector or of stacks of both."""

    A: Structure
    c: Float[Array, "*stack H"]

    def after(self, earlier: "Affine") -> "Affine":
        """Both maps, the earlier one first."""
        return Affine(self.A.compose(earlier.A), self(earlier.c))

    def __call__(self, y: Float[Array, "*batch H"]) -> Float[Array, "*out H"]:
        return self.A.matvec(y) + self.c


Transition = Callable[[Structure, Array, Array], Affine]


def euler_transition(
    A: Structure, B: Float[Array, "H W"], increment: Float[Array, "*batch W"]
) -> Affine:
    """y -> y + M y + b, M = sum_k Δ_k A_k and b = B Δ."""
    return Affine(A.contract(increment).plus_identity(), increment @ B.T)


def exact_transition(
    A: Structure, B: Float[Array, "H W"], increment: Float[Array, "*batch W"]
) -> Affine:
    """y -> exp(M) y + phi_1(M) b, M = sum_k Δ_k A_k and b = B Δ."""
    return Affine(*A.contract(increment).flow(increment @ B.T))


TRANSITIONS: dict[str, Transition] = {
    "exact": exact_transition,
    "euler": euler_transition,
}


def hold(path: Float[Array, "L W"], length: Length | None) -> Float[Array, "L W"]:
    """The path up to its ``length``-th knot, standing still from there on."""
    if length is None:
        return path
    return path[jnp.minimum(jnp.arange(len(path)), length - 1)]


def scan_cde_solve(
    A: Structure,
    B: Float[Array, "H W"],
    path: Float[Array, "L W"],
    y0: Float[Array, " H"],
    *,
    length: Length | None = None,
) -> Float[Array, "L H"]:
    """Euler over the increments, y_i = y_{i-1} + sum_k A_k y_{i-1} Δ_k + B Δ.

    Differs: the published ``scan_solve`` multiplies by values of the data instead of
    increments, so that it solves for ω_t = int_0^t (s, X_s) ds; for tokens, which have
    no meaningful differences, that is what ``lcde.a5`` does.
    """
    return _scan(euler_transition, A, B, hold(path, length), y0)


def exact_cde_solve(
    A: Structure,
    B: Float[Array, "H W"],
    path: Float[Array, "L W"],
    y0: Float[Array, " H"],
    *,
    length: Length | None = None,
) -> Float[Array, "L H"]:
    """y_i = exp(M_i) y_{i-1} + phi_1(M_i) b_i, one interval after the other.

    For final states of many paths whose increments repeat,
    ``lcde._shared.exact_final_states`` forms the exponential of each distinct increment
    once.
    """
    return _scan(exact_transition, A, B, hold(path, length), y0)


def parallel_cde_solve(
    A: Structure,
    B: Float[Array, "H W"],
    path: Float[Array, "L W"],
    y0: Float[Array, " H"],
    *,
    length: Length | None = None,
    transition: str = "exact",
) -> Float[Array, "L H"]:
    """The same maps composed by an associative scan, in about 2 log2 L levels.

    transition: "exact" or "euler". Costs two products of H x H matrices a step instead
    of one of a matrix with a vector: for structures whose products are cheap, or many
    idle processors. A structure that products leave (diagonal plus low rank) is made
    dense first. Raises InputError for an unknown transition.
    """
    if transition not in TRANSITIONS:
        known = " or ".join(TRANSITIONS)
        raise bad_input("transition", transition, known, "choose one of these")
    increments = jnp.diff(hold(path, length), axis=0)
    step = TRANSITIONS[transition](A, B, increments)
    step = Affine(step.A.closed(), step.c)
    through = jax.lax.associative_scan(lambda first, then: then.after(first), step)
    return jnp.concatenate([y0[None], through(y0)])


def adaptive_cde_solve(
    A: Structure,
    B: Float[Array, "H W"],
    path: Float[Array, "L W"],
    y0: Float[Array, " H"],
    *,
    ts: Float[Array, " L"] | None = None,
    length: Length | None = None,
    rtol: Tolerance = 1e-2,
    atol: Tolerance = 1e-2,
    max_steps: int = 16_384,
) -> Float[Array, "L H"]:
    """diffrax's Tsit5 under its PID control, which steps onto every knot of the path.

    ts: increasing times of the knots, [0, 1] in equal parts by default; they steer the
    steps, not the solution. The tolerances and the first step (a hundredth of the
    whole) are the published ones. Raises where ``max_steps`` do not suffice.
    """
    if len(path) == 1:
        return y0[None]
    if ts is None:
        ts = jnp.linspace(0.0, 1.0, len(path), dtype=path.dtype)
    control = diffrax.LinearInterpolation(ts, hold(path, length))

    def field(t: Any, y: Array, _: None) -> Array:
        velocity = control.derivative(t)
        return velocity @ A.matvec(y) + B @ velocity

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        diffrax.Tsit5(),
        ts[0],
        ts[-1],
        (ts[-1] - ts[0]) / 100,
        y0,
        saveat=diffrax.SaveAt(ts=ts),
        stepsize_controller=diffrax.ClipStepSizeController(
            diffrax.PIDController(rtol=rtol, atol=atol), jump_ts=ts
        ),
        max_steps=max_steps,
    )
    assert solution.ys is not None, "SaveAt(ts=…) saves"
    return solution.ys


def _scan(
    transition: Transition,
    A: Structure,
    B: Float[Array, "H W"],
    path: Float[Array, "L W"],
    y0: Float[Array, " H"],
) -> Float[Array, "L H"]:
    def step(y: Array, increment: Array) -> tuple[Array, Array]:
        y = transition(A, B, increment)(y)
        return y, y

    _, ys = jax.lax.scan(step, y0, jnp.diff(path, axis=0))
    return jnp.concatenate([y0[None], ys])


Solver = Callable[..., Float[Array, "L H"]]
SOLVERS: dict[str, Solver] = {
    "exact": exact_cde_solve,
    "parallel": parallel_cde_solve,
    "euler": scan_cde_solve,
    "adaptive": adaptive_cde_solve,
}
