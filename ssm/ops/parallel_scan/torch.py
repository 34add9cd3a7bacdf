"""The associative scan in PyTorch operations: any device, any dtype, any combine.

Neighbours are combined in pairs, the pairs are scanned one level down, and every other
element then adds what lies before it (Blelloch, "Prefix sums and their applications",
1990; Brent and Kung's network): at most 2 L combines, in 2 log2(L) calls. Gradients are
autograd's, as often as ``combine`` allows.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Elements = TypeVar("Elements")  # a tensor or a tree of tensors, each (B, L, …)


def parallel_scan_torch(
    combine: Callable[[Elements, Elements], Elements], elements: Elements
) -> Elements:
    """s_0 = x_0, s_t = combine(s_{t-1}, x_t), in O(log L) depth."""
    L = pytree.tree_leaves(elements)[0].shape[1]
    if L < 2:
        return elements
    lefts, rights = _take(elements, 0), _take(elements, 1)
    pairs = combine(_first(lefts, L // 2), rights)
    odd = parallel_scan_torch(combine, pairs)  # s_1, s_3, …
    if L == 2:
        return pytree.tree_map(_interleave, lefts, odd)
    later = pytree.tree_map(lambda x: x[:, 1:], lefts)  # x_2, x_4, …
    even = combine(_first(odd, (L - 1) // 2), later)  # s_2, s_4, …
    even = pytree.tree_map(lambda x, s: torch.cat([x[:, :1], s], 1), lefts, even)
    return pytree.tree_map(_interleave, even, odd)


def _take(elements: Elements, first: int) -> Elements:
    return pytree.tree_map(lambda x: x[:, first::2], elements)


def _first(elements: Elements, count: int) -> Elements:
    return pytree.tree_map(lambda x: x[:, :count], elements)


def _interleave(even: Tensor, odd: Tensor) -> Tensor:
    """Even elements at 0, 2, …, odd ones at 1, 3, …; one more even one at the end."""
    paired = torch.stack([even[:, : odd.shape[1]], odd], 2).flatten(1, 2)
    return torch.cat([paired, even[:, odd.shape[1] :]], 1)
