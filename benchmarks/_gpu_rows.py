"""The operators of :mod:`benchmarks.gpu_ops`: sizes, operands, ours, peers, floors.

A floor is what the card's ceilings, measured on an H100, leave at least: bytes (each
operand read once, each output written once), exponentials, and operations of matrix
products, whichever takes longest. Peers are imported where they are called.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ssm import ops

BYTES, EXPONENTIALS, OPERATIONS = 3.02e12, 4.05e12, 790e12  # a second
Named = dict[str, Any]  # of tensors, as keyword arguments
Call = Callable[[Named], Tensor]


@dataclass(frozen=True)
class Target:
    """Ours over the peer's, at most: forward, and forward with backward."""

    forward: float | None = None
    both: float | None = None


@dataclass(frozen=True)
class Row:
    """One operator at one size.

    ``draw(sizes, generator)`` gives the operands; gradients of all are taken.
    ``checked``: sizes at which errors are measured, in float64 too. ``peers``: label ->
    (package, call on what ``prepare`` makes of the operands); ``work(sizes)``:
    (exponentials, operations) of a forward pass, of which a backward pass does
    ``again`` times as much.
    """

    op: str
    sizes: Mapping[str, int]
    checked: Mapping[str, int]
    draw: Callable[[Mapping[str, int], torch.Generator], Named]
    ours: Call
    peers: Mapping[str, "Peer"] = field(default_factory=dict)
    work: Callable[[Mapping[str, int]], tuple[float, float]] = lambda _: (0.0, 0.0)
    again: float = 2.0
    target: Target = Target()

    def floors(self, operands: Named, y: Tensor) -> tuple[float, float]:
        """Seconds that a forward pass, and both passes, take at least."""
        read = sum(x.nbytes for x in operands.values())
        exps, flops = self.work(self.sizes)
        forward = _slowest(read + y.nbytes, exps, flops)
        # the backward pass reads the operands and dy, and writes as many gradients
        backward = _slowest(2 * read + y.nbytes, self.again * exps, self.again * flops)
        return forward, forward + backward


@dataclass(frozen=True)
class Peer:
    """Another's operator: what to import, how to lay operands out, how to call it."""

    package: str
    call: Call
    prepare: Callable[[Named], Named] = lambda operands: operands
    has_backward: bool = True


def _slowest(moved: float, exps: float, flops: float) -> float:
    return max(moved / BYTES, exps / EXPONENTIALS, flops / OPERATIONS)


class _Draw:
    """bfloat16 (or float32) normal numbers on the generator's device."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def __call__(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        x = torch.randn(shape, generator=self.generator, device=self.generator.device)
        return x.to(dtype)

    def single(self, *shape: int) -> Tensor:
        return self(*shape, dtype=torch.float32)


# --- selective scan -------------------------------------------------------------------


def _selective(sizes: Mapping[str, int], generator: torch.Generator) -> Named:
    draw = _Draw(generator)
    B, D, L, N = sizes.values()
    rates = torch.arange(1.0, N + 1, device=generator.device).repeat(D, 1)
    return {
        "u": draw(B, L, D),
        "delta": draw(B, L, D) * 0.5,
        "A": -rates,
        "B": draw(B, L, N),
        "C": draw(B, L, N),
        "D": draw.single(D),
        "z": draw(B, L, D),
        "delta_bias": draw.single(D) - 4,
    }


def _selective_ours(x: Named) -> Tensor:
    return ops.selective_scan(**x, delta_softplus=True)[0]


def _time_last(x: Named) -> Named:
    """As mamba_ssm wants them, side by side in time."""
    return {n: t.mT.contiguous() if t.ndim == 3 else t for n, t in x.items()}


def _selective_mamba_ssm(x: Named) -> Tensor:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    return selective_scan_fn(**x, delta_softplus=True).mT


def _selective_row(B: int, D: int, L: int, N: int, *most: float) -> Row:
    sizes = {"B": B, "D": D, "L": L, "N": N}
    return Row(
        "selective_scan",
        sizes,
        sizes | {"B": min(B, 2), "D": min(D, 256), "L": min(L, 2048)},
        _selective,
        _selective_ours,
        {"mamba_ssm": Peer("mamba_ssm", _selective_mamba_ssm, _time_last)},
        # softplus and gate: two more for each of u
        work=lambda s: (float(s["B"] * s["L"] * s["D"] * (s["N"] + 2)), 0.0),
        again=1.0,
        target=Target(*most),
    )


# --- the dual forms -------------------------------------------------------------------


def _ssd(sizes: Mapping[str, int], generator: torch.Generator) -> Named:
    draw = _Draw(generator)
    B, L, H, P, N = sizes.values()
    return {
        "x": draw(B, L, H, P),
        "dt": torch.nn.functional.softplus(draw.single(B, L, H) - 4),
        "A": -draw.single(H).exp(),
        "B": draw(B, L, 1, N),
        "C": draw(B, L, 1, N),
    }


def _ssd_mamba_ssm(x: Named) -> Tensor:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    return mamba_chunk_scan_combined(*x.values(), chunk_size=256)


def _products(s: Mapping[str, int], N: int, P: int, heads: int, chunk: int) -> float:
    """Operations of one pass over chunks: C B^T of ``heads``, what they apply to x."""
    pairs = heads * N + s["H"] * P
    return float(s["B"] * s["L"] * (chunk * pairs + 4 * s["H"] * N * P))


def _ssd_row(*most: float) -> Row:
    sizes = {"B": 8, "L": 2048, "H": 32, "P": 64, "N": 128}
    return Row(
        "ssd",
        sizes,
        sizes | {"B": 1, "H": 4},
        _ssd,
        lambda x: ops.ssd(**x)[0],
        {"mamba_ssm": Peer("mamba_ssm", _ssd_mamba_ssm)},
        work=lambda s: (0.0, _products(s, s["N"], s["P"], 1, 64)),
        target=Target(*most),
    )


def _gated(sizes: Mapping[str, int], generator: torch.Generator, K: int) -> Named:
    draw = _Draw(generator)
    B, L, H, size, V = sizes.values()
    decays = torch.nn.functional.logsigmoid(draw.single(B, L, H, K)) / 16
    q, k = (draw(B, L, H, size) * size**-0.5 for _ in range(2))
    return {"q": q, "k": k, "v": draw(B, L, H, V), "log_a": decays.bfloat16()}


def _diagonal(sizes: Mapping[str, int], generator: torch.Generator) -> Named:
    return _gated(sizes, generator, sizes["K"])


def _scalar(sizes: Mapping[str, int], generator: torch.Generator) -> Named:
    return _gated(sizes, generator, 1)


def _fla_gla(x: Named) -> Tensor:
    from fla.ops.gla import chunk_gla

    return chunk_gla(x["q"], x["k"], x["v"], x["log_a"], scale=1.0)[0]


def _fla_simple_gla(x: Named) -> Tensor:
    from fla.ops.simple_gla import chunk_simple_gla

    return chunk_simple_gla(x["q"], x["k"], x["v"], x["log_a"], scale=1.0)[0]


def _one_decay_a_head(x: Named) -> Named:
    return x | {"log_a": x["log_a"][..., 0].contiguous()}


def _diagonal_row(draw: Any, peer: Mapping[str, Peer], *most: float) -> Row:
    sizes = {"B": 8, "L": 2048, "H": 32, "K": 64, "V": 64}
    return Row(
        "diagonal_ssd",
        sizes,
        sizes | {"B": 1, "H": 4},
        draw,
        lambda x: ops.diagonal_ssd(**x)[0],
        peer,
        work=lambda s: (0.0, _products(s, s["K"], s["V"], s["H"], 64)),
        target=Target(*most),
    )


# --- the rest -------------------------------------------------------------------------


def _conv(sizes: Mapping[str, int], generator: torch.Generator) -> Named:
    draw = _Draw(generator)
    B, D, L, W = sizes.values()
    weight = draw.single(D, W) / 2
    return {"x": draw(B, L, D), "weight": weight, "bias": draw.single(D)}


def _conv_dao(x: Named) -> Tensor:
    from causal_conv1d import causal_conv1d_fn

    y = causal_conv1d_fn(x["x"].mT, x["weight"], x["bias"], activation="silu")
    return y.mT


def _conv_dao_time_last(x: Named) -> Tensor:
    from causal_conv1d import causal_conv1d_fn

    y = causal_conv1d_fn(x["x"], x["weight"], x["bias"], activation="silu")
    return y.mT


def _conv_row(*most: float) -> Row:
    sizes = {"B": 8, "D": 2048, "L": 2048, "W": 4}
    return Row(
        "causal_conv1d",
        sizes,
        sizes | {"B": 2},
        _conv,
        lambda x: ops.causal_conv1d(**x, activation="silu")[0],
        {
            "causal-conv1d, channels last": Peer("causal_conv1d", _conv_dao),
            "causal-conv1d, time last": Peer(
                "causal_conv1d", _conv_dao_time_last, _time_last
            ),
        },
        work=lambda s: (float(s["B"] * s["D"] * s["L"]), 0.0),
        target=Target(*most),
    )


def _linear(sizes: Mapping[str, int], generator: torch.Generator) -> Named:
    draw = _Draw(generator)
    shape = tuple(sizes.values())
    a = torch.sigmoid(draw.single(*shape) + 2).bfloat16()
    return {"a": a, "b": draw(*shape)}


def _linear_row(B: int, L: int, C: int) -> Row:
    sizes = {"B": B, "L": L, "C": C}
    return Row(
        "linear_scan",
        sizes,
        sizes | {"C": min(C, 256)},
        _linear,
        lambda x: ops.linear_scan(**x)[0],
    )


_GLA = {"fla chunk_gla": Peer("fla", _fla_gla)}
_SIMPLE_GLA = {"fla chunk_simple_gla": Peer("fla", _fla_simple_gla, _one_decay_a_head)}
ROWS: dict[str, Row] = {
    "scan": _selective_row(8, 2048, 2048, 16, 0.5, 0.5),
    "scan-n64": _selective_row(8, 2048, 2048, 64, 0.5, 0.5),
    "scan-long": _selective_row(1, 4096, 16384, 16, 0.5, 0.5),
    "scan-small": _selective_row(32, 128, 128, 16, 0.8, 0.6),
    "scan-n256": _selective_row(32, 256, 100, 256, 0.8, 0.6),
    "ssd": _ssd_row(0.5, 0.5),
    "diagonal": _diagonal_row(_diagonal, _GLA, 0.6, 0.6),
    "scalar": _diagonal_row(_scalar, _SIMPLE_GLA, 0.8),
    "conv": _conv_row(1.0, 1.0),
    "linear": _linear_row(8, 2048, 2048),
    "linear-long": _linear_row(1, 16384, 1024),
}
