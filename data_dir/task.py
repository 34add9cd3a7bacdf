"""What every token dataset gives: two splits, what is scored, and how it was made."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxtyping import Int
from torch import Tensor

IGNORED = -100  # a target that is not scored (PyTorch's cross_entropy skips it)


class Split(NamedTuple):
    """Sequences of tokens, and for every position the token to predict or IGNORED."""

    inputs: Int[Tensor, "n L"]
    targets: Int[Tensor, "n L"]


@dataclass(frozen=True)
class TokenTask:
    """A dataset for models of tokens.

    With ``last_only`` nothing but the last position is scored, so that logits need be
    formed there alone. ``metadata`` holds JSON values: how the data were made, and the
    levels to compare with (guessing, simple predictors). ``parts`` are parts of ``val``
    to be scored one by one as well, by name.
    """

    name: str
    vocab_size: int
    train: Split
    val: Split
    last_only: bool
    metadata: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, Split] = field(default_factory=dict)
