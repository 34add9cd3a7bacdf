"""From NumPy's tokens to a split, shared by the generators of this package."""

import numpy as np
import torch
from jaxtyping import Int64

from data_dir.task import IGNORED, Split


def every_position(
    inputs: Int64[np.ndarray, "n L"], targets: Int64[np.ndarray, "n L"]
) -> Split:
    """The split in which position t is scored by ``targets[:, t]``, unless IGNORED."""
    return Split(
        torch.from_numpy(np.ascontiguousarray(inputs)),
        torch.from_numpy(np.ascontiguousarray(targets)),
    )


def last_position(
    inputs: Int64[np.ndarray, "n L"], answers: Int64[np.ndarray, " n"]
) -> Split:
    """The split that asks for ``answers`` at the last position and nowhere else."""
    targets = np.full_like(inputs, IGNORED)
    targets[:, -1] = answers
    return every_position(inputs, targets)
