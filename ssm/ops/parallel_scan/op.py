"""The associative scan over trees of tensors, with any associative combine."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils import _pytree as pytree

from ssm._errors import bad_argument, check_alike, check_shape
from ssm.ops._dispatch import Backend, Request, choose
from ssm.ops._ragged import (
    check_cu_seqlens,
    check_lengths,
    fill_padding,
    packed_from_padded,
    padded_from_packed,
    valid_steps,
)
from ssm.ops.parallel_scan.naive import parallel_scan_loop
from ssm.ops.parallel_scan.torch import parallel_scan_torch

Elements = TypeVar("Elements")  # a tensor or a tree (tuple, dict …) of tensors

BACKENDS = {
    "torch": Backend(parallel_scan_torch),
    "naive": Backend(parallel_scan_loop),
}


def parallel_scan(
    combine: Callable[[Elements, Elements], Elements] | Tensor,
    elements: Elements,
    *,
    initial: Elements | None = None,
    lengths: Int[Tensor, " B"] | None = None,
    cu_seqlens: Int[Tensor, " S1"] | None = None,
    reverse: bool = False,
    backend: str = "auto",
) -> tuple[Elements, Elements]:
    """s_t = combine(s_{t-1}, x_t) for an associative combine; all s_t and the last.

    ``elements`` is a tensor or a tree of tensors, each (B, L, …), and ``combine(left,
    right)`` maps two trees of (B, n, …) tensors to one, position by position; it need
    not commute. ``initial``, a tree of (B, …) tensors, is folded in front: s_0 =
    combine(initial, x_0). ``reverse`` lets time run backwards: s_t = combine(s_{t+1},
    x_t), and the last is s_0. O(log L) depth, O(L) combines, differentiable as often as
    ``combine`` is.

    Rows end at their ``lengths``: outputs on padding are zero, and the last is the one
    at the row's end. ``cu_seqlens`` packs sequences into one row. A row of no steps
    ends where it began: at ``initial``, or at zeros where there is none.

    ``parallel_scan(a, b)`` with a tensor of decays for ``combine`` is the linear
    recurrence h_t = a_t h_{t-1} + b_t, elementwise: its h and the last h.

    Raises ArgumentError for wrong shapes or devices, or a combine that changes them.
    """
    if isinstance(combine, Tensor):
        return _recurrence(
            combine,
            elements,
            initial,
            lengths=lengths,
            cu_seqlens=cu_seqlens,
            reverse=reverse,
            backend=backend,
        )
    batch, L = _check(elements, initial if cu_seqlens is None else None)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, batch, L)
        scanned, last = parallel_scan(
            combine,
            _map(lambda x: padded_from_packed(x, cu_seqlens), elements),
            initial=initial,
            lengths=cu_seqlens.diff(),
            reverse=reverse,
            backend=backend,
        )
        return _map(lambda s: packed_from_padded(s, cu_seqlens), scanned), last
    leaf = pytree.tree_leaves(elements)[0]
    request = Request(leaf.device, leaf.dtype)
    run = choose("parallel_scan", backend, BACKENDS, request).run
    if lengths is not None:
        check_lengths(lengths, batch, L)
    flip = _Flip(lengths, L) if reverse else (lambda x: x)
    scanned, last = _scan(run, combine, _map(flip, elements), initial, lengths)
    return _map(flip, scanned), last


def _scan(
    run: Callable[..., Any],
    combine: Callable[[Elements, Elements], Elements],
    elements: Elements,
    initial: Elements | None,
    lengths: Tensor | None,
) -> tuple[Elements, Elements]:
    """Scan forwards; ``initial`` enters as the element before the first one.

    Padding is skipped, not combined, since a general combine has no neutral element.
    """
    leaf = pytree.tree_leaves(elements)[0]
    batch, L = leaf.shape[:2]
    if L == 0:
        nothing = _map(lambda x: x.new_zeros(batch, *x.shape[2:]), elements)
        return elements, (nothing if initial is None else initial)
    if lengths is not None:
        valid = valid_steps(lengths, L)
        elements = _map(lambda x: fill_padding(x, valid, 0), elements)
    skip = 0
    if initial is not None:
        skip = 1
        elements = _map(lambda i, x: torch.cat([i[:, None], x], 1), initial, elements)
    combine = _Checked(combine)
    if lengths is None:
        scanned = run(combine, elements)
    else:
        begun = torch.ones(batch, skip, dtype=torch.bool, device=leaf.device)
        flags = torch.cat([begun, valid], 1)
        # Real elements stand in on the padding, so that no combine leaves its domain.
        elements = _map(lambda x: _where(flags, x, x[:, :1]), elements)
        scanned, _ = run(_Skipping(combine), (elements, flags))
    last = _map(lambda s: s[:, -1], scanned)  # padding holds it
    scanned = _map(lambda s: s[:, skip:], scanned)
    if lengths is not None:
        scanned = _map(lambda s: fill_padding(s, valid, 0), scanned)
    return scanned, last


class _Checked:
    """``combine``, held to keep the shapes that it is given."""

    def __init__(self, combine: Callable[[Any, Any], Any]) -> None:
        self.combine = combine

    def __call__(self, left: Any, right: Any) -> Any:
        combined = self.combine(left, right)
        shapes = [_map(lambda x: tuple(x.shape), tree) for tree in (combined, left)]
        if shapes[0] != shapes[1]:
            raise bad_argument(
                "combine",
                f"a result of shapes {shapes[0]}",
                f"those of its arguments, {shapes[1]}",
                "combine position by position",
            )
        return combined


class _Skipping:
    """``combine`` on (elements, valid): what is not valid on the right is left out."""

    def __init__(self, combine: Callable[[Any, Any], Any]) -> None:
        self.combine = combine

    def __call__(self, left: Any, right: Any) -> Any:
        (left, left_valid), (right, right_valid) = left, right
        stand_in = _map(lambda r, x: _where(right_valid, r, x), right, left)
        combined = self.combine(left, stand_in)
        kept = _map(lambda c, x: _where(right_valid, c, x), combined, left)
        return kept, left_valid


class _Flip:
    """Reverse the order of each row's steps; the padding stays behind them."""

    def __init__(self, lengths: Tensor | None, L: int) -> None:
        self.order = None
        if lengths is not None:
            steps = torch.arange(L, device=lengths.device).expand(len(lengths), L)
            ends = lengths[:, None]
            self.order = torch.where(steps < ends, ends - 1 - steps, steps)

    def __call__(self, x: Tensor) -> Tensor:
        if self.order is None:
            return x.flip(1)
        order = self.order.reshape(*self.order.shape, *[1] * (x.ndim - 2))
        return x.gather(1, order.expand(x.shape))


def _where(flags: Tensor, x: Tensor, otherwise: Tensor) -> Tensor:
    return torch.where(flags.reshape(*flags.shape, *[1] * (x.ndim - 2)), x, otherwise)


def _map(function: Callable[..., Any], *trees: Any) -> Any:
    return pytree.tree_map(function, *trees)


def _affine(
    left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """(a1, b1), (a2, b2) -> (a2 a1, a2 b1 + b2): one step after another is one step."""
    return right[0] * left[0], right[0] * left[1] + right[1]


def _recurrence(a: Tensor, b: Any, initial: Any, **options: Any) -> Any:
    if initial is not None:
        initial = (torch.ones_like(initial, dtype=a.dtype), initial)
    (_, h), (_, last) = parallel_scan(_affine, (a, b), initial=initial, **options)
    return h, last


def _check(elements: Any, initial: Any) -> tuple[int, int]:
    """(B, L) of the elements; ArgumentError unless every leaf agrees."""
    leaves, tree = pytree.tree_flatten(elements)
    if not leaves or not all(isinstance(x, Tensor) and x.ndim >= 2 for x in leaves):
        raise bad_argument(
            "elements",
            _map(lambda x: tuple(getattr(x, "shape", ())), elements),
            "a tensor or a tree of tensors, each (B, L, …)",
            "give each a batch and a time dimension",
        )
    batch, L = leaves[0].shape[:2]
    for leaf in leaves:
        check_shape("elements", leaf, (batch, L, *leaf.shape[2:]))
        check_alike(leaves[0], elements=leaf)
    if initial is None:
        return batch, L
    initial_leaves, initial_tree = pytree.tree_flatten(initial)
    if initial_tree != tree:
        raise bad_argument(
            "initial", f"a tree {initial_tree}", f"{tree}, like elements", "match them"
        )
    for start, leaf in zip(initial_leaves, leaves, strict=True):
        check_shape("initial", start, (batch, *leaf.shape[2:]))
        check_alike(leaf, initial=start)
    return batch, L
