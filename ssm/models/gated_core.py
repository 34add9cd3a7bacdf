"""What a linear state space needs around it to be the mixer of a language model."""

from jaxtyping import Float, Inexact, Int
from torch import Tensor, nn
from torch.nn import functional

from ssm.layers._base import KernelLayer, State
from ssm.ops._ragged import fill_padding, valid_steps


class GatedCore(KernelLayer):
    """y = GLU(W gelu(core(x)) + b): a linear core, an activation, a gated output.

    S4, S4D and S5 are bare linear systems. As S4's own block does (arXiv:2111.00396,
    appendix C.2, and its published code), a GELU makes them nonlinear and a linear map
    to 2 d_model channels, one half gating the other, mixes the channels. The state is
    the core's.
    """

    def __init__(self, core: KernelLayer) -> None:
        super().__init__()
        self.core, self.d_model = core, core.d_model
        like = next(core.parameters())
        self.out_proj = nn.Linear(
            self.d_model, 2 * self.d_model, device=like.device, dtype=like.dtype
        )

    def reset_parameters(self) -> None:
        """Nothing: the core and the projection have their own."""

    def init_state(self, batch_size: int) -> State:
        """The core's."""
        return self.core.init_state(batch_size)

    def forward(
        self,
        x: Float[Tensor, "B L D"],
        state: State | None = None,
        lengths: Int[Tensor, " B"] | None = None,
    ) -> tuple[Float[Tensor, "B L D"], State]:
        """The whole sequence; see the class."""
        y, state = self.core(x, state, lengths)
        y = self._gate(y)
        if lengths is not None:  # the bias shows on padding
            y = fill_padding(y, valid_steps(lengths, x.shape[1]), 0.0)
        return y, state

    def step(
        self, x_t: Float[Tensor, "B D"], state: State
    ) -> tuple[Float[Tensor, "B D"], State]:
        """One step; see the class."""
        y_t, state = self.core.step(x_t, state)
        return self._gate(y_t), state

    def kernel_matrix(
        self, x: Float[Tensor, "B L D"]
    ) -> tuple[Inexact[Tensor, "B H L L"], Inexact[Tensor, "B L H P"]]:
        """The core's."""
        return self.core.kernel_matrix(x)

    def readout(
        self, mixed: Float[Tensor, "B L H P"], x: Float[Tensor, "B L D"]
    ) -> Float[Tensor, "B L D"]:
        """The core's readout, activated and gated."""
        return self._gate(self.core.readout(mixed, x))

    def _gate(self, y: Tensor) -> Tensor:
        return functional.glu(self.out_proj(functional.gelu(y)), -1)
