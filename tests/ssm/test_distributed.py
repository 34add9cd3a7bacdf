"""Four gloo ranks against one process: values, states, every gradient, bytes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from ssm._errors import ArgumentError
from ssm.distributed import (
    CommCount,
    carry,
    halo,
    ring_attention,
    selective_decay,
    sharded,
    sharded_conv1d,
    sharded_mamba,
    sharded_scan,
)
from ssm.layers import Mamba
from ssm.layers.mamba import MambaState
from ssm.ops import causal_conv1d, selective_scan
from ssm.ops.linear_scan.naive import linear_scan_loop
from tests.ssm.helpers import assert_close

RANKS = 4
UNEVEN = [(5, 0, 1, 13), (1, 1, 1, 16), (0, 7, 7, 5), (3, 8, 8, 0)]
Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One operator: its operands, and how one process and how a rank applies it.

    Outputs named "y" have a time; "final" is compared on the last rank. ``shared`` are
    the operands that every rank has whole.
    """

    shapes: dict[str, tuple[int, ...]]
    whole: Callable[[Outputs], Outputs]
    on_rank: Callable[[Outputs, CommCount], Outputs]
    shared: tuple[str, ...] = ()
    lengths: tuple[int, ...] = UNEVEN[0]
    constant: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float64
    options: dict[str, Any] = field(default_factory=dict)

    def operands(self) -> Outputs:
        generator = torch.Generator().manual_seed(1)
        return {
            name: torch.randn(shape, generator=generator, dtype=self.dtype)
            .mul_(0.9)
            .requires_grad_(name not in self.constant)
            for name, shape in self.shapes.items()
        }

    def of_rank(self, x: Tensor, rank: int) -> Tensor:
        first = sum(self.lengths[:rank])
        return x[:, first : first + self.lengths[rank]]

    def loss_weight(self, name: str, like: Tensor) -> Tensor:
        """Signed numbers, the same however the output is cut."""
        generator = torch.Generator().manual_seed(len(name))
        double = torch.promote_types(like.dtype, torch.float64)
        return torch.randn(like.shape, generator=generator, dtype=double)


T = sum(UNEVEN[0])


def softmax_loop(x: Outputs, causal: bool) -> Outputs:
    """One query, one head after the other, from the definition."""
    q, k, v = x["q"], x["k"], x["v"]
    shared = q.shape[2] // k.shape[2]
    rows = []
    for t in range(q.shape[1]):
        seen = t + 1 if causal else q.shape[1]
        heads = []
        for h in range(q.shape[2]):
            keys, values = (z[:, :seen, h // shared] for z in (k, v))
            weights = (keys @ q[:, t, h, :, None])[..., 0] / q.shape[-1] ** 0.5
            heads.append((weights.softmax(-1)[..., None] * values).sum(1))
        rows.append(torch.stack(heads, 1))
    return {"y": torch.stack(rows, 1)}


def attention(causal: bool, heads: int = 4, tile: int = 3, **options: Any) -> Case:
    K = 2
    shapes = {"q": (2, T, heads, 6), "k": (2, T, K, 6), "v": (2, T, K, 5)}

    def on_rank(x: Outputs, count: CommCount) -> Outputs:
        y = ring_attention(**x, causal=causal, tile=tile, count=count)
        return {"y": y}

    return Case(shapes, lambda x: softmax_loop(x, causal), on_rank, **options)


def scan_case(**options: Any) -> Case:
    shapes = {"a": (2, T, 3), "b": (2, T, 3), "initial_state": (2, 3)}

    def whole(x: Outputs) -> Outputs:
        y = linear_scan_loop(x["a"], x["b"], x["initial_state"])
        return {"y": y, "final": y[:, -1]}

    def on_rank(x: Outputs, count: CommCount) -> Outputs:
        y, final = sharded_scan(**x, backend="torch", count=count)
        return {"y": y, "final": final}

    return Case(shapes, whole, on_rank, shared=("initial_state",), **options)


def logarithms_case() -> Case:
    shapes = {"log_a": (2, T, 3), "b": (2, T, 3)}

    def whole(x: Outputs) -> Outputs:
        y = linear_scan_loop(x["log_a"].exp(), x["b"], torch.zeros_like(x["b"][:, 0]))
        return {"y": y}

    def on_rank(x: Outputs, count: CommCount) -> Outputs:
        y, _ = sharded_scan(
            None, x["b"], log_a=x["log_a"], backend="torch", count=count
        )
        return {"y": y}

    return Case(shapes, whole, on_rank)


def selective_case() -> Case:
    D, N = 4, 3
    shapes = {
        "u": (2, T, D),
        "delta": (2, T, D),
        "B": (2, T, N),
        "C": (2, T, N),
        "z": (2, T, D),
        "A_log": (D, N),
        "bias": (D,),
        "initial_state": (2, D, N),
    }

    def scan(x: Outputs, h: Tensor | None) -> tuple[Tensor, Tensor]:
        return selective_scan(
            x["u"],
            x["delta"],
            -x["A_log"].exp(),
            x["B"],
            x["C"],
            z=x["z"],
            delta_bias=x["bias"],
            delta_softplus=True,
            initial_state=h,
            backend="naive",
        )

    def whole(x: Outputs) -> Outputs:
        return dict(zip(("y", "final"), scan(x, x["initial_state"]), strict=True))

    def on_rank(x: Outputs, count: CommCount) -> Outputs:
        y, final = sharded(
            lambda h: scan(x, h),
            lambda: selective_decay(x["delta"], -x["A_log"].exp(), x["bias"], True),
            initial_state=x["initial_state"],
            count=count,
        )
        return {"y": y, "final": final}

    shared = ("A_log", "bias", "initial_state")
    return Case(shapes, whole, on_rank, shared=shared)


def conv_case(width: int, lengths: tuple[int, ...]) -> Case:
    D = 3
    shapes = {
        "x": (2, T, D),
        "weight": (D, width),
        "bias": (D,),
        "initial_state": (2, width - 1, D),
    }

    def whole(x: Outputs) -> Outputs:
        y, final = causal_conv1d(**x, backend="naive")
        return {"y": y, "final": final}

    def on_rank(x: Outputs, count: CommCount) -> Outputs:
        y, final = sharded_conv1d(**x, backend="naive", count=count)
        return {"y": y, "final": final}

    shared = ("weight", "bias", "initial_state")
    return Case(shapes, whole, on_rank, shared=shared, lengths=lengths)


def mamba() -> Mamba:
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(3)
        return Mamba(6, d_state=4, backend="naive", dtype=torch.float64)


def mamba_case(lengths: tuple[int, ...]) -> Case:
    """Gradients of the layer's parameters: those of A_log, in_proj and conv1d."""
    kept = ("A_log", "in_proj.weight", "conv1d.weight", "dt_proj.bias")
    values = dict(mamba().named_parameters())
    shapes = {"x": (2, T, 6), "conv": (2, 3, 12), "ssm": (2, 12, 4)}
    shapes |= {name: tuple(values[name].shape) for name in kept}

    def run(x: Outputs, call: Callable[[Mamba, MambaState], Any]) -> Outputs:
        layer = mamba()
        state = MambaState(x["conv"], x["ssm"])
        for name in kept:  # the operands in the places of its parameters
            owner, _, leaf = name.rpartition(".")
            module = layer.get_submodule(owner)
            delattr(module, leaf)
            setattr(module, leaf, x[name])
        y, final = call(layer, state)
        return {"y": y, "final": final.ssm, "final_conv": final.conv}

    def whole(x: Outputs) -> Outputs:
        return run(x, lambda layer, state: layer(x["x"], state))

    def on_rank(x: Outputs, count: CommCount) -> Outputs:
        return run(
            x,
            lambda layer, state: sharded_mamba(layer, x["x"], state=state, count=count),
        )

    shared = ("conv", "ssm", *kept)
    return Case(shapes, whole, on_rank, shared=shared, lengths=lengths)


CASES: dict[str, Case] = {
    **{f"causal attention, {n}": attention(True, lengths=n) for n in UNEVEN},
    "attention without a mask": attention(False),
    "attention, whole blocks": attention(True, heads=2, tile=1024),
    "attention, values alone differentiable": attention(True, constant=("q", "k")),
    "attention, float32": attention(True, dtype=torch.float32),
    "attention, bfloat16": attention(False, dtype=torch.bfloat16),
    **{f"linear scan, {n}": scan_case(lengths=n) for n in UNEVEN},
    "linear scan, complex": scan_case(dtype=torch.complex128),
    "linear scan, inputs alone": scan_case(constant=("a", "initial_state")),
    "linear scan, state alone": scan_case(constant=("a", "b")),
    "linear scan, logarithms": logarithms_case(),
    "selective scan": selective_case(),
    **{f"convolution, {n}": conv_case(4, n) for n in UNEVEN},
    "convolution, width 1": conv_case(1, UNEVEN[0]),
    "convolution, wider than the sequence": conv_case(23, UNEVEN[0]),
    **{f"Mamba, {n}": mamba_case(n) for n in UNEVEN[:2]},
}


def loss(case: Case, outputs: Outputs, rank: int | None) -> Tensor:
    """sum weights * outputs; "y" by the shard, "final" on the last rank alone."""
    terms = []
    for name, y in outputs.items():
        if rank is None:
            weight = case.loss_weight(name, y)
        elif name == "y":
            shape = (len(y), T, *y.shape[2:])
            weight = case.of_rank(case.loss_weight(name, y.new_empty(shape)), rank)
        else:
            weight = case.loss_weight(name, y) * (rank == RANKS - 1)
        terms.append((y * weight).sum())
    total = torch.stack(terms).sum()
    return total.real if total.is_complex() else total


def run_case(case: Case, rank: int) -> dict[str, Any]:
    """What one rank gets, in tensors that can be saved."""
    operands = case.operands()
    own = {
        name: x if name in case.shared else case.of_rank(x, rank)
        for name, x in operands.items()
    }
    own = {n: x.detach().requires_grad_(x.requires_grad) for n, x in own.items()}
    count = CommCount()
    outputs = case.on_rank(own, count)
    forward = count.bytes
    loss(case, outputs, rank).backward()
    return {
        "outputs": {n: y.detach() for n, y in outputs.items()},
        "gradients": {n: x.grad for n, x in own.items()},
        "forward_bytes": forward,
        "all_bytes": count.bytes,
    }


def refusals(rank: int) -> dict[str, str]:
    """What a rank is told where one of them has something else than the others."""
    odd = rank == 2
    q = torch.ones(1, 3, 4, 2)
    k, wrong = torch.ones(1, 3, 2, 2), torch.ones(1, 3, 3, 2)
    a, x = torch.ones(2, 3, 4), torch.ones(2, 3, 4)
    taps = torch.ones(4, 3 if odd else 2)

    def no_gradients() -> object:
        with torch.set_grad_enabled(not odd):
            return ring_attention(q.requires_grad_(), k, k)

    calls: dict[str, Callable[[], object]] = {
        "heads": lambda: ring_attention(q, *([wrong] * 2 if odd else [k] * 2)),
        "width": lambda: ring_attention(q, k, k[..., : 1 if odd else 2]),
        "dtype": lambda: ring_attention(q, k, k.double() if odd else k),
        "mask": lambda: ring_attention(q, k, k, causal=odd),
        "recording": no_gradients,
        "tile": lambda: ring_attention(q, k, k, tile=0 if odd else 1),
        "scan": lambda: sharded_scan(a, x[..., :3] if odd else x),
        "states": lambda: carry(a[: 1 if odd else 2], a[: 1 if odd else 2]),
        "taps": lambda: sharded_conv1d(x, taps),
        "layer": lambda: sharded_mamba(Mamba(4), x[..., : 3 if odd else 4]),
    }
    told = {}
    for name, call in calls.items():
        with pytest.raises(ArgumentError) as error:
            call()
        told[name] = str(error.value)
    return told


def in_a_part(rank: int) -> Any:
    """A scan over the group of ranks 1 and 3 (group ranks 0 and 1)."""
    group = dist.new_group([1, 3])
    a = torch.tensor([[0.5], [2.0]][rank // 2]).expand(1, 1, 1)
    if rank in (1, 3):
        return sharded_scan(a, torch.ones(1, 1, 1), group)[0]
    with pytest.raises(ArgumentError, match="group: got one without this process"):
        sharded_scan(a, a, group)
    return None


def gradient_of_rank_0(rank: int) -> list[float] | None:
    """b alone needs one, and on rank 0 alone: a step counts in itself and all later."""
    b = torch.ones(1, 2, 1, requires_grad=rank == 0)
    h, _ = sharded_scan(torch.ones(1, 2, 1), b, backend="torch")
    h.sum().backward()
    return None if b.grad is None else b.grad.flatten().tolist()


DEGREES = torch.tensor([2, 12, 1, 4])  # of four vertices; the second one is a hub


def neighbour_sums(rank: int) -> Tensor:
    """Running sums over each vertex's edges: a scan whose decay is 0 at its first."""
    first = torch.ones(T).index_fill(0, DEGREES.cumsum(0) - DEGREES, 0.0)
    case = CASES["attention without a mask"]
    a, b = (case.of_rank(x, rank) for x in (first[None], edge_features()[None]))
    a = a[..., None].expand_as(b).to(b)
    return sharded_scan(a, b, backend="torch")[0][0]


def edge_features() -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(T, 5, generator=generator, dtype=torch.float64)


def bytes_by_length(rank: int) -> dict[str, list[int]]:
    """Bytes sent by a rank at 2 and at 16 steps a rank."""
    found: dict[str, list[int]] = {"attention": [], "scan": [], "halo": []}
    for L in (2, 16):
        x = torch.ones(1, L, 3, 2)
        counts = {name: CommCount() for name in found}
        ring_attention(x, x, x, count=counts["attention"])
        sharded_scan(x, x, count=counts["scan"])
        halo(x[..., 0], 3, count=counts["halo"])
        for name, count in counts.items():
            found[name].append(count.bytes)
    return found


def work(rank: int, folder: str) -> None:
    """All that one rank does, in one process: starting one takes seconds."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS
    )
    found: dict[str, Any] = {name: run_case(c, rank) for name, c in CASES.items()}
    found["refusals"] = refusals(rank)
    found["part"] = in_a_part(rank)
    found["neighbours"] = neighbour_sums(rank)
    found["one gradient"] = gradient_of_rank_0(rank)
    found["bytes"] = bytes_by_length(rank)
    dist.barrier()
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, args=(str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def expected(case: Case) -> tuple[Outputs, Outputs]:
    """Outputs and gradients of one process, in double precision."""
    double = torch.promote_types(case.dtype, torch.float64)
    operands = {
        n: x.detach().to(double).requires_grad_(x.requires_grad)
        for n, x in case.operands().items()
    }
    outputs = case.whole(operands)
    loss(case, outputs, None).backward()
    gradients = {n: x.grad for n, x in operands.items() if x.grad is not None}
    return outputs, gradients


@pytest.mark.parametrize("name", CASES)
def test_four_ranks_give_what_one_process_gives(name, found):
    case, parts = CASES[name], [each[name] for each in found]
    outputs, gradients = expected(case)
    for key, y in outputs.items():
        shards = [part["outputs"][key] for part in parts]
        actual = torch.cat(shards, 1) if key == "y" else shards[-1]
        assert_close(actual, y, name=key, dtype=case.dtype)
    assert gradients.keys() == case.shapes.keys() - set(case.constant)
    for key, expected_gradient in gradients.items():
        shards = [part["gradients"][key] for part in parts]
        there = [x for x in shards if x is not None]  # else it has no steps
        actual = sum(there) if key in case.shared else torch.cat(there, 1)
        assert_close(actual, expected_gradient, name=f"d{key}", dtype=case.dtype)


@pytest.mark.parametrize("lengths", UNEVEN)
def test_a_rank_sends_every_other_block_but_its_successors_own(found, lengths):
    """R - 1 blocks of keys and values forward; as many backward, and R of gradients."""
    case = CASES[f"causal attention, {lengths}"]
    (batch, _, K, P), V = case.shapes["k"], case.shapes["v"][-1]
    a_step = batch * K * (P + V) * 8
    for rank, each in enumerate(found):
        count = each[f"causal attention, {lengths}"]
        others = T - lengths[(rank + 1) % RANKS]
        assert count["forward_bytes"] == others * a_step
        assert count["all_bytes"] == (2 * others + T) * a_step


def test_bytes_grow_with_the_length_for_attention_and_not_for_a_state(found):
    for rank, each in enumerate(found):
        attention, scan, kept = (
            each["bytes"][n] for n in ("attention", "scan", "halo")
        )
        assert attention == [3 * L * 2 * 6 * 4 for L in (2, 16)]
        # By doubling: a pair to the rank 1 ahead, one to the rank 2 ahead, a state.
        rounds = 2 * ((rank < 3) + (rank < 2)) + (rank < 3)
        assert scan == [rounds * 6 * 4] * 2
        assert kept == [(rank < 3) * 2 * 3 * 4] * 2


def test_a_rank_with_other_arguments_is_refused_on_all(found):
    first = found[0]["refusals"]
    assert all(each["refusals"] == first for each in found)
    assert first["heads"].startswith("rank 2: k: got 3 heads; expected a divisor of")
    assert "(1, 'steps', 2, 2) on rank 0" in first["width"]
    assert "(1, 'steps', 2, 1) on rank 2" in first["width"]
    assert "dtype of v: got torch.float32 on rank 0 and torch.float64" in first["dtype"]
    assert first["mask"].startswith("causal: got False on rank 0 and True on rank 2")
    assert "gradients are recorded: got True on rank 0" in first["recording"]
    assert first["tile"].startswith("rank 2: tile: got 0")
    assert first["scan"].startswith("rank 2: a: got shape (2, 3, 4)")
    assert "shape of decay: got (2, 3, 4) on rank 0 and (1, 3, 4)" in first["states"]
    assert first["taps"].startswith("width: got 2 on rank 0 and 3 on rank 2")
    assert first["layer"].startswith("rank 2: x: got shape (2, 3, 3)")


def test_ranks_count_within_their_group(found):
    first, second = found[1]["part"], found[3]["part"]
    assert (first.item(), second.item()) == (1.0, 3.0)  # 1, then 2 * 1 + 1
    assert found[0]["part"] is None
    assert found[2]["part"] is None


def test_a_hub_whose_edges_lie_on_three_ranks_is_summed_by_a_scan(found):
    h = torch.cat([each["neighbours"] for each in found])
    vertex = torch.arange(len(DEGREES)).repeat_interleave(DEGREES)
    sums = torch.zeros(len(DEGREES), 5, dtype=torch.float64)
    sums.index_add_(0, vertex, edge_features())
    assert_close(h[DEGREES.cumsum(0) - 1], sums)


def test_all_ranks_help_where_one_alone_needs_gradients(found):
    assert [each["one gradient"] for each in found] == [[8.0, 7.0], None, None, None]


@pytest.mark.parametrize("name", CASES)
def test_one_process_without_a_group_sends_nothing(name):
    case = CASES[name]
    outputs, gradients = expected(case)
    operands, count = case.operands(), CommCount()
    actual = case.on_rank(operands, count)
    loss(case, actual, None).backward()
    for key, y in outputs.items():
        assert_close(actual[key], y, name=key, dtype=case.dtype)
    for key, gradient in gradients.items():
        assert_close(operands[key].grad, gradient, name=f"d{key}", dtype=case.dtype)
    assert (count.bytes, count.messages) == (0, 0)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 131])
def test_attention_at_lengths_around_its_tile(length):
    case = Case(
        dict.fromkeys("qkv", (1, length, 2, 3)),
        lambda x: softmax_loop(x, True),
        lambda x, count: {"y": ring_attention(**x, tile=64, count=count)},
    )
    operands = case.operands()
    y = ring_attention(**operands, tile=64)
    assert_close(y, softmax_loop(operands, True)["y"])


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda x: ring_attention(x[..., 0], x, x), "q: got shape"),
        (lambda x: ring_attention(x, x[:, :2], x), "k: got shape"),
        (lambda x: ring_attention(x, x, x.long()), "v: got dtype"),
        (lambda x: ring_attention(x, x, x + 0j), "v: got dtype"),
        (lambda x: halo(x, 2), "x: got shape"),
        (lambda x: halo(x[..., 0], 0), "width: got 0"),
        (lambda x: halo(x[..., 0], 2, initial_state=x[..., 0]), "initial_state: got"),
        (lambda x: carry(x, x[:1]), "decay: got shape"),
        (lambda x: carry(x, x, initial_state=x[:1]), "initial_state: got shape"),
        (lambda x: sharded_scan(None, x), "a, log_a: got neither"),
    ],
)
def test_bad_arguments_are_answered_in_one_line(call, text):
    with pytest.raises(ArgumentError, match=text) as error:
        call(torch.ones(2, 4, 2, 3))
    assert "\n" not in str(error.value)
