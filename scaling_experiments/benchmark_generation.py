"""One more token: with an SSM the same at every context, with attention more.

A Mamba and a transformer of about equally many parameters (ssm.models), random weights:

* decoding: the time of one token behind a context, and the bytes of the cache. The
  prompt is read once ("prefill", timed apart); then the next token is timed again and
  again from that same cache, which no step changes. Rows of a batch have one prompt:
  its cache is copied for them.
* training: forward and backward of the next token's cross-entropy, per token.

All models, contexts and batches take turns. Attention's cache is copied at each step
(ssm.layers.attention); one allocated beforehand would have a smaller slope, not none.
Document 4's table (section 19.6.2) is printed beside ours; it gives no unit.

Judged is what the caches hold: an SSM's bytes do not depend on the context, attention's
are 2 S H P numbers a layer and row. Times and crossovers are measured.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from experiments.common import (
    ExperimentResult,
    Picture,
    check_increasing,
    check_integer,
    meter,
    random_stream,
)
from scaling_experiments._fits import crossover, fit_line
from scaling_experiments._generation_report import (
    MAMBA,
    TRANSFORMER,
    Entry,
    crossover_line,
    curve_of,
    draw,
    tables,
)
from scaling_experiments._report import command_with_tables
from scaling_experiments._timing import (
    Budget,
    Call,
    check_device,
    check_limits,
    in_turns,
    short_of_memory,
    threads,
    too_slow,
    usable_bytes,
)
from ssm.models.cache import MambaCache
from ssm.models.config import SequenceLMConfig
from ssm.models.lm import SequenceLM

NAME = "benchmark_generation"
CLAIM = "an SSM's cache has one size; attention's is 2 S H P numbers a layer and row"
VOCABULARY = 256
POWER = {MAMBA: 1.0, TRANSFORMER: 1.5}  # of the length; most of a block is linear


@dataclass(frozen=True)
class GenerationOptions:
    """Time per token and cache bytes against context: Mamba beside a transformer.

    Args:
        contexts: tokens in the cache when a step is timed, increasing
        batches: rows that are decoded together
        train_lengths: sequence lengths of the training times, increasing
        d_model: width of both models
        n_layers: blocks of the transformer; Mamba has twice as many
        device: where to run
        seconds_per_point: warm time for each model at each context (at least 5
            repeats, up to 4 times it); calls expected to take 16 times it are left out
        memory_gb: most memory that a call may need, in GB; 0 for 80 % of what is free
        threads: on a CPU; one token is too little work to share, and where other
            programs run, threads that wait for each other cost milliseconds each time
        seed: draws weights and prompts
    """

    contexts: tuple[int, ...] = (64, 256, 1024, 2048, 4096, 8192, 16384)
    batches: tuple[int, ...] = (1, 8)
    train_lengths: tuple[int, ...] = (1024, 8192, 65536)
    d_model: int = 128
    n_layers: int = 2
    device: Literal["cpu", "cuda"] = "cpu"
    seconds_per_point: float = 0.25
    memory_gb: float = 0.0
    threads: int = 1
    seed: int = 0

    def check(self) -> torch.device:
        """The device. Raises InputError for values that make no sense."""
        check_increasing("contexts", self.contexts, at_least=1)
        check_increasing("batches", self.batches, at_least=1)
        check_increasing("train-lengths", self.train_lengths, at_least=1)
        for name in ("d_model", "n_layers", "threads"):
            value = getattr(self, name)
            check_integer(name.replace("_", "-"), value, at_least=1, example=4)
        check_integer("seed", self.seed, at_least=0, example=0)
        check_limits(self.seconds_per_point, self.memory_gb)
        return check_device(self.device)


def make_models(options: GenerationOptions) -> dict[str, SequenceLM]:
    """Mamba with twice as many blocks as the transformer: about equal parameters."""
    layers = {MAMBA: 2 * options.n_layers, TRANSFORMER: options.n_layers}
    rotary = {"attention": {"positions": "rotary"}}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        return {
            name: SequenceLM(
                SequenceLMConfig(
                    VOCABULARY,
                    options.d_model,
                    n,
                    name,
                    mixer=rotary if name == TRANSFORMER else {},
                )
            )
            .to(options.device)
            .eval()
            for name, n in layers.items()
        }


def cache_bytes(model: SequenceLM, context: int, batch: int) -> int:
    """The bytes of a cache by formula, in float32.

    Mamba: a window of d_conv - 1 inputs and N numbers for each of its channels. An
    attention layer: keys and values of every token, and the row's length.
    """
    config, numbers, lengths = model.config, 0, 0
    for unit in config.units():
        options = config.mixer[unit.mixer]
        if unit.mixer == "mamba":
            channels = options["expand"] * config.d_model
            numbers += channels * (options["d_conv"] - 1 + options["d_state"])
        else:
            head = options["d_head"] or -(-config.d_model // options["n_heads"])
            heads = options["n_kv_heads"] or options["n_heads"]
            numbers, lengths = numbers + 2 * context * heads * head, lengths + 1
    return batch * (4 * numbers + 8 * lengths)


def run(options: GenerationOptions) -> ExperimentResult:
    """Time per token and cache bytes against context: Mamba beside a transformer."""
    device = options.check()
    race = Race(make_models(options), device, options)
    race.warm_up()
    with threads(options.threads), meter("generation") as show:
        race.prefill(lambda name: show(0, 3, f"prefill: {name}"))
        race.decode(lambda name: show(1, 3, f"one token: {name}"))
        race.train(lambda name: show(2, 3, f"training: {name}"))
    metadata = {
        **{
            key: getattr(options, key) for key in GenerationOptions.__dataclass_fields__
        },
        "device": str(device),
        "torch": torch.__version__,
        "vocabulary": VOCABULARY,
        "models": {
            name: {"layers": len(lm.layers), "parameters": lm.num_parameters()}
            for name, lm in race.models.items()
        },
        "attention_cache": "copied at each step, not allocated beforehand",
        "training": "forward and backward, batch 1; no optimiser",
        "skipped": race.skipped,
        "prefills": race.prefills,
        "trainings": race.trainings,
        **summarise(race.steps, options),
    }
    broken = problems(metadata)
    return ExperimentResult(
        NAME, _details(metadata, broken), metadata, passed=not broken
    )


# --- measuring ------------------------------------------------------------------------


class Race:
    """What has been found so far, and what was left out."""

    def __init__(
        self,
        models: dict[str, SequenceLM],
        device: torch.device,
        options: GenerationOptions,
    ) -> None:
        self.models, self.device, self.options = models, device, options
        self.budget = Budget(options.seconds_per_point)
        self.caches: dict[tuple[str, int], MambaCache] = {}
        self.prefills: list[Entry] = []
        self.steps: list[Entry] = []
        self.trainings: list[Entry] = []
        self.skipped: list[Entry] = []

    def warm_up(self) -> None:
        """Load code and start threads; nothing of it is timed."""
        for model in self.models.values():
            training_call(model, self._tokens(17))()

    def prefill(self, tell: Callable[[str], None]) -> None:
        """Read each context by one call; keep the cache that it leaves."""
        for context in self.options.contexts:
            calls: dict[str, Call] = {}
            for name, model in self.models.items():
                needed = 4 * context * 40 * self.options.d_model
                needed += 2 * cache_bytes(model, context, 1)
                what = f"prefill of {name}"
                if self._fits(what, context, needed, self._past(self.prefills, name)):
                    calls[name] = self._prefill_call(name, context)
            for name, entry in self._in_turns("prefill of ", context, calls, tell):
                self.prefills.append({"model": name, "context": context, **entry})

    def _prefill_call(self, name: str, context: int) -> Call:
        tokens, model = self._tokens(context), self.models[name]

        @torch.no_grad()
        def call() -> None:
            self.caches[name, context] = model(tokens, last_only=True).state

        return call

    def decode(self, tell: Callable[[str], None]) -> None:
        """Time one token behind every context, for every batch, all in turns."""
        calls: dict[tuple[str, int, int], Call] = {}
        caches: dict[tuple[str, int, int], MambaCache] = {}
        for (name, context), cache in self.caches.items():
            for batch in self.options.batches:
                needed = 3 * batch * cache.bytes  # the rows', and a longer copy
                if self._fits(f"one token of {name}, batch {batch}", context, needed):
                    rows = cache.select([0] * batch)
                    key = (name, context, batch)
                    caches[key], calls[key] = rows, self._step_call(name, rows)
        named = {f"{n}, context {c}, batch {b}": (n, c, b) for n, c, b in calls}
        timed = {label: calls[key] for label, key in named.items()}
        for label, entry in self._in_turns("", "a step", timed, tell):
            name, context, batch = named[label]
            size = caches[named[label]].bytes
            by_formula = cache_bytes(self.models[name], context, batch)
            place = {"model": name, "context": context, "batch": batch}
            self.steps.append(
                {**place, "bytes": size, "formula_bytes": by_formula, **entry}
            )

    def _step_call(self, name: str, cache: MambaCache) -> Call:
        model = self.models[name]
        token = torch.zeros(cache.batch_size, dtype=torch.int64, device=self.device)
        return torch.no_grad()(lambda: model.step(token, cache))

    def train(self, tell: Callable[[str], None]) -> None:
        """Time forward and backward of one sequence of every length."""
        self.caches.clear()
        for length in self.options.train_lengths:
            calls: dict[str, Call] = {}
            for name, model in self.models.items():
                layers = len(model.layers)
                needed = 4 * length * (100 * self.options.d_model * layers + 1000)
                what = f"training of {name}"
                if self._fits(what, length, needed, self._past(self.trainings, name)):
                    calls[name] = training_call(model, self._tokens(length + 1))
            for name, entry in self._in_turns("training of ", length, calls, tell):
                per_token = entry["median_s"] / length
                place = {"model": name, "context": length, "per_token_s": per_token}
                self.trainings.append({**place, **entry})

    def _in_turns(
        self,
        prefix: str,
        at: int | str,
        calls: dict[str, Call],
        tell: Callable[[str], None],
    ) -> list[tuple[str, Entry]]:
        times, lost = in_turns(calls, self.device, self.budget, tell)
        self.skipped += [
            {"what": f"{prefix}{name}", "at": at, "why": why}
            for name, why in lost.items()
        ]
        return list(times.items())

    def _fits(
        self,
        what: str,
        at: int,
        needed: int,
        past: tuple[list[tuple[int, float]], float] | None = None,
    ) -> bool:
        """Whether to try; if not, why is noted."""
        seconds = self.options.seconds_per_point
        limit = usable_bytes(self.options.memory_gb, self.device)
        why = short_of_memory(needed, limit)
        if why is None and past is not None:
            why = too_slow(past[0], at, past[1], seconds)
        if why is not None:
            self.skipped.append({"what": what, "at": at, "why": why})
        return why is None

    def _past(
        self, entries: list[Entry], name: str
    ) -> tuple[list[tuple[int, float]], float]:
        mine = [e for e in entries if e["model"] == name]
        return [(e["context"], e["median_s"]) for e in mine], POWER[name]

    def _tokens(self, length: int) -> Tensor:
        seed = int(random_stream(self.options.seed, "tokens").integers(2**63))
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(VOCABULARY, (1, length), generator=generator)
        return tokens.to(self.device)


def training_call(model: SequenceLM, tokens: Tensor) -> Call:
    """All gradients of the next token's cross-entropy."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:].flatten()
    leaves = list(model.parameters())

    def call() -> object:
        logits = model(inputs).logits.flatten(0, 1)
        return torch.autograd.grad(functional.cross_entropy(logits, targets), leaves)

    return call


# --- what it comes to -----------------------------------------------------------------


def summarise(steps: Sequence[Entry], options: GenerationOptions) -> Entry:
    """A curve for each model and batch, with its slopes; crossovers for each batch."""
    curves = []
    for name in (MAMBA, TRANSFORMER):
        for batch in options.batches:
            points = [s for s in steps if (s["model"], s["batch"]) == (name, batch)]
            if points:
                curves.append(_curve(name, batch, points))
    crossovers = []
    for batch in options.batches:
        mamba, transformer = (
            curve_of(curves, name, batch) for name in (MAMBA, TRANSFORMER)
        )
        if mamba and transformer:
            found = _crossover(mamba["points"], transformer["points"], options.seed)
            crossovers.append({"batch": batch, **found})
    return {"curves": curves, "crossovers": crossovers}


def _curve(name: str, batch: int, points: Sequence[Entry]) -> Entry:
    """Points along the context, and seconds and bytes per token of context."""
    contexts = [point["context"] for point in points]
    return {
        "model": name,
        "batch": batch,
        "points": list(points),
        "slope_s": fit_line(contexts, [point["median_s"] for point in points]),
        "slope_bytes": fit_line(contexts, [point["bytes"] for point in points]),
    }


def _crossover(
    mamba: Sequence[Entry], transformer: Sequence[Entry], seed: int
) -> Entry:
    rivals = {point["context"]: point for point in transformer}
    both = [(p, rivals[p["context"]]) for p in mamba if p["context"] in rivals]
    return crossover(
        [first["context"] for first, _ in both],
        [first["repeats_s"] for first, _ in both],
        [second["repeats_s"] for _, second in both],
        random_stream(seed, "bootstrap"),
    )


def problems(metadata: Entry) -> list[str]:
    """The claims that a record's metadata breaks."""
    broken = [
        f"{CLAIM}: {curve['model']} holds {point['bytes']} bytes at context "
        f"{point['context']}, batch {curve['batch']}, by formula "
        f"{point['formula_bytes']}"
        for curve in metadata["curves"]
        for point in curve["points"]
        if point["bytes"] != point["formula_bytes"]
    ]
    for curve in metadata["curves"]:
        sizes = {point["bytes"] for point in curve["points"]}
        if curve["model"] == MAMBA and len(sizes) > 1:
            broken.append(f"{CLAIM}: {MAMBA} holds {sorted(sizes)} bytes")
    return broken


def _details(metadata: Entry, broken: Sequence[str]) -> str:
    if broken:
        return f"{len(broken)} claim(s) off; {broken[0]}"
    told = []
    for curve in metadata["curves"]:
        first, last = curve["points"][0], curve["points"][-1]
        told.append(
            f"{curve['model']}, batch {curve['batch']}: {1e3 * first['median_s']:.3g} "
            f"to {1e3 * last['median_s']:.3g} ms and {first['bytes']:,} to "
            f"{last['bytes']:,} bytes at contexts {first['context']} to "
            f"{last['context']}"
        )
    told += [crossover_line(entry) for entry in metadata["crossovers"]]
    return "; ".join(told) or "nothing fitted"


PICTURES = (Picture(draw, "outputs/generation_benchmark.png", by_default=True),)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: tables, the picture, the run log."""
    return command_with_tables(run, tables, pictures=PICTURES, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
