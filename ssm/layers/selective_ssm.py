"""h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t, y_t = C_t h_t + D u_t: the S6 core.

The selective state space model of Mamba (Gu & Dao 2023, arXiv:2312.00752, section 3.2)
without the block around it: delta, B and C are projections of the input. Also what the
layers built on it share: the initialisation of steps, and materialised kernels.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import softplus

from ssm._errors import bad_argument, check_shape
from ssm.layers._base import KernelLayer, check_state
from ssm.layers._step import project, project_by
from ssm.ops._dtypes import compute_dtype
from ssm.ops._ragged import check_lengths, fill_padding, valid_steps
from ssm.ops.selective_scan import selective_scan, selective_state_update


class SelectiveState(NamedTuple):
    """The hidden state h (B, D, N)."""

    ssm: Float[Tensor, "B D N"]


class StepProjection(nn.Module):
    """delta = W x + bias, from dt_rank numbers to one step size a channel.

    softplus(bias) is log-uniform in [dt_min, dt_max]. That initialisation is this
    module's own, so it survives a framework that resets every module it meets.
    The bias is added by the scan, in its precision: it is kept in float32 at least.
    """

    def __init__(
        self,
        dt_rank: int,
        channels: int,
        dt_range: tuple[float, float],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dt_range = dt_range
        self.weight = nn.Parameter(
            torch.empty(channels, dt_rank, device=device, dtype=dtype)
        )
        self.bias = nn.Parameter(
            torch.empty(channels, device=device, dtype=wide_dtype(dtype))
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias; safe after ``to_empty``."""
        bound = self.weight.shape[1] ** -0.5  # preserves the variance
        nn.init.uniform_(self.weight, -bound, bound)
        fill_step_bias(self.bias, self.dt_range)

    def forward(self, x: Float[Tensor, "*B R"]) -> Float[Tensor, "*B D"]:
        """W x: without the bias, which the scan adds."""
        return project_by(self.weight, x)


class SelectiveSSM(KernelLayer):
    """M[b, d, t, s] = C_t exp(A sum_{s<r<=t} delta_r) delta_s B_s, + D where t = s.

    x (B, L, d_inner) -> y (B, L, d_inner); the state is h (B, d_inner, N). A, of which
    the logarithm of -A is kept, starts as -(1, 2, …, N) (S4D-real); D as ones. dt_rank
    is ceil(d_inner / 16) unless given. ``kernel_matrix`` has one head a channel.
    """

    no_weight_decay: ClassVar[frozenset[str]] = frozenset({"A_log", "D"})
    _rates: Tensor | None = None  # see fixed_rates

    def __init__(
        self,
        d_inner: int,
        d_state: int = 16,
        dt_rank: int | Literal["auto"] = "auto",
        *,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        rank = math.ceil(d_inner / 16) if dt_rank == "auto" else dt_rank
        check_sizes(d_inner=d_inner, d_state=d_state, dt_rank=rank)
        check_step_range(dt_min, dt_max)
        self.d_model = self.d_inner = d_inner
        self.d_state, self.dt_rank, self.backend = d_state, rank, backend
        self.x_proj = nn.Linear(
            d_inner, rank + 2 * d_state, bias=False, device=device, dtype=dtype
        )
        self.dt_proj = StepProjection(
            rank, d_inner, (dt_min, dt_max), device=device, dtype=dtype
        )
        wide = wide_dtype(dtype)
        self.A_log = nn.Parameter(
            torch.empty(d_inner, d_state, device=device, dtype=wide)
        )
        self.D = nn.Parameter(torch.empty(d_inner, device=device, dtype=wide))
        SelectiveSSM.reset_parameters(self)

    def reset_parameters(self) -> None:
        with torch.no_grad():
            states = torch.arange(1, self.d_state + 1, device=self.A_log.device)
            self.A_log.copy_(states.to(torch.float64).log().expand_as(self.A_log))
            self.D.fill_(1.0)

    def init_state(self, batch_size: int) -> SelectiveState:
        shape = (batch_size, self.d_inner, self.d_state)
        dtype = compute_dtype(self.A_log)
        return SelectiveState(torch.zeros(shape, device=self.D.device, dtype=dtype))

    def forward(
        self,
        x: Float[Tensor, "B L D"],
        state: SelectiveState | None = None,
        lengths: Int[Tensor, " B"] | None = None,
    ) -> tuple[Float[Tensor, "B L D"], SelectiveState]:
        self.check_input(x, state)
        x = without_padding(x, lengths)
        y, h = self._scan(x, None, None if state is None else state.ssm, lengths)
        return y, SelectiveState(h)

    def step(
        self, x_t: Float[Tensor, "B D"], state: SelectiveState
    ) -> tuple[Float[Tensor, "B D"], SelectiveState]:
        check_step(x_t, state, self.d_model, SelectiveState)
        y_t, h = self._scan_step(x_t, None, state.ssm)
        return y_t, SelectiveState(h)

    def kernel_matrix(
        self, x: Float[Tensor, "B L D"]
    ) -> tuple[Float[Tensor, "B D L L"], Float[Tensor, "B L D 1"]]:
        self.check_input(x)
        matrix = self._kernel(x)
        return matrix, x[..., None].to(matrix.dtype)

    def readout(
        self, mixed: Float[Tensor, "B L D 1"], x: Float[Tensor, "B L D"]
    ) -> Float[Tensor, "B L D"]:
        return mixed[..., 0].to(x.dtype)

    # What a block around the core (Mamba) uses too.

    def _project(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """delta (before bias and softplus), B and C of the input u (…, D)."""
        sizes = [self.dt_rank, self.d_state, self.d_state]
        steps, B, C = project(self.x_proj, u).split(sizes, -1)
        return self.dt_proj(steps), B, C

    def _scan(
        self, u: Tensor, z: Tensor | None, h: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        delta, B, C = self._project(u)
        return selective_scan(
            u,
            delta,
            negative_exp(self.A_log),
            B,
            C,
            self.D,
            z,
            self.dt_proj.bias,
            True,
            initial_state=h,
            lengths=lengths,
            backend=self.backend,
        )

    def _scan_step(
        self, u: Tensor, z: Tensor | None, h: Tensor
    ) -> tuple[Tensor, Tensor]:
        delta, B, C = self._project(u)
        A = negative_exp(self.A_log) if self._rates is None else self._rates
        bias = self.dt_proj.bias
        return selective_state_update(h, u, delta, A, B, C, self.D, z, bias, True)

    def _kernel(self, u: Tensor) -> Tensor:
        delta, B, C = self._project(u)
        dtype = compute_dtype(delta, self.A_log)
        delta = softplus(delta.to(dtype) + self.dt_proj.bias)
        A = negative_exp(self.A_log)[..., None, None]
        elapsed = segment_sums(delta)
        pairs = torch.einsum("btn,bsn->nbts", C.to(dtype), B.to(dtype))
        # One state at a time: (B, D, L, L) is the most that is held at once.
        matrix = torch.zeros_like(elapsed)
        for n in range(self.d_state):
            matrix = matrix + torch.exp(A[:, n] * elapsed) * pairs[n][:, None]
        return causal_kernel(matrix * delta.mT[:, :, None], self.D)


@contextmanager
def fixed_rates(modules: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """Form A of every selective layer once for all steps within; yields them.

    For steps of one set of weights without gradients: of the nine kernels of such a
    step two would do nothing else.
    """
    layers = [module for module in modules if isinstance(module, SelectiveSSM)]
    fixed = [negative_exp(layer.A_log.detach()) for layer in layers]
    for layer, A in zip(layers, fixed, strict=True):
        layer._rates = A
    try:
        yield fixed
    finally:
        for layer in layers:
            layer._rates = None


def segment_sums(x: Float[Tensor, "B L C"]) -> Float[Tensor, "B C L L"]:
    """S[b, c, t, s] = sum_{s<r<=t} x[b, r, c], and 0 where t <= s.

    Summed within each segment and not by differences of one running sum, so that short
    segments late in a sequence keep all their digits.
    """
    L = x.shape[1]
    terms = x.mT[..., None].expand(*x.shape[:1], x.shape[2], L, L)
    return terms.tril(-1).cumsum(-2)


def causal_kernel(
    matrix: Float[Tensor, "B H L L"], D: Float[Tensor, " H"]
) -> Float[Tensor, "B H L L"]:
    """``matrix`` with zeros above its diagonal, and D added on it."""
    skip = D.to(matrix.dtype)[:, None].expand(-1, matrix.shape[-1])
    return matrix.tril() + torch.diag_embed(skip)


def negative_exp(log: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """-exp(log) in float32 at least: a 16-bit A_log would round A to infinity."""
    return -log.to(compute_dtype(log)).exp()


def wide_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of parameters that must not be rounded to 16 bits: float32 at least."""
    return torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)


def fill_step_bias(bias: Float[Tensor, "*S"], dt_range: tuple[float, float]) -> None:
    """Fill ``bias`` so that softplus(bias) is log-uniform in ``dt_range``."""
    low, high = dt_range
    with torch.no_grad():
        dt = torch.empty_like(bias, dtype=torch.float64)
        dt.uniform_(math.log(low), math.log(high)).exp_()
        bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus


def without_padding(
    x: Float[Tensor, "B L *C"], lengths: Int[Tensor, " B"] | None
) -> Float[Tensor, "B L *C"]:
    """``x`` with zeros on its padding: before a projection, whose weight's gradient
    would otherwise multiply a NaN there by zero; after one, whose bias would show."""
    if lengths is None:
        return x
    check_lengths(lengths, *x.shape[:2])
    return fill_padding(x, valid_steps(lengths, x.shape[1]), 0.0)


def check_step(x_t: Tensor, state: object, d_model: int, kind: type) -> None:
    """Raise ArgumentError unless x_t is (B, d_model) and ``state`` one of ``kind``."""
    check_shape("x_t", x_t, (None, d_model))
    if not isinstance(state, kind):
        raise bad_argument(
            "state",
            f"a {type(state).__name__}",
            f"a {kind.__name__}",
            f"make it with init_state({x_t.shape[0]})",
        )
    check_state(state, x_t.shape[0])


def check_sizes(**sizes: int) -> None:
    """Raise ArgumentError unless every size is a positive whole number."""
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise bad_argument(name, repr(size), "a whole number from 1", "raise it")


def check_step_range(low: float, high: float) -> None:
    """Raise ArgumentError unless 0 < dt_min <= dt_max."""
    if not 0 < low <= high:
        raise bad_argument(
            "dt_min, dt_max", f"{low}, {high}", "0 < dt_min <= dt_max", "order them"
        )
