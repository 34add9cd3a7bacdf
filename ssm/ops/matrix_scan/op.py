"""The matrix scan h_t = A_t h_{t-1} + b_t: dense and block-diagonal transitions."""

import torch
from jaxtyping import Inexact, Int
from torch import Tensor

from ssm._errors import check_alike, check_finite_values, check_floating, check_shape
from ssm.ops._dispatch import Backend, Request, choose
from ssm.ops._dtypes import compute_dtype
from ssm.ops._ragged import (
    check_cu_seqlens,
    check_lengths,
    fill_padding,
    packed_from_padded,
    padded_from_packed,
    valid_steps,
)
from ssm.ops.matrix_scan.naive import matrix_scan_loop
from ssm.ops.matrix_scan.torch import matrix_scan_torch

BACKENDS = {
    "torch": Backend(matrix_scan_torch),
    "naive": Backend(matrix_scan_loop),
}


def matrix_scan(
    A: Inexact[Tensor, "B L H K K"] | Inexact[Tensor, "H K K"],
    b: Inexact[Tensor, "B L H K"],
    *,
    initial_state: Inexact[Tensor, "B H K"] | None = None,
    lengths: Int[Tensor, " B"] | None = None,
    cu_seqlens: Int[Tensor, " S1"] | None = None,
    backend: str = "auto",
    check_domain: bool = False,
) -> tuple[Inexact[Tensor, "B L H K"], Inexact[Tensor, "B H K"]]:
    """h_t = A_t h_{t-1} + b_t for H blocks of K x K; all h_t and the last.

    H = 1 is a dense transition. ``A`` may be one matrix a block for all times, and
    any matrix: singular, complex, not normal. Both outputs are differentiable in A, b
    and the initial state. ``lengths`` marks padding and ``cu_seqlens`` packs sequences
    into one row (then states have one row a sequence): see :mod:`ssm.ops._ragged`. The
    state is float32 at least; h has the dtype of ``b`` (complex where A is).

    Raises ArgumentError for wrong shapes, dtypes or devices and, with
    ``check_domain``, for values that are not finite; BackendError where
    ``backend`` cannot run.
    """
    _check(A, b, initial_state if cu_seqlens is None else None)
    batch, L, H, K = b.shape
    varying = A.ndim == 5
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, batch, L)
        h, final = matrix_scan(
            padded_from_packed(A, cu_seqlens) if varying else A,
            padded_from_packed(b, cu_seqlens),
            initial_state=initial_state,
            lengths=cu_seqlens.diff(),
            backend=backend,
            check_domain=check_domain,
        )
        return packed_from_padded(h, cu_seqlens), final
    dtype = compute_dtype(A, b, initial_state)
    h0 = b.new_zeros(batch, H, K) if initial_state is None else initial_state
    h0 = h0.to(dtype)
    if lengths is not None:
        check_lengths(lengths, batch, L)
        valid = valid_steps(lengths, L)
        b = fill_padding(b, valid, 0.0)
        A = fill_padding(A, valid, 0.0) if varying else A
    if check_domain:
        check_finite_values(A=A, b=b, initial_state=initial_state)
    run = choose("matrix_scan", backend, BACKENDS, Request(b.device, dtype)).run
    h = run(A.to(dtype), b.to(dtype), h0) if L else b.to(dtype)
    final = h[:, -1].clone() if L else h0  # a copy does not keep all of h alive
    if lengths is not None:
        final = _at(lengths, h0, h)
        h = fill_padding(h, valid, 0.0)
    return h.to(dtype if dtype.is_complex else b.dtype), final


def _at(lengths: Tensor, h0: Tensor, h: Tensor) -> Tensor:
    """The state of each row after its last step; padding does not hold it."""
    ends = lengths[:, None, None, None].expand(-1, 1, *h0.shape[1:])
    return torch.cat([h0[:, None], h], 1).gather(1, ends)[:, 0]


def _check(A: Tensor, b: Tensor, initial_state: Tensor | None) -> None:
    check_floating(A=A, b=b, initial_state=initial_state)
    check_alike(b, A=A, initial_state=initial_state)
    check_shape("b", b, (None, None, None, None))
    batch, _, H, K = b.shape
    check_shape("A", A, (*b.shape, K), (H, K, K))
    if initial_state is not None:
        check_shape("initial_state", initial_state, (batch, H, K))
