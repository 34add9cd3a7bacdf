"""The adjoint of a linear scan is a linear scan that runs backwards."""

from collections.abc import Callable

import torch
from torch import Tensor


def adjoint_scan(
    scan: Callable[[Tensor, Tensor, Tensor], Tensor],
    a: Tensor,
    initial_state: Tensor,
    states: Tensor,
    grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (a, b, h_0) from ``grad``, the gradient of every state.

    With g_t the gradient that reaches h_t from all later times:

        g_t = grad_t + conj(a_{t+1}) g_{t+1},   dL/db_t = g_t,
        dL/da_t = g_t conj(h_{t-1}),            dL/dh_0 = conj(a_1) g_1.

    ``scan`` computes the reversed recurrence, so that what it does on the way forward
    (and its own differentiability) serves the way back too. Zero decays are exact:
    nothing is divided by a.
    """
    following = torch.cat([a[:, 1:], torch.zeros_like(a[:, :1])], 1).conj()
    reversed_g = scan(
        following.flip(1).resolve_conj(), grad.flip(1), torch.zeros_like(initial_state)
    )
    g = reversed_g.flip(1)
    previous = torch.cat([initial_state[:, None], states[:, :-1]], 1)
    return g * previous.conj(), g, a[:, 0].conj() * g[:, 0]
