"""The long convolution by zero-padded FFT, in the dtype of its operands.

On a CPU a short one is a product with the Toeplitz matrix of the kernel: two to four
times as fast up to 64 steps. (On a GPU it is not: 14 ms a training step of S4 on words
of 20 where the transform takes 4.6, since its gradient is scattered.)

The backward pass saves the operands and computes their spectra again. The transforms
of the two operands are products in the frequency domain, and so are the gradients:
with F the transform, F(grad_inputs) = F(grad) conj(F(kernel)) and
F(grad_kernel) = sum over the batch of F(grad) conj(F(inputs)).
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

_SHORT = 64  # steps, those before the first included


def fast_length(n: int) -> int:
    """The smallest 2^i 3^j 5^k >= n: a length at which FFTs are fast."""
    n = int(n)
    best = 1 << max(n - 1, 0).bit_length()
    five = 1
    while five < best:
        three = five
        while three < best:
            rest = -(-n // three)
            best = min(best, three << max(rest - 1, 0).bit_length())
            three *= 3
        five *= 5
    return best


def _transform(x: Tensor, n: int) -> Tensor:
    """The spectrum along the last dimension, padded with zeros to n."""
    if x.is_complex():
        return torch.fft.fft(x, n)
    return torch.fft.rfft(x, n)


def _inverse(spectrum: Tensor, n: int, like: Tensor) -> Tensor:
    if like.is_complex():
        return torch.fft.ifft(spectrum, n)
    return torch.fft.irfft(spectrum, n)


class _Convolve(torch.autograd.Function):
    """y_t = sum_j kernel_j inputs_{S+t-j} over the last dimension, t = 0 … L - 1.

    A circular convolution of n >= L + Lk - 1 steps: what wraps around falls on the
    first S outputs only, and those are dropped.
    """

    @staticmethod
    def forward(inputs: Tensor, kernel: Tensor, L: int, n: int) -> Tensor:
        S = inputs.shape[-1] - L
        spectrum = _transform(inputs, n) * _transform(kernel, n)
        return _inverse(spectrum, n, inputs)[..., S : S + L]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], _output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], inputs[1])
        ctx.n = inputs[3]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, kernel = ctx.saved_tensors
        n, T = ctx.n, inputs.shape[-1]
        padded = pad(grad, (T - grad.shape[-1], 0))
        spectrum = _transform(padded, n)
        grad_inputs = grad_kernel = None
        if ctx.needs_input_grad[0]:
            product = spectrum * _transform(kernel, n).conj()
            grad_inputs = _inverse(product, n, inputs)[..., :T]
        if ctx.needs_input_grad[1]:
            product = (spectrum * _transform(inputs, n).conj()).sum(0)
            grad_kernel = _inverse(product, n, kernel)[..., : kernel.shape[-1]]
        return grad_inputs, grad_kernel, None, None


def fft_conv_torch(u: Tensor, kernel: Tensor, initial_state: Tensor) -> Tensor:
    """The convolution; differentiable, twice too."""
    L, S = u.shape[1], initial_state.shape[1]
    reach = min(kernel.shape[1], S + L)  # later taps meet no input
    if S + L <= _SHORT and u.device.type == "cpu":
        return _product(torch.cat([initial_state, u], 1), kernel[:, :reach], L)
    n = fast_length(max(S + L, L + reach - 1))
    inputs = torch.cat([initial_state, u], 1).transpose(1, 2)
    return _Convolve.apply(inputs, kernel[:, :reach], L, n).transpose(1, 2)


def _product(inputs: Tensor, kernel: Tensor, L: int) -> Tensor:
    """y_t = sum_i M_ti inputs_i, M_ti = kernel_{T-L+t-i}: the last L of T steps."""
    T = inputs.shape[1]
    # kernel_{T-1}, …, kernel_0, 0, …: row t of M begins L - 1 - t entries later
    reversed_kernel = pad(kernel.flip(-1), (T - kernel.shape[1], L - 1))
    M = reversed_kernel.unfold(-1, T, 1).flip(1)
    return torch.einsum("dti,bid->btd", M, inputs)
