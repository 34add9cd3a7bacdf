"""The kernel of a diagonal system: sums of powers, their gradients, extreme decays."""

import pytest
import torch
from torch import Tensor

from ssm._errors import ArgumentError, BackendError
from ssm.layers._lti import Powers, Recurrence, outputs_from
from ssm.ops import power_sums
from tests.ssm.helpers import assert_close

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LENGTHS = (1, 2, 3, 63, 64, 65, 97)
BACKENDS = ("torch", "triton")


def system(D: int = 3, n: int = 4) -> tuple[Tensor, Tensor]:
    """Weights; decays of which some are 0, 1, tiny, negative and of modulus 1."""
    generator = torch.Generator().manual_seed(D)
    parts = torch.randn(4, D, n, generator=generator, dtype=torch.float64)
    z = torch.complex(*parts[2:])
    z = z / (1 + z.abs())
    z[0, :4] = torch.tensor([0, 1, 1e-30, -1.0])[:n]
    z[1, 0] = torch.exp(torch.tensor(1j * 2.5))
    return torch.complex(*parts[:2]).requires_grad_(), z.requires_grad_()


def sums(c: Tensor, z: Tensor, L: int, backend: str) -> Tensor:
    """By this backend where its device is, the result where the operands are."""
    return power_sums(c.to(DEVICE), z.to(DEVICE), L, backend=backend).cpu()


def check(c: Tensor, z: Tensor, L: int, backend: str) -> None:
    """Against one product after the other: values and gradients."""
    found = sums(c, z, L, backend), power_sums(c, z, L, backend="naive")
    assert_close(*found)
    weights = torch.arange(1.0, found[0].numel() + 1).cos().reshape(-1, L).double()
    gradients = [
        torch.autograd.grad((K * weights).sum(), (c, z), materialize_grads=True)
        for K in found
    ]
    for name, mine, theirs in zip("cz", *gradients, strict=True):
        assert_close(mine, theirs, name=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("L", LENGTHS)
def test_values_and_gradients(L: int, backend: str) -> None:
    check(*system(), L, backend)


@pytest.mark.parametrize(("D", "n"), [(2, 1), (2, 33), (2, 100), (2, 300)])
def test_any_number_of_pairs(D: int, n: int) -> None:
    check(*system(D, n), 37, "triton")


def test_the_definition_in_plain_numbers() -> None:
    c, z = (torch.tensor([[x]], dtype=torch.complex128) for x in (2 + 1j, 0.5j))
    for backend in ("naive", *BACKENDS):
        found = sums(c, z, 4, backend)  # (2 + i) (i / 2)^j
        assert_close(found, torch.tensor([[2.0, -0.5, -0.5, 0.125]]).double())


@pytest.mark.parametrize("L", [1, 2, 7])
def test_differentiable_twice(L: int) -> None:
    c, z = (x.detach()[2:, :2].clone().requires_grad_() for x in system())

    def by_torch(c: Tensor, z: Tensor) -> Tensor:
        return power_sums(c, z, L, backend="torch")

    assert torch.autograd.gradcheck(by_torch, (c, z))
    assert torch.autograd.gradgradcheck(by_torch, (c, z))


def test_the_kernel_is_differentiable_once() -> None:
    c, z = system()
    (first,) = torch.autograd.grad(
        sums(c, z, 5, "triton").square().sum(), c, create_graph=True
    )
    with pytest.raises(RuntimeError, match="differentiable once"):
        first.abs().sum().backward()


def test_conjugate_and_strided_operands() -> None:
    c, z = system(4, 6)
    c, z = c.detach().conj()[::2, ::2], z.detach().mT.contiguous().mT[::2, ::2]
    for backend in BACKENDS:
        assert_close(sums(c, z, 9, backend), power_sums(c, z, 9, backend="naive"))


def test_two_runs_are_bit_equal() -> None:
    c, z = system()
    assert torch.equal(*(sums(c, z, 40, "triton") for _ in range(2)))


def test_it_is_the_response_to_an_impulse() -> None:
    read, z = system()
    write = system(4)[0][:3].detach()
    recurrence = Recurrence(Powers(z, 65, diagonal=True), write, read)
    left = outputs_from(recurrence, write[None], 65)[0].mT
    assert_close(power_sums(read.conj() * write, z, 65), left)


def test_what_is_refused() -> None:
    c, z = (x.detach() for x in system())
    with pytest.raises(ArgumentError, match="complex128"):
        power_sums(c, z.to(torch.complex64), 3)
    with pytest.raises(ArgumentError, match="z: got shape"):
        power_sums(c, z[:, :2], 3)
    with pytest.raises(ArgumentError, match="L: got 0"):
        power_sums(c, z, 0)
    with pytest.raises(BackendError, match="1024 powers at most, not 1025"):
        sums(c, z, 1025, "triton")
