"""The kernel of a diagonal system: sums of powers, their gradients, extreme decays."""

import pytest
import torch
from torch import Tensor

from ssm.layers._lti import Powers, Recurrence, outputs_from, power_sums
from tests.ssm.helpers import assert_close

LENGTHS = (1, 2, 3, 63, 64, 65, 97)


def system(D: int = 3, n: int = 4) -> tuple[Tensor, Tensor]:
    """Weights; decays of which some are 0, 1, tiny, negative and of modulus 1."""
    generator = torch.Generator().manual_seed(D)
    parts = torch.randn(4, D, n, generator=generator, dtype=torch.float64)
    z = torch.complex(*parts[2:])
    z = z / (1 + z.abs())
    z[0] = torch.tensor([0, 1, 1e-30, -1.0])[:n]
    z[1, 0] = torch.exp(torch.tensor(1j * 2.5))
    return torch.complex(*parts[:2]).requires_grad_(), z.requires_grad_()


def by_definition(c: Tensor, z: Tensor, L: int) -> Tensor:
    """Re sum_n c_n z_n^j, one product after the other."""
    powers = [torch.ones_like(z)]
    for _ in range(L - 1):
        powers.append(powers[-1] * z)
    return (c * torch.stack(powers)).sum(-1).real.mT


@pytest.mark.parametrize("L", LENGTHS)
def test_values_and_gradients(L: int) -> None:
    c, z = system()
    found, expected = power_sums(c, z, L), by_definition(c, z, L)
    assert_close(found, expected)
    weights = torch.arange(1.0, 3 * L + 1).cos().reshape(3, L).double()
    gradients = [
        torch.autograd.grad((K * weights).sum(), (c, z), materialize_grads=True)
        for K in (found, expected)
    ]
    for name, mine, theirs in zip("cz", *gradients, strict=True):
        assert_close(mine, theirs, name=name)


@pytest.mark.parametrize("L", [1, 2, 7])
def test_differentiable_twice(L: int) -> None:
    c, z = (x.detach()[2:, :2].clone().requires_grad_() for x in system())

    def sums(c: Tensor, z: Tensor) -> Tensor:
        return power_sums(c, z, L)

    assert torch.autograd.gradcheck(sums, (c, z))
    assert torch.autograd.gradgradcheck(sums, (c, z))


def test_it_is_the_response_to_an_impulse() -> None:
    read, z = system()
    write = system(4)[0][:3].detach()
    recurrence = Recurrence(Powers(z, 65, diagonal=True), write, read)
    left = outputs_from(recurrence, write[None], 65)[0].mT
    assert_close(power_sums(read.conj() * write, z, 65), left)
