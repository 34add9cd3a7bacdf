"""Causal softmax attention with a cache that grows."""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from ssm._errors import bad_argument
from ssm.layers._base import KernelLayer
from ssm.layers._padded import PaddedLayer
from ssm.layers._positions import POSITIONS
from ssm.ops._ragged import fill_padding, valid_steps

Positions = Literal["rotary", "sinusoidal", "learned", "none"]


class AttentionState(NamedTuple):
    """Keys and values of each row's first ``length`` steps; behind them zeros.

    k and v (B, S, Hkv, P), S the steps fed so far, padding included; length (B,) int64.
    Grows by one entry a step.
    """

    k: Tensor
    v: Tensor
    length: Tensor


class Attention(PaddedLayer, KernelLayer):
    """y_t = W_o concat_h sum_{s<=t} softmax_s(q_t k_s / sqrt(P)) v_s.

    Multi-head attention (arXiv:1706.03762, section 3.2); ``n_kv_heads`` < ``n_heads``
    lets heads share keys and values (arXiv:2305.13245); ``d_head`` (P) is d_model /
    n_heads, rounded up. ``positions``: "rotary" turns q and k; "sinusoidal" and
    "learned" are added to the input of W_q and W_k (not of W_v, so that values carry
    content alone); "none" leaves the order to the mask. A row's positions count its own
    steps and go on from its state; "learned" ends at ``max_positions`` with an
    ArgumentError.

    Rows may hold different numbers of steps: each appends at its own end and sees its
    own steps only. The state grows (:class:`AttentionState`).
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int = 4,
        n_kv_heads: int | None = None,
        positions: Positions = "rotary",
        max_positions: int = 8192,
        d_head: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_model, self.n_heads = d_model, n_heads
        self.n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        self.d_head = -(-d_model // n_heads) if d_head is None else d_head
        if self.n_kv_heads < 1 or n_heads % self.n_kv_heads:
            raise bad_argument(
                "n_kv_heads",
                self.n_kv_heads,
                f"a divisor of n_heads = {n_heads}",
                "let every key head serve equally many heads",
            )
        if positions not in POSITIONS:
            raise bad_argument(
                "positions", repr(positions), ", ".join(POSITIONS), "choose one"
            )

        def linear(n: int, m: int) -> nn.Linear:
            return nn.Linear(n, m, bias=False, device=device, dtype=dtype)

        self.q_proj = linear(d_model, n_heads * self.d_head)
        self.k_proj = linear(d_model, self.n_kv_heads * self.d_head)
        self.v_proj = linear(d_model, self.n_kv_heads * self.d_head)
        self.out_proj = linear(n_heads * self.d_head, d_model)
        self.positions = POSITIONS[positions](
            d_model, max_positions, device=device, dtype=dtype
        )

    def reset_parameters(self) -> None:
        """Nothing: the projections and the table of positions have their own."""

    def init_state(self, batch_size: int) -> AttentionState:
        """An empty cache."""
        weight = self.k_proj.weight
        empty = weight.new_zeros(batch_size, 0, self.n_kv_heads, self.d_head)
        length = torch.zeros(batch_size, dtype=torch.int64, device=weight.device)
        return AttentionState(empty, empty, length)

    def advance(
        self,
        x: Float[Tensor, "B L D"],
        past: AttentionState,
        lengths: Int[Tensor, " B"] | None,
    ) -> tuple[Float[Tensor, "B L D"], AttentionState]:
        """Append keys and values, then attend; without a past by SDPA's own mask."""
        L = x.shape[1]
        valid = None if lengths is None else valid_steps(lengths, L)
        q, k, v = self._project(x, past, valid)
        mask = None
        if past.k.shape[1]:
            k, v = _append(past.k, k, past.length), _append(past.v, v, past.length)
            mask = _causal_mask(past.length, L, k.shape[1])
        y = self.out_proj(self._attend(q, k, v, mask))
        added = L if lengths is None else lengths
        return y, AttentionState(k, v, past.length + added)

    def kernel_matrix(
        self, x: Float[Tensor, "B L D"]
    ) -> tuple[Float[Tensor, "B H L L"], Float[Tensor, "B L H P"]]:
        """The softmax matrix of each head, and its values."""
        self.check_input(x)
        q, k, v = self._project(x, self.init_state(len(x)), None)
        shared = self.n_heads // self.n_kv_heads
        k, v = k.repeat_interleave(shared, 2), v.repeat_interleave(shared, 2)
        scores = torch.einsum("bthp,bshp->bhts", q, k) / self.d_head**0.5
        causal = torch.ones_like(scores, dtype=torch.bool).tril()
        return scores.masked_fill(~causal, -torch.inf).softmax(-1), v

    def readout(
        self,
        mixed: Float[Tensor, "B L H P"],
        x: Float[Tensor, "B L D"],  # noqa: ARG002  # the contract's signature
    ) -> Float[Tensor, "B L D"]:
        """The heads side by side, projected."""
        return self.out_proj(mixed.flatten(2))

    def _project(
        self, x: Tensor, past: AttentionState, valid: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (B, L, heads, P) at their positions; k and v are 0 on padding."""
        batch, L, _ = x.shape
        at = torch.arange(L, device=x.device)[None]
        if past.k.shape[1]:
            at = past.length[:, None] + at
        if valid is not None:
            at = fill_padding(at.expand(batch, L), valid, 0)
        placed = self.positions.add(x, at, past.k.shape[1] + L)
        heads = (-1, self.d_head)
        q = self.positions.rotate(self.q_proj(placed).unflatten(-1, heads), at)
        k = self.positions.rotate(self.k_proj(placed).unflatten(-1, heads), at)
        v = self.v_proj(x).unflatten(-1, heads)
        if valid is None:
            return q, k, v
        return q, fill_padding(k, valid, 0.0), fill_padding(v, valid, 0.0)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """The heads' outputs side by side (B, L, H P)."""
        mixed = functional.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=self.n_kv_heads != self.n_heads,
        )
        return mixed.transpose(1, 2).flatten(2)


def _append(
    cache: Float[Tensor, "B S H P"],
    new: Float[Tensor, "B L H P"],
    length: Int[Tensor, " B"],
) -> Float[Tensor, "B S+L H P"]:
    """Each row's new entries behind its own ``length``; a copy."""
    L = new.shape[1]
    grown = functional.pad(cache, (0, 0, 0, 0, 0, L))
    places = length[:, None] + torch.arange(L, device=new.device)
    index = places[:, :, None, None].expand(new.shape)
    return grown.scatter_(1, index, new.to(cache.dtype))


def _causal_mask(length: Int[Tensor, " B"], L: int, S: int) -> Bool[Tensor, "B 1 L S"]:
    """True where query t, which stands at length + t, may see entry s."""
    last = length[:, None] + torch.arange(L, device=length.device)
    return (torch.arange(S, device=length.device) <= last[..., None])[:, None]
