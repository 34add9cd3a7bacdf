"""y = W x + bias of one step: a matrix against a few vectors."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

from ssm._errors import bad_argument, check_alike, check_floating, check_shape
from ssm.ops._dispatch import Backend, Choice, Request, find, remembered
from ssm.ops._dtypes import compute_dtype
from ssm.ops._gpu import gpu_backend

_MOST = 4  # rows: a product of more is a library's


def _triton(*operands: Any) -> Tensor:
    from ssm.ops.linear_step.triton import linear_step_triton

    return linear_step_triton(*operands)


def _refuses_triton(request: Request) -> str | None:
    rows = request.sizes["rows"]
    return None if rows <= _MOST else f"it is for {_MOST} rows at most, not {rows}"


def _naive(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Sum after sum, in double precision."""
    y = torch.stack([(weight.double() * row).sum(-1) for row in x.double()])
    return (y if bias is None else y + bias.double()).to(x.dtype)


BACKENDS = {
    "triton": gpu_backend("linear_step", "triton", _triton, refuses=_refuses_triton),
    "torch": Backend(linear),
    "naive": Backend(_naive),
}


def linear_step(
    x: Float[Tensor, "B K"],
    weight: Float[Tensor, "N K"],
    bias: Float[Tensor, " N"] | None = None,
    *,
    backend: str = "auto",
) -> Float[Tensor, "B N"]:
    """y = W x + bias, as ``torch.nn.functional.linear`` of all operands' one dtype.

    On a GPU up to 4 rows are one kernel that reads W as fast as the memory gives it,
    with sums in float32: what generation does at every step. Raises ArgumentError for
    wrong shapes, dtypes or devices; BackendError where ``backend`` cannot run.
    """
    choice = _settle(x, weight, bias, backend)
    y: Tensor = choice.taken().run(x, weight, bias)
    return y


@remembered
def _settle(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Choice:
    """The operands checked, and what serves them."""
    check_floating(x=x, weight=weight, bias=bias)
    check_alike(x, weight=weight, bias=bias)
    check_shape("x", x, (None, None))
    check_shape("weight", weight, (None, x.shape[1]))
    if bias is not None:
        check_shape("bias", bias, (len(weight),))
    for name, given in (("weight", weight), ("bias", bias)):
        if given is not None and given.dtype != x.dtype:
            raise bad_argument(name, given.dtype, f"{x.dtype}, as x", "convert it")
    request = Request(x.device, compute_dtype(x, weight), sizes={"rows": len(x)})
    return find("linear_step", backend, BACKENDS, request)
