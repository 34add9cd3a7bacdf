"""S4D: a loop over time in complex128 is the truth; every form agrees with it."""

import pytest
import torch

from ssm._errors import ArgumentError
from ssm.layers import hippo
from ssm.layers.s4d import S4D
from tests.ssm.helpers import assert_close
from tests.ssm.layers import helpers

DOUBLE = torch.float64


def make(d_model=3, d_state=8, init="lin", discretization="zoh", **options):
    """A layer off its initialisation"""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        options = {"dtype": DOUBLE} | options
        layer = S4D(d_model, d_state, init, discretization, **options)
        with torch.no_grad():
            for parameter in (layer.B, layer.A_imag, layer.log_A_real):
                parameter.add_(torch.randn_like(parameter) / 4)
            layer.D.normal_()
    return layer


def discrete(layer):
    A = torch.complex(-layer.log_A_real.exp(), layer.A_imag)
    B = torch.view_as_complex(layer.B)
    delta = layer.log_dt.exp()[:, None]
    if layer.discretization == "zoh":
        A_bar = (delta * A).exp()
        return A_bar, (A_bar - 1) / A * B
    return (1 + delta / 2 * A) / (1 - delta / 2 * A), delta * B / (1 - delta / 2 * A)


def reference(layer, x, state):
    """A loop over time"""
    A_bar, B_bar = discrete(layer)
    C = torch.view_as_complex(layer.C)
    h, outputs = state.h, []
    for x_t in x.unbind(1):
        h = A_bar * h + B_bar * x_t[..., None]
        outputs.append(2 * (C * h).sum(-1).real + layer.D * x_t)
    return torch.stack(outputs, 1), type(state)(h)


@pytest.mark.parametrize("L", [1, 63, 64, 65, 127])
@pytest.mark.parametrize("output", [True, False])
@pytest.mark.parametrize("discretization", hippo.METHODS)
def test_every_form_is_the_loop(L, output, discretization):
    layer = make(d_state=7 + L % 2, discretization=discretization)
    x, state = helpers.random_input(layer, 2, L), helpers.random_state(layer, 2)
    expected = helpers.everything(layer, x, state, reference, output=output)
    cuts = helpers.split_at([0, L // 3, L // 2])
    for run in (helpers.whole, cuts, helpers.stepwise):
        found = helpers.everything(layer, x, state, run, output=output)
        helpers.assert_same(found, expected)


@pytest.mark.parametrize("init", list(hippo.S4D_INITS))
@pytest.mark.parametrize("d_state", [1, 2, 5, 64])
def test_every_initialisation_in_every_form(init, d_state):
    layer = S4D(2, d_state, init, "bilinear", dtype=DOUBLE)
    assert_close(
        torch.complex(-layer.log_A_real.exp(), layer.A_imag)[1].detach(),
        hippo.make_s4d_eigenvalues(init, d_state),
    )
    helpers.check_forms(layer, 9, [2, 5])
    helpers.check_kernel(layer, 9)


@pytest.mark.parametrize("L", [1, 2, 3, 16, 100, 257])
def test_the_kernel_is_the_product_with_a_vandermonde_matrix(L):
    layer = make()
    A_bar, B_bar = discrete(layer)
    vandermonde = A_bar[..., None] ** torch.arange(L)
    C = torch.view_as_complex(layer.C)
    expected = 2 * torch.einsum("dn,dnl->dl", C * B_bar, vandermonde).real
    assert_close(layer.kernel(layer.recurrence(L), L).detach(), expected.detach())


def test_a_decay_of_zero_is_legal():
    # Bilinear at delta A = -2: A_bar = 0 exactly; nothing takes its logarithm.
    layer = make(2, 2, discretization="bilinear")
    with torch.no_grad():
        layer.log_A_real.zero_()
        layer.A_imag.zero_()
        layer.log_dt.fill_(torch.tensor(2.0, dtype=DOUBLE).log())
    assert discrete(layer)[0].abs().max() < 1e-15
    x, state = helpers.random_input(layer, 2, 9), helpers.random_state(layer, 2)
    expected = helpers.everything(layer, x, state, reference)
    helpers.assert_same(helpers.everything(layer, x, state, helpers.whole), expected)


@pytest.mark.parametrize("log_real", [-40.0, 12.0])
def test_extreme_decays_stay_finite(log_real):
    layer = make()
    with torch.no_grad():
        layer.log_A_real.fill_(log_real)
    x, state = helpers.random_input(layer, 2, 30), helpers.random_state(layer, 2)
    for value in helpers.everything(layer, x, state, helpers.whole).values():
        assert value.isfinite().all()


def test_the_matrix_applied_is_the_layer():
    helpers.check_kernel(make(), 33)


def test_padded_rows_equal_each_row_alone():
    helpers.check_lengths(make(), [17, 0, 1, 9], 17)


@pytest.mark.parametrize("init", list(hippo.S4D_INITS))
def test_float32_keeps_to_32_roundings(init):
    helpers.check_float32(make(3, 64, init), 257)


def test_float32_steps_keep_their_phase():
    layer = S4D(3, 64, "inv", dtype=torch.float32, dt_min=0.1)
    double = S4D(3, 64, "inv", dtype=DOUBLE)
    double.load_state_dict(layer.state_dict())
    x = helpers.random_input(layer, 2, 257).float()
    with torch.no_grad():
        y, _ = helpers.stepwise(layer, x, layer.init_state(2))
        assert y.dtype == torch.float32
        assert_close(y, double(x.double())[0])


def test_bfloat16_gives_bfloat16():
    layer = make(dtype=torch.bfloat16)
    x = helpers.random_input(layer, 2, 20).bfloat16()
    y, _ = layer(x)
    stepped, _ = helpers.stepwise(layer, x, layer.init_state(2))
    assert y.dtype == stepped.dtype == torch.bfloat16
    assert_close(y.detach(), stepped.double().detach())


def test_contract():
    layer = make()
    helpers.check_empty(layer)
    helpers.check_step_is_pure(layer)
    helpers.check_reruns(layer, 40)


def test_compiles_to_one_graph():
    helpers.check_compiles(make(), 19)


def test_made_on_the_meta_device():
    layer = helpers.materialise(lambda: S4D(3, 7, "legs"))
    assert_close(layer.B[1], S4D(1, 7, "legs").B[0])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: S4D(3, init="hippo"), "init: got 'hippo'; expected lin, inv, legs"),
        (lambda: S4D(3, discretization="euler"), "discretization: got 'euler'"),
        (lambda: S4D(3, -1), "d_state: got -1"),
        (lambda: S4D(3)(torch.ones(2, 3)), r"x: got shape \(2, 3\)"),
        (lambda: S4D(3)(torch.ones(2, 5, 3), S4D(3, 4).init_state(2)), "state: got"),
    ],
)
def test_bad_arguments_are_named(call, words):
    with pytest.raises(ArgumentError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
