"""Speculative decoding: the target's law, its greedy text, counts, the command."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from experiments.common import InputError, command_line
from scaling_experiments import speculative as spec
from ssm.models import SequenceLM, SequenceLMConfig, generate

FALSE_ALARM = 1e-6  # of each chi-square test, were its draws not seeded
TINY = {
    "K_values": (1, 3),
    "tokens": 9,
    "sequences": 3,
    "prompt": 4,
    "repeats": 1,
    "target_steps": 3,
    "draft_steps": (2, 1),
    "target_width": 16,
    "target_layers": 2,
    "draft_width": 8,
    "seq_len": 16,
    "batch_size": 2,
    "device": "cpu",
}


def model(vocab_size: int, pattern: str, seed: int, d_model: int = 8) -> SequenceLM:
    """A model in float64 whose law is neither uniform nor another one's."""
    layers = len(pattern.translate({ord(sign): None for sign in "+*~"}))
    options = {"attention": {"n_heads": 2}} if "A" in pattern else {}
    config = SequenceLMConfig(
        vocab_size, d_model, layers, pattern, embedding_std=0.25, mixer=options
    )
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        return SequenceLM(config, dtype=torch.float64).eval()


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def law_of(target: SequenceLM, prompt: Tensor, n: int) -> Tensor:
    """The probability of every continuation of n tokens, in lexicographic order."""
    vocab = range(target.config.vocab_size)
    every = torch.tensor(list(itertools.product(vocab, repeat=n)))
    tokens = torch.cat([prompt.expand(len(every), -1), every], 1)
    with torch.no_grad():
        p = target(tokens).logits.softmax(-1)[:, len(prompt) - 1 : -1]
    return p.gather(-1, every[..., None])[..., 0].prod(1)


def index_of(tokens: Tensor, vocab_size: int) -> Tensor:
    places = vocab_size ** torch.arange(tokens.shape[1] - 1, -1, -1)
    return (tokens * places).sum(1)


def p_value(counts: np.ndarray, expected: np.ndarray) -> float:
    """Of a chi-square test; what is expected fewer than 5 times is one class."""
    rare = expected < 5
    if rare.any():
        counts = np.append(counts[~rare], counts[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    return float(stats.chisquare(counts, expected).pvalue)


@pytest.mark.parametrize(("pattern", "K"), [("M", 1), ("M", 4), ("MA+", 2)])
def test_what_is_written_has_the_law_of_the_target(K, pattern):
    target, draft = model(3, pattern, 0), model(3, "M", 1)
    prompt = torch.tensor([2, 0])
    law = law_of(target, prompt, 3)
    assert float(law.sum()) == pytest.approx(1, abs=1e-12)
    rows = 4000
    found = spec.speculate(
        target, draft, prompt.expand(rows, -1), 3, K, generator=generator(K)
    )
    counts = torch.bincount(index_of(found.tokens, 3), minlength=27).numpy()
    assert p_value(counts, law.numpy() * rows) > FALSE_ALARM
    of_draft = law_of(draft, prompt, 3).numpy() * rows
    assert p_value(counts, of_draft) < 1e-12  # it can tell laws apart


def test_accepting_and_resampling_give_p_exactly():
    p, q = torch.rand(2, 50, 7, generator=generator(0), dtype=torch.float64)
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    kept = torch.minimum(p, q)
    refused = 1 - kept.sum(-1, keepdim=True)
    whole = kept + refused * spec.residual(p, q)
    torch.testing.assert_close(whole, p, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(spec.residual(p, p), p, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("pattern", "K"), [("MM", 1), ("MM", 8), ("MA+", 3), ("R~", 3), ("H", 2)]
)
def test_greedy_text_is_that_of_the_target_alone(pattern, K):
    target, draft = model(7, pattern, 2), model(7, "M", 3)
    prompts = torch.randint(0, 7, (5, 4), generator=generator(0))
    found = spec.speculate(
        target, draft, prompts, 21, K, generator=generator(1), greedy=True
    )
    alone = generate(target, prompts, 21, greedy=True).tokens
    assert found.tokens.equal(alone)
    # Every call but a row's last one writes from 1 to K + 1 tokens that it needs.
    assert bool((found.written >= 21).all() and (found.written < 21 + K + 1).all())
    assert bool((found.calls <= 21).all() and (found.calls * (K + 1) >= 21).all())
    assert found.rounds == int(found.calls.max())


def test_a_draft_equal_to_its_target_is_always_right():
    target = model(7, "M", 4)
    prompts = torch.randint(0, 7, (6, 1), generator=generator(0))
    for K in (1, 4):
        found = spec.speculate(target, target, prompts, 20, K, generator=generator(1))
        assert found.calls.tolist() == [math.ceil(20 / (K + 1))] * 6
        assert found.written.equal(found.calls * (K + 1))


def test_a_draft_that_is_never_right_costs_a_call_a_token():
    """p gives all to token 0, q to token 1; the residual is p."""
    p = torch.zeros(4, 3, 2, dtype=torch.float64)
    p[..., 0] = 1
    guesses = torch.ones(4, 2, dtype=torch.int64)
    accepted, following = spec.judge(p, p[:, :2].flip(-1), guesses, generator(0))
    assert (accepted.tolist(), following.tolist()) == ([0] * 4, [0] * 4)


def test_where_guesses_are_independent_a_call_yields_what_theory_says():
    """One law p at all places and one q: the assumption of the formula holds."""
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    q = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    alpha, K, rows = 0.2 + 0.2 + 0.2, 3, 20000
    draws = torch.multinomial(q, rows * K, replacement=True, generator=generator(0))
    accepted, following = spec.judge(
        p.expand(rows, K + 1, -1),
        q.expand(rows, K, -1),
        draws.view(rows, K),
        generator(1),
    )
    share = np.array([alpha**n * (1 - alpha) for n in range(K)] + [alpha**K])
    counts = torch.bincount(accepted, minlength=K + 1).numpy()
    assert stats.chisquare(counts, rows * share).pvalue > FALSE_ALARM
    written = float((accepted + 1).double().mean())
    assert spec.tokens_a_call(alpha, K) == pytest.approx((1 - alpha**4) / (1 - alpha))
    assert written == pytest.approx(spec.tokens_a_call(alpha, K), rel=0.03)
    # Behind K accepted guesses p itself is drawn from; before, (p - q)_+.
    behind = torch.bincount(following[accepted == K], minlength=3).numpy()
    assert stats.chisquare(behind, behind.sum() * p.numpy()).pvalue > FALSE_ALARM
    refused = torch.bincount(following[accepted < K], minlength=3).numpy()
    left = np.array([0.3, 0.1, 0]) / 0.4
    assert refused[2] == 0
    expected = refused.sum() * left[:2]
    assert stats.chisquare(refused[:2], expected).pvalue > FALSE_ALARM


def test_alpha_is_one_minus_the_distance_of_the_laws():
    target, draft = model(5, "M", 5), model(5, "M", 6)
    prompts = torch.randint(0, 5, (4, 3), generator=generator(0))
    own = torch.randint(0, 5, (4, 6), generator=generator(1))
    rows = []
    for prompt, text in zip(prompts, own, strict=True):
        overlaps = []
        for t in range(len(text)):
            seen = torch.cat([prompt, text[:t]])[None]
            with torch.no_grad():
                p, q = (m(seen).logits[0, -1].softmax(-1) for m in (target, draft))
            overlaps.append(1 - 0.5 * float((p - q).abs().sum()))
        rows.append(np.mean(overlaps))
    found = spec.acceptance(target, draft, prompts, own)
    assert found["alpha"] == pytest.approx(np.mean(rows), rel=1e-12)
    assert found["alpha_error"] == pytest.approx(np.std(rows, ddof=1) / 2, rel=1e-9)


def test_the_error_of_a_ratio_is_that_of_resampled_rows():
    rng = np.random.default_rng(0)
    below = rng.integers(20, 60, 400)
    above = below + rng.poisson(below)
    ratio, error = spec.ratio_of_sums(above, below)
    assert ratio == above.sum() / below.sum()
    picks = rng.integers(0, 400, (2000, 400))
    spread = (above[picks].sum(1) / below[picks].sum(1)).std()
    assert error == pytest.approx(spread, rel=0.1)
    assert math.isnan(spec.ratio_of_sums(above[:1], below[:1])[1])


@pytest.fixture(scope="module")
def result():
    return spec.run(spec.SpeculativeOptions(**TINY))


def test_a_run_measures_every_draft_and_number_of_guesses(result):
    assert result.passed is None
    metadata = result.metadata
    assert [draft["steps"] for draft in metadata["drafts"]] == [2, 1]
    for draft in metadata["drafts"]:
        assert 0 < draft["alpha"] < 1
        for K, row in zip((1, 3), draft["rows"], strict=True):
            theory = sum(draft["alpha"] ** j for j in range(K + 1))
            assert row["tokens_a_call_theory"] == pytest.approx(theory)
            assert row["calls_theory"] == pytest.approx(9 / theory)
            assert 1 <= row["tokens_a_call"] <= K + 1
            assert 9 / (K + 1) <= row["calls"] <= 9
            assert row["speedups"] == [row["speedup"]]
            alone, ours = row["seconds_alone"][0], row["seconds"][0]
            assert row["speedup"] == pytest.approx(alone / ours)
    assert "theory" in result.details
    json.dumps(metadata, allow_nan=False)


def test_a_seed_repeats_all_but_the_time(result):
    again = spec.run(spec.SpeculativeOptions(**TINY)).metadata
    for first, second in zip(result.metadata["drafts"], again["drafts"], strict=True):
        assert first["alpha"] == second["alpha"]
        assert [row["calls"] for row in first["rows"]] == [
            row["calls"] for row in second["rows"]
        ]


def test_the_picture_shows_every_draft_beside_theory(result):
    figure = spec.PICTURES[0].render([result])
    yields, speeds = figure.axes
    labels = yields.get_legend_handles_labels()[1]
    assert sum("updates" in label for label in labels) == 2
    theory = yields.lines[0].get_ydata()
    rows = result.metadata["drafts"][0]["rows"]
    assert list(theory) == [row["tokens_a_call_theory"] for row in rows]
    assert "alone" in speeds.get_title() + " ".join(
        speeds.get_legend_handles_labels()[1]
    )


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"K_values": (0, 1)}, "K_values: got 0"),
        ({"K_values": (2, 1)}, "K_values"),
        ({"draft_steps": ()}, "draft_steps"),
        ({"draft_steps": (3, 0)}, "draft_steps: got 0"),
        ({"repeats": 0}, "repeats: got 0"),
        ({"prompt": 10**7}, "prompt: got 10000000"),
        ({"pattern": "mambo"}, "pattern"),
        ({"lr": 0.0}, "lr"),
    ],
)
def test_bad_options_are_refused_in_one_line(changed, text):
    with pytest.raises(InputError, match=text) as error:
        spec.run(spec.SpeculativeOptions(**TINY | changed))
    assert "\n" not in str(error.value)


def test_the_command_says_what_is_wrong_and_writes_nothing(capsys, tmp_path):
    picture, log = tmp_path / "p.png", tmp_path / "log.jsonl"
    argv = ["--K-values", "3", "1", "--plot-path", str(picture)]
    argv += ["--log", "--log-path", str(log)]
    with pytest.raises(SystemExit) as stop:
        command_line(spec.run, pictures=spec.PICTURES, argv=argv)
    told = capsys.readouterr().err
    assert stop.value.code == 2
    assert told.startswith("error: K_values: got (3, 1)")
    assert len(told.splitlines()) == 1
    assert not picture.exists()
    assert not log.exists() or not log.read_text()


def test_records_that_cannot_be_are_told() -> None:
    row = {"K": 2, "tokens_a_call": 2.5}
    draft = {"steps": 10, "alpha": 0.5, "rows": [row]}
    assert spec.problems({"drafts": [draft]}) == []
    wrong = draft | {"alpha": 1.5, "rows": [row | {"tokens_a_call": 3.5}]}
    alpha, calls = spec.problems({"drafts": [wrong]})
    assert "alpha = 1.5" in alpha
    assert "3.5 tokens a call with K = 2" in calls
