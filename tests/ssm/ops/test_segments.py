"""Products of decays over segments: put together without division or subtraction."""

import math

import pytest
import torch
from torch import Tensor

from ssm._errors import ArgumentError
from ssm.ops._segments import (
    LOGS,
    NUMBERS,
    chunk_length,
    diagonal_scores,
    in_chunks,
    over_pieces,
    segments,
)
from tests.ssm.helpers import assert_close


def slow_pairs(a: Tensor) -> Tensor:
    """a_t … a_{s+1} for s <= t, else 0, each multiplied out on its own."""
    Q = len(a)
    pairs = torch.zeros(Q, Q, *a.shape[1:], dtype=a.dtype)
    for t in range(Q):
        for s in range(t + 1):
            pairs[t, s] = a[s + 1 : t + 1].prod(0)
    return pairs


@pytest.mark.parametrize("Q", [1, 2, 8])
def test_numbers_may_be_zero_negative_and_complex(Q):
    torch.manual_seed(Q)
    a = torch.randn(Q, 3, dtype=torch.complex128)
    a[::3] = 0
    a[1::4] = -1
    pairs, start, end = segments(a, NUMBERS)
    assert_close(pairs, slow_pairs(a))
    assert_close(start, a.cumprod(0))
    assert_close(end, torch.stack([a[s + 1 :].prod(0) for s in range(Q)]))


def test_sums_of_logarithms_do_not_cancel():
    """After a log-decay of -1e4 a sum of -1e-6 is still one; a difference is 0."""
    logs = torch.tensor([-1e4, -1e-6, -2e-6, -1e4])[:, None]
    pairs, start, end = segments(logs, LOGS)
    assert math.isclose(pairs[2, 0, 0].item(), -3e-6, rel_tol=1e-6)
    assert pairs[0, 1, 0] == -torch.inf
    assert pairs[1, 1, 0] == 0
    assert end[0, 0].item() == pairs[3, 0, 0].item()
    assert start[2, 0].item() == pytest.approx(-1e4)


def test_gradients_are_exact_at_zero_and_finite_at_any_logarithm():
    a = torch.tensor([[0.3], [0.0], [-0.7], [0.5]], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: segments(x, NUMBERS), (a.requires_grad_(),)
    )
    logs = torch.tensor([[0.0], [-torch.inf], [-1e4], [-1e-6]], requires_grad=True)
    pairs, start, end = segments(logs, LOGS)
    total = pairs.exp().sum() + start.exp().sum() + end.exp().sum()
    (grad,) = torch.autograd.grad(total, logs)
    assert grad.isfinite().all()
    assert grad[1] == 0


def test_scores_are_the_sums_over_states():
    torch.manual_seed(0)
    q, k, a = (torch.randn(16, 5, dtype=torch.float64) for _ in range(3))
    scores, start, end = diagonal_scores(q, k, a, NUMBERS)
    assert_close(scores, torch.einsum("tn,tsn,sn->ts", q, slow_pairs(a), k))
    assert_close(start, a.cumprod(0))
    assert_close(end[:-1], torch.stack([a[s + 1 :].prod(0) for s in range(15)]))


def test_chunks_are_powers_of_two_no_longer_than_needed():
    lengths = {(c, L): chunk_length(c, L) for c in (1, 3, 64) for L in (0, 1, 5, 100)}
    assert [lengths[3, L] for L in (0, 1, 5, 100)] == [1, 1, 4, 4]
    assert [lengths[64, L] for L in (0, 1, 5, 100)] == [1, 1, 8, 64]
    assert lengths[1, 100] == 1
    x = torch.arange(5.0)[None]
    assert in_chunks(x, 2, 9.0).tolist() == [[[0, 1], [2, 3], [4, 9]]]


def test_pieces_end_at_the_chosen_steps():
    def run(x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return x.cumsum(1) + state[:, None], state + x.sum(1)

    x = torch.arange(6.0)[None]
    zero = torch.zeros(1)
    whole = over_pieces(run, [x], zero, None)
    y, final, states = over_pieces(run, [x], zero, [5, 0, 3, 0])
    assert torch.equal(y, whole[0])
    assert torch.equal(final, whole[1])
    assert states.tolist() == [[15.0, 0.0, 6.0, 0.0]]
    assert over_pieces(run, [x], zero, [])[2].shape == (1, 0)
    with pytest.raises(ArgumentError, match="states_at"):
        over_pieces(run, [x], zero, [6])
