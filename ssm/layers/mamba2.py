"""y = W_out norm(SSD(silu(conv([x', B, C])), dt) * silu(z)): the Mamba-2 block."""

from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu, softplus

from ssm._errors import bad_argument
from ssm.layers._base import KernelLayer
from ssm.layers._step import project
from ssm.layers.mamba import ShortConv
from ssm.layers.selective_ssm import (
    causal_kernel,
    check_sizes,
    check_step,
    check_step_range,
    fill_step_bias,
    negative_exp,
    segment_sums,
    wide_dtype,
    without_padding,
)
from ssm.ops._dtypes import compute_dtype
from ssm.ops.ssd import ssd, ssd_step


class Mamba2State(NamedTuple):
    """The last d_conv - 1 inputs of the convolution, and the hidden state."""

    conv: Float[Tensor, "B W1 C"]
    ssm: Float[Tensor, "B H P N"]


class GatedRMSNorm(nn.Module):
    """weight * h / sqrt(mean(h^2) + eps) in groups of channels, h = y * silu(z).

    The gate comes before the norm (mamba_ssm's ``norm_before_gate=False``, and what
    ``transformers`` does); each of the ``groups`` equal groups has its own mean.
    Computed in float32 at least.
    """

    def __init__(
        self,
        channels: int,
        groups: int = 1,
        eps: float = 1e-5,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Ones; safe after ``to_empty``."""
        nn.init.ones_(self.weight)

    def forward(
        self, y: Float[Tensor, "*B D"], z: Float[Tensor, "*B D"]
    ) -> Float[Tensor, "*B D"]:
        """The normalised, gated y, in the dtype of z."""
        dtype = compute_dtype(y, z)
        h = (y.to(dtype) * silu(z.to(dtype))).unflatten(-1, (self.groups, -1))
        h = rms_norm(h, h.shape[-1:], eps=self.eps).flatten(-2)
        return self.weight * h.to(z.dtype)


class Mamba2(KernelLayer):
    """y = W_out norm(SSD(silu(conv([x', B, C])), dt) * silu(z)): the Mamba-2 block.

    Dao & Gu 2024, arXiv:2405.21060, section 7; [z, x', B, C, dt] = W_in x. Parameters
    are named and shaped as in mamba_ssm's ``Mamba2`` and ``transformers``'
    ``Mamba2Mixer``, so that checkpoints load as they are. x (B, L, d_model); the state
    is the convolution's window (B, d_conv - 1, d_inner + 2 G N) and h (B, H, P, N),
    d_inner = expand d_model = H P, P = headdim. The kernel of head h is
    M[b, h, t, s] = C_t B_s exp(A_h sum_{s<r<=t} dt_r) dt_s, + D_h where t = s.

    Any d_model: ``headdim`` left out is the largest divisor of d_inner up to 64 that
    leaves ``ngroups`` a divisor of the heads.

    Differs: A_log, D and dt_bias are float32 at least, whatever ``dtype`` is.
    """

    no_weight_decay: ClassVar[frozenset[str]] = frozenset({"A_log", "D", "dt_bias"})

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        expand: int = 2,
        headdim: int | None = None,
        ngroups: int = 1,
        *,
        chunk_size: int = 64,
        A_init_range: tuple[float, float] = (1.0, 16.0),
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        norm_eps: float = 1e-5,
        bias: bool = False,
        conv_bias: bool = True,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(d_model=d_model, d_state=d_state, d_conv=d_conv, expand=expand)
        check_step_range(dt_min, dt_max)
        self.d_model, self.d_inner = d_model, expand * d_model
        self.d_state, self.d_conv, self.ngroups = d_state, d_conv, ngroups
        self.headdim = resolve_headdim(self.d_inner, headdim, ngroups, limit=64)
        self.nheads = self.d_inner // self.headdim
        self.A_init_range, self.dt_range = A_init_range, (dt_min, dt_max)
        self.dt_limit, self.chunk_size, self.backend = dt_limit, chunk_size, backend
        conv_dim = self.d_inner + 2 * ngroups * d_state
        width = self.d_inner + conv_dim + self.nheads
        self.in_proj = nn.Linear(d_model, width, bias=bias, device=device, dtype=dtype)
        self.conv1d = ShortConv(
            conv_dim,
            d_conv,
            bias=conv_bias,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        wide = wide_dtype(dtype)
        self.dt_bias, self.A_log, self.D = (
            nn.Parameter(torch.empty(self.nheads, device=device, dtype=wide))
            for _ in range(3)
        )
        self.norm = GatedRMSNorm(
            self.d_inner, ngroups, norm_eps, device=device, dtype=dtype
        )
        self.out_proj = nn.Linear(
            self.d_inner, d_model, bias=bias, device=device, dtype=dtype
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        fill_step_bias(self.dt_bias, self.dt_range)
        with torch.no_grad():
            self.A_log.uniform_(*self.A_init_range).log_()
            self.D.fill_(1.0)

    def init_state(self, batch_size: int) -> Mamba2State:
        shape = (batch_size, self.nheads, self.headdim, self.d_state)
        dtype = compute_dtype(self.A_log)
        ssm = torch.zeros(shape, device=self.D.device, dtype=dtype)
        return Mamba2State(self.conv1d.init_state(batch_size), ssm)

    def forward(
        self,
        x: Float[Tensor, "B L D"],
        state: Mamba2State | None = None,
        lengths: Int[Tensor, " B"] | None = None,
    ) -> tuple[Float[Tensor, "B L D"], Mamba2State]:
        self.check_input(x, state)
        conv, h = (None, None) if state is None else state
        z, xBC, dt = self._project(without_padding(x, lengths))
        xBC, conv = self.conv1d(xBC, conv, lengths)
        values, B, C = self._split(xBC)
        y, h = ssd(
            values,
            dt,
            negative_exp(self.A_log),
            B,
            C,
            chunk_size=self.chunk_size,
            D=self.D,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            dt_limit=self.dt_limit,
            initial_state=h,
            lengths=lengths,
            backend=self.backend,
        )
        out = self.out_proj(self.norm(y.flatten(-2), z))
        return without_padding(out, lengths), Mamba2State(conv, h)

    def step(
        self, x_t: Float[Tensor, "B D"], state: Mamba2State
    ) -> tuple[Float[Tensor, "B D"], Mamba2State]:
        check_step(x_t, state, self.d_model, Mamba2State)
        z, xBC, dt = self._project(x_t)
        xBC, conv = self.conv1d.step(xBC, state.conv)
        values, B, C = self._split(xBC)
        y, h = ssd_step(
            values,
            dt,
            negative_exp(self.A_log),
            B,
            C,
            state.ssm,
            D=self.D,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            dt_limit=self.dt_limit,
        )
        y = self.norm(y.flatten(-2), z)
        return project(self.out_proj, y), Mamba2State(conv, h)

    def kernel_matrix(
        self, x: Float[Tensor, "B L D"]
    ) -> tuple[Float[Tensor, "B H L L"], Float[Tensor, "B L H P"]]:
        self.check_input(x)
        _, xBC, dt = self._project(x)
        values, B, C = self._split(self.conv1d(xBC, None, None)[0])
        dtype = compute_dtype(dt, self.A_log)
        dt = softplus(dt.to(dtype) + self.dt_bias).clamp(*self.dt_limit)
        pairs = torch.einsum("btgn,bsgn->bgts", C.to(dtype), B.to(dtype))
        pairs = pairs.repeat_interleave(self.nheads // self.ngroups, 1)
        A = negative_exp(self.A_log)[:, None, None]
        decays = torch.exp(A * segment_sums(dt))
        matrix = causal_kernel(decays * pairs * dt.mT[:, :, None], self.D)
        return matrix, values.to(dtype)

    def readout(
        self, mixed: Float[Tensor, "B L H P"], x: Float[Tensor, "B L D"]
    ) -> Float[Tensor, "B L D"]:
        return self.out_proj(self.norm(mixed.flatten(-2), self._project(x)[0]))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gate z, what the convolution takes, and dt, of x (…, d_model)."""
        sizes = [self.d_inner, self.conv1d.weight.shape[0], self.nheads]
        z, xBC, dt = project(self.in_proj, x).split(sizes, -1)
        return z, xBC, dt

    def _split(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values (…, H, P), B and C (…, G, N) of what the convolution puts out."""
        groups = self.ngroups * self.d_state
        values, B, C = xBC.split([self.d_inner, groups, groups], -1)
        return (
            values.unflatten(-1, (self.nheads, self.headdim)),
            B.unflatten(-1, (self.ngroups, self.d_state)),
            C.unflatten(-1, (self.ngroups, self.d_state)),
        )


def resolve_headdim(
    d_inner: int, headdim: int | None, ngroups: int = 1, *, limit: int
) -> int:
    """``headdim``, or where it is None the largest legal one up to ``limit``.

    Legal: it divides d_inner into a number of heads that ngroups divides.
    Raises ArgumentError, with the nearest legal value, for an illegal one.
    """
    check_sizes(ngroups=ngroups)
    if d_inner % ngroups:
        legal = [g for g in range(1, d_inner + 1) if d_inner % g == 0]
        nearest = min(legal, key=lambda g: abs(g - ngroups))
        raise bad_argument(
            "ngroups",
            ngroups,
            f"a divisor of expand * d_model = {d_inner}",
            f"the nearest is {nearest}",
        )
    per_group = d_inner // ngroups
    legal = [p for p in range(1, per_group + 1) if per_group % p == 0]
    if headdim is None:
        return max(p for p in legal if p <= limit)
    if headdim not in legal:
        nearest = min(legal, key=lambda p: abs(p - headdim))
        raise bad_argument(
            "headdim",
            headdim,
            f"a divisor of expand * d_model / ngroups = {per_group}",
            f"the nearest is {nearest}, or leave it out",
        )
    return headdim
