"""What benchmark_scaling times: forms of document 3's SSM beside its transformer.

    mixing   one layer: x (B, L, d) -> y (B, L, 128), its projections included
    whole    document 3's model: tokens (B, L) -> logits (B, L, V)

Both in three passes: "forward" (no gradients), "forward + backward" (all of them; of
the next token's cross-entropy for whole models) and "step", one token behind L others
with the state that they left: for attention its KV cache, without which the same token
costs a whole forward pass.

Attention's positions are document 3's 8192 learned ones below that length and rotary
from there on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from experiments.common import random_stream
from scaling_experiments._timing import Call
from scaling_experiments.models import (
    FORMS,
    MambaModel,
    SelectiveSSM,
    SmallTransformer,
)
from ssm.layers.attention import AttentionState
from ssm.ops.fft_conv import fft_conv

LEARNED = 8192  # positions of document 3's table
ATTENTION = "attention"
NAIVE = "naive_loop"
BOTH_WAYS = "forward + backward"
Mix = Callable[[Tensor], Tensor]


class Point(NamedTuple):
    """One thing to time: what of a model, in which pass, by which form, how long."""

    scope: str
    passed: str
    form: str
    length: int


class Cost(NamedTuple):
    """Floats held at most, per token and per pair of tokens, and the law of time."""

    token: int
    pair: int = 0
    power: int = 1


# Upper estimates, for whether to try; what is reported is measured.
FORWARD_COSTS = {
    "scan": Cost(1200),
    "chunked": Cost(1600),
    "convolution": Cost(2400),
    "dual": Cost(1200, 4 * 128, 2),
    NAIVE: Cost(2400),
    ATTENTION: Cost(2400, 0, 2),
}
TRAINING = 3  # times as much, and three tensors of logits where there is one


def time_invariant(
    layer: SelectiveSSM, x: Float[Tensor, "B L D"]
) -> Float[Tensor, "B L N"]:
    """y = K * (delta B x), K_j = exp(j delta A): the same sizes, but not selective.

    A step delta that does not depend on x makes the system time-invariant, and its
    output one long convolution (by FFT). The kernel is made anew in every call.
    """
    delta = functional.softplus(layer.linear_delta.bias)
    steps = torch.arange(x.shape[1], device=x.device, dtype=x.dtype)
    kernel = torch.exp((delta * layer.A)[:, None] * steps)
    return fft_conv(delta * layer.linear_B(x), kernel)[0]


def _selective(form: str, layer: SelectiveSSM, x: Tensor) -> Tensor:
    return FORMS[form](layer, x, layer.init_state(len(x)).h)[0]


SSM_FORMS: dict[str, Callable[[SelectiveSSM, Tensor], Tensor]] = {
    "scan": partial(_selective, "scan"),
    "chunked": partial(_selective, "chunked"),
    "convolution": time_invariant,
    "dual": partial(_selective, "dual"),
    NAIVE: partial(_selective, "loop"),
}
FORMS_OF = {
    ("mixing", "forward"): (*SSM_FORMS, ATTENTION),
    ("mixing", BOTH_WAYS): (*SSM_FORMS, ATTENTION),
    ("mixing", "step"): ("scan", ATTENTION),
    ("whole", "forward"): ("scan", NAIVE, ATTENTION),
    ("whole", BOTH_WAYS): ("scan", NAIVE, ATTENTION),
    ("whole", "step"): ("scan", ATTENTION),
}


def points_at(length: int, naive_max_length: int) -> list[Point]:
    """All points of one length; the naive loop up to its own."""
    return [
        Point(scope, passed, form, length)
        for (scope, passed), forms in FORMS_OF.items()
        for form in forms
        if form != NAIVE or length <= naive_max_length
    ]


@dataclass(frozen=True)
class Contest:
    """Both models with random weights, and the inputs of every point.

    The weights are those of ``seed``, whatever the lengths.
    """

    mamba: MambaModel
    transformers: dict[str, SmallTransformer]
    batch: int
    device: torch.device
    seed: int

    def call(self, point: Point) -> Call:
        """A function of nothing that does the work of ``point`` once."""
        return _PASSES[point.passed](self, point)

    def needed_bytes(self, point: Point) -> int:
        """An upper estimate of what the call holds at once."""
        if point.passed == "step":  # attention's cache, and its longer copy
            return 4 * self.batch * point.length * 4 * 2 * 2 * 128
        cost = FORWARD_COSTS[point.form]
        floats = point.length * (cost.token + point.length * cost.pair)
        if point.scope == "whole":
            floats += point.length * (self.mamba.head.out_features + 2400)
        times = TRAINING if point.passed == BOTH_WAYS else 1
        return 4 * self.batch * floats * times

    def power(self, point: Point) -> float:
        """The exponent of time in length; what a whole model adds is linear."""
        power = FORWARD_COSTS[point.form].power
        return 1.5 if power > 1 and point.scope == "whole" else power

    def transformer(self, length: int) -> SmallTransformer:
        """The one whose positions reach one token beyond ``length``."""
        return self.transformers["learned" if length < LEARNED else "rotary"]

    def tokens(self, length: int) -> Tensor:
        """Random tokens (B, length)."""
        shape = (self.batch, length)
        high, generator = self.mamba.head.out_features, self._generator("tokens")
        return torch.randint(high, shape, generator=generator).to(self.device)

    def vectors(self, *shape: int) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(*shape, generator=self._generator("x")).to(self.device)

    def mixer(self, point: Point) -> tuple[nn.Module, Mix, Tensor]:
        """The layer of ``point``, its function, and an input for it."""
        layer, width, function = self._layer(point)
        return layer, function, self.vectors(self.batch, point.length, width)

    def model(self, point: Point) -> tuple[nn.Module, Mix]:
        """The whole model of ``point``, and its logits as a function of tokens."""
        if point.form == ATTENTION:
            transformer = self.transformer(point.length)
            return transformer, lambda tokens: transformer(tokens)[0]
        mamba, mix = self.mamba, SSM_FORMS[point.form]
        return mamba, lambda tokens: mamba.head(mix(mamba.ssm, mamba.embed(tokens)))

    def cache(self, length: int) -> AttentionState:
        """Random keys and values where a prefill of ``length`` tokens leaves its own.

        The time of a step does not depend on them, and this one costs no prefill.
        """
        attention = self.attention(length)
        shape = (self.batch, length, attention.n_kv_heads, attention.d_head)
        filled = torch.full((self.batch,), length, device=self.device)
        return AttentionState(self.vectors(*shape), self.vectors(*shape), filled)

    def attention(self, length: int) -> Any:
        """The first attention layer of the transformer."""
        block: Any = self.transformer(length).blocks[0]
        return block.attention

    def _layer(self, point: Point) -> tuple[nn.Module, int, Mix]:
        if point.form == ATTENTION:
            attention = self.attention(point.length)
            return attention, attention.d_model, lambda x: attention(x)[0]
        layer = self.mamba.ssm
        return layer, layer.d_model, partial(SSM_FORMS[point.form], layer)

    def _generator(self, name: str) -> torch.Generator:
        seed = int(random_stream(self.seed, name).integers(2**63))
        return torch.Generator().manual_seed(seed)


def make_contest(batch: int, device: torch.device, seed: int) -> Contest:
    """Document 3's models on ``device``, in float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mamba = MambaModel()
        transformers = {
            kind: SmallTransformer(positions=kind) for kind in ("learned", "rotary")
        }
    for model in (mamba, *transformers.values()):
        model.to(device).eval()
    return Contest(mamba, transformers, batch, device, seed)


def _forward(contest: Contest, point: Point) -> Call:
    if point.scope == "whole":
        _, function = contest.model(point)
        inputs = contest.tokens(point.length)
    else:
        _, function, inputs = contest.mixer(point)
    return torch.no_grad()(partial(function, inputs))


def _forward_backward(contest: Contest, point: Point) -> Call:
    if point.scope == "whole":
        return _training(contest, point)
    layer, function, x = contest.mixer(point)
    leaves = [x.requires_grad_(), *layer.parameters()]
    dy = contest.vectors(contest.batch, point.length, 128)
    return lambda: torch.autograd.grad(function(x), leaves, dy, allow_unused=True)


def _training(contest: Contest, point: Point) -> Call:
    """Gradients of the next token's cross-entropy, without the optimiser's step."""
    model, function = contest.model(point)
    tokens = contest.tokens(point.length + 1)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].flatten()
    leaves = list(model.parameters())

    def call() -> object:
        loss = functional.cross_entropy(function(inputs).flatten(0, 1), targets)
        return torch.autograd.grad(loss, leaves, allow_unused=True)

    return call


def _step(contest: Contest, point: Point) -> Call:
    token = contest.tokens(1)[:, 0]
    if point.form != ATTENTION:
        state = contest.mamba.init_state(contest.batch)
        state = state._replace(h=contest.vectors(*state.h.shape))
        if point.scope == "whole":
            return torch.no_grad()(partial(contest.mamba.step, token, state))
        x_t = contest.vectors(contest.batch, contest.mamba.ssm.d_model)
        return torch.no_grad()(partial(contest.mamba.ssm.step, x_t, state))
    cache = contest.cache(point.length)
    if point.scope == "whole":
        transformer = contest.transformer(point.length)
        caches = tuple(cache for _ in transformer.blocks)
        return torch.no_grad()(partial(transformer.step, token, caches))
    attention = contest.attention(point.length)
    x_t = contest.vectors(contest.batch, attention.d_model)
    return torch.no_grad()(partial(attention.step, x_t, cache))


_PASSES: dict[str, Callable[[Contest, Point], Call]] = {
    "forward": _forward,
    BOTH_WAYS: _forward_backward,
    "step": _step,
}


def shown(form: str, scope: str) -> str:
    """The form's name in tables and figures: a whole model of attention has another."""
    return "transformer" if (form, scope) == (ATTENTION, "whole") else form


def label(point: Point) -> str:
    """``whole model, forward: scan``."""
    return f"{group_label(point[:2])}: {shown(point.form, point.scope)}"


def group_label(group: Sequence[str]) -> str:
    """``whole model, forward`` of (scope, pass)."""
    scope, passed = group
    return f"{_SCOPES[scope]}, {passed}"


_SCOPES = {"mixing": "mixing alone", "whole": "whole model"}
