"""A function on GPU tensors as one CUDA graph: many launches for the price of one.

A small model's training step is some five hundred kernels of a few microseconds each,
which Python launches more slowly than the GPU runs them. Recorded once, they are
launched together.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

WARM_UP = 3  # calls before the recording: libraries set themselves up in their first


class Graphed:
    """``function(*inputs)``, recorded at the fourth call and replayed from then on.

    Every call does the function's work once: the first three run as they are. The
    inputs' shapes and dtypes must stay those of the first call. The returned tensors
    are overwritten by the next call. The function must neither wait for the GPU nor
    choose by its values, and what else it reads and writes must stay where it is.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        self.calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: Sequence[Tensor] = ()
        self._output: Tensor

    def __call__(self, *inputs: Tensor) -> Tensor:
        self.calls += 1
        if self.calls <= WARM_UP:
            return _on_a_side_stream(self.function, inputs)
        if self._graph is None:
            self._graph = self._record(inputs)
        for kept, given in zip(self._inputs, inputs, strict=True):
            kept.copy_(given)
        self._graph.replay()
        return self._output

    def _record(self, inputs: Sequence[Tensor]) -> torch.cuda.CUDAGraph:
        self._inputs = [x.clone() for x in inputs]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._output = self.function(*self._inputs)
        return graph


class Reading:
    """A GPU's numbers, asked for when this is made and waited for when it is read.

    What runs on the GPU meanwhile does not wait, and may overwrite ``numbers``.
    """

    def __init__(self, numbers: Tensor) -> None:
        on_gpu = numbers.is_cuda
        self._read = torch.empty_like(numbers, device="cpu", pin_memory=on_gpu)
        self._read.copy_(numbers, non_blocking=True)
        self._done = torch.cuda.Event() if on_gpu else None
        if self._done is not None:
            self._done.record()

    def tolist(self) -> list[float]:
        """The numbers, once they are there."""
        if self._done is not None:
            self._done.synchronize()
        found: list[float] = self._read.tolist()
        return found


def _on_a_side_stream(
    function: Callable[..., Tensor], inputs: Sequence[Tensor]
) -> Tensor:
    """A call apart from the default stream, on which nothing may be recorded."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        output = function(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    return output
