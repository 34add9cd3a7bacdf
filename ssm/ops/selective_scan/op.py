"""The selective scan of Mamba (S6): h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t."""

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Inexact, Int
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
from ssm.ops._gpu import _constant, _index, gpu_backend, most_shared
from ssm.ops._numba import refuses_real
from ssm.ops._ragged import fill_padding, packed_from_padded, valid_steps
from ssm.ops._segments import check_chunk_size, over_pieces, unpacked
from ssm.ops.selective_scan.naive import selective_scan_loop
from ssm.ops.selective_scan.torch import real_dtype, selective_scan_torch, step_size


class Operands(NamedTuple):
    """The operands of one scan, in the order in which backends take them."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    delta_softplus: bool

    def in_time(self) -> dict[str, Tensor]:
        """Name -> tensor, for those that have a time axis."""
        return {n: x for n, x in self.tensors().items() if n != "A" and x.ndim > 2}

    def replace(self, tensors: Mapping[str, Tensor]) -> "Operands":
        """With these tensors instead."""
        changed: dict[str, Any] = dict(tensors)
        return self._replace(**changed)

    def to(self, dtype: torch.dtype) -> "Operands":
        """In the precision of ``dtype``: A, B and C in it, the rest real."""
        tensors = self.tensors()
        if all(x.dtype == dtype for x in tensors.values()):
            return self
        real = real_dtype(dtype)
        converted = {n: x.to(dtype if n in "ABC" else real) for n, x in tensors.items()}
        return self.replace(converted)

    def in_groups(self) -> "Operands":
        """B and C as (B, L, G, N), or (D, N) where they are constant."""
        B, C = (X[:, :, None] if X.ndim == 3 else X for X in (self.B, self.C))
        return self._replace(B=B, C=C)

    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor, for those that are given."""
        named = zip(self._fields, self, strict=True)
        return {name: x for name, x in named if isinstance(x, Tensor)}


_CUDA_STATES = 256  # what the registers of a warp hold


def _cpu(x: Operands, h: Tensor, lengths: Tensor | None, chunk: int) -> Any:
    from ssm.ops.selective_scan.cpu import selective_scan_cpu  # compiles where it runs

    shared = _same_groups(x.to(h.dtype))
    y, final = selective_scan_cpu(*shared, h, lengths, chunk)
    return y.to(x.u.dtype), final


def _cuda(x: Operands, h: Tensor | None, lengths: Tensor | None, chunk: int) -> Any:
    del chunk  # its plan has its own
    from ssm.ops.selective_scan.cuda import selective_scan_cuda

    y, final = selective_scan_cuda(*_same_groups(x), h, lengths)
    return (y if y.dtype == x.u.dtype else y.to(x.u.dtype)), final


def _direct_cuda(*given: Any) -> Callable[..., Any] | None:
    from ssm.ops.selective_scan.cuda import direct

    return direct(*given[:-2])  # without chunk size and backend


def _refuses_cuda(request: Request) -> str | None:
    if request.sizes.get("N", 1) > _CUDA_STATES:
        return f"it keeps at most {_CUDA_STATES} states a channel"
    if request.sizes.get("N", 1) > 32 and _has_little_shared_memory(request.device):
        return "more than 32 states a channel need 160 KiB of shared memory a block"
    if request.sizes.get("constant", 0):
        return "it takes B and C that vary in time"
    return _refuses_nothing(request)


@_constant
def _has_little_shared_memory(device: torch.device) -> bool:
    """As GPUs for desktops have, up to 100 KiB; those for data centres have more."""
    return most_shared(_index(device)) < 160 * 1024


def _refuses_nothing(request: Request) -> str | None:
    """Kernels are not launched where there is nothing to compute."""
    if 0 in (request.sizes.get(name) for name in ("rows", "channels", "N")):
        return "it needs at least one row, channel and state"
    return None


def _triton(x: Operands, h: Tensor, lengths: Tensor | None, chunk: int) -> Any:
    del chunk  # it has its own
    from ssm.ops.selective_scan.triton import selective_scan_triton

    shared = _same_groups(x).in_groups()
    y, final = selective_scan_triton(*shared, h, lengths)
    return y.to(x.u.dtype), final


def _same_groups(x: Operands) -> Operands:
    """B and C, where both vary, with one number of groups; (B, L, N) is one group."""
    if x.B.ndim == 3 and x.C.ndim == 3:
        return x
    x = x.in_groups()
    if x.B.ndim == 2 or x.C.ndim == 2 or x.B.shape[2] == x.C.shape[2]:
        return x
    G = math.lcm(x.B.shape[2], x.C.shape[2])
    fewer = {n: t for n, t in (("B", x.B), ("C", x.C)) if t.shape[2] < G}
    return x.replace(
        {n: t.repeat_interleave(G // t.shape[2], 2) for n, t in fewer.items()}
    )


def _torch(x: Operands, h: Tensor, lengths: Tensor | None, chunk: int) -> Any:
    x = x.in_groups()._replace(A=x.A.to(h.dtype))
    return selective_scan_torch(*x, h, lengths, chunk)


def _mamba_ssm(x: Operands, h: Tensor, lengths: Tensor | None, chunk: int) -> Any:
    del chunk  # its kernel has its own
    from ssm.ops.selective_scan.fn import mamba_ssm_scan

    return mamba_ssm_scan(x.in_groups(), h, lengths)


def _naive(x: Operands, h: Tensor, lengths: Tensor | None, chunk: int) -> Any:
    """In double precision; each row alone where lengths differ: the definition."""
    double = torch.promote_types(h.dtype, torch.float64)
    if lengths is None or not len(lengths):
        y, final = selective_scan_loop(*x.in_groups().to(double), h.to(double))
        return y.to(x.u.dtype), final.to(h.dtype)
    ys, finals = [], []
    for i, length in enumerate(lengths.tolist()):
        y_i, final_i = torch.zeros_like(x.u[i : i + 1, length:]), h[i : i + 1]
        if length:
            row = x.replace({n: t[i : i + 1, :length] for n, t in x.in_time().items()})
            y_row, final_i = _naive(row, final_i, None, chunk)
            y_i = torch.cat([y_row, y_i], 1)
        ys.append(y_i)
        finals.append(final_i)
    return torch.cat(ys), torch.cat(finals)


def _refuses_mamba_ssm(request: Request) -> str | None:
    if _MAMBA_SSM_MISSING:
        return "the package mamba_ssm is not installed (it comes with extra 'cuda')"
    if request.device.type != "cuda":
        return f"it runs on CUDA tensors, not on {request.device}"
    if request.dtype not in (torch.float32, torch.complex64):
        return f"it computes in float32 or complex64, not in {request.dtype}"
    return None


# Decided once: looking it up inside a compiled graph would break the graph.
_MAMBA_SSM_MISSING = importlib.util.find_spec("mamba_ssm") is None

BACKENDS = {
    "cuda": gpu_backend(
        "selective_scan",
        "cuda",
        _cuda,
        refuses=_refuses_cuda,
        from_zero=True,
        direct=_direct_cuda,
    ),
    "triton": gpu_backend(
        "selective_scan",
        "triton",
        _triton,
        dtypes=(torch.float32, torch.complex64),
        refuses=_refuses_nothing,
    ),
    "cpu": Backend(_cpu, refuses_real),
    "torch": Backend(_torch),
    "mamba_ssm": Backend(_mamba_ssm, _refuses_mamba_ssm),
    "naive": Backend(_naive),
}


def selective_scan(
    u: Float[Tensor, "B L D"],
    delta: Float[Tensor, "B L D"],
    A: Inexact[Tensor, "D N"],
    B: Inexact[Tensor, "B L N"] | Inexact[Tensor, "B L G N"] | Inexact[Tensor, "D N"],
    C: Inexact[Tensor, "B L N"] | Inexact[Tensor, "B L G N"] | Inexact[Tensor, "D N"],
    D: Float[Tensor, " D"] | None = None,
    z: Float[Tensor, "B L D"] | None = None,
    delta_bias: Float[Tensor, " D"] | None = None,
    delta_softplus: bool = False,
    *,
    initial_state: Inexact[Tensor, "B D N"] | None = None,
    lengths: Int[Tensor, " B"] | None = None,
    cu_seqlens: Int[Tensor, " S1"] | None = None,
    states_at: Sequence[int] | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
    check_domain: bool = False,
) -> Any:
    """h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t, read out as C_t h_t + D u_t.

    The output is gated where z is given: y_t = (C_t h_t + D u_t) silu(z_t).
    Returns (y, final_state), and with ``states_at`` (step indices from 0)
    (y, final_state, states), states (B, len, D, N) those *after* these steps; all
    differentiable in every operand. delta is first ``delta + delta_bias`` and then,
    with ``delta_softplus``, its softplus (linear above 20). Channel d belongs to group
    d // (D / G) of B and C; (B, L, N) is one group, (D, N) constant in time. With
    complex A the state is complex and y_t = 2 Re(C_t h_t) + D u_t: conjugate partners
    are not stored (B and C real or complex).

    The state is float32 at least (never in 16 bits); y has the dtype of ``u``.
    ``lengths`` marks padding and ``cu_seqlens`` packs sequences into one row (states
    then have one row a sequence): see :mod:`ssm.ops._ragged`. ``chunk_size`` is the
    distance of the states kept for the backward pass.

    Gu & Dao 2023, "Mamba", section 3.2; meaning as mamba_ssm's ``selective_scan_fn``.
    Differs: time before channels; takes an initial state; 16-bit inputs are not
    rounded again inside.

    Raises ArgumentError for wrong shapes, dtypes or devices and, with
    ``check_domain``, for values that are not finite, Re A > 0 or a negative step
    delta; BackendError where ``backend`` cannot run.
    """
    x = Operands(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    valid = None
    if lengths is not None or cu_seqlens is not None:
        check_operands(x)
        varying = x.in_time()
        sequences, lengths = unpacked(list(varying.values()), lengths, cu_seqlens)
        x = x.replace(dict(zip(varying, sequences, strict=True)))
        valid = None if lengths is None else valid_steps(lengths, x.u.shape[1])
    choice = _settle(*x, initial_state, chunk_size, backend)
    whole = lengths is None and cu_seqlens is None and states_at is None
    if whole and choice.direct is not None and not check_domain:
        choice.taken()
        return choice.direct(*x, initial_state)
    if check_domain:
        _check_domain(x, valid)
        check_finite_values(initial_state=initial_state)
    chosen, h = choice.taken(), initial_state
    if h is not None:
        h = h.to(choice.dtype)
    if states_at is None and x.u.shape[1] > 0:
        if h is None and not chosen.from_zero:
            h = _zeros(x, choice)
        lengths = None if valid is None else valid.sum(1)
        y, *states = chosen.run(x, h, lengths, chunk_size)
    else:
        run, pieces = _pieces_by(chosen, x, valid, chunk_size)
        h = _zeros(x, choice) if h is None else h
        y, *states = over_pieces(run, pieces, h, states_at)
    if cu_seqlens is not None:
        y = packed_from_padded(y, cu_seqlens)
    return y, *states


def _zeros(x: Operands, choice: Choice) -> Tensor:
    """The state before the first step where none is given."""
    return torch.zeros((len(x.u), *x.A.shape), dtype=choice.dtype, device=x.u.device)


@partial(remembered, in_place=True)
def _settle(*given: Any) -> Choice:
    """The operands, initial state, chunk size and backend, checked; what serves them.

    Raises as :func:`selective_scan` does.
    """
    *operands, initial_state, chunk_size, backend = given
    x = Operands(*operands)
    check_operands(x)
    check_chunk_size(chunk_size)
    if initial_state is not None:
        check_state(x, initial_state)
    dtype = compute_dtype(*x.tensors().values(), initial_state)
    request = Request(x.u.device, dtype, sizes=sizes_of(x))
    return find("selective_scan", backend, BACKENDS, request)


def sizes_of(x: Operands) -> dict[str, int]:
    """What some backend limits; "constant" counts the matrices that are."""
    rows, _, channels = x.u.shape
    constant = sum(X.ndim == 2 for X in (x.B, x.C))
    return {
        "rows": rows,
        "channels": channels,
        "N": x.A.shape[1],
        "constant": constant,
    }


def _pieces_by(
    backend: Backend, x: Operands, valid: Tensor | None, chunk_size: int
) -> tuple[Callable[..., tuple[Tensor, Tensor]], list[Tensor]]:
    """(run, sequences): ``run`` takes a piece of each sequence, and the state."""
    sequences = x.in_time()
    masks = [] if valid is None else [valid]

    def run(*piece: Tensor) -> tuple[Tensor, Tensor]:
        *parts, h = piece
        lengths = parts.pop().sum(1) if masks else None
        here = x.replace(dict(zip(sequences, parts, strict=True)))
        if here.u.shape[1] == 0:
            return torch.zeros_like(here.u), h
        return backend.run(here, h, lengths, chunk_size)

    return run, [*sequences.values(), *masks]


def check_state(x: Operands, state: Tensor, name: str = "initial_state") -> None:
    """Raise ArgumentError unless the state fits the operands."""
    check_floating(**{name: state})
    check_alike(x.u, **{name: state})
    check_shape(name, state, (x.u.shape[0], *x.A.shape))
    _check_real(x.A, **{name: state})


def check_operands(x: Operands) -> None:
    """Raise ArgumentError unless shapes, dtypes and devices fit together."""
    tensors = x.tensors()
    check_floating(**tensors)
    check_alike(x.u, **tensors)
    check_shape("u", x.u, (None, None, None))
    batch, L, D = x.u.shape
    check_shape("delta", x.delta, (batch, L, D))
    check_shape("A", x.A, (D, None))
    N = x.A.shape[1]
    for name, X in (("B", x.B), ("C", x.C)):
        check_shape(name, X, (batch, L, N), (batch, L, None, N), (D, N))
        G = X.shape[2] if X.ndim == 4 else 1
        if G == 0 or D % G:
            raise bad_argument(
                name, f"{G} groups", f"a divisor of the {D} channels", "regroup"
            )
    if x.z is not None:
        check_shape("z", x.z, (batch, L, D))
    for name, vector in (("D", x.D), ("delta_bias", x.delta_bias)):
        if vector is not None:
            check_shape(name, vector, (D,))
    _check_real(None, **{n: t for n, t in tensors.items() if n not in "ABC"})
    _check_real(x.A, B=x.B, C=x.C)


def _check_real(A: Tensor | None, **tensors: Tensor | None) -> None:
    """Raise ArgumentError if one is complex, unless A is complex too."""
    if A is not None and A.is_complex():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.is_complex():
            mend = "take its real part" if A is None else "make A complex as well"
            raise bad_argument(name, f"dtype {tensor.dtype}", "a real dtype", mend)


def _check_domain(x: Operands, valid: Tensor | None) -> None:
    """Raise ArgumentError for values that are not finite or a system that grows."""
    if valid is not None:  # what lies on padding does not matter
        x = x.replace({n: fill_padding(t, valid, 0.0) for n, t in x.in_time().items()})
    check_finite_values(**x.tensors())
    rate = x.A.real if x.A.is_complex() else x.A
    if bool((rate > 0).any()):
        raise bad_argument(
            "A",
            f"a real part of {rate.max().item()}",
            "none above 0: the state would grow without bound",
            "pass -exp(A_log), not A_log",
        )
    step = step_size(x.delta, x.delta_bias, x.delta_softplus)
    if valid is not None:
        step = fill_padding(step, valid, 0.0)
    if bool((step < 0).any()):
        raise bad_argument(
            "delta",
            f"a step of {step.min().item()}",
            "none below 0: exp(delta A) would grow",
            "set delta_softplus=True or make delta positive",
        )
