"""HiPPO against closed forms: Legendre polynomials, exponentials, exact fractions."""

from fractions import Fraction
from math import factorial

import numpy as np
import pytest
import torch
from numpy.polynomial.legendre import Legendre

from ssm._errors import ArgumentError
from ssm.layers import hippo
from ssm.layers.s4 import DPLRSystem, dplr_kernel
from tests.ssm.helpers import assert_close, error

DOUBLE = torch.float64


def legs(N):
    return hippo.make_hippo_matrix(N, DOUBLE), hippo.make_hippo_input(N, DOUBLE)


def randn(*shape, dtype=DOUBLE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=dtype, generator=generator)


def basis(n):
    """sqrt(2n+1) P_n(2x - 1) on [0, 1]"""
    return np.sqrt(2 * n + 1) * Legendre.basis(n, domain=[0, 1])


# The matrix, and what it remembers


@pytest.mark.parametrize("N", [1, 2, 5])
def test_the_matrix_is_the_chapters(N):
    A = hippo.make_hippo_matrix(N)
    for n in range(N):
        for k in range(N):
            below = -((2 * n + 1) ** 0.5) * (2 * k + 1) ** 0.5
            expected = below if n > k else -(n + 1) if n == k else 0
            assert A[n, k].item() == pytest.approx(expected)
    assert A.dtype == torch.float32
    assert hippo.make_hippo_matrix(N, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("m", [0, 1, 4, 9])
def test_the_legendre_coefficients_of_a_power_solve_the_equation(m):
    # c = t^m kappa for f = t^m, so that t c' = A c + B f means (m - A) kappa = B.
    N = 7
    A, B = legs(N)
    kappa = torch.zeros(N, dtype=DOUBLE)
    for n in range(min(m, N - 1) + 1):
        moment = Fraction(factorial(m) ** 2, factorial(m - n) * factorial(m + n + 1))
        kappa[n] = (2 * n + 1) ** 0.5 * float(moment)
    assert_close(m * kappa - A @ kappa, B)


def test_the_memory_holds_the_coefficients_of_a_step_function_exactly():
    N, L = 6, 23
    f = randn(2, L)
    c = hippo.legendre_memory(f, N)
    assert c.shape == (2, L, N)
    for k in (0, 1, 10, L - 1):
        edges = np.arange(k + 2) / (k + 1)
        pieces = [np.diff(basis(n).integ()(edges)) for n in range(N)]
        expected = f[:, : k + 1] @ torch.tensor(np.array(pieces)).mT
        assert_close(c[:, k], expected, name=f"after {k + 1} steps")


def test_the_memory_reconstructs_a_polynomial():
    N, worst = 5, []
    polynomial = basis(0) * 0.3 - 1.2 * basis(1) + 0.7 * basis(3)
    for L in (100, 200):
        f = torch.from_numpy(polynomial((np.arange(L) + 0.5) / L))
        found = hippo.legendre_memory(f, N)[-1]
        expected = torch.tensor([0.3, -1.2, 0, 0.7, 0], dtype=DOUBLE)
        worst.append(float((found - expected).abs().max()))
    assert worst[1] < 1e-3
    assert worst[0] / worst[1] == pytest.approx(4, rel=0.05)  # second order in 1 / L


def test_the_memory_of_nothing_is_nothing():
    assert hippo.legendre_memory(randn(3, 0), 4).shape == (3, 0, 4)
    assert hippo.legendre_memory(randn(1), 4).shape == (1, 4)


def test_the_time_invariant_basis_is_legendre_in_exp_minus_t():
    N = 12
    A, B = legs(N)
    for t in (0.0, 0.1, 1.0, 5.0):
        x = np.exp(-t)
        expected = torch.tensor([x * basis(n)(x) for n in range(N)])
        assert_close(torch.linalg.matrix_exp(t * A) @ B, expected, name=f"t = {t}")


# Discretisation


def test_zoh_is_the_exponential_and_its_integral():
    A, B = legs(6)
    delta = 0.3
    A_bar = torch.linalg.matrix_exp(delta * A)
    assert_close(hippo.discretize_A(A, delta), A_bar)
    inverted = torch.linalg.solve(A, (A_bar - torch.eye(6, dtype=DOUBLE)) @ B)
    assert_close(hippo.discretize_B(A, B, delta), inverted)


def test_a_singular_matrix_is_discretised_too():
    nilpotent = torch.tensor([[0.0, 2.0], [0.0, 0.0]], dtype=DOUBLE)
    B = torch.tensor([[1.0, 0.5], [3.0, -1.0]], dtype=DOUBLE)
    delta = 0.7
    expected = delta * B + delta**2 / 2 * nilpotent @ B
    assert_close(hippo.discretize_B(nilpotent, B, delta), expected)
    assert_close(hippo.discretize_B(0 * nilpotent, B, delta), delta * B)


@pytest.mark.parametrize("method", hippo.METHODS)
def test_steps_and_matrices_may_be_batched(method):
    A = randn(3, 4, 4) / 4
    B, matrix = randn(3, 4, seed=1), randn(3, 4, 2, seed=2)
    steps = torch.tensor([0.1, 0.5, 2.0], dtype=DOUBLE)
    A_bar = hippo.discretize_A(A, steps, method)
    B_bar = hippo.discretize_B(A, B, steps, method)
    M_bar = hippo.discretize_B(A, matrix, steps, method)
    shared = hippo.discretize_B(A[0], B[0], steps, method)
    for i, delta in enumerate(steps.tolist()):
        assert_close(A_bar[i], hippo.discretize_A(A[i], delta, method))
        assert_close(B_bar[i], hippo.discretize_B(A[i], B[i], delta, method))
        assert_close(M_bar[i], hippo.discretize_B(A[i], matrix[i], delta, method))
        assert_close(shared[i], hippo.discretize_B(A[0], B[0], delta, method))


def test_the_bilinear_rule_is_of_second_order():
    A, B = legs(4)
    errors = []
    for delta in (0.02, 0.01):
        gap = hippo.discretize_A(A, delta, "bilinear") - hippo.discretize_A(A, delta)
        other = hippo.discretize_B(A, B, delta, "bilinear")
        errors.append((gap.norm(), (other - hippo.discretize_B(A, B, delta)).norm()))
    for coarse, fine in zip(*errors, strict=True):
        assert float(coarse / fine) == pytest.approx(8, rel=0.1)  # local: cubed


@pytest.mark.parametrize("method", hippo.METHODS)
def test_diagonal_equals_dense(method):
    values = [-0.5 + 3j, 0, -1e-5j, -1e-3, 2e-3 + 0j, -40, 1j, 0.2]
    A = torch.tensor(values, dtype=torch.complex128)
    B = randn(8, dtype=torch.complex128)
    A_bar, B_bar = hippo.discretize_diagonal(A, B, torch.tensor(0.3), method)
    delta = torch.tensor(0.3).item()
    assert_close(A_bar.diag(), hippo.discretize_A(A.diag(), delta, method))
    assert_close(B_bar, hippo.discretize_B(A.diag(), B, delta, method))


@pytest.mark.parametrize("value", [0.0, -1e-16, 1e-9j, -1e-3, -0.99e-3, -2, -1e4])
@pytest.mark.parametrize("method", hippo.METHODS)
def test_gradients_of_the_diagonal_rule_are_exact_near_zero_and_far(value, method):
    delta = torch.tensor(0.9, dtype=DOUBLE)
    A = torch.tensor(value, dtype=torch.complex128, requires_grad=True)
    _, B_bar = hippo.discretize_diagonal(A, torch.ones_like(A), delta, method)
    (grad,) = torch.autograd.grad(B_bar.real, A)
    x = complex(value) * 0.9
    if method == "bilinear":
        expected = 0.9**2 / 2 / (1 - x / 2) ** 2
    elif abs(x) < 1e-2:
        terms = [(n + 1) * x**n / factorial(n + 2) for n in range(6)]
        expected = 0.9**2 * sum(terms)
    else:
        expected = 0.9**2 * (np.exp(x) * x - np.expm1(x)) / x**2
    assert_close(grad.conj(), torch.tensor(expected, dtype=grad.dtype))


# Kernels


@pytest.mark.parametrize("length", [0, 1, 2, 5, 64, 65])
@pytest.mark.parametrize("inputs", [(), (2,)])
@pytest.mark.parametrize("outputs", [(), (3,)])
def test_the_kernel_is_that_of_dense_powers(length, inputs, outputs):
    A = randn(5, 5) / 4
    B, C = randn(5, *inputs, seed=1), randn(*outputs, 5, seed=2)
    kernel = hippo.compute_kernel(A, B, C, length)
    assert kernel.shape == (length, *outputs, *inputs)
    power = torch.eye(5, dtype=DOUBLE)
    for j in range(length):
        assert_close(kernel[j], C @ power @ B, name=f"K_{j}")
        power = power @ A


def test_the_kernel_is_differentiable_and_takes_complex_readouts():
    A, B = (randn(3, 3) / 3).requires_grad_(), randn(3, seed=1).requires_grad_()
    C = randn(3, dtype=torch.complex128, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *args: hippo.compute_kernel(*args, 6), (A, B, C)
    )


@pytest.mark.parametrize("N", [1, 2, 3, 8, 33, 64, 100])
def test_normal_plus_low_rank_is_legs_and_its_vectors_are_orthonormal(N):
    A, B = legs(N)
    Lambda, P, b, V = hippo.make_hippo_dplr(N)
    low_rank = torch.outer(P, P).to(V.dtype)
    assert_close(V @ (Lambda.diag() - low_rank) @ V.mH, A.to(V.dtype), name="A")
    assert_close(V @ b.to(V.dtype), B.to(V.dtype), name="B")
    assert float(torch.linalg.cond(V)) == pytest.approx(1, abs=1e-12)
    assert torch.equal(Lambda, Lambda.conj().flip(0))
    assert (Lambda.real == -0.5).all()


@pytest.mark.parametrize("N", [1, 2, 7, 16, 64])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 257])
def test_the_dplr_kernel_is_the_dense_power_kernel(N, length):
    A, B = legs(N)
    C, delta = randn(N), 0.02
    A_bar = hippo.discretize_A(A, delta, "bilinear")
    B_bar = hippo.discretize_B(A, B, delta, "bilinear")
    expected = hippo.compute_kernel(A_bar, B_bar, C, length)
    Lambda, P, b, V = hippo.make_hippo_modes(N)
    parts = [x.to(V.dtype)[None] for x in (Lambda, P, b, C.to(V.dtype) @ V)]
    system = DPLRSystem(*parts, torch.tensor([delta], dtype=DOUBLE))
    assert_close(dplr_kernel(system, length)[0], expected)


# Why nobody diagonalises LegS directly


@pytest.mark.parametrize("N", [1, 5, 32])
def test_the_closed_form_eigenvectors_are_exact(N):
    W, inverse = hippo.legs_eigenvectors(N)
    # S^-1 A S has integer entries: -(2k+1) below the diagonal, -(n+1) on it.
    for n in range(N):
        for j in range(N):
            moved = sum(-(2 * k + 1) * W[k][j] for k in range(n)) - (n + 1) * W[n][j]
            assert moved == -(j + 1) * W[n][j]
            assert sum(W[n][k] * inverse[k][j] for k in range(N)) == (n == j)


@pytest.mark.parametrize(
    ("N", "condition"), [(8, 7.70e4), (16, 8.32e10), (32, 1.22e23)]
)
def test_direct_diagonalisation_is_hopeless(N, condition):
    found = hippo.eigenvector_condition(N)
    assert found == pytest.approx(condition, rel=5e-3)
    A, _ = legs(N)
    by_float = float(torch.linalg.cond(torch.linalg.eig(A)[1]))
    if N <= 16:
        assert by_float == pytest.approx(condition, rel=1e-2)
    else:  # float64 cannot see it: it says 1e19 to 4e19, by the version of LAPACK
        assert by_float < 1e-2 * condition
    assert float(torch.linalg.cond(hippo.make_hippo_dplr(N).V)) < 1 + 1e-12


@pytest.mark.parametrize("N", [0, 257])
def test_exact_conditions_have_a_range(N):
    with pytest.raises(ArgumentError, match=rf"^N: got {N}; .*choose one within$"):
        hippo.eigenvector_condition(N)


# S4D


def test_s4d_eigenvalues_are_the_papers():
    lin = hippo.make_s4d_eigenvalues("lin", 6)
    assert_close(lin.imag, torch.pi * torch.arange(3, dtype=DOUBLE))
    inv = hippo.make_s4d_eigenvalues("inv", 64)
    assert inv[0].imag.item() == pytest.approx(64 * 63 / np.pi)
    assert inv[-1].imag.item() == pytest.approx(64 / np.pi * (64 / 63 - 1))
    # Inv was found as a law for the high frequencies of LegS: closer as N grows.
    gaps = []
    for N in (64, 256):
        found, law = (
            hippo.make_s4d_eigenvalues(init, N).imag.max() for init in ("legs", "inv")
        )
        gaps.append(float(found / law) - 1)
    assert gaps[0] < 0.02
    assert gaps[0] / gaps[1] == pytest.approx(4, rel=0.05)
    for init in hippo.S4D_INITS:
        assert [len(hippo.make_s4d_eigenvalues(init, N)) for N in (1, 5, 6)] == [
            1,
            3,
            3,
        ]


def test_dropping_the_low_rank_and_half_the_input_tends_to_legs():
    # Weakly: the kernels themselves oscillate, the response to a step converges.
    gaps = []
    for N in (16, 64, 256):
        Lambda, _, B, V = hippo.make_hippo_modes(N)
        worst = 0.0
        for T in (0.2, 0.5, 1.0):
            found = 2 * (V[:3] @ (torch.expm1(T * Lambda) / Lambda * B / 2)).real
            for n in range(3):
                antiderivative = basis(n).integ()
                expected = antiderivative(1) - antiderivative(np.exp(-T))
                worst = max(worst, abs(float(found[n]) - expected))
        gaps.append(worst)
    assert gaps[1] < gaps[0] / 2
    assert gaps[2] < gaps[1] / 2
    assert gaps[2] < 1e-3


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: hippo.make_hippo_matrix(0), "N: got 0"),
        (lambda: hippo.make_s4d_eigenvalues("line", 4), "init: got 'line'; .*lin, inv"),
        (lambda: hippo.discretize_A(torch.ones(2, 3), 0.1), r"A: got shape \(2, 3\)"),
        (
            lambda: hippo.discretize_B(torch.eye(3), torch.ones(2), 0.1),
            r"B: got shape \(2,\); expected \(…, 3\)",
        ),
        (
            lambda: hippo.discretize_A(torch.eye(3), 0.1, "euler"),
            "discretization: got 'euler'; expected zoh, bilinear",
        ),
        (
            lambda: hippo.compute_kernel(torch.eye(3), torch.ones(2), torch.ones(3), 4),
            r"B_bar: got shape \(2,\)",
        ),
        (
            lambda: hippo.compute_kernel(torch.eye(2), torch.ones(2), torch.ones(3), 4),
            r"C: got shape \(3,\)",
        ),
    ],
)
def test_bad_arguments_are_named(call, words):
    with pytest.raises(ArgumentError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_the_tolerance_would_notice_a_wrong_sign():
    A, B = legs(4)
    right = hippo.discretize_B(A, B, 0.1)
    assert error(hippo.discretize_B(-A, B, 0.1), right) > 1e-2
