"""The short causal convolution in PyTorch operations: any device, any dtype.

Channels stay last: W shifted multiply-adds, without the two transposes that a library
convolution would need. The backward pass recomputes what the activation needs.
"""

from typing import Any

import torch
from torch import Tensor


def _correlate(inputs: Tensor, weight: Tensor) -> Tensor:
    """y_t = sum_w weight_w inputs_{t+w}, t = 0 … T - W; not differentiable."""
    steps = inputs.shape[1] - weight.shape[1] + 1
    y = inputs[:, :steps] * weight[:, 0]
    for w in range(1, weight.shape[1]):
        y = torch.addcmul(y, inputs[:, w : w + steps], weight[:, w])
    return y


def _gradients(grad: Tensor, inputs: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of inputs and weight from that of the correlation; differentiable.

    That of the inputs is the correlation of the padded ``grad`` with the reversed taps.
    """
    W, steps = weight.shape[1], grad.shape[1]
    around = grad.new_zeros(grad.shape[0], W - 1, grad.shape[2])
    padded = torch.cat([around, grad, around], 1)
    grad_inputs = _Correlate.apply(padded, weight.conj().flip(1).resolve_conj())
    conjugate = inputs.conj()
    taps = [(grad * conjugate[:, w : w + steps]).sum((0, 1)) for w in range(W)]
    return grad_inputs, torch.stack(taps, 1)


class _Correlate(torch.autograd.Function):
    @staticmethod
    def forward(inputs: Tensor, weight: Tensor) -> Tensor:
        return _correlate(inputs, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return _gradients(grad, *ctx.saved_tensors)


class _CorrelateSilu(torch.autograd.Function):
    @staticmethod
    def forward(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        z = _correlate(inputs, weight) + bias
        return z * torch.sigmoid(z)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inputs, weight, bias = ctx.saved_tensors
        z = _Correlate.apply(inputs, weight) + bias
        s = torch.sigmoid(z)
        grad_z = grad * (s * (1 + z * (1 - s))).conj()
        return *_gradients(grad_z, inputs, weight), grad_z.sum((0, 1))


def causal_conv1d_torch(
    x: Tensor, weight: Tensor, bias: Tensor, initial_state: Tensor, silu: bool
) -> Tensor:
    """The convolution, through silu where asked; differentiable, twice too."""
    inputs = torch.cat([initial_state, x], 1)
    if silu:
        return _CorrelateSilu.apply(inputs, weight, bias)
    return _Correlate.apply(inputs, weight) + bias
