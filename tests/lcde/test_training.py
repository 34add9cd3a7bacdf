"""The compiled loop against a plain one, and what it leaves on the disk."""

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from experiments import checkpoints
from experiments.common import InputError
from lcde._checkpoints import arrays_of, restored, to_bytes
from lcde._training import (
    Data,
    DivergenceError,
    Epochs,
    Sequences,
    Trainer,
    TrainingConfig,
    stream_key,
)
from lcde._watch import Tick, Watch

V = 5
CONFIG = TrainingConfig(
    batch_size=4,
    extra_batch=2,
    learning_rate=0.03,
    num_steps=7,
    eval_every=3,
    threshold=1.0,
    eval_rows=4,
)


class Bigram(eqx.Module):
    """Logits of a token: its row of a table; noise where there is a key."""

    table: Any
    noise: float = eqx.field(static=True, default=0.0)

    def batch(self, tokens: Any, *, key: Any = None) -> Any:
        logits = self.table[tokens]
        if key is None or not self.noise:
            return logits
        return logits + self.noise * jr.normal(key, logits.shape, logits.dtype)


def bigram(noise: float = 0.0) -> Bigram:
    table = jr.normal(jr.key(1), (V, V)).at[0, 1].set(3.0)  # knows one answer
    return Bigram(table, noise)


def sequences(rng: np.random.Generator, n: int, L: int) -> Sequences:
    """The target is the token's successor."""
    tokens = rng.integers(V, size=(n, L))
    return Sequences(jnp.asarray(tokens), jnp.asarray((tokens + 1) % V))


def data() -> Data:
    """Epochs of 3 steps and 1 row left over, and of 2 and 1."""
    rng = np.random.default_rng(2)
    return Data(sequences(rng, 13, 3), sequences(rng, 11, 3), sequences(rng, 5, 2))


def trainer(
    folder: Path | None = None,
    *,
    noise: float = 0.0,
    watch: Watch | None = None,
    **changed: Any,
) -> Trainer:
    config = dataclasses.replace(CONFIG, **changed)
    settings = dataclasses.asdict(config)
    return Trainer(
        bigram(noise),
        data(),
        config,
        folder=folder,
        settings=settings,
        watch=watch or Watch(),
        checkpoint_s=0,
    )


def told(curve: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A curve without what the clock says."""
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in curve]


def arrays(of: Trainer) -> dict[str, np.ndarray]:
    """A copy of all that steps change."""
    return {k: x.copy() for k, x in arrays_of(of._now).items()}


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name], err_msg=name)


# --- steps ----------------------------------------------------------------------------


def test_steps_are_those_of_a_plain_loop_in_float64() -> None:
    """AdamW by its equations, decay on all, two updates a step, rates by the step."""
    with jax.enable_x64(True):
        config = dataclasses.replace(
            CONFIG, schedule="cosine", warmup=2, num_steps=7, weight_decay=0.2
        )
        table = jr.normal(jr.key(1), (V, V), jnp.float64)
        ours = Trainer(Bigram(table), data(), config)
        losses = []
        for stop in (2, 3, 4, 6, 7):  # every end of an epoch is among them
            ours.advance(stop)
            losses.append(float(ours._now.loss))
        found = np.asarray(ours.trained().table)
    wanted, plain = plain_steps(np.asarray(table), config)
    np.testing.assert_allclose(found, wanted, atol=1e-7)  # the rate is a float32
    np.testing.assert_allclose(losses, [plain[i - 1] for i in (2, 3, 4, 6, 7)], 1e-6)
    assert float(ours._now.loss_sum) == pytest.approx(sum(plain))


def plain_steps(
    table: np.ndarray, config: TrainingConfig
) -> tuple[np.ndarray, list[float]]:
    """The table after all steps, and the main loss of each."""
    parts, m, v, t, losses = data(), 0 * table, 0 * table, 0, []
    streams = (("train", parts.train, 4), ("extra", parts.extra, 2))
    for step in range(config.num_steps):
        if step < 2:
            rate = config.learning_rate * (step + 1) / 2
        else:
            half = 0.5 * (1 + math.cos(math.pi * (step - 2) / 5))
            rate = config.learning_rate * half
        for name, part, size in streams:
            assert part is not None
            steps = len(part.inputs) // size
            key = stream_key(config.seed, f"batches {name}")
            order = jr.permutation(jr.fold_in(key, step // steps), len(part.inputs))
            rows = np.asarray(order)[step % steps * size :][:size]
            inputs, targets = (np.asarray(x)[rows].ravel() for x in part)
            p = np.exp(table[inputs])
            p /= p.sum(1, keepdims=True)
            loss = -np.log(p[np.arange(len(p)), targets]).mean()
            p[np.arange(len(p)), targets] -= 1
            g = np.zeros_like(table)
            np.add.at(g, inputs, p / len(p))
            t += 1
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            m_hat, v_hat = m / (1 - 0.9**t), v / (1 - 0.999**t)
            change = m_hat / (np.sqrt(v_hat) + 1e-8) + config.weight_decay * table
            table = table - rate * change
            if name == "train":
                losses.append(float(loss))
    return table, losses


def test_how_steps_are_grouped_changes_nothing() -> None:
    one, other = trainer(noise=0.5), trainer(noise=0.5)
    for stop in (1, 2):
        one.advance(stop)
    other.advance(2)
    assert_same(arrays(one), arrays(other))
    with pytest.raises(AssertionError, match="an epoch ends before that step"):
        trainer().advance(3)


def test_every_update_draws_its_own_noise() -> None:
    """The same rows at a rate of nothing: losses differ by the noise alone."""
    found = []
    for noise in (0.5, 0.0):
        ours = trainer(noise=noise, batch_size=13, learning_rate=1e-30, extra_batch=5)
        for stop in range(1, 6):
            ours.advance(stop)
            found.append(round(float(ours._now.loss), 5))
    assert len({*found[:5]}) == 5
    assert len({*found[5:]}) == 1


def test_an_epoch_holds_each_row_once_in_an_order_of_its_own() -> None:
    epochs = Epochs(13, 4, jr.key(0))
    assert (epochs.steps, epochs.end(0), epochs.end(2), epochs.end(3)) == (3, 3, 3, 6)
    orders = [np.asarray(epochs.order(step)) for step in (0, 2, 3, 7)]
    for order in orders:
        assert order.shape == (3, 4)
        assert len({*order.ravel().tolist()}) == 12
        assert set(order.ravel().tolist()) <= set(range(13))
    np.testing.assert_array_equal(orders[0], orders[1])
    assert (orders[1] != orders[2]).any()
    again = Epochs(13, 4, jr.key(0)).order(5)  # as after a resumption
    np.testing.assert_array_equal(again, orders[2])


def test_rates() -> None:
    rising = TrainingConfig(warmup=4, num_steps=10, learning_rate=2.0)
    found = [float(rising.rate(step)) for step in (0, 1, 3, 4, 9)]
    assert found == pytest.approx([0.5, 1, 2, 2, 2])
    falling = dataclasses.replace(rising, schedule="cosine")
    found = [float(falling.rate(step)) for step in (0, 4, 7, 10, 99)]
    assert found == pytest.approx([0.5, 2, 1, 0, 0], abs=1e-6)


# --- evaluations ----------------------------------------------------------------------


@pytest.mark.parametrize("eval_rows", [1, 4, 11, 99])
def test_an_evaluation_counts_every_row_once(eval_rows: int) -> None:
    ours = trainer(eval_rows=eval_rows)
    table = np.asarray(ours.trained().table, np.float64)
    inputs, targets = (np.asarray(x) for x in data().val)
    logits = table[inputs]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    right = logits.argmax(-1) == targets
    scores = ours.evaluate(data().val)
    loss = -np.take_along_axis(log_p, targets[..., None], -1).mean()
    assert scores.loss == pytest.approx(loss, rel=1e-5)
    assert scores.accuracy == pytest.approx(right.mean(), abs=1e-12)
    assert scores.per_position == pytest.approx(right.mean(0).tolist(), abs=1e-12)
    assert 0 < scores.accuracy < 1


def test_the_curve_and_what_is_told_of_it() -> None:
    ticks: list[Tick] = []
    entries: list[dict[str, Any]] = []
    ours = trainer(watch=Watch(on_step=ticks.append, on_entry=entries.append))
    curve = ours.fit()
    assert curve == entries
    assert [entry["step"] for entry in curve] == [3, 6, 7]
    assert [entry["epoch"] for entry in curve] == pytest.approx([1, 2, 7 / 3])
    assert [tick.step for tick in ticks][-1] == 7
    assert {tick.steps for tick in ticks} == {7}
    assert "loss" in ticks[0].text
    assert "accuracy" in ticks[-1].text
    seconds = [entry["seconds"] for entry in curve]
    assert seconds == sorted(seconds)
    step_by_step, losses = trainer(), []
    for stop in range(1, 8):
        step_by_step.advance(stop)
        losses.append(float(step_by_step._now.loss))
    means = [np.mean(losses[:3]), np.mean(losses[3:6]), losses[6]]
    assert [e["train_loss"] for e in curve] == pytest.approx(means, rel=1e-6)


def test_it_stops_at_the_first_evaluation_above_the_threshold() -> None:
    ours = trainer(num_steps=999, learning_rate=0.1, threshold=0.8)
    *before, last = [entry["val_accuracy"] for entry in ours.fit()]
    assert last > 0.8
    assert before
    assert all(accuracy <= 0.8 for accuracy in before)
    assert ours.reached
    assert ours.step == 3 * (len(before) + 1)


def test_the_model_given_is_left_as_it_is() -> None:
    ours = trainer()
    ours.fit()
    assert (ours.trained().table != ours.model.table).any()
    np.testing.assert_array_equal(ours.model.table, bigram().table)


# --- losses that are not finite -------------------------------------------------------


def with_nan(step: int) -> tuple[Bigram, Data]:
    """A token that only the rows of one step hold, whose logits are NaN."""
    model, parts = bigram(), data()
    order = Epochs(13, 4, stream_key(0, "batches train")).order(0)
    inputs = jnp.where(parts.train.inputs == V - 1, 0, parts.train.inputs)
    inputs = inputs.at[order[step - 1]].set(V - 1)
    clean = [
        Sequences(jnp.where(x.inputs == V - 1, 0, x.inputs), x.targets)
        for x in (parts.val, parts.extra)
        if x is not None
    ]
    train = Sequences(inputs, parts.train.targets)
    table = model.table.at[V - 1].set(jnp.nan)
    return Bigram(table), Data(train, *clean)


@pytest.mark.parametrize(("step", "kept"), [(1, False), (2, True)])
def test_a_loss_that_is_not_finite_stops_the_run(
    step: int, kept: bool, tmp_path: Path
) -> None:
    config = dataclasses.replace(CONFIG, eval_every=1)
    ours = Trainer(*with_nan(step), config, folder=tmp_path, checkpoint_s=0)
    with pytest.raises(DivergenceError) as error:
        ours.fit()
    line = str(error.value)
    assert f"not finite at step {step};" in line
    last = f"last good checkpoint is {tmp_path / 'checkpoint-00000001'}"
    assert (last if kept else "no checkpoint was written yet") in line
    assert len(line.splitlines()) == 1
    assert ours.step == step - 1


def test_a_block_ends_at_the_step_whose_loss_is_not_finite() -> None:
    ours = Trainer(*with_nan(1), CONFIG)
    with pytest.raises(DivergenceError, match="at step 1;"):
        ours.advance(2)


def test_a_validation_loss_that_is_not_finite_makes_no_checkpoint(
    tmp_path: Path,
) -> None:
    model, parts = with_nan(3)
    bad = parts._replace(val=data().val)
    config = dataclasses.replace(CONFIG, eval_every=1)
    with pytest.raises(DivergenceError, match="validation loss of nan after step 1"):
        Trainer(model, bad, config, folder=tmp_path, checkpoint_s=0).fit()
    assert not list(tmp_path.iterdir())


# --- checkpoints ----------------------------------------------------------------------


def test_a_resumed_run_is_the_run(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", noise=0.3)
    whole.fit()
    folder = tmp_path / "cut"
    trainer(folder, noise=0.3).fit()
    names = [path.name for path in sorted(folder.iterdir())]
    assert names == ["checkpoint-00000006", "checkpoint-00000007"]
    shutil.rmtree(folder / names[1])
    notices: list[str] = []
    again = trainer(folder, noise=0.3, watch=Watch(on_notice=notices.append))
    curve = again.fit(resume=True)
    assert notices == [f"going on from {folder / names[0]}, after step 6"]
    assert told(curve) == told(whole.curve)
    assert_same(arrays(again), arrays(whole))
    for name in ("model", "optimizer"):
        one, other = (
            (tmp_path / where / names[1] / f"{name}.safetensors").read_bytes()
            for where in ("cut", "whole")
        )
        assert one == other


def test_a_finished_run_resumed_does_nothing_more(tmp_path: Path) -> None:
    curve = trainer(tmp_path).fit()
    entries: list[Any] = []
    again = trainer(tmp_path, watch=Watch(on_entry=entries.append))
    assert again.fit(resume=True) == curve
    assert not entries


def test_checkpoints_wait_for_their_time_but_for_the_first_and_last(
    tmp_path: Path,
) -> None:
    ours = trainer(tmp_path, eval_every=1)
    ours.checkpoint_s = 1e9
    ours.fit()
    names = [path.name for path in sorted(tmp_path.iterdir())]
    assert names == ["checkpoint-00000001", "checkpoint-00000007"]


def test_nothing_to_resume_starts_from_the_beginning_and_says_so(
    tmp_path: Path,
) -> None:
    notices: list[str] = []
    ours = trainer(tmp_path / "none", watch=Watch(on_notice=notices.append))
    assert len(ours.fit(resume=True)) == 3
    (line,) = notices
    assert line.endswith("starting from the beginning")
    with pytest.raises(InputError, match="resume: got 'no folder'"):
        trainer().fit(resume=True)


def test_other_settings_are_refused_and_listed(tmp_path: Path) -> None:
    trainer(tmp_path).fit()
    with pytest.raises(InputError) as error:
        trainer(tmp_path, warmup=1, weight_decay=0.5).fit(resume=True)
    line = str(error.value)
    assert "warmup: 0 then, 1 now" in line
    assert "weight_decay: 0.01 then, 0.5 now" in line
    assert "batch_size" not in line


def test_another_models_arrays_are_refused(tmp_path: Path) -> None:
    trainer(tmp_path).fit()
    other = trainer(tmp_path)
    other._now = other._now._replace(parameters=Bigram(jnp.zeros((V, V + 1))))
    with pytest.raises(InputError, match=r"lacks \['.table \(5, 6\)'\]"):
        other.fit(resume=True)


def test_a_tree_stored_comes_back_bit_for_bit(tmp_path: Path) -> None:
    tree = {"a": jnp.asarray([1.5, -0.0, jnp.inf]), "b": (jnp.int32(7), bigram())}
    checkpoints.write(tmp_path, 3, {"tree": to_bytes(tree)}, {"step": 3})
    found, _ = checkpoints.newest(tmp_path)
    assert found is not None
    back = restored(jax.tree.map(jnp.zeros_like, tree), found, "tree")
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    for one, other in zip(*map(jax.tree.leaves, (back, tree)), strict=True):
        assert one.dtype == other.dtype
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path) -> None:
    """Damage of every kind is tested where checkpoints are shared."""
    whole = trainer(tmp_path)
    whole.fit()
    file = tmp_path / "checkpoint-00000007" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    notices: list[str] = []
    again = trainer(tmp_path, watch=Watch(on_notice=notices.append))
    assert told(again.fit(resume=True)) == told(whole.curve)
    assert "checkpoint-00000007 is damaged (" in notices[0]
    assert notices[1].endswith("checkpoint-00000006, after step 6")


def test_a_checkpoint_that_cannot_be_written_ends_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(InputError, match="cannot be written") as error:
        trainer(tmp_path / "file" / "in").fit()
    assert len(str(error.value).splitlines()) == 1


# --- bad input ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"batch_size": 0}, "batch_size: got 0; expected at least 1"),
        ({"batch_size": 14}, "batch_size of train: got 14; expected at most 13 rows"),
        ({"extra_batch": 6}, "batch_size of extra: got 6"),
        ({"learning_rate": 0.0}, "learning_rate: got 0.0"),
        ({"learning_rate": math.nan}, "learning_rate: got nan"),
        ({"warmup": -1}, "warmup: got -1"),
        ({"threshold": 1.5}, "threshold: got 1.5"),
        ({"eval_every": 0}, "eval_every: got 0"),
        ({"seed": -1}, "seed: got -1"),
    ],
)
def test_bad_settings_are_refused_in_one_line(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as error:
        trainer(**wrong)
    assert said in str(error.value)
    assert len(str(error.value).splitlines()) == 1
