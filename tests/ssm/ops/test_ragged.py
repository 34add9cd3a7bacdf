"""Padding and packing: what goes in comes out, and nothing leaks from the padding."""

import pytest
import torch

from ssm.ops._history import last_inputs
from ssm.ops._ragged import (
    check_cu_seqlens,
    check_lengths,
    fill_padding,
    packed_from_padded,
    padded_from_packed,
    valid_steps,
)
from tests.ssm.ops.helpers import random

BOUNDS = torch.tensor([0, 3, 3, 4, 9])


def test_valid_steps_by_hand():
    expected = [[False] * 3, [True, False, False], [True] * 3]
    assert valid_steps(torch.tensor([0, 1, 3]), 3).tolist() == expected


@pytest.mark.parametrize("rest", [(), (2,), (2, 3)])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_filling_cuts_values_and_gradients_off(rest, value):
    valid = valid_steps(torch.tensor([0, 2, 4]), 4)
    x = random(3, 4, *rest)
    x[~valid] = torch.nan
    x.requires_grad_()
    filled = fill_padding(x, valid, value)
    assert (filled[~valid] == value).all()
    assert torch.equal(filled[valid], x[valid])
    (filled * torch.where(filled == value, torch.nan, 1.0)).sum().backward()
    assert (x.grad[~valid] == 0).all()
    assert (x.grad[valid] == 1).all()


@pytest.mark.parametrize("rest", [(), (2,), (2, 3)])
def test_packing_by_hand_and_back(rest):
    x = random(1, 9, *rest)
    padded = padded_from_packed(x, BOUNDS)
    assert padded.shape == (4, 5, *rest)
    for row, (low, high) in zip(padded, BOUNDS.unfold(0, 2, 1).tolist(), strict=True):
        assert torch.equal(row[: high - low], x[0, low:high])
        assert (row[high - low :] == 0).all()
    assert torch.equal(packed_from_padded(padded, BOUNDS), x)


def test_packing_is_differentiable():
    x = random(1, 9, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: padded_from_packed(x, BOUNDS), x)
    padded = random(4, 5, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: packed_from_padded(x, BOUNDS), padded)


def test_packing_nothing():
    for bounds, rows in (([0], 0), ([0, 0, 0], 2)):
        cu_seqlens = torch.tensor(bounds)
        padded = padded_from_packed(torch.zeros(1, 0, 3), cu_seqlens)
        assert padded.shape == (rows, 0, 3)
        assert packed_from_padded(padded, cu_seqlens).shape == (1, 0, 3)


@pytest.mark.parametrize("keep", [0, 1, 3, 6, 9])
@pytest.mark.parametrize("S", [0, 2, 5])
def test_last_inputs_by_hand(keep, S):
    x, history = random(3, 4, 2), random(3, S, 2, seed=1)
    lengths = torch.tensor([0, 2, 4])

    def expected(i, n):
        everything = torch.cat([torch.zeros(9, 2).double(), history[i], x[i, :n]])
        return everything[len(everything) - keep :]

    rows = [expected(i, n) for i, n in enumerate(lengths.tolist())]
    assert torch.equal(last_inputs(x, history, keep, lengths), torch.stack(rows))
    whole = torch.stack([expected(i, 4) for i in range(3)])
    found = last_inputs(x, history, keep)
    assert torch.equal(found, whole)
    if keep:
        assert found.data_ptr() not in (x.data_ptr(), history.data_ptr())


def test_bad_lengths_and_bounds():
    good = torch.tensor([1, 2])
    check_lengths(good, 2, 2)
    for bad in (good.double(), good[:1], good[:, None], -good, good + 1):
        with pytest.raises(ValueError, match=r"^lengths: "):
            check_lengths(bad, 2, 2)
    check_cu_seqlens(BOUNDS, 1, 9)
    for bounds in ([], [1, 9], [0, 8], [0, 5, 3, 9], [0, 10]):
        with pytest.raises(ValueError, match=r"^cu_seqlens: "):
            check_cu_seqlens(torch.tensor(bounds, dtype=torch.int64), 1, 9)
    with pytest.raises(ValueError, match=r"^cu_seqlens: "):
        check_cu_seqlens(BOUNDS, 2, 9)
    for bad in (BOUNDS.double(), BOUNDS[None]):
        with pytest.raises(ValueError, match=r"^cu_seqlens: "):
            check_cu_seqlens(bad, 1, 9)
