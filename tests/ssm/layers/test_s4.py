"""S4: the dense bilinear recurrence is the truth; every form agrees with it."""

import pytest
import torch

from ssm._errors import ArgumentError
from ssm.layers import hippo, s4
from ssm.layers._base import param_groups
from ssm.layers.s4 import S4, DPLRSystem, bilinear_recurrence, dplr_kernel
from tests.ssm.helpers import assert_close
from tests.ssm.layers import helpers

DOUBLE = torch.float64


def make(d_model=3, d_state=8, **options):
    """A layer off its initialisation: random, signed P, B and D, all phases."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = S4(d_model, d_state, **{"dtype": DOUBLE} | options)
        with torch.no_grad():
            for parameter in (layer.P, layer.B, layer.A_imag, layer.log_A_real):
                parameter.add_(torch.randn_like(parameter) / 4)
            layer.D.normal_()
    return layer


def paired(z):
    """All modes of a system, conjugates behind"""
    return torch.cat([z, z.conj()], -1)


def dense(system):
    """A_bar, B_bar and C with every mode written out, by dense solves"""
    Lambda, P, B, C = (paired(z) for z in system[:4])
    half = (system.delta / 2).to(P.dtype)[:, None, None]
    A = torch.diag_embed(Lambda) - P[:, :, None] * P[:, None].conj()
    eye = torch.eye(A.shape[-1], dtype=A.dtype)
    below = eye - half * A
    A_bar = torch.linalg.solve(below, eye + half * A)
    B_bar = torch.linalg.solve(below, 2 * half * B[:, :, None])[..., 0]
    return A_bar, B_bar, C


def reference(layer, x, state):
    """A loop over time with dense complex matrices"""
    A_bar, B_bar, C = dense(layer.system())
    h = paired(state.h)
    outputs = []
    for x_t in x.unbind(1):
        h = torch.einsum("dmn,bdn->bdm", A_bar, h) + B_bar * x_t[..., None]
        outputs.append((C * h).sum(-1).real + layer.D * x_t)
    return torch.stack(outputs, 1), type(state)(h[..., : layer.modes])


@pytest.mark.parametrize("L", [1, 63, 64, 65, 127])
@pytest.mark.parametrize("output", [True, False])
def test_every_form_is_the_dense_recurrence(L, output):
    layer = make(d_state=7 + L % 2)
    x, state = helpers.random_input(layer, 2, L), helpers.random_state(layer, 2)
    expected = helpers.everything(layer, x, state, reference, output=output)
    runs = [helpers.whole, helpers.split_at([0, L // 3, L // 2])]
    for run in [*runs, helpers.stepwise] if L < 100 else runs:
        found = helpers.everything(layer, x, state, run, output=output)
        helpers.assert_same(found, expected)


@pytest.mark.parametrize("d_state", [1, 2, 5, 64])
@pytest.mark.parametrize("L", [1, 2, 7, 64, 257])
def test_the_generating_function_gives_the_dense_power_kernel(d_state, L):
    layer = make(2, d_state)
    A_bar, B_bar, C = dense(layer.system())
    h, expected = B_bar, []
    for _ in range(L):
        expected.append((C * h).sum(-1).real)
        h = torch.einsum("dmn,dn->dm", A_bar, h)
    assert_close(dplr_kernel(layer.system(), L), torch.stack(expected, -1))


def test_any_length_is_right_since_c_is_the_parameter():
    kernel = dplr_kernel(make().system(), 100)
    for L in (1, 2, 37, 99):
        assert_close(dplr_kernel(make().system(), L), kernel[:, :L], name=f"L = {L}")


@pytest.mark.parametrize("entries", [1, 40, 500])
def test_frequencies_come_in_pieces_of_any_size(entries, monkeypatch):
    def run():
        layer = make()
        x, state = helpers.random_input(layer, 2, 21), helpers.random_state(layer, 2)
        return helpers.everything(layer, x, state, helpers.whole)

    expected = run()
    monkeypatch.setattr(s4, "_CAUCHY_ENTRIES", entries)
    helpers.assert_same(run(), expected)


def test_slow_and_fast_modes_and_steps_keep_their_digits():
    Lambda = torch.tensor([[-0.5 + 0j, -1e-2 + 40j, -30 + 3j]] * 3)
    ones = torch.ones(3, 3, dtype=torch.complex128)
    steps = torch.tensor([1e-4, 1e-1, 10.0], dtype=DOUBLE)
    system = DPLRSystem(Lambda.to(ones.dtype), 2 * ones, ones, (1 + 1j) * ones, steps)
    A_bar, B_bar, C = dense(system)
    h, expected = B_bar, []
    for _ in range(200):
        expected.append((C * h).sum(-1).real)
        h = torch.einsum("dmn,dn->dm", A_bar, h)
    for d, kernel in enumerate(dplr_kernel(system, 200)):
        assert_close(kernel, torch.stack(expected, -1)[d], name=f"channel {d}")


def test_no_step_makes_the_state_grow():
    (A_bar,) = bilinear_recurrence(make(4, 16, dt_max=100.0).system(), 1).powers.squares
    norms = torch.linalg.matrix_norm(A_bar.detach(), 2)
    assert (norms <= 1 + 1e-12).all()


def test_the_matrix_applied_is_the_layer():
    helpers.check_kernel(make(), 33)
    helpers.check_kernel(make(), 1)


def test_padded_rows_equal_each_row_alone():
    helpers.check_lengths(make(), [17, 0, 1, 9], 17)


def test_float32_keeps_to_32_roundings():
    helpers.check_float32(make(3, 64), 257)


def test_float32_steps_too():
    layer = make(2, 64, dtype=torch.float32)
    double = make(2, 64)
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
    assert layer.kernel_matrix(helpers.random_input(layer, 2, 0))[0].shape[2:] == (0, 0)


def test_compiles_to_one_graph():
    helpers.check_compiles(make(2, 3), 5)


def test_second_derivatives():
    layer = make(2, 4)
    x = helpers.random_input(layer, 1, 4).requires_grad_()
    state = layer.init_state(1)
    C = layer.C.detach().clone().requires_grad_()

    def energy(x, C):
        y, last = torch.func.functional_call(layer, {"C": C}, (x, state))
        return y.square().sum() + last.h.abs().square().sum()

    assert torch.autograd.gradgradcheck(energy, (x, C))


def test_made_on_the_meta_device():
    layer = helpers.materialise(lambda: S4(3, 7))
    assert_close(layer.A_imag[0], layer.A_imag[2])
    assert_close(layer.A_imag[1], S4(1, 7).A_imag[0])
    steps = layer.log_dt.exp()
    assert ((steps >= 0.999e-3) & (steps <= 0.1001)).all()


def test_born_as_legs():
    layer = S4(1, 9, dtype=DOUBLE)
    A_bar, B_bar, _ = dense(layer.system())
    delta = float(layer.log_dt.detach().exp())
    A, B = hippo.make_hippo_matrix(9, DOUBLE), hippo.make_hippo_input(9, DOUBLE)
    V = paired(hippo.make_hippo_modes(9).V)
    expected = hippo.discretize_A(A, delta, "bilinear")
    assert_close((V @ A_bar[0] @ V.mH).detach(), expected.to(V.dtype))
    b = hippo.discretize_B(A, B, delta, "bilinear")
    assert_close((V @ B_bar[0]).detach(), b.to(V.dtype))


def test_parameters_of_the_system_learn_slowly_and_do_not_decay():
    layer = S4(3, 4)
    groups = param_groups(layer, lr=0.01, weight_decay=0.1)
    rates = {(g["lr"], g["weight_decay"]): len(g["params"]) for g in groups}
    assert rates == {(1e-3, 0.0): 5, (0.01, 0.1): 1, (0.01, 0.0): 1}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: S4(0), "d_model: got 0"),
        (lambda: S4(3, 0), "d_state: got 0"),
        (lambda: S4(3, dt_min=0.1, dt_max=0.01), r"dt_min, dt_max: got \(0.1, 0.01\)"),
        (lambda: S4(3)(torch.ones(2, 5, 4)), r"x: got shape \(2, 5, 4\)"),
        (lambda: S4(3)(torch.ones(2, 5, 3), S4(3).init_state(1)), "state: got"),
        (lambda: S4(3).step(torch.ones(2, 3), S4(3, 4).init_state(2)), "state: got"),
        (
            lambda: S4(3)(torch.ones(2, 5, 3), lengths=torch.tensor([6, 1])),
            r"lengths: got \[6, 1\]",
        ),
        (lambda: S4(3, backend="cuda")(torch.ones(2, 5, 3)), "backend: got 'cuda'"),
    ],
)
def test_bad_arguments_are_named(call, words):
    with pytest.raises(ArgumentError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
