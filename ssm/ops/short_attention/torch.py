"""Attention of packed sequences in PyTorch's operations, one part after the other."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import dropout, scaled_dot_product_attention

Parts = tuple[tuple[int, int], ...]
"""(sequences, length) of each part."""

# A GPU's attention kernels compute tiles of so many positions, in float32 without
# tensor cores; below that, products of whole matrices are faster.
_TILE = 64


def short_attention_torch(
    qkv: Float[Tensor, "T 3 M P"], parts: Parts, share: float
) -> Float[Tensor, "T M P"]:
    """Each part by itself."""
    if not parts:
        return qkv[:, 0]
    rows = qkv.split([B * L for B, L in parts])
    outputs = [
        _attend(own.unflatten(0, part), share).flatten(0, 1)
        for own, part in zip(rows, parts, strict=True)
    ]
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _attend(qkv: Float[Tensor, "B L 3 M P"], share: float) -> Float[Tensor, "B L M P"]:
    heads = qkv.permute(2, 0, 3, 1, 4)
    short = qkv.dtype.itemsize >= 4 and qkv.shape[1] < _TILE
    attend = _attend_by_products if short else _attend_by_kernel
    return attend(heads, share).transpose(1, 2)


def _attend_by_kernel(
    heads: Float[Tensor, "3 B M L P"], share: float
) -> Float[Tensor, "B M L P"]:
    q, k, v = heads
    return scaled_dot_product_attention(q, k, v, dropout_p=share, is_causal=True)


def _attend_by_products(
    heads: Float[Tensor, "3 B M L P"], share: float
) -> Float[Tensor, "B M L P"]:
    """dropout(softmax(q k / sqrt(P) - infinity above the diagonal)) v."""
    B, M, L, P = heads.shape[1:]
    q, k, v = heads.flatten(1, 2)
    future = q.new_full((L, L), -torch.inf).triu(1)
    scores = torch.baddbmm(future, q, k.mT, alpha=P**-0.5)
    return (dropout(scores.softmax(-1), share) @ v).unflatten(0, (B, M))
