"""Generation: the prompts at once, then token after token at constant cost."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils import _pytree as pytree

from ssm._errors import bad_argument, check_shape
from ssm.layers.moe import MoE
from ssm.layers.selective_ssm import fixed_rates
from ssm.models.cache import MambaCache
from ssm.models.lm import SequenceLM
from ssm.models.sampling import Generators, Sampling, row_generators
from ssm.ops._ragged import check_lengths

Prompts = Int[Tensor, "B L"] | Sequence[Sequence[int] | Int[Tensor, " L"]]
Step = Callable[[Tensor, MambaCache], tuple[Tensor, MambaCache]]
LOOK_EVERY = 64  # steps of a generation on a GPU


class GeneratedStep(NamedTuple):
    """One step of every row.

    tokens (B,): the new tokens; ``eos_token`` where a row had ended before. active
    (B,): False there. logits (B, V): what the tokens were chosen from. state: the cache
    that has seen everything but these tokens.
    """

    tokens: Tensor
    active: Tensor
    logits: Tensor
    state: MambaCache


class Generation(NamedTuple):
    """The new tokens alone, (B, steps), and how many each row has, (B,).

    A row's last token is its ``eos_token`` if it ended; behind it that token is
    repeated as padding.
    """

    tokens: Tensor
    lengths: Tensor


def generate(
    model: SequenceLM,
    prompts: Prompts,
    max_new_tokens: int,
    *,
    lengths: Int[Tensor, " B"] | None = None,
    attention_mask: Bool[Tensor, "B L"] | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    greedy: bool = False,
    generator: Generators = None,
    eos_token: int | None = None,
    state: MambaCache | None = None,
) -> Generation:
    """Up to ``max_new_tokens`` further tokens for every prompt.

    prompts: a list of token lists of any lengths, or a tensor (B, L), whose padding is
    told by ``lengths`` (behind each row) or by ``attention_mask`` (left, right or in
    between; True at tokens). A row in a batch gets what it gets alone, unpadded. How
    tokens are chosen: :class:`Sampling`; what is random: :func:`row_generators`.
    ``state``: a cache of what came before the prompts, which is left as it was.

    Generation stops early once all rows have drawn ``eos_token``. No gradients are
    recorded, dropout is off, and the model is left in the mode that it was in. On a
    CUDA device, steps of a model whose states keep their size are replays of one CUDA
    graph: the same tokens, without the time that starting each kernel takes. There NaN
    logits are looked for every ``LOOK_EVERY`` steps and at the end: each look waits.
    """
    numbers = Numbers(LOOK_EVERY if model.embedding.weight.is_cuda else 1)
    steps = _generation(
        model,
        prompts,
        max_new_tokens,
        Sampling(temperature, top_k, top_p, greedy),
        Rows(lengths, attention_mask, generator, state),
        eos_token,
        Means(_graphed if _is_capturable(model) else _plain, numbers),
    )
    tokens, active = [], []
    for step in steps:
        tokens.append(step.tokens)
        active.append(step.active)
    numbers.look()
    if not tokens:
        device = model.embedding.weight.device
        none = torch.zeros(len(prompts), 0, dtype=torch.int64, device=device)
        return Generation(none, none.sum(1))
    return Generation(torch.stack(tokens, 1), torch.stack(active, 1).sum(1))


def generate_stream(
    model: SequenceLM,
    prompts: Prompts,
    max_new_tokens: int,
    *,
    lengths: Int[Tensor, " B"] | None = None,
    attention_mask: Bool[Tensor, "B L"] | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    greedy: bool = False,
    generator: Generators = None,
    eos_token: int | None = None,
    state: MambaCache | None = None,
) -> Iterator[GeneratedStep]:
    """:func:`generate`, token by token as they come; arguments are checked at once."""
    return _generation(
        model,
        prompts,
        max_new_tokens,
        Sampling(temperature, top_k, top_p, greedy),
        Rows(lengths, attention_mask, generator, state),
        eos_token,
        Means(_plain, Numbers(1)),  # every step's cache is the caller's to keep
    )


class Rows(NamedTuple):
    """What belongs to the rows of a batch beside their prompts."""

    lengths: Tensor | None
    attention_mask: Tensor | None
    generator: Generators
    state: MambaCache | None


class Numbers:
    """Whether logits are numbers: an error at every ``every``-th step if they were not.

    What a GPU has found is read then, which waits for it, and not at the steps between.
    """

    def __init__(self, every: int) -> None:
        self.every, self.steps = every, 0
        self._nan: Tensor | None = None  # (B,), True at rows that had one

    def add(self, logits: Float[Tensor, "B V"]) -> None:
        """Take these into account."""
        nan = logits.amax(-1).isnan()  # the largest of numbers and a NaN is NaN
        self._nan = nan if self._nan is None else self._nan | nan
        self.steps += 1
        if self.steps % self.every == 0:
            self.look()

    def look(self) -> None:
        """Raise ArgumentError for a NaN in any of them."""
        if self._nan is not None and bool(self._nan.any()):
            raise bad_argument(
                "model",
                f"NaN logits in row {int(self._nan.nonzero()[0])}",
                "finite logits",
                "check its parameters",
            )


class Means(NamedTuple):
    """How steps are taken, and who looks at what they give."""

    stepper: Callable[[SequenceLM, MambaCache], Step]
    numbers: Numbers


def _generation(
    model: SequenceLM,
    prompts: Prompts,
    max_new_tokens: int,
    sampling: Sampling,
    rows: Rows,
    eos_token: int | None,
    means: Means,
) -> Iterator[GeneratedStep]:
    """The checked arguments at work."""
    vocab_size, top_k = model.config.vocab_size, sampling.top_k
    if top_k is not None and top_k > vocab_size:
        raise bad_argument(
            "top_k", top_k, f"at most vocab_size = {vocab_size}", "lower it"
        )
    if not isinstance(max_new_tokens, int) or max_new_tokens < 0:
        raise bad_argument(
            "max_new_tokens", repr(max_new_tokens), "a whole number from 0", "raise it"
        )
    if eos_token is not None and not 0 <= eos_token < vocab_size:
        raise bad_argument(
            "eos_token", eos_token, f"a token below {vocab_size}, or None", "drop it"
        )
    tokens, lengths = align(prompts, rows.lengths, rows.attention_mask)
    tokens = tokens.to(model.embedding.weight.device)
    if rows.state is not None:
        rows.state.check(model, len(tokens))
    streams = []
    if not sampling.greedy:
        streams = row_generators(rows.generator, len(tokens))
    given = rows._replace(lengths=lengths)
    steps = _steps(model, tokens, given, sampling, streams, eos_token, means)
    return itertools.islice(steps, max_new_tokens)


def align(
    prompts: Prompts,
    lengths: Int[Tensor, " B"] | None = None,
    attention_mask: Bool[Tensor, "B L"] | None = None,
) -> tuple[Int[Tensor, "B L"], Int[Tensor, " B"] | None]:
    """The prompts with all padding behind them, and their lengths (None: no padding).

    Every prompt must have a token.
    """
    if not isinstance(prompts, Tensor):
        if lengths is not None or attention_mask is not None:
            raise bad_argument(
                "prompts",
                "a list, with lengths or attention_mask",
                "a list by itself: its rows have their own lengths",
                "drop the other, or pass a tensor",
            )
        rows = [torch.as_tensor(row, dtype=torch.int64) for row in prompts]
        if not rows:
            raise bad_argument("prompts", "none", "at least one", "pass some")
        lengths = torch.tensor([row.numel() for row in rows])
        prompts = pad_sequence(rows, batch_first=True)
    check_shape("prompts", prompts, (None, None))
    if attention_mask is not None:
        if lengths is not None:
            raise bad_argument(
                "attention_mask", "one beside lengths", "one of them", "drop one"
            )
        prompts, lengths = _compact(prompts, attention_mask)
    if lengths is None:
        lengths = torch.full((len(prompts),), prompts.shape[1])
    lengths = torch.as_tensor(lengths).cpu()
    check_lengths(lengths, *prompts.shape)
    if (lengths == 0).any():
        raise bad_argument(
            "prompts",
            f"an empty prompt in row {int((lengths == 0).nonzero()[0])}",
            "at least one token in every row",
            "begin with the token that starts a text",
        )
    longest = int(lengths.max()) if len(lengths) else 0
    even = bool((lengths == longest).all())
    return prompts[:, :longest], None if even else lengths.to(prompts.device)


def _compact(
    prompts: Int[Tensor, "B L"], mask: Bool[Tensor, "B L"]
) -> tuple[Int[Tensor, "B L"], Int[Tensor, " B"]]:
    """Each row's tokens moved to its front, in their order."""
    check_shape("attention_mask", mask, prompts.shape)
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise bad_argument(
            "attention_mask", "other values than 0 and 1", "0 or 1", "pass a mask"
        )
    keep = mask.to(prompts.device, torch.bool)
    order = (~keep).to(torch.int8).argsort(dim=1, stable=True)
    return prompts.gather(1, order), keep.sum(1)


def _steps(
    model: SequenceLM,
    tokens: Tensor,
    rows: Rows,
    sampling: Sampling,
    streams: list[torch.Generator],
    eos_token: int | None,
    means: Means,
) -> Iterator[GeneratedStep]:
    """Step after step, until every row has ended."""
    lengths = None if rows.lengths is None else rows.lengths.to(tokens.device)
    modules = list(model.modules())
    with _evaluating(modules):
        output = model(tokens, rows.state, lengths, last_only=True)
    logits, cache = output.logits, output.state
    active = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
    step: Step | None = None
    while True:
        means.numbers.add(logits)
        chosen = sampling.choose(logits, streams)
        if eos_token is not None:
            chosen = torch.where(active, chosen, eos_token)
        yield GeneratedStep(chosen, active, logits, cache)
        if eos_token is not None:
            active = active & (chosen != eos_token)
            if not bool(active.any()):
                return
        with _evaluating(modules):
            step = step or means.stepper(model, cache)
            logits, cache = step(chosen, cache)


def _plain(model: SequenceLM, cache: MambaCache) -> Step:  # noqa: ARG001  # a stepper
    return model.step


def _graphed(model: SequenceLM, cache: MambaCache) -> Step:
    """One step from ``cache`` captured as a CUDA graph; its outputs are written over.

    The replays carry their own copy of the states along, so they take the cache that
    the last one returned and no other.
    """
    states = pytree.tree_map(torch.clone, cache.states)
    carried = cache.replaced(states, cache.batch_size)
    tokens = torch.zeros(
        cache.batch_size, dtype=torch.int64, device=model.embedding.weight.device
    )
    with torch.cuda.device_of(tokens), fixed_rates(model.modules()) as rates:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # compiles kernels, and makes workspaces
            model.step(tokens, carried)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits, after = model.step(tokens, carried)
            _copy_states(carried, after)

    def replay(
        chosen: Tensor, _: MambaCache, *, _read: object = rates
    ) -> tuple[Tensor, MambaCache]:  # the graph reads the rates: they live with it
        tokens.copy_(chosen)
        graph.replay()
        return logits, carried

    return replay


def _copy_states(to: MambaCache, source: MambaCache) -> None:
    """All of one dtype at once, or each would be a kernel: two more a layer."""
    pairs: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
    leaves = (pytree.tree_leaves(cache.states) for cache in (to, source))
    for own, other in zip(*leaves, strict=True):
        pairs.setdefault(own.dtype, []).append((own, other))
    for alike in pairs.values():
        owns, others = zip(*alike, strict=True)
        torch._foreach_copy_(owns, others)


def _is_capturable(model: SequenceLM) -> bool:
    """Whether a step is the same kernels on the same memory every time, on a GPU.

    Not where states grow; nor with a mixture of experts, which reads on the host which
    expert has how many tokens.
    """
    grows = any(None in shape for _, shapes in model.state_layout for shape in shapes)
    waits = any(isinstance(module, MoE) for module in model.modules())
    return model.embedding.weight.is_cuda and not grows and not waits


@contextmanager
def _evaluating(modules: list[nn.Module]) -> Iterator[None]:
    """No gradients and no dropout; every module's mode is given back.

    Entered for each step by itself: between steps the caller's own modes hold.
    """
    training = [module for module in modules if module.training]
    try:
        for module in training:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
