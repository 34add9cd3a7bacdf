"""Sums of powers on the GPU: one kernel forward, one back, in double precision.

PyTorch's operations on small complex matrices are some forty kernels, each as long as
its start. Here a program has a tile of steps and pairs, and forms every power of the
tile by squaring, log2(L) products: no step waits for the one before it. The backward
pass gathers both gradients from the same powers.
"""

# Kernels are Triton's language, which its own compiler checks.
# mypy: disable-error-code="no-untyped-def, assignment, unreachable"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm.ops._gpu import cdiv, on_device_of, power_of_2
from ssm.ops._library import operator

_TILE = 1024  # powers that a program has in registers


@triton.jit
def _times(ar, ai, br, bi):
    return ar * br - ai * bi, ar * bi + ai * br


@triton.jit
def _complex(base, d, n, N):
    """Row d of an array (D, n) of complex numbers."""
    place = base + 2 * (d * N + n)
    real = tl.load(place, mask=n < N, other=0.0)
    return real, tl.load(place + 1, mask=n < N, other=0.0)


@triton.jit
def _powers(zr, zi, j, BJ: tl.constexpr, BN: tl.constexpr, BITS: tl.constexpr):
    """z^j for a tile of steps j and numbers z; 0^0 is 1."""
    pr = tl.full((BJ, BN), 1.0, tl.float64)
    pi = tl.full((BJ, BN), 0.0, tl.float64)
    for bit in tl.static_range(BITS):
        qr, qi = _times(pr, pi, zr[None, :], zi[None, :])
        has = (((j >> bit) & 1) == 1)[:, None]
        pr, pi = tl.where(has, qr, pr), tl.where(has, qi, pi)
        zr, zi = _times(zr, zi, zr, zi)
    return pr, pi


@triton.jit
def _sums(
    c, z, K, N, L,
    BJ: tl.constexpr, BN: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(L, BJ)
    d = (tl.program_id(0) // tiles).to(tl.int64)
    j = tl.program_id(0) % tiles * BJ + tl.arange(0, BJ)
    n = tl.arange(0, BN)
    cr, ci = _complex(c, d, n, N)
    zr, zi = _complex(z, d, n, N)
    pr, pi = _powers(zr, zi, j, BJ, BN, BITS)
    total = tl.sum(cr[None, :] * pr - ci[None, :] * pi, 1)
    tl.store(K + d * L + j, total, mask=j < L)


@triton.jit
def _sums_back(
    grad, c, z, dc, dz, N, L,
    BJ: tl.constexpr, BN: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    # dc_n = sum_j g_j conj(z^j), dz_n = conj(c_n) sum_j (j + 1) g_{j+1} conj(z^j)
    blocks = tl.cdiv(N, BN)
    d = (tl.program_id(0) // blocks).to(tl.int64)
    n = tl.program_id(0) % blocks * BN + tl.arange(0, BN)
    cr, ci = _complex(c, d, n, N)
    zr, zi = _complex(z, d, n, N)
    ar = tl.zeros((BJ, BN), tl.float64)
    ai = tl.zeros((BJ, BN), tl.float64)
    br = tl.zeros((BJ, BN), tl.float64)
    bi = tl.zeros((BJ, BN), tl.float64)
    for first in range(0, L, BJ):
        j = first + tl.arange(0, BJ)
        pr, pi = _powers(zr, zi, j, BJ, BN, BITS)
        here = tl.load(grad + d * L + j, mask=j < L, other=0.0)
        later = tl.load(grad + d * L + j + 1, mask=j + 1 < L, other=0.0)
        later *= (j + 1).to(tl.float64)
        ar += here[:, None] * pr
        ai -= here[:, None] * pi
        br += later[:, None] * pr
        bi -= later[:, None] * pi
    place = 2 * (d * N + n)
    tl.store(dc + place, tl.sum(ar, 0), mask=n < N)
    tl.store(dc + place + 1, tl.sum(ai, 0), mask=n < N)
    sr, si = _times(cr, -ci, tl.sum(br, 0), tl.sum(bi, 0))
    tl.store(dz + place, sr, mask=n < N)
    tl.store(dz + place + 1, si, mask=n < N)


def _pairs(x: Tensor) -> Tensor:
    """(D, n) complex numbers as (D, n, 2) real ones, side by side."""
    return torch.view_as_real(x.resolve_conj()).contiguous()


@operator("power_sums_triton", device="CompositeExplicitAutograd")
def _power_sums(c: Tensor, z: Tensor, L: int) -> Tensor:
    D, N = c.shape
    K = c.new_empty(D, L, dtype=torch.float64)
    if c.numel() == 0:
        return K.zero_()
    BN = power_of_2(N)
    BJ = min(max(1, _TILE // BN), power_of_2(L))
    with on_device_of(c):
        _sums[(D * cdiv(L, BJ),)](
            _pairs(c), _pairs(z), K, N, L, BJ=BJ, BN=BN, BITS=(L - 1).bit_length()
        )
    return K


@_power_sums.register_fake
def _(c: Tensor, z: Tensor, L: int) -> Tensor:
    return c.new_empty(c.shape[0], L, dtype=torch.float64)


@operator("power_sums_triton_backward", device="CompositeExplicitAutograd")
def _power_sums_backward(grad: Tensor, c: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    dc, dz = c.new_empty(c.shape), c.new_empty(c.shape)
    (D, N), L = c.shape, grad.shape[1]
    if c.numel():
        BN = min(32, power_of_2(N))
        BJ = min(_TILE // 2 // BN, power_of_2(L))
        with on_device_of(c):
            _sums_back[(D * cdiv(N, BN),)](
                grad.contiguous(), _pairs(c), _pairs(z),
                torch.view_as_real(dc), torch.view_as_real(dz), N, L,
                BJ=BJ, BN=BN, BITS=(L - 1).bit_length(),
            )  # fmt: skip
    return dc, dz


@_power_sums_backward.register_fake
def _(grad: Tensor, c: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    return c.new_empty(c.shape), c.new_empty(c.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], _: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_power_sums_backward(grad, *ctx.saved_tensors), None


_power_sums.register_autograd(_differentiate, setup_context=_save)
_power_sums_backward.refuse_backward("power_sums", "triton")


def power_sums_triton(c: Tensor, z: Tensor, L: int) -> Tensor:
    """The sums; differentiable once."""
    return _power_sums(c, z, L)
