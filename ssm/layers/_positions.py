"""Where a step stands: what attention adds to its inputs or does to queries and keys.

Angles are formed in float64, so that position 100,000 is as exact as position 1.
"""
# ruff: noqa: ARG002  # one signature for all kinds of positions

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from ssm._errors import bad_argument

_BASE = 10000.0


class NoPositions(nn.Module):
    """No positions: attention knows the order from its causal mask alone."""

    def __init__(
        self,
        d_model: int,
        max_positions: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_model, self.max_positions = d_model, max_positions
        self.create(device, dtype)

    def create(
        self, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        """Parameters, where there are any."""

    def add(
        self, x: Float[Tensor, "B L D"], at: Int[Tensor, "#B L"], bound: int
    ) -> Float[Tensor, "B L D"]:
        """x, or x plus an embedding of ``at`` (< ``bound``): what q and k are of."""
        return x

    def rotate(
        self, z: Float[Tensor, "B L H P"], at: Int[Tensor, "#B L"]
    ) -> Float[Tensor, "B L H P"]:
        """z (a query or key), or z turned by its position."""
        return z


class RotaryPositions(NoPositions):
    """Queries and keys turn with their position (RoFormer, arXiv:2104.09864, 3.2).

    Pair i, channels i and i + R of the first 2R, turns by at * 10000^(-i/R); with an
    odd head size the last channel stays. Scores depend on differences of positions.
    """

    def rotate(
        self, z: Float[Tensor, "B L H P"], at: Int[Tensor, "#B L"]
    ) -> Float[Tensor, "B L H P"]:
        """The turned query or key."""
        R = z.shape[-1] // 2
        angles = angles_at(at, R)[:, :, None]
        cos, sin = angles.cos().to(z.dtype), angles.sin().to(z.dtype)
        first, second, rest = z.split([R, R, z.shape[-1] - 2 * R], -1)
        turned = first * cos - second * sin, second * cos + first * sin
        return torch.cat([*turned, rest], -1)


class SinusoidalPositions(NoPositions):
    """Sines, then cosines, of at * 10000^(-i/R) are added (arXiv:1706.03762, 3.5)."""

    def add(
        self, x: Float[Tensor, "B L D"], at: Int[Tensor, "#B L"], bound: int
    ) -> Float[Tensor, "B L D"]:
        """x plus the waves; an odd width leaves out the last cosine."""
        angles = angles_at(at, (self.d_model + 1) // 2)
        waves = torch.cat([angles.sin(), angles.cos()], -1)[..., : self.d_model]
        return x + waves.to(x.dtype)


class LearnedPositions(NoPositions):
    """One learned vector a position is added, for ``max_positions`` positions."""

    def create(
        self, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        """The table of vectors."""
        shape = (self.max_positions, self.d_model)
        self.table = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal with deviation 0.02, as GPT-2."""
        nn.init.normal_(self.table, std=0.02)

    def add(
        self, x: Float[Tensor, "B L D"], at: Int[Tensor, "#B L"], bound: int
    ) -> Float[Tensor, "B L D"]:
        """x plus the vectors; ArgumentError beyond the last position."""
        # Only a bound that is too large makes it necessary to wait for the values.
        if bound > self.max_positions and int(at.max()) >= self.max_positions:
            raise bad_argument(
                "x",
                f"a sequence that reaches position {int(at.max())}",
                f"positions below max_positions = {self.max_positions}",
                "cut it, or build Attention with a larger max_positions",
            )
        return x + functional.embedding(at, self.table)


POSITIONS = {
    "none": NoPositions,
    "rotary": RotaryPositions,
    "sinusoidal": SinusoidalPositions,
    "learned": LearnedPositions,
}


def angles_at(at: Int[Tensor, "*B"], R: int) -> Float[Tensor, "*B R"]:
    """at * 10000^(-i/R) for i < R, in float64."""
    # Apple's devices have no float64.
    double = torch.float32 if at.device.type == "mps" else torch.float64
    steps = torch.arange(R, device=at.device, dtype=double)
    # Not as a power: its base would be copied to a GPU, which no CUDA graph can hold.
    frequencies = (-math.log(_BASE) / max(R, 1) * steps).exp()
    return at[..., None].to(double) * frequencies
