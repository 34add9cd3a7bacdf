"""selective_scan_fn against mamba_ssm's documented semantics, all combinations."""

import itertools
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from ssm._errors import ArgumentError, BackendError
from ssm.ops._dispatch import Backend
from ssm.ops.selective_scan import BACKENDS, selective_scan, selective_scan_fn
from tests.ssm.helpers import assert_close

BATCH, D, L, N = 2, 4, 6, 3
Operands = dict[str, Tensor | None]


def oracle(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """mamba_ssm's ``selective_scan_ref`` from its documentation, a channel at a time.

    u, delta, z r(B D L); A c(D N) or r(D N); B, C c(D N) or r(D N), r(B N L) or
    r(B G N L), with 2L interleaved in place of L for complex A; y = 2 Re(C x) there.
    """
    wide = torch.complex128 if A.is_complex() else torch.float64

    def at(X: Tensor, d: int, t: int) -> Tensor:  # (B or 1, N) for channel d, step t
        X = X.to(torch.promote_types(X.dtype, torch.float64))
        if X.ndim == 2:
            return X[d].to(wide)[None]
        if X.ndim == 4:
            X = X[:, d * X.shape[1] // u.shape[1]]
        if A.is_complex():
            return torch.complex(X[:, :, 2 * t], X[:, :, 2 * t + 1])
        return X[:, :, t]

    outputs, states = [], []
    for d in range(u.shape[1]):
        x = torch.zeros(u.shape[0], A.shape[1], dtype=wide)
        row = []
        for t in range(u.shape[2]):
            step = delta[:, d, t].double()
            if delta_bias is not None:
                step = step + delta_bias[d]
            if delta_softplus:
                step = torch.where(step > 20, step, torch.exp(step).log1p())
            x = torch.exp(step[:, None] * A[d]) * x
            x = x + (step * u[:, d, t])[:, None] * at(B, d, t)
            out = (x * at(C, d, t)).sum(1)
            out = 2 * out.real if A.is_complex() else out
            if D is not None:
                out = out + D[d] * u[:, d, t]
            if z is not None:
                out = out * z[:, d, t] * torch.sigmoid(z[:, d, t])
            row.append(out)
        outputs.append(torch.stack(row, 1))
        states.append(x)
    y = torch.stack(outputs, 1).to(u.dtype)
    last = torch.stack(states, 1)
    return (y, last) if return_last_state else y


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype)


def operands(
    kind_b: str,
    kind_c: str,
    is_complex: bool,
    dtype: torch.dtype = torch.float64,
) -> Operands:
    number = torch.promote_types(dtype, torch.complex64) if is_complex else dtype
    width = 2 * L if is_complex else L

    def matrix(kind: str, seed: int) -> Tensor:
        shape = {
            "constant": (D, N),
            "variable": (BATCH, N, width),
            "groups": (BATCH, 2, N, width),
        }[kind]
        return random(seed, *shape, dtype=number if kind == "constant" else dtype)

    A = random(3, D, N, dtype=number)
    A = torch.complex(-A.real.abs(), 3 * A.imag) if is_complex else -A.abs()
    return {
        "u": random(1, BATCH, D, L, dtype=dtype),
        "delta": random(2, BATCH, D, L, dtype=dtype),
        "A": A,
        "B": matrix(kind_b, 4),
        "C": matrix(kind_c, 5),
        "D": random(6, D, dtype=dtype),
        "z": random(7, BATCH, D, L, dtype=dtype),
        "delta_bias": random(8, D, dtype=dtype),
    }


def time_first(name: str, X: Tensor | None, A: Tensor) -> Tensor | None:
    """An operand of selective_scan_fn as selective_scan takes it."""
    if X is None or X.ndim < 3:
        return X
    if name in "BC" and A.is_complex():
        X = torch.view_as_complex(X.unflatten(-1, (-1, 2)))
    return X.movedim(-1, 1)


def leaves(given: Operands) -> dict[str, Tensor]:
    return {
        name: x.detach().clone().requires_grad_()
        for name, x in given.items()
        if x is not None
    }


KINDS = ("constant", "variable", "groups")


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize(("kind_b", "kind_c"), list(itertools.product(KINDS, KINDS)))
def test_every_combination_has_the_documented_values_and_gradients(
    kind_b: str, kind_c: str, is_complex: bool
) -> None:
    """B, C constant, variable, in groups; z, D, bias, softplus, last state, complex."""
    full = operands(kind_b, kind_c, is_complex)
    switches = itertools.product([False, True], repeat=5)
    for with_d, with_z, with_bias, softplus, with_last in switches:
        absent = {
            name
            for name, there in {
                "D": with_d,
                "z": with_z,
                "delta_bias": with_bias,
            }.items()
            if not there
        }
        given = {n: x for n, x in full.items() if n not in absent}
        if not softplus:
            given["delta"] = given["delta"].abs()
            if with_bias:
                given["delta_bias"] = given["delta_bias"].abs()
        found = {}
        for name, function in (("ours", selective_scan_fn), ("oracle", oracle)):
            x = leaves(given)
            result = function(**x, delta_softplus=softplus, return_last_state=with_last)
            y, last = result if with_last else (result, None)
            loss = (y * random(9, *y.shape)).sum()
            if last is not None:
                loss = loss + (last * random(10, *last.shape)).abs().square().sum()
            found[name] = [y, *([last] if with_last else [])]
            found[name] += torch.autograd.grad(loss, list(x.values()))
        case = f"{sorted(given)} softplus={softplus} last={with_last}"
        for ours, theirs in zip(found["ours"], found["oracle"], strict=True):
            assert_close(ours.detach(), theirs.detach(), name=case)
        naive = selective_scan(
            **{n: time_first(n, t, full["A"]) for n, t in given.items()},
            delta_softplus=softplus,
            backend="naive",
        )
        assert_close(naive[0].mT, found["oracle"][0].detach(), name=f"naive {case}")


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_inputs_keep_their_dtype_and_a_float32_state(
    dtype: torch.dtype, is_complex: bool
) -> None:
    given = operands("variable", "groups", is_complex, torch.float32)
    given["u"], given["delta"], given["B"], given["C"], given["z"] = (
        given[n].to(dtype) for n in ("u", "delta", "B", "C", "z")
    )
    y, last = selective_scan_fn(**given, delta_softplus=True, return_last_state=True)
    expected, expected_last = oracle(
        **{
            n: x.to(torch.promote_types(x.dtype, torch.float64))
            for n, x in given.items()
        },
        delta_softplus=True,
        return_last_state=True,
    )
    assert y.dtype == dtype
    assert last.dtype == (torch.complex64 if is_complex else torch.float32)
    assert_close(y, expected)
    assert_close(last, expected_last)


def test_the_last_state_alone_is_differentiable() -> None:
    given = operands("variable", "variable", False)
    found = []
    for function in (selective_scan_fn, oracle):
        x = leaves(given)
        _, last = function(**x, delta_softplus=True, return_last_state=True)
        found.append(
            torch.autograd.grad(
                last.sin().sum(), [x[n] for n in ("u", "delta", "A", "B", "delta_bias")]
            )
        )
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("u", lambda x: x[0]),
        ("delta", lambda x: x[..., 1:]),
        ("z", lambda x: x.mT),
        ("B", lambda x: x[..., 1:]),
        ("B", lambda x: x.to(torch.complex128)),
        ("C", lambda x: x[:, [0, 0, 1]]),
    ],
)
def test_bad_operands_are_named(name: str, change) -> None:  # type: ignore[no-untyped-def]
    given = operands("variable", "groups", True)
    given[name] = change(given[name])
    with pytest.raises(ArgumentError, match=f"^{name}: got "):
        selective_scan_fn(**given)


@pytest.fixture
def mamba_ssm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle in place of the package, which runs on CUDA only."""
    module = ModuleType("mamba_ssm.ops.selective_scan_interface")
    module.selective_scan_fn = oracle  # type: ignore[attr-defined]
    for name in ("mamba_ssm", "mamba_ssm.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    entry = Backend(BACKENDS["mamba_ssm"].run)
    monkeypatch.setitem(BACKENDS, "mamba_ssm", entry)


@pytest.mark.usefixtures("mamba_ssm")
@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_mamba_ssm_backend_gets_its_layout(kind: str, is_complex: bool) -> None:
    given = operands(kind, kind, is_complex, torch.float32)
    x = {n: time_first(n, t, given["A"]) for n, t in given.items()}
    y, last = selective_scan(**x, delta_softplus=True, backend="mamba_ssm")
    expected, expected_last = selective_scan(**x, delta_softplus=True, backend="naive")
    assert_close(y, expected)
    assert_close(last.to(expected_last.dtype), expected_last)


@pytest.mark.usefixtures("mamba_ssm")
def test_the_mamba_ssm_backend_says_what_it_cannot_do() -> None:
    given = operands("variable", "variable", False, torch.float32)
    x = {n: time_first(n, t, given["A"]) for n, t in given.items()}
    with pytest.raises(BackendError, match="initial state"):
        selective_scan(**x, initial_state=torch.ones(BATCH, D, N), backend="mamba_ssm")
    with pytest.raises(BackendError, match="lengths"):
        selective_scan(**x, lengths=torch.tensor([1, 2]), backend="mamba_ssm")
    x["u"] = x["u"].requires_grad_()
    _, last = selective_scan(**x, backend="mamba_ssm")
    with pytest.raises(BackendError, match="gradient of the final state"):
        last.sum().backward()


def test_mamba_ssm_refuses_here_with_a_reason() -> None:
    given = operands("variable", "variable", False, torch.float32)
    x = {n: time_first(n, t, given["A"]) for n, t in given.items()}
    with pytest.raises(BackendError, match=r"not installed|runs on CUDA"):
        selective_scan(**x, backend="mamba_ssm")
