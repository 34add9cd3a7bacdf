"""How far back a gradient reaches: || d y_T / d x_{T-k} || against the lag k.

    g_k = || d y_T / d x_{T-k} ||_F / sqrt(D)        (1 for a layer that copies x_{T-k})

For one layer as it is initialised, on random inputs, exact by automatic differentiation
in float64; nothing is trained. In closed form, what decides is what a step multiplies:

    h_t = tanh(W h_{t-1} + …)   prod_t diag(1 - h_t^2) W, below ||W||^k: it vanishes
    S4D, h_t = A_bar h_{t-1} + …   2 Re C A_bar^k B_bar: the slowest mode decides
    Mamba, A_bar_t = exp(dt_t A)    the same with the product of A_bar_t
    attention                       weight of x_{T-k}, about 1 / T, whatever the lag

The tail of g (lags from T / 2) is fitted by c r^k. An RNN's r lies far below 1, and
the gates of a GRU, as they start, change little. S4D and Mamba start with steps dt from
0.001 to 0.1, so that the modes of a layer decay at rates from exp(-dt / 2) and exp(-dt)
downwards: their sum falls like a power of k, and ever more slowly. That is a choice of
initialisation, not of architecture: with all its steps at 0.1 an SSM forgets within a
hundred steps, and a linear RNN with orthogonal W never would. Mamba's g falls at once
where its short convolution ends: as it starts, little passes through its state.
Attention does not decay, but its g shrinks with T: every token has a share of one.

What this does not show: how training changes any of it. Sources: Pascanu et al. (2013),
section 2, for the product of Jacobians; chapter 19 says that RNNs are hard to train.
"""

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor, nn

from experiments.common import (
    COLORS,
    ExperimentResult,
    Picture,
    bad_input,
    check_increasing,
    check_integer,
    command_line,
    new_figure,
    random_stream,
    track,
)
from ssm.layers.attention import Attention
from ssm.layers.mamba import Mamba
from ssm.layers.recurrent import GRU, RNN
from ssm.layers.s4d import S4D
from ssm.training import stream_seed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "gradients"
CLAIM = "an RNN's gradient vanishes with the lag; an SSM's slowest mode keeps it"
VANISHES, STAYS = 0.9, 0.95  # rates per step: below the one, above the other
TINY = 1e-290  # below it float64 has few digits left: no part of a fit
MAX_SEEDS = 100
Array = np.ndarray
Make = Callable[[int, int], nn.Module]

# name -> layer of width D with N states, in float64; and whether its gradient vanishes.
LAYERS: dict[str, tuple[Make, bool]] = {
    "rnn": (lambda D, _: RNN(D, dtype=torch.float64), True),
    "gru": (lambda D, _: GRU(D, dtype=torch.float64), True),
    "s4d": (lambda D, N: S4D(D, N, dtype=torch.float64), False),
    "mamba": (lambda D, N: Mamba(D, N, dtype=torch.float64), False),
    "attention": (lambda D, _: Attention(D, dtype=torch.float64), False),
}


def run(
    T: int = 512,
    d_model: int = 32,
    d_state: int = 16,
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
) -> ExperimentResult:
    """Gradients at every lag, for an RNN, a GRU, S4D, Mamba and attention.

    Judged, for every seed: the fitted rate of RNN and GRU below 0.9 a step, that of the
    others above 0.95.

    Args:
        T: steps of the sequence; lags go from 0 to T - 1
        d_model: channels in and out of every layer
        d_state: states of each channel of S4D and Mamba
        seeds: each draws weights and inputs of every layer
    """
    check_integer("T", T, at_least=64, example=512)
    check_integer("d_model", d_model, at_least=8, example=32)
    if d_model % 8:  # four heads of even width
        raise bad_input("d_model", d_model, "a multiple of 8", "try 32")
    check_integer("d_state", d_state, at_least=1, example=16)
    check_increasing("seeds", seeds, at_least=0)
    if len(seeds) > MAX_SEEDS:
        raise bad_input("seeds", len(seeds), f"at most {MAX_SEEDS}", "give fewer")
    work = [(name, seed) for name in LAYERS for seed in seeds]
    curves: dict[str, list[Array]] = {name: [] for name in LAYERS}
    for name, seed in track(work, "gradients"):
        curves[name].append(_measured(name, T, (d_model, d_state), seed))
    metadata = {
        "T": T,
        "d_model": d_model,
        "d_state": d_state,
        "seeds": seeds,
        "limits": {"vanishes": VANISHES, "stays": STAYS},
        "layers": {name: summary(np.array(rows)) for name, rows in curves.items()},
    }
    broken = problems(metadata)
    return ExperimentResult(NAME, _details(metadata, broken), metadata, not broken)


def _measured(name: str, T: int, sizes: tuple[int, int], seed: int) -> Array:
    """g_0 … g_{T-1} of one new layer on one random input."""
    make, _ = LAYERS[name]
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(stream_seed(seed, f"init {name}"))
        layer = make(*sizes)
    x = random_stream(seed, "gradient inputs").standard_normal((T, sizes[0]))
    J = jacobians(lambda u: layer(u)[0], torch.from_numpy(x))
    return gradient_norms(J).numpy()


def jacobians(
    layer: Callable[[Tensor], Tensor], x: Float64[Tensor, "T D"]
) -> Float64[Tensor, "T D D"]:
    """J[k, i, j] = d y_{T,i} / d x_{T-k,j} of y = layer(x), batch first.

    One backward pass: row i of a batch of D equal sequences gives output i alone.
    """
    D = x.shape[1]
    rows = x.expand(D, *x.shape).clone().requires_grad_()
    y = layer(rows)
    (gradient,) = torch.autograd.grad(y[:, -1].diagonal().sum(), rows)
    return gradient.flip(1).transpose(0, 1)


def gradient_norms(J: Float64[Tensor, "T D D"]) -> Float64[Tensor, " T"]:
    """g_k = ||J_k||_F / sqrt(D), without squares that underflow."""
    scale = J.abs().amax((1, 2), keepdim=True)
    scale = torch.where(scale > 0, scale, 1.0)
    return torch.linalg.matrix_norm(J / scale) * scale[:, 0, 0] / J.shape[-1] ** 0.5


def tail_rate(g: Float64[Array, " T"]) -> float:
    """r of the least-squares fit log g_k = log c + k log r over the lags from T / 2.

    Where g is too small for float64 there, over the second half of the lags where it is
    not.
    """
    lags = np.arange(1, len(g))
    lags = lags[g[1:] > TINY]
    tail = lags[len(lags) // 2 :]
    slope, _ = np.polyfit(tail, np.log(g[tail]), 1)
    return float(np.exp(slope))


def summary(rows: Float64[Array, "S T"]) -> dict[str, Any]:
    """Median, least and greatest over the seeds: of g at every lag, and of the rate."""
    rates = [tail_rate(g) for g in rows]
    bands = {
        "median": np.median(rows, axis=0),
        "low": rows.min(axis=0),
        "high": rows.max(axis=0),
    }
    return {"rates": rates, "rate": float(np.median(rates)), **bands}


def problems(metadata: dict[str, Any]) -> list[str]:
    """The claims that a record breaks; a rate that is NaN breaks one."""
    broken = []
    for name, (_, vanishes) in LAYERS.items():
        rates = metadata["layers"][name]["rates"]
        if vanishes and not max(rates) < VANISHES:
            broken.append(f"{name}'s rate < {VANISHES}: it is {max(rates):.4f}")
        if not vanishes and not min(rates) > STAYS:
            broken.append(f"{name}'s rate > {STAYS}: it is {min(rates):.4f}")
    return broken


def _details(metadata: dict[str, Any], broken: Sequence[str]) -> str:
    if broken:
        return f"{len(broken)} claim(s) off; {broken[0]}"
    layers = metadata["layers"]
    rates = ", ".join(f"{name} {layers[name]['rate']:.4f}" for name in LAYERS)
    half = metadata["T"] // 2
    kept = ", ".join(f"{name} {layers[name]['median'][half]:.1e}" for name in LAYERS)
    return f"rate a step over the tail: {rates}; gradient at lag {half}: {kept}"


def draw(results: Sequence[ExperimentResult]) -> "Figure":
    """g against the lag: all of it, and those that stay, closer."""
    metadata = results[-1].metadata
    figure, axes = new_figure(1, 2)
    everything, closer = axes[0]
    lags = np.arange(metadata["T"])
    for (name, (_, vanishes)), color in zip(LAYERS.items(), COLORS, strict=False):
        found = metadata["layers"][name]
        panels = [everything] if vanishes else [everything, closer]
        for ax in panels:
            label = f"{name}: {found['rate']:.3f} a step"
            ax.plot(lags, found["median"], color=color, label=label)
            ax.fill_between(
                lags, found["low"], found["high"], color=color, alpha=0.2, linewidth=0
            )
    everything.set(yscale="log", xlabel="lag k (steps back)", ylabel="gradient g_k")
    everything.set(title="an RNN's gradient vanishes at a constant rate")
    closer.set(xscale="log", yscale="log", xlim=(1, None), xlabel="lag k (steps back)")
    closer.set(
        title="an SSM's falls like a power, attention's not", ylabel="gradient g_k"
    )
    for ax in (everything, closer):
        ax.legend(loc="lower left")
    figure.suptitle(
        r"$g_k = \Vert\partial y_T/\partial x_{T-k}\Vert_F/\sqrt{D}$ before training, "
        f"D = {metadata['d_model']}, T = {metadata['T']}: median of "
        f"{len(metadata['seeds'])} seeds, band: least to greatest"
    )
    return figure


PICTURES = (Picture(draw, f"outputs/{NAME}.png", by_default=True),)


if __name__ == "__main__":
    sys.exit(command_line(run, pictures=PICTURES))
