"""Language models: one meaning whole, in pieces, step by step and padded."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from ssm._errors import ArgumentError
from ssm.layers.mamba import Mamba
from ssm.models.blocks import Block, BlockStack
from ssm.models.config import SequenceLMConfig
from ssm.models.hybrids import JambaBlock, JambaModel, MambaBlock, StripedHyenaBlock
from ssm.models.lm import SequenceLM
from ssm.models.patterns import NAMED_PATTERNS, Unit
from tests.ssm.helpers import assert_close
from tests.ssm.models.helpers import LETTERS, VOCAB, tiny, tokens

PATTERNS = [*NAMED_PATTERNS, LETTERS]


def gradients(model: SequenceLM, logits: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(logits.shape, generator=generator, dtype=logits.dtype)
    named = dict(model.named_parameters())
    grads = torch.autograd.grad(
        (weight * logits).sum(), list(named.values()), allow_unused=True
    )
    return {n: g for n, g in zip(named, grads, strict=True) if g is not None}


def in_pieces(model: SequenceLM, x: Tensor, cuts: list[int]) -> Tensor:
    state, logits = None, []
    for piece in x.tensor_split(cuts, 1):
        output = model(piece, state)
        logits.append(output.logits)
        state = output.state
    return torch.cat(logits, 1)


def by_steps(model: SequenceLM, x: Tensor) -> Tensor:
    state, logits = model.init_state(len(x)), []
    for x_t in x.unbind(1):
        logits_t, state = model.step(x_t, state)
        logits.append(logits_t)
    return torch.stack(logits, 1)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_whole_pieces_and_steps_agree(pattern: str) -> None:
    model, x = tiny(pattern), tokens(2, 11)
    reference = by_steps(model, x)
    expected = gradients(model, reference)
    for logits in (model(x).logits, in_pieces(model, x, [3, 3, 4])):
        assert_close(logits, reference, name=pattern)
        actual = gradients(model, logits)
        assert actual.keys() == expected.keys()
        for name, gradient in actual.items():
            assert_close(gradient, expected[name], name=name)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_padded_rows_equal_rows_alone(pattern: str) -> None:
    model, x = tiny(pattern), tokens(3, 9)
    lengths = torch.tensor([9, 4, 1])
    alone = [model(x[i : i + 1, :n]) for i, n in enumerate(lengths.tolist())]
    x = x.clone()  # autograd keeps the tokens
    for i, n in enumerate(lengths.tolist()):
        x[i, n:] = -100  # as losses mark what is to be ignored
    output = model(x, lengths=lengths)
    last = model(x, lengths=lengths, last_only=True).logits
    follow = tokens(3, 1, seed=8)
    after = model(follow, output.state).logits
    for i, n in enumerate(lengths.tolist()):
        assert_close(output.logits[i, :n], alone[i].logits[0], name=f"row {i}")
        assert output.logits[i, n:].eq(0).all()
        assert_close(last[i], alone[i].logits[0, -1], name="last_only")
        expected = model(follow[i : i + 1], alone[i].state).logits
        assert_close(after[i : i + 1], expected, name=f"state of row {i}")
    padded = gradients(model, output.logits[1, :4])
    for name, gradient in gradients(model, alone[1].logits[0]).items():
        assert_close(padded[name], gradient, name=name)


def test_a_block_is_its_formula() -> None:
    block = tiny("transformer").blocks[1]
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    h = x + block.mixer(block.norm(x))[0]
    assert_close(block(x).y, h + block.ffn(block.ffn_norm(h)))


def test_the_model_is_its_formula_tied_or_not() -> None:
    x = tokens(2, 5)
    for tied in (True, False):
        model = tiny("mamba", tie_embeddings=tied)
        y = model.embedding(x)
        for block in model.blocks:
            y = block(y).y
        W = model.embedding.weight if tied else model.head.weight
        assert_close(model(x).logits, model.norm(y) @ W.T)
        assert ("head.weight" in model.state_dict()) is not tied


def test_parameters_are_counted_by_hand() -> None:
    D, F = 8, 24
    attention, mlp, norms = 4 * D * D, 3 * D * F, 2 * D
    for tied, heads in ((True, 1), (False, 2)):
        model = tiny("transformer", tie_embeddings=tied)
        expected = heads * VOCAB * D + D + 2 * (attention + mlp + norms)
        assert model.num_parameters() == expected


def test_names_of_parameters_are_those_of_checkpoints() -> None:
    names = tiny("M~", n_layers=1, tie_embeddings=False).state_dict().keys()
    assert {
        "embedding.weight",
        "blocks.0.norm.weight",
        "blocks.0.mixer.A_log",
        "blocks.0.ffn_norm.weight",
        "blocks.0.ffn.key.weight",
        "norm.weight",
        "head.weight",
    } <= names


def test_every_parameter_is_in_one_group() -> None:
    model = tiny("jamba")
    groups = model.param_groups(1e-2, 0.1)
    ids = [id(p) for group in groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    spared = {id(p) for g in groups if not g["weight_decay"] for p in g["params"]}
    for name, parameter in model.named_parameters():
        free = name.endswith((".A_log", ".D", ".bias", "norm.weight"))
        assert (id(parameter) in spared) is free or parameter.ndim == 1, name


def test_the_balance_loss_is_the_mean_over_layers_with_experts() -> None:
    model, x = tiny("jamba"), tokens(2, 6)
    losses = []
    for block in model.blocks:
        block.ffn.register_forward_hook(lambda m, i, out: losses.append(out[1]))
    loss = model(x).auxiliary_loss
    assert len(losses) == 8
    assert_close(loss, torch.stack(losses).mean())
    assert loss.requires_grad
    padded = torch.cat([x, tokens(2, 3)], 1)
    assert_close(model(padded, lengths=torch.tensor([6, 6])).auxiliary_loss, loss)
    assert tiny("transformer")(x).auxiliary_loss == 0


def test_dropout_acts_in_training_only() -> None:
    model, x = tiny("A+M", dropout=0.5), tokens(2, 6)
    plain = tiny("A+M")
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(x).logits, plain(x).logits)
    model.train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dropped = model(x).logits
        torch.manual_seed(0)
        assert torch.equal(model(x).logits, dropped)
    assert not torch.allclose(dropped, plain(x).logits)


@pytest.mark.parametrize("wide", [True, False])
def test_the_residual_stream_is_wide_where_asked(wide: bool) -> None:
    model = tiny("M+", dtype=torch.bfloat16, residual_in_fp32=wide)
    seen: list[torch.dtype] = []
    for block in model.blocks:
        block.register_forward_hook(lambda m, i, out: seen.append(out.y.dtype))
    output = model(tokens(2, 5))
    assert seen == [torch.float32 if wide else torch.bfloat16] * 2
    assert output.logits.dtype == torch.bfloat16
    logits, _ = model.step(tokens(2), output.state)
    assert logits.isfinite().all()


def test_nothing_happens_in_no_steps() -> None:
    model, x = tiny("MA"), tokens(2, 4)
    output = model(x)
    empty = model(x[:, :0], output.state)
    assert empty.logits.shape == (2, 0, VOCAB)
    follow = tokens(2, 2, seed=4)
    assert torch.equal(
        model(follow, empty.state).logits, model(follow, output.state).logits
    )
    rows = model(x, lengths=torch.tensor([0, 4]), last_only=True)
    assert rows.logits[0].eq(0).all()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_made_on_the_meta_device_then_reset(pattern: str) -> None:
    config = tiny(pattern).config
    with torch.device("meta"):
        model = SequenceLM(config)
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    for module in model.modules():
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
    assert model(tokens(1, 3)).logits.isfinite().all()


@pytest.mark.parametrize("pattern", ["jamba", "mamba2", "striped_hyena"])
def test_two_runs_are_bit_equal(pattern: str) -> None:
    x = tokens(2, 13)
    runs = []
    for _ in range(2):
        model = tiny(pattern, dtype=torch.float32)
        logits = model(x).logits
        runs.append({"logits": logits} | gradients(model, logits))
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name


@pytest.mark.parametrize("pattern", ["M+", "A~"])
def test_compiled_whole_numbers_are_the_same(pattern: str) -> None:
    model, x = tiny(pattern, n_layers=1), tokens(2, 6)
    output = model(x)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    again = compiled(x)
    assert_close(again.logits, output.logits)
    expected = gradients(model, output.logits)
    for name, gradient in gradients(model, again.logits).items():
        assert_close(gradient, expected[name], name=name)
    with torch.no_grad():  # Dynamo warns of states that have a history
        state, follow = model(x).state, tokens(2, 3, seed=3)
        later = model(follow, state).logits
        assert_close(compiled(follow, state).logits, later)
    torch.compiler.reset()


def test_the_chapters_names() -> None:
    assert MambaBlock is Mamba
    torch.manual_seed(0)
    assert JambaBlock(8).unit == Unit("mamba", "moe")
    assert JambaBlock(8, use_attention=True).unit == Unit("attention", "moe")
    assert StripedHyenaBlock(8, 4).unit == Unit("hyena", "mlp")
    assert StripedHyenaBlock(8, 3).unit == Unit("attention", "mlp")
    model = JambaModel(8, num_layers=9, moe_every=2, dtype=torch.float64)
    attends = [block.unit.mixer == "attention" for block in model.layers]
    assert attends == [i % 8 == 7 for i in range(9)]
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    y, state, loss = model(x)
    assert loss > 0
    cache, steps = model.init_state(2), []
    for x_t in x.unbind(1):
        y_t, cache = model.step(x_t, cache)
        steps.append(y_t)
    assert_close(torch.stack(steps, 1), y)
    assert_close(model(x[:, :2], state).y, model(x[:, :2], cache).y)


def test_blocks_of_ones_own_make_a_stack() -> None:
    torch.manual_seed(0)
    stack = BlockStack([Block(6, Unit("gru")), JambaBlock(6, feed_forward="mlp")])
    y, state, loss = stack.run(torch.randn(2, 3, 6))
    assert y.shape == (2, 3, 6)
    assert loss is None
    assert len(state.states) == 2


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"tokens": torch.zeros(2, 3)}, "torch.float32"),
        ({"tokens": torch.zeros(2, dtype=torch.int64)}, r"shape \(2,\)"),
        ({"tokens": torch.zeros(2, 3, dtype=torch.bool)}, "torch.bool"),
        ({"tokens": torch.full((2, 3), VOCAB)}, f"within 0 and {VOCAB - 1}"),
        ({"tokens": torch.full((2, 3), -1)}, "values from -1"),
        ({"tokens": torch.zeros(2, 3, dtype=torch.int64, device="meta")}, "on meta"),
        ({"lengths": torch.tensor([1, 4])}, "lengths"),
        ({"lengths": torch.tensor([1])}, "lengths"),
        ({"state": []}, "a MambaCache"),
        ({"tokens": torch.zeros(2, 0, dtype=torch.int64), "last_only": True}, "step"),
    ],
)
def test_bad_input_is_named(bad: dict[str, Any], said: str) -> None:
    model = tiny("mamba")
    with pytest.raises(ArgumentError, match=said) as caught:
        model(**({"tokens": tokens(2, 3)} | bad))
    assert "\n" not in str(caught.value)


def test_steps_leave_the_parameters_as_they_were() -> None:
    model = tiny("jamba")
    before = copy.deepcopy(model.state_dict())
    model.step(tokens(2), model.init_state(2))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_training_lowers_the_loss() -> None:
    torch.manual_seed(0)
    config = SequenceLMConfig(VOCAB, 16, 1, "M+")
    model, x = SequenceLM(config), tokens(4, 17)
    optimiser = torch.optim.AdamW(model.param_groups(1e-2, 0.1))
    losses = []
    for _ in range(30):
        logits = model(x[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.mT, x[:, 1:])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert abs(losses[0] - torch.tensor(float(VOCAB)).log().item()) < 0.2
    assert losses[-1] < losses[0] / 2
