"""The matrix scan against the float64 loop over time."""

import numpy as np
import pytest
import torch

from ssm.ops.linear_scan import linear_scan
from ssm.ops.matrix_scan import matrix_scan
from tests.ssm.helpers import assert_close
from tests.ssm.ops.helpers import (
    LENGTHS,
    check_against_reference,
    check_bit_equal,
    check_compiled,
    check_continuation,
    check_ragged,
    narrowed,
    outcome,
    random,
)

KINDS = ("varying", "constant")
# (H, K): small blocks are scanned in chunks, large ones in a loop.
BLOCKS = ((3, 1), (3, 2), (1, 5), (2, 13))


def make(kind="varying", B=2, L=65, H=3, K=2, dtype=torch.float64):
    """A turns, reflects and shrinks a little: its products lose no digits."""
    shape = (B, L, H, K, K) if kind == "varying" else (H, K, K)
    turn = random(*shape, dtype=dtype)
    signs = random(*shape[:-1], 1, seed=4).sign()
    return {
        "A": 0.97 * signs * torch.matrix_exp((turn - turn.mH) / 3),
        "b": random(B, L, H, K, dtype=dtype),
        "initial_state": random(B, H, K, seed=3, dtype=dtype),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("kind", KINDS)
def test_the_naive_backend_is_the_numpy_specification(kind, dtype):
    from ssm.ops.matrix_scan.naive import matrix_scan_numpy

    inputs = make(kind, L=7, dtype=dtype)
    h, final = matrix_scan(**inputs, backend="naive")
    expected = matrix_scan_numpy(*(x.numpy() for x in inputs.values()))
    assert_close(h, torch.from_numpy(expected[0]))
    assert_close(final, torch.from_numpy(expected[1]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("H", "K"), BLOCKS)
def test_values_and_gradients(kind, H, K, dtype):
    for L in LENGTHS:
        inputs = make(kind, L=L, H=H, K=K)
        check_against_reference(matrix_scan, inputs, dtype, backend="torch")


@pytest.mark.parametrize("kind", KINDS)
def test_many_chunks_and_their_recursion(kind):
    inputs = make(kind, B=1, L=1061, H=1)
    check_against_reference(matrix_scan, inputs, torch.float64, backend="torch")


@pytest.mark.parametrize("kind", KINDS)
def test_complex(kind):
    inputs = make(kind, dtype=torch.complex128)
    check_against_reference(matrix_scan, inputs, torch.float64, backend="torch")
    for name in ("A", "b", "initial_state"):
        real = {k: x.real.contiguous() for k, x in inputs.items() if k != name}
        h, final = matrix_scan(**(inputs | real))
        assert h.dtype == final.dtype == torch.complex128
        assert_close(h, matrix_scan(**(inputs | real), backend="naive")[0])


@pytest.mark.parametrize("kind", KINDS)
def test_rotations_reflections_nilpotent_and_zero_matrices(kind):
    """Nothing is inverted or diagonalised: any matrix is legal, gradients exact."""
    special = [
        [[0.0, -1.0], [1.0, 0.0]],
        [[0.6, 0.8], [0.8, -0.6]],
        [[0.0, 1.0], [0.0, 0.0]],
        [[0.0, 0.0], [0.0, 0.0]],
        [[1.0, 0.0], [0.0, 1e-30]],
    ]
    A = torch.tensor(special, dtype=torch.float64)
    if kind == "varying":
        order = torch.randint(5, (2, 97, 1), generator=torch.Generator().manual_seed(0))
        inputs = make(L=97, H=1) | {"A": A[order]}
    else:
        inputs = make(kind, L=97, H=5) | {"A": A}
    for dtype in (torch.float64, torch.float32):
        check_against_reference(matrix_scan, inputs, dtype, backend="torch")


def test_diagonal_matrices_are_the_linear_scan():
    a, b = random(2, 65, 3, 4) / 2, random(2, 65, 3, 4)
    h, final = matrix_scan(torch.diag_embed(a), b)
    expected = linear_scan(a, b)
    assert_close(h, expected[0])
    assert_close(final, expected[1])


def test_constant_matrices_are_the_same_at_all_times():
    inputs = make("constant")
    varying = inputs | {"A": inputs["A"].expand(2, 65, 3, 2, 2)}
    one, all_times = (outcome(matrix_scan, x) for x in (inputs, varying))
    for name, value in one.items():
        expected = all_times[name]
        if name.startswith("gradient of A"):
            expected = expected.sum((0, 1))
        assert_close(value, expected, name=name)


def test_half_precision_keeps_a_float32_state():
    inputs = {name: x.bfloat16() for name, x in make().items()}
    h, final = matrix_scan(**inputs)
    expected = matrix_scan(**{k: x.double() for k, x in inputs.items()})
    assert (h.dtype, final.dtype) == (torch.bfloat16, torch.float32)
    assert_close(h, expected[0])
    assert_close(final, expected[1])


@pytest.mark.parametrize("kind", KINDS)
def test_continuation_at_any_split(kind):
    over_time = {"A", "b"} if kind == "varying" else {"b"}
    for L, K in ((40, 2), (9, 13)):
        check_continuation(matrix_scan, make(kind, L=L, K=K), over_time)


@pytest.mark.parametrize("backend", ["torch", "naive"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_ragged_rows_equal_each_row_alone(kind, packed, backend):
    over_time = {"A", "b"} if kind == "varying" else {"b"}
    inputs = make(kind, B=5, L=13)
    check_ragged(matrix_scan, inputs, over_time, packed, backend=backend)


def test_no_steps_return_the_state():
    for kind in KINDS:
        inputs = make(kind, L=0)
        h, final = matrix_scan(**inputs)
        assert h.shape == (2, 0, 3, 2)
        assert torch.equal(final, inputs["initial_state"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("K", [2, 13])
def test_strided_inputs(kind, K):
    inputs = make(kind, K=K)
    strided = {"A": inputs["A"].mT, "b": inputs["b"].flip(1).mT.contiguous().mT}
    expected = matrix_scan(
        strided["A"].contiguous(), strided["b"].contiguous(), backend="naive"
    )
    assert_close(matrix_scan(**strided)[0], expected[0])


@pytest.mark.parametrize("kind", KINDS)
def test_two_runs_are_bit_equal(kind):
    check_bit_equal(matrix_scan, narrowed(make(kind), torch.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_equals_eager(kind):
    check_compiled(matrix_scan, make(kind, L=17))


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # opcheck's own
@pytest.mark.parametrize("kind", KINDS)
def test_registered_operator_follows_its_rules(kind):
    from ssm.ops.matrix_scan.torch import _scan

    inputs = [x.requires_grad_() for x in make(kind, L=9).values()]
    torch.library.opcheck(_scan.overload, inputs)


@pytest.mark.parametrize("backend", ["torch", "naive"])
@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives(kind, backend):
    inputs = make(kind, B=1, L=4, H=1)
    leaves = [x.requires_grad_() for x in inputs.values()]

    def scan(A, b, state):
        return matrix_scan(A, b, initial_state=state, backend=backend)

    assert torch.autograd.gradgradcheck(scan, leaves)


def test_bad_arguments_are_named():
    inputs = make()
    cases = {
        "A: ": {"A": inputs["A"][:, :3]},
        "b: ": {"b": inputs["b"][0]},
        "initial_state: ": {"initial_state": inputs["initial_state"][:1]},
        "backend: ": {"backend": "cpu"},
        "lengths: ": {"lengths": torch.tensor([66, 1])},
        "cu_seqlens: ": {"cu_seqlens": torch.tensor([0, 65])},
        "A: got dtype": {"A": torch.zeros(3, 2, 2, dtype=torch.int64)},
        "A: got nan": {"A": inputs["A"] * np.nan, "check_domain": True},
    }
    for message, change in cases.items():
        with pytest.raises(ValueError, match=f"^{message}"):
            matrix_scan(**(inputs | change))
