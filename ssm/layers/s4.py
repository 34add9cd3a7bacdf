"""S4: y = K * u with A normal plus low rank, its kernel by the generating function.

    h' = (diag(Lambda) - P P^*) h + B u,    y = C h + D u,    discretised bilinearly

The kernel K_j = C A_bar^j B_bar is read off its truncated generating function

    sum_{j<L} K_j z^j = C~ (I - z A_bar)^-1 B_bar,    C~ = C (I - A_bar^L)

at the L-th roots of unity, where it is four Cauchy products (the resolvent of a
diagonal matrix, corrected for the low rank by Woodbury's formula), and an inverse FFT.

Source: Gu et al., "Efficiently Modeling Long Sequences with Structured State Spaces"
(2022), algorithm 1 and appendix C.3.
"""

from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Complex128, Float64
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssm.layers._lti import (
    LTILayer,
    Powers,
    Recurrence,
    as_complex,
    check_sizes,
    fill,
    fill_log_uniform,
    pack,
    unpack,
)
from ssm.layers.hippo import make_hippo_modes

_CAUCHY_ENTRIES = 1 << 21  # of the Cauchy matrix that are held at once: 32 MiB


class DPLRSystem(NamedTuple):
    """D continuous systems by one half of their conjugate pairs, and their steps.

    h stands for (h, conj h): P^* h is 2 Re sum conj(P) h and C h is 2 Re sum C h.
    """

    Lambda: Complex128[Tensor, "D n"]
    P: Complex128[Tensor, "D n"]
    B: Complex128[Tensor, "D n"]
    C: Complex128[Tensor, "D n"]
    delta: Float64[Tensor, " D"]


def advance(
    system: DPLRSystem, h: Complex128[Tensor, "*B D n"], u: Float64[Tensor, "*B D"]
) -> Complex128[Tensor, "*B D n"]:
    """h <- (I - delta/2 A)^-1 ((I + delta/2 A) h + delta B u) in O(n).

    Both sides are multiplied by 2/delta; the inverse is Woodbury's.
    """
    rate = (2 / system.delta)[:, None]
    P = system.P
    right = (rate + system.Lambda) * h - P * _inner(P, h) + 2 * system.B * u[..., None]
    resolvent = 1 / (rate - system.Lambda)
    RP = resolvent * P
    solved = resolvent * right
    return solved - RP * (_inner(P, solved) / (1 + _inner(P, RP)))


def _inner(P: Tensor, h: Tensor) -> Tensor:
    """P^* h over the pairs, kept as a last dimension of one."""
    return 2 * (P.conj() * h).real.sum(-1, keepdim=True)


def bilinear_recurrence(system: DPLRSystem, longest: int) -> Recurrence:
    """Powers of A_bar, dense and real on the (Re, Im) pairs, B_bar, and 2 conj(C).

    The columns of A_bar are what one step makes of the unit vectors.
    """
    channels, n = system.Lambda.shape
    eye = torch.eye(2 * n, dtype=torch.float64, device=system.delta.device)
    units = unpack(eye)[:, None].expand(-1, channels, -1)
    columns = advance(system, units, eye.new_zeros(2 * n, channels))
    write = advance(system, torch.zeros_like(system.B), torch.ones_like(system.delta))
    A_bar = pack(columns).permute(1, 2, 0)
    powers = Powers(A_bar, longest, diagonal=False)
    return Recurrence(powers, write, 2 * system.C.conj())


def dplr_kernel(
    system: DPLRSystem, length: int, powers: Powers | None = None
) -> Float64[Tensor, "D length"]:
    """K_j = C A_bar^j B_bar for j < length, by the generating function.

    ``powers`` are those of the system's dense A_bar, where the caller has them. The
    Cauchy matrices are made a few frequencies at a time, and again on the way back.
    """
    if powers is None:
        powers = bilinear_recurrence(system, length).powers
    read = 2 * system.C.conj()
    beyond = powers.adjoint().power(read[None], length)[0]
    truncated = (read - beyond).conj() / 2
    k = torch.arange(length // 2 + 1, dtype=torch.float64, device=read.device)
    at_once = max(_CAUCHY_ENTRIES // (2 * max(read.numel(), 1)), 1)
    operands = (system.Lambda, system.P, system.B, truncated, system.delta)
    samples = [
        checkpoint(
            _generating_function,
            torch.pi * piece / length,
            *operands,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for piece in k.split(at_once)
    ]
    return torch.fft.irfft(torch.cat(samples, -1), length)


def _generating_function(
    half_angle: Float64[Tensor, " F"],
    Lambda: Complex128[Tensor, "D n"],
    P: Complex128[Tensor, "D n"],
    B: Complex128[Tensor, "D n"],
    C: Complex128[Tensor, "D n"],
    delta: Float64[Tensor, " D"],
) -> Complex128[Tensor, "D F"]:
    """2 C ((2/delta)(1-z) - (1+z) A)^-1 B at z = e^(-2i half_angle).

    Written so that nothing is singular at z = -1. 1 - z and 1 + z come from sines and
    cosines: near z = 1 their difference would lose the digits that slow modes need.
    """
    sine, cosine = half_angle.sin(), half_angle.cos()
    minus = torch.complex(2 * sine**2, 2 * sine * cosine)
    plus = torch.complex(2 * cosine**2, -2 * sine * cosine)
    both = torch.cat([Lambda, Lambda.conj()], -1)[:, None]
    rate = (2 / delta)[:, None, None]
    cauchy = 1 / (rate * minus[:, None] - plus[:, None] * both)
    pairs = torch.stack([C * B, C * P, P.conj() * B, P.conj() * P], 1)
    pairs = torch.cat([pairs, pairs.conj()], -1)
    CB, CP, PB, PP = torch.einsum("dfn,dvn->vdf", cauchy, pairs)
    return 2 * (CB - plus * CP * PB / (1 + plus * PP))


class S4(LTILayer):
    """y = K * x + D x, a DPLR system of its own for every channel, born as LegS.

    C is a parameter and the truncated C~ is derived from it for each length, so any
    length is right. The parallel form also needs the dense powers A_bar^(2^k), for C~
    and for the states: O(D N^3 log L) work and O(D N^2 log L) memory.

    Differs: Lambda - P P^* with Re Lambda = -exp(log_A_real) < 0, rather than
    Lambda - P Q^* with both free, so that no step of training can make it unstable
    (Goel et al., "It's Raw!", 2022, section 4.1). The layer is the bare system:
    activation and channel mixing belong to the block.
    """

    no_weight_decay: ClassVar[frozenset[str]] = frozenset(
        {"log_A_real", "A_imag", "P", "B", "log_dt", "D"}
    )
    max_learning_rate: ClassVar[dict[str, float]] = dict.fromkeys(
        ("log_A_real", "A_imag", "P", "B", "log_dt"), 1e-3
    )

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        *,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(d_model, d_state, dt_min, dt_max)
        self.d_model, self.d_state = d_model, d_state
        self.dt_min, self.dt_max = dt_min, dt_max
        self.modes = -(-d_state // 2)
        self.backend = backend

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.log_A_real = empty(d_model, self.modes)
        self.A_imag = empty(d_model, self.modes)
        self.P = empty(d_model, self.modes, 2)
        self.B = empty(d_model, self.modes, 2)
        self.C = empty(d_model, self.modes, 2)
        self.log_dt = empty(d_model)
        self.D = empty(d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """LegS in every channel; steps log-uniform; C random of variance 1; D = 1."""
        Lambda, P, B, _ = make_hippo_modes(self.d_state)
        fill(self.log_A_real, (-Lambda.real).log())
        fill(self.A_imag, Lambda.imag)
        fill(self.P, torch.complex(P, torch.zeros_like(P)))
        fill(self.B, torch.complex(B, torch.zeros_like(B)))
        nn.init.normal_(self.C, std=0.5**0.5)
        fill_log_uniform(self.log_dt, self.dt_min, self.dt_max)
        nn.init.ones_(self.D)

    def system(self) -> DPLRSystem:
        """The continuous systems in double precision."""
        real, imag = -self.log_A_real.double().exp(), self.A_imag.double()
        return DPLRSystem(
            torch.complex(real, imag),
            as_complex(self.P),
            as_complex(self.B),
            as_complex(self.C),
            self.log_dt.double().exp(),
        )

    def recurrence(self, L: int) -> Recurrence:
        """A_bar dense, for the parallel forms; see :func:`bilinear_recurrence`."""
        return bilinear_recurrence(self.system(), L)

    def kernel(self, system: Recurrence, L: int) -> Float64[Tensor, "D L"]:
        """By the generating function."""
        return dplr_kernel(self.system(), L, system.powers)

    def advance(
        self, h: Complex128[Tensor, "B D n"], u: Float64[Tensor, "B D"]
    ) -> Complex128[Tensor, "B D n"]:
        """The bilinear step by Woodbury's formula."""
        return advance(self.system(), h, u)

    def read(self) -> Complex128[Tensor, "D n"]:
        """2 conj(C)."""
        return 2 * as_complex(self.C).conj()
