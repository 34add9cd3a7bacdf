"""One object for the states of a whole model: what generation carries along."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ssm._errors import bad_argument, check_shape
from ssm.layers._base import State, check_state, state_bytes

Layout = tuple[Any, tuple[tuple[int | None, ...], ...]]


class Cached(Protocol):
    """What a cache can be made for: a model whose ``layers`` have states."""

    @property
    def layers(self) -> nn.ModuleList:
        """The layers or blocks, each with ``init_state(batch_size)``."""


class MambaCache:
    """The state of every layer of ``model`` for ``batch_size`` rows (chapter 19.10.2).

    ``states[i]``, ``get(i)`` and ``update(i, new_state)`` are layer i's. The states of
    SSM layers have a fixed size; those of attention and Hyena grow by one entry a step
    (``layer_bytes``, ``bytes``). A model takes a cache of its own (or of a copy of
    itself) only, and only for the same number of rows; ``rebind`` is for loading one
    anew. Models never change a cache that they are given: they return another.
    """

    def __init__(self, model: Cached, batch_size: int) -> None:
        if batch_size < 0:
            raise bad_argument("batch_size", batch_size, "0 or more", "raise it")
        self.batch_size = batch_size
        self.states: list[State] = [x.init_state(batch_size) for x in _layers(model)]
        self.owner = owner_of(model)
        self.layout = layout_of(model)

    def get(self, layer_idx: int) -> State:
        """The state of one layer."""
        self._check_index(layer_idx)
        return self.states[layer_idx]

    def update(self, layer_idx: int, new_state: State) -> None:
        """Put ``new_state``, which must fit, in the place of layer ``layer_idx``'s."""
        self._check_index(layer_idx)
        self._check_layer(layer_idx, new_state)
        self.states[layer_idx] = new_state

    @property
    def layer_bytes(self) -> list[int]:
        """The bytes that each layer's state holds."""
        return [state_bytes(state) for state in self.states]

    @property
    def bytes(self) -> int:
        """The bytes that all states hold."""
        return sum(self.layer_bytes)

    def select(self, rows: Sequence[int] | Tensor) -> "MambaCache":
        """A cache of the given rows, in their order; a row may come more than once."""
        index = torch.as_tensor(rows, dtype=torch.int64)
        low, high = -self.batch_size, self.batch_size
        if index.ndim != 1 or any(not low <= row < high for row in index.tolist()):
            raise bad_argument(
                "rows",
                index.tolist(),
                f"a list of rows of {self.batch_size}",
                "choose among them",
            )

        def chosen(leaf: Tensor) -> Tensor:
            return leaf[index.to(leaf.device)]

        states = [pytree.tree_map(chosen, state) for state in self.states]
        return self.replaced(states, len(index))

    def rebind(self, model: Cached) -> "MambaCache":
        """The same states as a cache of ``model``, whose layers they must fit.

        For a model that was loaded anew. Nothing can tell whether its weights are those
        that made the states: that is for the caller to know.
        """
        new = MambaCache(model, self.batch_size)
        if len(new.states) != len(self.states):
            raise bad_argument(
                "cache",
                f"states of {len(self.states)} layers",
                f"those of {len(new.states)}",
                "make it with init_state of the same model",
            )
        for i, state in enumerate(self.states):
            new.update(i, state)
        return new

    def replaced(self, states: list[State], batch_size: int) -> "MambaCache":
        """A cache of the same model with other states."""
        new = object.__new__(MambaCache)
        new.batch_size, new.states = batch_size, states
        new.owner, new.layout = self.owner, self.layout
        return new

    def check(self, model: Cached, batch_size: int) -> None:
        """Raise ArgumentError unless this is a cache of ``model`` for so many rows."""
        if self.owner != owner_of(model) or self.layout != layout_of(model):
            raise bad_argument(
                "state",
                "the cache of another model",
                "one of this model's",
                f"make it with init_state({batch_size}), or rebind it",
            )
        if self.batch_size != batch_size:
            raise bad_argument(
                "state",
                f"a cache of {self.batch_size} rows",
                f"one of {batch_size}, as the tokens have",
                f"make it with init_state({batch_size}), or select its rows",
            )

    def _check_index(self, layer_idx: int) -> None:
        if not 0 <= layer_idx < len(self.states):
            raise bad_argument(
                "layer_idx",
                layer_idx,
                f"0 to {len(self.states) - 1}",
                "count layers from 0",
            )

    def _check_layer(self, layer_idx: int, state: State) -> None:
        leaves, structure = pytree.tree_flatten(state)
        expected, shapes = self.layout[layer_idx]
        if structure != expected:
            raise bad_argument(
                "new_state",
                f"a {type(state).__name__} ({structure})",
                f"a state of layer {layer_idx} ({expected})",
                "pass what that layer returned",
            )
        check_state(state, self.batch_size)
        for leaf, shape in zip(leaves, shapes, strict=True):
            check_shape("new_state", leaf, (self.batch_size, *shape))

    def __repr__(self) -> str:
        return (
            f"MambaCache({len(self.states)} layers, {self.batch_size} rows, "
            f"{self.bytes} bytes)"
        )


def owner_of(model: Cached) -> str:
    """What tells a model (with its copies) from every other; "" where unknown."""
    return getattr(model, "identity", "")


def layout_of(model: Cached) -> list[Layout]:
    """For each layer its state's structure, and shapes but for the batch.

    A dimension that is empty before the first step grows, and is None.
    """
    known: list[Layout] | None = getattr(model, "state_layout", None)
    return find_layout(model) if known is None else known


def find_layout(model: Cached) -> list[Layout]:
    """:func:`layout_of`, from the states themselves."""
    layout = []
    for layer in _layers(model):
        leaves, structure = pytree.tree_flatten(layer.init_state(0))
        shapes = tuple(tuple(n or None for n in leaf.shape[1:]) for leaf in leaves)
        layout.append((structure, shapes))
    return layout


def _layers(model: Cached) -> Any:
    layers = getattr(model, "layers", None)
    if layers is None:
        raise bad_argument(
            "model",
            f"a {type(model).__name__} without layers",
            "a model with .layers",
            "pass a SequenceLM or a JambaModel",
        )
    return layers
