"""What every Numba backend shares: its refusal, and views of tensors as arrays."""

import importlib.util

import numpy as np
import torch
from torch import Tensor

from ssm.ops._dispatch import Request

# Decided once: looking it up inside a compiled graph would break the graph.
_MISSING = (
    None
    if importlib.util.find_spec("numba")
    else "numba is not installed (it comes with the extra 'torch')"
)


def refuses_real(request: Request) -> str | None:
    """Why a Numba kernel for real CPU tensors cannot serve ``request``, or None."""
    if request.dtype not in (torch.float32, torch.float64):
        return f"it computes in float32 or float64, not {request.dtype}"
    return refuses(request)


def refuses(request: Request) -> str | None:
    """Why a Numba kernel cannot serve ``request``, or None."""
    if request.device.type != "cpu":
        return f"it runs on CPU tensors, not on {request.device}"
    return _MISSING


def array(tensor: Tensor) -> np.ndarray:
    """The memory of a contiguous copy of ``tensor`` (itself where it is contiguous)."""
    whole = tensor if tensor.is_contiguous() else tensor.contiguous()
    return whole.numpy(force=True)  # also of a tensor that wants gradients


def start_threads() -> None:
    """Start Numba's threads, leaving PyTorch's number of threads as it is.

    The two share one OpenMP runtime, and Numba's start sets that runtime's number for
    PyTorch as well. Each module with kernels calls this when it loads.
    """
    import numba

    threads = torch.get_num_threads()
    numba.get_num_threads()  # starts them
    torch.set_num_threads(threads)
