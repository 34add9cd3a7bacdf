"""The equivalence table holds, has every row that it should, and can fail."""

import importlib

import pytest
import torch
from torch.utils import _pytree as pytree

import ssm.layers
import ssm.ops
from ssm import equivalence
from ssm._cases import LAYERS, OPS, TIMELESS
from ssm.layers._base import SequenceLayer
from ssm.ops._dispatch import Backend

LENGTHS = equivalence.QUICK_LENGTHS
ROWS = [
    (job[1].name, job[2], str(job[3]).removeprefix("torch."))
    for job in equivalence.jobs()
]


@pytest.mark.parametrize("job", equivalence.jobs(), ids=["-".join(row) for row in ROWS])
def test_every_form_agrees(job):
    function, case, backend, dtype = job
    row = function(case, backend, dtype, LENGTHS)
    assert row.problems() == []
    assert set(row.errors) | set(row.absent) == set(equivalence.FORMS)


def table_of(case):
    """The backends of an operator; names such as "ssd, complex" belong to "ssd"."""
    module = importlib.import_module(f"ssm.ops.{case.name.partition(',')[0]}")
    return module.BACKENDS


def test_every_operator_and_backend_has_its_rows():
    every = (*OPS, *TIMELESS)
    rows = {(case.name.partition(",")[0], b) for case in every for b in case.backends}
    folders = {case.name.partition(",")[0] for case in every}
    public = set(ssm.ops.__all__)
    assert folders <= public
    for case in every:
        name = case.name.partition(",")[0]
        for backend, entry in table_of(case).items():
            # The reference, a GPU peer, and kernels that only their own tests run here
            if backend not in {"naive", "mamba_ssm"} and not entry.gpu:
                assert (name, backend) in rows
    steps_and_types = {n for n in public if n.endswith(("_step", "_update", "_fn"))}
    others = {"ArgumentError", "BackendError", "backends_used"}
    assert public - steps_and_types - others == folders - steps_and_types


def test_every_layer_has_its_row():
    exported = {
        kind.__name__
        for name in ssm.layers.__all__
        if isinstance(kind := getattr(ssm.layers, name), type)
        and issubclass(kind, SequenceLayer)
        and not kind.__abstractmethods__
    }
    shown = {case.layer.__name__ for case in LAYERS}
    assert exported <= shown


class _Flipped(torch.autograd.Function):
    """The identity with a sign error in its gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -grad


def flip(value):
    return _Flipped.apply(value) if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize(
    ("case", "backend"),
    [pytest.param(c, b, id=f"{c.name}-{b}") for c in OPS for b in c.backends],
)
def test_a_sign_error_in_a_gradient_is_caught(case, backend, monkeypatch):
    table = table_of(case)
    honest = table[backend]

    def wrong(*arguments, **options):
        return honest.run(*pytree.tree_map(flip, arguments), **options)

    monkeypatch.setitem(table, backend, Backend(wrong, honest.refuses))
    row = equivalence.op_row(case, backend, case.dtypes[0], (5,))
    assert any("d/d" in problem for problem in row.problems())


def test_a_missing_cell_is_a_problem():
    row = equivalence.Row("layer", "torch", torch.float64)
    row.errors = dict.fromkeys(equivalence.FORMS[:-1], 0.0)
    assert row.problems() == ["layer, torch, float64: the form 'kernel' is missing"]
    row.absent["kernel"] = "a reason"
    assert row.problems() == []
    row.errors["full"] = float("nan")
    assert len(row.problems()) == 1


def test_the_command_prints_the_table(capsys):
    assert equivalence.main(["--quick", "--only", "fft_conv"]) == 0
    printed = capsys.readouterr().out
    assert "fft_conv" in printed
    assert "4 of 4 rows agree" in printed
