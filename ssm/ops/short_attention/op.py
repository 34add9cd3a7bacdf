"""Causal softmax attention of short sequences, of several lengths in one call."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import dropout as drop

from ssm._errors import bad_argument, check_floating, check_shape
from ssm.ops._dispatch import Backend, Choice, Request, find, remembered
from ssm.ops._dtypes import compute_dtype
from ssm.ops._gpu import gpu_backend, power_of_2
from ssm.ops.short_attention.torch import Parts, short_attention_torch

_LONGEST = 64  # positions whose weights a program has in registers
_WIDEST = 128  # channels of a head, likewise
_LARGEST = 2048  # numbers of a tile in float32: more do not fit into registers


def _triton(*operands: Any) -> Tensor:
    from ssm.ops.short_attention.triton import short_attention_triton

    return short_attention_triton(*operands)


def _refuses_triton(request: Request) -> str | None:
    L, P = request.sizes["L"], request.sizes["P"]
    if L > _LONGEST:
        return f"it is for sequences of {_LONGEST} positions at most, not {L}"
    if P > _WIDEST:
        return f"it is for heads of {_WIDEST} channels at most, not {P}"
    tile = power_of_2(max(L, 1)) * power_of_2(max(P, 1))
    if request.sizes["bytes"] <= 2 or tile <= _LARGEST:
        return None
    return f"{L} positions of {P} channels are more than its registers hold in float32"


def _naive(qkv: Tensor, parts: Parts, share: float) -> Tensor:
    """One sequence after the other, one position after the other, in float64."""
    outputs, start = [qkv[:0, 0].double()], 0
    for L in (L for B, L in parts for _ in range(B)):
        q, k, v = qkv[start : start + L].double().unbind(1)
        start += L
        for t in range(L):
            scores = (q[t] * k[: t + 1]).sum(-1) / q.shape[-1] ** 0.5
            weights = drop(scores.softmax(0), share)
            outputs.append((weights[..., None] * v[: t + 1]).sum(0, keepdim=True))
    return torch.cat(outputs).to(qkv.dtype)


BACKENDS = {
    "triton": gpu_backend(
        "short_attention", "triton", _triton, refuses=_refuses_triton
    ),
    "torch": Backend(short_attention_torch),
    "naive": Backend(_naive),
}


def short_attention(
    qkv: Float[Tensor, "T 3 M P"],
    parts: Parts,
    dropout: float = 0.0,
    *,
    backend: str = "auto",
) -> Float[Tensor, "T M P"]:
    """y_t = sum_{s <= t} drop(softmax_s(q_t k_s / sqrt(P))) v_s, of every head.

    Vaswani et al. 2017 (arXiv:1706.03762, section 3.2.1). ``qkv`` holds queries, keys
    and values of M heads of P channels. Its T rows are sequences behind each other:
    for each (B, L) of ``parts``, B of L positions. ``dropout`` is the share of weights
    set to 0, drawn from PyTorch's generator of the device; the others grow by
    1 / (1 - dropout). Softmax in float32 at least, products in the dtype of ``qkv``
    with sums in float32, of float32 as ``torch.set_float32_matmul_precision`` says.
    On a GPU, up to 64 positions and heads of 128 channels (in float32 no more than
    2,048 numbers a sequence and head, sizes rounded up to powers of 2) are one kernel
    forward and one back, differentiable once.

    Raises ArgumentError for wrong shapes, dtypes, parts or shares; BackendError where
    ``backend`` cannot run.
    """
    parts = tuple(parts)
    choice = _settle(qkv, parts, dropout, backend)
    y: Tensor = choice.taken().run(qkv, parts, dropout)
    return y


@remembered
def _settle(qkv: Tensor, parts: Parts, share: float, backend: str) -> Choice:
    """The operands checked, and what serves them."""
    check_floating(qkv=qkv)
    if qkv.is_complex():
        raise bad_argument("qkv", qkv.dtype, "a real dtype", "take its real part")
    check_shape("qkv", qkv, (None, 3, None, None))
    _check_parts(parts, qkv.shape[0])
    if not 0 <= share < 1:
        raise bad_argument("dropout", share, "0 or more, below 1", "try 0.1")
    longest = max([0, *(L for B, L in parts if B)])
    sizes = {"L": longest, "P": qkv.shape[-1], "bytes": qkv.dtype.itemsize}
    request = Request(qkv.device, compute_dtype(qkv), sizes=sizes)
    return find("short_attention", backend, BACKENDS, request)


def _check_parts(parts: Parts, T: int) -> None:
    expected = "pairs (sequences, length) of whole numbers"
    for part in parts:
        right = isinstance(part, tuple) and len(part) == 2
        if not right or not all(isinstance(n, int) and n >= 0 for n in part):
            raise bad_argument("parts", parts, expected, "see lengths and batches")
    held = sum(B * L for B, L in parts)
    if held != T:
        mend = "give a part for every row"
        raise bad_argument("parts", f"{held} rows in {parts}", f"{T}, as qkv", mend)
