"""A training step of the A5 Linear CDE against a straightforward port of the published.

    python -m benchmarks.lcde_a5_step

A step is forward, cross entropy at every position, backward and AdamW on a batch, and
then the same again, apart, on a tenth as many sequences of length 2. float32, one
process, the same weights, the same tokens.

* port: the published step written down in JAX: A of shape (H, W, H), the whole A y at
  every position, ``jax.vmap`` over sequences, ``jax.lax.scan`` over positions,
  ``optax.adamw``; both updates compiled, each taking over the memory of its input.
* ours: the compiled loop of ``lcde.a5`` (one matrix a token instead of A y a position,
  the length-2 gradient formed inside AdamW's update), several steps a call as in
  training; times are divided by their number.
* A turn is one call of each side, so that a slow spell of the machine falls on both;
  ratios are of neighbours in time. Besides the clock, the processor's seconds are
  given, over all cores: on a busy machine they say more. "cold" is a side's first
  call, compilation included.
* Losses and every gradient of both updates are compared first, without dropout.

The claim judged is that both sides are one function; times are reported, not judged.
"""

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from benchmarks.ssd_scaling import store
from experiments.common import (
    EXIT_FAILED_CLAIM,
    Parameter,
    check_integer,
    one_line_errors,
    parameters_of,
    parse,
    progress_shown,
    random_stream,
    track,
)
from lcde._structures import Dense
from lcde._training import Data, Sequences, Trainer, TrainingConfig
from lcde.a5 import PAIRS, A5LinearCDE

TARGET = 5  # times as fast as the port
TOLERANCE = 1e-4  # of the largest entry; float32, and A y is summed in another order
N_ELEMENTS = 60
OURS, PORT = "ours", "port"
NOT_SHOWN = """\
What this does not show: GPUs, other machines or more cores, structures of A other than
dense, data loading and evaluation, or a whole training run."""


# --- the port -------------------------------------------------------------------------


class Port(NamedTuple):
    """The published parameters, A as (H, W, H)."""

    embedding: Float[Array, "V H"]
    init_matrix: Float[Array, "H d"]
    init_bias: Float[Array, " H"]
    A: Float[Array, "H W H"]
    B: Float[Array, "H W"]
    mix: eqx.nn.Linear
    norm: eqx.nn.LayerNorm
    readout: eqx.nn.Linear


def port_of(model: A5LinearCDE) -> Port:
    """The same weights in the published layout."""
    cde = model.cde
    assert isinstance(cde.A, Dense), "the published A is dense"
    port = Port(
        embedding=model.embedding.weights,
        init_matrix=cde.init_matrix,
        init_bias=cde.init_bias,
        A=jnp.swapaxes(cde.A.matrix, 0, 1),
        B=cde.B,
        mix=model.mix,
        norm=model.norm,
        readout=model.readout,
    )
    return jax.tree.map(jnp.copy, port)


def port_logits(
    port: Port, tokens: Int[Array, " L"], key: PRNGKeyArray | None
) -> Float[Array, "L V"]:
    """Logits of one sequence, position by position."""
    x, L = port.embedding[tokens], len(tokens)
    control = jnp.concatenate([jnp.linspace(0, 1, L)[:, None], x], axis=1)
    y0 = port.init_matrix @ x[0] + port.init_bias

    def euler(
        y: Float[Array, " H"], v: Float[Array, " W"]
    ) -> tuple[Float[Array, " H"], Float[Array, " H"]]:
        y = y + ((port.A @ y) @ v + port.B @ v) / L
        return y, y

    ys = jnp.concatenate([y0[None], jax.lax.scan(euler, y0, control[1:])[1]])
    drop = partial(eqx.nn.Dropout(0.1), inference=key is None)
    early, late = (None, None) if key is None else jr.split(key)
    z = drop(jax.nn.relu(jax.vmap(port.mix)(drop(ys, key=early))), key=late)
    return jax.vmap(port.readout)(jax.vmap(port.norm)(z + x))


def port_loss(
    port: Port, batch: Sequences, key: PRNGKeyArray | None
) -> Float[Array, ""]:
    """Cross entropy of a batch."""
    keys = None if key is None else jr.split(key, len(batch.inputs))
    axes = (None, 0, None if key is None else 0)
    logits = jax.vmap(port_logits, in_axes=axes)(port, batch.inputs, keys)
    return _cross_entropy(logits, batch.targets)


def _cross_entropy(
    logits: Float[Array, "R L V"], targets: Int[Array, "R L"]
) -> Float[Array, ""]:
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def port_step(port: Port, data: Data, batch: int) -> Callable[[], None]:
    """One step a call: an update on a batch, one on a few pairs."""
    adamw = optax.adamw(2e-4, weight_decay=0.01)

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(port: Port, state: Any, rows: Sequences, key: PRNGKeyArray) -> Any:
        gradient = jax.grad(port_loss)(port, rows, key)
        change, state = adamw.update(gradient, state, port)
        return optax.apply_updates(port, change), state

    assert data.extra is not None, "pairs are drawn"
    main, pairs = (
        jax.tree.map(lambda x, n=n: x[:n], part)
        for part, n in ((data.train, batch), (data.extra, batch // PAIRS))
    )
    now = [(port, adamw.init(port))]

    def step() -> None:
        now[0] = update(*now[0], main, jr.key(0))
        now[0] = update(*now[0], pairs, jr.key(1))
        jax.block_until_ready(now[0])

    return step


# --- agreement ------------------------------------------------------------------------


def differences(
    model: A5LinearCDE, batches: Mapping[str, Sequences]
) -> dict[str, dict[str, float]]:
    """Largest differences of loss and gradients, of the largest entry of the port's."""

    def our_loss(model: A5LinearCDE, batch: Sequences) -> Float[Array, ""]:
        return _cross_entropy(model.batch(batch.inputs), batch.targets)

    ours = eqx.filter_jit(eqx.filter_value_and_grad(our_loss))
    port = jax.jit(jax.value_and_grad(partial(port_loss, key=None)))
    found = {}
    for name, batch in batches.items():
        mine, gradient = ours(model, batch)
        wanted, theirs = port(port_of(model), batch)
        found[name] = {"loss": _difference(mine, wanted)} | {
            jax.tree_util.keystr(path).lstrip("."): _difference(*pair)
            for path, *pair in _paired(port_of(gradient), theirs)
        }
    return found


def _paired(one: Port, other: Port) -> list[tuple[Any, Array, Array]]:
    first = jax.tree_util.tree_leaves_with_path(one)
    return [
        (path, a, b) for (path, a), b in zip(first, jax.tree.leaves(other), strict=True)
    ]


def _difference(one: Array, other: Array) -> float:
    return float(jnp.abs(one - other).max() / jnp.abs(other).max())


# --- time -----------------------------------------------------------------------------


class Seconds(NamedTuple):
    """Of one call, a step: by the clock, and of all cores."""

    wall: float
    cpu: float


def timed(call: Callable[[], None], steps: int) -> Seconds:
    """Seconds a step of a call that takes ``steps`` of them."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return Seconds(
        (time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps
    )


def in_turns(
    calls: Mapping[str, tuple[Callable[[], None], int]], repeats: int
) -> dict[str, dict[str, Any]]:
    """Times of every side, a call of each in turn; the first, cold ones apart."""
    found: dict[str, list[Seconds]] = {name: [] for name in calls}
    for _ in track(range(repeats + 1), "turns"):
        for name, (call, steps) in calls.items():
            found[name].append(timed(call, steps))
    return {name: _summary(*each) for name, each in found.items()}


def _summary(cold: Seconds, *warm: Seconds) -> dict[str, Any]:
    wall, cpu = zip(*warm, strict=True)
    return {
        "cold_s": cold.wall,
        "median_s": float(np.median(wall)),
        "min_s": min(wall),
        "max_s": max(wall),
        "cpu_median_s": float(np.median(cpu)),
        "repeats_s": list(wall),
        "repeats_cpu_s": list(cpu),
    }


def ratio(times: Mapping[str, dict[str, Any]], kind: str) -> dict[str, float]:
    """How many times as long the port takes: turn by turn."""
    pairs = zip(*(times[name][kind] for name in (OURS, PORT)), strict=True)
    ratios = [theirs / mine for mine, theirs in pairs]
    return {"median": float(np.median(ratios)), "min": min(ratios), "max": max(ratios)}


def our_step(
    model: A5LinearCDE, data: Data, batch: int, steps: int
) -> Callable[[], None]:
    """``steps`` steps a call, as in training."""
    config = TrainingConfig(batch_size=batch, extra_batch=batch // PAIRS)
    trainer = Trainer(model, data, config)
    return lambda: trainer.advance(trainer.step + steps)


def draw(length: int, batch: int, calls: int, seed: int) -> Data:
    """Tokens without any structure: time does not depend on them."""
    rng = random_stream(seed, "data")

    def sequences(n: int, length: int) -> Sequences:
        shape = (2, n, length)
        return Sequences(*jnp.asarray(rng.integers(N_ELEMENTS, size=shape), jnp.int32))

    train = sequences(batch * calls, length)
    return Data(train, train, sequences(batch // PAIRS * calls, 2))


# --- the report -----------------------------------------------------------------------


def benchmark(
    length: int = 20,
    hidden_dim: int = 256,
    batch: int = 32,
    steps: int = 5,
    repeats: int = 5,
    seed: int = 0,
) -> dict[str, Any]:
    """A training step of the A5 Linear CDE against a port of the published one.

    Args:
        length: tokens of a sequence
        hidden_dim: size H of the hidden state
        batch: sequences of the main update; a tenth as many of the other
        steps: of ours in a turn; the port takes one
        repeats: warm turns
        seed: draws weights and tokens
    """
    sizes = {"length": length, "steps": steps, "repeats": repeats}
    for name, value in sizes.items():
        check_integer(name, value, at_least=1, example=5)
    check_integer("batch", batch, at_least=PAIRS, example=32)
    key = jr.key(seed)
    model = A5LinearCDE(hidden_dim, N_ELEMENTS, N_ELEMENTS, key=key)
    data = draw(length, batch, steps * (repeats + 1), seed)
    load = os.getloadavg()[0]
    assert data.extra is not None, "pairs are drawn"
    few = {"main": (data.train, batch), "pairs": (data.extra, batch // PAIRS)}
    batches = {
        name: Sequences(*(x[:n] for x in part)) for name, (part, n) in few.items()
    }
    found = differences(model, batches)
    calls = {
        OURS: (our_step(model, data, batch, steps), steps),
        PORT: (port_step(port_of(model), data, batch), 1),
    }
    times = in_turns(calls, repeats)
    return {
        "versions": {"jax": jax.__version__, "optax": optax.__version__},
        "device": str(jax.devices()[0]),
        "setting": {"length": length, "hidden_dim": hidden_dim, "batch": batch},
        "steps": steps,
        "repeats": repeats,
        "seed": seed,
        "load": load,
        "cores": os.cpu_count(),
        "target": TARGET,
        "tolerance": TOLERANCE,
        "times": times,
        "ratio": ratio(times, "repeats_s"),
        "cpu_ratio": ratio(times, "repeats_cpu_s"),
        "differences": found,
        "parameters": sum(x.size for x in jax.tree.leaves(port_of(model))),
    }


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    setting = ", ".join(f"{name} {size}" for name, size in report["setting"].items())
    wall, cpu = report["ratio"], report["cpu_ratio"]
    return "\n".join(
        [
            "a training step of the A5 Linear CDE, the length-2 update included:",
            f"{setting}; {report['parameters']:,} parameters",
            f"float32, {report['device']}, {report['cores']} cores, warm turns: "
            f"{report['repeats']}, steps of ours in each: {report['steps']}, load of "
            f"the machine before: {report['load']:.1f}; milliseconds a step",
            "",
            *_time_lines(report["times"]),
            f"the port takes {wall['median']:.1f} ({wall['min']:.1f} .. "
            f"{wall['max']:.1f}) times as long as ours, aim {report['target']}; "
            f"{cpu['median']:.1f} ({cpu['min']:.1f} .. {cpu['max']:.1f}) times by "
            "seconds of the processor",
            "",
            *_agreement_lines(report["differences"]),
            "",
            NOT_SHOWN,
        ]
    )


def _time_lines(times: dict[str, dict[str, Any]]) -> list[str]:
    kinds = ("median_s", "min_s", "max_s", "cpu_median_s", "cold_s")
    names = ("median", "min", "max", "all cores", "cold")
    lines = [f"{'':<8}" + "".join(f"{name:>11}" for name in names)]
    for name, found in times.items():
        cells = "".join(f"{1e3 * found[kind]:>11.1f}" for kind in kinds)
        lines.append(f"{name:<8}{cells}")
    return lines


def _agreement_lines(found: dict[str, dict[str, float]]) -> list[str]:
    lines = ["largest difference from the port, of the largest entry:"]
    for name, entries in found.items():
        gradients = {k: x for k, x in entries.items() if k != "loss"}
        worst = max(gradients, key=gradients.__getitem__)
        lines.append(
            f"{name:<8}loss {entries['loss']:.1e}, gradients {gradients[worst]:.1e} "
            f"(that of {worst})"
        )
    return lines


def problems(report: dict[str, Any]) -> list[str]:
    """Where the port differs from ours by more than rounding."""
    return [
        f"{name} of the {update} update differs by {difference:.1e} from the port's"
        for update, entries in report["differences"].items()
        for name, difference in entries.items()
        if not difference <= report["tolerance"]
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print the table, store the report where ``--json`` names a file.

    Exit status 1 if the sides are not one function; times are not judged.
    """
    about = "Write the whole report here, for example outputs/lcde_a5_step.json."
    parameters = [*parameters_of(benchmark), Parameter("json", str, "", about)]
    summary = (benchmark.__doc__ or "").partition("\n")[0]
    values = parse("python -m benchmarks.lcde_a5_step", summary, parameters, argv)
    path = values.pop("json")
    with one_line_errors():
        with progress_shown():
            report = benchmark(**values)
        print(table(report))
        if path:
            store(report, path)
    found = problems(report)
    print(*found, sep="\n", file=sys.stderr, end="\n" if found else "")
    return EXIT_FAILED_CLAIM if found else 0


if __name__ == "__main__":
    sys.exit(main())
