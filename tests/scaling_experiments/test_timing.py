"""Timing in turns, budgets, memory in a fresh process, and the laws fitted to times."""

import math

import numpy as np
import pytest
import torch

from experiments.common import InputError, random_stream
from scaling_experiments import _fits as fits
from scaling_experiments import _timing as timing

CPU = torch.device("cpu")


# --- turns and budgets


def test_calls_take_turns_after_a_first_call_of_each():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    times, lost = timing.in_turns(calls, CPU, timing.Budget(1.0, 3, 3))
    # calls as short as these follow one that is not counted
    assert order == ["a", "b", *(["a", "a", "b", "b"] * 3)]
    assert lost == {}
    assert {name: entry["n"] for name, entry in times.items()} == {"a": 3, "b": 3}


@pytest.mark.parametrize(
    ("repeats", "wants"),
    [
        ([], True),  # one at least, however long
        ([0.1], True),
        ([0.3], True),  # five in up to four times the seconds …
        ([0.19] * 4, True),
        ([0.19] * 5, False),  # … and no more of them than the seconds allow
        ([0.9], False),
        ([0.01] * 8, True),
        ([0.001] * 9, False),
    ],
)
def test_a_budget_ends_by_seconds_by_number_and_by_patience(repeats, wants):
    assert timing.Budget(0.2, at_most=9).wants(repeats) is wants


def out_of_memory(kind, message):
    def call():
        raise kind(message)

    return call


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: torch.empty(10**15), "can't allocate memory"),
        (lambda: np.empty(10**15), "Unable to allocate"),
        (out_of_memory(torch.OutOfMemoryError, "CUDA out of memory.\nx"), "CUDA out"),
        (out_of_memory(MemoryError, ""), "(MemoryError)"),
    ],
)
def test_a_call_that_runs_out_of_memory_is_left_out_and_the_rest_goes_on(call, said):
    budget = timing.Budget(1.0, 2, 2)
    times, lost = timing.in_turns({"big": call, "small": list}, CPU, budget)
    assert list(times) == ["small"]
    assert list(lost) == ["big"]
    assert said in lost["big"]
    assert "\n" not in lost["big"]


def test_memory_that_runs_out_later_takes_the_contestant_out():
    calls = iter(range(100))

    def call():
        if next(calls) > 3:
            raise MemoryError

    times, lost = timing.in_turns({"late": call}, CPU, timing.Budget(1.0))
    assert (times, list(lost)) == ({}, ["late"])


def test_another_error_is_not_hidden():
    for error in (RuntimeError("shapes"), ValueError("x")):
        call = out_of_memory(type(error), str(error))
        with pytest.raises(type(error), match=str(error)):
            timing.in_turns({"wrong": call}, CPU, timing.Budget(1.0))


def test_the_clock_sees_how_long_a_call_takes():
    import time

    assert timing.seconds_of(lambda: time.sleep(0.02), CPU) >= 0.02


def test_a_summary_has_quartiles():
    found = timing.summary(9.0, [1.0, 2.0, 3.0, 4.0, 10.0])
    assert [found[k] for k in ("cold_s", "low_s", "median_s", "high_s", "n")] == [
        9.0,
        2.0,
        3.0,
        4.0,
        5,
    ]


@pytest.mark.parametrize(
    ("past", "power", "expected"),
    [
        ([(100, 1.0)], 2.0, 16.0),  # one length: the contestant's own power
        ([(100, 1.0)], 1.5, 8.0),
        ([(50, 0.5), (100, 1.0)], 2.0, 4.0),
        ([(50, 0.5**1.5), (100, 1.0)], 2.0, 8.0),
        ([(50, 1.0), (100, 1.0)], 2.0, 4.0),  # never below linear
        ([(50, 0.01), (100, 1.0)], 1.5, 16.0),  # nor above quadratic
        ([(50, 0.01), (100, 1.0)], 1.0, 4.0),
    ],
)
def test_expected_seconds_rise_as_the_last_ones_did(past, power, expected):
    assert timing.expected_seconds(past, 400, power) == pytest.approx(expected)


def test_threads_are_set_and_given_back():
    before = torch.get_num_threads()
    with timing.threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_what_is_expected_to_be_slow_or_large_is_told():
    assert timing.too_slow([], 100, 2.0, 0.1) is None
    assert timing.too_slow([(100, 0.2)], 200, 2.0, 0.1) is None
    assert "3.2 s a call" in timing.too_slow([(100, 0.2)], 400, 2.0, 0.1)
    assert timing.short_of_memory(1e9, 2e9) is None
    assert timing.short_of_memory(3e9, 2e9) == (
        "needs about 3.0 GB, of which 2.0 may be used"
    )
    assert timing.usable_bytes(3.0, CPU) == 3e9
    assert 0 < timing.usable_bytes(0.0, CPU) < 2**50


def test_a_device_that_is_not_there_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="device: got 'cuda'"):
        timing.check_device("cuda")


# --- memory


def held_and_freed(sizes):
    """For the fresh process: the peak of holding so many MB; then it ends early."""
    for size in sizes["megabytes"]:
        yield timing.peak_bytes(lambda: torch.ones(size, 250_000).sum(), CPU)  # noqa: B023
    yield [None, "whatever JSON can hold"]
    raise SystemExit(1)


@pytest.mark.skipif(not timing.can_see_peaks(), reason="peaks are read from /proc")
def test_the_peak_of_a_fresh_process_is_what_a_call_holds():
    sizes = [10, 200, 20, 100]  # MB: after a large one, a small one is small again
    request = {"megabytes": sizes}
    *found, last = timing.in_fresh_process(__name__, "held_and_freed", request)
    assert found == pytest.approx([1e6 * size for size in sizes], abs=5e6)
    assert last == [None, "whatever JSON can hold"]


# --- laws


LENGTHS = [64, 128, 256, 512, 1024, 2048, 4096]


def test_an_exponent_is_found_where_constants_no_longer_hide_it():
    seconds = [1e-4 + 1e-9 * L**1.7 for L in LENGTHS]
    fit = fits.exponents(LENGTHS, seconds)
    assert fit["from"] == 512
    assert fit["local"][0] < 0.1
    assert fit["local"] == sorted(fit["local"])
    pure = fits.exponents(LENGTHS, [3e-9 * L**1.7 for L in LENGTHS])
    assert pure["exponent"] == pytest.approx(1.7)
    assert pure["local"] == pytest.approx([1.7] * 6)
    assert pure["exponent_ci95"] == pytest.approx([1.7, 1.7])
    assert fits.exponents_text(pure) == "1.70 ±0.00"


def test_the_interval_of_an_exponent_holds_it_19_times_in_20():
    rng = np.random.default_rng(5)
    held = 0
    for _ in range(400):
        noise = np.exp(0.1 * rng.standard_normal(len(LENGTHS)))
        seconds = noise * np.array(LENGTHS, float) ** 2
        fit = fits.exponents(LENGTHS, seconds.tolist())
        low, high = fit["exponent_ci95"]
        held += low <= 2 <= high
    assert 0.91 <= held / 400 <= 0.99


@pytest.mark.parametrize(("n", "text"), [(1, "- (one length)"), (2, "2.00")])
def test_few_lengths_have_no_interval(n, text):
    fit = fits.exponents(LENGTHS[:n], [L**2.0 for L in LENGTHS[:n]])
    assert fits.exponents_text(fit) == text


def test_a_line_and_its_interval():
    x = [1.0, 2.0, 3.0, 7.0]
    exact = fits.fit_line(x, [5 + 0.25 * v for v in x])
    assert exact["slope"] == pytest.approx(0.25)
    assert fits.fit_line(x, [7.7] * 4) == {"slope": 0.0, "ci95": [0.0, 0.0]}
    # by hand: slope 1, residuals (-1, 2, -1) / 6, t(1) = 12.706
    bent = fits.fit_line([0, 1, 2], [0, 1.5, 2])
    half = 12.7062 * math.sqrt((6 / 36) / 1 / 2)
    assert bent["ci95"] == pytest.approx([1 - half, 1 + half], rel=1e-4)
    assert fits.fit_line(x[:2], x[:2])["slope"] is None
    assert fits.slope_text(bent, 1e3, ".0f") == "1000 ±3668"
    assert fits.slope_text({"slope": None, "ci95": None}, 1, ".0f") == "-"


def test_the_crossing_of_two_power_laws_is_where_they_are_equal():
    first = [1e-6 * L for L in LENGTHS]
    second = [1e-6 / 300 * L**2 for L in LENGTHS]
    assert fits.crossing(LENGTHS, first, second) == pytest.approx(300)
    assert fits.crossing(LENGTHS, second, first) == math.inf
    assert fits.crossing(LENGTHS, [1e-9] * 7, second) == 0
    twice = [2, 0.5, 2, 0.5, 2, 2, 2]  # the last crossing counts
    assert 512 < fits.crossing(LENGTHS, [1] * 7, twice) < 1024


def noisy(medians, seed, spread=0.1, n=15):
    rng = np.random.default_rng(seed)
    return [(m * np.exp(spread * rng.standard_normal(n))).tolist() for m in medians]


def test_a_crossover_has_an_interval_that_holds_it_and_shrinks_with_the_noise():
    linear = [1e-6 * L for L in LENGTHS]
    square = [1e-6 / 300 * L**2 for L in LENGTHS]
    widths = []
    for spread in (0.2, 0.02):
        found = fits.crossover(
            LENGTHS,
            noisy(linear, 1, spread),
            noisy(square, 2, spread),
            random_stream(0, "bootstrap"),
        )
        low, high = found["ci95"]
        assert found["verdict"] == "crossover"
        assert low <= found["at"] <= high
        assert low * 0.9 < 300 < high * 1.1
        widths.append(high - low)
    assert widths[1] < widths[0] / 3
    text = fits.crossover_text(found, "ours", "theirs")
    assert text == (
        f"ours is faster from about {found['at']:.0f} on "
        f"(95 %: {low:.0f} to {high:.0f})"
    )


def test_no_crossover_is_said_plainly():
    rng = random_stream(0, "bootstrap")
    slow, fast = noisy([1.0] * 7, 3), noisy([0.1] * 7, 4)
    always = fits.crossover(LENGTHS, fast, slow, rng)
    never = fits.crossover(LENGTHS, slow, fast, rng)
    assert (always["at"], never["at"]) == (None, None)
    assert fits.crossover_text(always, "a", "b") == (
        "no crossover in range: a is faster from 64 on"
    )
    assert fits.crossover_text(never, "a", "b") == (
        "no crossover in range: b is not slower at 4096"
    )
    near = noisy([1.0] * 6 + [1.001], 5), noisy([1.0] * 7, 6)
    unsure = fits.crossover(LENGTHS, *near, rng)
    assert set(unsure["sides"]) != {"within"}
    assert "95 %: " in fits.crossover_text(unsure, "a", "b")
