"""The short causal depthwise convolution of Mamba, RWKV and Hyena, any width."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Inexact, Int
from torch import Tensor

from ssm._errors import (
    bad_argument,
    check_alike,
    check_finite_values,
    check_floating,
    check_shape,
)
from ssm.ops._dispatch import Backend, Choice, Request, find, remembered
from ssm.ops._dtypes import compute_dtype
from ssm.ops._gpu import gpu_backend
from ssm.ops._history import last_inputs
from ssm.ops._numba import refuses_real
from ssm.ops._ragged import (
    check_cu_seqlens,
    check_lengths,
    fill_padding,
    packed_from_padded,
    padded_from_packed,
    valid_steps,
)
from ssm.ops.causal_conv1d.naive import causal_conv1d_loop
from ssm.ops.causal_conv1d.torch import causal_conv1d_torch

Activation = Literal["silu"] | None


def _cpu(*operands: Any) -> Tensor:
    from ssm.ops.causal_conv1d.cpu import causal_conv1d_cpu  # compiles where it runs

    return causal_conv1d_cpu(*operands)


def _cuda(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    _: None,  # the state that it refuses
    silu: bool,
) -> tuple[Tensor, Tensor]:
    from ssm.ops.causal_conv1d.cuda import causal_conv1d_cuda

    return causal_conv1d_cuda(x, weight, bias, silu)


def _refuses_cuda(request: Request) -> str | None:
    sizes = request.sizes
    if sizes.get("W", _FEW[0]) not in _FEW:
        return f"it takes {_FEW[0]} to {_FEW[-1]} taps, not {sizes['W']}"
    if sizes.get("D", 0) % _TOGETHER:
        return f"it takes channels in eights, not {sizes['D']}"
    if sizes.get("state", 0):
        return "it starts from zeros, not from a state"
    return None


def _triton(*operands: Any) -> tuple[Tensor, Tensor]:
    from ssm.ops.causal_conv1d.triton import causal_conv1d_triton

    return causal_conv1d_triton(*operands)


def _refuses_triton(request: Request) -> str | None:
    W = request.sizes.get("W", 1)
    if W <= _WIDEST:
        return None
    return f"it holds at most {_WIDEST} taps in registers, not {W}"


def _widened(convolve: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """``convolve`` on operands that are all there, in the precision of computation."""

    def run(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        initial_state: Tensor | None,
        silu: bool,
    ) -> tuple[Tensor, Tensor]:
        dtype = compute_dtype(x, weight, bias, initial_state)
        state = _state(x, weight, initial_state)
        if bias is None:
            bias = weight.new_zeros(weight.shape[0])
        operands = [tensor.to(dtype) for tensor in (x, weight, bias, state)]
        y = convolve(*operands, silu).to(_output_dtype(x, dtype))
        return y, last_inputs(x, state, state.shape[1])

    return run


_FEW = range(2, 5)  # taps that the CUDA kernels unroll
_TOGETHER = 8  # channels that an asynchronous copy of 16 bytes takes, in 16 bits
_WIDEST = 16  # taps that still fit into registers, with everything else

BACKENDS = {
    "cuda": gpu_backend("causal_conv1d", "cuda", _cuda, refuses=_refuses_cuda),
    "cpu": Backend(_widened(_cpu), refuses_real),
    "triton": gpu_backend("causal_conv1d", "triton", _triton, refuses=_refuses_triton),
    "torch": Backend(_widened(causal_conv1d_torch)),
    "naive": Backend(_widened(causal_conv1d_loop)),
}


def causal_conv1d(
    x: Inexact[Tensor, "B L D"],
    weight: Inexact[Tensor, "D W"],
    bias: Inexact[Tensor, " D"] | None = None,
    *,
    activation: Activation = None,
    initial_state: Inexact[Tensor, "B W1 D"] | None = None,
    lengths: Int[Tensor, " B"] | None = None,
    cu_seqlens: Int[Tensor, " S1"] | None = None,
    backend: str = "auto",
    check_domain: bool = False,
) -> tuple[Inexact[Tensor, "B L D"], Inexact[Tensor, "B W1 D"]]:
    """y_t = activation(bias + sum_w weight_w x_{t-W+1+w}), each channel by itself.

    The last tap meets the present input, as in ``torch.nn.Conv1d``. The state is the
    last W - 1 inputs, zeros before the first one; it holds inputs as they came, in the
    dtype of ``x`` (or of the initial state, where that is wider). Sums are formed in
    float32 at least. ``lengths`` marks padding and ``cu_seqlens`` packs sequences into
    one row: see :mod:`ssm.ops._ragged`.

    Raises ArgumentError for wrong shapes, dtypes or devices and, with
    ``check_domain``, for values that are not finite; BackendError where
    ``backend`` cannot run.
    """
    if check_domain or cu_seqlens is not None or lengths is not None:
        _check(x, weight, bias, activation)
        batch, L, _ = x.shape
    if check_domain:
        check_finite_values(weight=weight, bias=bias, initial_state=initial_state)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, batch, L)
        y, final = causal_conv1d(
            padded_from_packed(x, cu_seqlens),
            weight,
            bias,
            activation=activation,
            initial_state=initial_state,
            lengths=cu_seqlens.diff(),
            backend=backend,
            check_domain=check_domain,
        )
        return packed_from_padded(y, cu_seqlens), final
    if lengths is not None:
        check_lengths(lengths, batch, L)
        valid = valid_steps(lengths, L)
        x = fill_padding(x, valid, 0.0)
    if check_domain:
        check_finite_values(x=x)
    y, final = _run(x, weight, bias, initial_state, activation, backend)
    if lengths is not None:
        y = fill_padding(y, valid, 0.0)
        state = _state(x, weight, initial_state)
        final = last_inputs(x, state, state.shape[1], lengths)
    return y, final


def causal_conv1d_step(
    x_t: Inexact[Tensor, "B D"],
    weight: Inexact[Tensor, "D W"],
    bias: Inexact[Tensor, " D"] | None,
    state: Inexact[Tensor, "B W1 D"],
    activation: Activation = None,
) -> tuple[Inexact[Tensor, "B D"], Inexact[Tensor, "B W1 D"]]:
    """One step of :func:`causal_conv1d`: the output and the new state, both fresh."""
    if x_t.ndim != 2:
        raise bad_argument("x_t", f"shape {tuple(x_t.shape)}", "(B, D)", "reshape it")
    _check(x_t[:, None], weight, bias, activation)
    check_floating(state=state)
    check_alike(x_t, state=state)
    check_shape("state", state, (len(x_t), weight.shape[1] - 1, x_t.shape[1]))
    if x_t.device.type == "cuda":  # where one kernel is faster than six
        y, state = _run(x_t[:, None], weight, bias, state, activation, "auto")
        return y[:, 0], state
    window = torch.cat([state, x_t[:, None]], 1)
    dtype = compute_dtype(x_t, weight, bias, state)
    y = (window.to(dtype) * weight.to(dtype).T).sum(1)
    if bias is not None:
        y = y + bias.to(dtype)
    if activation == "silu":
        y = y * torch.sigmoid(y)
    return y.to(_output_dtype(x_t, dtype)), window[:, 1:]


def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    activation: Activation,
    backend: str,
) -> tuple[Tensor, Tensor]:
    choice = _settle(x, weight, bias, initial_state, activation, backend)
    run, dtype = choice.taken().run, choice.dtype
    if x.shape[1] == 0:
        state = _state(x, weight, initial_state)
        return x.to(_output_dtype(x, dtype)), last_inputs(x, state, state.shape[1])
    return run(x, weight, bias, initial_state, activation == "silu")


@remembered
def _settle(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    activation: Activation,
    backend: str,
) -> Choice:
    """The operands checked, and what serves them."""
    _check(x, weight, bias, activation)
    if initial_state is not None:
        check_floating(initial_state=initial_state)
        check_alike(x, initial_state=initial_state)
        shape = (len(x), weight.shape[1] - 1, x.shape[2])
        check_shape("initial_state", initial_state, shape)
    dtype = compute_dtype(x, weight, bias, initial_state)
    D, W = weight.shape
    sizes = {"W": W, "D": D, "state": int(initial_state is not None)}
    request = Request(x.device, dtype, sizes=sizes)
    return find("causal_conv1d", backend, BACKENDS, request)


def _state(x: Tensor, weight: Tensor, initial_state: Tensor | None) -> Tensor:
    if initial_state is not None:
        return initial_state
    return x.new_zeros(x.shape[0], weight.shape[1] - 1, x.shape[2])


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation
) -> None:
    if activation not in (None, "silu"):
        raise bad_argument(
            "activation", repr(activation), "None or 'silu'", "choose one of those"
        )
    check_floating(x=x, weight=weight, bias=bias)
    check_alike(x, weight=weight, bias=bias)
    check_shape("x", x, (None, None, None))
    check_shape("weight", weight, (x.shape[-1], None))
    if weight.shape[1] == 0:
        raise bad_argument("weight", "0 taps", "(D, W), W >= 1", "give it a tap")
    if bias is not None:
        check_shape("bias", bias, (x.shape[-1],))


def _output_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.is_complex else x.dtype
