"""Ring attention: blocks of keys and values go round, and meet every query once."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssm._errors import bad_argument, check_alike, check_floating, check_shape
from ssm.distributed._ranks import (
    CommCount,
    Facts,
    Group,
    Pending,
    Ranks,
    Shards,
    facts_of,
)
from ssm.ops._dtypes import compute_dtype


class Plan(NamedTuple):
    """Who holds which steps, which of them a query sees, how many keys at a time."""

    ranks: Ranks
    shards: Shards
    causal: bool
    tile: int

    def rounds(self, *block: Tensor) -> Iterator[tuple[int, Sequence[Tensor]]]:
        """(its rank, block) for every rank's block, one's own first.

        While one block is worked on, the next one is under way.
        """
        rank, size = self.ranks.rank, self.ranks.size
        for hop in range(size):
            source = (rank - hop) % size
            coming = None
            if hop < size - 1:
                coming = self.rotate(block, self.shards.lengths[(source - 1) % size])
            yield source, block
            if coming is not None:
                pending, block = coming
                pending.wait()

    def rotate(
        self, block: Sequence[Tensor], length: int
    ) -> tuple[Pending, tuple[Tensor, ...]]:
        """Send the block on; another one, of ``length`` steps, comes from behind."""
        rank, size = self.ranks.rank, self.ranks.size
        fresh = tuple(x.new_empty(len(x), length, *x.shape[2:]) for x in block)
        after, before = (rank + 1) % size, (rank - 1) % size
        return self.ranks.exchange({after: block}, {before: fresh}), fresh

    def tiles(
        self, source: int, device: torch.device
    ) -> Iterator[tuple[slice, Bool[Tensor, "L S"] | None]]:
        """The parts of a block that some query sees, and what is hidden in them."""
        first = self.shards.starts[self.ranks.rank]
        behind = first + self.shards.lengths[self.ranks.rank]
        offset, length = self.shards.starts[source], self.shards.lengths[source]
        for start in range(0, length, self.tile):
            stop = min(start + self.tile, length)
            if not self.causal or offset + stop <= first + 1:
                yield slice(start, stop), None
            elif offset + start < behind:
                keys = torch.arange(offset + start, offset + stop, device=device)
                queries = torch.arange(first, behind, device=device)
                yield slice(start, stop), keys > queries[:, None]


def ring_attention(
    q: Float[Tensor, "B L H P"],
    k: Float[Tensor, "B L K P"],
    v: Float[Tensor, "B L K V"],
    group: Group = None,
    *,
    causal: bool = True,
    tile: int = 1024,
    count: CommCount | None = None,
) -> Float[Tensor, "B L H V"]:
    """y_t = sum_s softmax_s(q_t k_s / sqrt(P)) v_s over all ranks' steps s (<= t).

    Each rank passes its shard; see :mod:`ssm.distributed`. Heads of q share those of k
    and v in groups of H / K. Each rank sends R - 1 blocks of keys and values forward,
    and backward as many, beside R blocks of their gradients: bytes in O(L), whatever
    L^2 is. A rank never holds more than its own and two other blocks, and scores for
    ``tile`` keys at a time; running maximum, sum and output are float32 at least.

    Liu et al. 2023, "Ring Attention with Blockwise Transformers" (arXiv:2310.01889).
    With ``causal``, rank r works in r + 1 of the R rounds: the last rank's time is the
    ring's (striping the sequence would even that out, arXiv:2311.09431).

    Raises ArgumentError on every rank for shapes, dtypes or devices that do not fit.
    No second derivatives.
    """
    ranks = Ranks.of(group, count)

    def prepare() -> tuple[Facts, None]:
        _check(q, k, v, tile)
        facts = facts_of(q.shape[1], q=q, k=k, v=v)
        return facts.and_alike(causal=causal), None

    shards, _ = ranks.agree(prepare)
    plan = Plan(ranks, shards, causal, tile)
    return _RingAttention.apply(q, k, v, shards.anchor(), plan)


class _RingAttention(torch.autograd.Function):
    """The forward pass keeps log sum exp; the backward pass forms p from it anew."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, _anchor: Tensor, plan: Plan
    ) -> Tensor:
        dtype = compute_dtype(q, k, v)
        queries = _in_groups(q, k.shape[2]).to(dtype) * q.shape[-1] ** -0.5
        highest = torch.full_like(queries[..., :1], -torch.inf)
        total = torch.zeros_like(highest)
        y = queries.new_zeros(*queries.shape[:-1], v.shape[-1])
        # Every query sees the first tile of its own rank, which comes first: from
        # there on the maximum is finite, and a hidden score adds exp(-inf) = 0.
        for source, block in plan.rounds(k, v):
            keys, values = (x.to(dtype) for x in block)
            for part, hidden in plan.tiles(source, q.device):
                scores = _scores(queries, keys[:, part], hidden)
                higher = torch.maximum(highest, scores.amax(-1, keepdim=True))
                p, shrunk = (scores - higher).exp_(), (highest - higher).exp_()
                total = total * shrunk + p.sum(-1, keepdim=True)
                y = y * shrunk + torch.einsum("bkgls,bskv->bkglv", p, values[:, part])
                highest = higher
        y = y / total
        ctx.plan = plan
        ctx.save_for_backward(q, k, v, y, highest + total.log())
        return _side_by_side(y).to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """ds = p (dy v - dy y); a block's dk and dv go on with it until it is home."""
        q, k, v, y, log_sum = ctx.saved_tensors
        plan: Plan = ctx.plan
        scale = q.shape[-1] ** -0.5
        queries = _in_groups(q, k.shape[2]).to(y.dtype) * scale
        dy = _in_groups(dy, k.shape[2]).to(y.dtype)
        dy_y = (dy * y).sum(-1, keepdim=True)
        dq = torch.zeros_like(queries)
        dk, dv = (torch.zeros_like(x, dtype=y.dtype) for x in (k, v))
        for source, block in plan.rounds(k, v):
            keys, values = (x.to(y.dtype) for x in block)
            for part, hidden in plan.tiles(source, q.device):
                p = (_scores(queries, keys[:, part], hidden) - log_sum).exp_()
                dp = torch.einsum("bkglv,bskv->bkgls", dy, values[:, part])
                ds = p * (dp - dy_y)
                dq += torch.einsum("bkgls,bskp->bkglp", ds, keys[:, part])
                dk[:, part] += torch.einsum("bkgls,bkglp->bskp", ds, queries)
                dv[:, part] += torch.einsum("bkgls,bkglv->bskv", p, dy)
            if plan.ranks.size > 1:
                following = plan.shards.lengths[(source - 1) % plan.ranks.size]
                pending, (dk, dv) = plan.rotate((dk, dv), following)
                pending.wait()
        dq = _side_by_side(dq * scale).to(q.dtype)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None


def _in_groups(x: Float[Tensor, "B L H P"], K: int) -> Float[Tensor, "B K G L P"]:
    """The heads that share keys beside each other."""
    return x.unflatten(2, (K, x.shape[2] // K)).permute(0, 2, 3, 1, 4)


def _side_by_side(x: Float[Tensor, "B K G L P"]) -> Float[Tensor, "B L H P"]:
    return x.permute(0, 3, 1, 2, 4).flatten(2, 3)


def _scores(
    queries: Float[Tensor, "B K G L P"],
    keys: Float[Tensor, "B S K P"],
    hidden: Bool[Tensor, "L S"] | None,
) -> Float[Tensor, "B K G L S"]:
    scores = torch.einsum("bkglp,bskp->bkgls", queries, keys)
    if hidden is None:
        return scores
    return scores.masked_fill_(hidden, -torch.inf)


def _check(q: Tensor, k: Tensor, v: Tensor, tile: int) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_shape(name, x, (None, None, None, None))
        if x.is_complex():
            raise bad_argument(name, f"dtype {x.dtype}", "a real dtype", "convert it")
    check_floating(q=q, k=k, v=v)
    check_alike(q, k=k, v=v)
    batch, L, H, P = q.shape
    check_shape("k", k, (batch, L, None, P))
    K = k.shape[2]
    check_shape("v", v, (batch, L, K, None))
    if K == 0 or H % K:
        raise bad_argument(
            "k", f"{K} heads", f"a divisor of the {H} heads of q", "regroup them"
        )
    if tile < 1:
        raise bad_argument("tile", tile, "1 or more", "try 1024")
