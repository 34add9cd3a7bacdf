"""The associative scan against a sequential fold, for combines that do not commute."""

import pytest
import torch

from ssm.ops.linear_scan import linear_scan
from ssm.ops.parallel_scan import parallel_scan
from tests.ssm.helpers import assert_close
from tests.ssm.ops.helpers import LENGTHS, random


def product(left, right):
    """2 x 2 matrix products: later matrices stand on the left."""
    return right @ left


def affine(left, right):
    (A1, b1), (A2, b2) = left, right
    return A2 @ A1, (A2 @ b1[..., None])[..., 0] + b2


def max_plus(left, right):
    """Products of matrices in which + is max and * is +."""
    return (right[..., :, :, None] + left[..., None, :, :]).amax(-2)


def last_nonzero(left, right):
    return {"value": torch.where(right["value"] != 0, right["value"], left["value"])}


def turns(*shape, seed=0):
    x = random(*shape, 2, 2, seed=seed)
    return 0.98 * torch.matrix_exp((x - x.mT) / 2 + x / 20)


def elements(name, B=2, L=65, seed=0):
    return {
        "product": lambda: turns(B, L, seed=seed),
        "affine": lambda: (turns(B, L, 3, seed=seed), random(B, L, 3, 2, seed=seed)),
        "max_plus": lambda: random(B, L, 3, 3, seed=seed),
        "last_nonzero": lambda: {
            "value": random(B, L, 2, seed=seed).round().clamp(0, 1)
        },
    }[name]()


COMBINES = {
    "product": product,
    "affine": affine,
    "max_plus": max_plus,
    "last_nonzero": last_nonzero,
}
NAMES = list(COMBINES)


def leaves_of(tree):
    return torch.utils._pytree.tree_leaves(tree)


def mapped(function, *trees):
    return torch.utils._pytree.tree_map(function, *trees)


def fold(name, elements, initial=None, reverse=False):
    """The definition, step by step: everything that was scanned, and the last."""
    L = leaves_of(elements)[0].shape[1]
    order = reversed(range(L)) if reverse else range(L)
    scanned, value = {}, initial
    for t in order:
        x_t = mapped(lambda x, t=t: x[:, t], elements)
        value = x_t if value is None else COMBINES[name](value, x_t)
        scanned[t] = value
    stacked = mapped(lambda *s: torch.stack(s, 1), *(scanned[t] for t in range(L)))
    return stacked, value


def with_gradients(scan, elements, initial):
    """Scanned, last, and gradients of a random loss on both, all leaves in a list."""
    trees = [elements] if initial is None else [elements, initial]
    trees = mapped(lambda x: x.detach().clone().requires_grad_(), trees)
    outputs = leaves_of(scan(*trees) if len(trees) == 2 else scan(*trees, None))
    loss = sum((y * random(*y.shape, seed=5)).sum() for y in outputs)
    grads = torch.autograd.grad(loss, leaves_of(trees), materialize_grads=True)
    return [*outputs, *grads]


def compare(actual, expected):
    for i, (ours, reference) in enumerate(zip(actual, expected, strict=True)):
        assert_close(ours, reference, name=f"entry {i}")


@pytest.mark.parametrize("backend", ["torch", "naive"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_equal_the_fold(name, started, reverse, backend):
    for L in LENGTHS if backend == "torch" else (1, 5):
        given = elements(name, L=L)
        initial = None
        if started:
            initial = mapped(lambda x: x[:, 0], elements(name, L=1, seed=7))
        actual = with_gradients(
            lambda x, i: parallel_scan(
                COMBINES[name], x, initial=i, reverse=reverse, backend=backend
            ),
            given,
            initial,
        )
        expected = with_gradients(
            lambda x, i: fold(name, x, i, reverse), given, initial
        )
        compare(actual, expected)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("name", ["product", "affine", "max_plus"])
def test_ragged_rows_equal_each_row_alone(name, started, reverse, packed):
    lengths = torch.tensor([6, 1, 0, 13, 2])
    valid = torch.arange(13) < lengths[:, None]
    given = elements(name, B=5, L=13)
    initial = None
    if started:
        initial = mapped(lambda x: x[:, 0], elements(name, B=5, L=1, seed=7))

    def row(tree, i, n=None):
        return mapped(lambda x: x[i : i + 1] if n is None else x[i : i + 1, :n], tree)

    def alone(x, initial):
        rows = [
            parallel_scan(
                COMBINES[name],
                row(x, i, n),
                initial=row(initial, i) if started else None,
                reverse=reverse,
            )
            for i, n in enumerate(lengths.tolist())
        ]
        lasts = mapped(lambda *s: torch.cat(s), *(last for _, last in rows))
        scanned = mapped(lambda *s: torch.cat(s, 1), *(y for y, _ in rows))
        return (scanned if packed else mapped(spread, scanned)), lasts

    def spread(y):
        padded = y.new_zeros(5, 13, *y.shape[2:])
        padded[valid] = y[0]
        return padded

    def together(x, initial):
        options = {"initial": initial, "reverse": reverse}
        if not packed:
            return parallel_scan(COMBINES[name], x, lengths=lengths, **options)
        bounds = torch.cat([lengths[:1] * 0, lengths.cumsum(0)])
        x = mapped(lambda leaf: leaf[valid][None], x)
        return parallel_scan(COMBINES[name], x, cu_seqlens=bounds, **options)

    expected = with_gradients(alone, given, initial)
    if not packed:
        for leaf in leaves_of(given):
            leaf[~valid] = torch.nan
    compare(with_gradients(together, given, initial), expected)


def test_padding_never_leaves_the_domain_of_the_combine():
    """Harmonic sums divide: zeros, or many copies of a step, would not be safe."""

    def harmonic(left, right):
        return 1 / (1 / left + 1 / right)

    x = (random(2, 200).abs() + 0.1).requires_grad_()
    lengths = torch.tensor([3, 200])
    scanned, last = parallel_scan(harmonic, x, lengths=lengths)
    assert_close(last[0], 1 / (1 / x[0, :3]).sum())
    grad = torch.autograd.grad(last.sum() + scanned.sum(), x)[0]
    assert torch.isfinite(grad).all()
    assert (grad[0, 3:] == 0).all()
    huge = torch.full((2, 60), 1e300, dtype=torch.float64)
    huge[0, 1:] = 1.0
    huge.requires_grad_()
    _, last = parallel_scan(torch.mul, huge, lengths=torch.tensor([2, 1]))
    grad = torch.autograd.grad(last.sum(), huge)[0]
    assert torch.equal(last, torch.full((2,), 1e300, dtype=torch.float64))
    assert torch.isfinite(grad).all()


def test_tensors_of_decays_give_the_linear_recurrence():
    """The chapter's ``parallel_scan(a, b)``."""
    a, b, h0 = random(2, 65, 3), random(2, 65, 3), random(2, 3)
    h, last = parallel_scan(a, b, initial=h0)
    expected = linear_scan(a, b, initial_state=h0, backend="naive")
    assert_close(h, expected[0])
    assert_close(last, expected[1])
    h, _ = parallel_scan(a, b, reverse=True)
    assert_close(h, linear_scan(a.flip(1), b.flip(1), backend="torch")[0].flip(1))


def test_depth_is_logarithmic_and_work_linear():
    calls = []

    def counting(left, right):
        calls.append(left.shape[1])
        return left + right

    for L in (64, 1000, 4097):
        calls.clear()
        parallel_scan(counting, random(1, L))
        assert len(calls) <= 2 * L.bit_length()
        assert sum(calls) <= 2 * L


def test_integers_and_no_steps():
    x = torch.randint(9, (2, 33))
    scanned, last = parallel_scan(torch.maximum, x)
    assert torch.equal(scanned, x.cummax(1).values)
    assert torch.equal(last, x.amax(1))
    empty, last = parallel_scan(torch.maximum, x[:, :0])
    assert empty.shape == (2, 0)
    assert torch.equal(last, torch.zeros(2, dtype=x.dtype))
    _, last = parallel_scan(torch.maximum, x[:, :0], initial=x[:, 3])
    assert torch.equal(last, x[:, 3])


def test_second_derivatives():
    x = turns(1, 5).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: parallel_scan(product, x)[0], x)


def test_two_runs_are_bit_equal():
    given = mapped(lambda x: x.float(), elements("affine", L=97))
    runs = [
        with_gradients(lambda x, _: parallel_scan(affine, x), given, None)
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_compiled_equals_eager():
    def scan(A, b, initial, lengths):
        return parallel_scan(
            affine, (A, b), initial=initial, lengths=lengths, reverse=True
        )

    given = elements("affine", L=13)
    initial = mapped(lambda x: x[:, 0], elements("affine", L=1, seed=7))
    lengths = torch.tensor([13, 6])
    torch.compiler.reset()
    compiled = torch.compile(scan, backend="aot_eager", fullgraph=True)
    compare(
        with_gradients(lambda x, i: compiled(*x, i, lengths), given, initial),
        with_gradients(lambda x, i: scan(*x, i, lengths), given, initial),
    )


def test_bad_arguments_are_named():
    x = random(2, 9, 3)
    cases = {
        "elements: got .3,": {"elements": x[0, 0]},
        "elements: got shape .2, 8": {"elements": (x, x[:, :8])},
        "elements: got ..; ": {"elements": ()},
        "initial: got shape": {"initial": x},
        "initial: got a tree": {"initial": (x[:, 0],)},
        "combine: ": {"combine": lambda left, right: (left + right).sum(-1)},
        "backend: ": {"backend": "cpu"},
        "lengths: ": {"lengths": torch.tensor([10, 1])},
        "cu_seqlens: ": {"cu_seqlens": torch.tensor([0, 9])},
    }
    for message, change in cases.items():
        with pytest.raises(ValueError, match=f"^{message}"):
            parallel_scan(**({"combine": torch.add, "elements": x} | change))
