"""Why nobody diagonalises LegS directly: cond(V) grows like (3 + 2 sqrt 2)^N.

    A = V Lambda V^-1                      the plain diagonalisation, V far from unitary
    A = V (Lambda - P P^*) V^*             normal plus low rank (DPLR), V unitary

The kernel K_j = C A_bar^j B_bar of LegS, discretised bilinearly, is computed in float64
through each, and compared with the same kernel in exact arithmetic: A is triangular,
its eigenvectors hold the coefficients of Legendre polynomials, so that

    K_j = sum_k g_k b_k r_k^j,   g_k = sum_n C_n sqrt(2n+1) W_nk,   W integer,
    r_k = (2 - delta (k+1)) / (2 + delta (k+1)),   b_k = 2 delta / (2 + delta (k+1)).

The terms alternate in sign and are as large as cond(V) allows while their sum is of
order 1. So even eigenvectors that are exact to the last bit do not help: the plain
route fails where cond(V) passes 1 / eps, near N = 22. (There an SVD of V in float64
stops near 1e19 or 1e20 whatever the truth is: cond(V) itself needs exact arithmetic.)

Source: Gu et al., "Efficiently Modeling Long Sequences with Structured State Spaces"
(2022), lemma 3.2 and theorem 1.
"""

import sys
from decimal import Decimal, localcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from experiments.common import (
    COLORS,
    MARKERS,
    ExperimentResult,
    Picture,
    bad_input,
    check_finite,
    check_increasing,
    check_integer,
    command_line,
    new_figure,
    random_stream,
    track,
)
from ssm.layers.hippo import (
    LARGEST_EXACT,
    eigenvector_condition,
    legs_eigenvectors,
    make_hippo_dplr,
    make_hippo_input,
    make_hippo_matrix,
    make_hippo_modes,
)
from ssm.layers.s4 import DPLRSystem, dplr_kernel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "hippo_conditioning"
CLAIM = "cond(V) grows like (3 + 2 sqrt 2)^N for A = V Lambda V^-1, and is 1 for DPLR"
RATE = 3 + 2 * 2**0.5  # the absolute coefficients of P_n(2x - 1) sum to P_n(3)
BAND = (0.1, 1.0)  # of cond(V) / RATE^(N-1)
TOLERANCE = 1e-10  # of DPLR's kernel, relative to the largest entry
EPSILON = float(np.finfo(float).eps)
HOPELESS = 1e3  # cond(V) eps beyond which the plain kernel must be wrong …
WRONG = 1e-3  # … by at least this much, relative to the largest entry
ERRORS = ("lapack_error", "rounded_error", "dplr_error")


def run(
    N_values: tuple[int, ...] = (2, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64),
    length: int = 256,
    delta: float = 0.0625,
    seed: int = 0,
) -> ExperimentResult:
    """Condition numbers of both diagonalisations and the errors of their kernels.

    Judged: cond(V) of the plain one within a factor of 10 of (3 + 2 sqrt 2)^(N-1), that
    of DPLR 1, and DPLR's kernel exact to 1e-10 at every N, where the plain one's is
    wrong in every digit once cond(V) is far beyond 1 / eps.

    Args:
        N_values: state sizes, increasing, 256 at most
        length: entries of the kernel
        delta: step of the bilinear rule
        seed: draws the readout C
    """
    check_increasing("N_values", N_values, at_least=1)
    if N_values[-1] > LARGEST_EXACT:
        raise bad_input("N_values", N_values, f"at most {LARGEST_EXACT}", "lower them")
    check_integer("length", length, at_least=1, example=256)
    check_integer("seed", seed, at_least=0, example=0)
    check_finite("delta", delta)
    if delta <= 0:
        raise bad_input("delta", delta, "a positive number", "try 0.0625")
    rows = [row_of(N, length, delta, seed) for N in track(N_values, "state sizes")]
    metadata = {
        "N_values": N_values,
        "length": length,
        "delta": delta,
        "seed": seed,
        "tolerance": TOLERANCE,
        "rate": RATE,
        "rows": rows,
        "why": "the terms of the plain diagonalisation are as large as cond(V) allows "
        "and cancel; V of DPLR is unitary",
    }
    broken = problems(metadata)
    return ExperimentResult(NAME, _details(metadata, broken), metadata, not broken)


def row_of(N: int, length: int, delta: float, seed: int) -> dict[str, Any]:
    """Condition numbers and kernel errors at state size N."""
    C = torch.from_numpy(random_stream(seed, "readout").standard_normal(N))
    exact = exact_kernel(C, delta, length)
    scale = exact.abs().max()
    A = make_hippo_matrix(N, torch.float64)
    eigenvalues, V = torch.linalg.eig(A)
    kernels = (
        eigen_kernel(eigenvalues, C.to(V.dtype) @ V, _solve_input(V), delta, length),
        eigen_kernel(*_rounded_modes(C), delta, length),
        kernel_through_dplr(C, delta, length),
    )
    errors = [float((kernel - exact).abs().max() / scale) for kernel in kernels]
    return {
        "N": N,
        "condition": eigenvector_condition(N),
        "float_condition": float(torch.linalg.cond(V)),
        "dplr_condition": float(torch.linalg.cond(make_hippo_dplr(N).V)),
        **dict(zip(ERRORS, errors, strict=True)),
    }


def exact_kernel(
    C: Float64[Tensor, " N"], delta: float, length: int
) -> Float64[Tensor, " length"]:
    """The kernel in decimal arithmetic with enough digits for all that cancels."""
    N = len(C)
    with localcontext(prec=40 + 2 * N):
        g = _mode_weights(C)
        step = Decimal(delta)
        terms = [2 * step * g[k] / (2 + step * (k + 1)) for k in range(N)]
        ratios = [(2 - step * (k + 1)) / (2 + step * (k + 1)) for k in range(N)]
        kernel = []
        for _ in range(length):
            kernel.append(float(sum(terms)))
            terms = [term * r for term, r in zip(terms, ratios, strict=True)]
    return torch.tensor(kernel, dtype=torch.float64)


def _mode_weights(C: Float64[Tensor, " N"]) -> list[Decimal]:
    """g_k = sum_n C_n sqrt(2n+1) W_nk, in the decimal context of the caller."""
    W, _ = legs_eigenvectors(len(C))
    reads = [Decimal(c) * Decimal(2 * n + 1).sqrt() for n, c in enumerate(C.tolist())]
    return [
        sum((reads[n] * W[n][k] for n in range(k, len(W))), Decimal(0))
        for k in range(len(W))
    ]


def _rounded_modes(
    C: Float64[Tensor, " N"],
) -> tuple[Float64[Tensor, " N"], Float64[Tensor, " N"], Float64[Tensor, " N"]]:
    """Eigenvalues, C V and V^-1 B, each exact and then rounded once; V^-1 B is 1."""
    N = len(C)
    with localcontext(prec=40 + 2 * N):
        g = torch.tensor([float(w) for w in _mode_weights(C)], dtype=torch.float64)
    return -torch.arange(1, N + 1, dtype=torch.float64), g, torch.ones_like(g)


def _solve_input(V: Tensor) -> Tensor:
    B = make_hippo_input(len(V), torch.float64).to(V.dtype)
    return torch.linalg.solve(V, B)


def eigen_kernel(
    eigenvalues: Tensor, read: Tensor, write: Tensor, delta: float, length: int
) -> Float64[Tensor, " length"]:
    """sum_k (C V)_k r_k^j b_k (V^-1 B)_k in float64: the plain diagonalisation."""
    below = 1 - delta / 2 * eigenvalues
    ratios = (1 + delta / 2 * eigenvalues) / below
    steps = torch.cat([torch.ones_like(ratios)[None], ratios.expand(length - 1, -1)])
    return (steps.cumprod(0) @ (read * write * delta / below)).real


def kernel_through_dplr(
    C: Float64[Tensor, " N"], delta: float, length: int
) -> Float64[Tensor, " length"]:
    """The same kernel by S4's generating function, in float64."""
    Lambda, P, B, V = make_hippo_modes(len(C))
    read = C.to(V.dtype) @ V
    Lambda, P, B, read = (x.to(V.dtype)[None] for x in (Lambda, P, B, read))
    step = torch.tensor([delta], dtype=torch.float64)
    return dplr_kernel(DPLRSystem(Lambda, P, B, read, step), length)[0]


def problems(metadata: dict[str, Any]) -> list[str]:
    """The claims that a record's metadata breaks; an error that is NaN breaks one."""
    broken = []
    low, high = BAND
    for row in metadata["rows"]:
        N, condition = row["N"], row["condition"]
        growth = condition / RATE ** (N - 1)
        if not low <= growth <= high * (1 + 1e-9):
            broken.append(
                f"{CLAIM}: at N = {N} it is {condition:.2e}, {growth:.2g} of the law"
            )
        if not abs(row["dplr_condition"] - 1) <= TOLERANCE:
            broken.append(f"{CLAIM}: at N = {N} DPLR has {row['dplr_condition']!r}")
        if not row["dplr_error"] <= TOLERANCE:
            broken.append(
                f"DPLR's kernel is exact to {TOLERANCE:.0e}: at N = {N} it is off by "
                f"{row['dplr_error']:.1e}"
            )
        if condition * EPSILON > HOPELESS:
            broken += [
                f"beyond cond(V) = {HOPELESS:.0e} / eps the plain kernel is wrong: at "
                f"N = {N} {name} is {row[name]:.1e}"
                for name in ("lapack_error", "rounded_error")
                if not row[name] >= WRONG
            ]
    return broken


def _details(metadata: dict[str, Any], broken: list[str]) -> str:
    if broken:
        return f"{len(broken)} claim(s) off; {broken[0]}"
    rows = metadata["rows"]
    last = rows[-1]
    text = (
        f"cond(V) = {last['condition']:.1e} at N = {last['N']} for A = V Lambda V^-1, "
        f"1 for DPLR, whose kernel is off by at most "
        f"{max(row['dplr_error'] for row in rows):.0e}"
    )
    lost = next((row for row in rows if row["rounded_error"] >= WRONG), None)
    if lost is None:
        return f"{text}; the plain one's is right to {WRONG:.0e} too at these N"
    return (
        f"{text}; the plain one's is off by {lost['rounded_error']:.0e} at "
        f"N = {lost['N']}, even with exact eigenvectors"
    )


def draw(results: list[ExperimentResult]) -> "Figure":
    """Condition numbers against N; the errors of the kernels that they explain."""
    rows = results[-1].metadata["rows"]
    figure, axes = new_figure(1, 2)
    conditions, errors = axes[0]
    N = [row["N"] for row in rows]
    law = [RATE ** (n - 1) for n in N]
    conditions.semilogy(N, law, ":", color=COLORS[6], label="(3 + 2√2)^(N-1)")
    curves = (
        ("condition", "A = V Λ V⁻¹, exact", "-"),
        ("float_condition", "the same by LAPACK in float64", "--"),
        ("dplr_condition", "DPLR, V unitary", "-"),
    )
    _curves(conditions, rows, curves)
    conditions.axhline(1 / EPSILON, color=COLORS[5], linestyle=":", label="1 / eps")
    conditions.set(xlabel="state size N", ylabel="cond(V)")
    conditions.set_title("condition of the eigenvectors of LegS")
    conditions.legend(loc="upper left")
    curves = (
        ("lapack_error", "A = V Λ V⁻¹ by LAPACK", "--"),
        ("rounded_error", "exact V, rounded once", "-"),
        ("dplr_error", "DPLR, generating function", "-"),
    )
    _curves(errors, rows, curves)
    errors.axhline(1, color=COLORS[6], linestyle=":", label="no digit is right")
    errors.axhline(EPSILON, color=COLORS[5], linestyle=":", label="eps of float64")
    errors.set(xlabel="state size N", ylabel="largest error / largest entry")
    errors.set_title(f"kernel of {results[-1].metadata['length']} steps, float64")
    errors.legend(loc="upper left")
    return figure


def _curves(
    ax: Any, rows: list[dict[str, Any]], curves: tuple[tuple[str, str, str], ...]
) -> None:
    N = [row["N"] for row in rows]
    for index, (name, label, line) in enumerate(curves):
        ax.semilogy(
            N,
            [row[name] for row in rows],
            MARKERS[index] + line,
            color=COLORS[index],
            label=label,
        )


PICTURES = (Picture(draw, f"outputs/{NAME}.png", by_default=True),)


if __name__ == "__main__":
    sys.exit(command_line(run, pictures=PICTURES))
