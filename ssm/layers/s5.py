"""S5: h_t = A_bar h_{t-1} + B_bar x_t, y_t = 2 Re C h_t + D x_t, for all channels.

Source: Smith et al., "Simplified State Space Layers for Sequence Modeling" (2023),
sections 3 and 4.
"""

from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Complex, Complex128, Float, Int
from torch import Tensor, nn

from ssm._errors import check_shape
from ssm.layers._base import KernelLayer
from ssm.layers._lti import Powers, check_sizes, fill, fill_log_uniform, toeplitz
from ssm.layers.hippo import discretize_diagonal, make_hippo_modes
from ssm.ops._dtypes import compute_dtype
from ssm.ops._ragged import check_lengths, fill_padding, valid_steps
from ssm.ops.linear_scan import linear_scan


class S5State(NamedTuple):
    """The state of one sequence a row: half of each conjugate pair, complex128."""

    h: Complex128[Tensor, "B n"]


class S5(KernelLayer):
    """One diagonal system of N states with d_model inputs and outputs.

    The parallel form is the associative scan :func:`ssm.ops.linear_scan`. A has
    N / 2 conjugate pairs, those of LegS's normal part at first, each with its own step;
    zero-order hold. States are in double precision (:mod:`ssm.layers._lti` says why):
    they are few, B L N / 2 numbers for all channels together.

    One head per mode: M[b, n, t, s] = A_bar_n^(t-s), complex, and the values are
    B_bar x. C and D mix channels, so both are in ``readout``.

    Differs: Re A = -exp(log_A_real), so that training cannot make it unstable. The
    layer is the bare system: activation and gates belong to the block.
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

        self.log_A_real = empty(self.modes)
        self.A_imag = empty(self.modes)
        self.B = empty(self.modes, d_model, 2)
        self.C = empty(d_model, self.modes, 2)
        self.log_dt = empty(self.modes)
        self.D = empty(d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A of LegS; B and C random and real before the change to its modes; D = 1."""
        Lambda, _, _, V = make_hippo_modes(self.d_state)
        fill(self.log_A_real, (-Lambda.real).log())
        fill(self.A_imag, Lambda.imag)
        N, channels = self.d_state, self.d_model
        device, double = self.B.device, torch.float64
        V = V.to(device)
        B = torch.randn(N, channels, dtype=double, device=device) * channels**-0.5
        C = torch.randn(channels, N, dtype=double, device=device) * N**-0.5
        fill(self.B, V.mH @ B.to(V.dtype))
        fill(self.C, C.to(V.dtype) @ V)
        fill_log_uniform(self.log_dt, self.dt_min, self.dt_max)
        nn.init.ones_(self.D)

    def init_state(self, batch_size: int) -> S5State:
        """Zeros: nothing seen yet."""
        h = torch.zeros(
            batch_size, self.modes, dtype=torch.complex128, device=self.D.device
        )
        return S5State(h)

    def forward(
        self,
        x: Float[Tensor, "B L D"],
        state: S5State | None = None,
        lengths: Int[Tensor, " B"] | None = None,
    ) -> tuple[Float[Tensor, "B L D"], S5State]:
        """The scan over all states; see the contract."""
        self._check(x, state)
        if lengths is not None:
            check_lengths(lengths, *x.shape[:2])
            x = fill_padding(x, valid_steps(lengths, x.shape[1]), 0.0)
        A_bar, gain = self._discrete()
        inputs = gain * self._inputs(x)
        h, last = linear_scan(
            A_bar.expand_as(inputs),
            inputs,
            initial_state=None if state is None else state.h,
            lengths=lengths,
            backend=self.backend,
        )
        return self._outputs(h, x), S5State(last)

    def step(
        self, x_t: Float[Tensor, "B D"], state: S5State
    ) -> tuple[Float[Tensor, "B D"], S5State]:
        """One step of the recurrence."""
        self._check(x_t[:, None], state)
        A_bar, gain = self._discrete()
        h = A_bar * state.h + gain * self._inputs(x_t)
        return self._outputs(h, x_t), S5State(h)

    def kernel_matrix(
        self, x: Float[Tensor, "B L D"]
    ) -> tuple[Complex128[Tensor, "B n L L"], Complex128[Tensor, "B L n 1"]]:
        """A_bar_n^(t-s), and the inputs as each mode sees them."""
        self._check(x, None)
        A_bar, gain = self._discrete()
        L = x.shape[1]
        powers = Powers(A_bar, L, diagonal=True)
        matrix = toeplitz(powers.orbit(torch.ones_like(A_bar), L).mT)
        values = (gain * self._inputs(x))[..., None]
        return matrix.expand(x.shape[0], -1, -1, -1), values

    def readout(
        self, mixed: Complex128[Tensor, "B L n 1"], x: Float[Tensor, "B L D"]
    ) -> Float[Tensor, "B L D"]:
        """2 Re C h + D x."""
        return self._outputs(mixed[..., 0], x)

    def _discrete(self) -> tuple[Complex128[Tensor, " n"], Complex128[Tensor, " n"]]:
        """A_bar, and what B is multiplied with."""
        real, imag = -self.log_A_real.double().exp(), self.A_imag.double()
        A = torch.complex(real, imag)
        delta = self.log_dt.double().exp()
        return discretize_diagonal(A, torch.ones_like(A), delta)

    def _inputs(self, x: Float[Tensor, "*B D"]) -> Complex128[Tensor, "*B n"]:
        """B x; the sum over channels in the dtype of x, float32 at least."""
        dtype = compute_dtype(x, self.B)
        flat = self.B.to(dtype).transpose(1, 2).flatten(0, 1)
        pairs = (x.to(dtype) @ flat.mT).double()
        return torch.view_as_complex(pairs.unflatten(-1, (-1, 2)))

    def _outputs(
        self, h: Complex[Tensor, "*B n"], x: Float[Tensor, "*B D"]
    ) -> Float[Tensor, "*B D"]:
        """2 Re C h + D x; the sum over modes in the dtype of x, float32 at least."""
        dtype = compute_dtype(x, self.C)
        C = self.C.to(dtype)
        conjugate = torch.stack([2 * C[..., 0], -2 * C[..., 1]], -1)
        pairs = torch.view_as_real(h.resolve_conj()).flatten(-2).to(dtype)
        y = pairs @ conjugate.flatten(1).mT + self.D.to(dtype) * x
        return y.to(x.dtype)

    def _check(self, x: Tensor, state: S5State | None) -> None:
        self.check_input(x, state)
        if state is not None:
            check_shape("state", state.h, (x.shape[0], self.modes))
