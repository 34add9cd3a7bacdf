"""K_j = Re sum_n c_n z_n^j: the convolution kernel of a diagonal system."""

from typing import Any

import torch
from jaxtyping import Complex128, Float64
from torch import Tensor

from ssm._errors import bad_argument, check_alike, check_shape
from ssm.ops._dispatch import Backend, Choice, Request, find, remembered
from ssm.ops._gpu import gpu_backend
from ssm.ops.power_sums.torch import power_sums_torch

_LONGEST = 1024  # powers: of more, two levels of products are less work


def _triton(*operands: Any) -> Tensor:
    from ssm.ops.power_sums.triton import power_sums_triton

    return power_sums_triton(*operands)


def _refuses_triton(request: Request) -> str | None:
    L = request.sizes["L"]
    return None if L <= _LONGEST else f"it is for {_LONGEST} powers at most, not {L}"


def _refuses(request: Request) -> str | None:
    if request.dtype == torch.complex128:
        return None
    return f"it computes in complex128, not in {request.dtype}"


def _naive(c: Tensor, z: Tensor, L: int) -> Tensor:
    """One product after the other."""
    powers = [torch.ones_like(z)]
    for _ in range(L - 1):
        powers.append(powers[-1] * z)
    return (c * torch.stack(powers)).sum(-1).real.mT


BACKENDS = {
    "triton": gpu_backend(
        "power_sums",
        "triton",
        _triton,
        dtypes=(torch.complex128,),
        refuses=_refuses_triton,
    ),
    "torch": Backend(power_sums_torch, _refuses),
    "naive": Backend(_naive, _refuses),
}


def power_sums(
    c: Complex128[Tensor, "D n"],
    z: Complex128[Tensor, "D n"],
    L: int,
    *,
    backend: str = "auto",
) -> Float64[Tensor, "D L"]:
    """K_j = Re sum_n c_n z_n^j for j < L >= 1, of every row by itself.

    The product with a Vandermonde matrix that gives S4D its kernel (Gu et al. 2022,
    arXiv:2206.11893, section 3.3), in double precision; z may be 0, and 0^0 is 1. On a
    GPU up to 1,024 powers are one kernel, differentiable once; else differentiable
    twice. Raises ArgumentError for wrong shapes, dtypes or devices; BackendError where
    ``backend`` cannot run.
    """
    found: Tensor = _settle(c, z, L, backend).taken().run(c, z, L)
    return found


@remembered
def _settle(c: Tensor, z: Tensor, L: int, backend: str) -> Choice:
    """The operands checked, and what serves them."""
    for name, given in (("c", c), ("z", z)):
        if given.dtype != torch.complex128:
            raise bad_argument(name, given.dtype, "torch.complex128", "convert it")
    check_alike(c, z=z)
    check_shape("c", c, (None, None))
    check_shape("z", z, tuple(c.shape))
    if not isinstance(L, int) or L < 1:
        raise bad_argument("L", repr(L), "a whole number from 1", "raise it")
    request = Request(c.device, c.dtype, sizes={"L": L})
    return find("power_sums", backend, BACKENDS, request)
