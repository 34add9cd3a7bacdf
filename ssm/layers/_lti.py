"""Time-invariant recurrences in all three forms: what S4 and S4D share.

    h_t = A h_{t-1} + B u_t,     y_t = Re sum_n conj(r_n) h_n + D u_t

for every channel by itself. A state is complex, one number for each conjugate pair of
modes; A is diagonal, or any real-linear map of the pairs (Re h, Im h). States and
kernels are in double precision whatever the dtype of the parameters: after t steps a
mode of frequency w has turned by an angle w t, and a float32 angle of 1000 is already
off by 3e-5, far more than the rounding of one output.
"""

from abc import abstractmethod
from math import log
from typing import NamedTuple

import torch
from jaxtyping import Complex128, Float, Float64, Inexact, Int
from torch import Tensor, nn
from torch.nn.functional import pad

from ssm._errors import bad_argument, check_shape
from ssm.layers._base import KernelLayer
from ssm.ops._dtypes import compute_dtype
from ssm.ops._ragged import check_lengths, fill_padding, valid_steps
from ssm.ops.fft_conv import fft_conv
from ssm.ops.power_sums.torch import chunk_exponent


def pack(h: Inexact[Tensor, "*C n"]) -> Float[Tensor, "*C n2"]:
    """Complex numbers as (Re, Im) pairs; real ones as they are."""
    if not h.is_complex():
        return h
    return torch.view_as_real(h.resolve_conj()).flatten(-2)


def unpack(x: Float[Tensor, "*C n2"]) -> Inexact[Tensor, "*C n"]:
    """The inverse of :func:`pack` on complex numbers."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


class Powers:
    """A, A^2, A^4, … of linear maps: any A^j h in log2(j) applications.

    A is diagonal, shape (…, n), or dense, shape (…, n, n). A real dense map of complex
    vectors acts on their (Re, Im) pairs. Nothing is divided and no logarithm taken, so
    A may be singular.
    """

    def __init__(self, A: Tensor, longest: int, *, diagonal: bool) -> None:
        self.diagonal, self.longest = diagonal, longest
        self._squares = [A]

    @property
    def map(self) -> Tensor:
        """A itself."""
        return self._squares[0]

    @property
    def squares(self) -> list[Tensor]:
        """A, A^2, A^4, … up to ``longest``; formed when first asked for."""
        while 1 << len(self._squares) <= self.longest:
            last = self._squares[-1]
            self._squares.append(last * last if self.diagonal else last @ last)
        return self._squares

    def adjoint(self) -> "Powers":
        """The powers of the conjugate transpose."""
        other = Powers(self.map, self.longest, diagonal=self.diagonal)
        other._squares = [X.conj() if self.diagonal else X.mH for X in self.squares]
        return other

    def apply(self, k: int, h: Tensor) -> Tensor:
        """A^(2^k) h for h of shape (…, n)."""
        A = self.squares[k]
        if self.diagonal:
            return A * h
        paired = h.is_complex() and not A.is_complex()
        moved = torch.einsum("...mn,...n->...m", A, pack(h) if paired else h)
        return unpack(moved) if paired else moved

    def power(self, h: Tensor, steps: int | Int[Tensor, " B"]) -> Tensor:
        """A^steps h, for all rows of h (B, …, n) alike or for each its own."""
        for k in range(len(self.squares)):
            if isinstance(steps, int):
                h = self.apply(k, h) if steps >> k & 1 else h
            else:
                bit = (steps >> k & 1).bool().reshape(-1, *[1] * (h.ndim - 1))
                h = torch.where(bit, self.apply(k, h), h)
        return h

    def orbit(self, h: Tensor, length: int, first: int = 0) -> Tensor:
        """A^(j 2^first) h for j < length, by doubling; shape (length, …, n)."""
        states, k = h[None], first
        while len(states) < length:
            more = states[: length - len(states)]
            states = torch.cat([states, self.apply(k, more)])
            k += 1
        return states[:length]


class Recurrence(NamedTuple):
    """h_t = A h_{t-1} + write u_t, y_t = Re sum conj(read) h_t, in double precision."""

    powers: Powers  # of A: (D, n), or (D, 2n, 2n) on (Re, Im) pairs
    write: Complex128[Tensor, "D n"]
    read: Complex128[Tensor, "D n"]


def outputs_from(
    system: Recurrence, h: Complex128[Tensor, "B D n"], L: int
) -> Float64[Tensor, "B L D"]:
    """Re conj(read) A^j h for j < L.

    With j = c Q + q it is a product of Q reads and L/Q states, so that nothing of size
    L x n is made.
    """
    e = chunk_exponent(L)
    Q = 1 << e
    states = pack(system.powers.orbit(h, -(-L // Q), first=e))
    reads = pack(system.powers.adjoint().orbit(system.read, Q))
    y = torch.einsum("cbdn,qdn->bcqd", states, reads)
    return y.flatten(1, 2)[:, :L]


def state_after(
    system: Recurrence, recent: Float64[Tensor, "B L D"]
) -> Complex128[Tensor, "B D n"]:
    """sum_j A^j write u_j, with the inputs from the most recent to the first."""
    L = recent.shape[1]
    k = chunk_exponent(L)
    Q = 1 << k
    writes = pack(system.powers.orbit(system.write, Q))
    chunks = pad(recent, (0, 0, 0, -L % Q)).unflatten(1, (-1, Q))
    states = unpack(torch.einsum("bcqd,qdn->cbdn", chunks, writes))
    while len(states) > 1:  # neighbours are joined until one is left
        if len(states) % 2:
            states = torch.cat([states, torch.zeros_like(states[:1])])
        near, far = states.unflatten(0, (-1, 2)).unbind(1)
        states = near + system.powers.apply(k, far)
        k += 1
    return states[0]


def toeplitz(kernel: Inexact[Tensor, "H L"]) -> Inexact[Tensor, "H L L"]:
    """M[h, t, s] = kernel[h, t - s] for s <= t, else 0."""
    steps = torch.arange(kernel.shape[-1], device=kernel.device)
    ago = steps[:, None] - steps
    return torch.where(ago >= 0, kernel[:, ago.clamp(min=0)], 0.0)


def check_sizes(d_model: int, d_state: int, dt_min: float, dt_max: float) -> None:
    """Raise ArgumentError unless the sizes are positive and 0 < dt_min <= dt_max."""
    for name, value in (("d_model", d_model), ("d_state", d_state)):
        if value < 1:
            raise bad_argument(name, value, "a positive integer", "raise it")
    if not 0 < dt_min <= dt_max:
        raise bad_argument(
            "dt_min, dt_max",
            (dt_min, dt_max),
            "0 < dt_min <= dt_max",
            "try 0.001 and 0.1",
        )


def fill_log_uniform(log_dt: Tensor, dt_min: float, dt_max: float) -> None:
    """Draw ``log_dt`` in place so that dt is log-uniform between the bounds."""
    nn.init.uniform_(log_dt, log(dt_min), log(dt_max))


def fill(parameter: Tensor, values: Tensor) -> None:
    """Copy ``values`` into a parameter: each row alike, complex ones as pairs."""
    if values.is_complex():
        values = torch.view_as_real(values.resolve_conj())
    with torch.no_grad():
        parameter.copy_(values.expand(parameter.shape))


def as_complex(parameter: Float[Tensor, "*C 2"]) -> Complex128[Tensor, "*C"]:
    """A parameter of (Re, Im) pairs as complex numbers in double precision."""
    return torch.view_as_complex(parameter.double().contiguous())


class LTIState(NamedTuple):
    """The state of one sequence a row: half of each conjugate pair, complex128."""

    h: Complex128[Tensor, "B D n"]


class LTILayer(KernelLayer):
    """D independent single-input single-output systems, the same at every step.

    ``forward`` convolves with the kernel by FFT, and adds what is left of the state
    that it continues from; ``step`` is the recurrence; the matrix is the Toeplitz
    matrix of the kernel, with the skip D on its diagonal. One head per channel: the
    matrix is (B, D, L, L), a view that repeats over the batch. The state has
    ceil(N / 2) complex numbers a channel, for even and odd N.
    """

    modes: int
    backend: str
    D: nn.Parameter

    @abstractmethod
    def recurrence(self, L: int) -> Recurrence:
        """The discrete system with the powers that L steps need; differentiable."""

    @abstractmethod
    def kernel(self, system: Recurrence, L: int) -> Float64[Tensor, "D L"]:
        """K_j = Re conj(read) A^j write for j < L."""

    @abstractmethod
    def advance(
        self, h: Complex128[Tensor, "B D n"], u: Float64[Tensor, "B D"]
    ) -> Complex128[Tensor, "B D n"]:
        """A h + write u in O(n)."""

    @abstractmethod
    def read(self) -> Complex128[Tensor, "D n"]:
        """The vector whose inner product with the state is the output."""

    def init_state(self, batch_size: int) -> LTIState:
        """Zeros: nothing seen yet."""
        return LTIState(
            torch.zeros(
                batch_size,
                self.d_model,
                self.modes,
                dtype=torch.complex128,
                device=self.D.device,
            )
        )

    def forward(
        self,
        x: Float[Tensor, "B L D"],
        state: LTIState | None = None,
        lengths: Int[Tensor, " B"] | None = None,
    ) -> tuple[Float[Tensor, "B L D"], LTIState]:
        """y = K * x + D x + what the state still gives; see the contract."""
        self._check(x, state)
        batch, L, _ = x.shape
        valid = None
        if lengths is not None:
            check_lengths(lengths, batch, L)
            valid = valid_steps(lengths, L)
            x = fill_padding(x, valid, 0.0)
        if L == 0:
            return x, self.init_state(batch) if state is None else state
        system = self.recurrence(L)
        kernel = self.kernel(system, L).to(compute_dtype(x, self.D))
        y, _ = fft_conv(x, kernel, self.D, backend=self.backend)
        h = state_after(system, _most_recent_first(x.double(), lengths))
        if state is not None:
            left = outputs_from(system, system.powers.apply(0, state.h), L)
            y = y + left.to(y.dtype)
            h = h + system.powers.power(state.h, L if lengths is None else lengths)
        return (y if valid is None else fill_padding(y, valid, 0.0)), LTIState(h)

    def step(
        self, x_t: Float[Tensor, "B D"], state: LTIState
    ) -> tuple[Float[Tensor, "B D"], LTIState]:
        """One step of the recurrence, O(N) a channel."""
        self._check(x_t[:, None], state)
        u = x_t.double()
        h = self.advance(state.h, u)
        y = (pack(self.read()) * pack(h)).sum(-1) + self.D.double() * u
        return y.to(x_t.dtype), LTIState(h)

    def kernel_matrix(
        self, x: Float[Tensor, "B L D"]
    ) -> tuple[Float[Tensor, "B D L L"], Float[Tensor, "B L D 1"]]:
        """K_{t-s}, D added on the diagonal; the values are the inputs."""
        self._check(x, None)
        batch, L, channels = x.shape
        dtype = compute_dtype(x, self.D)
        if L == 0:
            return x.new_zeros(batch, channels, 0, 0, dtype=dtype), x[..., None]
        skip = self.D.double()[:, None, None] * torch.eye(L, device=x.device)
        matrix = toeplitz(self.kernel(self.recurrence(L), L)) + skip
        return matrix.to(dtype).expand(batch, -1, -1, -1), x[..., None].to(dtype)

    def readout(
        self, mixed: Float[Tensor, "B L D 1"], x: Float[Tensor, "B L D"]
    ) -> Float[Tensor, "B L D"]:
        """The mixed values themselves: mixing of channels belongs to the block."""
        return mixed[..., 0].to(x.dtype)

    def _check(self, x: Tensor, state: LTIState | None) -> None:
        self.check_input(x, state)
        if state is not None:
            check_shape("state", state.h, (x.shape[0], self.d_model, self.modes))


def _most_recent_first(
    x: Float64[Tensor, "B L D"], lengths: Int[Tensor, " B"] | None
) -> Float64[Tensor, "B L D"]:
    """Each row's sequence backwards, its padding (zeros) still behind it."""
    if lengths is None:
        return x.flip(1)
    L = x.shape[1]
    steps = torch.arange(L, device=x.device)
    source = (lengths[:, None] - 1 - steps) % L  # beyond the start: into the padding
    return x.gather(1, source[..., None].expand_as(x))
