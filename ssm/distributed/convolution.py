"""The halo of a causal convolution: the last inputs of the ranks before."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Inexact
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssm._errors import bad_argument, check_alike, check_floating, check_shape
from ssm.distributed._ranks import (
    CommCount,
    Facts,
    Group,
    Ranks,
    Shards,
    facts_of,
    fresh_like,
    tied,
)
from ssm.ops.causal_conv1d import causal_conv1d


class Plan(NamedTuple):
    """Which steps go from whom to whom.

    Rank 0 also holds the ``keep`` = W - 1 steps before the sequence, so that every
    rank's window of ``keep`` steps lies within what the ranks hold.
    """

    ranks: Ranks
    shards: Shards
    keep: int

    def steps(self, source: int, target: int) -> range:
        """The steps of ``target``'s window that ``source`` holds, counted globally."""
        start = self.first(source)
        stop = self.shards.starts[source] + self.shards.lengths[source]
        window = self.shards.starts[target]
        return range(max(start, window - self.keep), min(stop, window))

    def first(self, rank: int) -> int:
        """The first step that a rank holds."""
        return self.shards.starts[rank] if rank else -self.keep

    def held(self, x: Tensor, target: int) -> Tensor:
        """What this rank has for ``target``'s window; x (B, what it holds, …)."""
        steps, first = self.steps(self.ranks.rank, target), self.first(self.ranks.rank)
        return x[:, steps.start - first : steps.stop - first]

    def window(self, y: Tensor, source: int) -> Tensor:
        """The part of this rank's window y (B, keep, …) that comes from ``source``."""
        first = self.shards.starts[self.ranks.rank] - self.keep
        steps = self.steps(source, self.ranks.rank)
        return y[:, steps.start - first : steps.stop - first]

    def sources(self) -> list[int]:
        """The other ranks that have a part of this rank's window."""
        rank = self.ranks.rank
        return [s for s in range(self.ranks.size) if s != rank and self.steps(s, rank)]

    def targets(self) -> list[int]:
        """The other ranks of whose windows this one has a part."""
        rank = self.ranks.rank
        return [t for t in range(self.ranks.size) if t != rank and self.steps(rank, t)]


def halo(
    x: Inexact[Tensor, "B L D"],
    width: int,
    group: Group = None,
    *,
    initial_state: Inexact[Tensor, "B W1 D"] | None = None,
    count: CommCount | None = None,
) -> Inexact[Tensor, "B W1 D"]:
    """x_{s-W+1}, …, x_{s-1}: the W - 1 steps before this rank's first one, W = width.

    What ``causal_conv1d`` of this rank's shard takes as its initial state. Where the
    rank before holds fewer than W - 1 steps, those before it help out. Before the whole
    sequence stands ``initial_state`` (zeros if None), which rank 0 alone reads, in the
    dtype of x. To each rank at most W - 1 steps are sent, whatever the length.

    Raises ArgumentError on every rank for shapes, dtypes or devices that do not fit.
    """
    ranks = Ranks.of(group, count)

    def prepare() -> tuple[Facts, Tensor]:
        past = _history(x, width, initial_state)
        facts = facts_of(x.shape[1], x=x, initial_state=past)
        return facts.and_alike(width=width), past

    shards, past = ranks.agree(prepare)
    return _Halo.apply(x, past, shards.anchor(), Plan(ranks, shards, width - 1))


class _Halo(torch.autograd.Function):
    """A choice of steps from the whole sequence; backward goes the same ways back."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, past: Tensor, _anchor: Tensor, plan: Plan
    ) -> Tensor:
        ctx.plan, ctx.length = plan, x.shape[1]
        if plan.ranks.rank == 0:
            x = torch.cat([past, x], 1)
        window = x.new_zeros(past.shape)
        here = plan.window(window, plan.ranks.rank)
        here.copy_(plan.held(x, plan.ranks.rank))
        parts = {s: [fresh_like(plan.window(past, s))] for s in plan.sources()}
        plan.ranks.exchange(
            {t: [plan.held(x, t)] for t in plan.targets()}, parts
        ).wait()
        for source, (part,) in parts.items():
            plan.window(window, source).copy_(part)
        return window

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        plan: Plan = ctx.plan
        rank, keep = plan.ranks.rank, plan.keep
        held = ctx.length + (keep if rank == 0 else 0)
        dx = dy.new_zeros(len(dy), held, *dy.shape[2:])
        plan.held(dx, rank).add_(plan.window(dy, rank))
        parts = {t: [fresh_like(plan.held(dx, t))] for t in plan.targets()}
        plan.ranks.exchange(
            {s: [plan.window(dy, s)] for s in plan.sources()}, parts
        ).wait()
        for target, (part,) in parts.items():
            plan.held(dx, target).add_(part)
        if rank == 0:
            return dx[:, keep:], dx[:, :keep], None, None
        return dx, None, None, None


def sharded_conv1d(
    x: Inexact[Tensor, "B L D"],
    weight: Inexact[Tensor, "D W"],
    bias: Inexact[Tensor, " D"] | None = None,
    group: Group = None,
    *,
    initial_state: Inexact[Tensor, "B W1 D"] | None = None,
    backend: str = "auto",
    count: CommCount | None = None,
) -> tuple[Inexact[Tensor, "B L D"], Inexact[Tensor, "B W1 D"]]:
    """:func:`ssm.ops.causal_conv1d` of a sequence sharded in time.

    Returns this rank's outputs, and the state behind its shard. Weights are the same on
    every rank: their gradients, once added over the ranks, are those of one process.
    """
    past = halo(x, weight.shape[-1], group, initial_state=initial_state, count=count)
    y, final = causal_conv1d(x, weight, bias, initial_state=past, backend=backend)
    return tied(y, past), final


def _history(x: Tensor, width: int, initial_state: Tensor | None) -> Tensor:
    """The steps before the sequence, (B, W - 1, D). Raises ArgumentError."""
    check_shape("x", x, (None, None, None))
    check_floating(x=x, initial_state=initial_state)
    check_alike(x, initial_state=initial_state)
    if width < 1:
        raise bad_argument("width", width, "1 or more", "count the taps")
    batch, _, D = x.shape
    if initial_state is None:
        return x.new_zeros(batch, width - 1, D)
    check_shape("initial_state", initial_state, (batch, width - 1, D))
    return initial_state.to(x.dtype)
