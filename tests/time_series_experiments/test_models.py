"""The clean model as matrix, recurrence and loss; the others by what they claim."""

import numpy as np
import pytest
import torch

from experiments.common import InputError, random_stream
from ssm.ops import linear_scan
from time_series_experiments._clean import quadratic
from time_series_experiments.data import Mixture, sample, toeplitz
from time_series_experiments.exp_synthetic_ndecay import impulse_matrix
from time_series_experiments.models import (
    MODELS,
    DiagLinear,
    build_regressor,
    check_represents,
    find_model,
    spread_decays,
)


def clean(S: int, N: int, outputs: int = 1) -> DiagLinear:
    generator = torch.Generator().manual_seed(3)
    model = DiagLinear(spread_decays(S, N, generator) * 1.9 - 0.95, outputs)
    with torch.no_grad():
        model.weights.normal_(generator=generator)
    return model


@pytest.mark.parametrize("T", [1, 2, 13])
def test_the_kernel_matrix_is_the_recurrence(T: int) -> None:
    model = clean(2, 3, outputs=2)
    x = torch.randn(2, 4, T, generator=torch.Generator().manual_seed(0)).double()
    for s in range(2):
        inputs = x[s][..., None].expand(4, T, 3)
        h, _ = linear_scan(model.decays[s].expand(4, T, 3), inputs.contiguous())
        expected = h @ model.weights[s].T
        torch.testing.assert_close(model(x)[s], expected, rtol=1e-12, atol=1e-13)


def test_the_kernel_is_a_sum_of_powers_with_finite_gradients_at_zero() -> None:
    model = clean(1, 3)
    with torch.no_grad():
        model.theta[0, 1] = 0.0
    kernel = model.kernel(6)[0, 0]
    a, w = model.decays[0].detach().numpy(), model.weights[0, 0].detach().numpy()
    expected = [sum(w[n] * a[n] ** j for n in range(3)) for j in range(6)]
    np.testing.assert_allclose(kernel.detach().numpy(), expected, rtol=1e-13)
    kernel.sum().backward()
    slope = w[1] * (1 - a[1] ** 2)  # of w a^1; every other power is flat at a = 0
    assert model.theta.grad is not None
    assert model.theta.grad[0, 1].item() == pytest.approx(slope, rel=1e-12)


def test_gradients_of_the_matrix_form_are_right() -> None:
    model = clean(2, 2)
    x = torch.randn(2, 2, 5, generator=torch.Generator().manual_seed(1)).double()

    def out(theta: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        values = {"theta": theta, "weights": weights}
        return torch.func.functional_call(model, values, (x,))

    assert torch.autograd.gradcheck(out, (model.theta, model.weights))


@pytest.mark.parametrize("n", [1, 40])
@pytest.mark.parametrize("T", [1, 2, 11])
def test_the_quadratic_is_the_training_loss_of_any_kernel(n: int, T: int) -> None:
    mixture = Mixture((0.9, -0.5), (1.0, 0.7), T, 0.1)
    x, y = sample(mixture, n, random_stream(0, "x"), random_stream(0, "noise"))
    loss = quadratic(x, y)
    for kernel in (mixture.kernel(), random_stream(0, "k").standard_normal(T)):
        direct = ((y - x @ toeplitz(kernel).T) ** 2).mean()
        assert loss(kernel) == pytest.approx(direct, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_models_are_causal_seeded_and_linear_where_they_say_so(name: str) -> None:
    sizes = {"N": 2, "d_model": 4, "outputs": 3}
    model = build_regressor(name, seed=1, **sizes).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # the clean model starts with weights 0
            parameter.add_(0.1)
        x = torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
        y = model(x)
        assert y.shape == (2, 9, 3)
        changed = x.clone()
        changed[:, 6:] += 1.0
        torch.testing.assert_close(model(changed)[:, :6], y[:, :6])
        assert not torch.allclose(model(changed)[:, 6:], y[:, 6:], atol=1e-4)
        both = model(2.0 * x[:1] + x[1:])
        is_linear = torch.allclose(both, 2.0 * y[:1] + y[1:], atol=1e-4)
        assert is_linear == find_model(name).linear
        if is_linear:
            matrix = impulse_matrix(model, 9)
            own = x.double().numpy() @ matrix.T
            np.testing.assert_allclose(own, y[..., 0].numpy(), atol=1e-5)


def test_weights_come_from_the_seed_alone() -> None:
    def weights(seed: int) -> torch.Tensor:
        model = build_regressor("mamba", N=2, d_model=4, outputs=1, seed=seed)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    first = weights(5)
    torch.rand(3)
    assert torch.equal(first, weights(5))
    assert not torch.equal(first, weights(6))


def test_decays_start_spread_over_their_interval() -> None:
    decays = spread_decays(50, 4, torch.Generator().manual_seed(0))
    for n in range(4):
        assert (decays[:, n] > n / 4).all()
        assert (decays[:, n] < (n + 1) / 4).all()


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(InputError, match="did you mean mamba_diag_exp"):
        find_model("mamba_diag")
    with pytest.raises(InputError, match="choose one of ssm_diag_linear"):
        check_represents("mamba_diag_exp", (0.9, -0.5))
    check_represents("ssm_diag_linear", (0.9, -0.5))
    check_represents("mamba_diag_exp", (0.9, 0.0))
    with pytest.raises(InputError, match="N: got 0"):
        build_regressor("rnn", N=0, d_model=4, outputs=1, seed=0)
