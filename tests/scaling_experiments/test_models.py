"""Document 3's models: all forms against the loop, the transformer against torch's."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from scaling_experiments.models import (
    FORMS,
    MambaModel,
    SelectiveSSM,
    SelectiveState,
    SmallTransformer,
    TokenModel,
    naive_selective_loop,
)
from ssm._errors import ArgumentError
from tests.ssm.helpers import assert_close, error

LENGTHS = (1, 2, 37, 63, 64, 65)
EQUAL = 1e-5  # the issue's, for float32 at document 3's sizes


def layer_of(form: str = "scan", seed: int = 3) -> SelectiveSSM:
    """Small, in float64, with biases and decays of no symmetry."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SelectiveSSM(5, 7, form=form, dtype=torch.float64)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def by_definition(layer: SelectiveSSM, x: Tensor, h: Tensor) -> np.ndarray:
    """h_t = exp(delta A) h_{t-1} + delta B_t, in NumPy, from the parameters alone."""
    weights = {name: p.detach().numpy() for name, p in layer.named_parameters()}
    A, state, found = -np.exp(weights["A_log"]), h.numpy(), []
    for x_t in x.numpy().transpose(1, 0, 2):
        B_t = x_t @ weights["linear_B.weight"].T + weights["linear_B.bias"]
        raw = x_t @ weights["linear_delta.weight"].T + weights["linear_delta.bias"]
        delta = np.log1p(np.exp(raw))
        state = np.exp(delta * A) * state + delta * B_t
        found.append(state)
    return np.stack(found, 1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("L", LENGTHS)
def test_every_form_is_the_definition(form: str, L: int) -> None:
    layer, x, h = layer_of(form), numbers(2, L, 5), numbers(2, 7, seed=1)
    y, final = layer(x, SelectiveState(h))
    expected = torch.from_numpy(by_definition(layer, x, h))
    assert_close(y, expected, name="y")
    assert_close(final.h, expected[:, -1], name="final state")


def gradients(form: str, L: int) -> dict[str, Tensor]:
    layer = layer_of(form)
    x, h = numbers(2, L, 5).requires_grad_(), numbers(2, 7, seed=1).requires_grad_()
    y, final = layer(x, SelectiveState(h))
    loss = (y * numbers(*y.shape, seed=2)).sum() + (final.h * numbers(2, 7)).sum()
    inputs = {"x": x, "h": h, **dict(layer.named_parameters())}
    found = torch.autograd.grad(loss, list(inputs.values()))
    return dict(zip(inputs, found, strict=True))


@pytest.mark.parametrize("form", [form for form in FORMS if form != "loop"])
@pytest.mark.parametrize("L", LENGTHS)
def test_every_form_has_the_gradients_of_the_loop(form: str, L: int) -> None:
    expected = gradients("loop", L)
    for name, found in gradients(form, L).items():
        assert_close(found, expected[name], name=name)


@pytest.mark.parametrize("form", FORMS)
def test_pieces_and_steps_are_the_whole(form: str) -> None:
    layer, x = layer_of(form), numbers(3, 11, 5)
    whole, last = layer(x)
    state = layer.init_state(3)
    pieces = []
    for piece in x.split([4, 0, 7], 1):
        y, state = layer(piece, state)
        pieces.append(y)
    assert_close(torch.cat(pieces, 1), whole, name="pieces")
    assert_close(state.h, last.h, name="state after the pieces")
    state = layer.init_state(3)
    for t, x_t in enumerate(x.unbind(1)):
        y_t, state = layer.step(x_t, state)
        assert_close(y_t, whole[:, t], name=f"step {t}")


def test_the_kernel_matrix_applied_is_the_layer() -> None:
    layer, x = layer_of(), numbers(2, 13, 5)
    matrix, values = layer.kernel_matrix(x)
    assert torch.equal(matrix, matrix.tril())
    mixed = torch.einsum("bnts,bsnp->btn", matrix, values)
    assert_close(mixed, layer(x)[0])


def test_constant_input_sums_a_geometric_series() -> None:
    """h_t = delta B (1 - a^t) / (1 - a) with a = exp(delta A)."""
    layer, L = layer_of(), 65
    x = numbers(1, 1, 5)
    h = layer(x.expand(1, L, 5))[1].h
    delta = nn.functional.softplus(layer.linear_delta(x[:, 0]))
    a = torch.exp(delta * layer.A)
    series = delta * layer.linear_B(x[:, 0]) * (1 - a**L) / (1 - a)
    assert_close(h, series)


@pytest.mark.parametrize("form", ["scan", "chunked"])
def test_at_document_3s_sizes_the_scan_equals_its_loop(form: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = SelectiveSSM(form=form)
    x = numbers(1, 1024, 64).float()
    with torch.no_grad():
        expected, last = naive_selective_loop(layer, x)
        y, state = layer(x)
    assert expected.shape == (1, 1024, 128)
    assert error(y, expected) < EQUAL
    assert error(state.h, last) < EQUAL


def test_the_first_decays_fall_in_equal_ratios() -> None:
    A = SelectiveSSM(3, 9, dtype=torch.float64).A
    assert A[0].item() == pytest.approx(-1)
    assert A[-1].item() == pytest.approx(-1 / 16)
    ratios = A[1:] / A[:-1]
    assert_close(ratios, torch.full_like(ratios, math.exp(-math.log(16) / 8)))


def test_decays_stay_wide_in_16_bits() -> None:
    layer = SelectiveSSM(6, 9, dtype=torch.bfloat16)
    assert layer.A_log.dtype == layer.init_state(1).h.dtype == torch.float32
    x = numbers(2, 65, 6).bfloat16()
    y, state = layer(x)
    assert (y.dtype, state.h.dtype) == (torch.bfloat16, torch.float32)
    wide = SelectiveSSM(6, 9, dtype=torch.float64)
    wide.load_state_dict(layer.state_dict())
    assert_close(y.double(), wide(x.double())[0], dtype=torch.bfloat16)


# --- whole models ---------------------------------------------------------------------

V, D, F = 50_257, 128, 512
SMALL: dict[str, Callable[[], TokenModel]] = {
    "MambaModel": lambda: MambaModel(31, 6, 10, dtype=torch.float64),
    "learned": lambda: SmallTransformer(31, 12, 2, dtype=torch.float64),
    "rotary": lambda: SmallTransformer(
        31, 12, 2, positions="rotary", dtype=torch.float64
    ),
}


def small(name: str) -> TokenModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return SMALL[name]()


def tokens_of(batch: int, L: int) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.randint(31, (batch, L), generator=generator)


def test_parameter_counts_are_document_3s() -> None:
    mamba = V * 64 + 2 * (64 * 128 + 128) + 128 + 128 * V + V
    block = 4 * D * D + (D * F + F) + (F * D + D) + 4 * D
    transformer = V * D + 8192 * D + 2 * block + D * V + V
    assert MambaModel(device="meta").num_parameters() == mamba == 9_716_369
    assert SmallTransformer(device="meta").num_parameters() == transformer == 14_360_145
    rotary = SmallTransformer(positions="rotary", device="meta")
    assert rotary.num_parameters() == transformer - 8192 * D


@pytest.mark.parametrize("name", SMALL)
def test_logits_of_pieces_and_steps_are_those_of_the_whole(name: str) -> None:
    model, tokens = small(name), tokens_of(2, 9)
    whole, _ = model(tokens)
    state, found = model.init_state(2), []
    for piece in tokens[:, :6].split([1, 2, 3], 1):
        logits, state = model(piece, state)
        found.append(logits)
    for token in tokens[:, 6:].unbind(1):
        logits, state = model.step(token, state)
        found.append(logits[:, None])
    assert_close(torch.cat(found, 1), whole)


@pytest.mark.parametrize("name", SMALL)
def test_the_parts_are_the_model_and_the_future_is_unseen(name: str) -> None:
    model, tokens = small(name), tokens_of(2, 9)
    logits, _ = model(tokens)
    assert_close(model.head(model.mix(model.embed(tokens))[0]), logits, name="parts")
    changed = tokens.clone()
    changed[:, 5] = (tokens[:, 5] + 1) % 31
    other, _ = model(changed)
    assert torch.equal(other[:, :5], logits[:, :5])
    assert bool((other[:, 5:] != logits[:, 5:]).any(-1).all())


def pytorchs_encoder(model: SmallTransformer) -> nn.TransformerEncoder:
    """PyTorch's own, with the weights of ``model``."""
    layer = nn.TransformerEncoderLayer(
        12, 2, 48, dropout=0.0, batch_first=True, dtype=torch.float64
    )
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    for theirs, ours in zip(encoder.layers, model.blocks, strict=True):
        weights = dict(ours.named_parameters())
        projections = [weights[f"attention.{x}_proj.weight"].data for x in "qkv"]
        copied = {
            "self_attn.in_proj_weight": torch.cat(projections),
            "self_attn.in_proj_bias": torch.zeros(36, dtype=torch.float64),
            "self_attn.out_proj.weight": weights["attention.out_proj.weight"],
            "self_attn.out_proj.bias": torch.zeros(12, dtype=torch.float64),
        }
        rest = {k: p for k, p in weights.items() if not k.startswith("attention.")}
        theirs.load_state_dict(copied | rest)
    return encoder


def test_the_transformer_is_pytorchs() -> None:
    model, tokens = small("learned"), tokens_of(2, 37)
    assert isinstance(model, SmallTransformer)
    encoder = pytorchs_encoder(model)
    table = dict(model.positions.named_parameters())["table"]
    x = (model.embedding.weight[tokens] + table[:37]).detach().requires_grad_()
    mask = nn.Transformer.generate_square_subsequent_mask(37, dtype=torch.float64)
    theirs = encoder(x, mask=mask, is_causal=True)
    ours, _ = model.mix(x)
    assert_close(ours, theirs)
    weight = numbers(*ours.shape)
    pair = [torch.autograd.grad((y * weight).sum(), x)[0] for y in (ours, theirs)]
    assert_close(*pair, name="gradient")
    assert_close(model.hidden(tokens)[0], theirs, name="from tokens")


def test_learned_positions_end_and_rotary_ones_do_not() -> None:
    model = SmallTransformer(31, 12, 2, max_positions=8)
    tokens = tokens_of(1, 9)
    _, state = model(tokens[:, :8])
    for call in (lambda: model(tokens), lambda: model.step(tokens[:, 8], state)):
        with pytest.raises(ArgumentError, match=r"position 8; expected .* 8"):
            call()
    rotary = SmallTransformer(31, 12, 2, positions="rotary", max_positions=8)
    assert bool(torch.isfinite(rotary(tokens)[0]).all())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: SelectiveSSM(form="convolution"), "form: got 'convolution'"),
        (lambda: SelectiveSSM(0), "d_model: got 0"),
        (lambda: SmallTransformer(9, positions="none"), "positions: got 'none'"),
        (lambda: MambaModel(0), "vocab_size: got 0"),
        (lambda: SmallTransformer(9, n_layers=0), "n_layers: got 0"),
        (lambda: layer_of()(numbers(2, 4, 6)), "x: got shape"),
        (lambda: layer_of().step(numbers(2, 6), layer_of().init_state(2)), "x_t: got"),
        (lambda: layer_of()(numbers(2, 4, 5), layer_of().init_state(3)), "state: got"),
    ],
)
def test_bad_arguments_are_named(make: Callable[[], object], said: str) -> None:
    with pytest.raises(ArgumentError, match=said) as stop:
        make()
    assert len(str(stop.value).splitlines()) == 1
