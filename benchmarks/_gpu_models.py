"""The model rows of :mod:`benchmarks.gpu_ops`: ours and mamba_ssm's, the same weights.

A language model of Mamba-130M's shape, in bfloat16: its training step (forward, cross
entropy at every position, backward, fused AdamW) and the time of one more token. And
the small model of document 1 in our trainer, with our layers or with mamba_ssm's.
"""

import tempfile
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from benchmarks._steps import timed_steps
from experiments.common import random_stream
from mamba_experiments.models import build, build_config
from mamba_experiments.train import token_objective
from ssm.layers.mamba import Mamba
from ssm.models import SequenceLM, SequenceLMConfig
from ssm.models.generate import generate
from ssm.training import TrainingConfig

CONFIG = SequenceLMConfig(vocab_size=50288, d_model=768, n_layers=24, pattern="mamba")
BATCH, LENGTH = 8, 1024
PROMPT, FEW, MANY = 64, 64, 320  # tokens
VOCABULARY, SMALL_STEPS, SMALL_BLOCKS = 10_000, 50, 5
SMALL_TOKENS = 64 * 128  # a step


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


class TheirMixer(nn.Module):
    """mamba_ssm's layer with the weights of ours, where ours stands in a block."""

    def __init__(self, ours: Mamba) -> None:
        from mamba_ssm.modules.mamba_simple import Mamba as Theirs

        super().__init__()
        sizes = {n: getattr(ours, n) for n in ("d_state", "d_conv", "expand")}
        self.layer = Theirs(ours.d_model, **sizes)
        self.layer.load_state_dict(ours.state_dict())

    def init_state(self, batch_size: int) -> tuple[()]:  # noqa: ARG002  # as ours
        """Nothing: sequences are trained on whole."""
        return ()

    def forward(self, x: Tensor, *_: Any) -> tuple[Tensor, tuple[()]]:
        """The layer's outputs."""
        return self.layer(x), ()


def small_model(seed: int, *, theirs: bool) -> SequenceLM:
    """Document 1's model: width 64, 16 states, 2 layers."""
    config = build_config(
        "mamba_simple", vocab_size=VOCABULARY, d_model=64, n_state=16, n_layers=2
    )
    model = build(config, seed=seed)
    if theirs:
        for block in model.blocks:
            block.mixer = TheirMixer(cast("Mamba", block.mixer))
    return model


def small_training(model: SequenceLM, *, cuda_graph: bool, seed: int) -> dict[str, Any]:
    """Steps of document 1's training, 64 windows of 128 tokens, as the trainer's."""
    config = TrainingConfig(epochs=1, batch_size=64, cuda_graph=cuda_graph, seed=seed)
    windows = (SMALL_BLOCKS + 1) * SMALL_STEPS * config.batch_size
    drawn = random_stream(seed, "data").integers(VOCABULARY, size=(2, windows, 128))
    train = [torch.from_numpy(x) for x in drawn]
    return timed_steps(model, token_objective(True), config, train, steps=SMALL_STEPS)


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
