"""HiPPO matrices, discretisations and kernels, each with a closed form to test against.

    c'(t) = (A c(t) + B f(t)) / t     remembers f on [0, t] by Legendre coefficients
    h'(t) =  A h(t) + B u(t)          the same system as S4 uses it: without the 1 / t

A is LegS: A_nk = -sqrt(2n+1) sqrt(2k+1) below the diagonal and -(n+1) on it;
B_n = sqrt(2n+1). Its basis functions e^{tA} B are sqrt(2n+1) e^-t P_n(2 e^-t - 1).

Sources: Gu et al., "HiPPO" (2020), theorem 2; Gu et al., "Efficiently Modeling Long
Sequences with Structured State Spaces" (2022), sections 2 and 3 and appendix C.1
(normal plus low rank); Gu et al., "On the Parameterization and Initialization of
Diagonal State Space Models" (2022), section 4 (S4D).
"""

from collections.abc import Callable
from fractions import Fraction
from math import comb, factorial, sqrt
from typing import Literal, NamedTuple

import torch
from jaxtyping import Complex128, Float, Float64, Inexact
from torch import Tensor

from ssm._errors import bad_argument, check_shape
from ssm.layers._lti import Powers

Method = Literal["zoh", "bilinear"]
METHODS = ("zoh", "bilinear")


def make_hippo_matrix(N: int, dtype: torch.dtype | None = None) -> Float[Tensor, "N N"]:
    """LegS: A_nk = -sqrt(2n+1) sqrt(2k+1) for n > k, -(n+1) for n = k, else 0."""
    scale = make_hippo_input(N, torch.float64)
    below = torch.tril(scale[:, None] * scale, -1)
    return -(below + torch.diag(_indices(N) + 1)).to(dtype or torch.get_default_dtype())


def make_hippo_input(N: int, dtype: torch.dtype | None = None) -> Float[Tensor, " N"]:
    """The input vector of LegS: B_n = sqrt(2n+1)."""
    if N < 1:
        raise bad_argument("N", N, "a positive integer", "raise it")
    return (2 * _indices(N) + 1).sqrt().to(dtype or torch.get_default_dtype())


def _indices(N: int) -> Float64[Tensor, " N"]:
    # On the CPU in any context, so that layers can be made on the meta device.
    return torch.arange(N, dtype=torch.float64, device="cpu")


class DPLR(NamedTuple):
    """A = V (diag(Lambda) - P P^H) V^H with V unitary; V B is the input vector."""

    Lambda: Complex128[Tensor, " N"]
    P: Float64[Tensor, " N"]
    B: Float64[Tensor, " N"]
    V: Complex128[Tensor, "N N"]


def make_hippo_dplr(N: int) -> DPLR:
    """LegS as a normal matrix minus one of rank one: A = V (Lambda - P P^H) V^H.

    With p_n = sqrt(n + 1/2), A + p p^T = -1/2 I + S, S skew-symmetric. i S is
    Hermitian, so its eigenvectors are orthonormal to rounding at any N, unlike those of
    A itself (:func:`eigenvector_condition`). The eigenvalues come in order of their
    frequency, in conjugate pairs, with 0 alone in the middle for odd N; each column of
    V is turned so that P = V^H p is not negative, which also makes B = V^H b real.
    """
    p = make_hippo_input(N, torch.float64) / sqrt(2)
    normal = make_hippo_matrix(N, torch.float64) + p[:, None] * p
    skew = (normal - normal.mT) / 2
    frequency, V = torch.linalg.eigh(-1j * skew)
    frequency = (frequency - frequency.flip(0)) / 2  # pairs exactly, and 0 exactly
    projected = V.mH @ p.to(V.dtype)
    V = V * torch.sgn(projected)
    P = projected.abs()
    P = (P + P.flip(0)) / 2
    return DPLR(_at_half(frequency), P, sqrt(2) * P, V)


class Modes(NamedTuple):
    """Half of each conjugate pair of a real system's modes: y = 2 Re sum C h."""

    Lambda: Complex128[Tensor, " n"]
    P: Float64[Tensor, " n"]
    B: Float64[Tensor, " n"]
    V: Complex128[Tensor, "N n"]


def make_hippo_modes(N: int) -> Modes:
    """The ceil(N / 2) modes of LegS with frequencies >= 0, as h, conj(h) pairs.

    For odd N the mode of frequency 0 has no partner; it is divided by sqrt(2), because
    twice (p / sqrt 2)(h / sqrt 2) is p h. The pairs then make up LegS of size N
    exactly, in N + 1 real numbers.
    """
    Lambda, P, B, V = make_hippo_dplr(N)
    weight = torch.ones_like(P)
    if N % 2:
        weight[N // 2] = 1 / sqrt(2)
    upper = slice(N // 2, None)
    return Modes(
        Lambda[upper],
        (weight * P)[upper],
        (weight * B)[upper],
        (weight * V)[:, upper],
    )


def _lin(N: int) -> Complex128[Tensor, " n"]:
    return _at_half(torch.pi * _indices(-(-N // 2)))


def _inv(N: int) -> Complex128[Tensor, " n"]:
    return _at_half(N / torch.pi * (N / (2 * _indices(-(-N // 2)) + 1) - 1))


def _at_half(frequency: Float64[Tensor, " n"]) -> Complex128[Tensor, " n"]:
    return torch.complex(torch.full_like(frequency, -0.5), frequency)


def _legs(N: int) -> Complex128[Tensor, " n"]:
    return make_hippo_modes(N).Lambda


S4D_INITS: dict[str, Callable[[int], Tensor]] = {
    "lin": _lin,
    "inv": _inv,
    "legs": _legs,
}


def make_s4d_eigenvalues(init: str, N: int) -> Complex128[Tensor, " n"]:
    """The ceil(N / 2) eigenvalues of S4D, those with frequencies >= 0.

    lin: -1/2 + i pi n. inv: -1/2 + i (N / pi)(N / (2n + 1) - 1). legs: those of the
    normal part of LegS, which the other two approximate at its two ends.
    """
    if init not in S4D_INITS:
        raise bad_argument(
            "init", repr(init), ", ".join(S4D_INITS), "choose one of those"
        )
    return S4D_INITS[init](N)


def discretize_A(
    A: Inexact[Tensor, "*D N N"], delta: float | Tensor, method: Method = "zoh"
) -> Inexact[Tensor, "*D N N"]:
    """A_bar: exp(delta A), or (I - delta/2 A)^-1 (I + delta/2 A) for ``bilinear``.

    ``delta`` is a number or has the leading dimensions of A.
    """
    scaled = _scaled(A, delta, method)
    if method == "zoh":
        return torch.linalg.matrix_exp(scaled)
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    return torch.linalg.solve(eye - scaled / 2, eye + scaled / 2)


def discretize_B(
    A: Inexact[Tensor, "*D N N"],
    B: Inexact[Tensor, "..."],
    delta: float | Tensor,
    method: Method = "zoh",
) -> Inexact[Tensor, "..."]:
    """B_bar: (delta A)^-1 (exp(delta A) - I) delta B, or (I - delta/2 A)^-1 delta B.

    B is (…, N) or (…, N, P). A may be singular: the first is read off the exponential
    of the augmented matrix [[delta A, delta B], [0, 0]] and nothing is inverted.
    """
    scaled = _scaled(A, delta, method)
    vector = B.ndim == A.ndim - 1
    inputs = B[..., None] if vector else B
    if inputs.ndim < 2 or inputs.shape[-2] != A.shape[-1]:
        N = A.shape[-1]
        raise bad_argument(
            "B", f"shape {tuple(B.shape)}", f"(…, {N}) or (…, {N}, P)", "reshape it"
        )
    inputs = inputs * _step_of(A, delta)
    if method == "bilinear":
        eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
        B_bar = torch.linalg.solve(eye - scaled / 2, inputs)
    else:
        N, P = inputs.shape[-2:]
        inputs = inputs.expand(*scaled.shape[:-2], N, P)
        rows = torch.cat([scaled, inputs], -1)
        augmented = torch.nn.functional.pad(rows, (0, 0, 0, P))
        B_bar = torch.linalg.matrix_exp(augmented)[..., :N, N:]
    return B_bar[..., 0] if vector else B_bar


def _step_of(A: Tensor, delta: float | Tensor) -> Tensor:
    return torch.as_tensor(delta, dtype=A.dtype, device=A.device)[..., None, None]


def _scaled(A: Tensor, delta: float | Tensor, method: str) -> Tensor:
    check_method(method)
    if A.ndim < 2 or A.shape[-1] != A.shape[-2]:
        raise bad_argument("A", f"shape {tuple(A.shape)}", "(…, N, N)", "reshape it")
    return A * _step_of(A, delta)


def check_method(method: str) -> None:
    if method not in METHODS:
        raise bad_argument(
            "discretization", repr(method), ", ".join(METHODS), "choose one of those"
        )


def discretize_diagonal(
    A: Inexact[Tensor, "*D"],
    B: Inexact[Tensor, "*D"],
    delta: Float[Tensor, "..."],
    method: Method = "zoh",
) -> tuple[Inexact[Tensor, "*D"], Inexact[Tensor, "*D"]]:
    """(A_bar, B_bar) of :func:`discretize_A` and ``_B`` for diagonal A, elementwise.

    ``delta`` broadcasts against A. Entries of A may be 0: there B_bar = delta B.
    """
    check_method(method)
    scaled = delta * A
    if method == "bilinear":
        inverse = 1 / (1 - scaled / 2)
        return inverse * (1 + scaled / 2), inverse * delta * B
    return torch.exp(scaled), _expm1_ratio(scaled) * delta * B


def _expm1_ratio(x: Inexact[Tensor, "*C"]) -> Inexact[Tensor, "*C"]:
    """(e^x - 1) / x, by its series near 0, where the gradient of the quotient would be
    the difference of two large numbers.
    """
    near = x.abs() < 1e-3
    small = torch.where(near, x, 0)
    series = torch.ones_like(x)
    for n in (6, 5, 4, 3, 2):
        series = 1 + small / n * series
    safe = torch.where(near, 1, x)
    return torch.where(near, series, torch.expm1(safe) / safe)


def compute_kernel(
    A_bar: Inexact[Tensor, "N N"],
    B_bar: Inexact[Tensor, "N *P"],
    C: Inexact[Tensor, "*Q N"],
    length: int,
) -> Inexact[Tensor, "length *QP"]:
    """K_j = C A_bar^j B_bar for j < length.

    B_bar is (N,) or (N, P) and C is (N,) or (Q, N); what they lack, the result lacks.
    The states A_bar^j B_bar are doubled in number log2(length) times, instead of one
    dense power for every j.
    """
    N = A_bar.shape[-1]
    check_shape("A_bar", A_bar, (N, N))
    check_shape("B_bar", B_bar, (N,), (N, None))
    check_shape("C", C, (N,), (None, N))
    dtype = torch.promote_types(torch.promote_types(A_bar.dtype, B_bar.dtype), C.dtype)
    A_bar, B_bar, C = (x.to(dtype) for x in (A_bar, B_bar, C))
    powers = Powers(A_bar, length - 1, diagonal=False)
    columns = B_bar.mT if B_bar.ndim == 2 else B_bar[None]
    states = powers.orbit(columns, length).mT  # (length, N, P)
    kernel = C @ states
    return kernel if B_bar.ndim == 2 else kernel[..., 0]


def legendre_memory(f: Float[Tensor, "*C L"], N: int) -> Float64[Tensor, "*C L N"]:
    """The time-varying LegS recurrence c' = (A c + B f) / t: f's history as it grows.

    f is constant on each of the intervals [k, k + 1). Row k holds the coefficients,
    in the basis sqrt(2n+1) P_n(2x - 1), of f on [0, k + 1] stretched to x in [0, 1];
    exact for such f, since in the time log t the system is invariant.
    """
    A = make_hippo_matrix(N, torch.float64)
    B = make_hippo_input(N, torch.float64)
    if f.shape[-1] == 0:
        return f.new_zeros(*f.shape, N, dtype=torch.float64)
    first, *later = f.double().unbind(-1)
    c = first[..., None] * torch.eye(1, N, dtype=torch.float64)[0]
    history = [c]
    if later:
        k = torch.arange(1, len(later) + 1, dtype=torch.float64)
        steps = torch.log1p(1 / k)
        A_bar, B_bar = discretize_A(A, steps), discretize_B(A, B, steps)
        for A_k, B_k, f_k in zip(A_bar, B_bar, later, strict=True):
            c = c @ A_k.mT + f_k[..., None] * B_k
            history.append(c)
    return torch.stack(history, -2)


def legs_eigenvectors(N: int) -> tuple[list[list[int]], list[list[Fraction]]]:
    """W and W^-1, exactly: LegS is A = V Lambda V^-1 with V = S W, S = diag(B).

    A is triangular with eigenvalues -(k + 1), and row n of W holds the coefficients of
    the shifted Legendre polynomial P_n(2x - 1) of x = e^-t:

        W_nk = (-1)^(n+k) C(n, k) C(n+k, k),
        (W^-1)_kn = (2n+1) k!^2 / ((k-n)! (k+n+1)!).
    """
    W = [
        [(-1) ** (n + k) * comb(n, k) * comb(n + k, k) for k in range(N)]
        for n in range(N)
    ]
    inverse = [
        [
            Fraction(
                (2 * n + 1) * factorial(k) ** 2,
                factorial(k - n) * factorial(k + n + 1),
            )
            if n <= k
            else Fraction(0)
            for n in range(N)
        ]
        for k in range(N)
    ]
    return W, inverse


LARGEST_EXACT = 256  # beyond, the entries of W near the limit of float64


def eigenvector_condition(N: int) -> float:
    """cond_2(V) of the direct diagonalisation A = V Lambda V^-1, unit columns.

    |V| |V^-1|, both from :func:`legs_eigenvectors`, each entry rounded once: the
    largest singular value of each is then known to rounding. (An SVD of V alone
    cannot see beyond 1e16.) It grows like (3 + 2 sqrt 2)^N: the absolute coefficients
    of P_n(2x - 1) sum to P_n(3).
    """
    if not 1 <= N <= LARGEST_EXACT:
        raise bad_argument("N", N, f"1 … {LARGEST_EXACT}", "choose one within")
    W, inverse = legs_eigenvectors(N)
    scale = make_hippo_input(N, torch.float64)
    V = torch.tensor([[float(w) for w in row] for row in W], dtype=torch.float64)
    V = scale[:, None] * V
    V_inverse = torch.tensor(
        [[float(w) for w in row] for row in inverse], dtype=torch.float64
    )
    norms = torch.linalg.vector_norm(V, dim=0)
    V_inverse = norms[:, None] * V_inverse / scale
    largest = [torch.linalg.matrix_norm(X, 2) for X in (V / norms, V_inverse)]
    return float(largest[0] * largest[1])
