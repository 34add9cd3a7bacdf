"""Scans over a sequence sharded in time: one pair of states passes between ranks.

A shard takes the state h before it to A h + s, elementwise: s is where it ends from
zero, A the product of its decays. Such maps compose as (A', s') (A, s) = (A' A,
A' s + s'), which is associative: the ranks combine theirs by doubling, in log2 R
rounds, each in the size of the state, whatever the length is.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Inexact
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssm._errors import check_alike, check_shape
from ssm.distributed._ranks import CommCount, Facts, Group, Ranks, facts_of, tied
from ssm.distributed.convolution import halo
from ssm.layers.mamba import Mamba, MambaState
from ssm.layers.selective_ssm import negative_exp
from ssm.ops._dtypes import compute_dtype
from ssm.ops.linear_scan import linear_scan
from ssm.ops.selective_scan.torch import step_size

Scan = Callable[[Tensor | None], tuple[Tensor, Tensor]]


def carry(
    decay: Inexact[Tensor, "B *C"],
    state: Inexact[Tensor, "B *C"],
    group: Group = None,
    *,
    initial_state: Inexact[Tensor, "B *C"] | None = None,
    count: CommCount | None = None,
) -> Inexact[Tensor, "B *C"]:
    """h_{r-1} of h_r = decay_r h_{r-1} + state_r: the state before each rank's shard.

    h_{-1} is ``initial_state`` (zeros if None), which rank 0 alone reads. Each rank
    sends at most 2 log2 R + 1 states, forward and backward each.

    Raises ArgumentError on every rank for shapes, dtypes or devices that do not fit.
    """
    return _carry(lambda: (decay, state), Ranks.of(group, count), initial_state)


def sharded(
    scan: Scan,
    decay: Callable[[], Tensor],
    group: Group = None,
    *,
    initial_state: Tensor | None = None,
    count: CommCount | None = None,
) -> tuple[Tensor, Tensor]:
    """``scan(initial_state) -> (y, final_state)`` of a shard as of the whole sequence.

    Works for every scan whose final state is affine in its initial one, elementwise
    with the factor ``decay()``. The shard is scanned twice: from zero, for the state
    where it ends, and from the state that the ranks before end in: twice the work of
    one scan. The final state is that behind this rank's shard: the last rank's is the
    sequence's. Both functions are first called where an ArgumentError of one rank
    reaches all.
    """

    def ends() -> tuple[Tensor, Tensor]:
        local = scan(None)[1]
        return decay(), local

    before = _carry(ends, Ranks.of(group, count), initial_state)
    y, final = scan(before)
    return tied(y, before), final


def sharded_scan(
    a: Inexact[Tensor, "B L *C"] | None,
    b: Inexact[Tensor, "B L *C"],
    group: Group = None,
    *,
    log_a: Inexact[Tensor, "B L *C"] | None = None,
    initial_state: Inexact[Tensor, "B *C"] | None = None,
    backend: str = "auto",
    count: CommCount | None = None,
) -> tuple[Inexact[Tensor, "B L *C"], Inexact[Tensor, "B *C"]]:
    """h_t = a_t h_{t-1} + b_t over all ranks' steps: this rank's h_t, and its last.

    :func:`ssm.ops.linear_scan` of a sequence sharded in time; see :func:`sharded`.
    Any decays: 0, negative, complex.
    """

    def scan(h: Tensor | None) -> tuple[Tensor, Tensor]:
        return linear_scan(a, b, log_a=log_a, initial_state=h, backend=backend)

    def decay() -> Tensor:
        if a is not None:
            return a.to(compute_dtype(a)).prod(1)
        assert log_a is not None, "linear_scan has refused neither"
        return log_a.to(compute_dtype(log_a)).sum(1).exp()

    return sharded(scan, decay, group, initial_state=initial_state, count=count)


def selective_decay(
    delta: Float[Tensor, "B L D"],
    A: Inexact[Tensor, "D N"],
    delta_bias: Float[Tensor, " D"] | None = None,
    delta_softplus: bool = False,
) -> Inexact[Tensor, "B D N"]:
    """prod_t exp(delta_t A): the decay of a whole shard of a selective scan.

    For ``sharded(lambda h: selective_scan(u, delta, A, B, C, initial_state=h), lambda:
    selective_decay(delta, A))``. delta as :func:`ssm.ops.selective_scan` takes it.
    """
    elapsed = step_size(delta.to(compute_dtype(delta)), delta_bias, delta_softplus)
    return (elapsed.sum(1)[..., None] * A).exp()


def sharded_mamba(
    layer: Mamba,
    x: Float[Tensor, "B L D"],
    group: Group = None,
    *,
    state: MambaState | None = None,
    count: CommCount | None = None,
) -> tuple[Float[Tensor, "B L D"], MambaState]:
    """``layer(x, state)`` of a sequence sharded in time: halo, then state.

    Every rank has the same layer; its gradients, once added over the ranks, are those
    of one process. ``state`` is read on rank 0; the one returned stands behind this
    rank's shard.
    """
    ranks = Ranks.of(group, count)

    def project() -> tuple[Facts, tuple[Tensor, Tensor]]:
        layer.check_input(x, state)
        u, z = layer.in_proj(x).chunk(2, -1)
        return Facts(x.shape[1], {}), (u, z)

    _, (u, z) = ranks.agree(project)
    conv, h = (None, None) if state is None else state
    past = halo(u, layer.d_conv, group, initial_state=conv, count=ranks.count)
    u, conv = layer.conv1d(u, past, None)

    def decay() -> Tensor:
        A, bias = negative_exp(layer.A_log), layer.dt_proj.bias
        return selective_decay(layer._project(u)[0], A, bias, True)

    y, h = sharded(
        lambda h: layer._scan(u, z, h, None),
        decay,
        group,
        initial_state=h,
        count=ranks.count,
    )
    return tied(layer.out_proj(y), past), MambaState(conv, h)


def _carry(
    ends: Callable[[], tuple[Tensor, Tensor]], ranks: Ranks, initial: Tensor | None
) -> Tensor:
    """:func:`carry` of what ``ends`` gives."""

    def prepare() -> tuple[Facts, tuple[Tensor, Tensor, Tensor]]:
        decay, state = ends()
        first = torch.zeros_like(state) if initial is None else initial
        check_alike(state, decay=decay, initial_state=first)
        check_shape("decay", decay, state.shape)
        check_shape("initial_state", first, state.shape)
        dtype = compute_dtype(decay, state, first)
        decay, state, first = (x.to(dtype) for x in (decay, state, first))
        facts = facts_of(None, decay=decay, state=state, initial_state=first)
        return facts, (decay, state, first)

    shards, tensors = ranks.agree(prepare)
    return _Carry.apply(*tensors, shards.anchor(), ranks)


class _Carry(torch.autograd.Function):
    """g_r = dh_{r-1} + conj(decay_r) g_{r+1}: backward is the same scan, reversed."""

    @staticmethod
    def forward(
        ctx: Any,
        decay: Tensor,
        state: Tensor,
        initial: Tensor,
        _anchor: Tensor,
        ranks: Ranks,
    ) -> Tensor:
        if ranks.rank == 0:
            state = torch.addcmul(state, decay, initial)
        behind = ranks.shift([_over_ranks(ranks, decay, state, 1)], 1)
        before = initial.clone() if behind is None else behind[0]
        ctx.ranks = ranks
        ctx.save_for_backward(decay, before)
        return before

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dbefore: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
        decay, before = ctx.saved_tensors
        ranks: Ranks = ctx.ranks
        total = _over_ranks(ranks, decay.conj_physical(), dbefore, -1)
        ahead = ranks.shift([total], -1)
        after = torch.zeros_like(total) if ahead is None else ahead[0]
        first = total if ranks.rank == 0 else None
        return after * before.conj(), after, first, None, None


def _over_ranks(ranks: Ranks, decay: Tensor, state: Tensor, direction: int) -> Tensor:
    """h_r = decay_r h_{r - direction} + state_r by doubling (Hillis & Steele 1986)."""
    distance = 1
    while distance < ranks.size:
        behind = ranks.shift([decay, state], direction * distance)
        if behind is not None:
            state = torch.addcmul(state, decay, behind[1])
            decay = decay * behind[0]
        distance *= 2
    return state
