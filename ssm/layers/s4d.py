"""S4D: y = K * u with A diagonal: K_j = 2 Re sum_n C_n A_bar_n^j B_bar_n.

Source: Gu et al., "On the Parameterization and Initialization of Diagonal State Space
Models" (2022), sections 3 and 4.
"""

from typing import ClassVar

import torch
from jaxtyping import Complex128, Float64
from torch import Tensor, nn

from ssm.layers._lti import (
    LTILayer,
    Powers,
    Recurrence,
    as_complex,
    check_sizes,
    fill,
    fill_log_uniform,
)
from ssm.layers.hippo import (
    Method,
    check_method,
    discretize_diagonal,
    make_hippo_modes,
    make_s4d_eigenvalues,
)
from ssm.ops.power_sums import power_sums


class S4D(LTILayer):
    """y = K * x + D x with N / 2 conjugate pairs of modes in every channel.

    ``init`` chooses the eigenvalues (:func:`make_s4d_eigenvalues`). B starts as ones
    or, for ``legs``, as half of LegS's input in its own modes: the system then tends to
    S4's as N grows (section 4 of the paper). The kernel is a product with a
    Vandermonde matrix that is never made: L = Q (L / Q) powers are products of two.

    Differs: for ``legs`` the paper's experiments start B at ones too; half of LegS's
    input is what its limit theorem is about. The layer is the bare system: activation
    and channel mixing belong to the block.
    """

    no_weight_decay: ClassVar[frozenset[str]] = frozenset(
        {"log_A_real", "A_imag", "B", "log_dt", "D"}
    )
    max_learning_rate: ClassVar[dict[str, float]] = dict.fromkeys(
        ("log_A_real", "A_imag", "B", "log_dt"), 1e-3
    )

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        init: str = "lin",
        discretization: Method = "zoh",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        *,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(d_model, d_state, dt_min, dt_max)
        check_method(discretization)
        self.d_model, self.d_state = d_model, d_state
        self.init, self.discretization = init, discretization
        self.dt_min, self.dt_max = dt_min, dt_max
        self.modes = -(-d_state // 2)
        self.backend = backend

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.log_A_real = empty(d_model, self.modes)
        self.A_imag = empty(d_model, self.modes)
        self.B = empty(d_model, self.modes, 2)
        self.C = empty(d_model, self.modes, 2)
        self.log_dt = empty(d_model)
        self.D = empty(d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Eigenvalues and B by ``init``; steps log-uniform; C of variance 1; D = 1."""
        A = make_s4d_eigenvalues(self.init, self.d_state)
        fill(self.log_A_real, (-A.real).log())
        fill(self.A_imag, A.imag)
        if self.init == "legs":
            B = make_hippo_modes(self.d_state).B / 2
        else:
            B = torch.ones_like(A.real)
        fill(self.B, torch.complex(B, torch.zeros_like(B)))
        nn.init.normal_(self.C, std=0.5**0.5)
        fill_log_uniform(self.log_dt, self.dt_min, self.dt_max)
        nn.init.ones_(self.D)

    def recurrence(self, L: int) -> Recurrence:
        """Powers of A_bar (D, n), B_bar and 2 conj(C)."""
        A_bar, B_bar = self._discrete()
        return Recurrence(Powers(A_bar, L, diagonal=True), B_bar, self.read())

    def kernel(self, system: Recurrence, L: int) -> Float64[Tensor, "D L"]:
        """What the state B_bar gives when it is left alone."""
        z = system.powers.map
        return power_sums(system.read.conj() * system.write, z, L)

    def advance(
        self, h: Complex128[Tensor, "B D n"], u: Float64[Tensor, "B D"]
    ) -> Complex128[Tensor, "B D n"]:
        """A_bar h + B_bar u."""
        A_bar, B_bar = self._discrete()
        return A_bar * h + B_bar * u[..., None]

    def read(self) -> Complex128[Tensor, "D n"]:
        """2 conj(C)."""
        return 2 * as_complex(self.C).conj()

    def _discrete(
        self,
    ) -> tuple[Complex128[Tensor, "D n"], Complex128[Tensor, "D n"]]:
        real, imag = -self.log_A_real.double().exp(), self.A_imag.double()
        return discretize_diagonal(
            torch.complex(real, imag),
            as_complex(self.B),
            self.log_dt.double().exp()[:, None],
            self.discretization,
        )
