"""The specification of the associative scan: a fold over time."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch.utils import _pytree as pytree

Elements = TypeVar("Elements")  # a tensor or a tree of tensors, each (B, L, …)


def parallel_scan_loop(
    combine: Callable[[Elements, Elements], Elements], elements: Elements
) -> Elements:
    """s_0 = x_0, s_t = combine(s_{t-1}, x_t); differentiable at any order."""
    leaves, tree = pytree.tree_flatten(elements)
    steps = zip(*(leaf.split(1, 1) for leaf in leaves), strict=True)
    scanned: list[Elements] = []
    for step in steps:
        x_t = pytree.tree_unflatten(list(step), tree)
        scanned.append(combine(scanned[-1], x_t) if scanned else x_t)
    return pytree.tree_map(lambda *s: torch.cat(s, 1), *scanned)
