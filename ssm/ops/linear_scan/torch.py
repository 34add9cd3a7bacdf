"""The linear scan in PyTorch operations: any device, any dtype, no compiler.

The sequence is cut into chunks of Q steps. All chunks are scanned side by side from a
zero state (Q operations on tensors of L/Q chunks), the states at their ends by the same
scan one level up, and each chunk then adds what it inherits. O(L) work in
2 Q log(L) / log(Q) operations; no logarithm or division, so any decay is legal.
"""

from typing import Any

import torch
from torch import Tensor

from ssm.ops._adjoint import adjoint_scan

_Q = 32


def scan(a: Tensor, b: Tensor, initial_state: Tensor) -> Tensor:
    """Every state of h_t = a_t h_{t-1} + b_t, shape (B, L, …); not differentiable."""
    L = b.shape[1]
    if L <= _Q:
        return _loop(a, b, initial_state, dim=1)[0]
    chunks = -(-L // _Q)
    padding = chunks * _Q - L
    a_chunks = _pad(a, padding).unflatten(1, (chunks, _Q))
    b_chunks = _pad(b, padding).unflatten(1, (chunks, _Q))
    zero = torch.zeros_like(b_chunks[:, :, 0])
    states, decays = _loop(a_chunks, b_chunks, zero, dim=2)
    ends = scan(decays[:, :, -1], states[:, :, -1], initial_state)
    inherited = torch.cat([initial_state[:, None], ends[:, :-1]], 1)
    return (states + decays * inherited[:, :, None]).flatten(1, 2)[:, :L]


def _loop(a: Tensor, b: Tensor, h: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The states of a loop along ``dim`` and the running products of the decays."""
    states, decays = [], []
    decay = torch.ones_like(h)
    for a_t, b_t in zip(a.unbind(dim), b.unbind(dim), strict=True):
        h, decay = a_t * h + b_t, a_t * decay
        states.append(h)
        decays.append(decay)
    return torch.stack(states, dim), torch.stack(decays, dim)


def _pad(x: Tensor, steps: int) -> Tensor:
    if not steps:
        return x
    return torch.cat([x, x.new_zeros(x.shape[0], steps, *x.shape[2:])], 1)


class _LinearScan(torch.autograd.Function):
    @staticmethod
    def forward(a: Tensor, b: Tensor, initial_state: Tensor) -> Tensor:
        return scan(a, b, initial_state)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        a, _, initial_state = inputs
        ctx.save_for_backward(a, initial_state, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, initial_state, states = ctx.saved_tensors
        return adjoint_scan(_LinearScan.apply, a, initial_state, states, grad)


def linear_scan_torch(a: Tensor, b: Tensor, initial_state: Tensor) -> Tensor:
    """Every state of the scan; differentiable, twice too. Saves a and the states."""
    return _LinearScan.apply(a, b, initial_state)
