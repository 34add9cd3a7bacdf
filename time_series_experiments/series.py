"""Two real series, split in time, and the forecasts that ours must stand beside.

sunspots: yearly numbers, 1700 to 2008. co2: weekly means at Mauna Loa in parts per
million, 1958 to 2001; missing weeks are interpolated linearly. Both are read from the
installed statsmodels, never fetched.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from experiments.common import bad_input
from time_series_experiments.data import Array

TRAIN, VAL = 0.7, 0.1  # shares, in the order of time; the rest is the test part


@dataclass(frozen=True)
class Series:
    """x (n,) at times in years; ``period`` steps a season.

    differenced: the models see x_t - x_{t-1}, as a trend leaves the range of training.
    filled: how many values were interpolated.
    """

    name: str
    unit: str
    years: Float[Array, " n"]
    x: Float[Array, " n"]
    period: int
    differenced: bool
    filled: int

    @property
    def ends(self) -> tuple[int, int]:
        """Where the training and the validation part end."""
        n = len(self.x)
        return int(TRAIN * n), int((TRAIN + VAL) * n)


class Scaling(NamedTuple):
    """z = (x - mean) / std, of x or of its differences; from the training part."""

    mean: float
    std: float


def _sunspots() -> Series:
    from statsmodels.datasets import sunspots

    table = sunspots.load_pandas().data
    years, x = (table[c].to_numpy(dtype=float) for c in ("YEAR", "SUNACTIVITY"))
    return Series("sunspots", "sunspot number", years, x, 11, False, 0)


def _co2() -> Series:
    from statsmodels.datasets import co2

    column = co2.load_pandas().data["co2"]
    raw = column.to_numpy(dtype=float)
    days = (column.index - column.index[0]).days.to_numpy()
    known = np.isfinite(raw)
    x = np.interp(days, days[known], raw[known])
    years = 1970 + column.index.to_numpy("datetime64[D]").astype(float) / 365.25
    return Series("co2", "CO₂ (ppm)", years, x, 52, True, int((~known).sum()))


SERIES: dict[str, Callable[[], Series]] = {"sunspots": _sunspots, "co2": _co2}


def load_series(name: str) -> Series:
    """The series called ``name``. Raises InputError."""
    if name not in SERIES:
        raise bad_input("task", name, f"one of {', '.join(SERIES)}", "choose one")
    return SERIES[name]()


def scaled(series: Series) -> tuple[Float[Array, " n"], Scaling]:
    """z, with mean 0 and deviation 1 on the training part; z_0 = 0 of differences."""
    steps = series.x
    if series.differenced:
        steps = np.diff(series.x, prepend=series.x[0])
    own = steps[int(series.differenced) : series.ends[0]]
    scaling = Scaling(float(own.mean()), float(own.std()))
    z = (steps - scaling.mean) / scaling.std
    if series.differenced:
        z[0] = 0.0  # nothing is known before the first value
    return z, scaling


def targets(
    z: Float[Array, " n"], origins: Int[Array, " m"], horizon: int, *, summed: bool
) -> Float[Array, "m H"]:
    """z_{t+1} … z_{t+H} for each origin t; their running sums where ``summed``."""
    ahead = z[origins[:, None] + np.arange(1, horizon + 1)]
    return ahead.cumsum(1) if summed else ahead


def restored(
    series: Series,
    scaling: Scaling,
    origins: Int[Array, " m"],
    forecast: Float[Array, "m H"],
) -> Float[Array, "m H"]:
    """Forecasts of x from those of :func:`targets`, which may be summed differences."""
    if not series.differenced:
        return scaling.mean + scaling.std * forecast
    steps = np.arange(1, forecast.shape[1] + 1)
    drift = series.x[origins][:, None] + steps * scaling.mean
    return drift + scaling.std * forecast


def seasonal_naive(
    series: Series, origins: Int[Array, " m"], horizon: int
) -> Float[Array, "m H"]:
    """x̂_{t+h} = x_{t+h-s}, s the fewest whole seasons that reach back to t."""
    steps = np.arange(1, horizon + 1)
    back = steps - series.period * np.ceil(steps / series.period).astype(int)
    return series.x[origins[:, None] + back]


def autoregression(
    series: Series, origins: Int[Array, " m"], horizon: int
) -> tuple[Float[Array, "m H"], int]:
    """An AR(p) of z, fitted on the training part and iterated; and p.

    p is chosen there by AIC, up to a season and 8 steps (a quarter of that part where
    it is short).
    """
    from statsmodels.tsa.ar_model import AutoReg

    z, scaling = scaled(series)
    own = z[: series.ends[0]]
    p = order_by_aic(own, min(series.period + 8, len(own) // 4))
    constant, *weights = AutoReg(own, p).fit().params
    past = z[origins[:, None] - np.arange(p)]  # the latest first, as the weights are
    steps = []
    for _ in range(horizon):
        steps.append(constant + past @ np.array(weights))
        past = np.column_stack([steps[-1], past[:, : p - 1]])
    ahead = np.column_stack(steps)
    summed = ahead.cumsum(1) if series.differenced else ahead
    return restored(series, scaling, origins, summed), p


def order_by_aic(z: Float[Array, " n"], most: int) -> int:
    """The p from 1 to ``most`` of least AIC, all fitted to the same n - most values.

    The regressors of AR(p) are the first 1 + p columns of one matrix, so that a single
    QR decomposition has the residuals of every order.
    """
    rows = np.arange(most, len(z))
    lagged = z[rows[:, None] - np.arange(1, most + 1)]
    Q, _ = np.linalg.qr(np.column_stack([np.ones(len(rows)), lagged]))
    explained = np.cumsum((Q.T @ z[rows]) ** 2)[1:]
    residual = (z[rows] @ z[rows] - explained) / len(rows)
    aic = len(rows) * np.log(residual) + 2 * np.arange(1, most + 1)
    return 1 + int(np.argmin(aic))


def scores(
    series: Series, origins: Int[Array, " m"], forecast: Float[Array, "m H"]
) -> dict[str, Any]:
    """MSE, MAE and MASE, one step ahead and over all steps, and the MAE of each step.

    MASE is the MAE over the mean |x_t - x_{t-period}| of the training part (Hyndman &
    Koehler 2006).
    """
    horizon = forecast.shape[1]
    error = forecast - targets(series.x, origins, horizon, summed=False)
    own = series.x[: series.ends[0]]
    unit = np.abs(own[series.period :] - own[: -series.period]).mean()

    def of(part: Float[Array, "m h"]) -> dict[str, float]:
        mae = float(np.abs(part).mean())
        return {"mse": float((part**2).mean()), "mae": mae, "mase": mae / float(unit)}

    return {
        "one_step": of(error[:, :1]),
        "all_steps": of(error),
        "mae_by_step": np.abs(error).mean(0).tolist(),
    }
