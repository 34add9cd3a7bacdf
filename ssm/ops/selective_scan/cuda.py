"""The selective scan in CUDA C++ (``kernels.cu``), compiled for the GPU at first use.

For real A, and B and C that vary in time: bias, softplus, scan, skip, gate and padding
in one pass over the inputs, in float32, from float32, bfloat16 or float16. Saved for
the backward pass are the inputs and the state every KEEP steps. Where rows and channels
are too few to fill the GPU, time is cut into segments that run side by side.
"""

import functools
import itertools
import struct
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from ssm.ops._gpu import most_shared, multiprocessors, on_device_of, unwritten
from ssm.ops._library import is_ordinary, operator, wants_gradient
from ssm.ops._nvrtc import Kernel, kernel

SOURCE = Path(__file__).with_name("kernels.cu")
KEEP = 32
_IO = {torch.float32: 32, torch.float16: 16, torch.bfloat16: 17}


class Plan(NamedTuple):
    """How the work is laid out over threads; the letters are those of kernels.cu."""

    NS: int  # states of a lane
    LN: int  # lanes that share a channel
    CH: int  # channels of a lane
    warps: int  # of a block
    blocks: int  # wanted on a multiprocessor at once
    tile: int = 32  # steps staged at once: Q
    unroll: int = 2
    sub: int = 8  # steps whose states the backward pass has in registers: T
    decays: int = 0  # and their decays too
    flush: int = 8  # steps whose dB and dC wait in shared memory, at most ``sub``
    split: int = 1  # warps that share a channel, backward

    @property
    def states(self) -> int:
        """All states of a channel, padded."""
        return self.NS * self.LN * self.split

    @property
    def channels(self) -> int:
        """Channels of a block."""
        return self.warps // self.split * (32 // self.LN) * self.CH


# For the states that there is room for; of those with the same room, the first that the
# GPU has shared memory for and whose warps are six or more on a multiprocessor, or else
# the last.
# docs/kernels/selective_scan.md argues the numbers.
FORWARD = (
    Plan(4, 1, 1, 2, 4),
    Plan(4, 2, 1, 4, 4),
    Plan(4, 4, 1, 4, 4, tile=64),
    Plan(2, 8, 1, 4, 2, tile=64, unroll=4),
    Plan(4, 8, 2, 4, 3, unroll=1),
    Plan(8, 8, 2, 4, 3, unroll=1),
    Plan(8, 16, 2, 4, 2, unroll=1),
    Plan(8, 32, 2, 8, 2, unroll=1),
    Plan(8, 32, 2, 4, 2, unroll=1),
)
BACKWARD = (
    Plan(4, 1, 1, 2, 2, decays=1),
    Plan(4, 2, 1, 4, 2, decays=1),
    Plan(4, 4, 2, 4, 2, decays=1),
    Plan(4, 4, 1, 4, 4, decays=1),
    Plan(4, 8, 2, 4, 2, decays=1),
    Plan(4, 16, 4, 4, 2, sub=4, decays=1, flush=4),
    Plan(4, 8, 4, 8, 1, sub=4, decays=1, flush=4, split=4),
    Plan(8, 16, 2, 8, 1),
    Plan(4, 16, 4, 8, 1, sub=4, decays=1, flush=4, split=4),
    Plan(8, 32, 2, 4, 1),
)


def plan_for(
    plans: Sequence[Plan], N: int, channels: int, multiprocessors: int, shared: int
) -> Plan:
    """The layout for N states of so many channels, side by side in all rows.

    ``shared``: bytes of shared memory that a block can have.
    """
    room = min(plan.states for plan in plans if plan.states >= N)
    fitting = [plan for plan in plans if plan.states == room]
    enough = 6 * multiprocessors
    backward = plans is BACKWARD
    filled = (
        plan
        for plan in fitting
        if channels * plan.warps // plan.channels >= enough
        and _shared(plan, backward) <= shared
    )
    return next(filled, fitting[-1])


# --- calls of one kind ----------------------------------------------------------------


class _Signature(NamedTuple):
    """All that decides which kernels run, and how, but for the addresses."""

    backward: bool
    softplus: bool
    device: int
    dtype: torch.dtype
    low: int  # the last bits of the addresses of what has strides, put together
    shape: tuple[int, ...]  # B, L, D
    A: tuple[int, ...]  # its shape
    B: tuple[int, ...]
    strides: tuple[tuple[int, ...] | None, ...]  # of u, delta, z, B, C, dy
    dense: tuple[bool, ...]  # A, D, bias, h0, dfinal, lengths

    @property
    def groups(self) -> int:
        """Of B and C."""
        return self.B[2] if len(self.B) == 4 else 1

    @property
    def readable(self) -> bool:
        """Whether the kernels can take every operand where it is."""
        return all(self.dense) and all(s is None or s[-1] == 1 for s in self.strides)

    @property
    def gated(self) -> bool:
        """Whether there is a z."""
        return self.strides[2] is not None

    def numbers(self) -> list[int]:
        """The strides as kernels.cu lists them, without those of the last axis."""
        found: list[int] = []
        for strides, axes in zip(self.strides, (2, 2, 2, 3, 3, 2), strict=True):
            outer = () if strides is None else strides[:-1]
            found += [*outer, 0, 0, 0][:axes]  # (B, L, N): one group, no stride
        return found

    @property
    def paired(self) -> bool:
        """Whether all rows can be read in pairs."""
        sizes = (self.shape[2] // self.groups, self.A[1], *self.numbers())
        aligned = self.low % (2 * self.dtype.itemsize) == 0
        return aligned and all(size % 2 == 0 for size in sizes)

    def outputs(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shapes and dtypes of what is written.

        y, the final state and the states at every ``KEEP`` steps; or the gradients of
        u, delta, z, B, C, A, D, bias and the first state.
        """
        rows, L, channels = self.shape
        if not self.backward:
            states = [(rows, *self.A), (rows, -(-L // KEEP), *self.A)]
            return [(self.shape, self.dtype), *((s, torch.float32) for s in states)]
        dz = self.shape if self.gated else (0,)
        inputs = [self.shape, self.shape, dz, self.B, self.B]
        others = [self.A, (channels,), (channels,), (rows, *self.A)]
        return [
            *((shape, self.dtype) for shape in inputs),
            *((shape, torch.float32) for shape in others),
        ]


class _Layout:
    """What calls of one signature share: kernels, grid, memory and numbers."""

    def __init__(self, key: _Signature) -> None:
        rows, L, channels = key.shape
        N, groups = key.A[1], key.groups
        count = multiprocessors(key.device)
        plans = BACKWARD if key.backward else FORWARD
        # Backward, segments cost little and make up for few channels.
        work = rows * channels * (_most_segments(L) if key.backward else 1)
        shared = most_shared(key.device)
        self._plan = plan = plan_for(plans, N, work, count, shared)
        self._key, self._device = key, key.device
        parts = -(-channels // groups // plan.channels)
        blocks = rows * groups * parts
        segment, segments = _segments(L, count * plan.blocks // blocks)
        self.segments, self.blocks = segments, blocks * segments
        sizes = (rows, L, channels, N, groups, segment, segments)
        self._numbers = _PACK_NUMBERS(*key.numbers(), *sizes)
        workspace = self._workspace(parts)
        ends = itertools.accumulate(workspace.values())
        # of the kernels' memory: bytes from its start
        self._places = [
            4 * (end - size) for end, size in zip(ends, workspace.values(), strict=True)
        ]
        self._pack = _packing(key.backward, workspace)
        self.readable = key.readable
        self.outputs = [unwritten(*made, key.device) for made in key.outputs()]
        self._memory = unwritten((sum(workspace.values()),), torch.float32, key.device)
        # one thread for each, or for four neighbours: see add_up
        matrices = 2 * rows * L * groups * (N if N % 4 else N // 4)
        totals = matrices + channels * (N + 2)
        self._sums = -(-totals // 256) if key.backward else 0  # blocks of ``add_up``

    def _workspace(self, parts: int) -> dict[str, int]:
        """Name -> floats of the memory that the kernels need between them."""
        (rows, L, channels), N = self._key.shape, self._key.A[1]
        found = {}
        if self._key.backward:
            found["partial"] = parts * rows * L * self._key.groups * 2 * N
        rows *= self.segments
        if self._key.backward:
            found["dA_rows"] = rows * channels * N
            found["dD_rows"] = found["dbias_rows"] = rows * channels
        if self.segments > 1:
            found["ends"], found["sums"] = rows * channels * N, rows * channels
        return found

    def launch(self, pointers: Sequence[int]) -> None:
        """The kernels, with the first pointers of their struct Args.

        Those to what they write between them are found here; it may be freed when they
        are launched.
        """
        places = self._places
        if places:
            memory = self._memory()
            start = memory.data_ptr()
            pointers = [*pointers, *[start + place for place in places]]
        argument = self._pack(*pointers) + self._numbers
        stream = torch._C._cuda_getCurrentRawStream(self._device)
        if self.segments > 1:
            self.local(self.blocks, argument, stream)
        self.scan(self.blocks, argument, stream)
        if self._sums:
            self.add_up(self._sums, argument, stream)

    @functools.cached_property
    def scan(self) -> Kernel:
        """The scan itself, forward or backward."""
        return self._kernel("scan_back" if self._key.backward else "scan")

    @functools.cached_property
    def local(self) -> Kernel:
        """What each segment does to a state (or a gradient) of zero."""
        return self._kernel("scan_back_local" if self._key.backward else "scan", True)

    @functools.cached_property
    def add_up(self) -> Kernel:
        """The sums over blocks."""
        return self._kernel("add_up")

    def _kernel(self, name: str, local: bool = False) -> Kernel:
        key, plan = self._key, self._plan
        small = name == "add_up"
        given = definitions(
            plan,
            key.backward,
            io=_IO[key.dtype],
            paired=key.paired,
            gated=key.gated,
            softplus=key.softplus,
            local=local,
        )
        return kernel(
            SOURCE,
            tuple(given.items()),
            name,
            key.device,
            256 if small else 32 * plan.warps,
            0 if small else _shared(plan, key.backward),
        )


def definitions(
    plan: Plan,
    backward: bool,
    *,
    io: int,
    paired: bool,
    gated: bool,
    softplus: bool,
    local: bool = False,
) -> dict[str, int]:
    """What kernels.cu is compiled with, by its names."""
    return {
        "IO": io,
        "PAIRED": int(paired),
        "GATED": int(gated),
        "SOFTPLUS": int(softplus),
        "NS": plan.NS,
        "LN": plan.LN,
        "CH": plan.CH,
        "SPLIT": plan.split,
        "WARPS": plan.warps,
        "Q": KEEP if backward else plan.tile,
        "KEEP": KEEP,
        "T": plan.sub,
        "UNROLL": plan.unroll,
        "DECAYS": plan.decays,
        "FLUSH": plan.flush,
        "LOCAL": int(local),
        "BACKWARD" if backward else "FORWARD": plan.blocks,
    }


@functools.lru_cache(4096)
def _layout(*signature: Any) -> _Layout:
    """For the fields of a :class:`_Signature`."""
    return _Layout(_Signature(*signature))


def _shared(plan: Plan, backward: bool) -> int:
    """Bytes of shared memory: the arrays at the start of the kernels."""
    D, N = plan.channels, plan.states
    if not backward:
        apart = plan.LN == 8 and plan.CH == 1
        outputs = D * plan.LN if apart else D + (0 if D % 32 else 16)
        return 4 * plan.tile * (2 * D + 2 * N + outputs)
    sums = plan.warps // plan.split * plan.flush * 2 * N
    stash = (KEEP // plan.sub - 1) * plan.CH * plan.NS * 32 * plan.warps
    parts = plan.split * 3 * D * KEEP if plan.split > 1 else 0
    return 4 * (KEEP * (3 * D + 2 * N) + sums + stash + parts)


def _segments(L: int, room: int) -> tuple[int, int]:
    """(steps of a segment, segments): as many as there is room for, none too short."""
    chunks = -(-L // KEEP)
    each = -(-chunks // max(1, min(room, _most_segments(L))))
    return each * KEEP, -(-chunks // each)


def _most_segments(L: int) -> int:
    """Segments of at least four chunks."""
    return max(1, min(-(-L // KEEP) // 4, 64))


_POINTERS = 30
_PACK_NUMBERS = struct.Struct("21q").pack
_WORKSPACE = ("partial", "dA_rows", "dD_rows", "dbias_rows", "ends", "sums")


def _packing(backward: bool, workspace: Iterable[str]) -> Callable[..., bytes]:
    """Packs the pointers that there are, those to ``workspace`` last; zeros between.

    Forward, there are none to gradients.
    """
    before = _POINTERS - len(_WORKSPACE)
    given = before if backward else before - 9
    memory = ["q" if name in workspace else "8x" for name in _WORKSPACE]
    return struct.Struct("".join([f"{given}q{8 * (before - given)}x", *memory])).pack


def _prepared(
    backward: bool,
    softplus: bool,
    inputs: Sequence[Tensor | None],
    others: Sequence[Tensor | None],
) -> tuple[_Layout, list[int], Sequence[Tensor | None]]:
    """(layout, addresses, what they are of) for one call.

    inputs: u, delta, z, B, C, dy; others: A, D, bias, h0, dfinal, lengths.
    """
    layout, pointers = _found(backward, softplus, inputs, others)
    if layout.readable:
        return layout, pointers, ()
    inputs = [x if x is None else _dense(x) for x in inputs]
    others = [x if x is None else x.contiguous() for x in others]
    return *_found(backward, softplus, inputs, others), (*inputs, *others)


def _found(
    backward: bool,
    softplus: bool,
    inputs: Sequence[Tensor | None],
    others: Sequence[Tensor | None],
) -> tuple[_Layout, list[int]]:
    """The layout of calls alike, and the addresses: microseconds, at every call."""
    u, _, _, B, _, _ = inputs
    A = others[0]
    if u is None or B is None or A is None:
        raise AssertionError("u, B and A are always given")
    pointers = [0 if x is None else x.data_ptr() for x in (*inputs, *others)]
    one, two, three, four, five, six, *_ = pointers
    layout = _layout(
        backward,
        softplus,
        u.get_device(),
        u.dtype,
        (one | two | three | four | five | six) & 7,
        u.shape,
        A.shape,
        B.shape,
        tuple([None if x is None else x.stride() for x in inputs]),
        tuple([x is None or x.is_contiguous() for x in others]),
    )
    return layout, pointers


def _dense(x: Tensor) -> Tensor:
    """With channels or states side by side in memory; a view where it can be."""
    return x if x.stride(-1) == 1 else x.contiguous()


# --- operators ------------------------------------------------------------------------


def _scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    lengths: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = (u, delta, z, B, C, None)
    others = (A, D, delta_bias, initial_state, None, lengths)
    with on_device_of(u):
        layout, pointers, held = _prepared(False, delta_softplus, inputs, others)
        y, final, starts = _forward_pass(layout, pointers, keep)
    del held
    return y, final, A.new_empty(len(u), 0, *A.shape) if starts is None else starts


def _forward_pass(
    layout: _Layout, pointers: list[int], keep: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The outputs, with the states that the backward pass needs if they are to be kept.

    pointers: to the operands.
    """
    new_y, new_final, new_starts = layout.outputs
    y, final = new_y(), new_final()
    starts = new_starts() if keep else None
    kept = 0 if starts is None else starts.data_ptr()
    layout.launch([*pointers, y.data_ptr(), final.data_ptr(), kept])
    return y, final, starts


def _forward_fake(u: Tensor, A: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y, final state and the states at every ``keep`` steps (B, K, D, N), or none."""
    rows, L, _ = u.shape
    chunks = -(-L // KEEP) if keep else 0
    return (
        _like(u),
        A.new_empty(rows, *A.shape),
        A.new_empty(rows, chunks, *A.shape),
    )


_forward = operator("selective_scan_cuda", device="CUDA")(_scan)


@_forward.register_fake
def _(  # type: ignore[no-untyped-def]  # as _scan
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
    delta_softplus,
    initial_state,
    lengths,
    keep,
):
    return _forward_fake(u, A, keep)


def _scan_back(
    dy: Tensor,
    dfinal: Tensor | None,
    starts: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    lengths: Tensor | None,
    first: bool,
) -> list[Tensor]:
    """Gradients of u, delta, z, B, C, A, D, bias, with ``first`` of the first state."""
    inputs = (u, delta, z, B, C, dy)
    others = (A, D, delta_bias, None, dfinal, lengths)
    with on_device_of(u):
        layout, pointers, held = _prepared(True, delta_softplus, inputs, others)
        gradients = _backward_pass(layout, pointers, starts, first)
    del held
    return gradients


def _backward_pass(
    layout: _Layout, pointers: list[int], starts: Tensor, first: bool
) -> list[Tensor]:
    """As :func:`_scan_back`; pointers: to the operands and the outputs' gradients."""
    written = [new() for new in (layout.outputs if first else layout.outputs[:-1])]
    pointers += (0, 0, starts.data_ptr())
    pointers += [gradient.data_ptr() for gradient in written]
    layout.launch(pointers if first else [*pointers, 0])
    return written


def _backward_fake(
    u: Tensor, A: Tensor, B: Tensor, C: Tensor, z: Tensor | None, first: bool
) -> list[Tensor]:
    rows, _, channels = u.shape
    dh0 = [A.new_empty(rows, *A.shape)] if first else []
    return [
        _like(u),
        _like(u),
        u.new_empty(0) if z is None else _like(u),
        _like(B),
        _like(C),
        _like(A),
        A.new_empty(channels),
        A.new_empty(channels),
        *dh0,
    ]


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_backward = operator("selective_scan_cuda_backward", device="CUDA")(_scan_back)


@_backward.register_fake
def _(  # type: ignore[no-untyped-def]  # as _scan_back
    dy,
    dfinal,
    starts,
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
    delta_softplus,
    lengths,
    first,
):
    return _backward_fake(u, A, B, C, z, first)


_backward.refuse_backward("selective_scan", "cuda")


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]  # torch.library's hook
    *tensors, delta_softplus, _, lengths, _ = inputs  # initial state; keep
    ctx.save_for_backward(*tensors, lengths, output[2])
    ctx.delta_softplus = delta_softplus
    ctx.set_materialize_grads(False)


def _gradients(ctx, dy, dfinal, _):  # type: ignore[no-untyped-def]  # the same
    *operands, lengths, starts = ctx.saved_tensors
    dy = torch.zeros_like(operands[0]) if dy is None else dy
    first = ctx.needs_input_grad[9]
    found = _backward(dy, dfinal, starts, *operands, ctx.delta_softplus, lengths, first)
    *gradients, dh0 = _of_given(operands, found)
    return *gradients, None, dh0, None, None


def _of_given(
    saved: Sequence[Tensor | None], gradients: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """The gradients of u to delta_bias and the first state, of those that are there."""
    D, z, delta_bias = saved[5:8]
    du, ddelta, dz, dB, dC, dA, dD, dbias, *dh0 = gradients
    return (
        du,
        ddelta,
        dA,
        dB,
        dC,
        None if D is None else dD,
        None if z is None else dz,
        None if delta_bias is None else dbias,
        dh0[0] if dh0 else None,
    )


_forward.register_autograd(_gradients, setup_context=_save)


class _Alike:
    """Calls on ordinary tensors alike, in memory too, which the kernels take as is."""

    def __init__(self, layout: _Layout, delta_softplus: bool, first: bool) -> None:
        self._layout = layout
        self.delta_softplus = delta_softplus
        self.first = first  # whether there is an initial state
        self._backward: dict[Any, _Layout] = {}

    def __call__(
        self,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        delta_bias: Tensor | None,
        _: bool,  # softplus, which the layout has
        initial_state: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """As :func:`selective_scan_cuda`."""
        operands = (u, delta, A, B, C, D, z, delta_bias, initial_state)
        if wants_gradient(operands):
            found = _Direct.apply(self, *operands)
        else:
            found = self.run(False, *operands)
        return found[0], found[1]

    def run(
        self,
        keep: bool,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        delta_bias: Tensor | None,
        initial_state: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As :func:`_forward_pass`."""
        tensors = (u, delta, z, B, C, None, A, D, delta_bias, initial_state, None, None)
        pointers = [0 if x is None else x.data_ptr() for x in tensors]
        with on_device_of(u):
            return _forward_pass(self._layout, pointers, keep)

    def run_back(
        self, tensors: tuple[Tensor | None, ...], starts: Tensor, first: bool
    ) -> list[Tensor]:
        """As :func:`_backward_pass`, of the operands as the kernels list them.

        What was saved may lie elsewhere since: hooks of autograd can have moved it.
        """
        pointers = [0 if x is None else x.data_ptr() for x in tensors]
        u, delta, z, B, C, dy = pointers[:6]
        strides = [None if x is None else x.stride() for x in tensors]
        key = ((u | delta | z | B | C | dy) & 7, *strides)
        held: Sequence[Tensor | None] = ()
        if (layout := self._backward.get(key)) is None:
            layout, pointers, held = _prepared(
                True, self.delta_softplus, tensors[:6], tensors[6:]
            )
            if not held:
                self._backward[key] = layout
        with on_device_of(starts):
            gradients = _backward_pass(layout, pointers, starts, first)
        del held
        return gradients


class _Direct(torch.autograd.Function):
    """The operator without the dispatcher; the kept states are no output of it."""

    @staticmethod
    def forward(ctx, alike, *operands):  # type: ignore[no-untyped-def]  # torch's
        y, final, starts = alike.run(True, *operands)
        ctx.save_for_backward(*operands[:8], starts)
        ctx.alike = alike
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    def backward(ctx, dy, dfinal):  # type: ignore[no-untyped-def]  # the same
        alike = ctx.alike
        first = alike.first and ctx.needs_input_grad[9]
        u, delta, A, B, C, D, z, delta_bias, starts = saved = ctx.saved_tensors
        dy = torch.zeros_like(u) if dy is None else dy
        if torch.is_grad_enabled() or not is_ordinary(dy):
            given = (dy, dfinal, starts, *saved[:8], alike.delta_softplus, None, first)
            gradients = _backward(*given)
        else:
            others = (A, D, delta_bias, None, dfinal, None)
            gradients = alike.run_back((u, delta, z, B, C, dy, *others), starts, first)
        return None, *_of_given(saved, gradients)


def direct(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
) -> _Alike | None:
    """For calls like this one, where nothing is to be converted or copied; or None."""
    inputs = (u, delta, z, B, C, None)
    others = (A, D, delta_bias, initial_state, None, None)
    if (
        u.shape[1] == 0
        or u.dtype not in _IO
        or B.shape != C.shape
        or any(x is not None and x.dtype != u.dtype for x in inputs)
        or any(x is not None and x.dtype != torch.float32 for x in others)
    ):
        return None
    layout, _ = _found(False, delta_softplus, inputs, others)
    if not layout.readable:
        return None
    return _Alike(layout, delta_softplus, initial_state is not None)


def selective_scan_cuda(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y and the final state of the whole operator; differentiable once.

    u, delta, z (B, L, D), B, C (B, L, [G,] N), all float32, bfloat16 or float16, or
    else taken as float32; A (D, N); D, delta_bias (D,); initial state (B, D, N), None
    for zeros. Only the last axis must be dense: parts of a projection need no copies.
    """
    dtype = u.dtype
    if (
        dtype not in _IO
        or not delta.dtype == B.dtype == C.dtype == dtype
        or (z is not None and z.dtype != dtype)
    ):
        u, delta, B, C = (x.float() for x in (u, delta, B, C))
        z = _float(z)
    lengths = lengths if lengths is None else lengths.to(torch.int64)
    operands = (
        *(u, delta, _float(A), B, C, _float(D), z, _float(delta_bias)),
        *(delta_softplus, _float(initial_state), lengths),
    )
    y, final, _ = _forward(*operands, wants_gradient(operands))
    return y, final


@overload
def _float(x: Tensor) -> Tensor: ...
@overload
def _float(x: None) -> None: ...
def _float(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.dtype == torch.float32 else x.float()
