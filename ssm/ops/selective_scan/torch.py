"""The selective scan in PyTorch operations: any device, any dtype, no compiler.

A chunk of Q steps at a time: the (B, Q, D, N) decays and inputs of one chunk exist at
once, in the forward and in the backward pass, which recomputes them from the state at
the chunk's start. Between the passes only those states are kept.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus
from torch.utils.checkpoint import checkpoint

from ssm.ops._ragged import fill_padding, valid_steps


def selective_scan_torch(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor,
    lengths: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """y in the dtype of u and the last state; computes in the dtype of A and state.

    B, C are (B, L, G, N) or (D, N). Differentiable, twice too.
    """
    valid = None if lengths is None else valid_steps(lengths, u.shape[1])
    in_time = (u, delta, z, valid, *(None if X.ndim == 2 else X for X in (B, C)))
    chunks = [
        [None] * -(-u.shape[1] // chunk_size) if x is None else x.split(chunk_size, 1)
        for x in in_time
    ]
    h, outputs = initial_state, []
    for u_c, delta_c, z_c, valid_c, B_c, C_c in zip(*chunks, strict=True):
        y, h = checkpoint(
            _chunk,
            h,
            (u_c, delta_c, z_c, valid_c),
            (A, B if B_c is None else B_c, C if C_c is None else C_c, D),
            delta_bias,
            delta_softplus,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        outputs.append(y)
    return torch.cat(outputs, 1), h


def _chunk(
    h: Tensor,
    in_time: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    system: tuple[Tensor, Tensor, Tensor, Tensor | None],
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """One chunk, from the state ``h`` before it to the state at its end."""
    u, delta, z, valid = in_time
    A, B, C, D = system
    dtype = u.dtype
    real = real_dtype(A.dtype)
    u, delta = u.to(real), delta.to(real)
    B, C = B.to(A.dtype), C.to(A.dtype)
    z = None if z is None else z.to(real)
    if valid is not None:
        u, delta = fill_padding(u, valid, 0.0), fill_padding(delta, valid, 0.0)
        B, C = (X if X.ndim == 2 else fill_padding(X, valid, 0.0) for X in (B, C))
        z = None if z is None else fill_padding(z, valid, 0.0)
    delta = step_size(delta, delta_bias, delta_softplus)
    if valid is not None:  # again: the softplus of a bias is not zero
        delta = fill_padding(delta, valid, 0.0)
    states = _Loop.apply(*decays_and_inputs(u, delta, A, B), h, False)
    y = gate(read_out(states, C), u, D, z)
    y = y if valid is None else fill_padding(y, valid, 0.0)
    return y.to(dtype), states[:, -1].clone()  # a view would keep all states


class _Loop(torch.autograd.Function):
    """h_t = a_t h_{t-1} + b_t step by step (or from the last step to the first).

    One operation a step, in place: in a chunk of 64 steps fewer than those of a
    parallel scan, and no copies. The gradient is the loop the other way, so it has one
    itself; nothing is divided by a, so any decay is legal.
    """

    @staticmethod
    def forward(a: Tensor, b: Tensor, h: Tensor, reverse: bool) -> Tensor:
        states = b.clone(memory_format=torch.contiguous_format)
        steps = range(b.shape[1])
        for t in reversed(steps) if reverse else steps:
            h = states[:, t].addcmul_(a[:, t], h)
        return states

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        a, _, h, ctx.reverse = inputs
        ctx.save_for_backward(a, h, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        a, h, states = ctx.saved_tensors
        zero = torch.zeros_like(h)
        following = _shifted(a.conj(), zero, not ctx.reverse)
        g = _Loop.apply(following, grad, zero, not ctx.reverse)
        previous = _shifted(states, h, ctx.reverse).conj()
        first = -1 if ctx.reverse else 0
        return g * previous, g, a[:, first].conj() * g[:, first], None


def _shifted(x: Tensor, edge: Tensor, earlier: bool) -> Tensor:
    """x one step later in time (or earlier), with ``edge`` moved in."""
    parts = [x[:, 1:], edge[:, None]] if earlier else [edge[:, None], x[:, :-1]]
    return torch.cat(parts, 1)


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """The real dtype of the same precision (``dtype.to_real`` does not compile)."""
    real = {torch.complex64: torch.float32, torch.complex128: torch.float64}
    return real.get(dtype, dtype)


def step_size(delta: Tensor, delta_bias: Tensor | None, delta_softplus: bool) -> Tensor:
    """The discretisation step: delta + bias, through softplus (linear above 20)."""
    delta = delta if delta_bias is None else delta + delta_bias.to(delta.dtype)
    return softplus(delta) if delta_softplus else delta


def decays_and_inputs(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor
) -> tuple[Tensor, Tensor]:
    """exp(delta A) and delta B u, both (…, D, N); u, delta (…, D)."""
    inputs = (delta * u)[..., None] * _per_channel(B, A.shape[0])
    delta = delta[..., None]
    if not A.is_complex():
        return torch.exp(delta * A), inputs
    # Ten times as fast as the exponential of a complex tensor on a CPU.
    size, angle = torch.exp(delta * A.real), delta * A.imag
    return torch.complex(size * angle.cos(), size * angle.sin()), inputs


def read_out(h: Tensor, C: Tensor) -> Tensor:
    """C h, or 2 Re(C h) where complex: a state stands for itself and its conjugate."""
    D = h.shape[-2]
    if C.ndim == 2:
        y = (h * C).sum(-1)
    else:
        G = C.shape[-2]
        grouped = h.unflatten(-2, (G, D // G))
        y = (grouped @ C[..., None])[..., 0].flatten(-2)
    return 2.0 * y.real if y.is_complex() else y


def gate(y: Tensor, u: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """(y + D u) silu(z), where D and z are given."""
    y = y if D is None else y + D.to(u.dtype) * u
    return y if z is None else y * silu(z)


def _per_channel(B: Tensor, channels: int) -> Tensor:
    """(…, G, N) or (D, N) so that it multiplies (…, D, N)."""
    G = B.shape[-2]
    return B if G in (1, channels) else B.repeat_interleave(channels // G, -2)
