"""bound_N: the least error of any linear model with N states and h_0 = 0.

A linear time-invariant model with N states, one input, one output and no direct path
has the kernel k̂_j = sum_n r_n p_n^j (a polynomial in j times p^j where a pole is
repeated), poles real or in conjugate pairs. With white inputs of variance 1 and h_0 = 0
its error is exactly sum_j w_j (k_j - k̂_j)² + σ², where lag j occurs in T - j of T
steps: w_j = 1 - j/T. bound_N is the minimum over all poles and residues.

Residues enter linearly, so they are eliminated (variable projection: Golub & Pereyra
1973; the Jacobian without its second term: Kaufman 1975, whose gradient is exact). The
minimum is sought from many starts, since there are local ones; it is a lower bound as
far as those starts found the global one, which ``Bound.agreeing`` lets judge.

Hankel singular values measure something else, the operator norm of the error over
infinite time, and are no bound for this error.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Complex, Float

from experiments.common import check_integer, random_stream
from time_series_experiments.data import Array, Mixture

AGREE = 1e-6  # two starts found the same minimum: their excess, relatively
# Every pair of poles up to |p| = 1.0488 has its (a_1, a_2) in this box. At finite T
# such poles are legal; larger ones grow over T while what is to be fitted decays.
_BOX = (2.1, 1.1)
_BOX_REAL = 1.05


@dataclass(frozen=True)
class Bound:
    """bound_N of a mixture: ``mse`` = ``excess`` + σ².

    poles and residues attain it (in the limit, where poles meet: then residues are
    huge). agreeing: how many of ``starts`` came as low. condition: of the weighted
    basis, columns scaled to norm 1; excess is known to about 1e-16 condition ‖k‖².
    """

    mse: float
    excess: float
    poles: Complex[Array, " N"]
    residues: Complex[Array, " N"]
    starts: int
    agreeing: int
    condition: float


class _Projected(NamedTuple):
    residual: Float[Array, " T"]
    jacobian: Float[Array, "T N"]
    condition: float


def lag_weights(T: int) -> Float[Array, " T"]:
    """w_j = 1 - j/T: how often lag j occurs in T steps, over T."""
    return 1 - np.arange(T) / T


def attainable_mse(
    mixture: Mixture, N: int, *, n_starts: int = 50, seed: int = 0
) -> Bound:
    """bound_N, by variable projection from ``n_starts`` starts.

    A mixture of K decays has K states, and N >= T residues interpolate any kernel:
    there nothing is sought, the excess is 0, and the poles are the mixture's own.
    Raises InputError for N < 1.
    """
    check_integer("N", N, at_least=1, example=1)
    check_integer("n_starts", n_starts, at_least=1, example=50)
    if min(mixture.n_decays, mixture.T) <= N:
        return _attained(mixture)
    root = np.sqrt(lag_weights(mixture.T))
    target = root * mixture.kernel()
    rng = random_stream(seed, "bound")
    found = [_descend(target, root, _start(N, rng)) for _ in range(n_starts)]
    excess, theta = min(found, key=lambda pair: pair[0])
    poles = _poles(theta)
    basis = root[:, None] * poles ** np.arange(mixture.T)[:, None]
    residues = np.linalg.lstsq(basis, target.astype(complex), rcond=None)[0]
    agreeing = sum(value <= excess * (1 + AGREE) for value, _ in found)
    condition = project(target, root, theta).condition
    mse = excess + mixture.noise_floor
    return Bound(mse, excess, poles, residues, n_starts, agreeing, condition)


def _attained(mixture: Mixture) -> Bound:
    terms = np.array([*mixture.terms().items()], dtype=complex)
    poles, residues = terms.reshape(-1, 2).T
    return Bound(mixture.noise_floor, 0.0, poles, residues, 0, 0, 1.0)


def _start(N: int, rng: np.random.Generator) -> Float[Array, " N"]:
    """Poles of every kind: N // 2 pairs, real or conjugate, and a real one if N is odd.

    Slow ones (|p| near 1) as often as fast ones.
    """
    theta = []
    for _ in range(N // 2):
        p, q = _pole(rng), _pole(rng)
        if rng.random() < 0.25:
            p = p * np.exp(1j * rng.uniform(0, np.pi))
            q = np.conj(p)
        theta += [(p + q).real, -(p * q).real]
    return np.array(theta + ([_pole(rng)] if N % 2 else []))


def _pole(rng: np.random.Generator) -> float:
    size = 1 - 10 ** rng.uniform(-2, 0)
    return float(size if rng.random() < 0.8 else -size)


def _descend(
    target: Float[Array, " T"], root: Float[Array, " T"], start: Float[Array, " N"]
) -> tuple[float, Float[Array, " N"]]:
    """The local minimum below ``start``: its excess and parameters."""
    from scipy.optimize import least_squares

    N = len(start)
    limit = np.array([*_BOX] * (N // 2) + [_BOX_REAL] * (N % 2))
    cache: dict[bytes, _Projected] = {}

    def at(theta: Float[Array, " N"]) -> _Projected:
        key = theta.tobytes()  # SciPy asks for residual and Jacobian of a point apart
        if key not in cache:
            cache.clear()
            cache[key] = project(target, root, theta)
        return cache[key]

    done = least_squares(
        lambda theta: at(theta).residual,
        start,
        jac=lambda theta: at(theta).jacobian,
        bounds=(-limit, limit),
        x_scale="jac",
        ftol=1e-14,
        xtol=1e-14,
        gtol=None,
        max_nfev=300,
    )
    return 2 * float(done.cost), done.x


def project(
    target: Float[Array, " T"], root: Float[Array, " T"], theta: Float[Array, " N"]
) -> _Projected:
    """P target and its Kaufman Jacobian, P the projector off the span of the basis.

    theta: (a_1, a_2) of each pair of poles, the roots of z² - a_1 z - a_2, and the last
    real pole if N is odd. A pair's basis is u and its shift, where
    u_j = a_1 u_{j-1} + a_2 u_{j-2} is its impulse response: real for poles of every
    kind, and smooth where two real poles meet and become a conjugate pair.
    """
    basis, slopes = _basis(theta, len(target))
    Q, R = np.linalg.qr(root[:, None] * basis)
    scale = np.linalg.norm(R, axis=0)
    condition = float(np.linalg.cond(R / scale))
    coefficients = np.linalg.lstsq(R / scale, Q.T @ target, rcond=None)[0] / scale
    residual = target - Q @ (Q.T @ target)
    # d(basis)/dθ_m · coefficients, then projected off the span as well.
    moved = -root[:, None] * np.einsum("mtn,n->tm", slopes, coefficients)
    return _Projected(residual, moved - Q @ (Q.T @ moved), condition)


def _basis(
    theta: Float[Array, " N"], T: int
) -> tuple[Float[Array, "T N"], Float[Array, "N T N"]]:
    """The basis, and its derivative by each parameter."""
    from scipy.signal import lfilter

    N = len(theta)
    basis, slopes = np.zeros((T, N)), np.zeros((N, T, N))
    impulse = np.eye(1, T)[0]
    for n in range(0, N - 1, 2):
        denominator = [1.0, -theta[n], -theta[n + 1]]
        u = lfilter([1.0], denominator, impulse)
        uu = lfilter([1.0], denominator, u)  # du/da_1 is uu one step later
        basis[:, n], basis[:, n + 1] = u, _shift(u, 1)
        for m in (0, 1):
            slopes[n + m, :, n] = _shift(uu, m + 1)
            slopes[n + m, :, n + 1] = _shift(uu, m + 2)
    if N % 2:
        powers = theta[-1] ** np.arange(T)
        basis[:, -1] = powers
        slopes[-1, 1:, -1] = np.arange(1, T) * powers[:-1]
    return basis, slopes


def _shift(u: Float[Array, " T"], steps: int) -> Float[Array, " T"]:
    return np.concatenate([np.zeros(min(steps, len(u))), u[: max(0, len(u) - steps)]])


def _poles(theta: Float[Array, " N"]) -> Complex[Array, " N"]:
    """The poles that ``theta`` describes."""
    N = len(theta)
    pairs = [np.roots([1.0, -theta[n], -theta[n + 1]]) for n in range(0, N - 1, 2)]
    last = [theta[-1:]] if N % 2 else []
    return np.concatenate([*pairs, *last]).astype(complex)


def hankel_singular_values(mixture: Mixture) -> Float[Array, " K"]:
    """Singular values of H[i, j] = k_{i+j}, i, j = 0, 1, …: at most K are not zero.

    The (N+1)th is the least operator norm of the error of a model with N states over
    infinite time (Adamjan, Arov & Krein 1971); not the error that bound_N is about.
    They are the roots of the eigenvalues of P Q, where P_ij = 1 / (1 - λ_i λ_j) is the
    controllability Gramian of (diag λ, 1) and Q = P_ij c_i c_j the observability one.
    """
    a, c = np.array(mixture.lambdas), np.array(mixture.coeffs)
    gramian = 1 / (1 - np.outer(a, a))
    product = gramian @ (gramian * np.outer(c, c))
    squares = np.linalg.eigvals(product).real.clip(min=0)
    return np.sort(np.sqrt(squares))[::-1]
