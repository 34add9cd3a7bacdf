"""The self-test of GPU kernels: each against the naive loop, before it is trusted.

A kernel is compiled anew for every GPU, torch and Triton, and compilers have bugs: so
the first call of an operator on a GPU runs its kernel on a small problem of awkward
sizes, forward and backward, in float32 and bfloat16, and compares outputs, final state
and every gradient with the naive loop in double precision on the CPU. What is found is
kept in a file (:func:`cache_file`), so that the next process reads it. A kernel that
fails is switched off with one warning, and the operator's next backend runs instead.
``python -m ssm.warmup`` runs all tests, failed ones again.
"""

import hashlib
import importlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from ssm.ops._gpu import say_once

# Of ||x - reference|| / ||reference||: faults are of order one, rounding far below.
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 3e-2}
B = 2

Named = dict[str, Tensor]
Key = tuple[str, str]  # of an operator and a backend


@dataclass(frozen=True)
class Problem:
    """Operands of one operator.

    ``sequences`` come in the dtype that is tested, ``constants`` in float32, complex
    numbers as they are.
    """

    sequences: Named
    constants: Named
    options: Mapping[str, Any] = field(default_factory=dict)

    def operands(self, device: torch.device, dtype: torch.dtype, wide: bool) -> Named:
        """Leaves that want gradients; ``wide``: the same values in float64."""
        dtypes = dict.fromkeys(self.sequences, dtype)
        dtypes |= dict.fromkeys(self.constants, torch.float32)
        found = {}
        for name, x in (self.sequences | self.constants).items():
            if not x.is_complex():
                x = x.to(dtypes[name])
                x = x.double() if wide else x
            found[name] = x.to(device).requires_grad_()
        return found


class Draw:
    """Normal numbers from one stream, and the sizes they are drawn for.

    ``even``: sizes that 16 divides, as models have them; else none of them is.
    Compilers treat the two differently.
    """

    def __init__(self, even: bool) -> None:
        self.generator = Generator().manual_seed(int(even))
        self.even, self.L = even, 192 if even else 133

    def sizes(self, *pairs: tuple[int, int]) -> tuple[int, ...]:
        """The first of each pair, or the second where sizes are even."""
        return tuple(pair[self.even] for pair in pairs)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def below_zero(self, *shape: int) -> Tensor:
        """Logarithms of decays."""
        return -self(*shape).exp()


def _add_norm(draw: Draw) -> Problem:
    (D,) = draw.sizes((37, 64))
    operands = {"x": draw(B, D), "added": draw(B, D), "weight": draw(D)}
    return Problem(operands, {})


def _linear_step(draw: Draw) -> Problem:
    N, K = draw.sizes((37, 64), (75, 128))
    return Problem({"x": draw(B, K), "weight": draw(N, K), "bias": draw(N)}, {})


def _packed_linear(draw: Draw) -> Problem:
    # so many columns that the loss's weights of one do not cancel
    N, K = draw.sizes((359, 368), (37, 64))
    operands = {"x": draw(draw.L, K), "weight": draw(N, K), "bias": draw(N)}
    return Problem(operands, {})


def _linear_scan(draw: Draw) -> Problem:
    L, (C,) = draw.L, draw.sizes((37, 64))
    a = torch.tanh(draw(B, L, C))
    a[:, 3::7] = 0
    return Problem({"a": a, "b": draw(B, L, C)}, {"initial_state": draw(B, C)})


def _causal_conv1d(draw: Draw) -> Problem:
    L, (D,), W = draw.L, draw.sizes((37, 64)), 4
    sequences = {"x": draw(B, L, D), "initial_state": draw(B, W - 1, D)}
    constants = {"weight": draw(D, W), "bias": draw(D)}
    return Problem(sequences, constants, {"activation": "silu"})


def _causal_conv1d_cuda(draw: Draw) -> Problem:
    """Channels in eights, from zeros: what those kernels serve."""
    L, (D,), W = draw.L, draw.sizes((40, 64)), 4
    constants = {"weight": draw(D, W), "bias": draw(D)}
    return Problem({"x": draw(B, L, D)}, constants, {"activation": "silu"})


def _fft_conv(draw: Draw) -> Problem:
    L, (D, Lk) = draw.L, draw.sizes((37, 64), (41, 128))
    sequences = {"u": draw(B, L, D), "initial_state": draw(B, Lk - 1, D)}
    return Problem(sequences, {"kernel": draw(D, Lk), "D": draw(D)})


def _power_sums(draw: Draw) -> Problem:
    D, N = draw.sizes((5, 16), (13, 64))
    c, z = (torch.complex(draw(D, N), draw(D, N)) for _ in range(2))
    return Problem({}, {"c": c, "z": z / (1 + z.abs())}, {"L": draw.L})


def _short_attention(draw: Draw) -> Problem:
    M, P, L = draw.sizes((3, 4), (13, 16), (19, 32))
    parts = ((B, L), (2 * B, 2))
    qkv = draw(sum(b * length for b, length in parts), 3, M, P)
    return Problem({"qkv": qkv}, {}, {"parts": parts})


def _selective_scan(draw: Draw) -> Problem:
    L, (D,), N = draw.L, draw.sizes((37, 64)), 16
    sequences = {name: draw(B, L, D) for name in ("u", "delta", "z")}
    sequences |= {name: draw(B, L, N) for name in "BC"}
    constants = {"A": draw.below_zero(D, N), "D": draw(D), "delta_bias": draw(D)}
    constants["initial_state"] = draw(B, D, N)
    return Problem(sequences, constants, {"delta_softplus": True})


def _ssd(draw: Draw) -> Problem:
    L, (H, P, G, N) = draw.L, draw.sizes((4, 2), (24, 64), (2, 1), (40, 64))
    sequences = {"x": draw(B, L, H, P), "dt": draw(B, L, H), "z": draw(B, L, H, P)}
    sequences |= {name: draw(B, L, G, N) for name in "BC"}
    constants = {"A": draw.below_zero(H), "D": draw(H), "dt_bias": draw(H)}
    constants["initial_state"] = draw(B, H, P, N)
    return Problem(sequences, constants, {"dt_softplus": True})


def _diagonal_ssd(draw: Draw) -> Problem:
    L, (H, K, V) = draw.L, draw.sizes((3, 2), (24, 64), (40, 64))
    sequences = {name: draw(B, L, H, K) for name in "qk"}
    sequences |= {"v": draw(B, L, H, V), "log_a": draw.below_zero(B, L, H, K)}
    return Problem(sequences, {"initial_state": draw(B, H, K, V)})


PROBLEMS: dict[str, Callable[[Draw], Problem]] = {
    "add_norm": _add_norm,
    "causal_conv1d": _causal_conv1d,
    "diagonal_ssd": _diagonal_ssd,
    "fft_conv": _fft_conv,
    "linear_scan": _linear_scan,
    "linear_step": _linear_step,
    "packed_linear": _packed_linear,
    "power_sums": _power_sums,
    "selective_scan": _selective_scan,
    "short_attention": _short_attention,
    "ssd": _ssd,
}

# Kernels that serve fewer calls than their operator.
OWN_PROBLEMS: dict[Key, Callable[[Draw], Problem]] = {
    ("causal_conv1d", "cuda"): _causal_conv1d_cuda,
}


# --- one test -------------------------------------------------------------------------


def check(op: str, backend: str, device: torch.device, *, even: bool = False) -> str:
    """What is wrong with this backend on this device; empty if nothing is.

    Runs in a thread of its own: the caller's autocast, gradient mode, stream and
    tracing are a thread's, and none of them may touch the test.
    """
    with ThreadPoolExecutor(1) as alone:
        return alone.submit(_check, op, backend, device, even).result()


def _check(op: str, backend: str, device: torch.device, even: bool) -> str:
    problem = OWN_PROBLEMS.get((op, backend), PROBLEMS[op])(Draw(even))
    try:
        for dtype in TOLERANCE:
            if fault := _fault(op, problem, backend, device, dtype):
                return fault
    except torch.cuda.OutOfMemoryError:
        raise  # says nothing about the kernel
    except Exception as error:  # noqa: BLE001  # compilers raise whatever they like
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return ""


def _fault(
    op: str, problem: Problem, backend: str, device: torch.device, dtype: torch.dtype
) -> str:
    operands = problem.operands(device, dtype, wide=False)
    found = _results(op, operands, problem.options, backend)
    operands = problem.operands(torch.device("cpu"), dtype, wide=True)
    expected = _results(op, operands, problem.options, "naive")
    for name, value in found.items():
        error = float((value - expected[name]).norm() / expected[name].norm())
        if not error <= TOLERANCE[dtype]:  # NaN fails too
            return (
                f"{name} is off by {error:.1e} in {str(dtype).removeprefix('torch.')}"
            )
    return ""


def _results(
    op: str, operands: Named, options: Mapping[str, Any], backend: str
) -> Named:
    """Outputs, a final state say, and all gradients, in float64 on the CPU."""
    import ssm.ops

    found = getattr(ssm.ops, op)(**operands, **options, backend=backend)
    outputs = found if isinstance(found, tuple) else (found,)
    loss = torch.stack([(y.double() * _weights(y)).sum() for y in outputs]).sum()
    gradients = torch.autograd.grad(loss, list(operands.values()))
    names = ("the output", "the second output")
    results = dict(zip(names, outputs, strict=False))
    for name, gradient in zip(operands, gradients, strict=True):
        results[f"the gradient of {name}"] = gradient
    return {name: _real(x.detach()).cpu().double() for name, x in results.items()}


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def _weights(x: Tensor) -> Tensor:
    """Uneven weights of a loss, so that no gradient cancels."""
    weights = torch.arange(x.numel(), dtype=torch.float64).mul(0.7).cos()
    return weights.reshape(x.shape).to(x.device)


# --- what is known --------------------------------------------------------------------

_known: dict[tuple[Key, int], str] = {}
_in_test: set[tuple[Key, int]] = set()


def is_known(op: str, backend: str, index: int) -> bool:
    """Whether this kernel's verdict is final: it was tested, or read from the file."""
    return ((op, backend), index) in _known


def verdict(op: str, backend: str, index: int) -> str | None:
    """Why this kernel is off on CUDA device ``index``, or None; tests it if need be.

    Trusted untested: while its own test runs, and while a CUDA graph is captured, which
    a test would break (a capture follows a warm-up, which has tested it).
    """
    key = ((op, backend), index)
    if key not in _known:
        if key in _in_test or torch.cuda.is_current_stream_capturing():
            return None
        stored = _stored(index).get(f"{op}/{backend}")
        if stored is None:
            return judge(op, backend, index)
        _learn(key, stored)
    return _known[key] or None


def judge(op: str, backend: str, index: int, *, whole: bool = False) -> str | None:
    """Test this kernel, whatever was known; keep the verdict and return it.

    ``whole``: at the sizes of models too, which compiles what they will run.
    """
    key = ((op, backend), index)
    _in_test.add(key)
    try:
        device = torch.device("cuda", index)
        fault = check(op, backend, device)
        if whole and not fault:
            fault = check(op, backend, device, even=True)
    except torch.cuda.OutOfMemoryError:  # says nothing; tried again
        return None
    finally:
        _in_test.discard(key)
    reason = f"it failed its self-test: {fault}" if fault else ""
    _learn(key, reason)
    _store(index, f"{op}/{backend}", reason)
    return reason or None


def _learn(key: tuple[Key, int], reason: str) -> None:
    _known[key] = reason
    if reason:
        (op, backend), index = key
        say_once(
            f"{op}: the kernel {backend!r} is switched off on "
            f"{torch.cuda.get_device_name(index)}: {reason}; the next backend runs "
            "instead (python -m ssm.warmup tests it again)"
        )


def kernels() -> Iterator[Key]:
    """Every GPU kernel of every operator's table."""
    for op in PROBLEMS:
        table = importlib.import_module(f"ssm.ops.{op}.op").BACKENDS
        yield from ((op, name) for name, backend in table.items() if backend.gpu)


# --- the file -------------------------------------------------------------------------


def cache_file() -> Path:
    """Where verdicts are kept: under XDG_CACHE_HOME, or ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "ssm-laboratory" / "gpu_kernels.json"


@cache
def machine(index: int) -> str:
    """All that a verdict depends on: the GPU, the compilers, and our own sources."""
    major, minor = torch.cuda.get_device_capability(index)
    triton = importlib.import_module("triton").__version__
    return (
        f"{torch.cuda.get_device_name(index)} ({major}.{minor}), "
        f"torch {torch.__version__}, triton {triton}, sources {_digest()}"
    )


def _digest() -> str:
    total = hashlib.sha256()
    folder = Path(__file__).parent
    for path in sorted([*folder.rglob("*.py"), *folder.rglob("*.cu")]):
        total.update(path.read_bytes())
    return total.hexdigest()[:12]


def _stored(index: int) -> dict[str, str]:
    """Kernel -> verdict on this machine, as the file has it."""
    found = _read().get(machine(index), {})
    return {name: why for name, why in found.items() if isinstance(why, str)}


def _read() -> dict[str, dict[str, str]]:
    try:
        content = json.loads(cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none yet, or spoilt: tested again
        return {}
    if not isinstance(content, dict):
        return {}
    return {name: kept for name, kept in content.items() if isinstance(kept, dict)}


def _store(index: int, kernel: str, reason: str) -> None:
    """Add one verdict; without a place to write, every process tests again."""
    content = _read()
    content.setdefault(machine(index), {})[kernel] = reason
    path = cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        half = path.with_suffix(f".{os.getpid()}")  # never seen under the true name
        half.write_text(json.dumps(content, indent=1, sort_keys=True), "utf-8")
        half.replace(path)
    except OSError:
        return
