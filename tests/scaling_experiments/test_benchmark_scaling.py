"""benchmark_scaling: what is timed computes what it says; what is left out is told."""

import json
from dataclasses import replace

import pytest
import torch

from experiments.common import InputError
from scaling_experiments import _contestants as contestants
from scaling_experiments import _timing
from scaling_experiments import benchmark_scaling as scaling
from scaling_experiments._report import print_all
from scaling_experiments._timing import can_see_peaks, peak_bytes

CPU = torch.device("cpu")
SMALL = scaling.ScalingOptions(
    lengths=(5, 64, 65), seconds_per_point=1e-3, peaks=False, memory_gb=1.0
)


@pytest.fixture(scope="module")
def contest():
    return contestants.make_contest(2, CPU, seed=3)


@pytest.fixture(scope="module")
def result():
    with pytest.MonkeyPatch.context() as patch:  # nothing is slow: machines differ
        patch.setattr(_timing, "SLOW", 1e9)
        return scaling.run(SMALL)


# --- the contestants


@pytest.mark.parametrize("length", [1, 63, 64, 65, 127])
def test_selective_forms_give_the_naive_loops_outputs(contest, length):
    layer = contest.mamba.ssm
    x = contest.vectors(2, length, 64)
    naive = contestants.SSM_FORMS["naive_loop"](layer, x).detach()
    for form in ("scan", "chunked", "dual"):
        y = contestants.SSM_FORMS[form](layer, x).detach()
        assert float((y - naive).abs().max() / naive.abs().max()) < 1e-5, form


@pytest.mark.parametrize("length", [1, 64, 67])
def test_the_convolution_is_the_recurrence_of_a_constant_step(contest, length):
    layer = contest.mamba.ssm
    x = contest.vectors(2, length, 64)
    delta = torch.nn.functional.softplus(layer.linear_delta.bias.double())
    decay = torch.exp(-delta * torch.exp(layer.A_log.double()))
    h, expected = torch.zeros(2, 128, dtype=torch.float64), []
    for x_t in layer.linear_B(x).double().unbind(1):
        h = decay * h + delta * x_t
        expected.append(h)
    y = contestants.time_invariant(layer, x).detach().double()
    expected = torch.stack(expected, 1).detach()
    assert float((y - expected).abs().max() / expected.abs().max()) < 1e-5


def test_forms_have_equal_gradients(contest):
    point = contestants.Point("mixing", "forward + backward", "scan", 33)
    found = {
        form: contest.call(point._replace(form=form))()
        for form in ("scan", "chunked", "dual", "naive_loop")
    }
    names = ["x", *(name for name, _ in contest.mamba.ssm.named_parameters())]
    for form, gradients in found.items():
        pairs = zip(names, gradients, found["naive_loop"], strict=True)
        for name, mine, theirs in pairs:
            scale = theirs.abs().max()
            assert float((mine - theirs).abs().max() / scale) < 1e-4, (form, name)


def test_whole_models_give_the_models_logits(contest):
    point = contestants.Point("whole", "forward", "scan", 7)
    tokens = contest.tokens(7)
    with torch.no_grad():
        expected = contest.mamba(tokens)[0]
        for form in ("scan", "naive_loop"):
            logits = contest.call(point._replace(form=form))()
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        logits = contest.call(point._replace(form="attention"))()
        torch.testing.assert_close(logits, contest.transformers["learned"](tokens)[0])


def test_a_step_behind_a_prefill_is_the_whole_sequences_last_output(contest):
    attention = contest.attention(40)
    x = contest.vectors(2, 41, 128)
    with torch.no_grad():
        _, cache = attention(x[:, :40])
        y, _ = attention.step(x[:, 40], cache)
        expected = attention(x)[0][:, -1]
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    made = contest.cache(40)
    for mine, theirs in zip(made, cache, strict=True):
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
    assert torch.equal(made.length, cache.length)


def test_positions_are_learned_below_8192_and_rotary_from_there_on(contest):
    kinds = {L: contest.transformer(L) for L in (64, 8191, 8192, 16384)}
    learned, rotary = contest.transformers["learned"], contest.transformers["rotary"]
    assert kinds == {64: learned, 8191: learned, 8192: rotary, 16384: rotary}
    point = contestants.Point("mixing", "step", "attention", 8191)
    replace(contest, batch=1).call(point)()  # the last of the learned ones


def test_calls_leave_no_gradients_and_change_no_state(contest):
    for point in contestants.points_at(9, naive_max_length=9):
        call = contest.call(point)
        first, second = call(), call()
        pairs = zip(
            *(torch.utils._pytree.tree_leaves(x) for x in (first, second)), strict=True
        )
        for a, b in pairs:
            if isinstance(a, torch.Tensor):
                assert torch.equal(a, b), point
                assert not a.requires_grad, point
    models = (contest.mamba, *contest.transformers.values())
    assert all(p.grad is None for model in models for p in model.parameters())


def test_the_naive_loop_ends_at_its_own_length():
    forms = {p.form for p in contestants.points_at(10, naive_max_length=9)}
    assert forms == set(contestants.SSM_FORMS) - {"naive_loop"} | {"attention"}


@pytest.mark.skipif(not can_see_peaks(), reason="peaks are read from /proc")
@pytest.mark.parametrize(
    ("scope", "passed", "form"),
    [
        ("mixing", "forward", "dual"),
        ("mixing", "forward + backward", "dual"),
        ("whole", "forward", "attention"),
        ("whole", "forward + backward", "scan"),
    ],
)
def test_needed_bytes_are_an_upper_estimate_and_no_wild_one(scope, passed, form):
    contest = contestants.make_contest(1, CPU, seed=0)
    point = contestants.Point(scope, passed, form, 300)
    contest.call(point._replace(length=8))()
    peak = peak_bytes(contest.call(point), CPU)
    assert peak / 1.2 < contest.needed_bytes(point) < 12 * max(peak, 2**24)


# --- the run


def test_equality_is_judged_and_can_fail(result):
    assert result.passed, scaling.problems(result.metadata)
    assert [entry["length"] for entry in result.metadata["differences"]] == [5, 64, 65]
    assert "equal the naive loop" in result.details
    for wrong in (1e-3, float("nan")):
        broken = json.loads(json.dumps(result.metadata))
        broken["differences"][1]["chunked"] = wrong
        (line,) = scaling.problems(broken)
        assert "chunked" in line
        assert "length 64" in line


def test_nothing_is_judged_where_the_loop_did_not_run():
    options = replace(SMALL, lengths=(16,), naive_max_length=0)
    assert scaling.run(options).passed is None


def test_every_curve_has_its_points_with_spread_and_the_first_call_apart(result):
    curves = result.metadata["curves"]
    keys = [(c["scope"], c["pass"], c["form"]) for c in curves]
    groups = contestants.FORMS_OF.items()
    assert keys == [(*group, form) for group, forms in groups for form in forms]
    for curve in curves:
        assert [point["length"] for point in curve["points"]] == [5, 64, 65]
        for point in curve["points"]:
            assert point["low_s"] <= point["median_s"] <= point["high_s"]
            assert len(point["repeats_s"]) == point["n"] >= 1
            assert point["cold_s"] > 0
        assert len(curve["exponents"]["local"]) == 2


def test_what_does_not_fit_is_skipped_with_a_line_and_the_run_goes_on(
    capsys, monkeypatch
):
    monkeypatch.setattr(_timing, "SLOW", 1e9)
    result = scaling.run(replace(SMALL, lengths=(8, 300), memory_gb=0.1))
    skipped = {(entry["what"], entry["at"]) for entry in result.metadata["skipped"]}
    whole = "whole model, forward + backward: transformer"
    assert ("mixing alone, forward: dual", 300) in skipped
    assert (whole, 300) in skipped
    assert ("mixing alone, forward: scan", 300) not in skipped
    print_all(scaling.tables(result.metadata))
    told = capsys.readouterr().err
    assert f"skipped: {whole} at 300 (needs about 0.2 GB, of which 0.1 may" in told
    assert result.passed


def test_what_takes_too_long_is_skipped_with_a_line():
    options = replace(SMALL, lengths=(64, 2048), seconds_per_point=1e-4)
    skipped = scaling.run(options).metadata["skipped"]
    (entry,) = [e for e in skipped if e["what"] == "mixing alone, forward: naive_loop"]
    assert entry["at"] == 2048
    assert "raise --seconds-per-point" in entry["why"]


# --- what it comes to


def synthetic(laws, lengths=(64, 256, 1024, 4096)):
    """The found points of contestants whose times are exact laws of the length."""
    return {
        contestants.Point("mixing", "forward", form, L): {
            "length": L,
            "repeats_s": [law(L)] * 5,
            **dict.fromkeys(("cold_s", "median_s", "low_s", "high_s"), law(L)),
            "n": 5,
        }
        for L in lengths
        for form, law in laws.items()
    }


def test_laws_crossovers_and_ratios_are_recovered():
    found = synthetic(
        {
            "scan": lambda L: 1e-6 * L,
            "naive_loop": lambda L: 4e-5 * L,
            "attention": lambda L: 1e-6 / 500 * L**2,
        }
    )
    made = scaling.summarise(found, seed=0)
    fitted = {c["form"]: c["exponents"]["exponent"] for c in made["curves"]}
    assert fitted == pytest.approx({"scan": 1, "naive_loop": 1, "attention": 2})
    (crossing,) = made["crossovers"]
    assert crossing["at"] == pytest.approx(500)
    (loop,) = made["loop_over_scan"]
    assert [r["median"] for r in loop["ratios"]] == pytest.approx([40] * 4)


def test_the_picture_names_laws_and_crossover(result):
    figure = scaling.PICTURES[0].render([result])
    panels = figure.axes
    assert [ax.get_title() for ax in panels[:2]] == [
        "mixing alone, forward",
        "mixing alone, forward + backward",
    ]
    names = [text.get_text() for text in panels[0].get_legend().get_texts()]
    assert [name.partition(":")[0] for name in names] == list(
        contestants.FORMS_OF["mixing", "forward"]
    )
    assert "scan ~ L^" in figure.get_suptitle()


def test_the_tables_hold_document_3s_numbers_and_every_pass(result, capsys):
    print_all(scaling.tables(result.metadata))
    told = capsys.readouterr().err
    for group in contestants.FORMS_OF:
        assert contestants.group_label(group) in told
    for word in ("0.049", "0.087", "1.8", "first calls", "What this does not show"):
        assert word in told
    assert "naive_loop over scan" in told


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lengths": ()}, "lengths"),
        ({"lengths": (64, 64)}, "lengths"),
        ({"batch": 0}, "batch"),
        ({"naive_max_length": -1}, "naive-max-length"),
        ({"seconds_per_point": 0.0}, "seconds-per-point"),
        ({"seconds_per_point": float("nan")}, "seconds-per-point"),
        ({"memory_gb": -1.0}, "memory-gb"),
        ({"threads": -1}, "threads"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_options_are_one_line(change, said):
    with pytest.raises(InputError, match=f"^{said}: got"):
        scaling.run(replace(SMALL, **change))


def test_the_command_measures_peaks_apart_and_prints_one_json_line(capsys, tmp_path):
    picture = tmp_path / "scaling.png"
    words = ["--lengths", "128", "--seconds-per-point", "0.001", "--json"]
    assert scaling.main([*words, "--plot-path", str(picture)]) == 0
    told = capsys.readouterr()
    record = json.loads(told.out)
    assert record["passed"] is True
    assert record["params"]["lengths"] == [128]
    assert picture.stat().st_size > 10_000
    assert "mixing alone, forward" in told.err
    if can_see_peaks():
        peaks = {
            curve["form"]: curve["points"][0]["peak_bytes"]
            for curve in record["meta"]["curves"]
            if (curve["scope"], curve["pass"]) == ("mixing", "forward")
        }
        matrix = 4 * 128 * 128 * 128
        assert 2 * matrix < peaks["dual"] < 6 * matrix
        assert peaks["scan"] < matrix / 4
