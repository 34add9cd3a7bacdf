"""Every model is causal, one function whole and by steps, counted and drawn as said."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from experiments.common import InputError
from mamba_experiments.models import (
    MODELS,
    build,
    build_config,
    count_parameters,
    find_model,
    match_params,
    matched_config,
)
from ssm.layers._base import apply_kernel
from ssm.models import SequenceLM
from tests.ssm.helpers import assert_close

VOCAB = 23
LENGTHS = (1, 63, 64)
# Document 1's setting for WikiText-2.
PUBLISHED: dict[str, Any] = {
    "vocab_size": 20_000,
    "d_model": 64,
    "n_state": 16,
    "n_layers": 2,
}
WITH_STATE = [name for name in MODELS if name not in ("rwkv", "transformer")]
WITH_FEED_FORWARD = ["rwkv", "transformer", "jamba"]


def tiny(name: str, **changes: Any) -> dict[str, Any]:
    sizes = {"vocab_size": VOCAB, "d_model": 12, "n_state": 3, "n_layers": 3}
    return {"name": name, **sizes, **changes}


def double(name: str, **changes: Any) -> SequenceLM:
    """In float64, every parameter moved so that none has a special value."""
    model = build(build_config(**tiny(name, **changes)), seed=4).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise.double(), alpha=0.1)
    return model


def tokens(*shape: int) -> Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(1))


def signal(L: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, L, 12, generator=generator, dtype=torch.float64)


# --- what they compute ----------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("L", LENGTHS)
def test_whole_equals_stepwise_and_the_last_logits_alone(name: str, L: int) -> None:
    model, x = double(name), tokens(2, L)
    whole = model(x).logits
    state, steps = model.init_state(2), []
    for x_t in x.unbind(1):
        logits, state = model.step(x_t, state)
        steps.append(logits)
    assert_close(whole, torch.stack(steps, 1), name=name)
    assert_close(model(x, last_only=True).logits, whole[:, -1], name=name)


@pytest.mark.parametrize("name", MODELS)
def test_no_logit_sees_a_later_token_and_the_others_see_it(name: str) -> None:
    model, x = double(name), tokens(2, 64)
    before = model(x).logits
    x = x.clone()
    x[:, 40] = (x[:, 40] + 1) % VOCAB
    after = model(x).logits
    assert_close(after[:, :40], before[:, :40], name=name)
    moved = (after - before).abs().amax((0, 2))
    assert (moved[40:48] > 1e-6).all(), moved[40:48]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("L", LENGTHS)
def test_a_step_downhill_lowers_the_loss_at_the_last_position(
    name: str, L: int
) -> None:
    """By |gradient|^2 times the rate, to first order; every parameter takes part."""
    model, x = double(name), tokens(4, L)
    target = tokens(4, 3)[:, -1]

    def loss() -> Tensor:
        return functional.cross_entropy(model(x, last_only=True).logits, target)

    first = loss()
    named = dict(model.named_parameters())
    grads = torch.autograd.grad(first, list(named.values()))
    norms = {n: float(g.norm()) for n, g in zip(named, grads, strict=True)}
    rate = 1e-7
    with torch.no_grad():
        for parameter, gradient in zip(model.parameters(), grads, strict=True):
            parameter -= rate * gradient
    expected = rate * sum(norm**2 for norm in norms.values())
    assert (first - loss()).item() == pytest.approx(expected, rel=1e-3)
    if L > 1:  # one token has no past to weigh; an expert may be asked by no token
        idle = [n for n, norm in norms.items() if not norm and ".experts." not in n]
        if name == "mamba2_fixed_decay":  # its steps are clamped
            idle = [n for n in idle if not n.endswith("dt_bias")]
        assert not idle


def test_exponential_decays_make_a_kernel_of_lags_that_no_input_changes() -> None:
    """Toeplitz, and its Hankel matrix has rank N: a sum of N exponentials."""
    x, other = signal(24).split(1)
    layer = double("mamba_SSD_diag_exp", n_state=3).blocks[0].mixer
    matrix, _ = layer.kernel_matrix(x)
    assert torch.equal(matrix, layer.kernel_matrix(other)[0])
    assert_close(matrix[..., 1:, 1:], matrix[..., :-1, :-1], name="Toeplitz")
    lags = matrix[0, :, 1:, 0]  # without lag 0, where D is
    hankel = lags.unfold(-1, 12, 1)
    sizes = torch.linalg.svdvals(hankel)
    ratios = sizes / sizes[:, :1]
    assert (ratios[:, 2] > 1e-9).all()
    assert (ratios[:, 3] < 1e-13).all()


@pytest.mark.parametrize("name", ["mamba_SSD_diag_selective", "mamba_simple", "mamba2"])
def test_selective_kernels_change_with_the_input(name: str) -> None:
    layer = double(name).blocks[0].mixer
    x = signal(9)
    matrix = layer.kernel_matrix(x)[0]
    changed = layer.kernel_matrix(2 * x)[0]
    assert (matrix - changed).abs().max() > 1e-3 * matrix.abs().max()


def test_fixed_decays_leave_linear_attention_with_a_discount() -> None:
    """M[t, s] over the product of C_t and B_s is exp(-step A)^(t - s)."""
    layer = double("mamba2_fixed_decay", n_state=1).blocks[0].mixer
    matrix = layer.kernel_matrix(signal(9))[0][0]
    decay = (-0.01 * layer.A_log.exp()).exp()
    # with one state, C_t B_s cancels in products over the corners of a rectangle
    t, s = 6, 2
    crossed = matrix[:, t, s] * matrix[:, t + 2, s + 1]
    across = matrix[:, t + 2, s] * matrix[:, t, s + 1]
    assert_close(crossed / across, torch.ones_like(decay))
    far = layer.kernel_matrix(signal(1)[:1].expand(1, 9, -1))[0][0]
    assert_close(far[:, 8, 3] / far[:, 7, 3], decay, name="without the convolution")


@pytest.mark.parametrize("selective", ["exp", "selective"])
def test_the_diagonal_layer_is_its_dual_form(selective: str) -> None:
    layer = double(f"mamba_SSD_diag_{selective}").blocks[1].mixer
    x = signal(17)
    matrix, values = layer.kernel_matrix(x)
    assert_close(layer(x)[0], layer.readout(apply_kernel(matrix, values), x))


# --- what the flags mean --------------------------------------------------------------


STATE_NUMBERS = {  # of one row in layer 0, without the convolution's window
    "mamba_simple": lambda D, N: 2 * D * N,
    "mamba_SSD_diag_exp": lambda D, N: 2 * D * N,
    "mamba_SSD_diag_selective": lambda D, N: 2 * D * N,
    "mamba2": lambda D, N: 2 * D * N,
    "mamba2_fixed_decay": lambda D, N: 2 * D * N,
    "jamba": lambda D, N: 2 * D * N,
    "s4d": lambda D, N: D * N // 2,  # complex ones
}


@pytest.mark.parametrize("name", WITH_STATE)
def test_n_state_is_the_state_of_each_channel(name: str) -> None:
    for N in (2, 6):
        model = build(build_config(**tiny(name, n_state=N)), seed=0)
        state = model.init_state(1).get(0).mixer
        assert state[-1].numel() == STATE_NUMBERS[name](12, N)


@pytest.mark.parametrize("name", MODELS)
def test_n_state_is_ignored_where_the_description_says_so(name: str) -> None:
    same = build_config(**tiny(name)) == build_config(**tiny(name, n_state=5))
    assert same is ("n_state is ignored" in MODELS[name].description)


def test_heads_divide_any_width() -> None:
    for d_model in range(1, 70):
        for name in ("transformer", "mamba2", "mamba_SSD_diag_selective"):
            config = build_config(**tiny(name, d_model=d_model))
            options = next(iter(config.mixer.values()))
            if name == "transformer":
                assert d_model % options["n_heads"] == 0
            else:
                assert 2 * d_model % options["headdim"] == 0
    config = build_config("transformer", **PUBLISHED)
    assert config.mixer["attention"]["n_heads"] == 4


@pytest.mark.parametrize(("n_layers", "at"), [(2, [1]), (5, [4]), (8, [7]), (9, [7])])
def test_jamba_has_attention_at_any_depth(n_layers: int, at: list[int]) -> None:
    units = build_config(**tiny("jamba", n_layers=n_layers)).units()
    assert [i for i, unit in enumerate(units) if unit.mixer == "attention"] == at
    experts = [i for i, unit in enumerate(units) if unit.feed_forward == "moe"]
    assert experts == list(range(1, n_layers, 2))


# --- parameters -----------------------------------------------------------------------


def mamba_formula(D: int, N: int, n_layers: int) -> int:
    """Without the embedding, from the block's equations."""
    E, R = 2 * D, -(-D // 16)
    projections = D * 2 * E + E * D
    convolution = 4 * E + E
    selection = E * (R + 2 * N) + R * E + E
    system = E * N + E
    return n_layers * (projections + convolution + selection + system + D) + D


def transformer_formula(D: int, hidden: int, n_layers: int) -> int:
    """Without the embedding: q, k, v, o; gate, up, down; two norms a block and one."""
    return n_layers * (4 * D * D + 3 * D * hidden + 2 * D) + D


@pytest.mark.parametrize(("D", "N", "n_layers"), [(64, 16, 2), (12, 3, 1), (50, 7, 3)])
def test_parameters_are_counted_by_hand(D: int, N: int, n_layers: int) -> None:
    sizes = {"vocab_size": 31, "d_model": D, "n_state": N, "n_layers": n_layers}
    count = count_parameters(build_config("mamba_simple", **sizes))
    assert count == (31 * D, mamba_formula(D, N, n_layers))
    hidden = 8 * -(-(8 * D / 3) // 8)  # eight thirds, up to a multiple of 8
    count = count_parameters(build_config("transformer", **sizes))
    assert count == (31 * D, transformer_formula(D, int(hidden), n_layers))


@pytest.mark.parametrize("name", MODELS)
def test_what_is_counted_is_what_is_built(name: str) -> None:
    config = build_config(**tiny(name))
    before = torch.get_rng_state()
    count = count_parameters(config)
    assert torch.equal(torch.get_rng_state(), before)
    model = build(config, seed=0)
    assert count.total == sum(p.numel() for p in model.parameters())
    assert count.embedding == VOCAB * 12


@pytest.mark.parametrize("name", MODELS)
def test_matched_models_have_mambas_parameters_within_2_percent(name: str) -> None:
    target = mamba_formula(64, 16, 2)
    config = matched_config("mamba_simple", name, **PUBLISHED)
    count = count_parameters(config)
    assert count.rest == pytest.approx(target, rel=0.02)
    plain = build_config(name, **PUBLISHED)
    assert config.units() == plain.units()
    if name in WITH_FEED_FORWARD:  # nothing but that layer's width moved
        assert count.embedding == 20_000 * 64
        options = plain.feed_forward.items()
        hidden = {kind: x["d_hidden"] for kind, x in config.feed_forward.items()}
        moved = {kind: {**x, "d_hidden": hidden[kind]} for kind, x in options}
        assert config == replace(plain, feed_forward=moved)
        assert len(set(hidden.values())) == 1


def test_the_nearest_width_is_found() -> None:
    """Against all widths, by the formulas."""
    config = build_config("transformer", **PUBLISHED)
    for target in (51_234, 65_472, 99_999):
        found = match_params("transformer", config, target)
        by_distance = [
            (abs(transformer_formula(64, h, 2) - target), h) for h in range(1, 500)
        ]
        assert found.feed_forward["mlp"]["d_hidden"] == min(by_distance)[1]
    config = build_config("mamba_simple", **PUBLISHED)
    for target in (51_234, 99_999):
        found = match_params("mamba_simple", config, target)
        assert count_parameters(found).embedding == 20_000 * found.d_model
        by_distance = [(abs(mamba_formula(D, 16, 2) - target), D) for D in range(1, 99)]
        assert found.d_model == min(by_distance)[1]


@pytest.mark.parametrize("name", ["mamba2", "mamba_SSD_diag_exp"])
def test_a_matched_model_keeps_its_heads(name: str) -> None:
    plain = build_config(name, **PUBLISHED)
    config = match_params(name, plain, 2 * count_parameters(plain).rest)
    assert config.d_model > plain.d_model
    heads = [
        2 * c.d_model // next(iter(c.mixer.values()))["headdim"]
        for c in (plain, config)
    ]
    assert heads[0] == heads[1]
    assert build(config, seed=0)(tokens(1, 5)).logits.shape == (1, 5, 20_000)


def test_a_target_out_of_reach_is_refused() -> None:
    """Attention alone has more than a tenth of its own parameters."""
    config = build_config("transformer", **PUBLISHED)
    with pytest.raises(InputError, match=r"match_params: .* d_hidden, 1'.* 1,000 "):
        match_params("transformer", config, 1000)


# --- weights --------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_a_function_of_the_seed_alone(name: str) -> None:
    config = build_config(**tiny(name))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        state = torch.get_rng_state()
        first = build(config, seed=7).state_dict()
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(2)
        again = build(config, seed=7, device="cpu").state_dict()
    other = build(config, seed=8).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    drawn = [key for key in first if not torch.equal(first[key], other[key])]
    assert "embedding.weight" in drawn
    assert {key.split(".")[1] for key in drawn if ".mixer." in key} == {"0", "1", "2"}
    assert first["embedding.weight"].std() == pytest.approx(0.02, rel=0.2)


# --- bad input ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mamba_simpel", "Mamba_simple", "mamba-simple"])
def test_an_unknown_model_is_answered_with_the_nearest(name: str) -> None:
    with pytest.raises(InputError, match=r"did you mean mamba_simple\?"):
        find_model(name)


def test_an_unknown_model_like_none_is_answered_with_all() -> None:
    with pytest.raises(InputError, match="transformer, jamba; choose one") as caught:
        build_config(**tiny("zzz"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"d_model": 0},
        {"n_state": 0},
        {"n_layers": -1},
        {"vocab_size": 0},
        {"dropout": 1.0},
        {"dropout": float("nan")},
        {"name": "jamba", "n_layers": 1},
    ],
)
def test_bad_sizes_are_one_line(change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"got .*; expected .*; ") as caught:
        build_config(**(tiny("transformer") | change))
    assert next(key for key in reversed(change)) in str(caught.value)
    assert "\n" not in str(caught.value)
