"""One step of the selective scan against the scan of one step."""

from functools import partial

import pytest
import torch
from torch import Tensor

from ssm._errors import ArgumentError
from ssm.ops.selective_scan import selective_scan, selective_state_update
from tests.ssm.ops.helpers import check_compiled, check_same, outcome, random

BATCH, D, N = 3, 6, 5
update = partial(selective_state_update, delta_softplus=True)


def operands(is_complex: bool = False, kind: str = "shared") -> dict[str, Tensor]:
    shape = {"shared": (BATCH, N), "groups": (BATCH, 2, N), "constant": (D, N)}[kind]
    x = {
        "state": random(BATCH, D, N, seed=1),
        "u": random(BATCH, D, seed=2),
        "delta": random(BATCH, D, seed=3),
        "A": -random(D, N, seed=4).abs(),
        "B": random(*shape, seed=5),
        "C": random(BATCH, N, seed=6),
        "D": random(D, seed=7),
        "z": random(BATCH, D, seed=8),
        "delta_bias": random(D, seed=9),
    }
    if is_complex:
        for name in ("A", "B", "state"):
            x[name] = torch.complex(x[name], random(*x[name].shape, seed=10))
    return x


def one_step_scan(**x: Tensor) -> tuple[Tensor, Tensor]:
    """The same by the reference: a sequence of one step."""
    state, varying = x.pop("state"), ("u", "delta", "z", "B", "C")
    in_time = {n: x[n][:, None] for n in varying if n in x and x[n].shape[0] == BATCH}
    y, final = selective_scan(
        **(x | in_time), delta_softplus=True, initial_state=state, backend="naive"
    )
    return y[:, 0], final


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("kind", ["shared", "groups", "constant"])
def test_a_step_is_a_scan_of_one_step(kind: str, is_complex: bool) -> None:
    x = operands(is_complex, kind)
    for absent in ((), ("D", "z"), ("delta_bias",)):
        given = {n: t for n, t in x.items() if n not in absent}
        check_same(outcome(update, given), outcome(one_step_scan, given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_state_is_float32_at_least_and_not_changed(dtype: torch.dtype) -> None:
    x = {n: t.to(dtype) for n, t in operands().items()}
    before = x["state"].clone()
    y, state = update(**x)
    assert (y.dtype, state.dtype) == (dtype, torch.float32)
    assert torch.equal(x["state"], before)


def test_steps_are_the_scan() -> None:
    L, x = 7, operands()
    u, delta, z = (random(BATCH, L, D, seed=s) for s in (20, 21, 22))
    B, C = (random(BATCH, L, N, seed=s) for s in (23, 24))
    h, ys = x["state"], []
    system = {n: x[n] for n in ("A", "D", "delta_bias")}
    for t in range(L):
        y, h = update(
            h, u[:, t], delta[:, t], B=B[:, t], C=C[:, t], z=z[:, t], **system
        )
        ys.append(y)
    y, final = selective_scan(
        u,
        delta,
        B=B,
        C=C,
        z=z,
        **system,
        delta_softplus=True,
        initial_state=x["state"],
    )
    check_same({"y": torch.stack(ys, 1), "h": h}, {"y": y, "h": final})


def test_compiled_in_one_graph() -> None:
    check_compiled(update, operands(kind="groups"))


def test_where_batch_equals_channels_two_dimensions_are_refused() -> None:
    """(batch, N) or (D, N)? Either guess would be silently wrong for someone."""
    x = operands()
    square = {
        n: t[:, :BATCH] if n in ("u", "delta", "z", "state") else t
        for n, t in x.items()
    }
    square |= {n: x[n][:BATCH] for n in ("A", "D", "delta_bias")}
    with pytest.raises(ArgumentError, match=r"^B: got .*B\[:, None\]"):
        update(**square)
    three = square | {"B": x["B"][:, None], "C": x["C"][:, None]}
    row = {
        n: t[1:2] if n not in ("A", "D", "delta_bias") else t for n, t in square.items()
    }
    check_same(
        {"y": update(**three)[0][1:2]},
        {"y": update(**row)[0]},
    )


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("u", lambda t: t[0]),
        ("delta", lambda t: t[:, 1:]),
        ("z", lambda t: t[1:]),
        ("A", lambda t: t[1:]),
        ("B", lambda t: t[..., 1:]),
        ("state", lambda t: t.mT),
    ],
)
def test_bad_arguments_are_named(name: str, change) -> None:  # type: ignore[no-untyped-def]
    x = operands()
    with pytest.raises(ArgumentError, match=f"^{name}: got "):
        update(**(x | {name: change(x[name])}))
