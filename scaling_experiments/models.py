"""Document 3's two models under its names: a bare selective SSM, a small transformer.

    MambaModel         logits_t = W h_t + b,  h = SelectiveSSM(embedding(tokens))
    SmallTransformer   logits_t = W z_t + b,  z = two blocks of attention over the same

Both map tokens (B, L) to logits (B, L, V) of the next token, at every position. What
costs the most in them at any length is the head, 128 x 50,257; so the parts can be
called (and timed) apart: ``embed``, ``mix`` (all that lies between embedding and head,
where time is mixed), and ``head``. ``hidden`` is the first two.

The sizes are document 3's. What it does not say is ours, and said where it happens.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import softplus

from ssm._errors import bad_argument, check_shape
from ssm.layers._base import State, check_state
from ssm.layers._positions import POSITIONS
from ssm.layers.attention import Attention, AttentionState
from ssm.layers.selective_ssm import (
    check_sizes,
    negative_exp,
    segment_sums,
    wide_dtype,
)
from ssm.ops._dtypes import compute_dtype
from ssm.ops.linear_scan import linear_scan
from ssm.ops.selective_scan import selective_scan

GPT2_VOCABULARY = 50_257
_SLOWEST = 1 / 16  # -A of the state that first remembers longest


# --- the selective SSM ----------------------------------------------------------------


class SelectiveState(NamedTuple):
    """The hidden state h (B, N), which is also the last output."""

    h: Float[Tensor, "B N"]


class SelectiveSSM(nn.Module):
    """h_t = exp(delta_t A) h_{t-1} + delta_t B_t, y = h; B_t, delta_t linear in x_t.

    x (B, L, d_model) -> y (B, L, d_state). Each of the d_state numbers has its own
    decay A < 0, its own step delta_t = softplus(linear_delta(x_t)) and its own input
    B_t = linear_B(x_t): B_bar x of the general recurrence is delta_t B_t here, since
    B_t is made of x_t already. There is no C, D, gate or convolution (document 3,
    "Selective SSM"; Gu & Dao 2023, arXiv:2312.00752, algorithm 2, has them).

    ``form`` is how the recurrence is computed, one of :data:`FORMS`, with equal
    results: "scan" (the fastest backend of ``selective_scan``), "chunked" (chunks of 32
    steps in PyTorch's operations), "dual" (the L x L matrix of every state,
    materialised: quadratic in time and memory), "loop" (document 3's own).

    Differs: the document leaves A's start open. Here -A falls from 1 to 1/16 in equal
    ratios: with the first steps, near softplus(0) = 0.69, the states remember from 1 to
    about 23 steps. (Longer ones sum up so much that the first logits are far too sure.)
    """

    no_weight_decay: ClassVar[frozenset[str]] = frozenset({"A_log"})

    def __init__(
        self,
        d_model: int = 64,
        d_state: int = 128,
        *,
        form: str = "scan",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(d_model=d_model, d_state=d_state)
        if form not in FORMS:
            raise bad_argument("form", repr(form), ", ".join(FORMS), "choose one")
        self.d_model, self.d_state, self.form = d_model, d_state, form
        self.linear_B = nn.Linear(d_model, d_state, device=device, dtype=dtype)
        self.linear_delta = nn.Linear(d_model, d_state, device=device, dtype=dtype)
        wide = wide_dtype(dtype)
        self.A_log = nn.Parameter(torch.empty(d_state, device=device, dtype=wide))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A as the class says; the linear maps have their own."""
        with torch.no_grad():
            falling = torch.linspace(0.0, 1.0, self.d_state, dtype=torch.float64)
            self.A_log.copy_(falling * math.log(_SLOWEST))

    @property
    def A(self) -> Float[Tensor, " N"]:
        """The decays' rates, all below 0; in float32 at least."""
        return negative_exp(self.A_log)

    def init_state(self, batch_size: int) -> SelectiveState:
        """Zeros."""
        shape, dtype = (batch_size, self.d_state), compute_dtype(self.A_log)
        return SelectiveState(torch.zeros(shape, device=self.A_log.device, dtype=dtype))

    def forward(
        self, x: Float[Tensor, "B L D"], state: SelectiveState | None = None
    ) -> tuple[Float[Tensor, "B L N"], SelectiveState]:
        """The whole sequence at once, continuing from ``state``."""
        check_shape("x", x, (None, None, self.d_model))
        check_state(state, len(x))
        past = self.init_state(len(x)) if state is None else state
        y, h = FORMS[self.form](self, x, past.h)
        return y, SelectiveState(h)

    def step(
        self, x_t: Float[Tensor, "B D"], state: SelectiveState
    ) -> tuple[Float[Tensor, "B N"], SelectiveState]:
        """One step."""
        check_shape("x_t", x_t, (None, self.d_model))
        check_state(state, len(x_t))
        h = _advance(self, x_t, self.A, state.h)
        return h.to(x_t.dtype), SelectiveState(h)

    def kernel_matrix(
        self, x: Float[Tensor, "B L D"]
    ) -> tuple[Float[Tensor, "B N L L"], Float[Tensor, "B L N 1"]]:
        """M[b, n, t, s] = exp(A_n sum_{s<r<=t} delta_r) for s <= t, and delta_s B_s.

        y_t = sum_s M[t, s] v_s: the quadratic dual, one head a state.
        """
        delta = softplus(self.linear_delta(x))
        elapsed = segment_sums(delta)
        matrix = torch.exp(self.A[:, None, None] * elapsed).tril()
        return matrix, (delta * self.linear_B(x))[..., None]


def naive_selective_loop(
    layer: SelectiveSSM,
    x: Float[Tensor, "B L D"],
    h: Float[Tensor, "B N"] | None = None,
) -> tuple[Float[Tensor, "B L N"], Float[Tensor, "B N"]]:
    """Every state and the last, by a Python loop that projects step by step.

    Our port of document 3's loop: the baseline that its published times are of. About
    ten small operations a step, whose dispatch takes longer than their arithmetic.
    """
    h = layer.init_state(len(x)).h if h is None else h
    A, states = layer.A, []
    for x_t in x.unbind(1):
        h = _advance(layer, x_t, A, h)
        states.append(h)
    if not states:
        return x.new_zeros(len(x), 0, layer.d_state), h
    return torch.stack(states, 1).to(x.dtype), h


def _advance(layer: SelectiveSSM, x_t: Tensor, A: Tensor, h: Tensor) -> Tensor:
    """The recurrence, as it is written in document 3."""
    B_t = layer.linear_B(x_t)
    delta = softplus(layer.linear_delta(x_t))
    A_bar = torch.exp(delta * A)
    B_bar = delta * B_t
    return A_bar * h + B_bar


def _scan(layer: SelectiveSSM, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """As a selective scan with one state a channel, read and written with weight 1."""
    one = layer.A.new_ones(layer.d_state, 1)
    y, final = selective_scan(
        layer.linear_B(x),
        layer.linear_delta(x),
        layer.A[:, None],
        one,
        one,
        delta_softplus=True,
        initial_state=h[..., None],
    )
    return y, final[..., 0]


def _chunked(layer: SelectiveSSM, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    delta = softplus(layer.linear_delta(x))
    return linear_scan(
        None,
        delta * layer.linear_B(x),
        log_a=delta * layer.A,
        initial_state=h,
        backend="torch",
    )


def _dual(layer: SelectiveSSM, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    if x.shape[1] == 0:
        return x.new_zeros(len(x), 0, layer.d_state), h
    matrix, values = layer.kernel_matrix(x)
    y = torch.einsum("bnts,bsn->btn", matrix, values[..., 0])
    elapsed = softplus(layer.linear_delta(x)).cumsum(1)
    y = y + torch.exp(layer.A * elapsed) * h[:, None]
    return y.to(x.dtype), y[:, -1]


Form = Callable[[SelectiveSSM, Tensor, Tensor], tuple[Tensor, Tensor]]

FORMS: dict[str, Form] = {
    "scan": _scan,
    "chunked": _chunked,
    "dual": _dual,
    "loop": naive_selective_loop,
}


# --- whole models ---------------------------------------------------------------------


class TokenModel(nn.Module, ABC):
    """logits = head(mix(embed(tokens))), whole, in pieces or step by step.

    What a subclass carries from one piece to the next is its ``state``.
    """

    embedding: nn.Embedding
    head: nn.Linear

    @abstractmethod
    def init_state(self, batch_size: int) -> State:
        """The state before the first token."""

    @abstractmethod
    def mix(
        self, x: Float[Tensor, "B L D"], state: State | None = None
    ) -> tuple[Float[Tensor, "B L N"], State]:
        """Everything between embedding and head: the part that mixes time."""

    def embed(
        self,
        tokens: Int[Tensor, "B L"],
        state: State | None = None,  # noqa: ARG002  # where positions count, they go on
    ) -> Float[Tensor, "B L D"]:
        """One vector a token."""
        return self.embedding(tokens)

    def hidden(
        self, tokens: Int[Tensor, "B L"], state: State | None = None
    ) -> tuple[Float[Tensor, "B L N"], State]:
        """What the head reads, and the new state."""
        return self.mix(self.embed(tokens, state), state)

    def forward(
        self, tokens: Int[Tensor, "B L"], state: State | None = None
    ) -> tuple[Float[Tensor, "B L V"], State]:
        """Logits of the token behind every position, and the new state."""
        y, state = self.hidden(tokens, state)
        return self.head(y), state

    def step(
        self, tokens: Int[Tensor, " B"], state: State
    ) -> tuple[Float[Tensor, "B V"], State]:
        """The logits behind one more token of every row, and the new state."""
        logits, state = self(tokens[:, None], state)
        return logits[:, 0], state

    def num_parameters(self) -> int:
        """How many numbers the model learns."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)


class MambaModel(TokenModel):
    """Embedding (64) -> :class:`SelectiveSSM` (128 states) -> linear head.

    Document 3's "Mamba": one layer, without the block that Mamba puts around it.
    """

    def __init__(
        self,
        vocab_size: int = GPT2_VOCABULARY,
        d_model: int = 64,
        d_state: int = 128,
        *,
        form: str = "scan",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(vocab_size=vocab_size)
        self.embedding = nn.Embedding(vocab_size, d_model, device=device, dtype=dtype)
        self.ssm = SelectiveSSM(d_model, d_state, form=form, device=device, dtype=dtype)
        self.head = nn.Linear(d_state, vocab_size, device=device, dtype=dtype)

    def init_state(self, batch_size: int) -> SelectiveState:
        return self.ssm.init_state(batch_size)

    def mix(
        self, x: Float[Tensor, "B L D"], state: SelectiveState | None = None
    ) -> tuple[Float[Tensor, "B L N"], SelectiveState]:
        return self.ssm(x, state)

    def step(
        self, tokens: Int[Tensor, " B"], state: SelectiveState
    ) -> tuple[Float[Tensor, "B V"], SelectiveState]:
        y, state = self.ssm.step(self.embedding(tokens), state)
        return self.head(y), state


class EncoderBlock(nn.Module):
    """x = norm(x + attention(x)), then norm(x + W_2 relu(W_1 x)): norms come last.

    As in Vaswani et al. 2017 (arXiv:1706.03762, section 3.1) and as PyTorch's
    TransformerEncoderLayer by default, whose numbers it gives. Causal.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        d_hidden: int,
        positions: Literal["rotary", "none"],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.attention = Attention(
            d_model, n_heads, positions=positions, device=device, dtype=dtype
        )
        self.norm1 = nn.LayerNorm(d_model, device=device, dtype=dtype)
        self.linear1 = nn.Linear(d_model, d_hidden, device=device, dtype=dtype)
        self.linear2 = nn.Linear(d_hidden, d_model, device=device, dtype=dtype)
        self.norm2 = nn.LayerNorm(d_model, device=device, dtype=dtype)

    def init_state(self, batch_size: int) -> AttentionState:
        """Attention's empty cache."""
        return self.attention.init_state(batch_size)

    def forward(
        self, x: Float[Tensor, "B L D"], state: AttentionState | None = None
    ) -> tuple[Float[Tensor, "B L D"], AttentionState]:
        """The whole sequence at once; the state is attention's cache."""
        mixed, state = self.attention(x, state)
        x = self.norm1(x + mixed)
        return self.norm2(x + self.linear2(self.linear1(x).relu())), state


class _Places(NamedTuple):
    """Which positions the embedding adds, and which attention turns by."""

    embedding: Literal["learned", "none"]
    attention: Literal["rotary", "none"]


_PLACES = {"learned": _Places("learned", "none"), "rotary": _Places("none", "rotary")}

TransformerState = tuple[AttentionState, ...]


class SmallTransformer(TokenModel):
    """Embedding + positions -> 2 causal blocks of 4 heads, width 128 -> linear head.

    Document 3's transformer. ``positions``: "learned" is its table of 8192 vectors,
    added to the embedding (ArgumentError beyond it); "rotary" turns queries and keys
    and has no end, for longer sequences. The state holds keys and values of every
    block and grows by one entry a token; attention is PyTorch's fused one.

    Differs: the document does not give the width of the feed-forward layers; here it
    is 4 times d_model, as Vaswani et al. have it (PyTorch's default, 2048, would make
    the transformer slower). Projections of attention have no bias. No dropout.
    """

    def __init__(
        self,
        vocab_size: int = GPT2_VOCABULARY,
        d_model: int = 128,
        n_heads: int = 4,
        n_layers: int = 2,
        *,
        positions: str = "learned",
        max_positions: int = 8192,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(vocab_size=vocab_size, n_layers=n_layers)
        if positions not in _PLACES:
            known = ", ".join(_PLACES)
            raise bad_argument("positions", repr(positions), known, "choose one")
        places = _PLACES[positions]
        self.embedding = nn.Embedding(vocab_size, d_model, device=device, dtype=dtype)
        self.positions = POSITIONS[places.embedding](
            d_model, max_positions, device=device, dtype=dtype
        )
        self.blocks = nn.ModuleList(
            EncoderBlock(
                d_model,
                n_heads,
                4 * d_model,
                places.attention,
                device=device,
                dtype=dtype,
            )
            for _ in range(n_layers)
        )
        self.head = nn.Linear(d_model, vocab_size, device=device, dtype=dtype)

    def init_state(self, batch_size: int) -> TransformerState:
        return tuple(block.init_state(batch_size) for block in self.blocks)  # type: ignore[operator]

    def embed(
        self, tokens: Int[Tensor, "B L"], state: TransformerState | None = None
    ) -> Float[Tensor, "B L D"]:
        """Vectors of tokens and positions; the latter go on from ``state``."""
        L = tokens.shape[1]
        at, past = torch.arange(L, device=tokens.device)[None], 0
        if state is not None:
            at, past = state[0].length[:, None] + at, state[0].k.shape[1]
        return self.positions.add(self.embedding(tokens), at, past + L)

    def mix(
        self, x: Float[Tensor, "B L D"], state: TransformerState | None = None
    ) -> tuple[Float[Tensor, "B L D"], TransformerState]:
        caches = [None] * len(self.blocks) if state is None else state
        new = []
        for block, cache in zip(self.blocks, caches, strict=True):
            x, grown = block(x, cache)
            new.append(grown)
        return x, tuple(new)
