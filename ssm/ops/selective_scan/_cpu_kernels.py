"""The selective scan's loops for Numba, forward and backward.

A task scans blocks of W channels of one row through time, channels innermost so that
they fill the vector units; the state of a block, (N, W), stays in the L1 cache. Chunks
of Q steps are copied into buffers of exactly W channels (missing ones are zeros), so
that every inner loop runs over whole vectors. Padding (t >= length) is never read.

The backward pass computes the states of one chunk again from the state at its start
and then walks it backwards. Sums over channels and rows are partial sums added in a
fixed order: two runs are equal in every bit.

Vectors of W channels are values here, with +, -, * and /, which LLVM splits into
whatever vector registers the processor has: the automatic vectoriser uses half the
width of AVX-512 and keeps sums in memory. Sums of products may fuse; nothing else is
assumed: NaN, infinities and underflow stay what they are, and sums keep their order.

Arrays that have channels last are passed flat; ``place`` counts elements in them.
Buffers: (Q, W), element t W + i; states and decays (Q, N, W), element (t N + n) W + i.

One file, because Numba's cache notices changes only of the file it compiles.
"""

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, overload, register_model

W = 32  # channels of a vector
LOG2E = 1 / math.log(2)
_FUSE = ("contract",)

_njit: Any = numba.njit  # its published types lack some options
_inner = _njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
_outer = _njit(parallel=True, cache=True, nogil=True)

# Minimax on [-1/2, 1/2], highest power first: 2^t with p(0) = 1, so that 2^0 is exactly
# 1. Relative errors 2.0e-9 and 1.1e-19, before rounding: a fifth power (9.2e-8) would
# be a systematic error of a long memory, and of step sizes that hardly vary.
_POWER_OF_TWO = {
    types.float32: [
        0.00015353361890569305,
        0.0013398874422431324,
        0.009618437357816267,
        0.05550332471099665,
        0.24022647913626555,
        0.693147202855083,
        1.0,
    ],
    types.float64: [
        2.5729324177362305e-11,
        4.4558179083360645e-10,
        7.0548973041554995e-09,
        1.0178057087733941e-07,
        1.3215486808705563e-06,
        1.5252733841556773e-05,
        0.00015403530393370734,
        0.001333355814640647,
        0.00961812910762848,
        0.055504108664821625,
        0.24022650695910072,
        0.6931471805599453,
        1.0,
    ],
}
# atanh(s) / s in powers of s^2 <= 1/9; relative errors 4.5e-9 and 4.9e-18.
_ARTANH = {
    types.float32: [
        0.14005996033909324,
        0.14000902146080557,
        0.20010763646657634,
        0.3333320814241746,
        1.0,
    ],
    types.float64: [
        0.08082022805971766,
        0.04400369243072337,
        0.06000536404795356,
        0.06657072104827468,
        0.07692785032479312,
        0.09090894718066429,
        0.11111111358713932,
        0.1428571428355438,
        0.20000000000007292,
        0.3333333333333333,
        1.0,
    ],
}
# log(2) as a number with so few digits that its multiples are exact, and the rest.
_LN2 = {
    types.float32: (0.693359375, -2.12194440e-4),
    types.float64: (6.93147180369123816490e-01, 1.90821492927058770002e-10),
}


class Vector(types.Type):
    """W numbers of one floating-point type."""

    def __init__(self, dtype: types.Float) -> None:
        self.dtype = dtype
        super().__init__(name=f"Vector({dtype}, {W})")


def _llvm(dtype: types.Float) -> ir.VectorType:
    element = ir.FloatType() if dtype == types.float32 else ir.DoubleType()
    return ir.VectorType(element, W)


@register_model(Vector)
class _Model(models.PrimitiveModel):
    def __init__(self, manager: object, kind: Vector) -> None:
        super().__init__(manager, kind, _llvm(kind.dtype))


# --- memory ---------------------------------------------------------------------------


def _pointer(context: Any, builder: Any, kind: Any, array: Any, place: Any) -> Any:
    data = context.make_array(kind)(context, builder, array).data
    return builder.gep(data, [place])


@intrinsic
def load(typing, array, place):
    """The W elements from element ``place`` of a contiguous array on."""

    def generate(context, builder, signature, args):
        start = _pointer(context, builder, array, *args)
        start = builder.bitcast(start, _llvm(array.dtype).as_pointer())
        return builder.load(start, align=array.dtype.bitwidth // 8)

    return Vector(array.dtype)(array, types.intp), generate


@intrinsic
def store(typing, array, place, vector):
    """Write the W elements from element ``place`` of a contiguous array on."""

    def generate(context, builder, signature, args):
        start = _pointer(context, builder, array, *args[:2])
        start = builder.bitcast(start, _llvm(array.dtype).as_pointer())
        builder.store(args[2], start, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), generate


@intrinsic
def prefetch(typing, arrays, place):
    """Bring W elements from ``place`` on, of each of the arrays, near: only a hint."""

    def generate(context, builder, signature, args):
        byte, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, flag, flag, flag])
        hint = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        read, level_2, data = flag(0), flag(2), flag(1)
        for i in range(arrays.count):
            array = builder.extract_value(args[0], i)
            for line in range(0, W, 512 // arrays.dtype.dtype.bitwidth):
                at = builder.add(args[1], args[1].type(line))
                at = _pointer(context, builder, arrays.dtype, array, at)
                builder.call(hint, [builder.bitcast(at, byte), read, level_2, data])
        return context.get_dummy_value()

    return types.void(arrays, types.intp), generate


# --- arithmetic -----------------------------------------------------------------------


def _filled(vector: ir.VectorType, value: float) -> ir.Constant:
    return ir.Constant(vector, [value] * W)


def _indices(first: int, last: int) -> ir.Constant:
    kind = ir.VectorType(ir.IntType(32), last - first)
    return ir.Constant(kind, list(range(first, last)))


def _spread(builder: Any, dtype: types.Float, x: Any) -> Any:
    vector, place = _llvm(dtype), ir.IntType(32)(0)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), x, place)
    first = ir.Constant(ir.VectorType(ir.IntType(32), W), [0] * W)
    return builder.shuffle_vector(one, one, first)


@intrinsic
def splat(typing, x):
    """A vector of W times x."""

    def generate(context, builder, signature, args):
        return _spread(builder, x, args[0])

    return Vector(x)(x), generate


@intrinsic
def like(typing, vector, x):
    """A vector of W times the number x, of the type of ``vector``."""

    def generate(context, builder, signature, args):
        number = args[1]
        if vector.dtype == types.float32:
            number = builder.fptrunc(number, ir.FloatType())
        return _spread(builder, vector.dtype, number)

    return vector(vector, types.float64), generate


@intrinsic
def total(typing, vector):
    """The sum of the elements, halves added to halves."""

    def generate(context, builder, signature, args):
        (value,), width = args, W
        while width > 1:
            width //= 2
            halves = (_indices(0, width), _indices(width, 2 * width))
            parts = (builder.shuffle_vector(value, value, half) for half in halves)
            value = builder.fadd(*parts)
        return builder.extract_element(value, ir.IntType(32)(0))

    return vector.dtype(vector), generate


def _operator(name: str) -> Callable[[Any, Any], Any]:
    @intrinsic
    def operation(typing, a, b):
        def generate(context, builder, signature, args):
            return getattr(builder, name)(*args, flags=_FUSE)

        return a(a, b), generate

    def typed(a, b):
        if isinstance(a, Vector) and isinstance(b, Vector):
            return lambda a, b: operation(a, b)
        return None

    return typed


overload(operator.add)(_operator("fadd"))
overload(operator.sub)(_operator("fsub"))
overload(operator.mul)(_operator("fmul"))
overload(operator.truediv)(_operator("fdiv"))


@intrinsic
def where_less(typing, a, b, x, y):
    """x where a < b, else y (so y where a or b is NaN)."""

    def generate(context, builder, signature, args):
        a, b, x, y = args
        return builder.select(builder.fcmp_ordered("<", a, b), x, y)

    return x(a, b, x, y), generate


# --- elementary functions -------------------------------------------------------------


def _polynomial(builder: Any, coefficients: Sequence[float], t: Any) -> Any:
    p, *rest = (_filled(t.type, c) for c in coefficients)
    for c in rest:
        p = builder.fadd(builder.fmul(p, t, flags=_FUSE), c, flags=_FUSE)
    return p


def _exponent_bits(dtype: types.Float) -> tuple[int, int]:
    """The position of a number's exponent field and its bias."""
    return (23, 127) if dtype == types.float32 else (52, 1023)


def _within(builder: Any, x: Any, least: float, most: float) -> Any:
    for comparison, limit in (("<", least), (">", most)):
        bound = _filled(x.type, limit)
        beyond = builder.fcmp_ordered(comparison, x, bound)
        x = builder.select(beyond, bound, x)  # NaN compares false and stays NaN
    return x


def _rounded(builder: Any, dtype: types.Float, x: Any) -> tuple[Any, Any]:
    """n = round(x) and 2^n, for n between -bias (there 0) and bias + 1 (infinity)."""
    position, bias = _exponent_bits(dtype)
    whole = ir.VectorType(ir.IntType(dtype.bitwidth), W)
    # Adding this leaves n + bias, the exponent wanted, in the lowest bits.
    shift = _filled(x.type, 1.5 * 2**position + bias)
    shifted = builder.fadd(x, shift)
    bits = builder.shl(builder.bitcast(shifted, whole), _filled(whole, position))
    return builder.fsub(shifted, shift), builder.bitcast(bits, x.type)


@intrinsic
def power_of_two(typing, x):
    """2^x; 0 below the normal numbers (2^-126, 2^-1022), infinity above the largest.

    Relative error 2e-7 at most in float32, all of it rounding, and 4e-16 in float64.
    """

    def generate(context, builder, signature, args):
        _, bias = _exponent_bits(x.dtype)
        value = _within(builder, args[0], -bias, bias + 1)
        n, scale = _rounded(builder, x.dtype, value)
        t = builder.fsub(value, n)
        return builder.fmul(_polynomial(builder, _POWER_OF_TWO[x.dtype], t), scale)

    return x(x), generate


@intrinsic
def exp_negative(typing, x):
    """e^x for x <= 0, with the relative errors of power_of_two."""

    def generate(context, builder, signature, args):
        real, (ln2_high, ln2_low) = args[0].type, _LN2[x.dtype]
        _, bias = _exponent_bits(x.dtype)
        value = _within(builder, args[0], -bias / LOG2E, 0.0)
        log2e = _filled(real, LOG2E)
        n, scale = _rounded(builder, x.dtype, builder.fmul(value, log2e))
        t = builder.fsub(value, builder.fmul(n, _filled(real, ln2_high)))
        t = builder.fsub(t, builder.fmul(n, _filled(real, ln2_low)))
        t = builder.fmul(t, log2e)
        return builder.fmul(_polynomial(builder, _POWER_OF_TWO[x.dtype], t), scale)

    return x(x), generate


@intrinsic
def log1p_unit(typing, x):
    """log(1 + x) = 2 atanh(x / (2 + x)) for x within 0 and 1, accurate to rounding."""

    def generate(context, builder, signature, args):
        two = _filled(args[0].type, 2.0)
        s = builder.fdiv(args[0], builder.fadd(args[0], two))
        p = _polynomial(builder, _ARTANH[x.dtype], builder.fmul(s, s))
        return builder.fmul(builder.fmul(two, s), p)

    return x(x), generate


# --- softplus and gate ----------------------------------------------------------------


@_inner
def _softplus(x):
    """log(1 + e^x), and x itself above 20 (PyTorch's threshold)."""
    zero = like(x, 0.0)
    soft = where_less(x, zero, zero, x) + log1p_unit(
        exp_negative(where_less(x, zero, x, zero - x))
    )
    return where_less(like(x, 20.0), x, x, soft)


@_inner
def _sigmoid(x):
    """1 / (1 + e^-x), without overflow."""
    zero, one = like(x, 0.0), like(x, 1.0)
    y = exp_negative(where_less(x, zero, x, zero - x))
    inverse = one / (one + y)
    return where_less(x, zero, y * inverse, inverse)


@_inner
def _softplus_slope(x):
    return where_less(like(x, 20.0), x, like(x, 1.0), _sigmoid(x))


# --- buffers --------------------------------------------------------------------------


@_inner
def _buffer(size, like):
    """``size`` numbers from a boundary of 64 bytes on: vectors cross no cache line."""
    spare = 64 // like.itemsize
    memory = np.empty(size + spare, like.dtype)
    first = (64 - memory.ctypes.data % 64) % 64 // like.itemsize
    return memory[first : first + size]


@_inner
def _take(source, place, stride, w, rows, target):
    """target (rows, W) = w channels of ``rows`` rows of source, zeros beside them."""
    for t in range(rows):
        if w == W:
            store(target, t * W, load(source, place + t * stride))
        else:
            store(target, t * W, splat(target.dtype.type(0)))
            for i in range(w):
                target[t * W + i] = source[place + t * stride + i]


@_inner
def _give(source, rows, place, stride, w, target):
    """The inverse of _take."""
    for t in range(rows):
        if w == W:
            store(target, place + t * stride, load(source, t * W))
        else:
            for i in range(w):
                target[place + t * stride + i] = source[t * W + i]


@_inner
def _take_columns(source, place, N, w, target):
    """target (N, W) = the transpose of w rows of N elements of source."""
    for n in range(N):
        store(target, n * W, splat(target.dtype.type(0)))
        for i in range(w):
            target[n * W + i] = source[place + i * N + n]


@_inner
def _give_columns(source, N, place, w, target):
    """The inverse of _take_columns."""
    for i in range(w):
        for n in range(N):
            target[place + i * N + n] = source[n * W + i]


@_inner
def _clear(rows, target):
    for t in range(rows):
        store(target, t * W, splat(target.dtype.type(0)))


@_inner
def _blank(rows, place, stride, w, target):
    """Zeros in w channels of ``rows`` rows of target: the padding."""
    for t in range(rows):
        for i in range(w):
            target[place + t * stride + i] = 0


@_inner
def _constants(A, D, bias, low, channels, N, w):
    """The blocks of A (N, W), D and bias (W,)."""
    a, skip, offset = _buffer(N * W, A), _buffer(W, A), _buffer(W, A)
    _take(A, low, channels, w, N, a)
    _take(D, low, 0, w, 1, skip)
    _take(bias, low, 0, w, 1, offset)
    return a, skip, offset


def _take_constant(matrix, low, channels, N, w):
    """The (N, W) block of a constant B or C (N, D); None for None."""


@overload(_take_constant)
def _(matrix, low, channels, N, w):
    if isinstance(matrix, types.NoneType):
        return lambda matrix, low, channels, N, w: None

    def take(matrix, low, channels, N, w):
        block = _buffer(N * W, matrix)
        _take(matrix, low, channels, w, N, block)
        return block

    return take


def _row(varying, constant, t, n):
    """B_t or C_t of state n for a block of channels, constant in time or not."""


@overload(_row)
def _(varying, constant, t, n):
    if isinstance(constant, types.NoneType):
        return lambda varying, constant, t, n: splat(varying[t, n])
    return lambda varying, constant, t, n: load(constant, n * W)


# --- forward --------------------------------------------------------------------------


@_inner
def _enter(steps, raw, bias, softplus, u, dt, x):
    """raw += bias, dt = softplus(raw) or raw itself, x = dt u."""
    for t in range(0, steps * W, W):
        step = load(raw, t) + load(bias, 0)
        store(raw, t, step)
        if softplus:
            step = _softplus(step)
        store(dt, t, step)
        store(x, t, step * load(u, t))


@_inner
def _scan_chunk(steps, N, state, A, dt, x, B, C, Bc, Cc, y, soon, place, stride):
    """``steps`` steps of h = decay h + B x, y = C h; Bc, Cc: constant B, C or None.

    Meanwhile what the next chunk needs is fetched, the arrays ``soon`` from ``place``
    on: its rows of W channels lie too far apart for the hardware to foresee.
    """
    for t in range(steps):
        prefetch(soon, place + t * stride)
        dt_t, x_t = load(dt, t * W), load(x, t * W)
        y_t = like(x_t, 0.0)
        for n in range(N):
            h = power_of_two(dt_t * load(A, n * W)) * load(state, n * W)
            h = h + _row(B, Bc, t, n) * x_t
            store(state, n * W, h)
            y_t = y_t + _row(C, Cc, t, n) * h
        store(y, t * W, y_t)


@_inner
def _leave(steps, y, u, D, z, gated):
    """y = (y + D u) silu(z)."""
    for t in range(0, steps * W, W):
        y_t = load(y, t) + load(D, 0) * load(u, t)
        if gated:
            z_t = load(z, t)
            y_t = y_t * z_t * _sigmoid(z_t)
        store(y, t, y_t)


@_inner
def _scan_block(
    row,
    group,
    low,
    w,
    channels,
    u,
    delta,
    A,
    B,
    C,
    Bc,
    Cc,
    D,
    z,
    bias,
    softplus,
    h0,
    length,
    Q,
    y,
    final,
    starts,
):
    """The channels [low, low + w) of one row, from the first chunk to the last."""
    L, N = B.shape[1], B.shape[3]
    gated = z.size > 0
    state = _buffer(N * W, u)
    _take_columns(h0, (row * channels + low) * N, N, w, state)
    a, skip, offset = _constants(A, D, bias, low, channels, N, w)
    bc = _take_constant(Bc, low, channels, N, w)
    cc = _take_constant(Cc, low, channels, N, w)
    dt, us, x, ys = (
        _buffer(Q * W, u),
        _buffer(Q * W, u),
        _buffer(Q * W, u),
        _buffer(Q * W, u),
    )
    zs = _buffer(Q * W if gated else 0, u)
    soon = (u, delta, z if gated else u, y)
    for chunk in range((length + Q - 1) // Q):
        t0 = chunk * Q
        steps = min(Q, length - t0)
        place = (row * L + t0) * channels + low
        first_start = (row * ((L + Q - 1) // Q) + chunk) * N * channels + low
        _give(state, N, first_start, channels, w, starts)
        _take(delta, place, channels, w, steps, dt)
        _take(u, place, channels, w, steps, us)
        if gated:
            _take(z, place, channels, w, steps, zs)
        _enter(steps, dt, offset, softplus, us, dt, x)
        _scan_chunk(
            steps,
            N,
            state,
            a,
            dt,
            x,
            B[row, t0:, group],
            C[row, t0:, group],
            bc,
            cc,
            ys,
            soon,
            place + Q * channels,
            channels,
        )
        _leave(steps, ys, us, skip, zs, gated)
        _give(ys, steps, place, channels, w, y)
    _blank(L - length, (row * L + length) * channels + low, channels, w, y)
    _give_columns(state, N, (row * channels + low) * N, w, final)


@_inner
def _task(task, groups, parts):
    """Row, group and part of a task."""
    return task // (groups * parts), task // parts % groups, task % parts


@_outer
def scan(
    u, delta, A, B, C, Bc, Cc, D, z, bias, softplus, h0, lengths, Q, y, final, starts
):
    """Fill y, the final state and starts (B, K, N, D), the states before each chunk.

    A (N, D) is multiplied by log2(e). B, C (B, L, G, N); where they are constant, Bc,
    Cc (N, D), else None. z is empty where there is no gate. All but B and C are flat.
    """
    rows, _, groups, _ = B.shape
    channels = D.size
    wide = channels // groups
    parts = (wide + W - 1) // W
    for task in numba.prange(rows * groups * parts):
        row, group, part = _task(task, groups, parts)
        _scan_block(
            row,
            group,
            group * wide + part * W,
            min(W, wide - part * W),
            channels,
            u,
            delta,
            A,
            B,
            C,
            Bc,
            Cc,
            D,
            z,
            bias,
            softplus,
            h0,
            lengths[row],
            Q,
            y,
            final,
            starts,
        )


# --- backward -------------------------------------------------------------------------


@_inner
def _states_again(steps, N, states, decays, A, dt, x, B, Bc, soon, place, stride):
    """As _scan_chunk, keeping the decays and all states: steps + 1 from the first."""
    for t in range(steps):
        prefetch(soon, place + t * stride)
        dt_t, x_t = load(dt, t * W), load(x, t * W)
        for n in range(N):
            at = (t * N + n) * W
            decay = power_of_two(dt_t * load(A, n * W))
            store(decays, at, decay)
            h = decay * load(states, at) + _row(B, Bc, t, n) * x_t
            store(states, at + N * W, h)


@_inner
def _ungate(steps, N, states, C, Cc, u, D, z, dy):
    """dy of y silu(z) becomes that of y, and z becomes its own gradient."""
    for t in range(steps):
        z_t, dy_t = load(z, t * W), load(dy, t * W)
        y_t = load(D, 0) * load(u, t * W)
        for n in range(N):
            h = load(states, ((t + 1) * N + n) * W)
            y_t = y_t + _row(C, Cc, t, n) * h
        s = _sigmoid(z_t)
        gate = z_t * s
        slope = s + gate * (like(s, 1.0) - s)
        store(z, t * W, dy_t * y_t * slope)
        store(dy, t * W, dy_t * gate)


def _collect(product, constant, varying, t, n):
    """Add to the gradient of B or C: summed over channels, or by channel (constant)."""


@overload(_collect)
def _(product, constant, varying, t, n):
    if isinstance(constant, types.NoneType):

        def over_channels(product, constant, varying, t, n):
            varying[t, n] += total(product)

        return over_channels

    def by_channel(product, constant, varying, t, n):
        store(constant, n * W, load(constant, n * W) + product)

    return by_channel


@_inner
def _sweep(
    steps,
    N,
    states,
    decays,
    A,
    dt,
    x,
    dy,
    B,
    C,
    Bc,
    Cc,
    g,
    dA,
    dB,
    dC,
    dBc,
    dCc,
    gB,
    gA,
):
    """Walk one chunk backwards; g (N, W) is the gradient of the state, in and out.

    With g_t = C dy_t + a_{t+1} g_{t+1} the gradient of h_t and s_t = a_t g_t h_{t-1}:
    gB[t] = sum_n g_t B, the gradient of x = delta u; gA[t] = sum_n s_t A, that of delta
    through the decay; dA += s_t delta_t; dB[t] += sum_i g_t x_t, dC[t] += sum_i dy_t
    h_t, or by channel where B, C are constant.
    """
    for back in range(steps):
        t = steps - 1 - back
        dt_t, x_t, dy_t = load(dt, t * W), load(x, t * W), load(dy, t * W)
        gB_t = gA_t = like(x_t, 0.0)
        for n in range(N):
            at = (t * N + n) * W
            g_t = load(g, n * W) + _row(C, Cc, t, n) * dy_t
            _collect(dy_t * load(states, at + N * W), dCc, dC, t, n)
            _collect(g_t * x_t, dBc, dB, t, n)
            gB_t = gB_t + g_t * _row(B, Bc, t, n)
            g_t = g_t * load(decays, at)
            store(g, n * W, g_t)
            s_t = g_t * load(states, at)
            store(dA, n * W, load(dA, n * W) + s_t * dt_t)
            gA_t = gA_t + s_t * load(A, n * W)
        store(gB, t * W, gB_t)
        store(gA, t * W, gA_t)


@_inner
def _leave_back(steps, gB, gA, u, dt, raw, softplus, dy, D, dD, dbias):
    """gB and gA become the gradients of u and delta; those of D and the bias grow."""
    for t in range(0, steps * W, W):
        gB_t, u_t, dy_t = load(gB, t), load(u, t), load(dy, t)
        ddelta = load(gA, t) * like(u_t, 1 / LOG2E) + gB_t * u_t
        if softplus:
            ddelta = ddelta * _softplus_slope(load(raw, t))
        store(gA, t, ddelta)
        store(gB, t, gB_t * load(dt, t) + load(D, 0) * dy_t)
        store(dD, 0, load(dD, 0) + dy_t * u_t)
        store(dbias, 0, load(dbias, 0) + ddelta)


def _zeros_like(block, rows):
    """Zeros like a block; None for None."""


@overload(_zeros_like)
def _(block, rows):
    if isinstance(block, types.NoneType):
        return lambda block, rows: None

    def zeros(block, rows):
        fresh = _buffer(rows * W, block)
        _clear(rows, fresh)
        return fresh

    return zeros


def _give_constant(block, N, place, channels, w, target):
    """Store the gradient of a constant B or C, where there is one."""


@overload(_give_constant)
def _(block, N, place, channels, w, target):
    if isinstance(block, types.NoneType):
        return lambda block, N, place, channels, w, target: None
    return lambda block, N, place, channels, w, target: _give(
        block, N, place, channels, w, target
    )


@_inner
def _block_back(
    row,
    group,
    low,
    w,
    channels,
    u,
    delta,
    A,
    B,
    C,
    Bc,
    Cc,
    D,
    z,
    bias,
    softplus,
    starts,
    length,
    Q,
    dy,
    dfinal,
    du,
    ddelta,
    dA,
    dB,
    dC,
    dBc,
    dCc,
    dD,
    dbias,
    dz,
    dh0,
):
    """The channels [low, low + w) of one row, from the last chunk to the first."""
    L, N = B.shape[1], B.shape[3]
    gated = z.size > 0
    a, skip, offset = _constants(A, D, bias, low, channels, N, w)
    bc = _take_constant(Bc, low, channels, N, w)
    cc = _take_constant(Cc, low, channels, N, w)
    g, ga = _buffer(N * W, u), _zeros_like(a, N)
    _take_columns(dfinal, (row * channels + low) * N, N, w, g)
    gb, gc = _zeros_like(bc, N), _zeros_like(cc, N)
    gskip, gbias = _zeros_like(skip, 1), _zeros_like(skip, 1)
    states, decays = _buffer((Q + 1) * N * W, u), _buffer(Q * N * W, u)
    raw, dt, us, x = (
        _buffer(Q * W, u),
        _buffer(Q * W, u),
        _buffer(Q * W, u),
        _buffer(Q * W, u),
    )
    gy, gB, gA = _buffer(Q * W, u), _buffer(Q * W, u), _buffer(Q * W, u)
    zs = _buffer(Q * W if gated else 0, u)
    soon = (u, delta, dy, z if gated else u, du, ddelta, dz if gated else u)
    chunks = (length + Q - 1) // Q
    for back in range(chunks):
        t0 = (chunks - 1 - back) * Q
        steps = min(Q, length - t0)
        place = (row * L + t0) * channels + low
        first = (row * ((L + Q - 1) // Q) + t0 // Q) * N * channels + low
        _take(starts, first, channels, w, N, states)
        _take(delta, place, channels, w, steps, raw)
        _take(u, place, channels, w, steps, us)
        _take(dy, place, channels, w, steps, gy)
        _enter(steps, raw, offset, softplus, us, dt, x)
        b, c = B[row, t0:, group], C[row, t0:, group]
        _states_again(
            steps,
            N,
            states,
            decays,
            a,
            dt,
            x,
            b,
            bc,
            soon,
            place - Q * channels,
            channels,
        )
        if gated:
            _take(z, place, channels, w, steps, zs)
            _ungate(steps, N, states, c, cc, us, skip, zs, gy)
            _give(zs, steps, place, channels, w, dz)
        _sweep(
            steps,
            N,
            states,
            decays,
            a,
            dt,
            x,
            gy,
            b,
            c,
            bc,
            cc,
            g,
            ga,
            dB[row, t0:, group],
            dC[row, t0:, group],
            gb,
            gc,
            gB,
            gA,
        )
        _leave_back(steps, gB, gA, us, dt, raw, softplus, gy, skip, gskip, gbias)
        _give(gB, steps, place, channels, w, du)
        _give(gA, steps, place, channels, w, ddelta)
    _give(ga, N, row * N * channels + low, channels, w, dA)
    _give_constant(gb, N, row * N * channels + low, channels, w, dBc)
    _give_constant(gc, N, row * N * channels + low, channels, w, dCc)
    _give(gskip, 1, row * channels + low, 0, w, dD)
    _give(gbias, 1, row * channels + low, 0, w, dbias)
    _give_columns(g, N, (row * channels + low) * N, w, dh0)
    first = (row * L + length) * channels + low
    _blank(L - length, first, channels, w, du)
    _blank(L - length, first, channels, w, ddelta)
    if gated:
        _blank(L - length, first, channels, w, dz)


@_outer
def scan_back(
    u,
    delta,
    A,
    B,
    C,
    Bc,
    Cc,
    D,
    z,
    bias,
    softplus,
    starts,
    lengths,
    Q,
    dy,
    dfinal,
    du,
    ddelta,
    dA,
    dB,
    dC,
    dBc,
    dCc,
    dD,
    dbias,
    dz,
    dh0,
):
    """Fill the gradients; see scan for the inputs.

    Gradients of A, D, bias and constant B, C have a row for each row of the batch, dB
    and dC (parts, B, L, G, N) one for each part of a group's channels; the caller adds
    them. dB and dC start as zeros.
    """
    rows, _, groups, _ = B.shape
    channels, parts = D.size, dB.shape[0]
    wide = channels // groups
    blocks = (wide + W - 1) // W
    for task in numba.prange(rows * groups * parts):
        row, group, part = _task(task, groups, parts)
        for block in range(blocks * part // parts, blocks * (part + 1) // parts):
            _block_back(
                row,
                group,
                group * wide + block * W,
                min(W, wide - block * W),
                channels,
                u,
                delta,
                A,
                B,
                C,
                Bc,
                Cc,
                D,
                z,
                bias,
                softplus,
                starts,
                lengths[row],
                Q,
                dy,
                dfinal,
                du,
                ddelta,
                dA,
                dB[part],
                dC[part],
                dBc,
                dCc,
                dD,
                dbias,
                dz,
                dh0,
            )
