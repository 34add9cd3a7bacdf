"""Trees of JAX arrays as the files of ``experiments.checkpoints``: safetensors.

An array's name is its path in the tree, such as ``.cde.A.matrix``.
"""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load, save

from experiments.checkpoints import Checkpoint, check_arrays

Tree = TypeVar("Tree")


def arrays_of(tree: Any) -> dict[str, np.ndarray]:
    """The leaves of a tree on the host, by name."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def to_bytes(tree: Any) -> bytes:
    """A tree as the contents of a safetensors file."""
    return save(arrays_of(tree))


def restored(like: Tree, checkpoint: Checkpoint, name: str) -> Tree:
    """The tree in the file ``name``, on JAX's default device.

    Raises InputError unless its arrays have the names and shapes of those of ``like``.
    """
    found, wanted = load(checkpoint.files[name]), arrays_of(like)
    shapes = ({key: x.shape for key, x in arrays.items()} for arrays in (found, wanted))
    check_arrays(checkpoint.path / name, *shapes)
    leaves = [jnp.asarray(found[key]) for key in wanted]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)
