"""Language models from any pattern of layers."""

from os import PathLike
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ssm._errors import bad_argument
from ssm.layers._base import param_groups
from ssm.layers._step import project, project_by
from ssm.layers.norm import RMSNorm
from ssm.models.blocks import Block, BlockStack
from ssm.models.cache import MambaCache
from ssm.models.checkpoint import load_checkpoint, save_checkpoint
from ssm.models.config import SequenceLMConfig
from ssm.models.kinds import Place
from ssm.ops._dtypes import compute_dtype
from ssm.ops._ragged import check_lengths, fill_padding, valid_steps


class LMOutput(NamedTuple):
    """What :meth:`SequenceLM.forward` returns.

    logits (B, L, V), or (B, V) with ``last_only``; state, the cache to go on from;
    auxiliary_loss, the mean load-balancing loss of the mixtures of experts (1 when
    balanced, 0 where the model has none), to be added to the training loss with a
    small weight.
    """

    logits: Tensor
    state: MambaCache
    auxiliary_loss: Tensor


class Embedding(nn.Embedding):
    """One vector a token, normal with deviation ``std``."""

    def __init__(self, vocab_size: int, d_model: int, std: float, **where: Any) -> None:
        self.std = std
        super().__init__(vocab_size, d_model, **where)

    def reset_parameters(self) -> None:
        """See the class."""
        nn.init.normal_(self.weight, std=self.std)


class Head(nn.Linear):
    """Logits of every token, from weights of deviation 0.02."""

    def reset_parameters(self) -> None:
        """See the class."""
        nn.init.normal_(self.weight, std=0.02)


class SequenceLM(BlockStack):
    """logits = W norm(block_n(… block_1(embedding(tokens)))); W is tied or its own.

    Whole sequences, pieces of them, and single steps give the same logits. Parameters:
    ``embedding.weight``, ``blocks.{i}.norm.weight``, ``blocks.{i}.mixer.*``,
    ``blocks.{i}.ffn_norm.weight`` and ``blocks.{i}.ffn.*`` where there is a
    feed-forward layer, ``norm.weight``, and ``head.weight`` unless tied.
    ``checkpoint_format`` says whose layout the weights were loaded from (None: from
    nowhere).
    """

    def __init__(
        self,
        config: SequenceLMConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        units = config.units()
        super().__init__(
            Block(
                config.d_model,
                unit,
                mixer=config.mixer[unit.mixer],
                feed_forward=config.feed_forward.get(unit.feed_forward or ""),
                norm_eps=config.norm_eps,
                dropout=config.dropout,
                place=Place(i, len(units)),
                **where,
            )
            for i, unit in enumerate(units)
        )
        self.config = config
        self.checkpoint_format: str | None = None
        self.embedding = Embedding(
            config.vocab_size, config.d_model, config.embedding_std, **where
        )
        self.norm = RMSNorm(config.d_model, config.norm_eps, **where)
        if not config.tie_embeddings:
            self.head = Head(config.d_model, config.vocab_size, bias=False, **where)

    def forward(
        self,
        tokens: Int[Tensor, "B L"],
        state: MambaCache | None = None,
        lengths: Int[Tensor, " B"] | None = None,
        last_only: bool = False,
    ) -> LMOutput:
        """Logits for every position, continuing from ``state``; see :class:`LMOutput`.

        Row i ends at ``lengths[i]``: what follows may hold any numbers, and has logits
        0. With ``last_only`` the logits of each row's last token only are formed.
        """
        if last_only and tokens.shape[-1] == 0:
            raise bad_argument(
                "tokens", "no steps", "a last step (last_only)", "pass at least one"
            )
        x = self._embed(tokens, lengths)
        y, cache, loss = self.run(x, state, lengths)
        if last_only:
            y = _last(y, lengths)
        if loss is None:
            loss = torch.zeros((), device=y.device)
        return LMOutput(self._logits(y), cache, loss)

    def step(
        self, tokens: Int[Tensor, " B"], state: MambaCache
    ) -> tuple[Float[Tensor, "B V"], MambaCache]:
        """The logits behind one more token of every row, and the new cache."""
        x = self._embed(tokens[..., None], None)
        y_t, cache = self.run_step(x[:, 0], state)
        return self._logits(y_t), cache

    def num_parameters(self) -> int:
        """How many numbers the model learns; a tied head counts once."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """For an optimiser: A, D, dt, norms and vectors without weight decay."""
        return param_groups(self, lr, weight_decay)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | PathLike[str],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "SequenceLM":
        """The model saved in ``folder``, in our layout, mamba_ssm's or Hugging Face's.

        The layout is found by the names of the tensors, logged, and kept in
        ``checkpoint_format``. dtype: that of the saved embedding unless given. Raises
        ArgumentError for what is missing, cut off, foreign or of another shape.
        """
        checkpoint = load_checkpoint(folder)
        like = checkpoint.tensors["embedding.weight"]
        model = cls(checkpoint.config, device="meta", dtype=dtype or like.dtype)
        checkpoint.check(model.state_dict())
        # Every parameter is about to be overwritten: nothing is initialised before.
        model = model.to_empty(device=device or torch.get_default_device())
        model.load_state_dict(checkpoint.tensors)
        model.checkpoint_format = checkpoint.format
        return model

    def save_pretrained(
        self,
        folder: str | PathLike[str],
        layout: Literal["native", "mamba_ssm", "hugging_face"] = "native",
    ) -> None:
        """Write model.safetensors and config.json into ``folder``.

        Layouts other than our own are for pure Mamba and Mamba-2 models.
        """
        save_checkpoint(folder, self.state_dict(), self.config, layout)

    def _embed(self, tokens: Tensor, lengths: Tensor | None) -> Tensor:
        """The residual stream's start (B, L, D), zero on padding."""
        whole = not (tokens.is_floating_point() or tokens.is_complex())
        if tokens.ndim != 2 or not whole or tokens.dtype == torch.bool:
            raise bad_argument(
                "tokens",
                f"{tokens.dtype} of shape {tuple(tokens.shape)}",
                "integers of shape (B, L), or (B,) for a step",
                "pass token numbers",
            )
        if tokens.device != self.embedding.weight.device:
            where = self.embedding.weight.device
            raise bad_argument(
                "tokens",
                f"a tensor on {tokens.device}",
                f"one on {where}, where the model lies",
                f"move it with .to('{where}')",
            )
        valid = None
        if lengths is not None:
            check_lengths(lengths, *tokens.shape)
            valid = valid_steps(lengths, tokens.shape[1])
            tokens = torch.where(valid, tokens, 0)
        _check_range(tokens, self.config.vocab_size)
        x = self.embedding(tokens)
        if self.config.residual_in_fp32:
            x = x.to(compute_dtype(x))
        return x if valid is None else fill_padding(x, valid, 0.0)

    def _logits(self, y: Tensor) -> Tensor:
        y = self.norm(y).to(self.norm.weight.dtype)
        if self.config.tie_embeddings:
            return project_by(self.embedding.weight, y)
        return project(self.head, y)


def _check_range(tokens: Tensor, vocab_size: int) -> None:
    """Raise ArgumentError for a token beyond the vocabulary (on a CPU: elsewhere
    reading the values would wait for the device)."""
    if torch.compiler.is_compiling() or tokens.device.type != "cpu":
        return
    if tokens.numel() and not (
        0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size
    ):
        raise bad_argument(
            "tokens",
            f"values from {int(tokens.min())} to {int(tokens.max())}",
            f"values within 0 and {vocab_size - 1}",
            "see that tokens and model have one vocabulary",
        )


def _last(
    y: Float[Tensor, "B L D"], lengths: Int[Tensor, " B"] | None
) -> Float[Tensor, "B D"]:
    """Each row at its last step; zeros for a row without steps."""
    if lengths is None:
        return y[:, -1]
    index = (lengths - 1).clamp(min=0)[:, None, None].to(y.device)
    return y.gather(1, index.expand(-1, 1, y.shape[2]))[:, 0]
