"""diagonal_ssd against its loop in float64: values, states and every gradient."""

import itertools

import pytest
import torch
from torch import Tensor

from ssm._errors import ArgumentError, BackendError
from ssm.ops._dispatch import backends_used
from ssm.ops.diagonal_ssd import BACKENDS, diagonal_ssd, diagonal_ssd_step
from ssm.ops.diagonal_ssd.naive import diagonal_ssd_numpy
from ssm.ops.ssd import ssd
from tests.ssm.helpers import assert_close

FAST = [name for name, b in BACKENDS.items() if name != "naive" and not b.gpu]
NAMES = ("q", "k", "v", "decays", "initial_state")


def operands(
    L: int, *, log: bool, scalar: bool = False, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Signed q, k, v, decays and a state; sizes odd, decays of every legal kind."""
    generator = torch.Generator().manual_seed(L)
    B, H, K, V = 2, 3, 7, 5

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.complex128)

    decays = 0.7 * normal(B, L, H, 1 if scalar else K)
    if not dtype.is_complex:
        decays = decays.real + 0j
    if log:
        decays = torch.complex(-decays.real.abs(), decays.imag)
        decays[:, 3::11] = -50
        decays[:, 5::11] = -1e-6
    else:
        decays[:, 3::11] = 0
        decays[:, 5::11] = -1
        decays[:, 7::11] = 1
        decays[:, 9::11] = 1e-30
    shapes = [(B, L, H, K), (B, L, H, K), (B, L, H, V)]
    everything = [*(normal(*s) for s in shapes), decays, normal(B, H, K, V)]
    if not dtype.is_complex:
        everything = [x.real for x in everything]
    return [x.to(dtype) for x in everything]


def call(inputs: list[Tensor], log: bool, **options: object) -> tuple[Tensor, ...]:
    q, k, v, decays, h0 = inputs
    name = "log_a" if log else "a"
    return diagonal_ssd(q, k, v, **{name: decays}, initial_state=h0, **options)


def with_gradients(
    inputs: list[Tensor], log: bool, *, final_only: bool = False, **options: object
) -> dict[str, Tensor]:
    """y, the final state and the gradient of every operand for one fixed loss."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    y, final = call(leaves, log, **options)
    weight = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).reshape(y.shape)
    loss = final.abs().pow(2).sum()
    if not final_only:
        loss = loss + (y * weight.to(y.real.dtype)).real.sum()
    grads = torch.autograd.grad(loss, leaves, materialize_grads=True)
    named = zip((f"d{n}" for n in NAMES), grads, strict=True)
    return {"y": y.detach(), "final": final.detach(), **dict(named)}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in actual.items():
        reference = expected[name]
        if reference.abs().max() < torch.finfo(value.dtype).tiny:  # underflows
            assert value.abs().max() <= torch.finfo(value.dtype).tiny, name
        else:
            assert_close(value, reference, name=name)


def widened(inputs: list[Tensor]) -> list[Tensor]:
    return [x.to(torch.promote_types(x.dtype, torch.float64)) for x in inputs]


def served(*dtypes: torch.dtype) -> list[tuple[str, torch.dtype]]:
    """The fast backends with the dtypes that each serves: only cpu refuses complex."""
    return [(b, d) for b in FAST for d in dtypes if b == "torch" or not d.is_complex]


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("scalar", [False, True])
def test_the_loops_agree(log, scalar):
    inputs = operands(13, log=log, scalar=scalar, dtype=torch.complex128)
    y, final = call(inputs, log, backend="naive")
    q, k, v, decays, h0 = (x.numpy() for x in inputs)
    a = inputs[3].exp().numpy() if log else decays
    for actual, expected in zip(
        (y, final), diagonal_ssd_numpy(q, k, v, a, h0), strict=True
    ):
        assert_close(actual, torch.from_numpy(expected))


@pytest.mark.parametrize(
    ("backend", "dtype"), served(torch.float64, torch.float32, torch.complex128)
)
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("scalar", [False, True])
def test_values_and_gradients(backend, dtype, log, scalar):
    for L, chunk_size in ((1, 64), (63, 1), (64, 7), (65, 16), (101, 512)):
        inputs = operands(L, log=log, scalar=scalar, dtype=dtype)
        for final_only in (False, True)[: 2 if L == 65 else 1]:
            kwargs = {"chunk_size": chunk_size, "final_only": final_only}
            fast = with_gradients(inputs, log, backend=backend, **kwargs)
            assert_same(
                fast, with_gradients(widened(inputs), log, backend="naive", **kwargs)
            )


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 32, 512])
def test_extreme_log_decays(backend, scalar, chunk_size):
    inputs = operands(35, log=True, scalar=scalar, dtype=torch.float32)
    kinds = torch.tensor([0.0, -1e-6, -50.0, -1e4, -torch.inf])
    mixed = kinds[torch.arange(inputs[3].numel()) * 7 % 5].reshape(inputs[3].shape)
    for decays in (*(torch.full_like(mixed, k) for k in kinds), mixed):
        extreme = [*inputs[:3], decays, inputs[4]]
        fast = with_gradients(extreme, True, backend=backend, chunk_size=chunk_size)
        slow = with_gradients(widened(extreme), True, backend="naive")
        assert_same(fast, slow)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_state_in_float32(backend, dtype):
    inputs = operands(65, log=True, dtype=dtype)
    y, final = call([*inputs[:4], inputs[4].float()], True, backend=backend)
    exact_y, exact_final = call(widened(inputs), True, backend="naive")
    assert (y.dtype, final.dtype) == (dtype, torch.float32)
    assert_close(y, exact_y)
    assert_close(final, exact_final)
    grads = with_gradients(inputs, True, backend=backend)
    exact = with_gradients(widened(inputs), True, backend="naive")
    assert_same({n: grads[n].to(dtype) for n in grads}, exact)


@pytest.mark.parametrize("backend", FAST)
def test_continuation_at_any_split_and_states_at(backend):
    inputs = operands(65, log=False)
    q, k, v, a, h0 = inputs
    y, final = call(inputs, False, backend=backend)
    for cut in (0, 1, 31, 64, 65):
        state, parts = h0, []
        for piece in (slice(0, cut), slice(cut, 65)):
            part, state = diagonal_ssd(
                *(x[:, piece] for x in (q, k, v, a)),
                initial_state=state,
                backend=backend,
            )
            parts.append(part)
        assert_close(torch.cat(parts, 1), y)
        assert_close(state, final)
    *whole, states = call(inputs, False, backend=backend, states_at=[64, 0, 30])
    assert_close(whole[0], y)
    assert_close(states[:, 0], final)
    state = h0
    for t in range(31):
        y_t, state = diagonal_ssd_step(q[:, t], k[:, t], v[:, t], a[:, t], state)
        assert_close(y_t, y[:, t])
        if t == 0:
            assert_close(states[:, 1], state)
    assert_close(states[:, 2], state)


@pytest.mark.parametrize("backend", [*FAST, "naive"])
@pytest.mark.parametrize("log", [False, True])
def test_padding_is_as_if_it_were_not_there(backend, log):
    inputs = operands(21, log=log)
    lengths = torch.tensor([21, 8])
    for x in inputs[:4]:
        x[1, 8:] = torch.nan
    padded = with_gradients(inputs, log, lengths=lengths, backend=backend)
    for row, n in enumerate(lengths.tolist()):
        alone = [
            *(x[row : row + 1, :n] for x in inputs[:4]),
            inputs[4][row : row + 1],
        ]
        y, final = call(alone, log, backend=backend)
        assert_close(padded["y"][row : row + 1, :n], y)
        assert_close(padded["final"][row : row + 1], final)
    for name, value in padded.items():
        assert value.isfinite().all(), name
        if name not in ("final", "dinitial_state"):
            assert (value[1, 8:] == 0).all(), name


@pytest.mark.parametrize("backend", FAST)
def test_packed_sequences_equal_each_alone(backend):
    inputs = operands(23, log=False)
    sequences = [x[:1] for x in inputs[:4]]
    bounds = [0, 9, 9, 10, 23]
    h0 = torch.randn(4, 3, 7, 5, dtype=torch.float64)
    packed = [*sequences, h0]
    y, final, states = call(
        packed,
        False,
        cu_seqlens=torch.tensor(bounds),
        states_at=[8],
        backend=backend,
    )
    for i, (start, stop) in enumerate(itertools.pairwise(bounds)):
        row = [*(x[:, start:stop] for x in sequences), h0[i : i + 1]]
        y_row, final_row = call(row, False, backend="naive")
        assert_close(y[:, start:stop], y_row)
        assert_close(final[i : i + 1], final_row)
    assert_close(states[0, 0], final[0])


def test_one_decay_a_head_is_mamba2():
    q, k, v, log_a, h0 = operands(65, log=True, scalar=True)
    y, final = call([q, k, v, log_a, h0], True, chunk_size=16)
    ones = torch.ones(q.shape[2], dtype=torch.float64)
    # dt enters Mamba-2's input too: divide it out
    dt = -log_a[..., 0]
    y_2, final_2 = ssd(v / dt[..., None], dt, -ones, k, q, initial_state=h0.mT)
    assert_close(y, y_2)
    assert_close(final, final_2.mT)
    wide = log_a.expand_as(q)
    assert_close(y, call([q, k, v, wide, h0], True, chunk_size=16)[0])


@pytest.mark.parametrize("backend", FAST)
def test_compiled_equals_eager(backend):
    torch.manual_seed(0)
    inputs = [x.requires_grad_() for x in operands(9, log=True)]

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        y, final = call(list(inputs), True, chunk_size=4, backend=backend)
        loss = y.pow(2).sum() + final.sum()
        return y, final, loss

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for fast, slow in zip(compiled(*inputs), run(*inputs), strict=True):
        assert_close(fast.detach(), slow.detach())
    pair = [torch.autograd.grad(f(*inputs)[2], inputs) for f in (compiled, run)]
    for fast, slow in zip(*pair, strict=True):
        assert_close(fast, slow)


@pytest.mark.parametrize("backend", FAST)
def test_two_runs_are_bit_equal(backend):
    inputs = operands(65, log=True, dtype=torch.float32)
    first, second = (with_gradients(inputs, True, backend=backend) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_second_derivatives_on_the_reference_and_in_torch():
    torch.manual_seed(0)
    small = [torch.randn(1, 4, 1, n, dtype=torch.float64) for n in (2, 2, 1)]
    a = torch.tensor([0.5, 0.0, -1.0, 0.3], dtype=torch.float64).reshape(1, 4, 1, 1)
    inputs = [x.requires_grad_() for x in (*small, a)]
    for backend in ("naive", "torch"):
        assert torch.autograd.gradgradcheck(
            lambda *x, b=backend: diagonal_ssd(*x, chunk_size=2, backend=b)[0], inputs
        )


@pytest.mark.parametrize("name", sorted({*FAST} - {"torch"}))
def test_a_backend_without_second_derivatives_says_so(name):
    inputs = [x.requires_grad_() for x in operands(3, log=False)]
    y, _ = call(inputs, False, backend=name)
    (grad,) = torch.autograd.grad(y.pow(2).sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="backend='naive'"):
        grad.sum().backward()


def test_no_steps_no_rows_and_strides():
    q, k, v, a, h0 = operands(4, log=False)
    y, final = diagonal_ssd(q[:, :0], k[:, :0], v[:, :0], a[:, :0], initial_state=h0)
    assert y.shape == (2, 0, 3, 5)
    assert torch.equal(final, h0)
    y, final = diagonal_ssd(q[:0], k[:0], v[:0], a[:0])
    assert (y.shape, final.shape) == ((0, 4, 3, 5), (0, 3, 7, 5))
    strided = [
        x.transpose(1, 3).contiguous().transpose(1, 3).requires_grad_()
        for x in (q, k, v, a)
    ]
    assert not strided[0].is_contiguous()
    expected = with_gradients([q, k, v, a, h0], False, backend="naive")
    assert_same(with_gradients([*strided, h0], False), expected)


def test_the_choice_is_visible_and_refusals_give_reasons():
    for dtype, expected in ((torch.complex64, "torch"), (torch.float32, "cpu")):
        inputs = operands(3, log=True, dtype=dtype)
        with backends_used() as names:
            call(inputs, True)
        assert names == {f"diagonal_ssd={expected}"}
    with pytest.raises(ArgumentError, match="backend"):
        call(inputs, True, backend="fast")
    with pytest.raises(BackendError, match="'cpu' cannot run: it computes in float32"):
        call(operands(3, log=True, dtype=torch.complex64), True, backend="cpu")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("a, log_a", lambda kw: kw.pop("a")),
        ("a, log_a", lambda kw: kw.update(log_a=kw["a"])),
        ("k", lambda kw: kw.update(k=kw["k"][..., :3])),
        ("v", lambda kw: kw.update(v=kw["v"][:, :2])),
        ("a", lambda kw: kw.update(a=kw["a"][..., :2])),
        ("q", lambda kw: kw.update(q=kw["q"].long())),
        ("v", lambda kw: kw.update(v=kw["v"].to("meta"))),
        ("initial_state", lambda kw: kw.update(initial_state=torch.zeros(1))),
        ("chunk_size", lambda kw: kw.update(chunk_size=0)),
        ("states_at", lambda kw: kw.update(states_at=[4])),
        ("lengths", lambda kw: kw.update(lengths=torch.tensor([5, 1]))),
        ("cu_seqlens", lambda kw: kw.update(cu_seqlens=torch.tensor([0, 4]))),
    ],
)
def test_bad_arguments_are_named(name, change):
    q, k, v, a, _ = operands(4, log=False)
    kwargs = {"q": q, "k": k, "v": v, "a": a}
    change(kwargs)
    with pytest.raises(ArgumentError, match=rf"(?s)^{name}.*: got .*; expected .*; "):
        diagonal_ssd(**kwargs)


def test_values_are_checked_where_asked():
    q, k, v, a, _ = operands(4, log=False)
    q[0, 1, 2, 3] = torch.nan
    diagonal_ssd(q, k, v, a)
    with pytest.raises(ArgumentError, match=r"q: got nan at index \(0, 1, 2, 3\)"):
        diagonal_ssd(q, k, v, a, check_domain=True)
    with pytest.raises(ArgumentError, match="log_a: got"):
        diagonal_ssd(k, k, v, log_a=a.abs() + 1, check_domain=True)
    log_a = torch.full_like(k, -torch.inf)
    diagonal_ssd(k, k, v, log_a=log_a, check_domain=True)
    a[0, 3:] = torch.nan  # on the padding nothing is looked at
    lengths = torch.tensor([3, 4])
    diagonal_ssd(k, k, v, a, lengths=lengths, check_domain=True)
