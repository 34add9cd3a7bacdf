"""Dtypes of a computation: states are float32 at least, whatever the inputs are."""

import torch
from torch import Tensor

_HALF = (torch.bfloat16, torch.float16)


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype in which a scan computes and keeps its state.

    The promotion of all operands, with bfloat16 and float16 raised to float32.
    """
    dtype = torch.float32
    present = [t for t in tensors if t is not None]
    if all(t.dtype not in _HALF for t in present):
        dtype = present[0].dtype
    for tensor in present:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
