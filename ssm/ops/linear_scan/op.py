"""The linear scan h_t = a_t * h_{t-1} + b_t: the heart of every diagonal SSM."""

from collections.abc import Callable

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
from ssm.ops._dispatch import Backend, Request, choose
from ssm.ops._dtypes import compute_dtype
from ssm.ops._gpu import gpu_backend
from ssm.ops._numba import refuses as refuses_numba
from ssm.ops._ragged import (
    check_cu_seqlens,
    check_lengths,
    fill_padding,
    packed_from_padded,
    padded_from_packed,
    valid_steps,
)
from ssm.ops.linear_scan.naive import linear_scan_loop
from ssm.ops.linear_scan.torch import linear_scan_torch


def _cpu(a: Tensor, b: Tensor, initial_state: Tensor) -> Tensor:
    from ssm.ops.linear_scan.cpu import linear_scan_cpu  # compiles only where it runs

    return linear_scan_cpu(a, b, initial_state)


def _triton(
    decays: Tensor, b: Tensor, initial_state: Tensor, log: bool
) -> tuple[Tensor, Tensor]:
    from ssm.ops.linear_scan.triton import linear_scan_triton

    return linear_scan_triton(decays, b, initial_state, log)


def _widened(
    scan: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Callable[..., tuple[Tensor, Tensor]]:
    """``scan``, all states of decays a, in the precision of the state."""

    def run(
        decays: Tensor, b: Tensor, initial_state: Tensor, log: bool
    ) -> tuple[Tensor, Tensor]:
        dtype = initial_state.dtype
        # Logarithms widen first: in bfloat16, exp(-0.001) would be 1.
        decays = decays.to(dtype).exp() if log else decays.to(dtype)
        h = scan(decays, b.to(dtype), initial_state)
        # A copy: the last state does not keep all of h alive.
        return h.to(dtype if dtype.is_complex else b.dtype), h[:, -1].clone()

    return run


BACKENDS = {
    "cpu": Backend(_widened(_cpu), refuses_numba),
    "triton": gpu_backend("linear_scan", "triton", _triton),
    "torch": Backend(_widened(linear_scan_torch)),
    "naive": Backend(_widened(linear_scan_loop)),
}


def linear_scan(
    a: Inexact[Tensor, "B L *C"] | None,
    b: Inexact[Tensor, "B L *C"],
    *,
    log_a: Inexact[Tensor, "B L *C"] | None = None,
    initial_state: Inexact[Tensor, "B *C"] | None = None,
    lengths: Int[Tensor, " B"] | None = None,
    cu_seqlens: Int[Tensor, " S1"] | None = None,
    backend: str = "auto",
    check_domain: bool = False,
) -> tuple[Inexact[Tensor, "B L *C"], Inexact[Tensor, "B *C"]]:
    """h_t = a_t * h_{t-1} + b_t, elementwise over the channels; all h_t and the last.

    Decays enter as ``a`` (any real or complex numbers: 0, 1, negatives) or as
    ``log_a``, one of the two. Both outputs are differentiable in a, b and the initial
    state. ``lengths`` marks padding and ``cu_seqlens`` packs sequences into one row
    (then states have one row a sequence): see :mod:`ssm.ops._ragged`. The state is
    float32 at least; h has the dtype of ``b`` (complex where a is).

    Raises ArgumentError for wrong shapes, dtypes or devices and, with
    ``check_domain``, for values that are not finite; BackendError where
    ``backend`` cannot run.
    """
    name, decays = _one_of(a, log_a)
    _check(name, decays, b)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, *b.shape[:2])
        padded = {"a": None, name: padded_from_packed(decays, cu_seqlens)}
        h, final = linear_scan(
            b=padded_from_packed(b, cu_seqlens),
            initial_state=initial_state,
            lengths=cu_seqlens.diff(),
            backend=backend,
            check_domain=check_domain,
            **padded,
        )
        return packed_from_padded(h, cu_seqlens), final
    dtype = compute_dtype(decays, b, initial_state)
    h0 = _initial(initial_state, b, dtype)
    if lengths is not None:
        check_lengths(lengths, *b.shape[:2])
        valid = valid_steps(lengths, b.shape[1])
        decays = fill_padding(decays, valid, 1.0 if name == "a" else 0.0)
        b = fill_padding(b, valid, 0.0)
    if check_domain:
        check_finite_values(**{name: decays}, b=b, initial_state=initial_state)
    run = choose("linear_scan", backend, BACKENDS, Request(b.device, dtype)).run
    if b.shape[1]:
        h, final = run(decays, b, h0, name == "log_a")
    else:
        h, final = b.to(dtype if dtype.is_complex else b.dtype), h0
    if lengths is not None:  # padding has held the state
        h = fill_padding(h, valid, 0.0)
    return h, final


def _one_of(a: Tensor | None, log_a: Tensor | None) -> tuple[str, Tensor]:
    if a is not None and log_a is None:
        return "a", a
    if log_a is not None and a is None:
        return "log_a", log_a
    given = "neither" if a is None else "both"
    raise bad_argument("a, log_a", given, "one of the two", "pass a or log_a=")


def _check(name: str, decays: Tensor, b: Tensor) -> None:
    check_floating(**{name: decays}, b=b)
    check_alike(b, **{name: decays})
    check_shape(name, decays, b.shape)
    if b.ndim < 2:
        raise bad_argument(
            "b", f"shape {tuple(b.shape)}", "(B, L, …)", "add dimensions"
        )


def _initial(initial_state: Tensor | None, b: Tensor, dtype: torch.dtype) -> Tensor:
    shape = (b.shape[0], *b.shape[2:])
    if initial_state is None:
        return torch.zeros(shape, dtype=dtype, device=b.device)
    check_floating(initial_state=initial_state)
    check_alike(b, initial_state=initial_state)
    check_shape("initial_state", initial_state, shape)
    return initial_state.to(dtype)
