"""Sequence models against loops over time in float64, and what theory says of them."""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from experiments.common import InputError
from lcde import torch_sequence_models
from lcde._sequence_layers import Convolved
from lcde.torch_sequence_models import (
    MODELS,
    Embedding,
    MambaRecurrence,
    S4Recurrence,
    SequenceModel,
    SequenceModelConfig,
    SinusoidalPositionalEncoding,
    TransformerLayer,
    build,
)
from ssm.ops.selective_scan import selective_scan

DOUBLE = torch.float64
TOLERANCE = {torch.float64: (1e-10, 1e-9), torch.float32: (2e-5, 2e-5)}
LENGTHS = (1, 2, 13)
TILES = (63, 64, 65)  # shorter ones attend in another way


def draws(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def signal(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(*shape, generator=draws(seed), dtype=dtype)


def moved(layer: nn.Module, seed: int = 1) -> nn.Module:
    """``layer`` with every parameter some way off its first value, which may be 1."""
    generator = draws(seed)
    with torch.no_grad():
        for p in layer.parameters():
            p += 0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return layer


def assert_close(actual: Tensor, expected: Tensor, name: str = "") -> None:
    atol, rtol = TOLERANCE[actual.dtype]
    actual, expected = actual.detach(), expected.detach().to(actual.dtype)
    scale = float(expected.abs().max()) or 1.0
    worst = (actual - expected).abs().max() if actual.numel() else torch.zeros(())
    assert float(worst) <= atol + rtol * scale, (name, float(worst), scale)


def softplus(x: Tensor) -> Tensor:
    return torch.log1p(x.exp())


# --- S4Recurrence and MambaRecurrence against loops -----------------------------------

Loop = Callable[[dict[str, Tensor], Tensor], Tensor]


def s4_loop(p: dict[str, Tensor], x: Tensor) -> Tensor:
    """The published layer, step after step: delta is softplus(exp(log_dt))."""
    delta = softplus(p["log_dt"].exp())[:, None]
    A = -p["log_A_real"].exp() + 1j * p["A_imag"]
    B, C = (p[name][..., 0] + 1j * p[name][..., 1] for name in "BC")
    h, steps = torch.zeros(len(x), *A.shape, dtype=torch.complex128), []
    for x_t in x.unbind(1):
        h = torch.exp(delta * A) * h + delta * B * x_t[..., None]
        steps.append(2 * (C * h).sum(-1).real + p["D"] * x_t)
    return torch.stack(steps, 1)


def mamba_loop(p: dict[str, Tensor], x: Tensor) -> Tensor:
    """S6: delta, B and C of every step are projections of its input."""
    N, rank = p["A_log"].shape[1], p["dt_proj.weight"].shape[1]
    h, steps = torch.zeros(len(x), *p["A_log"].shape, dtype=DOUBLE), []
    for x_t in x.unbind(1):
        low, B, C = (x_t @ p["x_proj.weight"].T).split([rank, N, N], -1)
        delta = softplus(low @ p["dt_proj.weight"].T + p["dt_proj.bias"])[..., None]
        kept = torch.exp(-delta * p["A_log"].exp()) * h
        h = kept + delta * B[:, None] * x_t[..., None]
        steps.append((h * C[:, None]).sum(-1) + p["D"] * x_t)
    return torch.stack(steps, 1)


LOOPS: dict[str, tuple[Callable[[], Any], Loop]] = {
    "S4": (lambda: S4Recurrence(5, 3), s4_loop),
    "Mamba": (lambda: MambaRecurrence(5, 3, dt_rank=2), mamba_loop),
}
COMPILED = torch.float32  # Numba's kernels, in the dtype that they are trained in


@pytest.mark.parametrize("L", LENGTHS)
@pytest.mark.parametrize(
    ("name", "dtype"), [("S4", DOUBLE), ("S4", COMPILED), ("Mamba", COMPILED)]
)
def test_outputs_and_gradients_are_those_of_a_loop(
    name: str, L: int, dtype: torch.dtype
) -> None:
    make, loop = LOOPS[name]
    layer = moved(make()).to(dtype)
    x = signal(3, L, 5, dtype=dtype).requires_grad_()
    p = {k: v.detach().double().requires_grad_() for k, v in layer.named_parameters()}
    x_ref = x.detach().double().requires_grad_()
    expected = loop(p, x_ref)
    ways = {"layer": lambda: layer(x)[0]}
    if name == "S4":
        ways["convolved"] = lambda: Convolved(layer)(x)
    weight = signal(3, L, 5, seed=9)
    wanted = torch.autograd.grad((expected * weight).sum(), [x_ref, *p.values()])
    for way, run in ways.items():
        y = run()
        assert_close(y, expected, way)
        found = torch.autograd.grad(
            (y * weight.to(dtype)).sum(), [x, *layer.parameters()]
        )
        for key, a, b in zip(["x", *p], found, wanted, strict=True):
            assert_close(a, b, f"{way}: {key}")


def test_steps_and_states_of_s4_are_those_of_the_whole() -> None:
    layer = moved(S4Recurrence(4, 3)).double()
    x = signal(2, 11, 4)
    whole, last = layer(x)
    first, state = layer(x[:, :4])
    pieces = [first]
    for x_t in x[:, 4:].unbind(1):
        y_t, state = layer.step(x_t, state)
        pieces.append(y_t[:, None])
    assert_close(torch.cat(pieces, 1), whole)
    assert torch.allclose(state.h, last.h, rtol=1e-10)


def test_s4_is_the_published_selective_scan() -> None:
    """With the arguments that the published code gives it, by our specification."""
    layer = moved(S4Recurrence(4, 3)).double()
    x = signal(2, 13, 4)
    B, C = (torch.view_as_complex(p.detach()) for p in (layer.B, layer.C))
    A = torch.complex(-layer.log_A_real.exp(), layer.A_imag)
    delta = layer.log_dt.exp().expand_as(x)
    scan = {"delta_softplus": True, "backend": "naive"}
    expected, _ = selective_scan(x, delta, A, B, C, layer.D, **scan)
    assert_close(layer(x)[0], expected)


def test_s4_starts_as_published() -> None:
    D, N = 300, 200
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = S4Recurrence(D, N)
        published = nn.init.xavier_normal_(torch.empty(D, N, dtype=torch.complex64))
    assert torch.allclose(layer.log_A_real.exp(), torch.tensor(0.5))
    assert torch.allclose(layer.A_imag[7], math.pi * torch.arange(1.0, N + 1))
    assert torch.equal(layer.D, torch.ones(D))
    for parameter in (layer.B, layer.C):
        ours = torch.view_as_complex(parameter.detach())
        for part in ("real", "imag"):
            deviation = float(getattr(ours, part).std())
            wanted = float(getattr(published, part).std())
            assert deviation == pytest.approx(wanted, rel=5 / (D * N) ** 0.5)
    step = layer.log_dt.detach().exp()
    assert 0.001 <= float(step.min()) < 0.0012
    assert 0.08 < float(step.max()) <= 0.1
    delta = softplus(step)
    assert math.log(2) < float(delta.min()) < float(delta.max()) < 0.745


# --- Transformer and positions --------------------------------------------------------


@pytest.mark.parametrize("L", [*LENGTHS, *TILES])
@pytest.mark.parametrize("training", [True, False])
def test_a_transformer_layer_is_its_equation(training: bool, L: int) -> None:
    H, heads = 6, 3
    ours = moved(TransformerLayer(H, heads)).double().train(training)
    for module in ours.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    w = {k.removeprefix("layer."): v for k, v in ours.named_parameters()}
    x = signal(2, L, H)

    def affine(z: Tensor, name: str) -> Tensor:
        return z @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def normed(z: Tensor, name: str) -> Tensor:
        z = (z - z.mean(-1, keepdim=True)) / (
            z.var(-1, False, keepdim=True) + 1e-5
        ) ** 0.5
        return z * w[f"{name}.weight"] + w[f"{name}.bias"]

    qkv = x @ w["self_attn.in_proj_weight"].T + w["self_attn.in_proj_bias"]
    q, k, v = (z.unflatten(-1, (heads, -1)) for z in qkv.chunk(3, -1))
    mixed = torch.zeros_like(v)
    for t in range(L):  # each position over itself and those before
        scores = torch.einsum("bhp,bshp->bsh", q[:, t], k[:, : t + 1])
        shares = (scores / (H / heads) ** 0.5).softmax(1)
        mixed[:, t] = torch.einsum("bsh,bshp->bhp", shares, v[:, : t + 1])
    z = normed(x + affine(mixed.flatten(-2), "self_attn.out_proj"), "norm1")
    expected = normed(z + affine(affine(z, "linear1").relu(), "linear2"), "norm2")
    with torch.no_grad():
        assert_close(ours(x), expected)


@pytest.mark.parametrize("H", [1, 6, 7])
@pytest.mark.parametrize("L", [2, 64, 65, 600])
def test_positions_are_added_as_waves(H: int, L: int) -> None:
    x = signal(2, L, H, dtype=torch.float32)
    y = SinusoidalPositionalEncoding(H, dropout=0.0)(x) - x
    width = H + H % 2  # an odd width leaves out a cosine
    for t in (0, 1, L - 1):
        for j in range(H):
            wave = math.cos if j % 2 else math.sin
            wanted = wave(t / 10000 ** (2 * (j // 2) / width))
            assert y[1, t, j].item() == pytest.approx(wanted, abs=1e-6)


def test_positions_pass_dropout() -> None:
    y = SinusoidalPositionalEncoding(50, dropout=0.3)(torch.ones(20, 30, 50))
    assert float((y == 0).float().mean()) == pytest.approx(0.3, abs=0.02)


def test_an_embedding_has_standard_normal_rows() -> None:
    table = Embedding(60, 400)
    tokens = torch.tensor([[3, 0, 59]])
    assert torch.equal(table(tokens)[0], table.weight[[3, 0, 59]])
    assert float(table.weight.detach().std()) == pytest.approx(1.0, abs=0.03)


# --- the whole model ------------------------------------------------------------------


def config(model_name: str = "S4", **changed: Any) -> SequenceModelConfig:
    sizes = {"input_dim": 3, "output_dim": 4, "hidden_dim": 6, "state_dim": 2}
    return SequenceModelConfig(**sizes | {"depth": 2} | changed, model_name=model_name)


def model(chosen: SequenceModelConfig, dtype: torch.dtype = DOUBLE) -> SequenceModel:
    return build(chosen, seed=0).to(dtype)


def written_out(ours: SequenceModel, x: Tensor) -> Tensor:
    """The module's equations, in evaluation, with the model's weights."""
    c = ours.config
    x = ours.init_layer(x)
    for block in ours.blocks:
        mixed = functional.linear(block.layer(x), *block.linear_mix.parameters())
        if c.nonlinear and c.activation == "GLU":
            value, gate = mixed.chunk(2, -1)
            mixed = value / (1 + (-gate).exp())
        elif c.nonlinear:
            mixed = 0.5 * mixed * (1 + torch.erf(mixed / 2**0.5))
        x = x + mixed
        if c.use_layernorm:
            centred = x - x.mean(-1, keepdim=True)
            x = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    x = x if c.continuous_output else x.sum(1) / x.shape[1]
    return functional.linear(x, *ours.linear_out.parameters())


@pytest.mark.parametrize("continuous_output", [True, False])
@pytest.mark.parametrize("use_layernorm", [True, False])
@pytest.mark.parametrize(
    ("nonlinear", "activation"), [(True, "GLU"), (True, "GELU"), (False, "GLU")]
)
def test_a_model_is_its_equations(
    nonlinear: bool, activation: str, use_layernorm: bool, continuous_output: bool
) -> None:
    chosen = config(
        nonlinear=nonlinear,
        activation=activation,
        use_layernorm=use_layernorm,
        continuous_output=continuous_output,
        dropout=0.4,
    )
    ours = model(chosen).eval()
    x = signal(2, 7, 3)
    y = ours(x)
    assert y.shape == ((2, 7, 4) if continuous_output else (2, 4))
    assert_close(y, written_out(ours, x))


def test_dropout_follows_the_layer_and_the_activation() -> None:
    block = model(config(dropout=0.5, depth=1)).train().blocks[0]
    seen: list[tuple[Tensor, Tensor]] = []
    block.dropout.register_forward_hook(lambda _m, x, y: seen.append((x[0], y)))
    made: list[Tensor] = []
    for part in (block.layer, block.activation):
        part.register_forward_hook(lambda _m, _x, y: made.append(y))
    y = block(signal(8, 9, 6).flatten(0, 1), ((8, 9),))
    for a, (x, _) in zip(made, seen, strict=True):
        assert torch.equal(a.flatten(), x.flatten())
    for x, dropped in seen:
        kept = dropped != 0
        assert torch.allclose(dropped[kept], 2 * x[kept])
        assert 0.4 < float(kept.double().mean()) < 0.6
    assert torch.equal(y, signal(8, 9, 6).flatten(0, 1) + seen[1][1])


def test_tokens_are_embedded() -> None:
    tokens_in = {"embedding": True, "input_dim": 9, "continuous_output": True}
    ours = model(config("Mamba", **tokens_in), COMPILED)
    tokens = torch.randint(9, (2, 5), generator=draws(0))
    assert_close(ours(tokens), written_out(ours, tokens))


@pytest.mark.parametrize("L", [1, 2, 11])
@pytest.mark.parametrize("name", MODELS)
def test_no_output_depends_on_later_inputs(name: str, L: int) -> None:
    chosen = config(name, continuous_output=True, use_layernorm=True)
    ours = model(chosen, COMPILED).eval()
    x = signal(2, L, 3, dtype=COMPILED)
    with torch.no_grad():
        before = ours(x)
        for t in {0, L // 2, L - 1}:
            other = x.clone()
            other[:, t] += 1.0
            after = ours(other)
            assert torch.allclose(after[:, :t], before[:, :t], rtol=1e-5, atol=1e-5)
            assert float((after[:, t] - before[:, t]).abs().max()) > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_of_every_model_learns(name: str) -> None:
    ours = model(config(name, embedding=True, use_layernorm=True), COMPILED).train()
    tokens = torch.randint(3, (4, 5), generator=draws(0))
    (ours(tokens) * signal(4, 4, dtype=COMPILED)).sum().backward()
    for key, p in ours.named_parameters():
        assert p.grad is not None, key
        assert bool(torch.isfinite(p.grad).all()), key
        assert float(p.grad.abs().max()) > 0, key


def superposition_error(ours: SequenceModel) -> float:
    """How far f(2x - 3y) is from 2 f(x) - 3 f(y) + 2 f(0), in shares of it."""
    dtype = ours.linear_out.weight.dtype
    x, y = (signal(5, 17, 3, seed=seed, dtype=dtype) for seed in (0, 1))
    with torch.no_grad():
        mixed = 2 * ours(x) - 3 * ours(y) + 2 * ours(torch.zeros_like(x))
        error = (ours(2 * x - 3 * y) - mixed).abs().max() / mixed.abs().max()
    return float(error)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("name", ["S4", "S5", "S4D", "S4Full"])
def test_without_activation_time_invariant_models_are_linear(
    name: str, depth: int
) -> None:
    assert superposition_error(model(config(name, nonlinear=False, depth=depth))) < 1e-9


@pytest.mark.parametrize(
    ("name", "nonlinear"), [("Mamba", False), ("RNN", False), ("S4", True)]
)
def test_selection_recurrence_and_activation_are_not_linear(
    name: str, nonlinear: bool
) -> None:
    chosen = config(name, nonlinear=nonlinear, activation="GELU")
    assert superposition_error(model(chosen, COMPILED)) > 1e-3


# What the layer of each model holds, with H channels and N states.
HELD: dict[str, Callable[[int, int], int]] = {
    "S4": lambda H, N: 6 * H * N + 2 * H,
    "Mamba": lambda H, N: H * (H // 16 + 2 * N) + H * (H // 16 + 1) + H * N + H,
    "RNN": lambda H, _: 2 * H * (H + 1),
    "Transformer": lambda H, _: 4 * H * (H + 1) + 2048 * (2 * H + 1) + H + 4 * H,
    "S5": lambda H, N: 3 * (N // 2) + 2 * H * N + H,
}


def test_models_of_the_published_sizes_have_as_many_parameters_as_they_should() -> None:
    for name, layer in HELD.items():
        H, N, depth = 256, 256, 2
        toy = SequenceModelConfig(2, 1, H, N, depth, name, activation="GELU")
        a_block = layer(H, N) + H * (H + 1)
        wanted = 3 * H + depth * a_block + H + 1
        assert build(toy, seed=0).num_parameters() == wanted, name
    for name, layer in HELD.items():
        H, N, depth = 1024, 64, 1
        words = SequenceModelConfig(
            60, 60, H, N, depth, name, embedding=True, use_layernorm=True
        )
        a_block = layer(H, N) + 2 * H * (H + 1) + 2 * H
        wanted = 60 * H + depth * a_block + 60 * (H + 1)
        assert build(words, seed=0).num_parameters() == wanted, name


def weights(ours: SequenceModel) -> Iterable[Tensor]:
    return ours.state_dict().values()


def test_weights_are_of_their_seed_alone_and_leave_generators_be() -> None:
    made = []
    for seed, elsewhere in ((0, 1), (0, 2), (3, 1)):
        torch.manual_seed(elsewhere)
        before = torch.get_rng_state()
        made.append(build(config("Mamba"), seed=seed))
        assert torch.equal(torch.get_rng_state(), before)
    first, again, other = (list(weights(each)) for each in made)
    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, other))


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"model_name": "Mamba3"}, "did you mean Mamba"),
    ({"model_name": "xyz"}, "Transformer"),
    ({"activation": "ReLU"}, "activation: got 'ReLU'; expected GLU or GELU"),
    ({"depth": 0}, "depth: got 0"),
    ({"hidden_dim": -1}, "hidden_dim: got -1"),
    ({"dropout": 1.0}, "dropout: got 1.0"),
]


@pytest.mark.parametrize(("wrong", "said"), WRONG)
def test_what_no_model_has_is_one_line(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        replace(config(), **wrong)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_heads_that_do_not_divide_the_channels_are_one_line() -> None:
    with pytest.raises(InputError, match=r"^state_dim: got 4; expected a divisor of"):
        build(config("Transformer", state_dim=4), seed=0)


def test_the_page_has_every_name_of_document_2() -> None:
    named = ["Embedding", "SequenceModel", "SinusoidalPositionalEncoding", "RNN"]
    named += ["TransformerLayer", "S4Recurrence", "MambaRecurrence", "S5"]
    named += ["run_sm_toy_experiment", "run_sm_A5_experiment"]
    assert set(named) <= set(torch_sequence_models.__all__)
    assert all(hasattr(torch_sequence_models, name) for name in named)
    text = torch_sequence_models.__doc__ or ""
    assert all(name in text for name in named[:8])
