"""S5: a loop over time with all modes is the truth; every form and backend agrees."""

import pytest
import torch

from ssm._errors import ArgumentError
from ssm.layers import hippo
from ssm.layers._base import apply_kernel, param_groups
from ssm.layers.s5 import S5
from tests.ssm.helpers import assert_close
from tests.ssm.layers import helpers

DOUBLE = torch.float64
BACKENDS = ("cpu", "torch", "naive")


def make(d_model=3, d_state=8, **options):
    """A layer off its initialisation"""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = S5(d_model, d_state, **{"dtype": DOUBLE} | options)
        with torch.no_grad():
            for parameter in (layer.A_imag, layer.log_A_real):
                parameter.add_(torch.randn_like(parameter) / 4)
            layer.D.normal_()
    return layer


def reference(layer, x, state):
    """A loop over time, conjugate modes written out"""
    half = torch.complex(-layer.log_A_real.exp(), layer.A_imag)
    A = torch.cat([half, half.conj()])
    delta = torch.cat([layer.log_dt, layer.log_dt]).exp()
    B = torch.view_as_complex(layer.B)
    C = torch.view_as_complex(layer.C)
    B, C = torch.cat([B, B.conj()]), torch.cat([C, C.conj()], 1)
    A_bar = (delta * A).exp()
    B_bar = ((A_bar - 1) / A)[:, None] * B
    h, outputs = torch.cat([state.h, state.h.conj()], -1), []
    for x_t in x.unbind(1):
        h = A_bar * h + x_t.to(A.dtype) @ B_bar.mT
        y = h @ C.mT
        outputs.append(y.real + layer.D * x_t)
    return torch.stack(outputs, 1), type(state)(h[:, : layer.modes])


@pytest.mark.parametrize("L", [1, 63, 64, 65, 127])
@pytest.mark.parametrize("output", [True, False])
def test_every_form_is_the_loop(L, output):
    layer = make(d_state=7 + L % 2)
    x, state = helpers.random_input(layer, 2, L), helpers.random_state(layer, 2)
    expected = helpers.everything(layer, x, state, reference, output=output)
    cuts = helpers.split_at([0, L // 3, L // 2])
    for run in (helpers.whole, cuts, helpers.stepwise):
        found = helpers.everything(layer, x, state, run, output=output)
        helpers.assert_same(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_gives_the_same(backend):
    layer = make(5, 6, backend=backend)
    x, state = helpers.random_input(layer, 2, 40), helpers.random_state(layer, 2)
    expected = helpers.everything(layer, x, state, reference)
    helpers.assert_same(helpers.everything(layer, x, state, helpers.whole), expected)


@pytest.mark.parametrize("d_state", [1, 2, 5, 64])
def test_any_state_size_in_every_form(d_state):
    layer = S5(2, d_state, dtype=DOUBLE)
    helpers.check_forms(layer, 9, [2, 5])
    helpers.check_kernel(layer, 9)


def test_born_as_a_real_system_with_the_normal_part_of_legs():
    # In the state's own coordinates A is real, and B and C were drawn real.
    for N in (6, 7):
        layer = S5(3, N, dtype=DOUBLE)
        V = hippo.make_hippo_modes(N).V
        B, C = torch.view_as_complex(layer.B), torch.view_as_complex(layer.C)
        A = torch.complex(-layer.log_A_real.exp(), layer.A_imag)
        real_A = 2 * ((V * A) @ V.mH).real
        low_rank = torch.outer(*[hippo.make_hippo_input(N, DOUBLE) / 2**0.5] * 2)
        assert_close(real_A.detach(), hippo.make_hippo_matrix(N, DOUBLE) + low_rank)
        real_B, real_C = 2 * (V @ B).real, 2 * (C @ V.mH).real
        assert_close((V.mH @ real_B.to(V.dtype)).detach(), B.detach())
        assert_close((real_C.to(V.dtype) @ V).detach(), C.detach())
        assert real_B.std() < 2 * 3**-0.5


def test_the_matrix_is_that_of_the_modes_and_applied_is_the_layer():
    layer = make()
    helpers.check_kernel(layer, 33)
    x = helpers.random_input(layer, 2, 6)
    matrix, values = layer.kernel_matrix(x)
    assert matrix.shape == (2, 4, 6, 6)
    assert values.shape == (2, 6, 4, 1)
    states = apply_kernel(matrix, values)[:, -1, :, 0]
    assert_close(states.detach(), layer(x)[1].h.detach())


def test_padded_rows_equal_each_row_alone():
    helpers.check_lengths(make(), [17, 0, 1, 9], 17)


def test_float32_keeps_to_32_roundings():
    helpers.check_float32(make(5, 64), 257)


def test_float32_steps_keep_their_phase():
    layer = S5(5, 64, dtype=torch.float32, dt_min=0.1)
    double = S5(5, 64, dtype=DOUBLE)
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
    x = helpers.random_input(layer, 2, 0)
    matrix, values = layer.kernel_matrix(x)
    assert layer.readout(apply_kernel(matrix, values), x).shape == (2, 0, 3)


def test_compiles_to_one_graph():
    helpers.check_compiles(make(), 19)


def test_second_derivatives():
    layer = make(2, 4, backend="naive")
    x = helpers.random_input(layer, 1, 4).requires_grad_()
    B = layer.B.detach().clone().requires_grad_()

    def energy(x, B):
        y, last = torch.func.functional_call(layer, {"B": B}, (x,))
        return y.square().sum() + last.h.abs().square().sum()

    assert torch.autograd.gradgradcheck(energy, (x, B))


def test_made_on_the_meta_device():
    layer = helpers.materialise(lambda: S5(3, 7))
    assert_close(layer.A_imag, S5(1, 7).A_imag)


def test_parameters_of_the_system_learn_slowly_and_do_not_decay():
    groups = param_groups(S5(3, 4), lr=0.01, weight_decay=0.1)
    rates = {(g["lr"], g["weight_decay"]): len(g["params"]) for g in groups}
    assert rates == {(1e-3, 0.0): 4, (0.01, 0.1): 1, (0.01, 0.0): 1}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: S5(0), "d_model: got 0"),
        (lambda: S5(3)(torch.ones(2, 5, 4)), r"x: got shape \(2, 5, 4\)"),
        (lambda: S5(3)(torch.ones(2, 5, 3), S5(3, 4).init_state(2)), "state: got"),
        (lambda: S5(3).step(torch.ones(2, 3), S5(3).init_state(3)), "state: got"),
        (lambda: S5(3, backend="gpu")(torch.ones(2, 5, 3)), "backend: got 'gpu'"),
        (
            lambda: S5(3)(torch.ones(2, 5, 3), lengths=torch.tensor([1, -1])),
            r"lengths: got \[1, -1\]",
        ),
    ],
)
def test_bad_arguments_are_named(call, words):
    with pytest.raises(ArgumentError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
