"""The rows of the equivalence table: every operator and every layer, at odd sizes.

An operator's row builds random operands and says how to run a stretch of them; that of
a layer builds the layer. :mod:`ssm.equivalence` does the rest.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from ssm.layers.attention import Attention
from ssm.layers.diagonal_ssd import DiagonalSSD
from ssm.layers.hyena import Hyena
from ssm.layers.mamba import Mamba
from ssm.layers.mamba2 import Mamba2
from ssm.layers.recurrent import GRU, RNN
from ssm.layers.rwkv import RWKV, RWKVBlock, RWKVChannelMix
from ssm.layers.s4 import S4
from ssm.layers.s4d import S4D
from ssm.layers.s5 import S5
from ssm.layers.selective_ssm import SelectiveSSM
from ssm.ops import add_norm as add_norm_op
from ssm.ops import causal_conv1d as causal_conv1d_op
from ssm.ops import diagonal_ssd as diagonal_ssd_op
from ssm.ops import fft_conv as fft_conv_op
from ssm.ops import linear_scan as linear_scan_op
from ssm.ops import linear_step as linear_step_op
from ssm.ops import matrix_scan as matrix_scan_op
from ssm.ops import packed_linear as packed_linear_op
from ssm.ops import parallel_scan as parallel_scan_op
from ssm.ops import power_sums as power_sums_op
from ssm.ops import selective_scan as selective_scan_op
from ssm.ops import short_attention as short_attention_op
from ssm.ops import ssd as ssd_op

Named = dict[str, Tensor]
REAL = (torch.float64, torch.float32)
COMPLEX = (torch.complex128, torch.complex64)
BATCH, CHANNELS, STATE = 2, 5, 3


@dataclass(frozen=True)
class OpCase:
    """One operator.

    ``build(L, draw)`` gives the operands with a time axis, the constant ones and the
    initial state, in which ``draw(*shape)`` draws normal numbers of the row's dtype
    (and ``draw.real`` real ones). ``run(time, fixed, state, **options)`` is the
    operator. ``kernel(time, fixed)`` is its output from a zero state through the
    materialised T x T matrix; None, with the reason, where there is none.
    """

    name: str
    build: Callable[[int, "Draw"], tuple[Named, Named, Tensor]]
    run: Callable[..., tuple[Tensor, Tensor]]
    backends: tuple[str, ...]
    kernel: Callable[[Named, Named], Tensor] | None
    dtypes: tuple[torch.dtype, ...] = REAL
    has_chunks: bool = False
    no_kernel: str = ""


@dataclass(frozen=True)
class LayerCase:
    """One layer: ``build(backend, dtype)``; ``no_kernel`` says why it has no matrix."""

    name: str
    layer: Callable[..., Any]
    sizes: Mapping[str, Any]
    backends: tuple[str, ...] = ("auto",)
    d_model: int = CHANNELS
    no_kernel: str = ""

    def build(self, backend: str, dtype: torch.dtype) -> Any:
        """The layer with this backend, its parameters drawn by the global stream."""
        options = dict(self.sizes)
        if self.backends != ("auto",):
            options["backend"] = backend
        return self.layer(self.d_model, **options, dtype=dtype)


class Draw:
    """Normal numbers of one dtype from one generator."""

    def __init__(self, generator: Generator, dtype: torch.dtype) -> None:
        self.generator, self.dtype = generator, dtype

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=self.dtype)

    def real(self, *shape: int) -> Tensor:
        """Real numbers, of the precision of the dtype."""
        dtype = self.dtype.to_real()
        return torch.randn(shape, generator=self.generator, dtype=dtype)

    def decays(self, *shape: int) -> Tensor:
        """Signed or complex, below 1 in size; every seventh is exactly zero."""
        a = self(*shape)
        a = a / (a.abs() + 0.05)
        return a * (torch.arange(a.numel()).reshape(shape) % 7 != 6)


def decay_matrix(a: Tensor) -> Tensor:
    """L[:, t, s] = a_t ... a_{s+1} for s <= t, else 0, of decays a (B, L, …).

    Row from row: no division, no logarithm.
    """
    row, rows = torch.zeros_like(a), []
    for t in range(a.shape[1]):
        one = torch.zeros_like(a)
        one[:, t] = 1
        row = a[:, t : t + 1] * row + one
        rows.append(row)
    return torch.stack(rows, 1)


def _grouped(X: Tensor, heads: int) -> Tensor:
    """(B, L, G, N) for each of ``heads`` channels or heads."""
    return X.repeat_interleave(heads // X.shape[2], 2)


# --- operators ------------------------------------------------------------------------


def _linear(L: int, draw: Draw) -> tuple[Named, Named, Tensor]:
    shape = (BATCH, L, CHANNELS)
    return {"a": draw.decays(*shape), "b": draw(*shape)}, {}, draw(BATCH, CHANNELS)


def _run_linear(
    time: Named, fixed: Named, state: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    del fixed
    return linear_scan_op(time["a"], time["b"], initial_state=state, **options)


def _linear_kernel(time: Named, fixed: Named) -> Tensor:
    del fixed
    return torch.einsum("btsc,bsc->btc", decay_matrix(time["a"]), time["b"])


def _selective(L: int, draw: Draw) -> tuple[Named, Named, Tensor]:
    D, N = 6, STATE
    rate = -draw.real(D, N).exp()
    A = torch.complex(rate, 3 * draw.real(D, N)) if draw.dtype.is_complex else rate
    time = {name: draw.real(BATCH, L, D) for name in ("u", "delta", "z")}
    time |= {"B": draw(BATCH, L, 2, N), "C": draw(BATCH, L, 2, N)}
    fixed = {"A": A, "D": draw.real(D), "delta_bias": draw.real(D)}
    return time, fixed, draw(BATCH, D, N)


def _run_selective(
    time: Named, fixed: Named, state: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    operands: dict[str, Any] = time | fixed
    return selective_scan_op(
        **operands, delta_softplus=True, initial_state=state, **options
    )


def _selective_kernel(time: Named, fixed: Named) -> Tensor:
    u, A = time["u"], fixed["A"]
    delta = torch.nn.functional.softplus(time["delta"] + fixed["delta_bias"])
    B, C = (_grouped(time[name], u.shape[2]) for name in "BC")
    L = decay_matrix((delta[..., None] * A).exp())
    M = torch.einsum("btdn,btsdn,bsd,bsdn->bdts", C, L, delta.to(L.dtype), B)
    M = 2 * M.real if M.is_complex() else M
    y = torch.einsum("bdts,bsd->btd", M, u) + fixed["D"] * u
    return y * torch.nn.functional.silu(time["z"])


def _ssd(L: int, draw: Draw) -> tuple[Named, Named, Tensor]:
    H, P, G, N = 4, 3, 2, CHANNELS
    time = {name: draw(BATCH, L, H, P) for name in "xz"}
    time |= {"dt": draw(BATCH, L, H)}
    time |= {name: draw(BATCH, L, G, N) for name in "BC"}
    fixed = {"A": -draw(H).exp(), "D": draw(H), "dt_bias": draw(H)}
    return time, fixed, draw(BATCH, H, P, N)


def _run_ssd(
    time: Named, fixed: Named, state: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    operands: dict[str, Any] = time | fixed
    y, final = ssd_op(**operands, dt_softplus=True, initial_state=state, **options)
    return y, final


def _ssd_kernel(time: Named, fixed: Named) -> Tensor:
    x = time["x"]
    dt = torch.nn.functional.softplus(time["dt"] + fixed["dt_bias"])
    B, C = (_grouped(time[name], x.shape[2]) for name in "BC")
    L = decay_matrix((dt * fixed["A"]).exp())
    M = torch.einsum("bthn,btsh,bshn,bsh->bhts", C, L, B, dt)
    y = torch.einsum("bhts,bshp->bthp", M, x) + fixed["D"][:, None] * x
    return y * torch.nn.functional.silu(time["z"])


def _diagonal(L: int, draw: Draw) -> tuple[Named, Named, Tensor]:
    H, K, V = 2, STATE, CHANNELS
    time = {name: draw(BATCH, L, H, K) for name in "qk"}
    time |= {"v": draw(BATCH, L, H, V), "a": draw.decays(BATCH, L, H, K)}
    return time, {}, draw(BATCH, H, K, V)


def _run_diagonal(
    time: Named, fixed: Named, state: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    del fixed
    operands: dict[str, Any] = time
    y, final = diagonal_ssd_op(**operands, initial_state=state, **options)
    return y, final


def _diagonal_kernel(time: Named, fixed: Named) -> Tensor:
    del fixed
    L = decay_matrix(time["a"])
    M = torch.einsum("bthk,btshk,bshk->bhts", time["q"], L, time["k"])
    return torch.einsum("bhts,bshv->bthv", M, time["v"])


def _short_conv(L: int, draw: Draw) -> tuple[Named, Named, Tensor]:
    W = 4
    fixed = {"weight": draw(CHANNELS, W), "bias": draw(CHANNELS)}
    return {"x": draw(BATCH, L, CHANNELS)}, fixed, draw(BATCH, W - 1, CHANNELS)


def _run_short_conv(
    time: Named, fixed: Named, state: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    operands: dict[str, Any] = time | fixed
    # No gate for complex numbers: silu has poles there, and rounding grows near them.
    activation: Any = None if time["x"].is_complex() else "silu"
    return causal_conv1d_op(
        **operands, activation=activation, initial_state=state, **options
    )


def toeplitz(kernel: Tensor, L: int) -> Tensor:
    """M[d, t, s] = kernel[d, t - s] for 0 <= t - s < its length, else 0."""
    lag = torch.arange(L)[:, None] - torch.arange(L)
    padded = torch.nn.functional.pad(kernel, (0, max(0, L - kernel.shape[1])))
    return padded[:, lag.clamp(min=0)] * (lag >= 0)


def _short_conv_kernel(time: Named, fixed: Named) -> Tensor:
    M = toeplitz(fixed["weight"].flip(1), time["x"].shape[1])
    y = torch.einsum("dts,bsd->btd", M, time["x"]) + fixed["bias"]
    return y if y.is_complex() else torch.nn.functional.silu(y)


def _long_conv(L: int, draw: Draw) -> tuple[Named, Named, Tensor]:
    taps = 70
    fixed = {"kernel": draw(CHANNELS, taps), "D": draw(CHANNELS)}
    return {"u": draw(BATCH, L, CHANNELS)}, fixed, draw(BATCH, taps - 1, CHANNELS)


def _run_long_conv(
    time: Named, fixed: Named, state: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    operands: dict[str, Any] = time | fixed
    return fft_conv_op(**operands, initial_state=state, **options)


def _long_conv_kernel(time: Named, fixed: Named) -> Tensor:
    M = toeplitz(fixed["kernel"], time["u"].shape[1])
    return torch.einsum("dts,bsd->btd", M, time["u"]) + fixed["D"] * time["u"]


def _matrices(L: int, draw: Draw) -> tuple[Named, Named, Tensor]:
    H, K = 2, STATE
    A = draw(BATCH, L, H, K, K) / (2 * K) ** 0.5
    return {"A": A, "b": draw(BATCH, L, H, K)}, {}, draw(BATCH, H, K)


def _run_matrices(
    time: Named, fixed: Named, state: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    del fixed
    return matrix_scan_op(time["A"], time["b"], initial_state=state, **options)


def _matrices_kernel(time: Named, fixed: Named) -> Tensor:
    """The block kernel A_t … A_{s+1}, applied row by row."""
    del fixed
    A, b = time["A"], time["b"]
    K, L = A.shape[-1], A.shape[1]
    eye = torch.eye(K, dtype=A.dtype)
    row = torch.zeros_like(A)
    outputs = []
    for t in range(L):
        here = (torch.arange(L) == t).to(A.dtype)[None, :, None, None, None] * eye
        row = A[:, t : t + 1] @ row + here
        outputs.append(torch.einsum("bshij,bshj->bhi", row, b))
    return torch.stack(outputs, 1)


def _affine(left: Any, right: Any) -> Any:
    """(a, b) then (a', b'): h -> a' (a h + b) + b'."""
    return right[0] * left[0], right[0] * left[1] + right[1]


def _run_parallel(
    time: Named, fixed: Named, state: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    del fixed
    first = (torch.ones_like(state), state)
    scanned, last = parallel_scan_op(
        _affine, (time["a"], time["b"]), initial=first, **options
    )
    return scanned[1], last[1]


OPS = (
    OpCase(
        "linear_scan",
        _linear,
        _run_linear,
        ("cpu", "torch"),
        _linear_kernel,
        dtypes=REAL + COMPLEX,
    ),
    OpCase(
        "selective_scan",
        _selective,
        _run_selective,
        ("cpu", "torch"),
        _selective_kernel,
        has_chunks=True,
    ),
    OpCase(
        "selective_scan, complex A",
        _selective,
        _run_selective,
        ("torch",),
        _selective_kernel,
        dtypes=COMPLEX,
        has_chunks=True,
    ),
    OpCase("ssd", _ssd, _run_ssd, ("torch",), _ssd_kernel, has_chunks=True),
    OpCase(
        "diagonal_ssd",
        _diagonal,
        _run_diagonal,
        ("cpu", "torch"),
        _diagonal_kernel,
        has_chunks=True,
    ),
    OpCase(
        "diagonal_ssd, complex",
        _diagonal,
        _run_diagonal,
        ("torch",),
        _diagonal_kernel,
        dtypes=COMPLEX,
        has_chunks=True,
    ),
    OpCase(
        "causal_conv1d",
        _short_conv,
        _run_short_conv,
        ("cpu", "torch"),
        _short_conv_kernel,
    ),
    OpCase(
        "causal_conv1d, complex",
        _short_conv,
        _run_short_conv,
        ("torch",),
        _short_conv_kernel,
        dtypes=COMPLEX,
    ),
    OpCase(
        "fft_conv",
        _long_conv,
        _run_long_conv,
        ("torch",),
        _long_conv_kernel,
        dtypes=REAL + COMPLEX,
    ),
    OpCase(
        "matrix_scan",
        _matrices,
        _run_matrices,
        ("torch",),
        _matrices_kernel,
        dtypes=REAL + COMPLEX,
    ),
    OpCase(
        "parallel_scan",
        _linear,
        _run_parallel,
        ("torch",),
        None,
        dtypes=REAL + COMPLEX,
        no_kernel="a general combine need not be linear",
    ),
)

# --- operators that go through no sequence --------------------------------------------


def _product(L: int, draw: "Draw") -> tuple[Named, Named, Tensor]:
    del L
    return {"x": draw(BATCH, 7)}, {"weight": draw(CHANNELS, 7)}, draw(CHANNELS)


def _run_product(time: Named, fixed: Named, state: Tensor, **options: Any) -> Any:
    return linear_step_op(time["x"], fixed["weight"], state, **options), state


def _run_rows(time: Named, fixed: Named, state: Tensor, **options: Any) -> Any:
    return packed_linear_op(time["x"], fixed["weight"], state, **options), state


def _sum(L: int, draw: "Draw") -> tuple[Named, Named, Tensor]:
    del L
    state = draw(BATCH, CHANNELS)
    return {"x": draw(BATCH, CHANNELS)}, {"weight": draw(CHANNELS)}, state


def _run_sum(time: Named, fixed: Named, state: Tensor, **options: Any) -> Any:
    total, normed = add_norm_op(time["x"], state, fixed["weight"], **options)
    return normed, total


def _powers(L: int, draw: "Draw") -> tuple[Named, Named, Tensor]:
    del L
    z = draw(CHANNELS, STATE)
    return {"z": z / (1 + z.abs())}, {}, draw(CHANNELS, STATE)


def _run_powers(time: Named, fixed: Named, state: Tensor, **options: Any) -> Any:
    del fixed
    return power_sums_op(state, time["z"], 9, **options), state


_PARTS = ((2, 5), (3, 2))


def _packed(L: int, draw: "Draw") -> tuple[Named, Named, Tensor]:
    del L
    rows = sum(b * length for b, length in _PARTS)
    return {"qkv": draw(rows, 3, 2, 3)}, {}, draw(BATCH, CHANNELS)


def _run_packed(time: Named, fixed: Named, state: Tensor, **options: Any) -> Any:
    del fixed
    return short_attention_op(time["qkv"], _PARTS, **options), state


TIMELESS = (
    OpCase(
        "power_sums",
        _powers,
        _run_powers,
        ("torch",),
        None,
        dtypes=(torch.complex128,),
    ),
    OpCase("linear_step", _product, _run_product, ("torch",), None),
    OpCase("packed_linear", _product, _run_rows, ("torch",), None),
    OpCase("add_norm", _sum, _run_sum, ("torch",), None),
    OpCase("short_attention", _packed, _run_packed, ("torch",), None),
)

# --- layers ---------------------------------------------------------------------------

_BOTH = ("cpu", "torch")
_NOT_LINEAR = "not linear in its values"

LAYERS = (
    LayerCase("S4", S4, {"d_state": 6}),
    LayerCase("S4D (lin, zoh)", S4D, {"d_state": 6}),
    LayerCase(
        "S4D (legs, bilinear)",
        S4D,
        {"d_state": 6, "init": "legs", "discretization": "bilinear"},
    ),
    LayerCase("S5", S5, {"d_state": 7}, _BOTH),
    LayerCase("SelectiveSSM", SelectiveSSM, {"d_state": 3}, _BOTH),
    LayerCase("Mamba", Mamba, {"d_state": 3}, _BOTH),
    LayerCase("Mamba2", Mamba2, {"d_state": 3, "headdim": 5}),
    LayerCase("DiagonalSSD", DiagonalSSD, {"d_state": 3, "headdim": 5}, _BOTH),
    LayerCase(
        "DiagonalSSD (selective)",
        DiagonalSSD,
        {"d_state": 3, "headdim": 5, "selective": True},
        _BOTH,
    ),
    LayerCase("RWKV", RWKV, {"n_layers": 2}),
    LayerCase(
        "RWKVChannelMix",
        RWKVChannelMix,
        {},
        no_kernel="it mixes channels, and only two steps",
    ),
    LayerCase("RWKVBlock", RWKVBlock, {}, _BOTH),
    LayerCase("Hyena", Hyena, {"filter_hidden": 8}),
    LayerCase(
        "Attention (rotary)",
        Attention,
        {"n_heads": 3, "n_kv_heads": 1, "d_head": 4},
    ),
    LayerCase(
        "Attention (learned)",
        Attention,
        {"n_heads": 2, "positions": "learned", "max_positions": 300, "d_head": 4},
    ),
    LayerCase("RNN", RNN, {"d_hidden": 6}, no_kernel=_NOT_LINEAR),
    LayerCase("GRU", GRU, {"d_hidden": 6}, no_kernel=_NOT_LINEAR),
)
