"""The long convolution of S4 and Hyena: kernels as long as the sequence."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Inexact, Int
from torch import Tensor

from ssm._errors import (
    bad_argument,
    check_alike,
    check_finite_values,
    check_floating,
    check_shape,
)
from ssm.ops._dispatch import Backend, Request, choose
from ssm.ops._dtypes import compute_dtype
from ssm.ops._gpu import gpu_backend
from ssm.ops._history import last_inputs
from ssm.ops._ragged import (
    check_cu_seqlens,
    check_lengths,
    fill_padding,
    packed_from_padded,
    padded_from_packed,
    valid_steps,
)
from ssm.ops.fft_conv.naive import fft_conv_loop
from ssm.ops.fft_conv.torch import fft_conv_torch

_LONGEST = 128  # taps of the Triton kernel: more are left to the transform


def _triton(*operands: Any) -> Tensor:
    from ssm.ops.fft_conv.triton import fft_conv_triton

    return fft_conv_triton(*operands)


def _refuses_triton(request: Request) -> str | None:
    taps = request.sizes["taps"]
    if taps <= _LONGEST:
        return None
    return f"{taps} taps meet an input, and it is for {_LONGEST} at most"


def _and_skip(convolve: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Backend:
    """``convolve``, and D u added to it."""

    def run(
        u: Tensor, kernel: Tensor, D: Tensor | None, initial_state: Tensor
    ) -> Tensor:
        y = convolve(u, kernel, initial_state)
        return y if D is None else y + D * u

    return Backend(run)


BACKENDS = {
    "triton": gpu_backend("fft_conv", "triton", _triton, refuses=_refuses_triton),
    "torch": _and_skip(fft_conv_torch),
    "naive": _and_skip(fft_conv_loop),
}


def fft_conv(
    u: Inexact[Tensor, "B L D"],
    kernel: Inexact[Tensor, "D Lk"],
    D: Inexact[Tensor, " D"] | None = None,
    *,
    initial_state: Inexact[Tensor, "B S D"] | None = None,
    lengths: Int[Tensor, " B"] | None = None,
    cu_seqlens: Int[Tensor, " S1"] | None = None,
    backend: str = "auto",
    check_domain: bool = False,
) -> tuple[Inexact[Tensor, "B L D"], Inexact[Tensor, "B Lk1 D"]]:
    """y_t = sum_j kernel_j u_{t-j} + D u_t: a causal convolution of any length.

    The kernel may be shorter or longer than the sequence. ``initial_state`` holds the
    S inputs before u, any S: those before them are zero. The final state is the last
    Lk - 1 inputs as they came, in the dtype of ``u`` (or of the initial state, where
    that is wider). Computed in float32 at least, in L log L operations; on a GPU up to
    128 taps by sums of products, which are one kernel, differentiable once. ``lengths``
    marks padding and ``cu_seqlens`` packs sequences into one row: see
    :mod:`ssm.ops._ragged`.

    Raises ArgumentError for wrong shapes, dtypes or devices and, with
    ``check_domain``, for values that are not finite; BackendError where
    ``backend`` cannot run.
    """
    _check(u, kernel, D)
    if check_domain:
        check_finite_values(kernel=kernel, D=D, initial_state=initial_state)
    batch, L, channels = u.shape
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, batch, L)
        y, final = fft_conv(
            padded_from_packed(u, cu_seqlens),
            kernel,
            D,
            initial_state=initial_state,
            lengths=cu_seqlens.diff(),
            backend=backend,
            check_domain=check_domain,
        )
        return packed_from_padded(y, cu_seqlens), final
    if initial_state is None:
        initial_state = u.new_zeros(batch, 0, channels)
    check_floating(initial_state=initial_state)
    check_alike(u, initial_state=initial_state)
    check_shape("initial_state", initial_state, (batch, None, channels))
    if lengths is not None:
        check_lengths(lengths, batch, L)
        valid = valid_steps(lengths, L)
        u = fill_padding(u, valid, 0.0)
    if check_domain:
        check_finite_values(u=u)
    y = _run(u, kernel, D, initial_state, backend)
    if lengths is not None:
        y = fill_padding(y, valid, 0.0)
    return y, last_inputs(u, initial_state, kernel.shape[1] - 1, lengths)


def _run(
    u: Tensor, kernel: Tensor, D: Tensor | None, initial_state: Tensor, backend: str
) -> Tensor:
    dtype = compute_dtype(u, kernel, D, initial_state)
    # Inputs further back than the kernel reaches meet no output.
    far = max(initial_state.shape[1] - kernel.shape[1] + 1, 0)
    initial_state = initial_state[:, far:]
    taps = min(kernel.shape[1], initial_state.shape[1] + u.shape[1])
    request = Request(u.device, dtype, sizes={"taps": taps})
    run = choose("fft_conv", backend, BACKENDS, request).run
    out = dtype if dtype.is_complex else u.dtype
    if u.shape[1] == 0:
        return u.to(out)
    wide = [x if x is None else x.to(dtype) for x in (u, kernel, D, initial_state)]
    return run(*wide).to(out)


def _check(u: Tensor, kernel: Tensor, D: Tensor | None) -> None:
    check_floating(u=u, kernel=kernel, D=D)
    check_alike(u, kernel=kernel, D=D)
    check_shape("u", u, (None, None, None))
    check_shape("kernel", kernel, (u.shape[-1], None))
    if kernel.shape[1] == 0:
        raise bad_argument("kernel", "0 taps", "(D, Lk), Lk >= 1", "give it a tap")
    if D is not None:
        check_shape("D", D, (u.shape[-1],))
