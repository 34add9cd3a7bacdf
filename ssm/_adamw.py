"""AdamW for recorded training steps: a step that is not finite changes nothing.

PyTorch's fused AdamW and its norm of all gradients give 65,536 numbers to a block of
threads: a model of 0.7 million parameters is eleven blocks, for a GPU that has room for
hundreds. On NVIDIA GPUs two kernels (``adamw.cu``) do the same work, and look at loss
and norm (docs/kernels/small_kernels.md); elsewhere, or for parameters that are not
float32, PyTorch's own run.
"""

import itertools
import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ssm.ops._gpu import cdiv, on_device_of, refuses_place
from ssm.ops._nvrtc import kernel

SOURCE = Path(__file__).with_name("adamw.cu")
TENSORS = 48  # of one launch, whose arguments are at most 4 KiB
_THREADS = 256
_PACK = struct.Struct(f"{8 * TENSORS}q{TENSORS}d5q3q6d").pack


class _Updated(NamedTuple):
    """One parameter, and all that its update reads and writes."""

    p: Tensor
    g: Tensor
    m: Tensor
    v: Tensor
    step: Tensor
    lr: Tensor
    decay: float


class GuardedAdamW(torch.optim.AdamW):
    """AdamW, and one step more: :meth:`update`, without waiting for the GPU.

    Its state is that of ``torch.optim.AdamW``. Groups may differ in ``lr``, on a GPU a
    tensor there, and ``weight_decay``.
    """

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        first: Tensor = groups[0]["params"][0]
        super().__init__(groups, fused=True, capturable=first.is_cuda)
        # As a gradient scaler tells a fused optimiser: 1 for no update.
        self.found_inf = torch.zeros((), device=first.device)

    def update(self, loss: Tensor, grad_clip: float) -> Tensor:
        """One step, the gradients scaled to a norm of at most ``grad_clip`` (0: not).

        Returns their norm before. Where it or the loss is not finite this step is left
        out, and all that follow: what was reached stays, until someone looks.
        """
        parameters = [p for group in self.param_groups for p in group["params"]]
        parameters = [p for p in parameters if p.grad is not None]
        if all(_is_served(x) for p in parameters for x in (p, p.grad)):
            return self._by_kernels(loss.detach().float(), grad_clip)
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        bad = ~torch.isfinite(loss.detach() + norm)
        torch.maximum(self.found_inf, bad.float(), out=self.found_inf)
        if grad_clip:
            nn.utils.clip_grads_with_norm_(parameters, grad_clip, norm)
        self.step()
        return norm

    def _updated(self) -> list[_Updated]:
        """Every parameter that has a gradient."""
        found = []
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros((), device=p.device)
                    state["exp_avg"] = torch.zeros_like(p)
                    state["exp_avg_sq"] = torch.zeros_like(p)
                moments = state["exp_avg"], state["exp_avg_sq"], state["step"]
                fixed = group["lr"], group["weight_decay"]
                found.append(_Updated(p, p.grad, *moments, *fixed))
        return found

    def _by_kernels(self, loss: Tensor, grad_clip: float) -> Tensor:
        updated = self._updated()
        # Few numbers a block fill a GPU with a small model; many keep the sums few.
        chunk = 4096 if sum(x.p.numel() for x in updated) < 1 << 22 else 32768
        firsts = range(0, len(updated), TENSORS)
        launches = [updated[i : i + TENSORS] for i in firsts]
        blocks = [
            [max(1, cdiv(x.p.numel(), chunk)) for x in launch] for launch in launches
        ]
        squares = loss.new_empty(sum(map(sum, blocks)))
        norm, next_step = loss.new_empty(()), loss.new_empty(len(updated))
        where = loss, squares, next_step, norm, self.found_inf
        beta_1, beta_2 = self.defaults["betas"]
        rates = math.log(beta_1), math.log(beta_2), 1 - beta_1, 1 - beta_2
        numbers = *rates, self.defaults["eps"], grad_clip
        arguments, start = [], 0
        for i, (launch, sizes) in enumerate(zip(launches, blocks, strict=True)):
            places = [x.data_ptr() for x in where]
            places[2] += 4 * TENSORS * i
            counts = len(launch), start, len(squares)
            packed = _PACK(*_columns(launch, sizes), *places, *counts, *numbers)
            arguments.append(packed)
            start += sum(sizes)
        device = loss.get_device()
        definitions = ("IO", 32), ("TENSORS", TENSORS), ("CHUNK", chunk)
        with on_device_of(loss):
            stream = torch._C._cuda_getCurrentRawStream(device)
            for name in ("square", "update"):
                run = kernel(SOURCE, definitions, name, device, _THREADS, 4 * _THREADS)
                for sizes, argument in zip(blocks, arguments, strict=True):
                    run(sum(sizes), argument, stream)
        return norm


def _is_served(x: Tensor) -> bool:
    """Whether the kernels take a parameter or gradient like this."""
    return (
        refuses_place("cuda", x.device) is None
        and x.dtype == torch.float32
        and x.is_contiguous()
        and x.data_ptr() % 16 == 0
    )


def _columns(launch: Sequence[_Updated], blocks: Sequence[int]) -> list[float]:
    """What the arguments hold of each tensor, each column filled up to TENSORS."""
    columns: list[Sequence[float]] = [
        [x.data_ptr() for x in column]
        for column in zip(*(updated[:6] for updated in launch), strict=True)
    ]
    columns.append([x.p.numel() for x in launch])
    columns.append(list(itertools.accumulate(blocks, initial=0))[:-1])
    columns.append([float(x.decay) for x in launch])
    missing = [0] * (TENSORS - len(launch))
    return [value for column in columns for value in [*column, *missing]]
