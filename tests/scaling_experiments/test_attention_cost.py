"""attention_cost: formulas against counting numbers, loops and the allocator."""

import json
import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from experiments.common import InputError, command_line
from scaling_experiments import attention_cost as cost

SMALL = {"d_model": 24, "n_heads": 3, "d_state": 5, "block": 16}
LENGTHS = (1, 63, 64, 65, 131)
SIZES = cost.Sizes(24, 3, 5)


@pytest.fixture(scope="module")
def result():
    return cost.run(lengths=LENGTHS, **SMALL)


class Number:
    """A float that counts what is done with it."""

    count = 0

    def __init__(self, value):
        self.value = value

    def _with(self, value):
        Number.count += 1
        return Number(value)

    def __add__(self, other):
        return self._with(self.value + other.value)

    def __sub__(self, other):
        return self._with(self.value - other.value)

    def __mul__(self, other):
        return self._with(self.value * other.value)

    def __truediv__(self, other):
        return self._with(self.value / other.value)

    def exp(self):
        return self._with(math.exp(self.value))

    def largest(self, other):
        return self._with(max(self.value, other.value))


def numbers(*shape):
    if not shape:
        return Number(torch.rand(()).item())
    return [numbers(*shape[1:]) for _ in range(shape[0])]


def dot(a, b):
    total = Number(0.0)
    for x, y in zip(a, b, strict=True):
        total = total + x * y
    return total


def product(X, Y):
    """X Y^T of nested lists."""
    return [[dot(x, y) for y in Y] for x in X]


def counted(function, *operands):
    Number.count = 0
    function(*operands)
    return Number.count


def softmax(row, scale):
    row = [s * scale for s in row]
    top, total = Number(-math.inf), Number(0.0)
    for s in row:
        top = top.largest(s)
    row = [(s - top).exp() for s in row]
    for s in row:
        total = total + s
    return [s / total for s in row]


def test_a_causal_layer_takes_what_counting_numbers_count():
    n, H, P = 5, 2, 3
    sizes = cost.Sizes(H * P, H, 4)
    formulas = cost.attention_layer(n, sizes)
    parts = {"products": 0, "softmax": 0}
    for t in range(n):
        q, k, v = numbers(1, P), numbers(t + 1, P), numbers(P, t + 1)
        weights = numbers(1, t + 1)
        for _ in range(H):
            parts["products"] += counted(product, q, k) + counted(product, weights, v)
            parts["softmax"] += counted(softmax, weights[0], Number(0.5))
    one = counted(product, numbers(n, H * P), numbers(H * P, H * P))
    parts["projections"] = 4 * one
    assert parts == {name: formulas[name] for name in parts}
    assert formulas["layer"] == sum(parts.values())


def test_a_mamba_block_takes_what_counting_numbers_count():
    n, d, N = 3, 4, 2
    sizes = cost.Sizes(d, 1, N)
    E, R, W = 2 * d, 1, 4
    formulas = cost.mamba_layer(n, sizes)
    for inputs, outputs in ((d, 2 * E), (E, R + 2 * N), (R, E), (E, d)):
        x, weight = numbers(n, inputs), numbers(outputs, inputs)
        formulas["projections"] -= counted(product, x, weight)
    assert formulas["projections"] == 0
    assert formulas["convolution"] == n * E * counted(dot, numbers(W), numbers(W))

    def step(h, u, delta, bias, A, B, C, D):
        delta = delta + bias
        gain = delta * u
        h = [(delta * a).exp() * s + gain * b for s, a, b in zip(h, A, B, strict=True)]
        return dot(C, h) + D * u

    h, A, B, C = numbers(4, N)
    u, delta, bias, D = numbers(4)
    one = counted(step, h, u, delta, bias, A, B, C, D)
    assert formulas["scan"] == n * E * one


@pytest.mark.parametrize("n", [1, 2, 7, 12, 13])
@pytest.mark.parametrize("block", [1, 4, 7, 20])
def test_entries_are_those_of_the_blocks(n, block):
    ends = [min(n, (t // block + 1) * block) for t in range(n)]
    assert cost.entries(n, block) == sum(ends)
    starts = [t // block * block for t in range(n)]
    masked = sum(end - start for end, start in zip(ends, starts, strict=True))
    assert cost.masked_entries(n, block) == masked
    assert cost.entries(n, 1) == n * (n + 1) // 2
    assert cost.entries(n, n) == n**2


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("block", [1, 16, 64, 131])
def test_attention_is_the_masked_softmax(n, block):
    generator = torch.Generator().manual_seed(n)
    q, k, v = torch.randn(3, 2, 3, n, 5, dtype=torch.float64, generator=generator)
    scores = (q @ k.mT) / 5**0.5
    hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
    expected = scores.masked_fill(hidden, -math.inf).softmax(-1) @ v
    torch.testing.assert_close(cost.attention(q, k, v, block), expected)


def test_counts_and_bytes_equal_the_formulas_at_awkward_lengths(result):
    assert result.passed, cost.problems(result.metadata)
    assert "n = 1, 63, 64, 65, 131" in result.details
    for row in result.metadata["rows"]:
        assert row["measured"]["products"] == 4 * row["n"] ** 2 * 24


def test_the_chapters_table_is_its_two_formulas_in_binary_units():
    rows = [cost.row_of(n, cost.Sizes(1024, 16, 16)) for n in cost.SOURCE]
    assert len(rows) == 5
    for row in rows:
        assert row["source"]["bytes"] == row["bytes"]["one_head"]
        assert row["source"]["operations"] == row["one_product"]
        n, causal = row["n"], row["attention"]["products"]
        assert causal - row["one_product"] == 2 * n * 1024  # 2 n (n+1) d
        assert row["products"] == 2 * row["one_product"]
    assert rows[3]["one_product"] == 8796093022208  # "8 trillion", 8.8e12


def test_the_million_of_the_chapter_is_entries():
    row = cost.row_of(10**6, cost.Sizes(1024, 16, 16))
    assert row["one_product"] == 2048 * 10**12
    assert row["bytes"]["one_head"] == 4 * 10**12


def test_peak_bytes_is_what_is_held_at_once():
    def call():
        a = torch.zeros(1000)
        b = torch.zeros(500)
        del a
        return b, torch.zeros(700)

    assert cost.peak_bytes(call) == 4 * 1500
    assert cost.peak_bytes(lambda: None) == 0


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")  # SDPA has a workspace for each thread
def test_sdpa_stores_no_n_by_n_matrix():
    held = {}
    for n in (1024, 2048, 4096):
        q = torch.randn(1, 2, n, 8, generator=torch.Generator().manual_seed(n))
        held[n] = [
            cost.peak_bytes(lambda q=q: sdpa(q, q, q, is_causal=True)),
            cost.peak_bytes(lambda q=q: cost.attention(q, q, q, 16)),
        ]
        formula = cost.bytes_of(n, cost.Sizes(16, 2, 1))
        assert formula["fused"] <= held[n][0] < formula["fused"] + 2**20
    assert all(
        long < 2.1 * short for short, long in zip(held[2048], held[4096], strict=True)
    )
    assert max(held[4096]) < formula["one_head"] / 20


def test_elementwise_work_is_counted_on_results_and_on_the_input_of_sums():
    x = torch.rand(3, 4)
    assert cost.elementwise(lambda: (x * x[:1]).sum(0).exp()) == 12 + 12 + 4
    assert cost.elementwise(lambda: x.mT.clone()) == 0


@pytest.mark.parametrize("d", [24, 96, 1024])
def test_the_crossover_is_the_first_length_at_which_attention_costs_more(d):
    sizes = cost.Sizes(d, 3 if d < 1024 else 16, 5)
    n = cost.crossover(sizes)
    costs = [
        (cost.attention_layer(m, sizes)["layer"], cost.mamba_layer(m, sizes)["layer"])
        for m in (n - 1, n)
    ]
    assert costs[0][0] <= costs[0][1]
    assert costs[1][0] > costs[1][1]


def test_what_does_not_fit_is_computed_and_said_so():
    result = cost.run(lengths=(8, 65536), **SMALL, memory_gib=0.001)
    measured = [row["measured"] is not None for row in result.metadata["rows"]]
    assert measured == [True, False]
    assert "computed only, scores beyond 0.001 GiB: 65536" in result.details
    nothing = cost.run(lengths=(8,), **SMALL, memory_gib=0.0)
    assert "nothing was measured" in nothing.details
    assert cost.PICTURES[0].render([nothing]).axes


@pytest.mark.parametrize(
    "name", ["products", "blocked_elementwise", "scan", "materialised_bytes"]
)
def test_a_forged_record_is_found(result, name):
    forged = json.loads(json.dumps(result.metadata))
    assert cost.problems(forged) == []
    forged["rows"][2]["measured"][name] += 1
    assert len(cost.problems(forged)) == 1
    assert f"{name} at n = 64" in cost.problems(forged)[0]


def test_another_table_would_be_found(monkeypatch):
    monkeypatch.setitem(cost.SOURCE, 64, ("4 MB", "2 billion"))
    result = cost.run(lengths=(64,), **SMALL)
    assert result.passed is False
    assert "the chapter's row" in result.details


def test_a_wrong_form_fails(monkeypatch):
    right = cost.attention
    monkeypatch.setattr(
        cost, "attention", lambda q, k, v, block: right(q, k, v, block) * 1.0
    )
    assert cost.run(lengths=(63,), **SMALL).passed is False


def test_the_command_prints_both_tables_and_draws(tmp_path, capsys):
    path = tmp_path / "cost.png"
    flags = "--lengths 16 1024 --d-model 24 --n-heads 3 --memory-gib 0.001 --json"
    status = cost.main([*flags.split(), "--plot-path", str(path)])
    printed = capsys.readouterr()
    assert status == 0
    assert json.loads(printed.out)["meta"]["rows"][0]["n"] == 16
    assert "operations of one layer" in printed.err
    assert "2 billion" in printed.err
    assert "4 MiB" in printed.err
    assert path.read_bytes().startswith(b"\x89PNG")


def test_sizes_are_written_as_people_write_them():
    assert [cost.length_text(n) for n in (1000, 1024, 2**20, 65536)] == [
        *("1000", "1K", "1M", "64K")
    ]
    assert cost.byte_text(64 * 2**20) == "64 MiB"
    assert cost.byte_text(1000) == "0.977 KiB"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lengths": ()}, "lengths: got"),
        ({"lengths": (4, 2)}, "lengths: got"),
        ({"lengths": (2**25,)}, "lengths: got 33554432"),
        ({"n_heads": 5}, "n_heads: got 5; expected a divisor of d_model = 1024; try 4"),
        ({"n_heads": 4096}, "n_heads: got 4096"),
        ({"d_model": 0}, "d_model: got 0"),
        ({"d_state": 0}, "d_state: got 0"),
        ({"block": 0}, "block: got 0"),
        ({"memory_gib": -1.0}, "memory_gib: got -1.0"),
        ({"memory_gib": math.nan}, "memory_gib: got nan"),
        ({"seed": -1}, "seed: got -1"),
    ],
)
def test_bad_input_is_named(options, words):
    with pytest.raises(InputError, match=words):
        cost.run(**options)


def test_bad_input_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        command_line(cost.run, argv=["--n-heads", "5"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
