"""The compiled training loop of this package; nothing in it names a model or a group.

A step is an update of AdamW on a batch, then a second, separate one on a few sequences
of ``extra`` (the published recipe: short ones, on which everything else rests). Steps
run in one compiled loop, on the device that holds the data, until the next evaluation
or the end of an epoch, or for about a second so that progress can be told.

Everything random is a function of the seed, a stream's name, and the epoch or step: a
checkpoint holds no generator's state, and a killed run goes on from its last one to the
same numbers, on a CPU bit for bit.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from experiments import checkpoints
from experiments.common import InputError, bad_input, random_stream
from lcde._checkpoints import restored, to_bytes
from lcde._watch import Tick, Watch

TICK_S = 1.0  # aimed at, between two reports of progress
CHECKPOINT_S = 30.0  # least time between two checkpoints, the last one excepted

Entry = dict[str, Any]


@runtime_checkable
class TokenModel(Protocol):
    """Logits (R, L, V) of sequences; with a key dropout is drawn from, else none."""

    def batch(
        self, tokens: Int[Array, "R L"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "R L V"]: ...


class Sequences(NamedTuple):
    """Tokens, and the token asked for at every position."""

    inputs: Int[Array, "n L"]
    targets: Int[Array, "n L"]


class Data(NamedTuple):
    """What is trained on, what is validated on, what the second update is on.

    ``extra`` may be None: then there is no second update.
    """

    train: Sequences
    val: Sequences
    extra: Sequences | None = None


@dataclass(frozen=True)
class TrainingConfig:
    """How to train: AdamW with the decay on every parameter, as published.

    extra_batch: sequences of the second update. schedule: the learning rate after
    ``warmup`` steps of linear rise stays, or falls to 0 as half a cosine by
    ``num_steps``. eval_every: steps between evaluations. threshold: the validation
    accuracy above which an evaluation ends the run. eval_rows: sequences evaluated at
    once.
    """

    batch_size: int = 32
    extra_batch: int = 3
    learning_rate: float = 2e-4
    weight_decay: float = 0.01
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: int = 0
    num_steps: int = 1_000_000
    eval_every: int = 250
    threshold: float = 0.9
    eval_rows: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_steps", "eval_every", "eval_rows"):
            _check(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("extra_batch", "warmup", "weight_decay", "seed"):
            _check(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        rate, level = self.learning_rate, self.threshold
        _check("learning_rate", rate, 0 < rate < math.inf, "a number above 0")
        _check("threshold", level, 0 < level <= 1, "a share above 0, at most 1")

    def rate(self, step: Int[Array, ""] | int) -> Float[Array, ""]:
        """The learning rate of a step, counted from 0."""
        risen = jnp.minimum(1.0, (step + 1) / max(1, self.warmup))
        after = (step - self.warmup) / max(1, self.num_steps - self.warmup)
        fallen = SCHEDULES[self.schedule](jnp.clip(after, 0.0, 1.0))
        return jnp.asarray(self.learning_rate * risen * fallen)


SCHEDULES: dict[str, Callable[[Array], Array]] = {
    "constant": jnp.ones_like,
    "cosine": lambda done: 0.5 * (1 + jnp.cos(math.pi * done)),
}


def _check(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise bad_input(name, value, expected, "change it")


class DivergenceError(InputError):
    """A loss that is not finite; the text says at which step, and what is kept."""


class Scores(NamedTuple):
    """Of an evaluation: mean loss, and accuracy over all positions and at each."""

    loss: float
    accuracy: float
    per_position: list[float]


class Moving(NamedTuple):
    """What steps change: parameters, AdamW's state, the losses since an evaluation.

    ``bad``: the first step, from 1, whose loss is not finite; 0 for none.
    """

    parameters: PyTree
    optimizer: PyTree
    loss_sum: Float[Array, ""]
    loss: Float[Array, ""]
    bad: Int[Array, ""]

    @classmethod
    def start(cls, parameters: PyTree, adamw: Any) -> "Moving":
        """Nothing done yet; copies, since steps take over the memory they are given."""
        parameters = jax.tree.map(jnp.copy, parameters)
        dtype = jnp.result_type(*jax.tree.leaves(parameters))
        zeros = jnp.zeros((), dtype), jnp.zeros((), dtype)
        bad = jnp.zeros((), jnp.int32)
        return cls(parameters, adamw.init(parameters), *zeros, bad)


class Plan(NamedTuple):
    """What steps leave as it is.

    rest: the model without its parameters. parts: the data of each update of a step.
    dropout: the key from which every update gets one of its own.
    """

    rest: PyTree
    parts: list[Sequences]
    dropout: PRNGKeyArray
    config: TrainingConfig

    def adamw(self) -> Any:
        """The optimiser, which counts updates."""
        config, updates = self.config, len(self.parts)
        return optax.adamw(
            lambda count: config.rate(count // updates),
            weight_decay=config.weight_decay,
        )


# --- compiled -------------------------------------------------------------------------

Orders = list[Int[Array, "_ _"]]  # for each part: the rows of every batch of an epoch
Span = tuple[Int[Array, ""], Int[Array, ""]]


@eqx.filter_jit(donate="all-except-first")
def _steps(given: tuple[Plan, Orders, Span], now: Moving) -> Moving:
    """Steps start … stop - 1, fewer where a loss is not finite."""
    plan, orders, (start, stop) = given

    def goes_on(at: tuple[Array, Moving]) -> Array:
        step, now = at
        return (step < stop) & (now.bad == 0)

    def body(at: tuple[Array, Moving]) -> tuple[Array, Moving]:
        step, now = at
        rows = [order[step % len(order)] for order in orders]
        batches = [
            Sequences(part.inputs[i], part.targets[i])
            for i, part in zip(rows, plan.parts, strict=True)
        ]
        return step + 1, _one_step(plan, now, batches, step)

    return jax.lax.while_loop(goes_on, body, (start, now))[1]


def _one_step(
    plan: Plan, now: Moving, batches: list[Sequences], step: Int[Array, ""]
) -> Moving:
    """An update on each batch; the first one's loss is reported."""
    parameters, optimizer, adamw, losses = *now[:2], plan.adamw(), []
    for i, batch in enumerate(batches):
        key = jr.fold_in(plan.dropout, len(batches) * step + i)
        loss, gradient = jax.value_and_grad(_loss)(parameters, plan.rest, batch, key)
        change, optimizer = adamw.update(gradient, optimizer, parameters)
        parameters = optax.apply_updates(parameters, change)
        losses.append(loss)
    finite = jnp.isfinite(jnp.stack(losses)).all()
    return Moving(
        parameters,
        optimizer,
        now.loss_sum + losses[0],
        losses[0],
        jnp.where(finite, 0, step + 1).astype(jnp.int32),
    )


def _loss(
    parameters: PyTree, rest: PyTree, batch: Sequences, key: PRNGKeyArray
) -> Float[Array, ""]:
    """Cross entropy, averaged over positions and sequences."""
    logits = eqx.combine(parameters, rest).batch(batch.inputs, key=key)
    return _cross_entropy(logits, batch.targets).mean()


@eqx.filter_jit
def _chunk_scores(
    model: Any, chunk: Sequences, counted: Bool[Array, " R"]
) -> tuple[Int[Array, " L"], Float[Array, ""]]:
    """Right answers at each position, and the loss, summed over the rows that count."""
    logits = model.batch(chunk.inputs)
    right = (logits.argmax(-1) == chunk.targets) & counted[:, None]
    loss = _cross_entropy(logits, chunk.targets).sum(1)
    return right.sum(0, dtype=jnp.int32), jnp.where(counted, loss, 0).sum()


def _cross_entropy(
    logits: Float[Array, "R L V"], targets: Int[Array, "R L"]
) -> Float[Array, "R L"]:
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


# --- streams --------------------------------------------------------------------------


def stream_key(seed: int, name: str) -> PRNGKeyArray:
    """A key for each pair of seed and purpose, as ``random_stream``."""
    return jr.key(int(random_stream(seed, name).integers(2**31)))


@dataclass
class Epochs:
    """Batches of ``size`` rows out of n: each once an epoch, in an order of its own.

    The rest of an epoch that fills no batch is left out of it.
    """

    n: int
    size: int
    key: PRNGKeyArray
    _held: tuple[int, Int[Array, "steps size"]] | None = None

    @property
    def steps(self) -> int:
        """Batches of an epoch."""
        return self.n // self.size

    def order(self, step: int) -> Int[Array, "steps size"]:
        """The batches of the epoch that ``step`` belongs to."""
        epoch = step // self.steps
        if self._held is None or self._held[0] != epoch:
            rows = jr.permutation(jr.fold_in(self.key, epoch), self.n)
            order = rows[: self.steps * self.size].reshape(self.steps, self.size)
            self._held = epoch, order
        return self._held[1]

    def end(self, step: int) -> int:
        """The first step of the next epoch."""
        return (step // self.steps + 1) * self.steps


# --- the trainer ----------------------------------------------------------------------


@dataclass
class Trainer:
    """A model, its data, and where its checkpoints go (None: nowhere).

    ``settings`` (JSON values) say what the run is: a checkpoint made with others is
    refused. ``checkpoint_s``: least seconds between checkpoints, which are made after
    evaluations.
    """

    model: TokenModel
    data: Data
    config: TrainingConfig
    folder: Path | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    watch: Watch = field(default_factory=Watch)
    checkpoint_s: float = CHECKPOINT_S

    def __post_init__(self) -> None:
        config, data = self.config, self.data
        parts = [data.train]
        self._epochs = [_epochs("train", data.train, config.batch_size, config.seed)]
        if data.extra is not None and config.extra_batch:
            parts.append(data.extra)
            extra = _epochs("extra", data.extra, config.extra_batch, config.seed)
            self._epochs.append(extra)
        parameters, rest = eqx.partition(self.model, eqx.is_inexact_array)
        dropout = stream_key(config.seed, "dropout")
        self._plan = Plan(rest, parts, dropout, config)
        self._now = Moving.start(parameters, self._plan.adamw())
        self.step, self.seconds = 0, 0.0
        self.curve: list[Entry] = []

    @property
    def reached(self) -> bool:
        """Whether the last evaluation was above the threshold."""
        return bool(self.curve) and (
            self.curve[-1]["val_accuracy"] > self.config.threshold
        )

    def trained(self) -> Any:
        """The model as it is now; the next step takes over its memory."""
        return eqx.combine(self._now.parameters, self._plan.rest)

    def fit(self, *, resume: bool = False) -> list[Entry]:
        """Train until an evaluation is above the threshold, or for all steps.

        Returns the curve, an entry an evaluation: step, epoch, lr, train_loss (mean
        since the last entry), val_loss, val_accuracy, val_accuracy_per_position,
        seconds. Raises DivergenceError for a loss that is not finite, InputError for
        checkpoints that do not fit.
        """
        if resume:
            self._restore()
        begun, saved, self._pace = time.perf_counter() - self.seconds, -math.inf, 0.0
        while self.step < self.config.num_steps and not self.reached:
            self._run_block()
            self.seconds = time.perf_counter() - begun
            if not self._due():
                continue
            self._add_entry()
            last = self.reached or self.step == self.config.num_steps
            if last or time.perf_counter() - saved >= self.checkpoint_s:
                self._save()
                saved = time.perf_counter()
        return self.curve

    def evaluate(self, data: Sequences) -> Scores:
        """Loss and accuracy of the model as it is now, over all rows of ``data``."""
        n, L = data.inputs.shape
        size = min(n, self.config.eval_rows)
        hits, loss = jnp.zeros(L, jnp.int32), 0.0
        for start in range(0, n, size):
            # The last chunk begins early, so that all have one shape, and counts less.
            first = min(start, n - size)
            counted = jnp.arange(size) >= start - first
            chunk = jax.tree.map(lambda x, at=first: x[at : at + size], data)
            more, chunk_loss = _chunk_scores(self.trained(), chunk, counted)
            hits, loss = hits + more, loss + float(chunk_loss)
        share = [int(h) / n for h in hits]
        return Scores(loss / (n * L), sum(map(int, hits)) / (n * L), share)

    def advance(self, stop: int) -> None:
        """Train up to step ``stop``, which may lie in this epoch of either data."""
        start = self.step
        assert stop <= self._epochs_end(), "an epoch ends before that step"
        orders = [epochs.order(start) for epochs in self._epochs]
        span = jnp.asarray(start, jnp.int32), jnp.asarray(stop, jnp.int32)
        self._now = _steps((self._plan, orders, span), self._now)
        if bad := int(self._now.bad):
            raise self._stopped(f"a training loss that is not finite at step {bad}")
        self.step = stop

    def _run_block(self) -> None:
        """Go on to the next evaluation or end of an epoch, or for about a second."""
        config, start, begun = self.config, self.step, time.perf_counter()
        due = (start // config.eval_every + 1) * config.eval_every
        far = start + max(1, int(self._pace * TICK_S))
        self.advance(min(far, due, config.num_steps, self._epochs_end()))
        self._pace = (self.step - start) / (time.perf_counter() - begun)
        text = f"loss {float(self._now.loss):.3f}  {self._pace:,.1f} steps/s"
        if self.curve:
            text += f"  accuracy {self.curve[-1]['val_accuracy']:.1%}"
        self.watch.on_step(Tick(self.step, config.num_steps, text))

    def _epochs_end(self) -> int:
        return min(epochs.end(self.step) for epochs in self._epochs)

    def _due(self) -> bool:
        config = self.config
        return self.step % config.eval_every == 0 or self.step == config.num_steps

    def _add_entry(self) -> None:
        begun, scores = time.perf_counter(), self.evaluate(self.data.val)
        if not math.isfinite(scores.loss):
            got = f"a validation loss of {scores.loss} after step {self.step}"
            raise self._stopped(got)
        before = self.curve[-1]["step"] if self.curve else 0
        entry = {
            "step": self.step,
            "epoch": self.step / self._epochs[0].steps,
            "lr": float(self.config.rate(self.step - 1)),
            "train_loss": float(self._now.loss_sum) / (self.step - before),
            "val_loss": scores.loss,
            "val_accuracy": scores.accuracy,
            "val_accuracy_per_position": scores.per_position,
            "seconds": self.seconds + time.perf_counter() - begun,
        }
        self._now = self._now._replace(loss_sum=jnp.zeros_like(self._now.loss_sum))
        self.curve.append(entry)
        self.watch.on_entry(entry)

    def _stopped(self, got: str) -> DivergenceError:
        kept = "no checkpoint was written yet"
        if self.folder is not None and (found := checkpoints.newest(self.folder)[0]):
            kept = f"the last good checkpoint is {found.path}"
        return DivergenceError(
            f"training: got {got}; expected finite numbers; {kept}; lower the "
            "learning rate"
        )

    def _trees(self) -> dict[str, PyTree]:
        """What a checkpoint holds, by file."""
        parameters, optimizer = self._now[:2]
        return {"model.safetensors": parameters, "optimizer.safetensors": optimizer}

    def _save(self) -> None:
        if self.folder is None:
            return
        files = {name: to_bytes(tree) for name, tree in self._trees().items()}
        state = {"step": self.step, "curve": self.curve, "settings": self.settings}
        checkpoints.write(self.folder, self.step, files, state)

    def _restore(self) -> None:
        """Go on from the last whole checkpoint, if there is one."""
        if self.folder is None:
            raise bad_input("resume", "no folder", "one with checkpoints", "name it")
        found, notices = checkpoints.newest(self.folder)
        for notice in notices:
            self.watch.on_notice(notice)
        if found is None:
            self.watch.on_notice(
                f"no checkpoint in {self.folder}: starting from the beginning"
            )
            return
        checkpoints.check_settings(found.path, found.state["settings"], self.settings)
        parameters, optimizer = (
            restored(like, found, name) for name, like in self._trees().items()
        )
        self._now = self._now._replace(parameters=parameters, optimizer=optimizer)
        self.step, self.curve = found.state["step"], found.state["curve"]
        self.seconds = self.curve[-1]["seconds"]
        self.watch.on_notice(f"going on from {found.path}, after step {self.step}")


def _epochs(name: str, part: Sequences, size: int, seed: int) -> Epochs:
    """Raises InputError where a part has fewer rows than a batch."""
    n = len(part.inputs)
    if n < size:
        raise bad_input(f"batch_size of {name}", size, f"at most {n} rows", "lower it")
    return Epochs(n, size, stream_key(seed, f"batches {name}"))
