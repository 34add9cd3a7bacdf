"""ssd against its loop in float64: values, states and every gradient."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from ssm._errors import ArgumentError
from ssm.ops._dispatch import backends_used
from ssm.ops.ssd import BACKENDS, ssd, ssd_step
from ssm.ops.ssd.naive import ssd_numpy
from tests.ssm.helpers import assert_close

FAST = [name for name, b in BACKENDS.items() if name != "naive" and not b.gpu]
SIZES = {"B": 2, "H": 6, "P": 5, "G": 2, "N": 7}


def operands(
    L: int, dtype: torch.dtype = torch.float64, *, wide_D: bool = False
) -> dict[str, Tensor]:
    """Every operand of a call, signed, sizes odd, steps 0 and long ones included."""
    generator = torch.Generator().manual_seed(L)
    B, H, P, G, N = SIZES.values()

    def normal(*shape: int) -> Tensor:
        x = torch.randn(*shape, generator=generator, dtype=torch.complex128)
        return x if dtype.is_complex else x.real.clone()

    dt = normal(B, L, H).real
    dt[:, 3::11] = 40  # beyond the threshold of softplus
    dt[:, 5::11] = -40
    everything = {
        "x": normal(B, L, H, P),
        "dt": dt,
        "A": -normal(H).abs() if not dtype.is_complex else -0.2 + 1j * normal(H).real,
        "B": normal(B, L, G, N),
        "C": normal(B, L, G, N),
        "D": normal(H, P) if wide_D else normal(H),
        "z": normal(B, L, H, P).real,
        "dt_bias": normal(H).real,
        "initial_state": normal(B, H, P, N),
    }
    return {
        name: t.to(dtype if t.is_complex() or not dtype.is_complex else t.dtype)
        for name, t in everything.items()
    }


def call(inputs: dict[str, Tensor], **options: object) -> tuple[Tensor, ...]:
    core = [inputs[n] for n in ("x", "dt", "A", "B", "C")]
    rest = {n: t for n, t in inputs.items() if n not in ("x", "dt", "A", "B", "C")}
    return ssd(*core, **rest, **{"dt_softplus": True, **options})


def with_gradients(
    inputs: dict[str, Tensor], *, final_only: bool = False, **options: object
) -> dict[str, Tensor]:
    """y, the final state and the gradient of every operand for one fixed loss."""
    leaves = {n: t.detach().requires_grad_() for n, t in inputs.items()}
    y, final = call(leaves, **options)
    weight = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).reshape(y.shape)
    loss = final.abs().pow(2).sum()
    if not final_only:
        loss = loss + (y * weight.to(y.real.dtype)).real.sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    named = zip((f"d{n}" for n in leaves), grads, strict=True)
    return {"y": y.detach(), "final": final.detach(), **dict(named)}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in actual.items():
        assert_close(value, expected[name], name=name)


def widened(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        n: t.to(torch.promote_types(t.dtype, torch.float64)) for n, t in inputs.items()
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("wide_D", [False, True])
def test_the_loops_agree(dtype, wide_D):
    """The PyTorch loop with its skip, gate, bias and limits against NumPy's core."""
    inputs = operands(13, dtype, wide_D=wide_D)
    y, final = call(inputs, backend="naive", dt_limit=(0.1, 2.0))
    dt = softplus(inputs["dt"] + inputs["dt_bias"]).clamp(0.1, 2.0)
    core = [inputs["x"], dt, *(inputs[n] for n in ("A", "B", "C", "initial_state"))]
    core_y, core_final = ssd_numpy(*(t.numpy() for t in core))
    D = inputs["D"] if wide_D else inputs["D"][:, None]
    expected = (torch.from_numpy(core_y) + D * inputs["x"]) * silu(inputs["z"])
    assert_close(y, expected)
    assert_close(final, torch.from_numpy(core_final))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.complex128])
def test_values_and_gradients(backend, dtype):
    for L, chunk_size in ((1, 64), (63, 1), (64, 7), (65, 16), (101, 512)):
        inputs = operands(L, dtype, wide_D=L == 63)
        for final_only in (False, True)[: 2 if L == 65 else 1]:
            kwargs = {"chunk_size": chunk_size, "final_only": final_only}
            fast = with_gradients(inputs, backend=backend, **kwargs)
            slow = with_gradients(widened(inputs), backend="naive", **kwargs)
            assert_same(fast, slow)


@pytest.mark.parametrize("backend", FAST)
def test_without_options_and_with_groups_shared_by_all_heads(backend):
    everything = operands(21)
    plain = {n: everything[n] for n in ("x", "A", "B", "C")}
    plain["dt"] = everything["dt"].abs()
    for G in (1, 2):
        inputs = {**plain, "B": plain["B"][:, :, :G], "C": plain["C"][:, :, :G]}
        kwargs = {"dt_softplus": False, "dt_limit": (0.2, 1.5)}
        fast = with_gradients(inputs, backend=backend, **kwargs)
        assert_same(fast, with_gradients(inputs, backend="naive", **kwargs))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("chunk_size", [1, 32, 512])
def test_extreme_log_decays(backend, chunk_size):
    """dt = 1, so that A is the log-decay: 0, almost 0, and far below underflow."""
    inputs = operands(35, torch.float32)
    del inputs["dt_bias"]
    inputs["dt"] = torch.ones_like(inputs["dt"])
    kinds = torch.tensor([0.0, -1e-6, -50.0, -1e4, -1e-3, -1.0])
    for A in (kinds, *(torch.full_like(kinds, k) for k in kinds[:4])):
        inputs["A"] = A
        kwargs = {"dt_softplus": False, "chunk_size": chunk_size}
        fast = with_gradients(inputs, backend=backend, **kwargs)
        slow = with_gradients(widened(inputs), backend="naive", **kwargs)
        tiny = torch.finfo(torch.float32).tiny
        for name, value in slow.items():
            if value.abs().max() < tiny:  # underflows
                assert fast[name].abs().max() <= tiny, name
            else:
                assert_close(fast[name], value, name=name)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_state_in_float32(backend, dtype):
    inputs = operands(65, dtype)
    for name in ("A", "D", "dt_bias"):  # as models keep them; float16 overflows at dA
        inputs[name] = inputs[name].float()
    fast = with_gradients(inputs, backend=backend)
    slow = with_gradients(widened(inputs), backend="naive")
    assert (fast["y"].dtype, fast["final"].dtype) == (dtype, torch.float32)
    assert_close(fast["final"], slow["final"])
    for name, value in fast.items():
        assert_close(value, slow[name], name=name, dtype=dtype)


@pytest.mark.parametrize("backend", FAST)
def test_continuation_at_any_split_and_states_at(backend):
    inputs = operands(65)
    timed = ("x", "dt", "B", "C", "z")
    y, final = call(inputs, backend=backend)
    for cut in (0, 1, 31, 64, 65):
        state, parts = inputs["initial_state"], []
        for piece in (slice(0, cut), slice(cut, 65)):
            cuts = {n: t[:, piece] if n in timed else t for n, t in inputs.items()}
            part, state = call({**cuts, "initial_state": state}, backend=backend)
            parts.append(part)
        assert_close(torch.cat(parts, 1), y)
        assert_close(state, final)
    *whole, states = call(inputs, backend=backend, states_at=[64, 0, 30])
    assert_close(whole[0], y)
    assert_close(states[:, 0], final)
    state = inputs["initial_state"]
    for t in range(31):
        at = {n: x[:, t] if n in timed else x for n, x in inputs.items()}
        core = [at[n] for n in ("x", "dt", "A", "B", "C")]
        before = state.clone()
        options = {n: at[n] for n in ("D", "z", "dt_bias")}
        y_t, following = ssd_step(*core, state, dt_softplus=True, **options)
        assert torch.equal(state, before)
        state = following
        assert_close(y_t, y[:, t])
        if t == 0:
            assert_close(states[:, 1], state)
    assert_close(states[:, 2], state)


@pytest.mark.parametrize("backend", [*FAST, "naive"])
def test_padding_is_as_if_it_were_not_there(backend):
    """The bias and softplus make a step of padding: it must be 0 after them."""
    inputs = operands(21)
    timed = ("x", "dt", "B", "C", "z")
    lengths = torch.tensor([21, 8])
    for name in timed:
        inputs[name][1, 8:] = torch.nan
    padded = with_gradients(inputs, lengths=lengths, backend=backend)
    for row, n in enumerate(lengths.tolist()):
        alone = {
            k: t[row : row + 1, :n] if k in timed else t for k, t in inputs.items()
        }
        alone["initial_state"] = inputs["initial_state"][row : row + 1]
        y, final = call(alone, backend=backend)
        assert_close(padded["y"][row : row + 1, :n], y)
        assert_close(padded["final"][row : row + 1], final)
    for name, value in padded.items():
        assert value.isfinite().all(), name
        if name in ("y", *(f"d{n}" for n in timed)):
            assert (value[1, 8:] == 0).all(), name


@pytest.mark.parametrize("backend", FAST)
def test_packed_sequences_equal_each_alone(backend):
    inputs = operands(23)
    timed = ("x", "dt", "B", "C", "z")
    bounds = [0, 9, 9, 10, 23]
    h0 = torch.randn(4, 6, 5, 7, dtype=torch.float64)
    packed = {n: t[:1] if n in timed else t for n, t in inputs.items()}
    y, final, states = call(
        {**packed, "initial_state": h0},
        cu_seqlens=torch.tensor(bounds),
        states_at=[8],
        backend=backend,
    )
    for i, (start, stop) in enumerate(itertools.pairwise(bounds)):
        row = {n: t[:, start:stop] if n in timed else t for n, t in packed.items()}
        row["initial_state"] = h0[i : i + 1]
        y_row, final_row = call(row, backend="naive")
        assert_close(y[:, start:stop], y_row)
        assert_close(final[i : i + 1], final_row)
    assert_close(states[0, 0], final[0])


@pytest.mark.parametrize("backend", FAST)
def test_compiled_equals_eager(backend):
    inputs = {n: t.requires_grad_() for n, t in operands(9).items()}
    leaves = list(inputs.values())

    def run(*leaves: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(inputs, leaves, strict=True))
        y, final = call(given, chunk_size=4, backend=backend)
        return y, final, y.pow(2).sum() + final.sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for fast, slow in zip(compiled(*leaves), run(*leaves), strict=True):
        assert_close(fast.detach(), slow.detach())
    pair = [torch.autograd.grad(f(*leaves)[2], leaves) for f in (compiled, run)]
    for fast, slow in zip(*pair, strict=True):
        assert_close(fast, slow)


@pytest.mark.parametrize("backend", FAST)
def test_two_runs_are_bit_equal(backend):
    inputs = operands(65, torch.float32)
    first, second = (with_gradients(inputs, backend=backend) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_second_derivatives_on_the_reference_and_in_torch():
    torch.manual_seed(0)
    x, dt = torch.randn(1, 4, 1, 2).double(), torch.rand(1, 4, 1).double()
    B, C = torch.randn(2, 1, 4, 1, 2).double().unbind()
    inputs = [t.requires_grad_() for t in (x, dt, torch.tensor([-0.7]).double(), B, C)]
    for backend in ("naive", "torch"):
        assert torch.autograd.gradgradcheck(
            lambda *x, b=backend: ssd(*x, chunk_size=2, backend=b)[0], inputs
        )


def test_memory_is_the_states_between_groups(monkeypatch):
    """What is saved per group is no Q x Q matrix: only inputs, outputs and states."""
    monkeypatch.setattr("ssm.ops._segments._ELEMENTS", 1)  # one chunk a group
    inputs = operands(64)
    leaves = {n: t.requires_grad_() for n, t in inputs.items()}
    saved: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        call(leaves, chunk_size=16)
    B, H, P, _, N = SIZES.values()
    states = 5 * B * H * P * N * 8
    given = sum(t.numel() * 8 for t in leaves.values())
    assert sum(saved.values()) <= given + states + 3 * 64 * B * H * 8  # dt thrice


def test_no_steps_no_rows_and_strides():
    inputs = operands(4)
    timed = ("x", "dt", "B", "C", "z")
    empty = {n: t[:, :0] if n in timed else t for n, t in inputs.items()}
    y, final = call(empty)
    assert y.shape == (2, 0, 6, 5)
    assert torch.equal(final, inputs["initial_state"])
    no_rows = (*timed, "initial_state")
    none = {n: t[:0] if n in no_rows else t for n, t in inputs.items()}
    assert call(none)[0].shape == (0, 4, 6, 5)
    strided = {
        n: t.transpose(0, -1).contiguous().transpose(0, -1) for n, t in inputs.items()
    }
    assert not strided["x"].is_contiguous()
    assert_same(with_gradients(strided), with_gradients(inputs, backend="naive"))


def test_the_choice_is_visible():
    with backends_used() as names:
        call(operands(3))
    assert names == {"ssd=torch"}
    with pytest.raises(ArgumentError, match="backend: got 'fast'"):
        call(operands(3), backend="fast")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x", lambda kw: kw.update(x=kw["x"][0])),
        ("x", lambda kw: kw.update(x=kw["x"].long())),
        ("dt", lambda kw: kw.update(dt=kw["dt"][:, :2])),
        ("dt", lambda kw: kw.update(dt=kw["dt"] + 0j)),
        ("A", lambda kw: kw.update(A=kw["A"][:2])),
        ("B", lambda kw: kw.update(B=kw["B"][:1])),
        ("C", lambda kw: kw.update(C=kw["C"][..., :2])),
        ("B, C", lambda kw: kw.update({n: kw[n].repeat(1, 1, 2, 1) for n in "BC"})),
        ("D", lambda kw: kw.update(D=kw["D"][:2])),
        ("z", lambda kw: kw.update(z=kw["z"].to("meta"))),
        ("dt_bias", lambda kw: kw.update(dt_bias=kw["dt_bias"][:2])),
        ("initial_state", lambda kw: kw.update(initial_state=torch.zeros(1))),
        ("chunk_size", lambda kw: kw.update(chunk_size=0)),
        ("states_at", lambda kw: kw.update(states_at=[-1])),
        ("lengths", lambda kw: kw.update(lengths=torch.tensor([5, 1]))),
        ("cu_seqlens", lambda kw: kw.update(cu_seqlens=torch.tensor([0, 4]))),
    ],
)
def test_bad_arguments_are_named(name, change):
    kwargs = operands(4)
    change(kwargs)
    with pytest.raises(ArgumentError, match=rf"(?s)^{name}: got .*; expected .*; "):
        ssd(**kwargs)


def test_values_are_checked_where_asked():
    inputs = operands(4)
    call({**inputs, "A": inputs["A"].abs()})
    with pytest.raises(ArgumentError, match="A: got a positive value"):
        call({**inputs, "A": inputs["A"].abs()}, check_domain=True)
    with pytest.raises(ArgumentError, match="dt: got a negative value"):
        call(inputs, check_domain=True, dt_softplus=False)
    inputs["x"][0, 3:] = torch.nan
    with pytest.raises(ArgumentError, match=r"x: got nan at index \(0, 3, 0, 0\)"):
        call(inputs, check_domain=True)
    call(inputs, check_domain=True, lengths=torch.tensor([3, 4]))  # only padding
