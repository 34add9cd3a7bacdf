"""Tiny language models of every pattern, no two parameters of them alike."""

from typing import Any

import torch

from ssm.models.config import SequenceLMConfig
from ssm.models.lm import SequenceLM
from ssm.models.patterns import resolve_pattern

VOCAB = 19
SMALL: dict[str, dict[str, Any]] = {
    "mamba": {"d_state": 3},
    "mamba2": {"d_state": 3, "headdim": 4},
    "s4": {"d_state": 4},
    "s4d": {"d_state": 4},
    "s5": {"d_state": 4},
    "attention": {"n_heads": 2},
    "hyena": {"filter_hidden": 6},
    "moe": {"n_experts": 3, "d_hidden": 8},
}
# Every kind of layer that no named pattern has, and feed-forward layers mixed.
LETTERS = "G+K*N~U"


def tiny_config(pattern: str, **entries: Any) -> SequenceLMConfig:
    """8 channels (``d_model``), as few layers as show the pattern."""
    n_layers = entries.pop("n_layers", {"jamba": 8, LETTERS: 4}.get(pattern, 2))
    units = resolve_pattern(pattern, n_layers, entries.get("moe_every", 1))
    used = [{u.mixer for u in units}, {u.feed_forward for u in units}]
    mixer, ffn = ({k: SMALL[k] for k in kinds & SMALL.keys()} for kinds in used)
    entries = {"d_model": 8, "mixer": mixer, "feed_forward": ffn} | entries
    return SequenceLMConfig(VOCAB, n_layers=n_layers, pattern=pattern, **entries)


def tiny(
    pattern: str, *, seed: int = 0, dtype: torch.dtype = torch.float64, **entries: Any
) -> SequenceLM:
    """A model in evaluation mode whose every parameter was moved at random."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = SequenceLM(tiny_config(pattern, **entries), dtype=dtype)
        with torch.no_grad():
            model.embedding.weight.normal_()
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    """Token numbers below VOCAB."""
    return torch.randint(
        VOCAB, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int64
    )
