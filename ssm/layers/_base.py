"""The contract of every sequence layer, and what follows from it alone."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Inexact, Int
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ssm._errors import bad_argument, check_shape

State = Any  # a NamedTuple of tensors, each with the batch as its first dimension


class SequenceLayer(nn.Module, ABC):
    """A map of sequences with one meaning in three forms: parallel, step, matrix.

    * ``forward(x, state=None, lengths=None) -> (y, state)``: the whole sequence
      x (B, L, d_model) at once, continuing from ``state``; rows end at ``lengths``.
    * ``step(x_t, state) -> (y_t, state)``: one step, x_t (B, d_model). Never changes
      parameters or the state that it was given.
    * ``kernel_matrix(x)`` (:class:`KernelLayer`): the T x T matrix that it applies.

    Feeding a sequence whole, in pieces cut anywhere, or step by step gives the same
    outputs, states and gradients. ``forward`` on zero steps returns the state as it
    was. Outputs on padding are zero, and the state is the one at each row's length.
    """

    d_model: int
    # Parameters (of this module, not of its children) without weight decay.
    no_weight_decay: ClassVar[frozenset[str]] = frozenset()
    # The largest learning rate of a parameter, where the paper asks for a small one.
    max_learning_rate: ClassVar[dict[str, float]] = {}

    @abstractmethod
    def forward(
        self,
        x: Float[Tensor, "B L D"],
        state: State | None = None,
        lengths: Int[Tensor, " B"] | None = None,
    ) -> tuple[Float[Tensor, "B L D"], State]:
        """The whole sequence at once; see the class."""

    @abstractmethod
    def step(
        self, x_t: Float[Tensor, "B D"], state: State
    ) -> tuple[Float[Tensor, "B D"], State]:
        """One step; see the class."""

    @abstractmethod
    def init_state(self, batch_size: int) -> State:
        """The state before the first step, on the device of the parameters."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Initialise this module's own parameters in place; safe after ``to_empty``."""

    def check_input(self, x: Tensor, state: State | None = None) -> None:
        """Raise ArgumentError unless x is (B, L, d_model) and fits ``state``."""
        if x.ndim != 3 or x.shape[-1] != self.d_model:
            raise bad_argument(
                "x", f"shape {tuple(x.shape)}", f"(B, L, {self.d_model})", "reshape it"
            )
        check_state(state, x.shape[0])


class KernelLayer(SequenceLayer):
    """A layer that is linear in its values given its gates.

    ``readout(apply_kernel(*kernel_matrix(x)), x)`` equals ``forward(x)[0]``.
    """

    @abstractmethod
    def kernel_matrix(
        self, x: Float[Tensor, "B L D"]
    ) -> tuple[Inexact[Tensor, "B H L L"], Inexact[Tensor, "B L H P"]]:
        """The matrix M[b, h, t, s] that mixes time, and the values that it mixes."""

    @abstractmethod
    def readout(
        self, mixed: Float[Tensor, "B L H P"], x: Float[Tensor, "B L D"]
    ) -> Float[Tensor, "B L D"]:
        """Gates and output projection: from mixed values to the layer's output."""


def apply_kernel(
    matrix: Inexact[Tensor, "B H L L"], values: Inexact[Tensor, "B L H P"]
) -> Inexact[Tensor, "B L H P"]:
    """y[b, t, h] = sum_s M[b, h, t, s] v[b, s, h]: the layer as masked attention."""
    return torch.einsum("bhts,bshp->bthp", matrix, values)


def state_bytes(state: State) -> int:
    """The bytes that a state (or any tree of tensors) holds."""
    leaves = [x for x in pytree.tree_leaves(state) if isinstance(x, Tensor)]
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves)


def check_state(state: State | None, batch: int) -> None:
    """Raise ArgumentError unless every tensor of ``state`` has ``batch`` rows."""
    for leaf in pytree.tree_leaves(state):
        if isinstance(leaf, Tensor) and leaf.shape[:1] != (batch,):
            raise bad_argument(
                "state",
                f"a state of shape {tuple(leaf.shape)}",
                f"one for a batch of {batch}",
                f"make it with init_state({batch})",
            )


def check_fits(layer: SequenceLayer, state: State | None, batch: int) -> None:
    """Raise ArgumentError unless ``state`` is one of this layer's, for ``batch`` rows.

    Every tensor must have the shape of the initial state's, but for the batch and for
    dimensions that are empty there, which grow.
    """
    if state is None:
        return
    expected = layer.init_state(0)
    if type(state) is not type(expected):
        raise bad_argument(
            "state",
            f"a {type(state).__name__}",
            f"a {type(expected).__name__}",
            f"make it with init_state({batch})",
        )
    check_state(state, batch)
    for name, have, want in zip(expected._fields, state, expected, strict=True):
        sizes = [None if n == 0 else n for n in want.shape[1:]]
        check_shape(f"state.{name}", have, (batch, *sizes))


def param_groups(
    module: nn.Module, lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Optimiser groups for every parameter of ``module``, each in exactly one.

    Norms, biases and other vectors, and what a layer lists in ``no_weight_decay`` (A,
    D, dt), get no weight decay; what it lists in ``max_learning_rate`` gets at most
    that rate.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    seen: set[int] = set()
    for child in module.modules():
        spared: frozenset[str] = getattr(child, "no_weight_decay", frozenset())
        slow: dict[str, float] = getattr(child, "max_learning_rate", {})
        for name, parameter in child.named_parameters(recurse=False):
            if id(parameter) in seen or not parameter.requires_grad:
                continue
            seen.add(id(parameter))
            decays = parameter.ndim >= 2 and name not in spared
            rate = min(lr, slow.get(name, lr))
            key = (rate, weight_decay if decays else 0.0)
            groups.setdefault(key, []).append(parameter)
    return [
        {"params": params, "lr": rate, "weight_decay": decay}
        for (rate, decay), params in groups.items()
    ]
