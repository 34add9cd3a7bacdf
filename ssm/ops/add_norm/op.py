"""What stands between two residual layers: a sum, and its root mean square norm."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ssm._errors import check_alike, check_floating, check_shape
from ssm.ops._dispatch import Backend, Choice, Request, find, remembered
from ssm.ops._dtypes import compute_dtype
from ssm.ops._gpu import gpu_backend
from ssm.ops.add_norm.torch import add_norm_torch

_WIDEST = 16384  # channels that a program has in registers


def _triton(*operands: Any) -> tuple[Tensor, Tensor]:
    from ssm.ops.add_norm.triton import add_norm_triton

    return add_norm_triton(*operands)


def _refuses_triton(request: Request) -> str | None:
    D = request.sizes["D"]
    if D <= _WIDEST:
        return None
    return f"it holds at most {_WIDEST} channels in registers, not {D}"


def _naive(
    x: Tensor, added: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The definition, in double precision."""
    total = x.double() if added is None else x.double() + added.double()
    scale = torch.sqrt(total.square().mean(-1, keepdim=True) + eps)
    dtype = x.dtype if added is None else torch.promote_types(x.dtype, added.dtype)
    return total.to(dtype), (total / scale * weight.double()).to(weight.dtype)


BACKENDS = {
    "triton": gpu_backend("add_norm", "triton", _triton, refuses=_refuses_triton),
    "torch": Backend(add_norm_torch),
    "naive": Backend(_naive),
}


def add_norm(
    x: Float[Tensor, "*B D"],
    added: Float[Tensor, "*B D"] | None,
    weight: Float[Tensor, " D"],
    eps: float = 1e-5,
    *,
    backend: str = "auto",
) -> tuple[Float[Tensor, "*B D"], Float[Tensor, "*B D"]]:
    """(x + added, norm(x + added) weight), norm(x) = x / sqrt(mean(x^2) + eps).

    The sum has the wider dtype of the two; the norm (arXiv:1910.07467,
    equation 4) is computed in float32 at least and has the dtype of ``weight``.
    ``added`` None: nothing is added. One kernel on a GPU. Raises ArgumentError for
    wrong shapes, dtypes or devices; BackendError where ``backend`` cannot run.
    """
    choice = _settle(x, added, weight, backend)
    found: tuple[Tensor, Tensor] = choice.taken().run(x, added, weight, eps)
    return found


@remembered
def _settle(x: Tensor, added: Tensor | None, weight: Tensor, backend: str) -> Choice:
    """The operands checked, and what serves them."""
    check_floating(x=x, added=added, weight=weight)
    check_alike(x, added=added, weight=weight)
    check_shape("weight", weight, (x.shape[-1],))
    if added is not None:
        check_shape("added", added, x.shape)
    dtype = compute_dtype(x, added, weight)
    request = Request(x.device, dtype, sizes={"D": x.shape[-1]})
    return find("add_norm", backend, BACKENDS, request)
