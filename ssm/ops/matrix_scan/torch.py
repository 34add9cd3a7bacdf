"""The matrix scan in PyTorch operations: any device, any dtype, no compiler.

Three ways through the sequence, all exact for any A (nothing is inverted):

* constant A: chunks of Q steps side by side, and the powers A, …, A^Q, once for all
  chunks, carry what each inherits: O(L K^2) work in 2 Q log(L) / log(Q) operations;
* small blocks: the same with the running products of each chunk, O(L K^3) work;
* large blocks: a loop over time, O(L K^2) work in L operations.

One operator, opaque to ``torch.compile``, so that no graph holds the loops.
"""

from typing import Any

import torch
from torch import Tensor

from ssm.ops._library import operator

_Q = 32
# Multiply-adds of one step's products (over batch and blocks) below which they cost
# less than the step's share of overhead, so that chunks win over the loop.
_SMALL = 1 << 12


def _loop(A: Tensor, b: Tensor, h: Tensor) -> Tensor:
    """The states step by step; time first: A (L, M, K, K), b (L, M, K, n)."""
    states = torch.empty_like(b)
    for A_t, b_t, out in zip(A, b, states, strict=True):
        h = torch.baddbmm(b_t, A_t, h, out=out)
    return states


def _scan_loop(A: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    batch, L, H, K = b.shape
    A_steps = A.transpose(0, 1).reshape(L, batch * H, K, K)
    b_steps = b.transpose(0, 1).reshape(L, batch * H, K, 1)
    states = _loop(A_steps, b_steps, h0.reshape(batch * H, K, 1))
    return states.reshape(L, batch, H, K).transpose(0, 1)


def _scan_chunks(A: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    batch, L, H, K = b.shape
    if L <= _Q:
        return _scan_loop(A, b, h0)
    n = -(-L // _Q)
    A_chunks, b_chunks = (_chunked(x, n).movedim(2, 0) for x in (A, b))
    # [A_t … A_1 | h_t] of each chunk: one product a step gives both.
    both = torch.cat([torch.zeros_like(A_chunks), b_chunks[..., None]], -1)
    start = torch.eye(K, K + 1, dtype=b.dtype, device=b.device)
    shape = (_Q, batch * n * H, K)
    local = _loop(
        A_chunks.reshape(*shape, K),
        both.reshape(*shape, K + 1),
        start.expand(shape[1], K, K + 1),
    ).reshape(_Q, batch, n, H, K, K + 1)
    products, states = local[..., :K], local[..., K]
    ends = _scan_chunks(products[-1], states[-1], h0)
    inherited = torch.cat([h0[:, None], ends[:, :-1]], 1)
    states = states + (products @ inherited[..., None])[..., 0]
    return states.movedim(0, 2).flatten(1, 2)[:, :L]


def _scan_constant(A: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    batch, L, H, K = b.shape
    n = -(-L // _Q)
    # (Q, H, B n, K): states are rows, so that a step is one product for each block.
    chunks = _chunked(b, n).permute(2, 3, 0, 1, 4).reshape(-1, H, batch * n, K)
    transposed = A.mT.expand(len(chunks), H, K, K)
    start = torch.zeros_like(chunks[0]) if n > 1 else h0.transpose(0, 1)
    states = torch.empty_like(chunks)
    for A_t, b_t, out in zip(transposed, chunks, states, strict=True):
        start = torch.baddbmm(b_t, start, A_t, out=out)
    if n > 1:
        zeros = torch.zeros_like(transposed)
        powers = _loop(transposed, zeros, torch.eye(K).to(A).expand(H, K, K))
        last = states[-1].reshape(H, batch, n, K).permute(1, 2, 0, 3)
        ends = _scan_constant(powers[-1].mT, last, h0)
        inherited = torch.cat([h0[:, None], ends[:, :-1]], 1)
        rows = inherited.permute(2, 0, 1, 3).reshape(H, batch * n, K)
        states += rows @ powers
    states = states.reshape(-1, H, batch, n, K).permute(2, 3, 0, 1, 4)
    return states.flatten(1, 2)[:, :L]


def _chunked(x: Tensor, n: int) -> Tensor:
    """(B, L, …) as (B, n, Q, …), with zeros behind the end; (B, 1, L, …) if n is 1."""
    if n == 1:
        return x[:, None]
    zeros = x.new_zeros(x.shape[0], n * _Q - x.shape[1], *x.shape[2:])
    return torch.cat([x, zeros], 1).unflatten(1, (n, _Q))


@operator("matrix_scan", device="CompositeExplicitAutograd")
def _scan(A: Tensor, b: Tensor, initial_state: Tensor) -> Tensor:
    batch, _, H, K = b.shape
    if A.ndim == 3:
        states = _scan_constant(A, b, initial_state)
    elif batch * H * K**3 <= _SMALL:
        states = _scan_chunks(A, b, initial_state)
    else:
        states = _scan_loop(A, b, initial_state)
    return states.contiguous()


@_scan.register_fake
def _(A: Tensor, b: Tensor, initial_state: Tensor) -> Tensor:  # noqa: ARG001
    return torch.empty_like(b, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    A, _, initial_state = inputs
    ctx.save_for_backward(A, initial_state, output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """With g_t the gradient that reaches h_t from all later times:

    g_t = grad_t + A_{t+1}^H g_{t+1},  dL/dA_t = g_t h_{t-1}^H,  dL/dh_0 = A_1^H g_1.
    """
    A, initial_state, states = ctx.saved_tensors
    adjoint, first = A.mH, A.mH
    if A.ndim > 3:
        following = torch.cat([adjoint[:, 1:], torch.zeros_like(adjoint[:, :1])], 1)
        adjoint, first = following.flip(1), adjoint[:, 0]
    zero = torch.zeros_like(initial_state)
    g = _scan(adjoint.resolve_conj(), grad.flip(1), zero).flip(1)
    previous = torch.cat([initial_state[:, None], states[:, :-1]], 1).conj()
    if A.ndim > 3:
        grad_A = g[..., :, None] * previous[..., None, :]
    else:
        grad_A = torch.einsum("blhi,blhj->hij", g, previous)
    return grad_A, g, (first @ g[:, 0, ..., None])[..., 0]


_scan.register_autograd(_backward, setup_context=_save)


def matrix_scan_torch(A: Tensor, b: Tensor, initial_state: Tensor) -> Tensor:
    """Every state of the scan; differentiable, twice too. Saves A and the states."""
    return _scan(A, b, initial_state)
