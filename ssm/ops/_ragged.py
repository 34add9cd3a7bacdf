"""Sequences of different lengths: padded with ``lengths``, packed by ``cu_seqlens``.

Padded: row i of a (B, L, …) tensor holds a sequence of ``lengths[i]`` steps and then
padding. The state is held after the last step, outputs on padding are zero, and nothing
on the padding, not even NaN, reaches a value or a gradient.

Packed: one row, B = 1, holds S sequences end to end; ``cu_seqlens`` (S + 1,) gives
their bounds, starting with 0 and ending with L. States then have S rows.
"""

import itertools

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from ssm._errors import bad_argument


def check_lengths(lengths: Int[Tensor, " B"], batch: int, L: int) -> None:
    """Raise ArgumentError unless ``lengths`` is (B,) integers within 0 … L."""
    if not _is_integer(lengths) or tuple(lengths.shape) != (batch,):
        raise bad_argument(
            "lengths",
            f"{lengths.dtype} of shape {tuple(lengths.shape)}",
            f"integers of shape ({batch},)",
            "give one length a row",
        )
    if torch.compiler.is_compiling() or lengths.device.type != "cpu":
        return  # reading the values would wait for the device
    if batch and (int(lengths.min()) < 0 or int(lengths.max()) > L):
        raise bad_argument(
            "lengths",
            lengths.tolist(),
            f"values within 0 and {L}, the padded length",
            "cut them or pad the input further",
        )


def check_cu_seqlens(cu_seqlens: Int[Tensor, " S1"], batch: int, L: int) -> None:
    """Raise ArgumentError unless the bounds rise from 0 to L over a single row."""
    if not _is_integer(cu_seqlens) or cu_seqlens.ndim != 1:
        raise bad_argument(
            "cu_seqlens",
            f"{cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}",
            "integers of shape (S + 1,)",
            "give the bounds of the S sequences",
        )
    bounds = cu_seqlens.tolist()
    rising = all(a <= b for a, b in itertools.pairwise(bounds))
    if batch != 1 or not bounds or bounds[0] != 0 or bounds[-1] != L or not rising:
        raise bad_argument(
            "cu_seqlens",
            f"{bounds} for a batch of {batch} x {L}",
            f"bounds rising from 0 to {L} over a single row",
            "pack the sequences end to end into one row",
        )


def _is_integer(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def valid_steps(lengths: Int[Tensor, " B"], L: int) -> Bool[Tensor, "B L"]:
    """True where a step belongs to its row's sequence."""
    return torch.arange(L, device=lengths.device) < lengths[:, None]


def fill_padding(
    x: Shaped[Tensor, "B L *rest"], valid: Bool[Tensor, "B L"], value: float
) -> Shaped[Tensor, "B L *rest"]:
    """``x`` with ``value`` on the padding; gradients (and NaN) there are cut off."""
    mask = valid.reshape(*valid.shape, *[1] * (x.ndim - 2))
    return torch.where(mask, x, torch.full((), value, dtype=x.dtype, device=x.device))


def padded_from_packed(
    x: Shaped[Tensor, "1 L *rest"], cu_seqlens: Int[Tensor, " S1"]
) -> Shaped[Tensor, "S Lmax *rest"]:
    """One row a sequence, zeros behind each; differentiable."""
    places, S, longest = _places(cu_seqlens)
    flat = x.new_zeros(S * longest, *x.shape[2:]).index_copy(0, places, x[0])
    return flat.reshape(S, longest, *x.shape[2:])


def packed_from_padded(
    x: Shaped[Tensor, "S Lmax *rest"], cu_seqlens: Int[Tensor, " S1"]
) -> Shaped[Tensor, "1 L *rest"]:
    """The inverse of :func:`padded_from_packed`; differentiable."""
    places, _, _ = _places(cu_seqlens)
    return x.flatten(0, 1).index_select(0, places)[None]


def _places(cu_seqlens: Int[Tensor, " S1"]) -> tuple[Tensor, int, int]:
    lengths = cu_seqlens.diff()
    S = len(lengths)
    longest = int(lengths.max()) if S else 0
    valid = valid_steps(lengths, longest)
    return valid.flatten().nonzero()[:, 0], S, longest
