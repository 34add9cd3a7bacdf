"""Pre-norm residual blocks, and a stack of them: what every model here is made of."""

import uuid
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ssm._errors import bad_argument
from ssm.layers._base import State
from ssm.layers.norm import RMSNorm
from ssm.models.cache import MambaCache, find_layout
from ssm.models.kinds import ALONE, FEED_FORWARDS, MIXERS, FeedForwardKind, Place
from ssm.models.patterns import Unit
from ssm.ops.add_norm import add_norm


class BlockState(NamedTuple):
    """The states of a block's mixer and feed-forward layer; () where it has none."""

    mixer: State
    ffn: State


class BlockOutput(NamedTuple):
    """y (B, L, D), the state, and the mean load-balancing loss (None: no experts)."""

    y: Tensor
    state: Any
    auxiliary_loss: Tensor | None


class Block(nn.Module):
    """x + mixer(norm(x)), then x + ffn(norm(x)) where there is a feed-forward layer.

    The norms give the parameters' dtype whatever the dtype of the residual stream is.
    Dropout acts on what is added. Zeros on padding stay zeros.
    """

    def __init__(
        self,
        d_model: int,
        unit: Unit,
        *,
        mixer: Mapping[str, Any] | None = None,
        feed_forward: Mapping[str, Any] | None = None,
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        place: Place = ALONE,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_model, self.unit = d_model, unit

        def norm() -> RMSNorm:
            return RMSNorm(d_model, norm_eps, device=device, dtype=dtype)

        self.norm = norm()
        self.mixer = MIXERS[unit.mixer].build(
            d_model, mixer or {}, place, device, dtype
        )
        self.dropout = nn.Dropout(dropout)
        if kind := self.kind:
            self.ffn_norm = norm()
            self.ffn = kind.build(d_model, feed_forward or {}, place, device, dtype)

    @property
    def kind(self) -> FeedForwardKind | None:
        """How the feed-forward layer is called, where there is one."""
        name = self.unit.feed_forward
        return None if name is None else FEED_FORWARDS[name]

    def init_state(self, batch_size: int) -> BlockState:
        """The state before the first step."""
        kind = self.kind
        ffn = () if kind is None else kind.init_state(self.ffn, batch_size)
        return BlockState(self.mixer.init_state(batch_size), ffn)

    def forward(
        self,
        x: Float[Tensor, "B L D"],
        state: BlockState | None = None,
        lengths: Int[Tensor, " B"] | None = None,
    ) -> BlockOutput:
        """The whole sequence at once, continuing from ``state``."""
        mixer, ffn = (None, None) if state is None else state
        kind = self.kind
        h, mixer = self.mixer(_normed(self.norm, x), mixer, lengths)
        x = x + self.dropout(h)
        if kind is None:
            return BlockOutput(x, BlockState(mixer, ()), None)
        h, ffn, loss = kind.forward(self.ffn, _normed(self.ffn_norm, x), ffn, lengths)
        return BlockOutput(x + self.dropout(h), BlockState(mixer, ffn), loss)

    def step(
        self, x_t: Float[Tensor, "B D"], state: BlockState
    ) -> tuple[Float[Tensor, "B D"], BlockState]:
        """One step."""
        x_t, added, state = self.step_open(x_t, None, state)
        return x_t + added, state

    def step_open(
        self,
        x_t: Float[Tensor, "B D"],
        added: Float[Tensor, "B D"] | None,
        state: BlockState,
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B D"], BlockState]:
        """One step of x_t + added; what comes out is such a sum, too.

        So that one kernel forms it and the norm of the block that follows.
        """
        kind = self.kind
        x_t, normed = _sum_normed(self.norm, x_t, added)
        h, mixer = self.mixer.step(normed, state.mixer)
        added = self.dropout(h)
        if kind is None:
            return x_t, added, BlockState(mixer, ())
        x_t, normed = _sum_normed(self.ffn_norm, x_t, added)
        h, ffn = kind.step(self.ffn, normed, state.ffn)
        return x_t, self.dropout(h), BlockState(mixer, ffn)


class BlockStack(nn.Module):
    """Blocks one after the other, with one cache for all of their states."""

    def __init__(self, blocks: Iterable[Block]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.identity = uuid.uuid4().hex  # whose a cache is; copies share it
        self.state_layout = find_layout(self)

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks, by the chapter's name."""
        return self.blocks

    def init_state(self, batch_size: int) -> MambaCache:
        """The states before the first step."""
        return MambaCache(self, batch_size)

    def run(
        self,
        x: Float[Tensor, "B L D"],
        state: MambaCache | None = None,
        lengths: Int[Tensor, " B"] | None = None,
    ) -> BlockOutput:
        """All blocks over whole sequences; the loss is the mean over those with one."""
        cache = self._cache(state, len(x))
        states, losses = [], []
        for i, block in enumerate(self.blocks):
            past = None if state is None else cache.states[i]
            x, new, loss = block(x, past, lengths)
            states.append(new)
            if loss is not None:
                losses.append(loss)
        mean = torch.stack(losses).mean() if losses else None
        return BlockOutput(x, cache.replaced(states, cache.batch_size), mean)

    def run_step(
        self, x_t: Float[Tensor, "B D"], state: MambaCache
    ) -> tuple[Float[Tensor, "B D"], MambaCache]:
        """All blocks over one step."""
        cache, states = self._cache(state, len(x_t)), []
        added: Tensor | None = None
        for block, past in zip(self.blocks, cache.states, strict=True):
            x_t, added, new = block.step_open(x_t, added, past)  # type: ignore[operator]
            states.append(new)
        y_t = x_t if added is None else x_t + added
        return y_t, cache.replaced(states, cache.batch_size)

    def _cache(self, state: MambaCache | None, batch: int) -> MambaCache:
        if state is None:
            return self.init_state(batch)
        if not isinstance(state, MambaCache):
            raise bad_argument(
                "state",
                f"a {type(state).__name__}",
                "a MambaCache",
                f"make it with init_state({batch})",
            )
        state.check(self, batch)
        return state


def _normed(norm: RMSNorm, x: Tensor) -> Tensor:
    return norm(x).to(norm.weight.dtype)


def _sum_normed(
    norm: RMSNorm, x: Tensor, added: Tensor | None
) -> tuple[Tensor, Tensor]:
    return add_norm(x, added, norm.weight, norm.eps)
