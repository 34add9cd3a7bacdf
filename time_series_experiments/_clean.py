"""Training of the clean model: Adam over epochs, then a second-order finish.

Seeds are S models in one tensor: each has its own data, order and start, and Adam works
on every number by itself, so that a seed's run is the same in any company.

The finish starts from where Adam ended and from more decays spread over (0, 1), and
keeps the least *training* loss; no validation or population value is looked at. It
solves the same least-squares problem, sum over sequences and steps of (y - ŷ)²: with
G the Gram matrix of the lagged inputs, that is ‖R k̂ - d‖² + constant, RᵀR = G, which
needs T numbers for a residual instead of all data.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ssm.training import batches, stream_seed
from time_series_experiments.data import Array, decay_kernel
from time_series_experiments.models import DiagLinear, spread_decays

Curve = list[dict[str, Any]]


class SeedData(NamedTuple):
    """One seed's sequences: x and y (n, T), and the validation's."""

    seed: int
    x: Float[Array, "n T"]
    y: Float[Array, "n T"]
    x_val: Float[Array, "m T"]
    y_val: Float[Array, "m T"]


class Fit(NamedTuple):
    """Decays, weights (both (N,)), training loss; which start it came from.

    start: 0 for Adam's end, above it for one of the further starts.
    """

    decays: Float[Array, " N"]
    weights: Float[Array, " N"]
    train_mse: float
    start: int


class Quadratic(NamedTuple):
    """The training loss of a kernel k̂, exactly: ‖R k̂ - d‖² + constant."""

    R: Float[Array, "T T"]
    d: Float[Array, " T"]
    constant: float

    def __call__(self, kernel: Float[Array, " T"]) -> float:
        """The mean squared error over all sequences and steps."""
        return float(((self.R @ kernel - self.d) ** 2).sum() + self.constant)


def quadratic(x: Float[Array, "n T"], y: Float[Array, "n T"]) -> Quadratic:
    """The loss on sequences x, y as a function of the kernel alone."""
    n, T = x.shape
    products = x.T @ x
    for s in range(1, T):  # sums along the diagonals, from the first step on
        products[s, 1:] += products[s - 1, :-1]
    G = products[::-1, ::-1]  # [i, j] = sum over t of x_{t-i} x_{t-j}
    crossed = x.T @ y
    b = np.array([np.trace(crossed, offset=lag) for lag in range(T)])
    values, vectors = np.linalg.eigh(G / (n * T))
    root = np.sqrt(values.clip(min=0))
    seen = root > 1e-7 * root[-1]  # of few sequences some combinations tell nothing
    projected = vectors.T @ b / (n * T)
    d = np.divide(projected, root, out=np.zeros(T), where=seen)
    R = np.where(seen, root, 0.0)[:, None] * vectors.T
    return Quadratic(R, d, float((y**2).mean() - d @ d))


def train_first_order(
    data: Sequence[SeedData],
    N: int,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    on_epoch: Callable[[int], None],
) -> tuple[DiagLinear, list[Curve]]:
    """Adam at ``lr``, falling to 0 as half a cosine; the models, a curve each."""
    model = DiagLinear(torch.cat([_spread(each.seed, 0, N) for each in data]))
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    x, y = _stack(data, "x"), _stack(data, "y")
    x_val, y_val = _stack(data, "x_val"), _stack(data, "y_val")
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    curves: list[Curve] = [[] for _ in data]
    which = torch.arange(len(data))[:, None]
    for epoch in range(epochs):
        orders = [batches(x.shape[1], batch_size, s.seed, epoch) for s in data]
        losses = []
        for rows in zip(*orders, strict=True):
            index = torch.stack(rows)
            loss = _mse(model(x[which, index]), y[which, index])
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
            losses.append(loss.detach() * index.shape[1])
        schedule.step()
        with torch.no_grad():
            val = _mse(model(x_val), y_val)
        train = torch.stack(losses).sum(0) / x.shape[1]
        for curve, a, b in zip(curves, train.tolist(), val.tolist(), strict=True):
            curve.append({"epoch": epoch + 1, "train_mse": a, "val_mse": b})
        on_epoch(epoch + 1)
    return model, curves


def finish(
    data: SeedData,
    decays: Float[Array, " N"],
    weights: Float[Array, " N"],
    *,
    starts: int,
) -> Fit:
    """Second order from Adam's end and from ``starts`` more: the least training loss.

    Levenberg-Marquardt within |a| <= 1 (SciPy's trust region for bounded variables).
    """
    loss = quadratic(data.x, data.y)
    fits = [_descend(loss, decays, weights, 0)]
    for start in range(1, starts + 1):
        spread = _spread(data.seed, start, len(decays))[0].numpy()
        basis = loss.R @ _vandermonde(spread, len(loss.d))
        best = np.linalg.lstsq(basis, loss.d, rcond=None)[0]
        fits.append(_descend(loss, spread, best, start))
    return min(fits, key=lambda fit: fit.train_mse)


def _descend(
    loss: Quadratic,
    decays: Float[Array, " N"],
    weights: Float[Array, " N"],
    start: int,
) -> Fit:
    from scipy.optimize import least_squares

    N, T = len(decays), len(loss.d)
    lags = np.arange(T)

    def residual(theta: Float[Array, " P"]) -> Float[Array, " T"]:
        return loss.R @ decay_kernel(theta[:N], theta[N:], T) - loss.d

    def jacobian(theta: Float[Array, " P"]) -> Float[Array, "T P"]:
        powers = _vandermonde(theta[:N], T)
        slopes = np.zeros((T, N))
        slopes[1:] = lags[1:, None] * powers[:-1] * theta[N:]
        return loss.R @ np.hstack([slopes, powers])

    limit = np.array([1.0] * N + [np.inf] * N)
    done = least_squares(
        residual,
        np.concatenate([decays, weights]),
        jac=jacobian,
        bounds=(-limit, limit),
        x_scale="jac",
        ftol=1e-15,
        xtol=1e-15,
        gtol=None,
        max_nfev=500,
    )
    order = np.argsort(-done.x[:N])
    train_mse = 2 * float(done.cost) + loss.constant
    return Fit(done.x[:N][order], done.x[N:][order], train_mse, start)


def _vandermonde(decays: Float[Array, " N"], T: int) -> Float[Array, "T N"]:
    """a_n^j, a row for each lag."""
    return decays ** np.arange(T)[:, None]


def _spread(seed: int, start: int, N: int) -> Float[Tensor, "1 N"]:
    stream = stream_seed(seed, f"init {start}")
    return spread_decays(1, N, torch.Generator().manual_seed(stream))


def _stack(data: Sequence[SeedData], part: str) -> Float[Tensor, "S n T"]:
    return torch.from_numpy(np.stack([getattr(each, part) for each in data]))


def _mse(out: Float[Tensor, "S B T 1"], y: Float[Tensor, "S B T"]) -> Tensor:
    """The mean squared error of each model, (S,)."""
    return (out[..., 0] - y).square().mean((1, 2))
