"""benchmark_generation: caches by formula, steps that change nothing, what is told."""

import json
from dataclasses import replace

import pytest
import torch

from experiments.common import InputError
from scaling_experiments import _generation_report as report
from scaling_experiments import _timing
from scaling_experiments import benchmark_generation as generation
from scaling_experiments._report import print_all

CPU = torch.device("cpu")
SMALL = generation.GenerationOptions(
    contexts=(5, 64, 67),
    batches=(1, 3),
    train_lengths=(8, 13),
    d_model=24,
    n_layers=1,
    seconds_per_point=1e-3,
    memory_gb=1.0,
)


@pytest.fixture(scope="module")
def result():
    with pytest.MonkeyPatch.context() as patch:  # nothing is slow: machines differ
        patch.setattr(_timing, "SLOW", 1e9)
        return generation.run(SMALL)


def test_models_have_about_equally_many_parameters():
    models = generation.make_models(generation.GenerationOptions())
    mamba, transformer = (model.num_parameters() for model in models.values())
    assert 0.8 < transformer / mamba < 1.25


@pytest.mark.parametrize(("context", "batch"), [(1, 1), (63, 2), (64, 1), (131, 3)])
def test_cache_bytes_are_what_the_caches_hold(context, batch):
    models = generation.make_models(replace(SMALL, d_model=26, n_layers=3))
    tokens = torch.zeros(batch, context, dtype=torch.int64)
    for model in models.values():
        with torch.no_grad():
            cache = model(tokens, last_only=True).state
        assert generation.cache_bytes(model, context, batch) == cache.bytes


def test_the_formula_in_numbers():
    models = generation.make_models(generation.GenerationOptions())
    mamba, transformer = models.values()
    # 4 blocks of 256 channels: 3 inputs and 16 states; 2 layers of width 128
    assert generation.cache_bytes(mamba, 10**6, 1) == 4 * 4 * 256 * (3 + 16)
    assert generation.cache_bytes(transformer, 1000, 8) == 8 * 2 * (2000 * 128 * 4 + 8)


def test_steps_start_from_the_prefills_cache_and_leave_it_as_it_was():
    options = replace(SMALL, seconds_per_point=1.0, contexts=(1, 64, 67))
    race = generation.Race(generation.make_models(options), CPU, options)
    race.budget = _timing.Budget(1e-3)
    race.prefill(lambda _: None)
    for (name, context), cache in race.caches.items():
        model = race.models[name]
        tokens = torch.cat([race._tokens(context), torch.zeros(1, 1).long()], 1)
        call = race._step_call(name, cache.select([0, 0]))
        first, second = call(), call()
        with torch.no_grad():
            expected = model(tokens, last_only=True).logits
        torch.testing.assert_close(first[0], second[0])
        for row in first[0]:
            torch.testing.assert_close(row[None], expected, atol=1e-4, rtol=1e-4)
        assert first[1].bytes == second[1].bytes


def test_a_training_call_gives_the_gradients_of_the_next_tokens_loss():
    model = generation.make_models(SMALL)["transformer"]
    tokens = torch.randint(256, (1, 12), generator=torch.Generator().manual_seed(0))
    found = generation.training_call(model, tokens)()
    logits = model(tokens[:, :-1]).logits[0].log_softmax(-1)
    loss = -logits[torch.arange(11), tokens[0, 1:]].mean()
    expected = torch.autograd.grad(loss, list(model.parameters()))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)


def test_caches_are_judged_and_can_fail(result):
    assert result.passed, generation.problems(result.metadata)
    growing = json.loads(json.dumps(result.metadata))
    curve = report.curve_of(growing["curves"], "mamba", 3)
    curve["points"][2]["bytes"] += 4
    lines = generation.problems(growing)
    assert len(lines) == 2
    assert "context 67, batch 3" in lines[0]


def test_curves_have_slopes_of_the_caches_formula(result):
    curves = result.metadata["curves"]
    assert [(c["model"], c["batch"]) for c in curves] == [
        ("mamba", 1),
        ("mamba", 3),
        ("transformer", 1),
        ("transformer", 3),
    ]
    slopes = [curve["slope_bytes"]["slope"] for curve in curves]
    per_token = 2 * 24 * 4
    assert slopes == pytest.approx([0, 0, per_token, 3 * per_token])
    assert [curve["points"][0]["context"] for curve in curves] == [5] * 4


def test_a_context_past_memory_is_skipped_with_a_line_and_the_run_goes_on(
    capsys, monkeypatch
):
    monkeypatch.setattr(_timing, "SLOW", 1e9)
    options = replace(SMALL, contexts=(8, 4000), memory_gb=0.012)
    result = generation.run(options)
    skipped = {(entry["what"], entry["at"]) for entry in result.metadata["skipped"]}
    assert ("prefill of transformer", 4000) in skipped
    assert not any(at == 8 for _, at in skipped)
    curve = report.curve_of(result.metadata["curves"], "transformer", 1)
    assert [point["context"] for point in curve["points"]] == [8]
    print_all(generation.tables(result.metadata))
    assert "skipped: prefill of transformer at 4000 (needs" in capsys.readouterr().err
    assert result.passed


def test_a_training_that_takes_too_long_is_skipped_with_a_line():
    options = replace(
        SMALL, train_lengths=(8, 10**6), seconds_per_point=1e-4, memory_gb=1e3
    )
    skipped = generation.run(options).metadata["skipped"]
    why = {e["what"]: e["why"] for e in skipped if e["at"] == 10**6}
    assert set(why) == {"training of mamba", "training of transformer"}
    assert all("raise --seconds-per-point" in line for line in why.values())


def points(law, contexts, batch=1):
    return [
        {
            "context": context,
            "batch": batch,
            "repeats_s": [law(context)] * 5,
            **dict.fromkeys(("cold_s", "median_s", "low_s", "high_s"), law(context)),
            "n": 5,
            "bytes": 8,
            "formula_bytes": 8,
        }
        for context in contexts
    ]


def test_slopes_and_crossovers_are_recovered():
    contexts = (1024, 2048, 4096, 8192)
    options = replace(SMALL, contexts=contexts, batches=(1,))
    flat = points(lambda _: 3e-3, contexts)
    rising = points(lambda c: 1e-3 + 1e-6 * c, contexts)
    steps = [{"model": "mamba", **p} for p in flat]
    steps += [{"model": "transformer", **p} for p in rising]
    made = generation.summarise(steps, options)
    mamba, transformer = (curve["slope_s"]["slope"] for curve in made["curves"])
    assert (mamba, transformer) == (0, pytest.approx(1e-6))
    (crossing,) = made["crossovers"]
    # equal at 2000; between two contexts a straight line in log-log is drawn
    assert crossing["at"] == pytest.approx(2000, rel=0.02)
    assert report.crossover_line(crossing).startswith("batch 1: mamba is faster from")


def test_documents_table_is_in_units_of_the_transformer_at_1k(result, capsys):
    contexts = (1024, 8192)
    steps = [{"model": "mamba", **p} for p in points(lambda _: 3e-3, contexts)]
    rising = points(lambda c: 2e-3 * (1 + (c > 1024)), contexts)
    steps += [{"model": "transformer", **p} for p in rising]
    options = replace(SMALL, contexts=contexts, batches=(1,))
    metadata = result.metadata | generation.summarise(steps, options)
    metadata |= {"batches": [1], "contexts": list(contexts)}
    print_all(generation.tables(metadata))
    lines = capsys.readouterr().err.splitlines()
    (row,) = [line for line in lines if "inference at 8K" in line]
    assert [cell.strip() for cell in row.strip("│ ").split("│")] == [
        "inference at 8K",
        "1.0x",
        "2.5x (KV cache)",
        "1.50",
        "2.00",
    ]
    assert any("gives no unit" in line for line in lines)


def test_the_picture_has_a_line_for_every_model_and_batch(result):
    figure = generation.PICTURES[0].render([result])
    times, sizes, training = figure.axes
    names = [text.get_text() for text in times.get_legend().get_texts()]
    assert names[:2] == ["mamba, batch 1", "mamba, batch 3"]
    heights = {line.get_label(): line.get_ydata() for line in sizes.get_lines()}
    assert len(set(heights["mamba, batch 1"])) == 1
    low, _, high = heights["transformer, batch 1"]
    assert low < high
    assert len(training.get_legend().get_texts()) == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"contexts": (2, 1)}, "contexts"),
        ({"batches": (0,)}, "batches"),
        ({"train_lengths": ()}, "train-lengths"),
        ({"d_model": 0}, "d-model"),
        ({"n_layers": 0}, "n-layers"),
        ({"threads": 0}, "threads"),
        ({"seconds_per_point": -1.0}, "seconds-per-point"),
        ({"memory_gb": float("inf")}, "memory-gb"),
    ],
)
def test_bad_options_are_one_line(change, said):
    with pytest.raises(InputError, match=f"^{said}: got"):
        generation.run(replace(SMALL, **change))


def test_the_command_prints_one_line_and_its_tables_beside_it(capsys, tmp_path):
    picture = tmp_path / "generation.png"
    words = ["--contexts", "8", "16", "--train-lengths", "8", "--d-model", "16"]
    words += ["--n-layers", "1", "--seconds-per-point", "0.001"]
    assert generation.main([*words, "--plot-path", str(picture)]) == 0
    told = capsys.readouterr()
    assert told.out.startswith("[PASS] benchmark_generation: mamba, batch 1:")
    assert picture.stat().st_size > 10_000
    assert "document 4's table" in told.err
