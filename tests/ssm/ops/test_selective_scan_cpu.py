"""The Numba selective scan where its own making matters: blocks, parts, polynomials."""

from functools import partial

import numba
import numpy as np
import pytest
import torch
from torch import Tensor

from ssm.ops.selective_scan import selective_scan
from ssm.ops.selective_scan._cpu_kernels import W
from ssm.ops.selective_scan.cpu import selective_scan_cpu
from tests.ssm.helpers import assert_close
from tests.ssm.ops.helpers import check_against_reference, outcome, random

scan = partial(selective_scan, backend="cpu", delta_softplus=True, chunk_size=8)
Tensors = dict[str, Tensor]


def operands(
    D: int, L: int = 11, N: int = 3, groups: int = 1, rows: int = 2
) -> Tensors:
    """All operands that the kernel fuses."""
    return {
        "u": random(rows, L, D, seed=1),
        "delta": random(rows, L, D, seed=2),
        "A": -random(D, N, seed=3).abs(),
        "B": random(rows, L, groups, N, seed=4),
        "C": random(rows, L, groups, N, seed=5),
        "D": random(D, seed=6),
        "z": random(rows, L, D, seed=7),
        "delta_bias": random(D, seed=8),
        "initial_state": random(rows, D, N, seed=9),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("D", "groups"),
    [(1, 1), (W - 1, 1), (W, 1), (W + 1, 1), (3 * W + 5, 1), (2 * W + 6, 2)],
)
def test_blocks_of_channels(D: int, groups: int, dtype: torch.dtype) -> None:
    check_against_reference(scan, operands(D, groups=groups), dtype)


@pytest.mark.parametrize("constant", [("B",), ("C",), ("B", "C")])
def test_constant_matrices_over_several_blocks(constant: tuple[str, ...]) -> None:
    x = operands(2 * W + 3)
    for name in constant:
        x[name] = random(2 * W + 3, 3, seed=10)
    check_against_reference(scan, x, torch.float64)


def run_decays(exponents: Tensor) -> Tensor:
    """One step from the state 1 with delta A = exponents: h = e^(delta A)."""
    ones = torch.ones_like(exponents)[None, None]
    zeros = torch.zeros(1, 1, 1, 1, dtype=exponents.dtype)
    A, h = exponents[:, None], torch.ones_like(exponents)[None, :, None]
    arguments = (ones, ones, A, zeros, zeros, None, None, None, False, h, None, 64)
    return selective_scan_cpu(*arguments)[1].flatten()


@pytest.mark.parametrize(
    ("dtype", "least", "most", "allowed"),
    [(torch.float32, -86.0, 88.0, 1.2e-5), (torch.float64, -700.0, 709.0, 3e-13)],
)
def test_the_decay_is_the_exponential(
    dtype: torch.dtype, least: float, most: float, allowed: float
) -> None:
    """The error of e^x is that of rounding x (|x| eps), and at 0 nothing."""
    x = torch.linspace(least, most, 4001, dtype=dtype)
    exact = torch.from_numpy(np.exp(x.double().numpy()))
    relative = (run_decays(x).double() / exact - 1).abs()
    assert relative.max() <= allowed
    eps = torch.finfo(dtype).eps
    assert (relative <= eps * (4 + 1.5 * x.abs())).all()
    assert (run_decays(torch.zeros(3, dtype=dtype)) == 1).all()
    tiny = torch.full((3,), -1e-6, dtype=dtype)
    assert_close(run_decays(tiny), tiny.double().exp().to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decays_beyond_the_range_are_zero_and_infinity(dtype: torch.dtype) -> None:
    edge = 104.0 if dtype == torch.float32 else 746.0
    below = torch.tensor([-edge, -1e4, -1e30, -torch.inf], dtype=dtype)
    assert (run_decays(below) == 0).all()
    above = torch.tensor([edge, 1e4, 1e30, torch.inf], dtype=dtype)
    assert (run_decays(above) == torch.inf).all()
    assert run_decays(torch.tensor([torch.nan], dtype=dtype)).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_softplus_gate_and_their_slopes_are_accurate_to_rounding(
    dtype: torch.dtype,
) -> None:
    """y = softplus(delta) and y = silu(z), read through the operator, channel alone."""
    x = torch.cat([torch.linspace(-60, 60, 2001), torch.tensor([0.0, 20.0, 20.5])])
    x = x.to(dtype)
    ones, zero = torch.ones_like(x)[None, None], torch.zeros(len(x), 1, dtype=dtype)
    one = torch.ones(1, 1, 1, 1, dtype=dtype)

    def softplus(delta: Tensor) -> Tensor:
        step = (ones, delta, zero, one, one, None, None, None, True, None, None, 64)
        return selective_scan_cpu(*step)[0]

    def silu(z: Tensor) -> Tensor:
        D = torch.ones_like(x)
        step = (ones, ones, zero, 0 * one, one, D, z, None, False, None, None, 64)
        return selective_scan_cpu(*step)[0]

    for ours, exact in (
        (softplus, torch.nn.functional.softplus),
        (silu, torch.nn.functional.silu),
    ):
        narrow = x[None, None].clone().requires_grad_()
        wide = x[None, None].double().clone().requires_grad_()
        y, y_exact = ours(narrow), exact(wide)
        (slope,) = torch.autograd.grad(y.sum(), narrow)
        (slope_exact,) = torch.autograd.grad(y_exact.sum(), wide)
        eps = torch.finfo(dtype).eps
        assert ((y - y_exact).abs() <= 6 * eps * y_exact.abs()).all()
        near = slope_exact.abs() > 1e-3  # silu' crosses zero
        assert ((slope - slope_exact).abs()[near] <= 9e-3 * eps * 1e3).all()


@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C", "z", "initial_state"])
def test_nan_in_nan_out(name: str) -> None:
    """NaN reaches exactly the outputs that the loop gives NaN to."""
    x = {n: t.float() for n, t in operands(5).items()}
    x[name][(0,) * x[name].ndim] = torch.nan
    ours, final = scan(**x)
    loop, loop_final = selective_scan(**x, delta_softplus=True, backend="naive")
    assert loop.isnan().any()
    assert torch.equal(ours.isnan(), loop.isnan())
    assert torch.equal(final.isnan(), loop_final.isnan())


def test_nan_on_the_padding_stays_there() -> None:
    x = operands(W + 2, L=19)
    lengths = torch.tensor([0, 13])
    clean = outcome(scan, x, lengths=lengths)
    for name in ("u", "delta", "B", "C", "z"):
        x[name][0] = torch.nan
        x[name][1, 13:] = torch.nan
    dirty = outcome(scan, x, lengths=lengths)
    for name, value in clean.items():
        assert torch.equal(value, dirty[name]), name
    assert (clean["y"][0] == 0).all()
    assert (clean["y"][1, 13:] == 0).all()


def test_the_number_of_threads_changes_no_bit() -> None:
    x = {n: t.float() for n, t in operands(5 * W, L=40, rows=1).items()}
    many = outcome(scan, x)
    threads = numba.get_num_threads()
    try:
        numba.set_num_threads(1)
        one = outcome(scan, x)
    finally:
        numba.set_num_threads(threads)
    for name, value in many.items():
        assert torch.equal(value, one[name]), name


def test_views_with_any_strides() -> None:
    x = operands(6, L=10)
    strided = {n: t.mT.contiguous().mT if t.ndim > 1 else t for n, t in x.items()}
    strided["u"] = torch.stack([x["u"], x["u"]], -1)[..., 0]
    strided["B"] = x["B"][:, :1].expand_as(x["B"])
    x["B"] = strided["B"].contiguous()
    expected, actual = outcome(scan, x), outcome(scan, strided)
    for name, value in expected.items():
        assert torch.equal(value, actual[name]), name


def test_the_operators_are_registered_properly() -> None:
    x = {n: t.float().requires_grad_() for n, t in operands(4, L=5).items()}
    h = x.pop("initial_state")
    lengths = torch.tensor([5, 3])
    arguments = (*x.values(), True, h, lengths, 4)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    operator = torch.ops.ssm.selective_scan_cpu.default
    torch.library.opcheck(operator, arguments, test_utils=checks)
    y, final, starts = (t.detach() for t in operator(*arguments))
    flat = [t.detach() for t in x.values()]
    backward = (y, final, starts, *flat, True, lengths, 4)
    operator = torch.ops.ssm.selective_scan_cpu_backward.default
    torch.library.opcheck(operator, backward, test_utils=checks[:2])


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    x = operands(4, L=5)
    x["A"].requires_grad_()
    y, _ = scan(**x)
    (gradient,) = torch.autograd.grad(y.sum(), [x["A"]])
    assert gradient.shape == x["A"].shape


def test_a_second_derivative_says_what_to_use() -> None:
    x = operands(4, L=5)
    x["u"].requires_grad_()
    y, _ = scan(**x)
    (gradient,) = torch.autograd.grad(y.square().sum(), [x["u"]], create_graph=True)
    with pytest.raises(RuntimeError, match="use backend='naive'"):
        gradient.sum().backward()


@pytest.mark.parametrize("sizes", [(2, 0, 4, 3), (0, 5, 4, 3), (2, 5, 4, 0)])
def test_nothing_to_do(sizes: tuple[int, int, int, int]) -> None:
    rows, L, D, N = sizes
    x = operands(D, L=L, N=N, rows=rows)
    found = outcome(scan, x)
    expected = outcome(scan, x, backend="torch")
    for name, value in expected.items():
        assert_close(found[name], value, name=name)
