"""From logits to a token: greedy, or drawn at a temperature from the likeliest."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ssm._errors import bad_argument

Generators = torch.Generator | Sequence[torch.Generator] | None


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen; checked when made.

    greedy: the likeliest (the first of equals), and nothing else may be set. Otherwise
    from softmax(logits / temperature), of which top_k leaves the k likeliest and then
    top_p the fewest of the likeliest that together have at least top_p of what is left.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    greedy: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise bad_argument(
                "temperature",
                self.temperature,
                "a finite number above 0",
                "for the likeliest token pass greedy=True",
            )
        k = self.top_k
        if k is not None and (not isinstance(k, int) or k < 1):
            raise bad_argument(
                "top_k", repr(k), "a whole number from 1, or None", "try 50"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise bad_argument("top_p", self.top_p, "0 < top_p <= 1", "try 0.9")
        if self.greedy and (self.temperature, k, self.top_p) != (1.0, None, None):
            raise bad_argument(
                "greedy",
                "True with temperature, top_k or top_p",
                "True by itself",
                "drop the one or the others",
            )

    def choose(
        self, logits: Float[Tensor, "B V"], streams: Sequence[torch.Generator]
    ) -> Int[Tensor, " B"]:
        """One token a row; row i draws one number of ``streams[i]``, unless greedy."""
        if self.greedy:
            return logits.argmax(-1)
        draws = [torch.rand((), generator=g, device=g.device) for g in streams]
        return self.invert(logits, torch.stack([u.to(logits.device) for u in draws]))

    def invert(
        self, logits: Float[Tensor, "B V"], u: Float[Tensor, " B"]
    ) -> Int[Tensor, " B"]:
        """The first token at which the sum of probabilities exceeds u, 0 <= u < 1.

        Summed in the order of the vocabulary: rounding of the logits then moves only
        the draws that fall next to a bound, whereas in order of probability it could
        exchange whole tokens.
        """
        probabilities = self.probabilities(logits)
        sums = probabilities.cumsum(-1)
        token = torch.searchsorted(
            sums, (u.to(sums.dtype) * sums[:, -1])[:, None], right=True
        )[:, 0]
        # The sum may round to no more than u: then the last token that can be drawn.
        places = torch.arange(sums.shape[-1], device=sums.device)
        last = torch.where(probabilities > 0, places, 0).amax(-1)
        return torch.minimum(token, last)

    def probabilities(self, logits: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        """What is drawn from, in double precision where the device has it."""
        wide = torch.float32 if logits.device.type == "mps" else torch.float64
        p = (logits.to(wide) / self.temperature).softmax(-1)
        if self.top_k is None and self.top_p is None:
            return p
        p = torch.where(self._kept(p), p, 0.0)
        return p / p.sum(-1, keepdim=True)

    def _kept(self, p: Float[Tensor, "B V"]) -> Bool[Tensor, "B V"]:
        ranked, order = p.sort(dim=-1, descending=True, stable=True)
        rank = torch.arange(p.shape[-1], device=p.device)
        kept = torch.ones_like(ranked, dtype=torch.bool)
        if self.top_k is not None:
            kept = kept & (rank < self.top_k)
        if self.top_p is not None:
            ranked = torch.where(kept, ranked, 0.0)
            ranked = ranked / ranked.sum(-1, keepdim=True)
            before = ranked.cumsum(-1) - ranked
            kept = kept & ((before < self.top_p) | (rank == 0))
        return torch.zeros_like(kept).scatter(-1, order, kept)


def row_generators(generator: Generators, rows: int) -> list[torch.Generator]:
    """A stream of random numbers for each row, which no other row can disturb.

    From one generator (None: torch's own) a seed is drawn for row after row, so that
    the first rows of a batch have the same streams whatever rows follow. Or give one
    generator a row: then a row alone draws what it draws in any batch.
    """
    if isinstance(generator, Sequence):
        if len(generator) != rows or len({id(g) for g in generator}) != rows:
            raise bad_argument(
                "generator",
                f"{len(generator)} generators",
                f"one, or {rows} different ones: one for each row",
                "make one a row, or pass a single one",
            )
        return list(generator)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise bad_argument(
            "generator",
            f"a {type(generator).__name__}",
            "a torch.Generator, one for each row, or None",
            "try torch.Generator().manual_seed(0)",
        )
    device = "cpu" if generator is None else generator.device
    streams = []
    for _ in range(rows):
        seed = torch.randint(2**62, (), generator=generator, device=device)
        streams.append(torch.Generator().manual_seed(int(seed)))
    return streams
