"""The selective scan compiled by Numba: bias, softplus, scan, skip, gate and padding
in one pass over the inputs. Needs no compiler on the machine.

Saved for the backward pass are the inputs and the state at the start of each chunk.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ssm.ops._library import operator
from ssm.ops._numba import array, start_threads
from ssm.ops.selective_scan import _cpu_kernels as kernels

start_threads()

# A row's channels are cut into parts, each with its own sums for dB and dC, so that a
# backward pass has at least so many tasks. Never by the number of cores: that would
# change the order of the sums.
_TASKS = 16


class _Inputs(NamedTuple):
    """What both kernels take first, in their order; flat, but for B and C."""

    u: np.ndarray
    delta: np.ndarray
    A: np.ndarray  # (N, D), times log2(e)
    B: np.ndarray  # (B, L, G, N), never read where B is constant
    C: np.ndarray
    B_constant: np.ndarray | None  # (N, D)
    C_constant: np.ndarray | None
    D: np.ndarray
    z: np.ndarray  # empty where there is no gate
    delta_bias: np.ndarray
    softplus: bool


def _flat(tensor: Tensor) -> np.ndarray:
    return array(tensor).reshape(-1)


def _inputs(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> _Inputs:
    rows, L, channels = u.shape
    values = _flat(u)
    groups = next((m.shape[2] for m in (B, C) if m.ndim == 4), 1)
    varying = (rows, L, groups, A.shape[1])
    unused = np.zeros(varying if 2 in (B.ndim, C.ndim) else (0,) * 4, values.dtype)
    none = np.zeros(channels, values.dtype)
    return _Inputs(
        u=values,
        delta=_flat(delta),
        A=_flat(A.T * kernels.LOG2E),
        B=unused if B.ndim == 2 else array(B).reshape(varying),
        C=unused if C.ndim == 2 else array(C).reshape(varying),
        B_constant=_flat(B.T) if B.ndim == 2 else None,
        C_constant=_flat(C.T) if C.ndim == 2 else None,
        D=none if D is None else array(D),
        z=none[:0] if z is None else _flat(z),
        delta_bias=none if delta_bias is None else array(delta_bias),
        softplus=delta_softplus,
    )


def _lengths(lengths: Tensor | None, u: Tensor) -> np.ndarray:
    if lengths is None:
        return np.full(u.shape[0], u.shape[1], np.int64)
    return array(lengths.to(torch.int64))


def _chunk(chunk_size: int, u: Tensor) -> int:
    """Buffers need not be longer than the sequences."""
    return max(1, min(chunk_size, u.shape[1]))


@operator("selective_scan_cpu")
def _forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    lengths: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _forward_fake(u, A, chunk_size)
    inputs = _inputs(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    if initial_state is None:
        initial_state = torch.zeros_like(outputs[1])
    kernels.scan(
        *inputs,
        _flat(initial_state),
        _lengths(lengths, u),
        _chunk(chunk_size, u),
        *(_flat(output) for output in outputs),
    )
    return outputs


def _forward_fake(
    u: Tensor, A: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """y, final state and the states at the starts of the chunks (B, K, N, D)."""
    rows, L, channels = u.shape
    N, chunks = A.shape[1], -(-L // chunk_size)
    return (
        u.new_empty(rows, L, channels),
        u.new_empty(rows, channels, N),
        u.new_empty(rows, chunks, N, channels),
    )


@_forward.register_fake
def _(  # type: ignore[no-untyped-def]  # as _forward
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
    delta_softplus,
    initial_state,
    lengths,
    chunk_size,
):
    return _forward_fake(u, A, chunk_size)


@operator("selective_scan_cpu_backward")
def _backward(
    dy: Tensor,
    dfinal: Tensor,
    starts: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    lengths: Tensor | None,
    chunk_size: int,
) -> list[Tensor]:
    inputs = _inputs(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    sums = _Sums.zeros(inputs, constant=(B.ndim == 2, C.ndim == 2))
    du, ddelta, dz = (
        torch.empty(shape, dtype=u.dtype)
        for shape in (u.shape, u.shape, (0,) if z is None else u.shape)
    )
    dh0 = torch.empty(dfinal.shape, dtype=u.dtype)
    kernels.scan_back(
        *inputs,
        _flat(starts),
        _lengths(lengths, u),
        _chunk(chunk_size, u),
        _flat(dy),
        _flat(dfinal),
        _flat(du),
        _flat(ddelta),
        *sums.arrays(),
        _flat(dz),
        _flat(dh0),
    )
    dA, dB, dC, dD, dbias = sums.added()
    dB, dC = dB.reshape(B.shape), dC.reshape(C.shape)
    return [du, ddelta, dA, dB, dC, dD, dz, dbias, dh0]


class _Sums(NamedTuple):
    """Gradients in partial sums: one a row of the batch, for dB and dC one a part."""

    A: np.ndarray  # (B, N, D)
    B: np.ndarray  # (parts, B, L, G, N)
    C: np.ndarray
    B_constant: np.ndarray | None  # (B, N, D)
    C_constant: np.ndarray | None
    D: np.ndarray  # (B, D)
    delta_bias: np.ndarray

    @classmethod
    def zeros(cls, inputs: _Inputs, constant: tuple[bool, bool]) -> "_Sums":
        rows, _, groups, N = inputs.B.shape
        channels = inputs.D.size
        blocks = -(-channels // (groups * kernels.W))
        parts = max(1, min(blocks, -(-_TASKS // max(1, rows * groups))))

        def zeros(*shape: int) -> np.ndarray:
            return np.zeros(shape, inputs.u.dtype)

        return cls(
            zeros(rows, N, channels),
            zeros(parts, *inputs.B.shape),
            zeros(parts, *inputs.B.shape),
            zeros(rows, N, channels) if constant[0] else None,
            zeros(rows, N, channels) if constant[1] else None,
            zeros(rows, channels),
            zeros(rows, channels),
        )

    def arrays(self) -> list[np.ndarray | None]:
        """As the kernel wants them: flat, but for B and C."""
        return [
            sums if sums is None or sums.ndim == 5 else sums.reshape(-1)
            for sums in self
        ]

    def added(self) -> list[Tensor]:
        """The gradients of A, B, C, D and delta_bias."""
        dA, dD, dbias = (part.sum(0) for part in (self.A, self.D, self.delta_bias))
        dB, dC = (
            varying.sum(0) if constant is None else constant.sum(0).T
            for varying, constant in (
                (self.B, self.B_constant),
                (self.C, self.C_constant),
            )
        )
        gradients = (dA.T, dB, dC, dD, dbias)
        return [torch.from_numpy(np.ascontiguousarray(g)) for g in gradients]


@_backward.register_fake
def _(  # type: ignore[no-untyped-def]  # as _backward
    dy,
    dfinal,
    starts,
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
    delta_softplus,
    lengths,
    chunk_size,
):
    channels = u.new_empty(u.shape[2])
    gate = u.new_empty(0) if z is None else u
    like = (u, u, A, B, C, channels, gate, channels, dfinal)
    return [torch.empty(t.shape, dtype=u.dtype, device=u.device) for t in like]


_backward.refuse_backward("selective_scan")


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]  # torch.library's hook
    *tensors, delta_softplus, _, lengths, chunk_size = inputs  # _: initial state
    ctx.save_for_backward(*tensors, lengths, output[2])
    ctx.delta_softplus, ctx.chunk_size = delta_softplus, chunk_size
    ctx.set_materialize_grads(False)  # no zeros for ``starts``, which nobody sees


def _gradients(ctx, dy, dfinal, _):  # type: ignore[no-untyped-def]  # the same
    *tensors, lengths, starts = ctx.saved_tensors
    rows, _, N, channels = starts.shape
    dy = torch.zeros_like(tensors[0]) if dy is None else dy
    dfinal = dy.new_zeros(rows, channels, N) if dfinal is None else dfinal
    gradients = _backward(
        dy, dfinal, starts, *tensors, ctx.delta_softplus, lengths, ctx.chunk_size
    )
    *gradients, dh0 = [
        gradient if needed else None
        for gradient, needed in zip(
            gradients, [*ctx.needs_input_grad[:8], ctx.needs_input_grad[9]], strict=True
        )
    ]
    return *gradients, None, dh0, None, None


_forward.register_autograd(_gradients, setup_context=_save)


def selective_scan_cpu(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    lengths: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """y and the final state of the whole operator; differentiable once.

    u, delta, z (B, L, D); A (D, N); B, C (B, L, [G,] N) or (D, N); D, delta_bias (D,);
    initial state (B, D, N); all of one dtype, float32 or float64.
    """
    y, final, _ = _forward(
        u,
        delta,
        A,
        B,
        C,
        D,
        z,
        delta_bias,
        delta_softplus,
        initial_state,
        lengths,
        chunk_size,
    )
    return y, final
