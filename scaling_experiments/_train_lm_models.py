"""Language models by name, each with the loss of the next token and without its logits.

4096 tokens times 50,257 logits are 823 MB in float32, and training would hold them
several times over. So the loss goes through the head piece by piece and forms each
piece's logits again for its gradient: equal values, one more matrix product.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from experiments._cli import nearest
from experiments.common import InputError, bad_input
from scaling_experiments.models import MambaModel, SmallTransformer, TokenModel
from ssm._errors import ArgumentError
from ssm.models import NAMED_PATTERNS, SequenceLM, SequenceLMConfig
from ssm.models.patterns import parse_pattern
from ssm.training import stream_seed

LOGITS_AT_ONCE = 2**25  # 134 MB in float32


class Sizes(NamedTuple):
    """What a model made from a pattern is sized by; document 3's have its sizes."""

    vocab_size: int
    d_model: int
    n_layers: int


class NextToken(nn.Module, ABC):
    """-log p(target | tokens so far), summed over a batch, by the model within."""

    @abstractmethod
    def hidden(
        self, tokens: Int[Tensor, "B L"]
    ) -> tuple[Float[Tensor, "B L D"], Tensor | None]:
        """What the head reads, and the experts' balance loss, where there are any."""

    @abstractmethod
    def head(self) -> tuple[Float[Tensor, "V D"], Float[Tensor, " V"] | None]:
        """Weight and bias of the head."""

    def forward(
        self, tokens: Int[Tensor, "B L"], targets: Int[Tensor, "B L"]
    ) -> tuple[Float[Tensor, ""], Tensor | None]:
        """The sum, and the balance loss."""
        y, balance = self.hidden(tokens)
        loss = cross_entropy_sum(y.flatten(0, 1), targets.flatten(), *self.head())
        return loss, balance

    def num_parameters(self) -> int:
        """How many numbers the model learns; a tied head counts once."""
        return sum(p.numel() for p in self.parameters())


class OfDocument(NextToken):
    """For the models of document 3."""

    def __init__(self, model: TokenModel) -> None:
        super().__init__()
        self.model = model

    def hidden(
        self, tokens: Int[Tensor, "B L"]
    ) -> tuple[Float[Tensor, "B L D"], Tensor | None]:
        return self.model.hidden(tokens)[0], None

    def head(self) -> tuple[Float[Tensor, "V D"], Float[Tensor, " V"] | None]:
        return self.model.head.weight, self.model.head.bias


class OfPattern(NextToken):
    """For the models of ``ssm.models``."""

    def __init__(self, model: SequenceLM) -> None:
        super().__init__()
        self.model = model

    def hidden(
        self, tokens: Int[Tensor, "B L"]
    ) -> tuple[Float[Tensor, "B L D"], Tensor | None]:
        out = self.model.run(self.model.embedding(tokens))
        return self.model.norm(out.y), out.auxiliary_loss

    def head(self) -> tuple[Float[Tensor, "V D"], Float[Tensor, " V"] | None]:
        tied = self.model.config.tie_embeddings
        return (self.model.embedding if tied else self.model.head).weight, None


def cross_entropy_sum(
    y: Float[Tensor, "n D"],
    targets: Int[Tensor, " n"],
    weight: Float[Tensor, "V D"],
    bias: Float[Tensor, " V"] | None,
    logits_at_once: int = LOGITS_AT_ONCE,
) -> Float[Tensor, ""]:
    """sum_i -log softmax(W y_i + b)[target_i], at most ``logits_at_once`` at a time.

    As many logits are held in the backward pass, which forms them anew.
    """
    rows = max(1, logits_at_once // len(weight))
    total = y.new_zeros((), dtype=torch.float32)
    for y_part, part in zip(y.split(rows), targets.split(rows), strict=True):
        total = total + checkpoint(
            _part,
            y_part,
            part,
            weight,
            bias,
            use_reentrant=False,
            preserve_rng_state=False,  # nothing random is in it
        )
    return total


def _part(y: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    logits = functional.linear(y, weight, bias).float()
    return functional.cross_entropy(logits, targets, reduction="sum")


MODELS: dict[str, Callable[[Sizes], NextToken]] = {
    "MambaModel": lambda sizes: OfDocument(MambaModel(sizes.vocab_size)),
    "SmallTransformer": lambda sizes: OfDocument(SmallTransformer(sizes.vocab_size)),
}


def build(name: str, sizes: Sizes, *, seed: int) -> NextToken:
    """The model ``name``, weights from the seed's stream "init" on every device alike.

    A name of :data:`MODELS`, or a pattern of ``ssm.models``. Drawn on the CPU;
    PyTorch's generators are left as they were. Raises InputError.
    """
    make = MODELS.get(name) or _from_pattern(name)
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(stream_seed(seed, "init"))
        return make(sizes)


def check_name(name: str) -> None:
    """Raise InputError, with the nearest name, unless there is such a model."""
    if name in MODELS:
        return
    try:
        parse_pattern(name)
    except ArgumentError:
        known = [*MODELS, *NAMED_PATTERNS]
        near = nearest(name, known)
        raise bad_input(
            "models",
            name,
            f"one of {', '.join(known)}, or signs of layers such as MMA+",
            f"did you mean {near}?"
            if near
            else "see ssm.models.patterns for the signs",
        ) from None


def _from_pattern(name: str) -> Callable[[Sizes], NextToken]:
    def make(sizes: Sizes) -> NextToken:
        try:
            config = SequenceLMConfig(*sizes, pattern=name)
        except ArgumentError as error:
            raise InputError(f"{name}: {error}") from None
        return OfPattern(SequenceLM(config))

    return make
