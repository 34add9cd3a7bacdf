"""Real series: nothing of the future, baselines by other means, the command."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from statsmodels.tsa.ar_model import AutoReg, ar_select_order

from experiments.common import InputError, RunLog
from time_series_experiments import exp_real_series as experiment
from time_series_experiments import plot_runs
from time_series_experiments.exp_real_series import (
    Problem,
    RealSeriesOptions,
    make_problem,
    problems,
    run,
    windows,
)
from time_series_experiments.series import (
    SERIES,
    autoregression,
    load_series,
    order_by_aic,
    restored,
    scaled,
    scores,
    seasonal_naive,
    targets,
)

TINY = RealSeriesOptions(horizon=3, context=10, epochs=1, N=2, d_model=4)


@pytest.mark.parametrize("name", SERIES)
def test_scaling_sees_the_training_part_alone(name: str) -> None:
    series = load_series(name)
    assert np.isfinite(series.x).all()
    assert (np.diff(series.years) > 0).all()
    z, scaling = scaled(series)
    end = series.ends[0]
    own = z[int(series.differenced) : end]
    assert abs(own.mean()) < 1e-12
    assert own.std() == pytest.approx(1)
    later = series.x.copy()
    later[end:] += 1000.0
    assert scaled(replace(series, x=later))[1] == scaling


def test_missing_weeks_lie_on_the_line_between_their_neighbours() -> None:
    series = load_series("co2")
    assert series.filled == 59
    from statsmodels.datasets import co2

    raw = co2.load_pandas().data["co2"].to_numpy()
    gap = int(np.flatnonzero(np.isnan(raw))[0])
    assert raw[gap - 1] <= series.x[gap] <= raw[gap - 1] + 5
    np.testing.assert_array_equal(series.x[np.isfinite(raw)], raw[np.isfinite(raw)])


@pytest.mark.parametrize("name", SERIES)
def test_targets_come_back_as_the_values_ahead(name: str) -> None:
    series = load_series(name)
    z, scaling = scaled(series)
    origins = np.array([5, 100, len(series.x) - 5])
    ahead = targets(z, origins, 4, summed=series.differenced)
    back = restored(series, scaling, origins, ahead)
    exact = series.x[origins[:, None] + np.arange(1, 5)]
    np.testing.assert_allclose(back, exact, rtol=1e-9, atol=1e-9)
    assert scores(series, origins, back)["all_steps"]["mae"] < 1e-9


def test_parts_do_not_overlap_and_windows_hold_what_they_say() -> None:
    problem = make_problem(TINY)
    n, ends = len(problem.series.x), problem.series.ends
    parts = [problem.origins(part) for part in range(3)]
    for part, (low, high) in enumerate([(0, ends[0]), ends, (ends[1], n)]):
        assert parts[part][0] >= low - 1  # the first value to be forecast
        assert parts[part][-1] + problem.horizon == high - 1
    x, y = windows(problem, 0)
    z, _ = scaled(problem.series)
    np.testing.assert_allclose(x[2].numpy(), z[2:12], rtol=1e-6)
    np.testing.assert_allclose(y[2, 4].numpy(), z[7:10], rtol=1e-6)
    assert ends[0] > 10 + len(x)


def test_the_seasonal_forecast_is_the_value_a_season_before() -> None:
    series = load_series("sunspots")
    origin = np.array([200])
    forecast = seasonal_naive(series, origin, 24)[0]
    for h in range(1, 25):
        back = h - 11 * (1 if h <= 11 else 2 if h <= 22 else 3)
        assert forecast[h - 1] == series.x[200 + back]


def test_the_order_is_statsmodels_own() -> None:
    series = load_series("sunspots")
    z, scaling = scaled(series)
    own = z[: series.ends[0]]
    chosen = ar_select_order(own, maxlag=19, ic="aic").ar_lags
    assert order_by_aic(own, 19) == max(chosen)
    # One origin, right after the training part: statsmodels forecasts from there, too.
    origin = np.array([len(own) - 1])
    forecast, p = autoregression(series, origin, 6)
    expected = AutoReg(own, p).fit().forecast(6)
    np.testing.assert_allclose(
        forecast[0], scaling.mean + scaling.std * expected, rtol=1e-9
    )


def test_a_forecast_does_not_see_what_is_ahead() -> None:
    series = load_series("co2")
    origin = np.array([1900])
    later = series.x.copy()
    later[1901:] -= 50.0
    other = replace(series, x=later)
    for baseline in (seasonal_naive, lambda *a: autoregression(*a)[0]):
        np.testing.assert_array_equal(
            baseline(series, origin, 5), baseline(other, origin, 5)
        )
    z, changed = scaled(series)[0], scaled(other)[0]
    np.testing.assert_array_equal(z[:1901], changed[:1901])


def test_command_and_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "--task sunspots --models ssm_diag_linear rnn --horizon 3 --context 10"
    words += f" --epochs 1 --N 2 --d-model 4 --log-path {tmp_path}/ts_runs.jsonl"
    assert experiment.main(words.split()) == 0
    found = list(RunLog(tmp_path / "ts_runs.jsonl").records())
    assert len(found) == 2
    assert [problems(record["meta"]) for record in found] == [[], []]
    wrong = found[0]["meta"]["scores"]["one_step"] | {"mae": 0.0}
    assert problems(found[0]["meta"] | {"scores": {"one_step": wrong}})
    assert experiment.main(words.split()) == 0
    assert len(list(RunLog(tmp_path / "ts_runs.jsonl").records())) == 2
    log = str(tmp_path / "ts_runs.jsonl")
    assert plot_runs.main(["--task", "sunspots", "--log-path", log]) == 0
    assert (tmp_path / "sunspots_forecasts.png").is_file()
    assert (tmp_path / "sunspots_errors.png").is_file()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        plot_runs.main(["--task", "co2", "--log-path", log])
    assert "no runs of co2, it holds sunspots" in capsys.readouterr().err


def test_the_clean_model_beats_the_mean_one_step_ahead() -> None:
    meta = run(replace(TINY, N=6, context=44, epochs=30)).metadata
    series = load_series("sunspots")
    problem = Problem(series, 3, 44)
    ahead = targets(series.x, problem.origins(2), 3, summed=False)[:, 0]
    mean = series.x[: series.ends[0]].mean()
    assert meta["scores"]["one_step"]["mse"] < 0.5 * ((ahead - mean) ** 2).mean()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"task": "sunspot"}, "task: got 'sunspot'"),
        ({"horizon": 100}, "horizon: got 100"),
        ({"context": 200}, "context: got 200"),
        ({"N": 0}, "N: got 0"),
        ({"model": "lstm"}, "models: got 'lstm'"),
        ({"lr": -1.0}, "lr: got -1"),
    ],
)
def test_bad_input_is_refused(changed: dict[str, object], said: str) -> None:
    with pytest.raises(InputError) as refusal:
        run(replace(TINY, **changed))  # type: ignore[arg-type]
    assert said in str(refusal.value)
