"""The one training loop of every package; nothing in it names a task or a model.

A task is an :data:`Objective`: what it scores on a batch. Everything random is a
function of the seed, a name and the epoch (the order of the examples, dropout), so that
a checkpoint holds no generator's state: the position in the data is the step. A run
that was killed goes on from its last checkpoint to the same numbers, on a CPU bit for
bit.

Over several processes (``torchrun``) each takes its share of every batch and gradients
are averaged with the weights of what each scored, through Hugging Face Accelerate: the
same losses as one process, up to the rounding of sums.
"""

import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from experiments.common import random_stream
from ssm import _checkpoints as checkpoints
from ssm._adamw import GuardedAdamW
from ssm._errors import ArgumentError, bad_argument
from ssm._graphs import Graphed, Reading
from ssm.layers._base import param_groups

if TYPE_CHECKING:
    from accelerate import Accelerator

Batch = tuple[Tensor, ...]
Precision = Literal["float32", "tensorfloat32", "bfloat16"]
Entry = dict[str, float]


class Scores(NamedTuple):
    """Sums over all that a batch scores; the loss minimised is loss / scored + penalty.

    ``sums`` are reported as means, too: {"accuracy": number of correct answers}.
    """

    loss: Tensor
    scored: Tensor
    sums: Mapping[str, Tensor]
    penalty: Tensor | None = None


Objective = Callable[[nn.Module, Batch], Scores]
Together = Callable[[nn.Module, Sequence[Batch]], list[Scores]]


class Progress(NamedTuple):
    """After each step: how many are done of how many, the loss, examples a second."""

    step: int
    steps: int
    loss: float
    examples_per_s: float


class _Recorded(NamedTuple):
    """A step that the GPU was given, and the rows that it was on."""

    step: int
    numbers: Reading  # loss, norm and the first part's sums
    drawn: Sequence[Tensor]


class DivergenceError(ArgumentError):
    """A loss or gradient that is not finite; the text says where and when."""


@dataclass(frozen=True)
class Watch:
    """What a run tells while it goes on; the defaults tell nothing."""

    on_step: Callable[[Progress], None] = lambda _: None
    on_entry: Callable[[Entry], None] = lambda _: None
    on_notice: Callable[[str], None] = lambda _: None


@dataclass(frozen=True)
class TrainingConfig:
    """How to train: AdamW by default rates but the first, over shuffled epochs.

    weight_decay: of matrices; with ``decay_all`` of A, D, dt, norms and biases, too.
    schedule: the learning rate after ``warmup`` steps of linear rise stays, or falls
    to 0 as half a cosine or as a line over the remaining steps. grad_clip: the largest
    norm of all gradients together, 0 for none. precision: of the matrix products
    (bfloat16 by autocast, tensorfloat32 on GPUs that have it; parameters and scans'
    states stay float32). eval_every: steps between evaluations, each with a checkpoint
    (with several processes only at the end of an epoch); 0 for one an epoch, which each
    epoch ends with anyhow. eval_batch_size: rows scored at once, 0 for ``batch_size``.
    device: "auto" is CUDA or MPS where there is one. cuda_graph: launch every step of
    ``batch_size`` examples as one CUDA graph (one process on one GPU); same numbers up
    to rounding, several times faster where a model is small.
    """

    epochs: int = 5
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.0
    decay_all: bool = False
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup: int = 0
    grad_clip: float = 1.0
    precision: Precision = "float32"
    compile: bool = False
    device: str = "auto"
    eval_every: int = 0
    eval_batch_size: int = 0
    deterministic: bool = False
    cuda_graph: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            _check(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        at_least_0 = ("warmup", "grad_clip", "eval_every", "eval_batch_size")
        for name in (*at_least_0, "weight_decay", "seed"):
            _check(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        _check("lr", self.lr, 0 < self.lr < math.inf, "above 0")
        _check("schedule", self.schedule, self.schedule in SCHEDULES, str([*SCHEDULES]))
        _check("precision", self.precision, self.precision in _MIXED, str([*_MIXED]))

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of step ``step`` (from 0) of ``steps``, over ``lr``."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, steps - self.warmup)
        return SCHEDULES[self.schedule](done)


SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda _: 1.0,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
}
_MIXED = {"float32": "no", "tensorfloat32": "no", "bfloat16": "bf16"}


def _check(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise bad_argument(name, repr(value), expected, "change it")


def stream_seed(seed: int, name: str) -> int:
    """A seed for PyTorch's generators, independent for every name."""
    return int(random_stream(seed, name).integers(2**63))


def batches(
    n: int,
    size: int,
    seed: int,
    epoch: int,
    stream: str = "batches",
    device: torch.device | str = "cpu",
) -> Sequence[Tensor]:
    """Indices of every batch of an epoch: all examples once, in an order of its own."""
    generator = torch.Generator().manual_seed(stream_seed(seed, f"{stream} {epoch}"))
    return torch.randperm(n, generator=generator).to(device).split(size)


@dataclass
class Trainer:
    """A model, what it is scored by, and where its checkpoints go (None: nowhere).

    ``settings`` (JSON values) say what the run is: a checkpoint made with others is
    refused. A run ends before its last epoch does after ``max_steps`` steps (0: it does
    not), and where ``stop`` of an evaluation's entry is true; where ``paused``, asked
    after each evaluation, is, it can go on later. ``together`` scores all
    parts of a step by one call of the model, as ``objective`` would one by one: on a
    GPU, which a small part leaves idle. Called: ``on_step`` after
    every step, ``on_entry`` after every evaluation, ``on_notice`` with what a user
    should know.
    """

    model: nn.Module
    objective: Objective
    config: TrainingConfig
    folder: Path | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    max_steps: int = 0
    stop: Callable[[Entry], bool] = lambda _: False
    paused: Callable[[], bool] = lambda: False
    together: Together | None = None
    on_step: Callable[[Progress], None] = lambda _: None
    on_entry: Callable[[Entry], None] = lambda _: None
    on_notice: Callable[[str], None] = lambda _: None

    def __post_init__(self) -> None:
        config = self.config
        _check("max_steps", self.max_steps, self.max_steps >= 0, "0 or more")
        self.accelerator = make_accelerator(config)
        self.model.to(self.accelerator.device)
        groups = param_groups(self.model, config.lr, config.weight_decay)
        if config.decay_all:
            groups = [group | {"weight_decay": config.weight_decay} for group in groups]
        self._base_rates = [group["lr"] for group in groups]
        self._rate = 1.0  # of them, as the optimiser has it
        self.optimizer = self._make_optimizer(groups)
        called = torch.compile(self.model) if config.compile else self.model
        self._called: nn.Module = self.accelerator.prepare_model(called)
        self.step, self.epoch, self.batch = 0, 0, 0  # batch: done of this epoch
        self.ended = False  # before the last epoch did
        self._unread: _Recorded | None = None
        self._random: dict[str, Tensor] = {}  # after the last evaluation
        self.curve: list[Entry] = []

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.accelerator.device

    def _make_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        if not self.config.cuda_graph:
            return torch.optim.AdamW(groups)
        one_gpu = self.device.type == "cuda" and self.accelerator.num_processes == 1
        where = f"{self.accelerator.num_processes} processes on {self.device.type}"
        _check("cuda_graph", where, one_gpu, "one process on a GPU")
        for group in groups:  # where a recorded step reads it
            group["lr"] = torch.tensor(group["lr"], device=self.device)
        return GuardedAdamW(groups)

    def fit(
        self,
        train: Sequence[Tensor],
        val: Sequence[Tensor],
        *,
        auxiliary: Sequence[Tensor] | None = None,
        resume: bool = False,
    ) -> list[Entry]:
        """Train on the rows of ``train``; the curve, one entry an evaluation.

        Where there are ``auxiliary`` rows (an easier task, say), each step adds to the
        loss it minimises that of a batch of them; they are gone through as often as it
        takes, each time in a new order, and no entry counts them.

        An entry has step, epoch, lr, seconds, and train_ and val_ loss and sums (means
        since the last entry, and over all of ``val``). Raises DivergenceError where a
        loss or gradient is not finite, ArgumentError for checkpoints that do not fit.
        """
        parts = {"train": train, "val": val}
        if auxiliary is not None:
            parts["auxiliary"] = auxiliary
        self._check_rows(parts)
        if resume:
            self._restore()
        data = {k: [x.to(self.device) for x in rows] for k, rows in parts.items()}
        trained = [data[name] for name in ("train", "auxiliary") if name in data]
        self._graph, self._unread = Graphed(partial(self._update, trained)), None
        with (
            _random_state_kept(self.device),
            _determinism(self.config.deterministic),
            _products(self.config.precision),
        ):
            while self.epoch < self.config.epochs and not self.ended:
                if self._train_epoch(**data):
                    break
        return self.curve

    def evaluate(self, data: Sequence[Tensor]) -> Entry:
        """Mean loss and sums over all rows of ``data``."""
        data = [x.to(self.device) for x in data]
        was_training = self.model.training
        self._called.eval()
        score = partial(self._scored_values, data)
        graphed = Graphed(score) if self.config.cuda_graph else score
        size = self.config.eval_batch_size or self.config.batch_size
        with torch.no_grad():
            own = self._share(torch.arange(len(data[0]), device=self.device))
            found = [
                # a graph writes its next result over the last
                graphed(rows).clone() if len(rows) == size else score(rows)
                for rows in own.split(size)
            ]
        self._called.train(was_training)
        # Read once: each look at a GPU's numbers waits for it.
        values = torch.stack(found).cpu().double().sum(0).tolist()
        sums = dict(zip(self._validated, values, strict=True))
        return _means(self._over_processes(sums))

    def _scored_values(self, data: Sequence[Tensor], rows: Tensor) -> Tensor:
        """What ``self._validated`` will name, of some rows of ``data``."""
        named = _tensors(self._score(tuple(x[rows] for x in data)))
        self._validated = list(named)
        return self._stacked(named.values())

    def _stacked(self, values: Iterable[Tensor]) -> Tensor:
        """Numbers in one tensor, in the widest floating type of the device."""
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        found = [x.detach() for x in values]
        if len({x.dtype for x in found}) == 1:
            return torch.stack(found).to(wide)  # two kernels instead of one for each
        return torch.stack([x.to(wide) for x in found])

    def _check_rows(self, parts: Mapping[str, Sequence[Tensor]]) -> None:
        """Raise ArgumentError unless every process has a row of a batch."""
        least = self.accelerator.num_processes
        rows = {name: len(part[0]) for name, part in parts.items()}
        for name, n in (rows | {"batch_size": self.config.batch_size}).items():
            if n < least:
                raise bad_argument(
                    name, f"{n} rows", f"at least {least}, one a process", "add rows"
                )

    def _validate(self, val: Sequence[Tensor]) -> Entry:
        """As :meth:`evaluate`; raises DivergenceError for a loss that is not finite."""
        entry = self.evaluate(val)
        if not math.isfinite(entry["loss"]):
            got = f"a validation loss of {entry['loss']} after step {self.step}"
            raise self._stopped(got, lambda: self.evaluate(val))
        return entry

    def _train_epoch(
        self,
        train: Sequence[Tensor],
        val: Sequence[Tensor],
        auxiliary: Sequence[Tensor] | None = None,
    ) -> bool:
        """The rest of a pass over the training rows; whether the run leaves off."""
        config, started = self.config, time.perf_counter()
        self._called.train()
        self._start_masks()
        order = self._order(len(train[0]), self.epoch)
        steps, done = self._steps(len(order)), 0
        extra = None if auxiliary is None else self._passes(len(auxiliary[0]))
        data = [train] if auxiliary is None else [train, auxiliary]
        sums: dict[str, float] = {}
        for i, rows in enumerate(order[self.batch :], start=self.batch + 1):
            drawn = [rows] if extra is None else [rows, next(extra)]
            full = all(len(part) == config.batch_size for part in drawn)
            self._set_rates(steps)
            if config.cuda_graph and full:
                known = self._graphed_step(data, drawn, sums)
            else:
                known = self._read_step(data, sums)
                loss = self._step(self._parts(data, drawn), sums)
                known.append((self.step, loss))
            done += len(rows)
            pace = done / (time.perf_counter() - started)
            due = config.eval_every and self.step % config.eval_every == 0
            due = due or i == len(order) or self.step == steps
            if due:
                known += self._read_step(data, sums)
            for step, loss in known:
                self.on_step(Progress(step, steps, loss, pace))
            if due:
                entry = {"step": self.step, "epoch": self.epoch + i / len(order)}
                entry |= {"lr": config.lr * config.rate(self.step - 1, steps)}
                entry |= {f"train_{k}": v for k, v in _means(sums).items()}
                entry |= {f"val_{k}": v for k, v in self._validate(val).items()}
                before = self.curve[-1]["seconds"] if self.curve else 0.0
                entry["seconds"] = before + time.perf_counter() - started
                self.curve.append(entry)
                self.on_entry(entry)
                self.ended = self.step == self.max_steps or self.stop(entry)
                whole = i == len(order) and not self.ended
                self.epoch, self.batch = self.epoch + whole, 0 if whole else i
                self._random = _random_state(self.device)
                self._save()
                # by any process's clock, or the others would wait for it
                pauses = self._over_processes({"paused": float(self.paused())})
                if self.ended or pauses["paused"]:
                    return True
                sums, started, done = {}, time.perf_counter(), 0
        return False

    def _start_masks(self) -> None:
        """Draw dropout's masks by this epoch's stream, or go on where it was saved.

        A run that goes on on another kind of device cannot: it has a stream of its own.
        """
        if self.batch and _set_random_state(self.device, self._random):
            return
        at = f"{self.epoch} {self.batch}" if self.batch else f"{self.epoch}"
        stream = f"dropout {at} {self.accelerator.process_index}"
        torch.manual_seed(stream_seed(self.config.seed, stream))

    def _order(self, n: int, epoch: int, stream: str = "batches") -> list[Tensor]:
        """The batches of an epoch of n rows, where the rows are."""
        order = batches(
            n, self.config.batch_size, self.config.seed, epoch, stream, self.device
        )
        # Every process needs a row of every batch, or the others would wait for it.
        return [rows for rows in order if len(rows) >= self.accelerator.num_processes]

    def _passes(self, n: int) -> Iterator[Tensor]:
        """A batch of n auxiliary rows for this step and every later one."""
        passes, done = divmod(self.step, len(self._order(n, 0, "auxiliary")))
        for number in itertools.count(passes):
            yield from self._order(n, number, "auxiliary")[done:]
            done = 0

    def _steps(self, an_epoch: int) -> int:
        """How many steps the whole run has."""
        steps = an_epoch * self.config.epochs
        return min(steps, self.max_steps) if self.max_steps else steps

    def _set_rates(self, steps: int) -> None:
        """The learning rates of the next of ``steps`` steps."""
        rate = self.config.rate(self.step, steps)
        if rate == self._rate:
            return
        self._rate = rate
        groups = self.optimizer.param_groups
        for group, base in zip(groups, self._base_rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(base * rate)
            else:
                group["lr"] = base * rate

    def _step(self, parts: Sequence[Batch], sums: dict[str, float]) -> float:
        """One update; adds to ``sums`` and returns the mean loss of the first part."""
        (loss, found), *others = map(self._mean_loss, self._scores(parts))
        for more, _ in others:
            loss = loss + more
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(loss)
        parameters = list(self.model.parameters())
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        # Before clipping, which would spread what is not finite to every gradient.
        if not math.isfinite(float(loss.detach() + norm)):
            raise self._diverged(
                self.step + 1, float(loss.detach()), float(norm), parts
            )
        if self.config.grad_clip:
            nn.utils.clip_grads_with_norm_(parameters, self.config.grad_clip, norm)
        self.optimizer.step()
        self.step += 1
        _add(sums, found)
        return found["loss"] / max(1, found["scored"])

    def _graphed_step(
        self,
        data: Sequence[Sequence[Tensor]],
        drawn: Sequence[Tensor],
        sums: dict[str, float],
    ) -> list[tuple[int, float]]:
        """As :meth:`_step`, on the rows ``drawn`` from each part of ``data``.

        Its numbers are read when the next step is on its way: no GPU waits for Python.
        Returns the last step's number and loss, if there was one.
        """
        numbers = Reading(self._graph(*drawn))
        known = self._read_step(data, sums)
        self.step += 1
        self._unread = _Recorded(self.step, numbers, drawn)
        return known

    def _read_step(
        self, data: Sequence[Sequence[Tensor]], sums: dict[str, float]
    ) -> list[tuple[int, float]]:
        """Add to ``sums`` what the recorded step found, unless that was read."""
        if self._unread is None:
            return []
        (step, numbers, drawn), self._unread = self._unread, None
        loss, norm, *values = numbers.tolist()
        if not math.isfinite(loss + norm):
            parts = self._parts(data, drawn)
            self._differentiate(parts)  # the gradients there are the next step's
            raise self._diverged(step, loss, norm, parts)
        found = dict(zip(self._scored, values, strict=True))
        _add(sums, found)
        return [(step, found["loss"] / max(1, found["scored"]))]

    def _update(self, data: Sequence[Sequence[Tensor]], *rows: Tensor) -> Tensor:
        """:meth:`_step` without waiting for the GPU: loss, norm and first part's sums.

        Where the loss or the norm is not finite no update is made from then on.
        """
        parts = [
            tuple(x[own] for x in part) for part, own in zip(data, rows, strict=True)
        ]
        scores, loss = self._differentiate(parts)
        if not isinstance(self.optimizer, GuardedAdamW):
            raise AssertionError("steps are recorded with an optimiser that can be")
        norm = self.optimizer.update(loss, self.config.grad_clip)
        named = _tensors(scores[0])
        self._scored = list(named)
        return self._stacked((loss, norm, *named.values()))

    def _differentiate(self, parts: Sequence[Batch]) -> tuple[list[Scores], Tensor]:
        """Fill the gradients of what a recorded step minimises; scores, and the sum."""
        scores = self._scores(parts)
        loss = sum(map(_mean_score, scores[1:]), _mean_score(scores[0]))
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(loss)
        return scores, loss

    def _diverged(
        self, step: int, loss: float, norm: float, parts: Sequence[Batch]
    ) -> DivergenceError:
        """The error for a loss or a gradient of this step that is not finite."""
        return self._stopped(
            f"a loss of {loss} and gradients of norm {norm} at step {step}",
            lambda: self._scores(parts),
        )

    def _mean_loss(self, scores: Scores) -> tuple[Tensor, dict[str, float]]:
        """What to minimise of this process's part of a batch, and the batch's sums."""
        found = self._over_processes(_sums(scores))
        # Averaged over the processes, this is the gradient of the whole batch's mean.
        loss = scores.loss * (self.accelerator.num_processes / max(1, found["scored"]))
        return (loss if scores.penalty is None else loss + scores.penalty), found

    def _scores(self, parts: Sequence[Batch]) -> list[Scores]:
        """Of each part of a step."""
        if self.together is None or self.device.type == "cpu" or len(parts) == 1:
            return [self._score(batch) for batch in parts]
        with self.accelerator.autocast():
            return self.together(self._called, parts)

    def _score(self, batch: Batch) -> Scores:
        with self.accelerator.autocast():
            return self.objective(self._called, batch)

    def _parts(
        self, data: Sequence[Sequence[Tensor]], drawn: Sequence[Tensor]
    ) -> list[Batch]:
        """The batch of each part of the data."""
        return [self._rows(x, rows) for x, rows in zip(data, drawn, strict=True)]

    def _rows(self, data: Sequence[Tensor], rows: Tensor) -> Batch:
        """This process's part of a batch."""
        own = self._share(rows)
        return tuple(x[own] for x in data)

    def _share(self, rows: Tensor) -> Tensor:
        """The rows that are this process's."""
        parts = rows.tensor_split(self.accelerator.num_processes)
        return parts[self.accelerator.process_index]

    def _over_processes(self, sums: dict[str, float]) -> dict[str, float]:
        """The sums of all processes, added."""
        if self.accelerator.num_processes == 1:
            return sums
        values = torch.tensor([*sums.values()], dtype=torch.float64, device=self.device)
        added = self.accelerator.reduce(values, "sum")
        return dict(zip(sums, added.tolist(), strict=True))

    def _stopped(self, got: str, again: Callable[[], object]) -> DivergenceError:
        """What to say of a loss or gradient that is not finite, as ``again`` finds."""
        where = _first_not_finite(self.model, again)
        kept = "no checkpoint was written yet"
        if self.folder is not None and (found := checkpoints.newest(self.folder)[0]):
            kept = f"the last good checkpoint is {found.path}"
        return DivergenceError(
            f"training: got {got}, first in {where}; expected finite numbers; {kept}; "
            "lower the learning rate or grad_clip, or train in float32"
        )

    def _save(self) -> None:
        if self.folder is None or not self.accelerator.is_main_process:
            return
        if self.batch and not self.ended and self.accelerator.num_processes > 1:
            return  # the others' masks are not known here
        files = {
            "model": self.model.state_dict(),
            "optimizer": checkpoints.optimizer_tensors(self.optimizer),
            "random": self._random,
        }
        state = {
            "step": self.step,
            "epoch": self.epoch,
            "batch": self.batch,
            "curve": self.curve,
            "settings": dict(self.settings),
            "ended": self.ended,
        }
        checkpoints.write(self.folder, self.step, files, state)

    def _restore(self) -> None:
        """Go on from the last whole checkpoint, if there is one."""
        if self.folder is None:
            raise bad_argument(
                "resume", "no folder", "a folder of checkpoints", "name it"
            )
        found, notices = checkpoints.newest(self.folder)
        for notice in notices:
            self.on_notice(notice)
        if found is None:
            self.on_notice(
                f"no checkpoint in {self.folder}: starting from the beginning"
            )
            return
        checkpoints.check_settings(found, self.settings)
        checkpoints.check_model(
            self.model.state_dict(), found.tensors["model"], found.path
        )
        self.model.load_state_dict(found.tensors["model"])
        checkpoints.restore_optimizer(self.optimizer, found.tensors["optimizer"])
        self.step, self.epoch = found.state["step"], found.state["epoch"]
        self.batch = found.state.get("batch", 0)  # earlier versions': whole epochs
        self._random = found.tensors.get("random", {})
        self.curve, self.ended = found.state["curve"], found.state.get("ended", False)
        done = f"step {self.step}" if self.batch else f"epoch {self.epoch}"
        place = "where the run ended" if self.ended else f"after {done}"
        self.on_notice(f"going on from {found.path}, {place}")


def _tensors(scores: Scores) -> dict[str, Tensor]:
    return {"loss": scores.loss, "scored": scores.scored, **scores.sums}


def _sums(scores: Scores) -> dict[str, float]:
    return {name: float(value.detach()) for name, value in _tensors(scores).items()}


def _mean_score(scores: Scores) -> Tensor:
    """What one process minimises of a batch."""
    mean = scores.loss / scores.scored.clamp(min=1)
    return mean if scores.penalty is None else mean + scores.penalty


def _add(sums: dict[str, float], more: Mapping[str, float]) -> None:
    for name, value in more.items():
        sums[name] = sums.get(name, 0.0) + value


def _means(sums: Mapping[str, float]) -> Entry:
    scored = max(1.0, sums["scored"])
    return {name: value / scored for name, value in sums.items() if name != "scored"}


def with_perplexity(entry: Entry) -> Entry:
    """An entry of the curve, and e^loss of its validation."""
    loss = entry["val_loss"]
    return entry | {"val_perplexity": math.exp(loss) if loss < 700 else math.inf}


# --- where and how --------------------------------------------------------------------


def make_accelerator(config: TrainingConfig) -> "Accelerator":
    """Accelerate's view of the devices and processes of this run.

    Raises ArgumentError for a device that is not there.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    kinds = {"auto": True, "cpu": True, "cuda": torch.cuda.is_available()}
    kinds["mps"] = torch.backends.mps.is_available()
    if not kinds.get(config.device):
        there = [name for name, is_there in kinds.items() if is_there]
        raise bad_argument("device", repr(config.device), f"one of {there}", "choose")
    if not torch.distributed.is_initialized():
        # One state serves a whole process; the run before may have had another device.
        AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(
        cpu=config.device == "cpu", mixed_precision=_MIXED[config.precision]
    )


def device_name(device: torch.device) -> str | None:
    """An accelerator's name; None for the processor, which the log names itself."""
    if device.type == "cuda":
        return f"{device.type}: {torch.cuda.get_device_name(device)}"
    return None if device.type == "cpu" else device.type


def is_first_process() -> bool:
    """Whether this process speaks and writes for all (``torchrun`` sets RANK)."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    """Dropout can only draw from PyTorch's global generators: put them back after."""
    devices = [torch.cuda.current_device()] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        yield


def _random_state(device: torch.device) -> dict[str, Tensor]:
    """Where the generator is that dropout on this device draws from, by its kind."""
    if device.type == "cpu":
        return {"cpu": torch.get_rng_state()}
    return {device.type: getattr(torch, device.type).get_rng_state()}


def _set_random_state(device: torch.device, state: Mapping[str, Tensor]) -> bool:
    """Whether ``state`` has that of such a device, which then is set."""
    if device.type not in state:
        return False
    there = torch if device.type == "cpu" else getattr(torch, device.type)
    there.set_rng_state(state[device.type].cpu())
    return True


@contextmanager
def _products(precision: Precision) -> Iterator[None]:
    """Factors of products of float32 matrices as they are, or in tensorfloat32."""
    before = torch.get_float32_matmul_precision()
    high = precision == "tensorfloat32"
    torch.set_float32_matmul_precision("high" if high else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _determinism(wanted: bool) -> Iterator[None]:
    """PyTorch's deterministic algorithms; what has none raises an error."""
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warned)


def _first_not_finite(model: nn.Module, forward: Callable[[], object]) -> str:
    """The layer that first puts out NaN or infinity, else a parameter that gets it."""
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:  # noqa: ARG001
            leaves = torch.utils._pytree.tree_leaves(output)
            tensors = [x for x in leaves if isinstance(x, Tensor)]
            if not all(bool(torch.isfinite(x).all()) for x in tensors):
                found.append(f"the output of {name or 'the model'}")

        return look

    hooks = [m.register_forward_hook(watch(name)) for name, m in model.named_modules()]
    try:
        # Compiled code would not call the hooks, or be compiled anew for them.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    # Backward runs from the last parameter to the first: the last one was hit first.
    found += [
        f"the gradient of {name}"
        for name, parameter in reversed(list(model.named_parameters()))
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all())
    ]
    return found[0] if found else "the loss itself"
