"""M[t, s] = sum_n C_n B_n (1 - a_n) a_n^(t-s): a block of N exponentials per head."""

from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from ssm.layers._base import KernelLayer
from ssm.layers.mamba import ShortConv
from ssm.layers.mamba2 import resolve_headdim
from ssm.layers.selective_ssm import (
    causal_kernel,
    check_sizes,
    check_step,
    check_step_range,
    fill_step_bias,
    segment_sums,
    wide_dtype,
    without_padding,
)
from ssm.ops._dtypes import compute_dtype
from ssm.ops.diagonal_ssd import diagonal_ssd, diagonal_ssd_step


class DiagonalState(NamedTuple):
    """The last d_conv - 1 inputs of the convolution, and the hidden state."""

    conv: Float[Tensor, "B W1 C"]
    ssm: Float[Tensor, "B H N P"]


class DiagonalSSD(KernelLayer):
    """M[b, h, t, s] = sum_n C_tn (prod_{s<r<=t} a_rhn) (1 - a_shn) B_sn + D_h [t = s].

    The Mamba block with its selective scan replaced by the diagonal case of the state
    space duality (Dao & Gu 2024, arXiv:2405.21060, sections 4 and 5): each of N states
    of a head decays by its own a = exp(-softplus(dt_bias)), and the P channels of the
    head pass through the same T x T matrix. ``selective=False`` (document 1's
    ``mamba_SSD_diag_exp``): a, B and C are parameters, and M is a sum of N exponentials
    of t - s, whatever the input. ``selective=True``: B_t, C_t and
    a_t = exp(-softplus(W x_t + dt_bias)) are read from the input, nothing else changes.

    x (B, L, d_model); [z, v, …] = W_in x; v passes a short convolution and silu
    (``d_conv=0``: neither), is mixed by M, gated by silu(z) and projected. The state is
    the convolution's window and h (B, H, N, P), H P = expand d_model. ``headdim`` (P)
    left out is the largest divisor of that up to 16; P = expand d_model gives one head,
    N decays in all; P = 1 gives N decays to each channel.

    Differs from Mamba: decays are per head, not per channel, and without selectivity
    the step size delta is part of a, and B and C are constants. From Mamba-2: one decay
    per state, not one per head; no norm; B and C shared by all heads (where selective).
    From both: inputs enter weighted by 1 - a (the exact zero-order hold of
    h' = rate (B v - h)), so that slow states are not larger than fast ones.
    """

    no_weight_decay: ClassVar[frozenset[str]] = frozenset({"dt_bias", "B", "C", "D"})
    B: nn.Parameter | None  # None where selective
    C: nn.Parameter | None

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        headdim: int | None = None,
        *,
        selective: bool = False,
        rate_min: float = 0.001,
        rate_max: float = 1.0,
        chunk_size: int = 64,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(d_model=d_model, d_state=d_state, expand=expand, d_conv=d_conv + 1)
        check_step_range(rate_min, rate_max)
        self.d_model, self.d_inner = d_model, expand * d_model
        self.headdim = resolve_headdim(self.d_inner, headdim, limit=16)
        self.nheads, self.d_state = self.d_inner // self.headdim, d_state
        self.selective, self.rate_range = selective, (rate_min, rate_max)
        self.chunk_size, self.backend = chunk_size, backend
        # Where selective, B and C pass the convolution with the values, as in Mamba-2.
        mixed = self.d_inner + (2 * d_state if selective else 0)
        rates = self.nheads * d_state
        self.sizes = [self.d_inner, mixed, rates if selective else 0]
        self.in_proj = nn.Linear(
            d_model, sum(self.sizes), bias=False, device=device, dtype=dtype
        )
        self.conv1d = (
            ShortConv(mixed, d_conv, backend=backend, device=device, dtype=dtype)
            if d_conv
            else None
        )
        wide = wide_dtype(dtype)
        shape = (self.nheads, d_state)
        self.dt_bias = nn.Parameter(torch.empty(shape, device=device, dtype=wide))
        for name in ("B", "C"):
            fixed = None
            if not selective:
                fixed = nn.Parameter(torch.empty(shape, device=device, dtype=wide))
            self.register_parameter(name, fixed)
        self.D = nn.Parameter(torch.empty(self.nheads, device=device, dtype=wide))
        self.out_proj = nn.Linear(
            self.d_inner, d_model, bias=False, device=device, dtype=dtype
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        fill_step_bias(self.dt_bias, self.rate_range)
        nn.init.ones_(self.D)
        if self.B is not None and self.C is not None:
            nn.init.ones_(self.B)
            nn.init.normal_(self.C, std=self.d_state**-0.5)

    def init_state(self, batch_size: int) -> DiagonalState:
        weight = self.in_proj.weight
        conv = (
            weight.new_zeros(batch_size, 0, self.sizes[1])
            if self.conv1d is None
            else self.conv1d.init_state(batch_size)
        )
        shape = (batch_size, self.nheads, self.d_state, self.headdim)
        dtype = compute_dtype(self.dt_bias)
        return DiagonalState(conv, weight.new_zeros(shape, dtype=dtype))

    def forward(
        self,
        x: Float[Tensor, "B L D"],
        state: DiagonalState | None = None,
        lengths: Int[Tensor, " B"] | None = None,
    ) -> tuple[Float[Tensor, "B L D"], DiagonalState]:
        self.check_input(x, state)
        x = without_padding(x, lengths)
        conv, h = self.init_state(len(x)) if state is None else state
        z, mixed, rates = self.in_proj(x).split(self.sizes, -1)
        if self.conv1d is not None:
            mixed, conv = self.conv1d(mixed, conv, lengths)
        q, k, v, log_a = self._operands(mixed, rates)
        y, h = diagonal_ssd(
            q,
            k,
            v,
            log_a=log_a,
            initial_state=h,
            lengths=lengths,
            chunk_size=self.chunk_size,
            backend=self.backend,
        )
        out = self._finish(y + self.D[:, None] * v, z)
        return without_padding(out, lengths), DiagonalState(conv, h)

    def step(
        self, x_t: Float[Tensor, "B D"], state: DiagonalState
    ) -> tuple[Float[Tensor, "B D"], DiagonalState]:
        check_step(x_t, state, self.d_model, DiagonalState)
        z, mixed, rates = self.in_proj(x_t).split(self.sizes, -1)
        conv = state.conv
        if self.conv1d is not None:
            mixed, conv = self.conv1d.step(mixed, conv)
        q, k, v, log_a = self._operands(mixed, rates)
        y, h = diagonal_ssd_step(q, k, v, log_a.exp(), state.ssm)
        return self._finish(y + self.D[:, None] * v, z), DiagonalState(conv, h)

    def kernel_matrix(
        self, x: Float[Tensor, "B L D"]
    ) -> tuple[Float[Tensor, "B H L L"], Float[Tensor, "B L H P"]]:
        self.check_input(x)
        _, mixed, rates = self.in_proj(x).split(self.sizes, -1)
        if self.conv1d is not None:
            mixed, _ = self.conv1d(mixed, None, None)
        q, k, v, log_a = self._operands(mixed, rates)
        # One state at a time: (B, H, L, L) is the most that is held at once.
        matrix = q.new_zeros(())
        for q_n, k_n, log_n in zip(
            q.unbind(-1), k.unbind(-1), log_a.unbind(-1), strict=True
        ):
            pairs = q_n.mT[..., None] * k_n.mT[:, :, None]
            matrix = matrix + segment_sums(log_n).exp() * pairs
        return causal_kernel(matrix, self.D), v.to(matrix.dtype)

    def readout(
        self, mixed: Float[Tensor, "B L H P"], x: Float[Tensor, "B L D"]
    ) -> Float[Tensor, "B L D"]:
        return self._finish(mixed, self.in_proj(x).split(self.sizes, -1)[0])

    def _operands(
        self, mixed: Tensor, rates: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q = C, k = (1 - a) B and log a (…, H, N); the values v (…, H, P)."""
        shape = (*mixed.shape[:-1], self.nheads, self.d_state)
        dtype = compute_dtype(mixed, self.dt_bias)
        if self.B is None or self.C is None:
            N = self.d_state
            v, B, C = mixed.to(dtype).split([self.d_inner, N, N], -1)
            B, C = B[..., None, :], C[..., None, :]
            rates = rates.to(dtype).unflatten(-1, shape[-2:]) + self.dt_bias
        else:
            v, B, C, rates = mixed, self.B, self.C, self.dt_bias
        log_a = -softplus(rates)
        k = -torch.expm1(log_a) * B
        v = v.unflatten(-1, (self.nheads, self.headdim))
        return C.expand(shape), k.expand(shape), v, log_a.expand(shape)

    def _finish(self, y: Tensor, z: Tensor) -> Tensor:
        return self.out_proj((y.flatten(-2) * silu(z)).to(z.dtype))
