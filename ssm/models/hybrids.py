"""The hybrid models of chapter 19, section 19.8, under their names there."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ssm.layers.mamba import Mamba
from ssm.models.blocks import Block, BlockOutput, BlockStack
from ssm.models.cache import MambaCache
from ssm.models.patterns import Unit, resolve_pattern

MambaBlock = Mamba  # section 19.6.1: the block with its gate is the Mamba layer


class JambaBlock(Block):
    """x + mixer(norm(x)), then x + experts(norm(x)); Mamba or attention mixes.

    ``feed_forward`` is "moe" (the chapter's) or "mlp" ("can also be dense"). Further
    options are :class:`Block`'s.

    Differs: each half has a norm of its own; the chapter's share one, so that its gain
    serves two different layers (Jamba, arXiv:2403.19887, figure 1, has two).
    """

    def __init__(
        self,
        d_model: int,
        use_attention: bool = False,
        feed_forward: str = "moe",
        **options: Any,
    ) -> None:
        mixer = "attention" if use_attention else "mamba"
        super().__init__(d_model, Unit(mixer, feed_forward), **options)


class JambaModel(BlockStack):
    """``num_layers`` Jamba blocks, attention where i % 8 == 7; no embedding, no head.

    ``moe_every=2``: experts in every second layer only, as the Jamba paper has it;
    0: none. As a language model: ``SequenceLMConfig(pattern="jamba")``.
    """

    def __init__(
        self,
        d_model: int,
        num_layers: int = 32,
        *,
        moe_every: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        units = resolve_pattern("jamba", num_layers, moe_every)
        super().__init__(Block(d_model, u, device=device, dtype=dtype) for u in units)

    def forward(
        self,
        x: Float[Tensor, "B L D"],
        state: MambaCache | None = None,
        lengths: Int[Tensor, " B"] | None = None,
    ) -> BlockOutput:
        """(y, cache, the mean load-balancing loss)."""
        return self.run(x, state, lengths)

    def step(
        self, x_t: Float[Tensor, "B D"], state: MambaCache
    ) -> tuple[Float[Tensor, "B D"], MambaCache]:
        """One step."""
        return self.run_step(x_t, state)


class StripedHyenaBlock(Block):
    """Hyena where ``layer_idx`` is even, attention where it is odd, then a GLU MLP.

    Options are :class:`Block`'s.

    Differs: the chapter shows the mixer only; the norms, residual sums and the gated
    feed-forward layer are StripedHyena's (Together, 2023).
    """

    def __init__(self, d_model: int, layer_idx: int, **options: Any) -> None:
        mixer = ("hyena", "attention")[layer_idx % 2]
        super().__init__(d_model, Unit(mixer, "mlp"), **options)
