"""Attention of packed sequences: values, gradients and dropout, by a second way."""

import pytest
import torch
from torch import Tensor, nn

from ssm._errors import ArgumentError, BackendError
from ssm.ops import _selftest, short_attention
from tests.ssm.helpers import TOLERANCE, assert_close
from tests.ssm.ops.helpers import random

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = ("torch", "triton")
HALF = (torch.bfloat16, torch.float16)
Parts = tuple[tuple[int, int], ...]

LENGTHS: list[Parts] = [
    ((3, 1),),
    ((2, 2),),
    ((2, 20), (17, 2)),
    ((1, 63),),
    ((1, 64), (2, 1)),
    ((1, 37), (1, 20), (1, 1), (2, 3), (0, 9), (3, 5), (1, 0)),
]


def operand(parts: Parts, M: int = 3, P: int = 8, *, size: float = 1.0) -> Tensor:
    rows = sum(B * L for B, L in parts)
    return size * random(rows, 3, M, P, dtype=torch.float32)


def factors_of_one(parts: Parts, M: int) -> list[Tensor]:
    """For every sequence its weights' factors (M, L, L): nothing is dropped."""
    return [torch.ones(M, L, L).double() for B, L in parts for _ in range(B)]


def written_out(qkv: Tensor, parts: Parts, factors: list[Tensor]) -> Tensor:
    """Each sequence by itself as matrices, whatever stands behind it cut off."""
    outputs, start = [qkv[:0, 0]], 0
    for L, factor in zip((L for B, L in parts for _ in range(B)), factors, strict=True):
        q, k, v = qkv[start : start + L].permute(1, 2, 0, 3)
        start += L
        scores = q @ k.mT / q.shape[-1] ** 0.5
        future = torch.ones(L, L, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -torch.inf).softmax(-1) * factor
        outputs.append((weights @ v).transpose(0, 1))
    return torch.cat(outputs)


def both(y: Tensor, qkv: Tensor) -> tuple[Tensor, Tensor]:
    """The values, and the gradient of an uneven loss, on the CPU."""
    loss = (y.cpu().double() * random(*y.shape, seed=1)).sum()
    (gradient,) = torch.autograd.grad(loss, qkv)
    return y.detach().cpu(), gradient


def outcome(qkv: Tensor, parts: Parts, backend: str, share: float = 0.0):
    leaf = qkv.detach().clone().requires_grad_()
    return both(short_attention(leaf.to(DEVICE), parts, share, backend=backend), leaf)


def expected(qkv: Tensor, parts: Parts, factors: list[Tensor] | None = None):
    leaf = qkv.detach().double().requires_grad_()
    factors = factors_of_one(parts, qkv.shape[2]) if factors is None else factors
    return both(written_out(leaf, parts, factors), leaf)


def check(
    qkv: Tensor, parts: Parts, backend: str = "triton", least: float = 0.0
) -> None:
    found, right = outcome(qkv, parts, backend), expected(qkv, parts)
    for name, mine, theirs in zip(("y", "dqkv"), found, right, strict=True):
        assert mine.dtype == qkv.dtype
        assert_close(mine, theirs, name=name, least=least)


@pytest.mark.parametrize("backend", [*BACKENDS, "naive"])
@pytest.mark.parametrize("parts", LENGTHS, ids=str)
def test_values_and_gradients(parts: Parts, backend: str) -> None:
    check(operand(parts), parts, backend)


@pytest.mark.parametrize(("M", "P", "L"), [(5, 1, 9), (1, 16, 33), (2, 64, 20)])
def test_any_heads(M: int, P: int, L: int) -> None:
    parts = ((2, L), (3, 2))
    check(operand(parts, M, P), parts)


def test_heads_of_128_channels() -> None:
    parts = ((2, 16), (1, 3))
    check(operand(parts, 1, 128), parts)
    check(operand(parts, 1, 100), parts)


def test_it_is_the_attention_of_pytorch() -> None:
    """Weights of ``nn.MultiheadAttention`` and its own forward pass."""
    parts, H, M = ((2, 7), (2, 3)), 12, 3
    theirs = nn.MultiheadAttention(H, M, batch_first=True).double()
    x = random(sum(B * L for B, L in parts), H)
    qkv = nn.functional.linear(x, theirs.in_proj_weight, theirs.in_proj_bias)
    heads = short_attention(qkv.unflatten(-1, (3, M, -1)), parts).flatten(1)
    start, wanted = 0, []
    for B, L in parts:
        own = x[start : start + B * L].unflatten(0, (B, L))
        future = torch.ones(L, L, dtype=torch.bool).triu(1)
        wanted.append(theirs(own, own, own, attn_mask=future)[0].flatten(0, 1))
        start += B * L
    assert_close(theirs.out_proj(heads), torch.cat(wanted))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision(dtype: torch.dtype, backend: str) -> None:
    parts = ((2, 20), (3, 2))
    check(operand(parts, 2, 16).to(dtype), parts, backend, 4 * TOLERANCE[dtype])


@pytest.mark.parametrize(("precision", "least"), [("highest", 0.0), ("high", 5e-3)])
def test_products_of_float32_are_as_precise_as_pytorchs(
    precision: str, least: float
) -> None:
    """tensorfloat32 keeps 10 bits of a factor; without tensor cores it is float32."""
    parts, before = ((2, 20), (3, 2)), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        check(operand(parts, 2, 16), parts, "triton", least)
        y = short_attention(operand(parts, 2, 16).to(DEVICE), parts, backend="triton")
    finally:
        torch.set_float32_matmul_precision(before)
    exact = short_attention(operand(parts, 2, 16).to(DEVICE), parts, backend="triton")
    rounded = precision == "high" and DEVICE.type == "cuda"
    assert torch.equal(y, exact) != rounded


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1e-12, 30.0, 1e4])
def test_scores_of_extreme_size(size: float, backend: str) -> None:
    """Scores up to 1e8: one weight is 1, the others vanish; none is NaN."""
    parts = ((2, 13), (2, 2))
    qkv = operand(parts)
    qkv[:, :2] *= size
    # the scores' own rounding moves weights where scores are large
    check(qkv, parts, backend, min(1e-6 * max(size, 1) ** 2, 1e-3))


def test_double_precision_is_left_to_pytorch() -> None:
    parts = ((2, 5), (1, 65))
    qkv = operand(parts, 2, 3).double()
    check(qkv, parts, "auto")
    leaf = qkv[:5, :, :, :2].clone().requires_grad_()

    def attend(x: Tensor) -> Tensor:
        return short_attention(x, ((1, 3), (1, 2)))

    assert torch.autograd.gradcheck(attend, (leaf,))


def test_rows_are_read_where_they_lie() -> None:
    parts = ((2, 6),)
    qkv = operand(parts, 4, 16)[..., ::2]
    check(qkv, parts)
    check(qkv[:, :, 1::2], parts)


def test_two_runs_are_bit_equal() -> None:
    parts = ((2, 20), (3, 2))
    first, second = (outcome(operand(parts), parts, "triton") for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("backend", [*BACKENDS, "naive"])
@pytest.mark.parametrize("parts", [(), ((0, 5),), ((3, 0), (0, 2))])
def test_nothing_gives_nothing(parts: Parts, backend: str) -> None:
    for share in (0.0, 0.5):
        y, gradient = outcome(operand(parts), parts, backend, share)
        assert y.shape == (0, 3, 8)
        assert gradient.shape == (0, 3, 3, 8)


# --- dropout --------------------------------------------------------------------------


def drawn(parts: Parts, M: int, share: float, seed: int, backend: str) -> list[Tensor]:
    """The factor of every weight (M, L, L), from values that are unit vectors.

    With equal scores the weights of position t are 1 / (t + 1), and y shows each.
    """
    P = max(L for _, L in parts)
    qkv = torch.zeros(sum(B * L for B, L in parts), 3, M, P)
    unit = [torch.eye(P)[:L] for B, L in parts for _ in range(B)]
    qkv[:, 2] = torch.cat(unit)[:, None]
    torch.manual_seed(seed)
    y = short_attention(qkv.to(DEVICE), parts, share, backend=backend).cpu().double()
    lengths = [L for B, L in parts for _ in range(B)]
    found = [own.transpose(0, 1)[..., : len(own)] for own in y.split(lengths)]
    return [own * torch.arange(1.0, own.shape[1] + 1)[:, None] for own in found]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("share", [0.1, 0.6])
def test_forward_and_backward_drop_the_same_weights(share: float, backend: str) -> None:
    """Gradients are those of the weights that are left, each grown alike."""
    parts, M = ((2, 20), (5, 2), (1, 7)), 3
    factors = drawn(parts, M, share, 5, backend)
    for factor in factors:
        kept = factor.tril() > 0
        grown = torch.full_like(factor, 1 / (1 - share)).masked_fill(~kept, 0.0)
        assert_close(factor, grown, dtype=torch.float32)
    qkv = operand(parts, M, 20)
    torch.manual_seed(5)
    found, right = outcome(qkv, parts, backend, share), expected(qkv, parts, factors)
    for name, mine, theirs in zip(("y", "dqkv"), found, right, strict=True):
        assert_close(mine, theirs, name=name)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_share_that_is_dropped(share: float) -> None:
    """Over all weights, and over each diagonal, sequence and head by itself."""
    parts, M = ((12, 32),), 4
    kept = torch.stack(drawn(parts, M, share, 0, "triton")) > 0
    lower = torch.ones(32, 32, dtype=torch.bool).tril()

    def check_share(chosen: Tensor) -> None:
        deviation = (share * (1 - share) / chosen.numel()) ** 0.5
        off = float(chosen.double().mean()) - (1 - share)
        assert abs(off) < 4.5 * deviation

    check_share(kept[:, :, lower])
    for n in range(4):
        check_share(kept[:, n][:, lower])
        check_share(kept[n][:, lower])
        check_share(kept.diagonal(-n, 2, 3))
        check_share(kept[..., n::4, n])
    for one, other in ((kept[:6], kept[6:]), (kept[:, :2], kept[:, 2:])):
        a, b = one[:, :, lower], other[:, :, lower]  # independent: agreement by chance
        deviation = (share * (1 - share) / a.numel()) ** 0.5
        both = float((a & b).double().mean())
        assert abs(both - (1 - share) ** 2) < 4.5 * deviation


def test_dropout_follows_the_seed_and_goes_on() -> None:
    parts = ((2, 20),)
    first, again, other = (
        torch.stack(drawn(parts, 2, 0.5, seed, "triton")) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    qkv = operand(parts).to(DEVICE)
    torch.manual_seed(0)
    two = [short_attention(qkv, parts, 0.5, backend="triton") for _ in range(2)]
    assert not torch.equal(*two)


def test_without_dropout_no_number_is_drawn() -> None:
    parts = ((2, 3),)
    before = torch.get_rng_state()
    short_attention(operand(parts), parts)
    outcome(operand(parts), parts, "triton")
    assert torch.equal(torch.get_rng_state(), before)


# --- the operator ---------------------------------------------------------------------


def test_the_self_test_finds_nothing() -> None:
    for even in (False, True):
        assert not _selftest.check("short_attention", "triton", DEVICE, even=even)


def test_compiled_equals_eager() -> None:
    parts, share = ((2, 9), (3, 2)), 0.3

    def attend(x: Tensor) -> Tensor:
        return short_attention(x, parts, share, backend="triton")

    torch.compiler.reset()
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    results = []
    for run in (attend, compiled):
        torch.manual_seed(3)
        leaf = operand(parts).requires_grad_()
        results.append(both(run(leaf.to(DEVICE)), leaf))
    assert all(map(torch.equal, *results))


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # opcheck's own
def test_its_registration_is_sound() -> None:
    from ssm.ops.short_attention.triton import _attend

    qkv = operand(((2, 5),)).to(DEVICE).requires_grad_()
    seed = torch.tensor([3], device=DEVICE)
    for given in (None, seed):
        share = 0.0 if given is None else 0.2
        torch.library.opcheck(_attend.overload, (qkv, given, [2, 5], share))


def test_second_derivatives_are_refused() -> None:
    qkv = operand(((2, 5),)).to(DEVICE).requires_grad_()
    y = short_attention(qkv, ((2, 5),), backend="triton")
    (first,) = torch.autograd.grad(y.square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        first.square().sum().backward()


@pytest.mark.parametrize(
    ("parts", "share", "said"),
    [
        (((2, 5),), 0.1, "parts: got 10 rows in"),
        (((2, 3, 2),), 0.1, "parts: got"),
        (((2, 3.0),), 0.1, "pairs"),
        (((-2, -3),), 0.1, "whole numbers"),
        (((2, 3),), 1.0, "dropout: got 1.0"),
        (((2, 3),), -0.1, "dropout: got -0.1"),
    ],
)
def test_what_is_wrong_is_one_line(parts, share, said) -> None:
    with pytest.raises(ArgumentError, match=said) as caught:
        short_attention(torch.zeros(6, 3, 2, 4), parts, share)
    assert "\n" not in str(caught.value)


def test_other_operands_are_refused() -> None:
    parts = ((2, 3),)
    with pytest.raises(ArgumentError, match="qkv: got shape"):
        short_attention(torch.zeros(6, 2, 2, 4), parts)
    with pytest.raises(ArgumentError, match="floating"):
        short_attention(torch.zeros(6, 3, 2, 4, dtype=torch.int32), parts)
    with pytest.raises(ArgumentError, match="real dtype"):
        short_attention(torch.zeros(6, 3, 2, 4, dtype=torch.complex64), parts)


def test_sizes_that_the_kernel_leaves_to_others() -> None:
    for shape, said in (
        ((65, 3, 1, 4), "64 positions at most, not 65"),
        ((2, 3, 1, 129), "128 channels at most, not 129"),
        ((33, 3, 1, 33), "more than its registers hold"),
    ):
        qkv = torch.zeros(shape, device=DEVICE)
        parts = ((1, shape[0]),)
        with pytest.raises(BackendError, match=said):
            short_attention(qkv, parts, backend="triton")
        assert short_attention(qkv, parts).shape == (shape[0], 1, shape[3])
