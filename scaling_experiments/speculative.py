"""Speculative decoding: K cheap guesses, one call of the target that checks them all.

A draft model proposes y_1 … y_K, drawn from its q_1 … q_K. The target reads them in one
parallel call, which gives p_1 … p_{K+1}. y_j is accepted with probability
min(1, p_j(y_j) / q_j(y_j)); where the first is refused, a token is drawn from
(p - q)_+ / sum (p - q)_+, and after K accepted ones from p_{K+1}. So

    q(y) min(1, p(y)/q(y)) + (1 - alpha) (p(y) - q(y))_+ / (1 - alpha) = p(y),
    alpha = sum_y min(p(y), q(y)):

what comes out has the target's law, whatever the draft is. If every guess were accepted
with one and the same probability alpha, independently, a call would yield

    1 + alpha + … + alpha^K = (1 - alpha^(K+1)) / (1 - alpha)   tokens.

A model with a cache of keys forgets refused tokens by dropping them; a state has
absorbed them. But states are values here: the one before the guesses is kept, and the
accepted tokens are read from it once more, in one parallel call, each row as many as it
accepted.

Measured on two models trained here, on the bytes of Python's own documentation: alpha
on text that the target wrote, tokens a call for each K, drafts trained long and hardly,
and the time, which on small models is that of calls, not of weights read.

Source: Leviathan et al. 2023, arXiv:2211.17192 (theorem 3.8 and equation 1); Chen et
al. 2023, arXiv:2302.01318.
"""

import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from data_dir._corpora import END_OF_LINE
from data_dir.text import read_corpus
from experiments.common import (
    COLORS,
    MARKERS,
    ExperimentResult,
    Picture,
    check_increasing,
    check_integer,
    check_nonempty,
    command_line,
    meter,
    new_figure,
    random_stream,
    track,
)
from ssm._errors import bad_argument
from ssm.models import MambaCache, SequenceLM, SequenceLMConfig, generate
from ssm.training import (
    Batch,
    Progress,
    Scores,
    Trainer,
    TrainingConfig,
    stream_seed,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "speculative"
CLAIM = "speculative decoding: acceptance rate, tokens a call and time; measured"
BYTES = 256
CORPUS = "python_docs"
VALIDATION_WINDOWS = 32


# --- the algorithm --------------------------------------------------------------------


class Speculation(NamedTuple):
    """What speculative decoding wrote, and how.

    tokens (B, n): the first n new ones of every row. calls (B,): of the target that
    checked guesses, until the row had its n. written (B,): tokens of those calls, n or
    up to K more. rounds: calls until the last row had its n.
    """

    tokens: Int[Tensor, "B n"]
    calls: Int[Tensor, " B"]
    written: Int[Tensor, " B"]
    rounds: int


class Reader:
    """A model and its cache, which has seen everything but the last token of each row.

    Caches are values: reading ahead changes nothing until :meth:`accept`.
    """

    def __init__(self, model: SequenceLM, prompts: Int[Tensor, "B L"]) -> None:
        self.model = model
        self.state = model.init_state(len(prompts))
        if prompts.shape[1] > 1:
            self.state = model(prompts[:, :-1], last_only=True).state

    def logits(self, tokens: Int[Tensor, "B K1"]) -> Float[Tensor, "B K1 V"]:
        """Behind each of these tokens, in one call."""
        return self.model(tokens, self.state).logits

    def step(
        self, last: Int[Tensor, " B"], state: MambaCache
    ) -> tuple[Float[Tensor, "B V"], MambaCache]:
        """Behind one more token."""
        return self.model.step(last, state)

    def accept(self, tokens: Int[Tensor, "B K1"], kept: Int[Tensor, " B"]) -> None:
        """Read the first ``kept`` tokens of each row for good, in one call."""
        self.state = self.model(tokens, self.state, kept, last_only=True).state


def speculate(
    target: SequenceLM,
    draft: SequenceLM,
    prompts: Int[Tensor, "B L"],
    n: int,
    K: int,
    *,
    generator: torch.Generator,
    greedy: bool = False,
) -> Speculation:
    """n further tokens for every prompt, with the law of ``target``'s own sampling.

    Each row accepts as many guesses as it does. ``greedy``: p and q give all to their
    likeliest token, and the result is that of greedy decoding. Models should be in
    evaluation mode.
    """
    law = partial(probabilities, greedy=greedy)
    written = torch.zeros(len(prompts), dtype=torch.int64, device=prompts.device)
    calls, rounds, last = torch.zeros_like(written), 0, prompts[:, -1]
    room = prompts.new_zeros(len(prompts), n + K + 1)
    with torch.no_grad():
        readers = Reader(target, prompts), Reader(draft, prompts)
        while bool((written < n).any()):
            guesses, q = _propose(readers[1], last, K, law, generator)
            read = torch.cat([last[:, None], guesses], 1)
            p = law(readers[0].logits(read))
            accepted, last = judge(p, q, guesses, generator)
            for reader in readers:
                reader.accept(read, accepted + 1)
            active = written < n
            _write(room, written, guesses, accepted, last, active)
            written = written + active * (accepted + 1)
            calls, rounds = calls + active, rounds + 1
    return Speculation(room[:, :n], calls, written, rounds)


def probabilities(
    logits: Float[Tensor, "*B V"], *, greedy: bool
) -> Float[Tensor, "*B V"]:
    """softmax, or all on the likeliest token; float64 where the device has it."""
    wide = torch.float32 if logits.device.type == "mps" else torch.float64
    if greedy:
        likeliest = functional.one_hot(logits.argmax(-1), logits.shape[-1])
        return likeliest.to(wide)
    return logits.to(wide).softmax(-1)


def judge(
    p: Float[Tensor, "B K1 V"],
    q: Float[Tensor, "B K V"],
    guesses: Int[Tensor, "B K"],
    generator: torch.Generator,
) -> tuple[Int[Tensor, " B"], Int[Tensor, " B"]]:
    """How many guesses each row accepts, and the token that follows them."""
    chosen = guesses[..., None]
    ratio = (p[:, :-1].gather(-1, chosen) / q.gather(-1, chosen))[..., 0]
    u = torch.rand(ratio.shape, generator=generator, dtype=p.dtype, device=p.device)
    accepted = (u < ratio).cumprod(1).sum(1)
    at = accepted[:, None, None].expand(-1, 1, p.shape[-1])
    # Behind the last guess there is no q: with 0 in its place, (p - q)_+ is p.
    q = functional.pad(q, (0, 0, 0, 1))
    left = residual(p.gather(1, at)[:, 0], q.gather(1, at)[:, 0])
    return accepted, torch.multinomial(left, 1, generator=generator)[:, 0]


def residual(p: Float[Tensor, "B V"], q: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
    """(p - q)_+ scaled to sum 1: what is drawn from after a refusal."""
    left = (p - q).clamp(min=0)
    total = left.sum(-1, keepdim=True)
    return torch.where(total > 0, left / total, p)  # 0 by rounding, where p = q


def _propose(
    draft: Reader, last: Tensor, K: int, law: Any, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """K guesses (B, K), and the laws that each was drawn from, (B, K, V)."""
    state, guesses, laws = draft.state, [], []
    for _ in range(K):
        logits, state = draft.step(last, state)
        laws.append(law(logits))
        last = torch.multinomial(laws[-1], 1, generator=generator)[:, 0]
        guesses.append(last)
    return torch.stack(guesses, 1), torch.stack(laws, 1)


def _write(
    room: Tensor,
    written: Tensor,
    guesses: Tensor,
    accepted: Tensor,
    last: Tensor,
    active: Tensor,
) -> None:
    """Append each active row's accepted guesses and the token behind them."""
    new = torch.cat([guesses, last[:, None]], 1)
    new.scatter_(1, accepted[:, None], last[:, None])
    for row in active.nonzero()[:, 0].tolist():
        first, many = int(written[row]), int(accepted[row]) + 1
        room[row, first : first + many] = new[row, :many]


def tokens_a_call(alpha: float, K: int) -> float:
    """(1 - alpha^(K+1)) / (1 - alpha): expected if guesses were independent."""
    return sum(alpha**j for j in range(K + 1))


# --- the experiment -------------------------------------------------------------------


@dataclass(frozen=True)
class SpeculativeOptions:
    """Speculative decoding with small models: acceptance rate, tokens a call, time.

    Trains a target and drafts on the bytes of Python's documentation, then writes with
    the target alone and with each draft and number of guesses K.

    Args:
        K_values: guesses a call, increasing
        tokens: bytes that every sequence gets
        sequences: written side by side
        prompt: bytes of the validation text that each one starts with
        repeats: of each measurement, with other random numbers
        target_steps: updates that train the target
        draft_steps: updates that train a draft; one draft a number
        target_width: d_model of the target
        target_layers: blocks of the target
        draft_width: d_model of the drafts
        draft_layers: blocks of the drafts
        pattern: layers of target and drafts: a name or signs of ssm.models.patterns
        seq_len: bytes a training sequence
        batch_size: sequences an update
        lr: learning rate of AdamW, falling as half a cosine
        device: auto, cpu, cuda or mps
        seed: of weights, training sequences and draws, each a stream of its own
    """

    K_values: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)
    tokens: int = 96
    sequences: int = 16
    prompt: int = 32
    repeats: int = 3
    target_steps: int = 300
    draft_steps: tuple[int, ...] = (300, 40)
    target_width: int = 64
    target_layers: int = 4
    draft_width: int = 48
    draft_layers: int = 1
    pattern: str = "mamba"
    seq_len: int = 128
    batch_size: int = 16
    lr: float = 3e-3
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        check_increasing("K_values", self.K_values, at_least=1)
        check_nonempty("draft_steps", self.draft_steps, "draft_steps = 300 40")
        for steps in self.draft_steps:
            check_integer("draft_steps", steps, at_least=1, example=300)
        whole = ("tokens", "sequences", "prompt", "repeats", "target_steps", "seq_len")
        for name in (*whole, "batch_size"):
            check_integer(name, getattr(self, name), at_least=1, example=32)

    def training(self) -> TrainingConfig:
        """How every model is trained; its rows are gone through once."""
        return TrainingConfig(
            epochs=1,
            batch_size=self.batch_size,
            lr=self.lr,
            schedule="cosine",
            warmup=20,
            device=self.device,
            seed=self.seed,
        )

    def target(self) -> SequenceLMConfig:
        """The large model."""
        return SequenceLMConfig(
            BYTES, self.target_width, self.target_layers, self.pattern
        )

    def draft(self) -> SequenceLMConfig:
        """The small one."""
        return SequenceLMConfig(
            BYTES, self.draft_width, self.draft_layers, self.pattern
        )


class Text(NamedTuple):
    """The bytes of two texts that share none."""

    train: Int[np.ndarray, " n"]
    val: Int[np.ndarray, " m"]


def run(options: SpeculativeOptions) -> ExperimentResult:
    """Speculative decoding with small models: acceptance rate, tokens a call, time.

    Trains a target and drafts on the bytes of Python's documentation, then writes with
    the target alone and with each draft and number of guesses K.
    """
    text = read_text()
    longest = len(text.val) - 1
    for name in ("prompt", "seq_len"):
        if getattr(options, name) > longest:
            got = getattr(options, name)
            raise bad_argument(name, got, f"at most {longest} bytes", "lower it")
    target, loss = train(options.target(), options.target_steps, text, options)
    prompts = spread_windows(text.val, options.prompt, options.sequences)
    prompts = prompts.to(target.embedding.weight.device)
    own = written_alone(target, prompts, options)
    drafts = []
    for steps in options.draft_steps:
        draft, draft_loss = train(options.draft(), steps, text, options)
        facts: dict[str, Any] = {"steps": steps, "val_loss": draft_loss}
        facts["parameters"] = draft.num_parameters()
        facts |= acceptance(target, draft, prompts, own)
        facts["rows"] = [
            row_of(target, draft, prompts, K, facts["alpha"], options)
            for K in track(options.K_values, f"guesses a call, {steps} updates")
        ]
        drafts.append(facts)
    metadata = {
        "corpus": CORPUS,
        "target": {"val_loss": loss, "parameters": target.num_parameters()},
        "drafts": drafts,
        "bytes": len(text.train),
        "device": str(prompts.device),
        "options": asdict(options),
        "not_shown": "time of large models, whose calls wait for weights: there K + 1 "
        "tokens cost about as much as one; here a call costs its work, and all rows "
        "wait for the last one",
    }
    return ExperimentResult(NAME, _details(metadata), metadata)


def problems(metadata: dict[str, Any]) -> list[str]:
    """Where a record contradicts itself: what no acceptance and no call can be."""
    found = []
    for draft in metadata["drafts"]:
        name = f"draft of {draft['steps']} updates"
        if not 0 <= draft["alpha"] <= 1:
            found.append(f"{name}: alpha = {draft['alpha']} is no probability")
        for row in draft["rows"]:
            if not 1 <= row["tokens_a_call"] <= row["K"] + 1:
                got = f"{row['tokens_a_call']} tokens a call"
                found.append(f"{name}: {got} with K = {row['K']} guesses")
    return found


def read_text() -> Text:
    """The corpus as bytes; lines end in a newline, white space is one blank."""
    corpus = read_corpus(CORPUS)
    return Text(_bytes_of(corpus.train), _bytes_of(corpus.val))


def _bytes_of(words: list[str]) -> Int[np.ndarray, " n"]:
    lines = " ".join("\n" if word == END_OF_LINE else word for word in words)
    text = lines.replace(" \n", "\n").replace("\n ", "\n")
    return np.frombuffer(text.encode(), np.uint8).astype(np.int64)


def spread_windows(text: Int[np.ndarray, " n"], width: int, n: int) -> Tensor:
    """n windows, evenly over the text."""
    starts = np.linspace(0, len(text) - width, n).astype(np.int64)
    return torch.from_numpy(text[starts[:, None] + np.arange(width)])


def train(
    config: SequenceLMConfig, steps: int, text: Text, options: SpeculativeOptions
) -> tuple[SequenceLM, float]:
    """A model after so many updates, in evaluation mode, and its validation loss."""
    width = options.seq_len + 1
    rng = random_stream(options.seed, "windows")
    starts = rng.integers(len(text.train) - width + 1, size=steps * options.batch_size)
    windows = torch.from_numpy(text.train[starts[:, None] + np.arange(width)])
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(stream_seed(options.seed, "init"))
        model = SequenceLM(config, device="cpu")
    with meter(f"training {model.num_parameters():,} parameters") as show:

        def on_step(at: Progress) -> None:
            show(at.step, at.steps, f"loss {at.loss:.3f}")

        trainer = Trainer(model, _next_byte, options.training(), on_step=on_step)
        val = spread_windows(text.val, width, VALIDATION_WINDOWS)
        curve = trainer.fit((windows,), (val,))
    return model.eval(), curve[-1]["val_loss"]


def _next_byte(model: nn.Module, batch: Batch) -> Scores:
    (windows,) = batch
    logits = model(windows[:, :-1]).logits.flatten(0, 1).float()
    wanted = windows[:, 1:].flatten()
    loss = functional.cross_entropy(logits, wanted, reduction="sum")
    return Scores(loss, loss.new_full((), len(wanted)), {})


def written_alone(
    target: SequenceLM, prompts: Tensor, options: SpeculativeOptions
) -> Tensor:
    """What the target writes by itself, (B, n)."""
    generator = torch.Generator().manual_seed(stream_seed(options.seed, "alone"))
    return generate(target, prompts, options.tokens, generator=generator).tokens


def acceptance(
    target: SequenceLM, draft: SequenceLM, prompts: Tensor, own: Tensor
) -> dict[str, float]:
    """alpha = E sum_y min(p(y), q(y)) along what the target wrote, and its error.

    The error is that of a mean over the sequences, which are independent; the bytes of
    one are not.
    """
    text = torch.cat([prompts, own], 1)[:, :-1]
    with torch.no_grad():
        p, q = (
            probabilities(model(text).logits[:, -own.shape[1] :], greedy=False)
            for model in (target, draft)
        )
    rows = torch.minimum(p, q).sum(-1).mean(1).tolist()
    return {"alpha": statistics.fmean(rows), "alpha_error": _error(rows)}


def _error(values: Sequence[float]) -> float:
    """The standard error of a mean; NaN for a single value."""
    if len(values) < 2:
        return math.nan
    return statistics.stdev(values) / math.sqrt(len(values))


def row_of(
    target: SequenceLM,
    draft: SequenceLM,
    prompts: Tensor,
    K: int,
    alpha: float,
    options: SpeculativeOptions,
) -> dict[str, Any]:
    """Tokens a call, calls and time with K guesses a call, against theory."""
    warm = _draws(f"warm {K}", options, prompts)
    speculate(target, draft, prompts, 1, K, generator=warm)
    written, calls, times, alone = [], [], [], []
    for repeat in range(options.repeats):
        generator = _draws(f"draws {K} {repeat}", options, prompts)
        start = time.perf_counter()
        found = speculate(
            target, draft, prompts, options.tokens, K, generator=generator
        )
        times.append(time.perf_counter() - start)
        start = time.perf_counter()
        written_alone(target, prompts, options)  # in turn: a machine's pace changes
        alone.append(time.perf_counter() - start)
        written += found.written.tolist()
        calls += found.calls.tolist()
    measured, error = ratio_of_sums(np.array(written), np.array(calls))
    speedups = [own / ours for own, ours in zip(alone, times, strict=True)]
    expected = tokens_a_call(alpha, K)
    return {
        "K": K,
        "tokens_a_call": measured,
        "tokens_a_call_error": error,
        "tokens_a_call_theory": expected,
        "calls": statistics.fmean(calls),
        "calls_theory": options.tokens / expected,
        "seconds": times,
        "seconds_alone": alone,
        "speedups": speedups,
        "speedup": statistics.median(speedups),
    }


def _draws(name: str, options: SpeculativeOptions, like: Tensor) -> torch.Generator:
    generator = torch.Generator(device=like.device)
    return generator.manual_seed(stream_seed(options.seed, name))


def ratio_of_sums(
    above: Int[np.ndarray, " n"], below: Int[np.ndarray, " n"]
) -> tuple[float, float]:
    """sum above / sum below, and its standard error over the n independent rows."""
    ratio = above.sum() / below.sum()
    if len(above) < 2:
        return float(ratio), math.nan
    spread = (above - ratio * below).std(ddof=1)
    return float(ratio), float(spread / below.mean() / math.sqrt(len(above)))


def _details(metadata: dict[str, Any]) -> str:
    parts = []
    for draft in metadata["drafts"]:
        row = max(draft["rows"], key=lambda row: row["tokens_a_call"])
        parts.append(
            f"draft of {draft['steps']} updates: alpha {draft['alpha']:.3f} +- "
            f"{draft['alpha_error']:.3f}, at K = {row['K']} {row['tokens_a_call']:.2f} "
            f"+- {row['tokens_a_call_error']:.2f} tokens a call (theory "
            f"{row['tokens_a_call_theory']:.2f}), speed {row['speedup']:.2f} of the "
            "target's own"
        )
    return "; ".join(parts)


# --- the picture ----------------------------------------------------------------------


def draw(results: list[ExperimentResult]) -> "Figure":
    """Tokens a call against K beside theory; how fast that was."""
    metadata = results[-1].metadata
    figure, axes = new_figure(1, 2)
    yields, speeds = axes[0]
    for i, draft in enumerate(metadata["drafts"]):
        rows, color = draft["rows"], COLORS[i]
        K = [row["K"] for row in rows]
        name = f"draft of {draft['steps']} updates, α = {draft['alpha']:.2f}"
        theory = [row["tokens_a_call_theory"] for row in rows]
        yields.plot(K, theory, "--", color=color)
        yields.errorbar(
            K,
            [row["tokens_a_call"] for row in rows],
            [2 * float(row["tokens_a_call_error"]) for row in rows],
            fmt=MARKERS[i],
            color=color,
            capsize=2,
            label=name,
        )
        speed = np.array([row["speedup"] for row in rows])
        ends = [[f(row["speedups"]) for row in rows] for f in (min, max)]
        spread = abs(np.array(ends) - speed)
        marks: dict[str, Any] = {"fmt": MARKERS[i] + "-", "capsize": 2}
        speeds.errorbar(K, speed, spread, color=color, label=name, **marks)
    yields.plot([], [], "--", color="grey", label="(1 − α^(K+1)) / (1 − α)")
    yields.set(xlabel="guesses a call, K", ylabel="tokens a call of the target")
    yields.set_title("the acceptance rate sets what a call yields (bars: ±2 s.e.)")
    best = max(row["speedup"] for draft in metadata["drafts"] for row in draft["rows"])
    speeds.axhline(1, color="grey", linestyle=":", label="the target alone")
    speeds.set(xlabel="guesses a call, K", ylabel="speed / speed of the target alone")
    where = f"models this small, on {metadata['device']}"
    speeds.set_title(f"{where}: {best:.2f} at best (bars: range)")
    speeds.set_ylim(0, 1.4 * max(1, best))  # room for the legend
    yields.set_ylim(bottom=0)
    for ax in (yields, speeds):
        ax.legend()
    return figure


PICTURES = (Picture(draw, f"outputs/{NAME}.png", by_default=True),)


if __name__ == "__main__":
    sys.exit(command_line(run, pictures=PICTURES))
