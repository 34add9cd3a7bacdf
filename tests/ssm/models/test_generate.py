"""Generation: every row as if alone, whatever the padding; what is drawn, and how."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ssm._errors import ArgumentError
from ssm.models.generate import (
    Numbers,
    _is_capturable,
    align,
    generate,
    generate_stream,
)
from ssm.models.patterns import NAMED_PATTERNS
from ssm.models.sampling import Sampling, row_generators
from tests.ssm.helpers import assert_close
from tests.ssm.models.helpers import LETTERS, VOCAB, tiny, tokens

LENGTHS = [5, 2, 1]
GROWING = ("transformer", "jamba", "striped_hyena", LETTERS)  # or waiting for the host


def prompts() -> list[Tensor]:
    return [tokens(n, seed=n) for n in LENGTHS]


def padded(side: str) -> tuple[Tensor, Tensor]:
    """The prompts in one tensor, and the mask of their tokens."""
    x, mask = torch.full((3, 7), 7), torch.zeros(3, 7, dtype=torch.int64)
    for i, row in enumerate(prompts()):
        n = len(row)
        places = {
            "left": torch.arange(7 - n, 7),
            "right": torch.arange(n),
            "between": torch.arange(7)[::1][torch.arange(n) + torch.arange(n) // 2],
        }[side]
        x[i, places], mask[i, places] = row, 1
    return x, mask


@pytest.mark.parametrize("pattern", [*NAMED_PATTERNS, LETTERS])
def test_batches_equal_rows_alone(pattern: str) -> None:
    model = tiny(pattern)
    alone = [
        list(generate_stream(model, row[None], 4, greedy=True)) for row in prompts()
    ]
    for side in ("left", "right", "between"):
        x, mask = padded(side)
        steps = generate_stream(model, x, 4, attention_mask=mask, greedy=True)
        for t, step in enumerate(steps):
            for i, expected in enumerate(alone):
                assert step.tokens[i] == expected[t].tokens[0]
                assert_close(step.logits[i], expected[t].logits[0], name=side)


def test_greedy_is_the_likeliest_token_of_the_whole_sequence() -> None:
    model, x = tiny("MA"), tokens(2, 3)
    new = generate(model, x, 6, greedy=True).tokens
    for _ in range(6):
        x = torch.cat([x, model(x).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(new, x[:, 3:])


def test_all_ways_of_giving_prompts_agree() -> None:
    model = tiny("mamba")
    x, mask = padded("right")
    expected = generate(model, x, 3, attention_mask=mask.bool(), greedy=True).tokens
    lists = [row.tolist() for row in prompts()]
    for given, options in (
        (prompts(), {}),
        (lists, {}),
        (x, {"lengths": torch.tensor(LENGTHS)}),
        (x, {"lengths": LENGTHS}),
    ):
        actual = generate(model, given, 3, greedy=True, **options).tokens
        assert torch.equal(actual, expected)


def test_alignment_keeps_the_order_and_cuts_what_is_empty() -> None:
    for side in ("left", "right", "between"):
        x, lengths = align(padded(side)[0], None, padded(side)[1])
        assert x.shape == (3, 5)
        assert lengths.tolist() == LENGTHS
        for row, n, prompt in zip(x, LENGTHS, prompts(), strict=True):
            assert torch.equal(row[:n], prompt)
    assert align(tokens(2, 4))[1] is None


def test_a_cache_goes_before_the_prompts() -> None:
    model, x = tiny("MA"), tokens(2, 6)
    whole = generate(model, x, 4, greedy=True).tokens
    state = model(x[:, :4]).state
    for _ in range(2):  # it is not used up
        rest = generate(model, x[:, 4:], 4, greedy=True, state=state).tokens
        assert torch.equal(rest, whole)


def test_rows_end_at_their_own_end() -> None:
    model = tiny("mamba")
    endless = generate(model, prompts(), 8, greedy=True).tokens
    eos = int(endless[0, 2])
    new = generate(model, prompts(), 8, greedy=True, eos_token=eos)
    for i, row in enumerate(endless.tolist()):
        n = row.index(eos) + 1 if eos in row else 8
        assert new.lengths[i] == n
        assert new.tokens[i, :n].tolist() == row[:n]
        assert (new.tokens[i, n:] == eos).all()
    assert new.tokens.shape[1] == int(new.lengths.max())
    first = generate(model, prompts()[0][None], 8, greedy=True, eos_token=eos)
    assert first.tokens.shape[1] == first.lengths[0] <= 3  # stops once all have ended


def test_a_row_draws_the_same_alone_and_in_any_batch() -> None:
    model = tiny("mamba2")

    def run(rows: list[Tensor], generator: Any) -> Tensor:
        return generate(model, rows, 12, generator=generator, temperature=1.5).tokens

    def seeded(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    together = run(prompts(), [seeded(i) for i in range(3)])
    for i, row in enumerate(prompts()):
        assert torch.equal(run([row], [seeded(i)])[0], together[i])
    swapped = run(prompts()[::-1], [seeded(i) for i in (2, 1, 0)])
    assert torch.equal(swapped.flip(0), together)
    one = run(prompts(), seeded(3))
    assert torch.equal(run(prompts()[:2], seeded(3)), one[:2])
    same = run([prompts()[0]] * 4, seeded(3))
    assert len({tuple(row.tolist()) for row in same}) == 4  # rows differ
    assert torch.equal(one, run(prompts(), seeded(3)))
    assert not torch.equal(one, run(prompts(), seeded(4)))
    with torch.random.fork_rng():
        torch.manual_seed(5)
        free = run(prompts(), None)
        torch.manual_seed(5)
        assert torch.equal(free, run(prompts(), None))


def oracle(
    logits: list[float], temperature: float, k: int | None, p: float | None
) -> list[float]:
    """What is drawn from, by the words of the definition, token by token."""
    weights = torch.tensor(logits, dtype=torch.float64).div(temperature).exp().tolist()
    ranked = sorted(range(len(weights)), key=lambda i: (-weights[i], i))[:k]
    total, kept, mass = sum(weights[i] for i in ranked), [], 0.0
    for i in ranked:
        if p is not None and kept and mass >= p * total:
            break
        kept.append(i)
        mass += weights[i]
    return [w / mass if i in kept else 0.0 for i, w in enumerate(weights)]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [None, 1, 4, 11])
@pytest.mark.parametrize("top_p", [None, 1e-9, 0.37, 0.8, 1.0])
def test_probabilities_are_the_definitions(
    temperature: float, top_k: int | None, top_p: float | None
) -> None:
    logits = torch.randn(4, 11, generator=torch.Generator().manual_seed(2))
    logits[1, 3] = logits[1, 7] = logits[1].max() + 0.5  # equals: the first is kept
    sampling = Sampling(temperature, top_k, top_p)
    actual = sampling.probabilities(logits)
    for row, values in zip(actual, logits.tolist(), strict=True):
        expected = torch.tensor(oracle(values, temperature, top_k, top_p))
        assert_close(row, expected.to(row.dtype), dtype=torch.float32)
        assert torch.equal(row > 0, expected > 0)


def test_draws_are_the_inverse_of_the_summed_probabilities() -> None:
    logits = torch.tensor([[0.5, 0.0, 0.2, 0.3, 0.0]]).log()
    u = torch.tensor([0.0, 0.49, 0.51, 0.69, 0.71, 1 - 2.0**-24])
    drawn = Sampling().invert(logits.expand(6, -1), u)
    assert drawn.tolist() == [0, 0, 2, 2, 3, 3]  # never the token of probability 0
    best = Sampling(top_k=2).invert(logits.expand(6, -1), u)
    assert set(best.tolist()) == {0, 3}


def test_draws_have_the_frequencies_of_the_probabilities() -> None:
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0])
    streams = row_generators(torch.Generator().manual_seed(0), 1) * 4000
    drawn = Sampling(temperature=0.8).choose(logits.expand(4000, -1), streams)
    expected = (logits / 0.8).softmax(-1)
    counts = drawn.bincount(minlength=4) / 4000
    deviation = (expected * (1 - expected) / 4000).sqrt()
    assert ((counts - expected).abs() < 4 * deviation).all()


def test_modes_and_gradients_are_given_back() -> None:
    model = tiny("A+U", dropout=0.5)
    expected = generate(model, tokens(2, 3), 4, greedy=True).tokens
    model.train()
    model.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    stream = generate_stream(model, tokens(2, 3), 4, greedy=True)
    drawn = []
    for step in stream:
        assert torch.is_grad_enabled()  # between steps the caller's modes hold
        assert [module.training for module in model.modules()] == modes
        assert not step.logits.requires_grad
        drawn.append(step.tokens)
    assert torch.equal(torch.stack(drawn, 1), expected)  # without dropout


def test_nothing_new_is_asked_for() -> None:
    new = generate(tiny("mamba"), tokens(2, 3), 0, greedy=True)
    assert new.tokens.shape == (2, 0)
    assert new.lengths.tolist() == [0, 0]


def test_two_runs_are_bit_equal() -> None:
    runs = []
    for _ in range(2):
        model = tiny("jamba", dtype=torch.float32)
        generator = torch.Generator().manual_seed(1)
        steps = generate_stream(model, prompts(), 5, generator=generator, top_p=0.9)
        runs.append([(step.tokens, step.logits) for step in steps])
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="it needs a GPU")
@pytest.mark.parametrize("pattern", [*NAMED_PATTERNS, LETTERS])
def test_a_cuda_graph_gives_the_same_tokens(pattern: str) -> None:
    model = tiny(pattern, dtype=torch.float32).cuda()
    assert _is_capturable(model) == (pattern not in GROWING)
    for options in ({"greedy": True}, {"top_k": 5}, {"greedy": True, "eos_token": 3}):
        runs = []
        for stream in (generate, generate_stream):
            generator = torch.Generator().manual_seed(1)
            runs.append(stream(model, prompts(), 9, generator=generator, **options))
        steps = torch.stack([step.tokens for step in runs[1]], 1)
        assert torch.equal(runs[0].tokens, steps)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"temperature": 0.0}, "greedy=True"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": VOCAB + 1}, f"vocab_size = {VOCAB}"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"greedy": True, "top_k": 3}, "by itself"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"max_new_tokens": 2.0}, "max_new_tokens"),
        ({"eos_token": VOCAB}, "eos_token"),
        ({"generator": 3}, "generator"),
        ({"generator": [torch.Generator()]}, "one for each row"),
        ({"generator": [torch.default_generator] * 2}, "different"),
        ({"lengths": torch.tensor([3, 4])}, "lengths"),
        ({"lengths": torch.tensor([3, 0])}, "empty prompt in row 1"),
        ({"attention_mask": torch.ones(2, 2)}, "attention_mask"),
        ({"attention_mask": torch.full((2, 3), 2)}, "0 and 1"),
        (
            {"attention_mask": torch.ones(2, 3), "lengths": torch.tensor([3, 3])},
            "beside lengths",
        ),
        ({"prompts": tokens(3)}, "prompts"),
        ({"prompts": []}, "prompts"),
        ({"prompts": [[1], []]}, "row 1"),
        ({"prompts": [[1]], "lengths": [1]}, "by itself"),
        ({"prompts": torch.full((1, 2), VOCAB)}, "tokens"),
        ({"state": tiny("mamba").init_state(2)}, "another model"),
    ],
)
def test_bad_arguments_are_named_at_once(bad: dict[str, Any], said: str) -> None:
    arguments = {"prompts": tokens(2, 3), "max_new_tokens": 2} | bad
    with pytest.raises(ArgumentError, match=said) as caught:
        next(generate_stream(tiny("mamba"), **arguments))
    assert "\n" not in str(caught.value)


def test_numbers_that_are_none_are_not_drawn_from() -> None:
    model = tiny("mamba")
    with torch.no_grad():
        model.norm.weight[0] = float("nan")
    with pytest.raises(ArgumentError, match="NaN logits in row 0"):
        generate(model, tokens(2, 3), 2)


def looked_at(rows: Tensor, every: int) -> int:
    """After how many steps the NaN in ``rows`` is found."""
    numbers = Numbers(every)
    with pytest.raises(ArgumentError, match="NaN logits in row 1"):
        _look_through(rows, numbers)
    return numbers.steps


def _look_through(rows: Tensor, numbers: Numbers) -> None:
    for logits in rows:
        numbers.add(logits)
    numbers.look()


@pytest.mark.parametrize(("when", "found"), [(0, 3), (1, 3), (2, 3), (3, 4)])
def test_numbers_are_looked_at_now_and_then_and_at_the_end(
    when: int, found: int
) -> None:
    rows = torch.zeros(4, 2, 5)
    rows[:, 0] = -float("inf")  # no token at all, but numbers
    rows[when, 1, 2] = float("nan")
    assert looked_at(rows, every=3) == found
    assert looked_at(rows, every=1) == when + 1
