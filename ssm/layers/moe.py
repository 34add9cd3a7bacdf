"""A mixture of experts in which every token reaches all of its top-k experts."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from ssm._errors import bad_argument, check_shape
from ssm.layers.mlp import GLUMLP
from ssm.ops._dtypes import compute_dtype
from ssm.ops._ragged import fill_padding

BALANCE = 0.01  # usual weight of the load-balancing loss (Switch, section 2.2)


class MoE(nn.Module):
    """y = sum_{e in top k} p_e E_e(x), p the router's softmax over those k experts.

    Each expert E_e is a :class:`GLUMLP`. No expert has a capacity and no token is
    dropped, so a token's output depends on that token alone: a step equals a forward
    pass. Returned beside y: the load-balancing loss

        n_experts * sum_e f_e P_e,

    f_e the fraction of all assignments that go to e and P_e the mean router
    probability of e over the tokens; 1 when balanced (Switch, arXiv:2101.03961,
    equations 4-6, with top_k = 1). Gradients reach the router through P and p.

    Differs: f_e sums to 1 for any top_k (Mixtral's code and Jamba's let it sum to
    top_k), so that the loss of a balanced router is 1 whatever top_k is.
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int = 8,
        top_k: int = 2,
        d_hidden: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= n_experts:
            raise bad_argument(
                "top_k", top_k, f"1 to n_experts = {n_experts}", "choose fewer experts"
            )
        self.d_model, self.n_experts, self.top_k = d_model, n_experts, top_k
        self.router = nn.Linear(
            d_model, n_experts, bias=False, device=device, dtype=dtype
        )
        self.experts = nn.ModuleList(
            GLUMLP(d_model, d_hidden, device=device, dtype=dtype)
            for _ in range(n_experts)
        )

    def forward(
        self, x: Float[Tensor, "*B D"], valid: Bool[Tensor, "*B"] | None = None
    ) -> tuple[Float[Tensor, "*B D"], Float[Tensor, ""]]:
        """The outputs and the load-balancing loss.

        Where ``valid`` is False the output is 0 and the loss counts no token.
        """
        if x.shape[-1:] != (self.d_model,):
            raise bad_argument(
                "x", f"shape {tuple(x.shape)}", f"(…, {self.d_model})", "reshape it"
            )
        tokens = x.reshape(-1, self.d_model)
        keep = None
        if valid is not None:
            check_shape("valid", valid, x.shape[:-1])
            keep = valid.reshape(-1)
            tokens = _blank(tokens, keep)
        scores = self.router(tokens)
        scores = scores.to(compute_dtype(scores))
        best, chosen = scores.topk(self.top_k, -1)
        y = self._mix(tokens, best.softmax(-1), chosen)
        loss = _balance_loss(scores, chosen, keep)
        if keep is not None:
            y = _blank(y, keep)
        return y.reshape(x.shape), loss

    def _mix(
        self,
        tokens: Float[Tensor, "T D"],
        weights: Float[Tensor, "T K"],
        chosen: Tensor,
    ) -> Float[Tensor, "T D"]:
        """Every expert on its own tokens; nothing is added by atomics.

        The T K (token, expert) pairs are sorted by expert, each expert works on its
        run, and the pairs are sorted back: both moves are permutations.
        """
        order = chosen.flatten().argsort(stable=True)
        counts = chosen.flatten().bincount(minlength=self.n_experts).tolist()
        copies = tokens[:, None].expand(-1, self.top_k, -1).flatten(0, 1)
        runs = copies.index_select(0, order).split(counts)
        outputs = [e(run) for e, run in zip(self.experts, runs, strict=True)]
        restored = torch.cat(outputs).index_select(0, order.argsort())
        restored = restored.unflatten(0, (len(tokens), self.top_k))
        return (restored * weights[..., None].to(restored.dtype)).sum(1)


def _balance_loss(
    scores: Float[Tensor, "T E"], chosen: Tensor, keep: Bool[Tensor, " T"] | None
) -> Float[Tensor, ""]:
    n_experts = scores.shape[1]
    assigned = functional.one_hot(chosen, n_experts).sum(1).to(scores.dtype)
    probability = scores.softmax(-1)
    if keep is not None:
        assigned, probability = _blank(assigned, keep), _blank(probability, keep)
        tokens = keep.sum().clamp(min=1)
    else:
        tokens = torch.tensor(max(len(scores), 1), device=scores.device)
    fraction = assigned.sum(0) / (tokens * chosen.shape[1])
    return n_experts * (fraction * probability.sum(0) / tokens).sum()


def _blank(x: Float[Tensor, "T D"], keep: Bool[Tensor, " T"]) -> Float[Tensor, "T D"]:
    """x with 0 where ``keep`` is False; gradients and NaN there are cut off."""
    return fill_padding(x[None], keep[None], 0.0)[0]
