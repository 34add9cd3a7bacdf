"""A diagonal SSM of state size N is a sum of N attention heads.

    h_t = diag(a) h_{t-1} + B x_t,  y_t = C^T h_t
    =   y = M x,  M[t, s] = sum_m (C[m] B[m]) a_m^(t-s)  for s <= t, else 0

Source: "On Structured State-Space Duality" (arXiv:2510.04944), section 3. The powers
form the Vandermonde generator V[k, m] = a_m^k (T x N), whose rank is the number of
distinct decays, at most T; a zero decay counts as one more (its column is 1, 0, 0, …).

Differs: the published check sets B = C = 1. Here B and C are Gaussian, so that a
coupling that went astray is seen. Decays that come in conjugate pairs get conjugate
couplings, and then y is real.
"""

import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Inexact, Int64

from experiments.common import (
    DIVERGING,
    ExperimentResult,
    Picture,
    check_finite,
    check_integer,
    check_nonempty,
    check_powers_finite,
    command_line,
    format_complex,
    new_figure,
    random_stream,
    track,
)
from experiments.exact import PRIME, field_array, field_rank
from experiments.kernels import constant, largest_difference, recurrence

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = np.ndarray
NAME = "exp2_diagonal_equivalence"
CLAIM = "a diagonal SSM's recurrence equals a sum of N attention heads"
TOLERANCE = 2e-14  # relative to the output's scale
CANCELLATION = 10  # beyond this, the terms that cancel set the scale
_HEADS_DRAWN = 3


class Comparison(NamedTuple):
    """One seed: its couplings, and how far apart the two computations came out."""

    seed: int
    B: Inexact[Array, " N"]
    C: Inexact[Array, " N"]
    difference: float  # relative to max |y|
    judged: float  # the same, with cancellation allowed for
    imaginary: float  # largest |Im y|, relative as `judged` is


def generator(a: Inexact[Array, " N"], T: int) -> Inexact[Array, "T N"]:
    """V[k, m] = a_m^k, the Vandermonde generator; 0^0 = 1."""
    return np.vander(a, T, increasing=True).T


def field_generator(a: Inexact[Array, " N"], T: int) -> Int64[Array, "T N"]:
    """The same with each decay's exact value taken modulo a prime."""
    values = field_array(a)
    V = np.ones((T, len(values)), np.int64)
    for k in range(1, T):
        V[k] = V[k - 1] * values % PRIME
    return V


def head_kernels(
    a: Inexact[Array, " N"], B: Inexact[Array, " N"], C: Inexact[Array, " N"], T: int
) -> Inexact[Array, "N T T"]:
    """Head m: (C[m] B[m]) a_m^(t-s) for s <= t, zero above the diagonal."""
    lag = np.subtract.outer(np.arange(T), np.arange(T))
    L = np.where(lag >= 0, generator(a, T).T[:, np.maximum(lag, 0)], 0)
    return (C * B)[:, None, None] * L


def attention_kernel(
    a: Inexact[Array, " N"], B: Inexact[Array, " N"], C: Inexact[Array, " N"], T: int
) -> Inexact[Array, "T T"]:
    """M = the sum of the N heads."""
    return head_kernels(a, B, C, T).sum(axis=0)


def conjugate_partners(a: Inexact[Array, " N"]) -> list[int] | None:
    """For each decay the index of its conjugate, each index once; real decays are
    their own. None if the decays are not closed under conjugation."""
    partners = [m if value.imag == 0 else -1 for m, value in enumerate(a)]
    for m, value in enumerate(a):
        if partners[m] >= 0:
            continue
        free = [k for k in range(m + 1, len(a)) if partners[k] < 0]
        match = next((k for k in free if a[k] == value.conjugate()), None)
        if match is None:
            return None
        partners[m], partners[match] = match, m
    return partners


def draw_couplings(
    rng: np.random.Generator, a: Inexact[Array, " N"], partners: list[int] | None
) -> Inexact[Array, " N"]:
    """Gaussian couplings: real for real decays, conjugate for conjugate ones."""
    couplings = rng.standard_normal(len(a)).astype(a.dtype)
    if np.iscomplexobj(a):
        couplings[a.imag != 0] += 1j * rng.standard_normal(np.sum(a.imag != 0))
    for m, k in enumerate(partners or []):
        if k > m:
            couplings[k] = couplings[m].conjugate()
    return couplings


def compare(a: Inexact[Array, " N"], T: int, seed: int) -> Comparison:
    """The recurrence and the sum of heads on one draw of B, C and x.

    The scale of the judged difference is max |y|; where the terms cancel more than
    tenfold (repeated decays with opposite couplings), it is a tenth of the largest sum
    of absolute terms: rounding follows the terms, not what is left of them.
    """
    rng = random_stream(seed, "data")
    partners = conjugate_partners(a)
    B, C = draw_couplings(rng, a, partners), draw_couplings(rng, a, partners)
    x = rng.standard_normal((T, 1))

    a_t, B_t, C_t = (constant(values, T) for values in (a, B, C))
    y_recurrence, _ = recurrence(a_t, B_t, C_t, x)
    y_attention = attention_kernel(a, B, C, T) @ x

    terms, _ = recurrence(np.abs(a_t), np.abs(B_t), np.abs(C_t), np.abs(x))
    scale = max(np.abs(y_recurrence).max(), terms.max() / CANCELLATION)
    difference = np.abs(y_attention - y_recurrence).max()
    imaginary = np.abs(np.imag([y_recurrence, y_attention])).max()
    relative = largest_difference(y_attention, y_recurrence)
    return Comparison(
        seed, B, C, relative, float(difference / scale), float(imaginary / scale)
    )


def run(
    T: int = 64,
    seed: int = 0,
    decays: tuple[complex, ...] = (0.5, 0.8),
    n_seeds: int = 1,
) -> ExperimentResult:
    """Compare the recurrence h_t = diag(a) h_{t-1} + B x_t with a sum of N heads.

    Args:
        T: sequence length, at least 1
        seed: draws the input x and the couplings B and C
        decays: one per state: real or complex, repeated or zero
        n_seeds: how many seeds to check, from seed on; the worst one is reported
    """
    check_integer("T", T, at_least=1, example=64)
    check_integer("n_seeds", n_seeds, at_least=1, example=1000)
    check_nonempty("decays", decays, "decays = 0.5 0.8")
    check_finite("decays", decays)
    check_powers_finite("decays", decays, T)
    a = _parse(decays)

    seeds = range(seed, seed + n_seeds)
    draws = [compare(a, T, each) for each in track(seeds, "seeds", n_seeds)]
    worst = draws[int(np.argmax([draw.judged for draw in draws]))]
    V = generator(a, T)
    metadata = {
        "T": T,
        "N": len(a),
        "decays": a,
        "seed": seed,
        "n_seeds": n_seeds,
        "worst_seed": worst.seed,
        "worst_B": worst.B,
        "worst_C": worst.C,
        "largest_difference": np.max([draw.difference for draw in draws]),
        "judged_difference": worst.judged,
        "conjugate_closed": conjugate_partners(a) is not None,
        "largest_imaginary_part": np.max([draw.imaginary for draw in draws]),
        "generator_rank_exact": field_rank(field_generator(a, T)),
        "generator_rank_theory": _distinct(decays, T),
        "generator_rank_float": np.linalg.matrix_rank(V),
        "float_rank_tolerance": max(V.shape) * np.finfo(float).eps,  # of sigma_1
        "tolerance": TOLERANCE,
    }
    return ExperimentResult(NAME, _details(metadata), metadata, not problems(metadata))


def problems(metadata: dict[str, Any]) -> list[str]:
    """The claims that a record's metadata breaks."""
    found = []
    tolerance = float(metadata["tolerance"])
    difference = float(metadata["judged_difference"])
    if not difference <= tolerance:
        found.append(f"{CLAIM}: they differ by {difference:.1e}")
    imaginary = float(metadata["largest_imaginary_part"])
    if metadata["conjugate_closed"] and not imaginary <= tolerance:
        found.append(
            f"conjugate pairs give a real output: its imaginary part is {imaginary:.1e}"
        )
    theory = _distinct([complex(z) for z in metadata["decays"]], int(metadata["T"]))
    if metadata["generator_rank_exact"] != theory:
        found.append(
            f"the generator's rank is the number of distinct decays, at most T: got "
            f"{metadata['generator_rank_exact']}, expected {theory}"
        )
    return found


def _parse(decays: Any) -> Inexact[Array, " N"]:
    """Decays or couplings, typed or logged, as float64 where none is complex."""
    values = np.array([complex(z) for z in decays])
    return values if np.any(values.imag) else values.real.copy()


def _distinct(decays: Any, T: int) -> int:
    return min(len(set(decays)), T)


def _show(z: complex) -> str:
    return format_complex(complex(z)) if z.imag else f"{z.real:g}"


def _details(metadata: dict[str, Any]) -> str:
    n_seeds, seed = metadata["n_seeds"], metadata["seed"]
    difference = float(metadata["largest_difference"])
    if difference <= TOLERANCE:
        compared = f"<= {TOLERANCE:.0e}"
    else:
        judged = float(metadata["judged_difference"])
        compared = f"({judged:.1e} with cancellation; tolerance {TOLERANCE:.0e})"
    seeds = (
        f"seed {seed}"
        if n_seeds == 1
        else f"the worst of {n_seeds:,} seeds ({seed} to {seed + n_seeds - 1})"
    )
    shown = ", ".join(_show(z) for z in metadata["decays"][:6])
    if metadata["N"] > 6:
        shown += ", …"
    return (
        f"max |sum of heads - recurrence| / max |y| = {difference:.1e} {compared} "
        f"for {seeds}, decays ({shown}), T = {metadata['T']}; generator rank "
        f"{metadata['generator_rank_exact']} (exact), theory "
        f"{metadata['generator_rank_theory']}"
    )


def draw(results: list[ExperimentResult]) -> "Figure":
    """The kernel of the first result as a heat map, then its first heads."""
    metadata = results[0].metadata
    a, B, C = (_parse(metadata[key]) for key in ("decays", "worst_B", "worst_C"))
    heads = head_kernels(a, B, C, metadata["T"]).real
    shown = heads[:_HEADS_DRAWN]
    titles = [f"kernel M: the sum of {len(a)} heads"]
    titles += [f"head {m + 1}: a = {_show(a[m])}" for m in range(len(shown))]
    panels = np.concatenate([heads.sum(axis=0, keepdims=True), shown])
    largest = np.abs(panels).max()
    above = np.triu(np.ones(panels.shape[1:], bool), 1)

    figure, axes = new_figure(1, len(panels))
    for ax, panel, title in zip(axes[0], panels, titles, strict=True):
        image = ax.imshow(
            np.ma.masked_array(panel, above),
            cmap=DIVERGING,
            vmin=-largest,
            vmax=largest,
            interpolation="nearest",
        )
        ax.set(title=title, xlabel="input step s", ylabel="output step t")
        ax.grid(False)
    part = "real part of M[t, s]" if np.iscomplexobj(a) else "M[t, s]"
    figure.colorbar(image, ax=list(axes[0]), label=part)
    return figure


PICTURES = (Picture(draw, "outputs/exp2_diagonal_equivalence.png"),)

if __name__ == "__main__":
    sys.exit(command_line(run, pictures=PICTURES))
