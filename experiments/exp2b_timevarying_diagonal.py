"""A diagonal SSM whose A_t, B_t and C_t all vary in time is a sum of N masked heads.

    h_t = A_t * h_{t-1} + B_t x_t,  y_t = C_t^T h_t
    =   y = M x,  M[t, s] = sum_n C_t[n] L[t, s, n] B_s[n],
        L[t, s, n] = A_t[n] A_{t-1}[n] ... A_{s+1}[n]  for s <= t, else 0

Source: "On Structured State-Space Duality" (arXiv:2510.04944), section 3. The paper
also notes that non-zero decays can be absorbed into queries and keys: with the running
product P_t = A_t ... A_1, L[t, s] = P_t / P_s. That form is measured here, not judged:
one zero decay makes it 0 / 0, and P_t leaves float64 within a thousand steps.
"""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Inexact

from experiments.common import (
    ExperimentResult,
    check_integer,
    command_line,
    random_stream,
)
from experiments.kernels import decay_mask, largest_difference, recurrence

Array = np.ndarray
NAME = "exp2b_timevarying_diagonal"
CLAIM = "a time-varying diagonal SSM's recurrence equals a sum of N masked heads"
TOLERANCE = 2e-14  # relative to the output's scale
CANCELLATION = 10  # beyond this, the terms that cancel set the scale
TINY = 1e-300
ABSORBED_LENGTHS = (64, 256, 1024)


class System(NamedTuple):
    """One draw of a time-varying diagonal SSM and its input."""

    a: Inexact[Array, "T N"]
    b: Inexact[Array, "T N"]
    c: Inexact[Array, "T N"]
    x: Inexact[Array, "T 1"]


def _signed(rng: np.random.Generator, T: int, N: int) -> Inexact[Array, "T N"]:
    return rng.uniform(-1, 1, (T, N))


def _negative(rng: np.random.Generator, T: int, N: int) -> Inexact[Array, "T N"]:
    return -rng.uniform(0.5, 1, (T, N))


def _with(value: float, a: Inexact[Array, "T N"], rng: np.random.Generator) -> Array:
    """``a`` with a quarter of its entries and one whole step set to ``value``."""
    replaced = rng.random(a.shape) < 0.25
    replaced[len(a) // 2] = True
    return np.where(replaced, value, a)


def _complex(rng: np.random.Generator, T: int, N: int) -> Inexact[Array, "T N"]:
    return _signed(rng, T, N) * np.exp(1j * rng.uniform(0, np.pi, (T, N)))


DRAWS: dict[str, tuple[str, Callable[..., Array]]] = {
    "signed": ("real, uniform on (-1, 1)", _signed),
    "negative": ("real, uniform on (-1, -0.5)", _negative),
    "zeros": (
        "signed, a quarter of the entries and one whole step exactly 0",
        lambda rng, T, N: _with(0.0, _signed(rng, T, N), rng),
    ),
    "tiny": (
        f"signed, a quarter of the entries and one whole step {TINY:g}",
        lambda rng, T, N: _with(TINY, _signed(rng, T, N), rng),
    ),
    "complex": ("modulus uniform on (0, 1), any phase", _complex),
    "complex zeros": (
        "complex, a quarter of the entries and one whole step exactly 0",
        lambda rng, T, N: _with(0.0, _complex(rng, T, N), rng),
    ),
}


def draw_system(name: str, T: int, N: int, seed: int) -> System:
    """Decays of the kind ``name`` in DRAWS; Gaussian couplings (complex with complex
    decays) and a real Gaussian input."""
    rng = random_stream(seed, f"data: {name}")
    a = DRAWS[name][1](rng, T, N)
    b, c = rng.standard_normal((2, T, N)).astype(a.dtype)
    if np.iscomplexobj(a):
        b += 1j * rng.standard_normal((T, N))
        c += 1j * rng.standard_normal((T, N))
    return System(a, b, c, rng.standard_normal((T, 1)))


def _build_time_varying_mask(a: Inexact[Array, "T N"]) -> Inexact[Array, "T T N"]:
    """L[t, s, n] = prod_{k=s+1..t} a_k[n] for s <= t (1 where empty), else 0.

    Products only: no division by running products and no logarithm, so zero, tiny and
    negative decays need no special care.
    """
    return decay_mask(a)


def attention_kernel(
    a: Inexact[Array, "T N"], b: Inexact[Array, "T N"], c: Inexact[Array, "T N"]
) -> Inexact[Array, "T T"]:
    """M = sum_n (c^n b^{nT}) o L(a^n)."""
    return np.einsum("tn,tsn,sn->ts", c, _build_time_varying_mask(a), b)


def absorbed_kernel(
    a: Inexact[Array, "T N"], b: Inexact[Array, "T N"], c: Inexact[Array, "T N"]
) -> Inexact[Array, "T T"]:
    """tril((c P)(b / P)^T) with running products P: right only while P is a normal
    number, so not for zero decays and not for long T."""
    with np.errstate(all="ignore"):
        P = np.cumprod(a, axis=0)
        product = (c * P) @ (b / P).T
    return np.tril(product)


def run(T: int = 48, N: int = 4, seed: int = 0) -> ExperimentResult:
    """Compare the recurrence h_t = A_t h_{t-1} + B_t x_t with a sum of N masked heads.

    Six kinds of decays are drawn: signed, negative, with exact zeros, with entries of
    1e-300, complex, and complex with zeros. The form with decays absorbed into queries
    and keys is measured beside them.

    Args:
        T: sequence length, at least 1
        N: state size, at least 1
        seed: draws decays, couplings and inputs
    """
    check_integer("T", T, at_least=1, example=48)
    check_integer("N", N, at_least=1, example=4)
    outputs, judged, absorbed = {}, {}, {}
    for name in DRAWS:
        system = draw_system(name, T, N, seed)
        y, _ = recurrence(*system)
        y_attention = attention_kernel(*system[:3]) @ system.x
        outputs[name] = largest_difference(y_attention, y)
        judged[name] = float(np.abs(y_attention - y).max() / _scale(system, y))
        absorbed[name] = _absorbed_error(system)
    by_length = {
        str(length): _absorbed_error(draw_system("signed", length, N, seed))
        for length in ABSORBED_LENGTHS
    }
    metadata = {
        "T": T,
        "N": N,
        "seed": seed,
        "draws": {name: about for name, (about, _) in DRAWS.items()},
        "largest_difference": np.max(list(outputs.values())),
        "differences": outputs,
        "judged_differences": judged,
        "tolerance": TOLERANCE,
        "absorbed_errors": absorbed,
        "absorbed_errors_by_length": by_length,
    }
    details = (
        f"max |masked heads - recurrence| / max |y| = "
        f"{metadata['largest_difference']:.1e} (tolerance {TOLERANCE:.0e}) over "
        f"{len(DRAWS)} kinds of decays at T = {T}, N = {N}, seed {seed}; absorbed into "
        f"queries and keys instead: {absorbed['zeros']:.1e} with zeros, "
        + ", ".join(f"{error:.1e} at T = {key}" for key, error in by_length.items())
    )
    return ExperimentResult(NAME, details, metadata, not problems(metadata))


def problems(metadata: dict[str, Any]) -> list[str]:
    """The claims that a record's metadata breaks."""
    return [
        f"{CLAIM}: with decays of kind '{name}' they differ by {float(difference):.1e}"
        for name, difference in metadata["judged_differences"].items()
        if not float(difference) <= float(metadata["tolerance"])
    ]


def _scale(system: System, y: Inexact[Array, "T 1"]) -> float:
    """max |y|; or, where terms cancel more than tenfold, a tenth of the largest sum of
    absolute terms: rounding follows the terms, not what is left of them."""
    terms, _ = recurrence(*[np.abs(values) for values in system])
    return max(np.abs(y).max(), terms.max() / CANCELLATION)


def _absorbed_error(system: System) -> float:
    y, _ = recurrence(*system)
    with np.errstate(all="ignore"):
        return largest_difference(absorbed_kernel(*system[:3]) @ system.x, y)


if __name__ == "__main__":
    sys.exit(command_line(run))
