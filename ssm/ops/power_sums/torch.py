"""Sums of powers by two levels of them, z^q and (z^Q)^p: nothing of size L x n is made.

The gradient is such sums again, and no walk back through every power.
"""

from typing import Any

import torch
from jaxtyping import Complex128, Float64
from torch import Tensor
from torch.nn.functional import pad


def chunk_exponent(L: int) -> int:
    """log2 of a chunk length near sqrt(L), which balances the two sides of the work."""
    return (L.bit_length() + 1) // 2


class _PowerSums(torch.autograd.Function):
    """Two levels of powers, z^q and (z^Q)^p; differentiable twice."""

    @staticmethod
    def forward(c: Tensor, z: Tensor, L: int) -> Tensor:
        near, far = _two_levels(z, L)
        scaled = c[..., None] * far
        K = torch.cat([scaled.real, scaled.imag], -2).mT @ near  # (D, far, near)
        return K.flatten(-2)[:, :L]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.L = output.shape[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """conj(z)^j by grad_j for c; by (j + 1) grad_{j+1}, times c, for z."""
        (c, z), L, n = ctx.saved_tensors, ctx.L, ctx.saved_tensors[0].shape[1]
        near, far = _two_levels(z, L)
        Q, P = near.shape[-1], far.shape[-1]
        later = grad * torch.arange(L, dtype=grad.dtype, device=grad.device)
        both = torch.stack([pad(grad, (0, 1)), pad(later, (0, 1)).roll(-1, -1)], 1)
        rows = pad(both[..., :L], (0, P * Q - L)).unflatten(-1, (P, Q)).flatten(1, 2)
        pairs = near @ rows.mT  # (D, 2 n, 2 P): real parts, then imaginary ones
        sums = torch.complex(pairs[:, :n], pairs[:, n:]).unflatten(-1, (2, P))
        found = (sums * far.conj()[:, :, None]).sum(-1)
        return found[..., 0], c.conj() * found[..., 1], None


def _two_levels(
    z: Complex128[Tensor, "D n"], L: int
) -> tuple[Float64[Tensor, "D n2 Q"], Complex128[Tensor, "D n P"]]:
    """(Re, -Im) of z^q for q < Q, and (z^Q)^p for p < P, P Q >= L."""
    k = chunk_exponent(L)
    near, z = _orbit(z, 1 << k)
    far, _ = _orbit(z, -(-L >> k))
    return torch.cat([near.real, -near.imag], -2), far


def _orbit(
    z: Complex128[Tensor, "D n"], length: int
) -> tuple[Complex128[Tensor, "D n k"], Complex128[Tensor, "D n"]]:
    """1, z, z^2, …, and z^m of the first m = 2^i >= length; z may be 0.

    Doubled again and again: cumulative products are one operation, but on a GPU a walk.
    """
    powers = torch.ones_like(z)[..., None]
    while powers.shape[-1] < length:
        powers = torch.cat([powers, powers * z[..., None]], -1)
        z = z * z
    return powers[..., :length], z


def power_sums_torch(c: Tensor, z: Tensor, L: int) -> Tensor:
    """The sums; differentiable twice."""
    K: Tensor = _PowerSums.apply(c, z, L)
    return K
