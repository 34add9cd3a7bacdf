"""What every layer does around its own work: checks, padding, steps."""

from abc import abstractmethod

from jaxtyping import Float, Int
from torch import Tensor

from ssm.layers._base import SequenceLayer, State, check_fits
from ssm.ops._ragged import check_lengths, fill_padding, valid_steps


class PaddedLayer(SequenceLayer):
    """A layer whose :meth:`advance` need not think of bad input or outputs on padding.

    A step is a sequence of one step.
    """

    @abstractmethod
    def advance(
        self, x: Float[Tensor, "B L D"], past: State, lengths: Int[Tensor, " B"] | None
    ) -> tuple[Float[Tensor, "B L D"], State]:
        """``forward`` for L >= 1 on checked input that is 0 on padding.

        Outputs on padding may be anything finite; the state is that at ``lengths``.
        """

    def forward(
        self,
        x: Float[Tensor, "B L D"],
        state: State | None = None,
        lengths: Int[Tensor, " B"] | None = None,
    ) -> tuple[Float[Tensor, "B L D"], State]:
        """The whole sequence at once, or the next piece of it; see the class."""
        self.check_input(x)
        batch, L, _ = x.shape
        check_fits(self, state, batch)
        past = self.init_state(batch) if state is None else state
        if lengths is not None:
            check_lengths(lengths, batch, L)
        if L == 0:
            return x, past
        if lengths is None:
            return self.advance(x, past, None)
        valid = valid_steps(lengths, L)
        y, state = self.advance(fill_padding(x, valid, 0.0), past, lengths)
        return fill_padding(y, valid, 0.0), state

    def step(
        self, x_t: Float[Tensor, "B D"], state: State
    ) -> tuple[Float[Tensor, "B D"], State]:
        """One step; see the class."""
        y, state = self(x_t[:, None], state)
        return y[:, 0], state
