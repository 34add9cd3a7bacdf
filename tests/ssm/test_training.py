"""The training loop: against loops written plainly, killed, split, and led astray.

Run as a program, this file is a process of the tests that need processes of their own.
"""

import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from experiments import checkpoints as stored
from ssm import _checkpoints as checkpoints
from ssm import training
from ssm._adamw import GuardedAdamW
from ssm._errors import ArgumentError
from ssm.training import (
    Batch,
    DivergenceError,
    Entry,
    Objective,
    Progress,
    Scores,
    Trainer,
    TrainingConfig,
    batches,
)
from tests.ssm.models.helpers import tiny, tokens

ROOT = Path(__file__).parents[2]
N_TRAIN, N_VAL = 25, 11  # no multiples of the batch: 7, 7, 7, 4 rows an epoch
STEPS = 4  # an epoch
UNSCORED = -100


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def moved(model: nn.Module, seed: int = 0) -> nn.Module:
    """``model`` with normal weights from a generator of their own."""
    generator = draws(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.3 * noise)
    return model


def net(dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> nn.Module:
    layers = (nn.Linear(5, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 2))
    return moved(nn.Sequential(*layers).to(dtype))


def regression(n: int, seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Inputs, targets, and which of the rows are scored."""
    generator = draws(seed)
    x = torch.randn(n, 5, generator=generator, dtype=dtype)
    y = torch.randn(n, 2, generator=generator, dtype=dtype)
    return [x, y, torch.rand(n, generator=generator) < 0.7]


def squares(model: nn.Module, batch: Batch) -> Scores:
    """Squared errors of the scored rows, and how many are below 1."""
    x, y, scored = batch
    errors = ((model(x) - y) ** 2).sum(1)
    close = ((errors < 1) & scored).sum()
    return Scores((errors * scored).sum(), scored.sum(), {"close": close})


TRAIN, VAL = regression(N_TRAIN, 1), regression(N_VAL, 2)
EXTRA = regression(17, 3)  # batches of 7, 7, 3: passes that end within an epoch


def config(**changes: Any) -> TrainingConfig:
    usual: dict[str, Any] = {"epochs": 2, "batch_size": 7, "lr": 1e-2, "device": "cpu"}
    return TrainingConfig(**(usual | changes))


def trainer(model: nn.Module, **changes: Any) -> Trainer:
    """One whose steps and notices are in lists of those names."""
    ours = {"folder", "settings", "on_step", "on_notice", "on_entry"}
    ours = (ours | {"max_steps", "stop"}) & changes.keys()
    options = {name: changes.pop(name) for name in ours}
    return Trainer(
        model, changes.pop("objective", squares), config(**changes), **options
    )


def told(curve: Sequence[Entry]) -> list[Entry]:
    """A curve without what the clock says."""
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in curve]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in model.state_dict().items()}


def assert_same_weights(actual: nn.Module, expected: dict[str, Tensor]) -> None:
    for name, x in actual.state_dict().items():
        assert torch.equal(x, expected[name]), name


# --- what a step and an epoch do --------------------------------------------------


def adamw(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, t: int, rate: float, decay: float
) -> None:
    """Loshchilov and Hutter (2019), algorithm 2, with betas 0.9, 0.999, in place."""
    m.mul_(0.9).add_(0.1 * g)
    v.mul_(0.999).add_(0.001 * g * g)
    size = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    p.sub_(rate * (size + decay * p))


@pytest.mark.parametrize("grad_clip", [0.0, 0.2])
def test_epochs_are_those_of_a_loop_written_plainly(grad_clip: float) -> None:
    model, epochs, decay, lr, warmup = net(), 2, 0.1, 1e-2, 3
    names = [name for name, _ in model.named_parameters()]
    p = [x.detach().clone().requires_grad_() for x in model.parameters()]
    m, v = ([torch.zeros_like(x) for x in p] for _ in range(2))
    losses, norms, expected_curve, t = [], [], [], 0
    total = epochs * STEPS

    def forward(x: Tensor) -> Tensor:
        return (x @ p[0].T + p[1]).tanh() @ p[2].T + p[3]

    for epoch in range(epochs):
        loss_sum = scored_sum = 0.0
        for rows in batches(N_TRAIN, 7, 0, epoch):
            x, y, scored = (data[rows] for data in TRAIN)
            loss = ((forward(x) - y) ** 2).sum(1)[scored].mean()
            g = torch.autograd.grad(loss, p)
            norm = math.sqrt(sum(float((x**2).sum()) for x in g))
            shrink = min(1.0, grad_clip / norm) if grad_clip else 1.0
            done = (t - warmup) / (total - warmup)
            rate = lr * ((t + 1) / warmup if t < warmup else 1 - done)
            t += 1
            for i in range(4):
                spared = p[i].ndim < 2
                step = (p[i].data, shrink * g[i], m[i], v[i], t, rate)
                adamw(*step, 0.0 if spared else decay)
            losses.append(loss.item())
            norms.append(shrink * norm)
            loss_sum += loss.item() * int(scored.sum())
            scored_sum += int(scored.sum())
        errors = ((forward(VAL[0]) - VAL[1]) ** 2).sum(1)[VAL[2]]
        means = (loss_sum / scored_sum, errors.mean().item())
        expected_curve.append((*means, (errors < 1).double().mean().item()))

    seen: list[tuple[float, float]] = []

    def watch(at: Progress) -> None:
        grads = [x.grad for x in model.parameters() if x.grad is not None]
        seen.append((at.loss, float(torch.cat([g.flatten() for g in grads]).norm())))

    schedule = {"schedule": "linear", "warmup": warmup, "weight_decay": decay, "lr": lr}
    ours = trainer(model, epochs=epochs, grad_clip=grad_clip, on_step=watch, **schedule)
    curve = ours.fit(TRAIN, VAL)
    # The library divides by norm + 1e-6 when it clips.
    close = {"rel": 1e-5 if grad_clip else 1e-10}
    assert [loss for loss, _ in seen] == pytest.approx(losses, **close)
    assert [norm for _, norm in seen] == pytest.approx(norms, **close)
    if grad_clip:
        assert max(norm for _, norm in seen) <= grad_clip
    for name, actual, wanted in zip(names, model.parameters(), p, strict=True):
        assert torch.allclose(actual, wanted, rtol=close["rel"], atol=1e-9), name
    found = [
        tuple(e[k] for k in ("train_loss", "val_loss", "val_close")) for e in curve
    ]
    for entry, wanted_entry in zip(found, expected_curve, strict=True):
        assert entry == pytest.approx(wanted_entry, **close)
    assert [e["epoch"] for e in curve] == [1, 2]
    assert [e["step"] for e in curve] == [STEPS, 2 * STEPS]


SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda _: 1.0,
    "cosine": lambda done: math.cos(math.pi * done / 2) ** 2,  # the half-angle formula
    "linear": lambda done: 1.0 - done,
}


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rates_follow_their_formulas(schedule: str, warmup: int) -> None:
    model = tiny("s4d", dtype=torch.float32)  # its A and dt learn at 0.001 at most
    rates: list[dict[float, float]] = []

    def watch(at: Progress) -> None:
        groups = ours.optimizer.param_groups
        rates.append(
            {base: group["lr"] for base, group in zip(bases, groups, strict=True)}
        )

    ours = trainer(
        model,
        objective=next_token,
        lr=0.01,
        epochs=3,
        schedule=schedule,
        warmup=warmup,
        on_step=watch,
    )
    bases = [group["lr"] for group in ours.optimizer.param_groups]
    assert set(bases) == {0.01, 0.001}
    ours.fit(sequences(14, 1), sequences(7, 2))
    assert len(rates) == 6
    for step, actual in enumerate(rates):
        if step < warmup:
            factor = (step + 1) / warmup
        else:
            factor = SCHEDULES[schedule]((step - warmup) / (6 - warmup))
        wanted = {base: base * factor for base in actual}
        assert actual == pytest.approx(wanted, rel=1e-12)


def test_each_step_adds_the_loss_of_a_batch_of_auxiliary_rows() -> None:
    """Three batches a pass, four steps an epoch: neither count divides the other."""
    model, plain, steps = net(), net(), []
    trainer(model, epochs=2, on_step=steps.append).fit(TRAIN, VAL, auxiliary=EXTRA)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.0)
    orders = [batches(N_TRAIN, 7, 0, epoch) for epoch in range(2)]
    extras = [batches(17, 7, 0, i, "auxiliary") for i in range(3)]
    assert not torch.equal(extras[0][0], extras[1][0])
    losses = []
    for rows, more in zip(sum(orders, ()), sum(extras, ())[:8], strict=True):
        means = []
        for data, index in ((TRAIN, rows), (EXTRA, more)):
            x, y, scored = (part[index] for part in data)
            means.append(((plain(x) - y) ** 2).sum(1)[scored].mean())
        optimizer.zero_grad()
        sum(means).backward()  # type: ignore[union-attr]
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        losses.append(means[0].item())
    assert [at.loss for at in steps] == pytest.approx(losses, rel=1e-9)
    for p, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p, expected, rtol=1e-7, atol=1e-9)


# --- when a run ends before its last epoch ------------------------------------------


@pytest.mark.parametrize("max_steps", [1, 3, 4, 6, 8, 99])
def test_a_run_ends_after_so_many_steps(max_steps: int, tmp_path: Path) -> None:
    steps: list[Progress] = []
    whole, ours = (
        trainer(net(0.3), epochs=2, schedule="linear", on_step=steps.append, **changed)
        for changed in ({}, {"max_steps": max_steps, "folder": tmp_path})
    )
    whole.fit(TRAIN, VAL)
    steps.clear()
    curve = ours.fit(TRAIN, VAL)
    last = min(max_steps, 2 * STEPS)
    assert [at.step for at in steps] == [*range(1, last + 1)]
    assert {at.steps for at in steps} == {last}  # the schedule's, too:
    assert [e["lr"] for e in curve] == pytest.approx(
        [1e-2 * (1 - (e["step"] - 1) / last) for e in curve]
    )
    assert [e["step"] for e in curve] == sorted({min(STEPS, last), last})
    steps.clear()
    again = trainer(
        net(0.3), on_step=steps.append, max_steps=max_steps, folder=tmp_path
    )
    assert again.fit(TRAIN, VAL, resume=True) == curve
    assert not steps
    assert_same_weights(again.model, weights(ours.model))


@pytest.mark.parametrize("at", [2, 4, 6])
def test_a_run_ends_where_an_entry_says_so(at: int, tmp_path: Path) -> None:
    def stop(entry: Entry) -> bool:
        return entry["step"] >= at and entry["val_loss"] > 0

    runs = {"eval_every": 2, "epochs": 3}
    whole = trainer(net(0.3), **runs).fit(TRAIN, VAL)
    notices: list[str] = []
    watched = {"folder": tmp_path, "stop": stop, "on_notice": notices.append}
    ours = trainer(net(0.3), **runs, **watched)
    curve = ours.fit(TRAIN, VAL)
    assert told(curve) == told(whole)[: at // 2]
    again = trainer(net(0.3), **runs, **watched)
    assert again.fit(TRAIN, VAL, resume=True) == curve
    assert again.step == at
    assert notices[-1].endswith(f"checkpoint-{at:08d}, where the run ended")
    assert_same_weights(again.model, weights(ours.model))


# --- what is trained ----------------------------------------------------------------


def sequences(n: int, seed: int) -> list[Tensor]:
    """Token sequences and what follows each token, a third of it not scored."""
    x = tokens(n, 10, seed=seed)
    targets = x[:, 1:].clone()
    targets[torch.rand(targets.shape, generator=draws(seed)) < 0.3] = UNSCORED
    return [x[:, :-1], targets]


def next_token(model: nn.Module, batch: Batch) -> Scores:
    x, targets = batch
    out = model(x)
    logits, wanted = out.logits.flatten(0, 1), targets.flatten()
    scored = wanted != UNSCORED
    loss = functional.cross_entropy(
        logits, wanted, ignore_index=UNSCORED, reduction="sum"
    )
    correct = ((logits.argmax(-1) == wanted) & scored).sum()
    return Scores(loss, scored.sum(), {"accuracy": correct}, 0.0 * out.auxiliary_loss)


def no_gradient(model: nn.Module, batch: Batch) -> Scores:
    """A loss that no parameter changes, of which every parameter has a gradient."""
    zero = sum(p.sum() for p in model.parameters()) * 0.0
    return Scores(zero + len(batch[0]), torch.tensor(len(batch[0])), {})


@pytest.mark.parametrize("pattern", ["mamba", "mamba2", "s4d", "rwkv", "transformer"])
def test_weight_decay_spares_all_but_the_weights_of_maps(pattern: str) -> None:
    # Without gradients a decayed parameter shrinks by lr times decay a step.
    model = tiny(pattern)
    before = weights(model)
    decay = {"lr": 0.1, "weight_decay": 0.5}
    trainer(model, objective=no_gradient, **decay).fit(TRAIN, VAL)
    left = (1 - 0.1 * 0.5) ** (2 * STEPS)
    for name, now in weights(model).items():
        # A, D, dt, B, mixing rates and biases have names of their own; S4D's C decays.
        decays = name.endswith((".weight", ".core.C")) and "norm" not in name
        wanted = before[name] * (left if decays else 1.0)
        assert torch.allclose(now, wanted, rtol=1e-12, atol=0), name


@pytest.mark.parametrize("pattern", ["mamba", "transformer"])
def test_weight_decay_of_all_spares_nothing(pattern: str) -> None:
    model = tiny(pattern)
    before = weights(model)
    decay = {"lr": 0.1, "weight_decay": 0.5, "decay_all": True}
    trainer(model, objective=no_gradient, **decay).fit(TRAIN, VAL)
    left = (1 - 0.1 * 0.5) ** (2 * STEPS)
    for name, now in weights(model).items():
        assert torch.allclose(now, left * before[name], rtol=1e-12, atol=0), name


@pytest.mark.parametrize("size", [0, 1, 5, 7, 1_000])
def test_rows_scored_at_once_change_no_evaluation(size: int) -> None:
    data = regression(23, 2)
    found = trainer(net(), eval_batch_size=size).evaluate(data)
    assert found == pytest.approx(trainer(net()).evaluate(data), rel=1e-12)


@pytest.mark.parametrize(("n", "size"), [(1, 1), (25, 7), (28, 7), (5, 64), (300, 1)])
def test_every_example_comes_once_an_epoch_in_an_order_of_its_own(
    n: int, size: int
) -> None:
    orders = []
    for seed, epoch in [(0, 0), (0, 1), (1, 0)]:
        parts = batches(n, size, seed, epoch)
        assert [len(rows) for rows in parts[:-1]] == [size] * ((n - 1) // size)
        assert 1 <= len(parts[-1]) <= size
        orders.append(torch.cat([*parts]).tolist())
        assert sorted(orders[-1]) == list(range(n))
        torch.manual_seed(seed + 1)  # of no effect
        assert torch.cat([*batches(n, size, seed, epoch)]).tolist() == orders[-1]
    if n > 10:
        assert len({*map(tuple, orders), tuple(range(n))}) == 4


# --- random numbers -----------------------------------------------------------------


def test_runs_depend_on_their_seed_alone_and_leave_global_generators_be() -> None:
    runs = []
    for seed, elsewhere in [(0, 5), (0, 6), (1, 5)]:
        model, data = net(dropout=0.4), [x.clone() for x in TRAIN]
        torch.manual_seed(elsewhere)
        np.random.seed(elsewhere)  # noqa: NPY002
        random.seed(elsewhere)
        before = (torch.get_rng_state(), np.random.get_state()[1], random.getstate())  # noqa: NPY002
        curve = trainer(model, seed=seed).fit(data, VAL)
        after = (torch.get_rng_state(), np.random.get_state()[1], random.getstate())  # noqa: NPY002
        assert torch.equal(before[0], after[0])
        assert np.array_equal(before[1], after[1])
        assert before[2] == after[2]
        assert all(torch.equal(a, b) for a, b in zip(data, TRAIN, strict=True))
        runs.append((told(curve), weights(model)))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(x, runs[1][1][name]) for name, x in runs[0][1].items())
    assert runs[0][0] != runs[2][0]


def test_dropout_differs_between_epochs_and_evaluations_do_not_move_it() -> None:
    drawn: list[list[Tensor]] = []
    for eval_every in (0, 3):
        model, masks = net(dropout=0.5), []
        model[2].register_forward_hook(  # type: ignore[index]
            lambda m, _, y, to=masks: to.append(y == 0) if m.training else None
        )
        trainer(model, eval_every=eval_every).fit(TRAIN, VAL)
        drawn.append(masks)
    assert len(drawn[0]) == 2 * STEPS
    assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))
    assert not torch.equal(drawn[0][0], drawn[0][STEPS])  # first steps of the epochs


def test_more_evaluations_change_no_step() -> None:
    steps: list[Progress] = []
    watch = {0: lambda _: None, 3: steps.append}
    curves = {
        every: trainer(net(0.3), eval_every=every, on_step=watch[every]).fit(TRAIN, VAL)
        for every in (0, 3)
    }
    assert [entry["step"] for entry in curves[0]] == [4, 8]
    assert [entry["step"] for entry in curves[3]] == [3, 4, 6, 8]
    at = {entry["step"]: entry for entry in curves[3]}
    for entry in curves[0]:
        assert entry["val_loss"] == at[entry["step"]]["val_loss"]
        assert entry["epoch"] == at[entry["step"]]["epoch"]
    assert at[4]["train_loss"] == pytest.approx(steps[3].loss)  # since step 3
    seconds = [entry["seconds"] for entry in curves[3]]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0


# --- evaluation ---------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_is_the_mean_of_all_rows_and_changes_nothing(training: bool) -> None:
    errors = None
    for batch_size in (1, 4, 11, 64):
        model = net(dropout=0.5)
        ours = trainer(model.train(training), batch_size=batch_size)
        before, state = weights(model), torch.get_rng_state()
        entry = ours.evaluate(VAL)
        assert model.training is training
        assert model[2].training is training  # type: ignore[index]
        assert_same_weights(model, before)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(p.grad is None for p in model.parameters())
        plain = net(dropout=0.0)
        errors = ((plain(VAL[0]) - VAL[1]) ** 2).sum(1)[VAL[2]]
        wanted = {"loss": errors.mean().item()}
        wanted["close"] = (errors < 1).double().mean().item()
        assert entry == pytest.approx(wanted, rel=1e-12)
    assert errors is not None
    assert 0 < len(errors) < N_VAL  # some were left out


# --- killed and resumed -------------------------------------------------------------

LONG = {"epochs": 4, "schedule": "cosine", "eval_every": 3, "warmup": 2}
SETTINGS = {"lr": 1e-2, "layers": (5, 8, 2)}


def long_run(folder: Path | None = None, **watches: Any) -> Trainer:
    """With everything that could be forgotten over a restart."""
    model = net(dropout=0.3)
    return trainer(model, folder=folder, settings=SETTINGS, **LONG, **watches)


def uninterrupted() -> Trainer:
    ours = long_run()
    ours.fit(TRAIN, VAL, auxiliary=EXTRA)
    return ours


def assert_goes_on_as_if_nothing_had_happened(folder: Path) -> None:
    notices: list[str] = []
    resumed, reference = long_run(folder, on_notice=notices.append), uninterrupted()
    resumed.fit(TRAIN, VAL, auxiliary=EXTRA, resume=True)
    assert told(resumed.curve) == told(reference.curve)
    assert_same_weights(resumed.model, weights(reference.model))
    assert resumed.step == 4 * STEPS
    assert "going on from" in notices[-1]


class StoppedError(Exception):
    """By the test."""


@pytest.mark.parametrize("stop", range(LONG["eval_every"] + 1, 4 * STEPS + 1))
def test_a_run_stopped_after_any_step_goes_on(stop: int, tmp_path: Path) -> None:
    def watch(at: Progress) -> None:
        if at.step == stop:
            raise StoppedError

    with pytest.raises(StoppedError):
        long_run(tmp_path, on_step=watch).fit(TRAIN, VAL, auxiliary=EXTRA)
    assert_goes_on_as_if_nothing_had_happened(tmp_path)


def test_a_paused_trainer_goes_on_to_the_same_numbers() -> None:
    """Without a checkpoint, at each of its evaluations, within epochs and between."""
    ours = long_run()
    ours.paused = lambda: True
    calls = 0
    while ours.step < 4 * STEPS:
        ours.fit(TRAIN, VAL, auxiliary=EXTRA)
        calls += 1
    reference = uninterrupted()
    assert calls == len(reference.curve)
    assert told(ours.curve) == told(reference.curve)
    assert_same_weights(ours.model, weights(reference.model))


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_a_run_goes_on_on_another_kind_of_device_with_masks_of_its_own(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if its checkpoint, made within an epoch, were from a GPU."""

    def elsewhere(_: torch.device) -> dict[str, Tensor]:
        return {kind: torch.zeros(16, dtype=torch.uint8)}

    def watch(at: Progress) -> None:
        if at.step == 4:
            raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr("ssm.training._random_state", elsewhere)
        with pytest.raises(StoppedError):
            long_run(tmp_path, on_step=watch).fit(TRAIN, VAL, auxiliary=EXTRA)
    curves = []
    for copy in ("one", "other"):
        folder = Path(shutil.copytree(tmp_path, tmp_path.parent / f"{kind} {copy}"))
        resumed = long_run(folder)
        curves.append(told(resumed.fit(TRAIN, VAL, auxiliary=EXTRA, resume=True)))
        assert resumed.step == 4 * STEPS
    assert curves[0] == curves[1]
    reference = told(uninterrupted().curve)
    assert curves[0][:1] == reference[:1]
    assert curves[0] != reference  # other masks


def test_a_finished_run_has_nothing_left_to_do(tmp_path: Path) -> None:
    curve = long_run(tmp_path).fit(TRAIN, VAL)
    steps: list[Progress] = []
    again = long_run(tmp_path, on_step=steps.append)
    assert again.fit(TRAIN, VAL, resume=True) == curve
    assert not steps


def process(*arguments: object, launcher: Sequence[str] = ()) -> subprocess.Popen[str]:
    """This file as a program, in a process group of its own."""
    command = [sys.executable, *launcher, __file__, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def train_slowly(folder: str) -> None:
    """Program: a long run, to be killed from outside."""
    slow = long_run(Path(folder), on_step=lambda _: time.sleep(0.3))
    slow.fit(TRAIN, VAL, auxiliary=EXTRA)


def train_until_killed_in_a_write(folder: str) -> None:
    """Program: a run that is killed while it writes its third checkpoint."""
    store, files = stored._store, []

    def last(path: Path, data: bytes) -> None:
        files.append(path)
        if len(files) == 10:  # four files a checkpoint
            path.write_bytes(data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        store(path, data)

    stored._store = last
    long_run(Path(folder)).fit(TRAIN, VAL, auxiliary=EXTRA)


def test_runs_killed_by_the_system_go_on_bit_for_bit(tmp_path: Path) -> None:
    between, inside = tmp_path / "between", tmp_path / "inside"
    slow = process("train_slowly", between)
    writing = process("train_until_killed_in_a_write", inside)
    try:
        deadline = time.monotonic() + 100
        while not [*between.glob("checkpoint-*")]:
            assert slow.poll() is None, slow.communicate()[0]
            assert time.monotonic() < deadline, "no checkpoint"
            time.sleep(0.01)
        time.sleep(0.5)  # a step or two behind the first evaluation
        slow.kill()
        for run in (slow, writing):
            output, _ = run.communicate(timeout=100)
            assert run.returncode == -signal.SIGKILL, output
    finally:
        slow.kill()
        writing.kill()
    assert (between / "checkpoint-00000003").exists()  # inside the first epoch
    assert any(path.name.startswith(".partial-") for path in inside.iterdir())
    for folder in (between, inside):
        assert_goes_on_as_if_nothing_had_happened(folder)
        assert [path.name for path in sorted(folder.iterdir())] == [
            "checkpoint-00000015",
            "checkpoint-00000016",
        ]


# --- several processes --------------------------------------------------------------


class Shifted(nn.Module):
    """Has a buffer, which PyTorch sends around before a pass, and counts its rows."""

    offset: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.trained = 0
        self.inner = net()
        self.register_buffer("offset", torch.tensor([0.25], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.trained += len(x) * self.training
        return self.inner(x) + self.offset


# 33 rows: batches of 7, 7, 7, 7, 5; 13 to validate on: 7 and 6, in 1 batch each or 2.
TOKENS = sequences(33, 1), sequences(13, 2)
ROWS = regression(33, 1), regression(13, 2)
Case = tuple[Callable[[], nn.Module], Objective, tuple[list[Tensor], list[Tensor]], int]
CASES: dict[str, Case] = {
    "rows": (Shifted, squares, ROWS, 6),
    "mamba": (lambda: tiny("mamba", dtype=torch.float32), next_token, TOKENS, 7),
    "jamba": (lambda: tiny("jamba"), next_token, TOKENS, 7),
    "auxiliary": (net, squares, ROWS, 6),
}
AUXILIARY = {"auxiliary": EXTRA}


def train_case(
    name: str, folder: Path | None = None, *, resume: bool = False
) -> tuple[list[float], Trainer]:
    make, objective, (train, val), size = CASES[name]
    steps: list[Progress] = []
    options = {"epochs": 4, "batch_size": size, "weight_decay": 0.1, "lr": 1e-3}
    options |= {"schedule": "cosine", "objective": objective, "folder": folder}
    ours = trainer(make(), on_step=steps.append, **options)
    ours.fit(train, val, auxiliary=AUXILIARY.get(name), resume=resume)
    return [at.loss for at in steps], ours


def train_together(folder: str) -> None:
    """Program: one of the processes that ``torchrun`` starts."""
    runs = {name: partial(train_case, name) for name in CASES}
    runs["resumed"] = partial(train_case, "rows", Path(folder, "alone"), resume=True)
    for name, run in runs.items():
        losses, ours = run()
        assert ours.accelerator.num_processes == 2
        rank = ours.accelerator.process_index
        found = {"losses": losses, "curve": told(ours.curve)}
        found |= {"rows": getattr(ours.model, "trained", None)}
        found["weights"] = {k: x.tolist() for k, x in ours.model.state_dict().items()}
        Path(folder, f"{name}-{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def assert_alike(folder: Path, name: str, losses: list[float], one: Trainer) -> None:
    """What two processes found is what ``one`` found, to 1e-6."""
    first, second = (
        json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in (0, 1)
    )
    rows = first.pop("rows"), second.pop("rows")
    assert first == second, name
    if isinstance(one.model, Shifted):  # each has its part of every batch
        assert sum(rows) == 33 * len(losses) // 6
        assert 0 <= rows[0] - rows[1] <= len(losses)
    assert first["losses"] == pytest.approx(losses, rel=1e-6), name
    for entry, wanted in zip(first["curve"], told(one.curve), strict=True):
        assert entry == pytest.approx(wanted, rel=1e-6), name
    for key, x in weights(one.model).items():
        actual = torch.tensor(first["weights"][key], dtype=x.dtype)
        scale = float(x.abs().max())
        assert float((actual - x).abs().max()) <= 1e-6 * scale, (name, key)


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    saved = tmp_path / "alone"
    alone = {name: train_case(name) for name in CASES}
    losses, one = train_case("rows", saved)
    shutil.rmtree(max(saved.iterdir()))  # as if killed in the last of four epochs
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launcher += ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    together = process("train_together", tmp_path, launcher=launcher)
    try:
        output, _ = together.communicate(timeout=200)
    finally:
        together.terminate()
    assert together.returncode == 0, output
    assert "Warning" not in output
    for name, (found, alike) in alone.items():
        assert len(found) >= 20
        assert_alike(tmp_path, name, found, alike)
    assert_alike(tmp_path, "resumed", losses[len(losses) * 3 // 4 :], one)
    assert len([*saved.iterdir()]) == 2


# --- not finite ---------------------------------------------------------------------


class Fragile(nn.Module):
    """Divides by zero from training call ``last`` + 1 on."""

    def __init__(self, last: int) -> None:
        super().__init__()
        self.calls, self.last = 0, last

    def forward(self, x: Tensor) -> Tensor:
        self.calls += int(self.training)
        return x / float(self.calls <= self.last)


def fragile(last: int) -> nn.Module:
    body = nn.Sequential(nn.Linear(5, 8), Fragile(last))
    return moved(nn.Sequential(body, nn.Linear(8, 2), nn.Identity()).double())


def error_of(ours: Trainer, val: Sequence[Tensor] = VAL) -> str:
    with pytest.raises(DivergenceError) as caught:
        ours.fit(TRAIN, val)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("grad_clip", [0.0, 1.0])
def test_a_loss_that_becomes_nan_is_traced_to_its_layer(
    grad_clip: float, tmp_path: Path
) -> None:
    last: dict[str, dict[str, Tensor]] = {}

    def watch(_: Progress) -> None:
        last["model"] = weights(model)
        last["optimizer"] = checkpoints.optimizer_tensors(ours.optimizer)
        last["optimizer"] = {k: x.clone() for k, x in last["optimizer"].items()}

    model = fragile(last=6)
    ours = trainer(model, folder=tmp_path, grad_clip=grad_clip, on_step=watch)
    text = error_of(ours)
    assert "at step 7," in text
    assert "first in the output of 0.1;" in text
    assert "loss of nan" in text
    assert_same_weights(model, last["model"])
    for name, x in checkpoints.optimizer_tensors(ours.optimizer).items():
        assert torch.equal(x, last["optimizer"][name])
    found, notices = checkpoints.newest(tmp_path)
    assert found is not None
    assert not notices
    assert str(found.path) in text
    assert found.state["step"] == STEPS
    before = fragile(last=99)
    trainer(before, epochs=1, grad_clip=grad_clip).fit(TRAIN, VAL)
    assert_same_weights(before, found.tensors["model"])


class RootOf(nn.Module):
    """Adds the root of a parameter: finite at 0, with an infinite slope."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 2)
        self.area = nn.Parameter(torch.zeros(2))
        self.last = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.head(x) + self.area.sqrt())


class NanSlope(RootOf):
    """As above, but the gradient is 0 times infinity."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.head(x) + torch.where(self.area > 0, self.area.sqrt(), 0))


@pytest.mark.parametrize("grad_clip", [0.0, 1.0])
@pytest.mark.parametrize("kind", [RootOf, NanSlope])
def test_an_infinite_gradient_is_traced_to_its_parameter(
    kind: type[RootOf], grad_clip: float
) -> None:
    model = kind().double()
    with torch.no_grad():
        model.last.weight.fill_(0.5)
        model.head.weight.fill_(0.25)
    before = weights(model)
    text = error_of(trainer(model, grad_clip=grad_clip))
    assert "at step 1, first in the gradient of area;" in text
    assert "no checkpoint was written yet" in text
    assert "loss of nan" not in text
    assert_same_weights(model, before)


class Root(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sqrt()


def test_of_many_infinite_gradients_the_first_of_the_backward_pass_is_named() -> None:
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 3), Root(), nn.Linear(3, 2))
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.zero_()
    text = error_of(trainer(model.double()))
    assert "first in the gradient of 1.bias;" in text
    assert not torch.isfinite(model[0].weight.grad).any()


def test_a_validation_loss_that_is_not_finite_stops_the_run_unsaved(
    tmp_path: Path,
) -> None:
    model = moved(nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2)).double())
    val = [x.clone() for x in VAL]
    val[0][3, 1], val[2][3] = math.inf, True
    text = error_of(trainer(model, folder=tmp_path), val=val)
    assert "a validation loss of nan after step 4, first in the output of 0;" in text
    assert checkpoints.newest(tmp_path) == (None, [])


def test_a_loss_without_a_culprit_is_called_itself() -> None:
    def objective(model: nn.Module, batch: Batch) -> Scores:
        scores = squares(model, batch)
        return scores._replace(penalty=torch.tensor(math.inf))

    assert "first in the loss itself" in error_of(trainer(net(), objective=objective))


# --- how and where ------------------------------------------------------------------


def test_bfloat16_computes_in_16_bits_and_learns_in_32() -> None:
    model, seen = net(dtype=torch.float32), set()
    model[0].register_forward_hook(lambda m, i, out: seen.add(out.dtype))  # type: ignore[index]
    train, val = (regression(n, n, torch.float32) for n in (70, 30))
    rule = torch.randn(5, 2, generator=draws(9))
    for data in (train, val):
        data[1] = (data[0] @ rule).tanh()
    ours = trainer(model, precision="bfloat16", lr=0.02, epochs=6)
    first = ours.evaluate(val)["loss"]
    curve = ours.fit(train, val)
    assert seen == {torch.bfloat16}
    for tensors in (model.state_dict(), checkpoints.optimizer_tensors(ours.optimizer)):
        assert {x.dtype for x in tensors.values()} == {torch.float32}
    assert curve[-1]["val_loss"] < 0.5 * first


def test_compiled_steps_are_the_same_steps() -> None:
    found = []
    for compiled in (False, True):
        steps: list[Progress] = []
        ours = trainer(net(), compile=compiled, on_step=steps.append)
        assert isinstance(ours._called, torch._dynamo.OptimizedModule) is compiled
        curve = ours.fit([x[:14] for x in TRAIN], [x[:7] for x in VAL])
        assert not any("_orig_mod" in name for name in ours.model.state_dict())
        found.append([at.loss for at in steps] + [e["val_loss"] for e in curve])
    assert found[0] == pytest.approx(found[1], rel=1e-9)


class Reciprocal(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 1 / (x * 0)


class Called:
    """Stands for a CUDA graph where there is no GPU: calls what it would record."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


@pytest.fixture
def graphs_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers take the steps that a GPU would record, on this processor."""

    def make_optimizer(
        self: Trainer, groups: list[dict[str, Any]]
    ) -> torch.optim.Optimizer:
        if not self.config.cuda_graph:
            return torch.optim.AdamW(groups)
        for group in groups:
            group["lr"] = torch.tensor(group["lr"])
        return GuardedAdamW(groups)

    monkeypatch.setattr(training, "Graphed", Called)
    monkeypatch.setattr(Trainer, "_make_optimizer", make_optimizer)


@pytest.mark.usefixtures("graphs_on_the_cpu")
def test_steps_made_for_a_graph_are_the_same_steps() -> None:
    """Batches of odd size too, auxiliary rows, dropout, clipping, a falling rate."""
    assert_same_curves(schedule="cosine", grad_clip=0.3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("grad_clip", [0.0, 0.3])
def test_recorded_steps_are_the_same_steps(grad_clip: float) -> None:
    assert_same_curves(device="cuda", epochs=4, schedule="cosine", grad_clip=grad_clip)


def assert_same_curves(**changes: Any) -> None:
    curves, losses = [], []
    val = regression(40, 2)  # enough batches to record a validation too
    for cuda_graph in (False, True):
        steps: list[Progress] = []
        ours = trainer(net(0.2), cuda_graph=cuda_graph, on_step=steps.append, **changes)
        curves.append(told(ours.fit(TRAIN, val, auxiliary=EXTRA)))
        losses.append({at.step: at.loss for at in steps})
        assert [at.step for at in steps] == list(range(1, ours.step + 1))
    for plain, graphed in zip(*curves, strict=True):
        assert graphed == pytest.approx(plain, rel=1e-6)
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


@pytest.mark.usefixtures("graphs_on_the_cpu")
def test_a_step_for_a_graph_that_is_not_finite_changes_no_weight() -> None:
    kept: list[dict[str, Tensor]] = []
    model = fragile(last=2)
    ours = trainer(
        model, cuda_graph=True, on_step=lambda _: kept.append(weights(model))
    )
    text = error_of(ours)
    assert "at step 3," in text
    assert "first in the output of 0.1;" in text
    assert_same_weights(model, kept[1])


class RootOfMarked(RootOf):
    """Its gradient is infinite for a batch with a number above 9."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.head(x)
        return self.last(hidden + self.area.sqrt() if bool((x > 9).any()) else hidden)


@pytest.mark.usefixtures("graphs_on_the_cpu")
def test_a_recorded_step_is_traced_though_the_next_one_has_run() -> None:
    model = RootOfMarked().double()
    ours = trainer(model, cuda_graph=True)
    order = training.batches(
        len(TRAIN[0]), ours.config.batch_size, ours.config.seed, epoch=0
    )
    inputs = TRAIN[0].clone()
    inputs[order[1][0], 0] = 10.0
    with pytest.raises(DivergenceError, match=r"at step 2, first in the gradient of a"):
        ours.fit([inputs, *TRAIN[1:]], VAL)


@pytest.mark.parametrize(("kind", "called"), [("cpu", False), ("cuda", True)])
def test_parts_are_scored_together_where_a_gpu_would_be_idle(
    kind: str, called: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def together(model: nn.Module, parts: Sequence[Batch]) -> list[Scores]:
        calls.append(len(parts))
        return [squares(model, part) for part in parts]

    ours = trainer(net())
    ours.together = together
    monkeypatch.setattr(Trainer, "device", torch.device(kind))
    batch = tuple(x[:3] for x in TRAIN)
    expected = float(squares(ours.model, batch).loss.detach())
    for parts in ([batch, batch], [batch]):  # one part has no other to join
        found = ours._scores(parts)
        losses = [float(scores.loss.detach()) for scores in found]
        assert losses == [expected] * len(parts)
    assert calls == ([2] if called else [])


def test_a_graph_without_a_gpu_is_one_line() -> None:
    with pytest.raises(ArgumentError, match=r"cuda_graph.*one process on a GPU"):
        trainer(net(), cuda_graph=True)


def test_compiled_layers_are_named_too() -> None:
    model = nn.Sequential(nn.Linear(5, 2), Reciprocal()).double()
    torch._dynamo.utils.counters.clear()
    assert "first in the output of 1;" in error_of(trainer(model, compile=True))
    assert not torch._dynamo.utils.counters["graph_break"]  # not compiled for that


@pytest.mark.parametrize(
    ("precision", "expected"),
    [("float32", "highest"), ("tensorfloat32", "high"), ("bfloat16", "highest")],
)
def test_the_precision_of_products_is_asked_for_and_put_back(
    precision: str, expected: str
) -> None:
    seen: set[str] = set()

    def watch(_: Progress) -> None:
        seen.add(torch.get_float32_matmul_precision())

    torch.set_float32_matmul_precision("medium")
    try:
        trainer(net(), precision=precision, on_step=watch).fit(TRAIN, VAL)
        assert seen == {expected}
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_deterministic_algorithms_are_asked_for_and_put_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    state: set[bool] = set()

    def watch(_: Progress) -> None:
        state.add(torch.are_deterministic_algorithms_enabled())

    def flags() -> tuple[bool, bool]:
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        )

    assert flags() == (False, False)
    trainer(net(), deterministic=True, on_step=watch).fit(TRAIN, VAL)
    assert state == {True}
    assert flags() == (False, False)
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        for wanted in (True, False):
            trainer(net(), deterministic=wanted).fit(TRAIN, VAL)
            assert flags() == (True, True)
    finally:
        torch.use_deterministic_algorithms(False)
    with pytest.raises(DivergenceError):
        trainer(fragile(1), deterministic=True).fit(TRAIN, VAL)
    assert flags() == (False, False)


@pytest.mark.parametrize("device", ["tpu", "cuda", "CPU", ""])
def test_a_device_that_is_not_there_is_one_line(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        ArgumentError, match=r"^device: got .*; expected one of"
    ) as caught:
        trainer(net(), device=device)
    assert "\n" not in str(caught.value)
    assert repr(device) in str(caught.value)
    assert "'cpu'" in str(caught.value)


WRONG = {
    "epochs": 0,
    "batch_size": 0,
    "warmup": -1,
    "grad_clip": math.nan,
    "eval_every": -1,
    "weight_decay": -0.1,
    "seed": -1,
    "lr": math.inf,
    "schedule": "step",
    "precision": "float16",
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_settings_are_one_line(name: str) -> None:
    with pytest.raises(ArgumentError, match=f"^{name}: got .*; expected") as caught:
        config(**{name: WRONG[name]})
    assert "\n" not in str(caught.value)
    assert repr(WRONG[name]) in str(caught.value)


def test_a_negative_number_of_steps_is_one_line() -> None:
    with pytest.raises(ArgumentError, match=r"^max_steps: got -1; expected 0 or more"):
        trainer(net(), max_steps=-1)


@pytest.mark.parametrize("name", ["train", "val", "auxiliary"])
def test_no_rows_at_all_are_one_line(name: str) -> None:
    data = {"train": TRAIN, "val": VAL} | {name: [x[:0] for x in VAL]}
    with pytest.raises(ArgumentError, match=f"^{name}: got 0 rows; expected"):
        trainer(net()).fit(**data)


PROGRAMS = (train_slowly, train_until_killed_in_a_write, train_together)

if __name__ == "__main__":
    program, argument = sys.argv[1:]
    {each.__name__: each for each in PROGRAMS}[program](argument)
