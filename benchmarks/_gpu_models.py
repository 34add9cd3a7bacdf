"""The model rows of :mod:`benchmarks.gpu_ops`: ours and mamba_ssm's, the same weights.

A language model of Mamba-130M's shape, in bfloat16: its training step (forward, cross
entropy at every position, backward, fused AdamW) and the time of one more token.
"""

import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from ssm.models import SequenceLM, SequenceLMConfig
from ssm.models.generate import generate

CONFIG = SequenceLMConfig(vocab_size=50288, d_model=768, n_layers=24, pattern="mamba")
BATCH, LENGTH = 8, 1024
PROMPT, FEW, MANY = 64, 64, 320  # tokens


def ours(device: torch.device, seed: int) -> SequenceLM:
    """Our model, with new weights."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        return SequenceLM(CONFIG, device=device, dtype=torch.bfloat16)


def mamba_ssm(model: SequenceLM) -> nn.Module:
    """mamba_ssm's model with our weights."""
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    config = MambaConfig(
        d_model=CONFIG.d_model, n_layer=CONFIG.n_layers, vocab_size=CONFIG.vocab_size
    )
    device = model.embedding.weight.device
    theirs: nn.Module = MambaLMHeadModel(config, device=device, dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, "mamba_ssm")
        weights = load_file(f"{folder}/model.safetensors")
    head = weights.get("lm_head.weight", weights["backbone.embedding.weight"])
    theirs.load_state_dict(weights | {"lm_head.weight": head})
    return theirs


def tokens(device: torch.device, seed: int, batch: int, length: int) -> Tensor:
    """Random tokens: time does not depend on them."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (batch, length)
    return torch.randint(CONFIG.vocab_size, shape, generator=generator, device=device)


def training_step(model: nn.Module, batch: Tensor) -> Callable[[], Tensor]:
    """One step of training, to be called again and again; returns the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> Tensor:
        logits = model(batch[:, :-1]).logits
        loss = functional.cross_entropy(
            logits.flatten(0, 1).float(), batch[:, 1:].flatten()
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def decode_ours(model: SequenceLM, prompt: Tensor, n: int) -> Tensor:
    """n greedy tokens, (B, n)."""
    return generate(model, prompt, n, greedy=True).tokens


def decode_mamba_ssm(model: Any, prompt: Tensor, n: int) -> Tensor:
    """n greedy tokens by its own generation, under its own CUDA graph."""
    length = prompt.shape[1] + n
    out = model.generate(prompt, max_length=length, cg=True, top_k=1)
    return out[:, prompt.shape[1] :]


def seconds_a_token(decode: Callable[[int], Tensor]) -> float:
    """Of the tokens beyond the first FEW, whose costs (prompt, capture) cancel."""
    taken = []
    for n in (FEW, MANY):
        torch.cuda.synchronize()
        start = time.perf_counter()
        decode(n)
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return (taken[1] - taken[0]) / (MANY - FEW)
