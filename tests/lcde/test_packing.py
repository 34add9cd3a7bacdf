"""Packing against loops over positions; derivatives against differences."""

import pytest
import torch
from torch import Tensor

from lcde._packing import Parts, fill_up, pack, parts_of, unpack

PARTS: list[Parts] = [
    ((2, 3),),
    ((1, 1),),
    ((2, 3), (3, 1)),
    ((1, 2), (2, 5), (1, 4)),
    ((3, 2), (2, 2)),
]


def sequences(parts: Parts) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(*part, 2, generator=generator, dtype=torch.float64)
        for part in parts
    ]


@pytest.fixture(params=PARTS, ids=str)
def parts(request: pytest.FixtureRequest) -> Parts:
    return request.param


def test_positions_stand_behind_each_other_and_are_filled_up_with_zeros(
    parts: Parts,
) -> None:
    xs = sequences(parts)
    assert parts_of(xs) == parts
    packed = torch.stack([row for x in xs for sequence in x for row in sequence])
    filled = fill_up(packed, parts)
    longest = max(L for _, L in parts)
    every = [sequence for x in xs for sequence in x]
    assert filled.shape == (len(every), longest, 2)
    for row, sequence in zip(filled, every, strict=True):
        assert torch.equal(row[: len(sequence)], sequence)
        assert not row[len(sequence) :].any()
    # What stands behind the ends is left out, whatever it is.
    for row, sequence in zip(filled, every, strict=True):
        row[len(sequence) :] = torch.nan
    assert torch.equal(pack(filled, parts), packed)
    for part, x in zip(unpack(packed, parts), xs, strict=True):
        assert torch.equal(part, x)


def test_derivatives_of_both_orders(parts: Parts) -> None:
    packed = torch.cat([x.flatten(0, 1) for x in sequences(parts)]).requires_grad_()
    filled = fill_up(packed, parts).detach().requires_grad_()
    for function, x in ((fill_up, packed), (pack, filled)):

        def squared(z: Tensor, function=function) -> Tensor:
            return function(z, parts) ** 2

        assert torch.autograd.gradcheck(squared, (x,))
        assert torch.autograd.gradgradcheck(squared, (x,))
