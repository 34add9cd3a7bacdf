"""M = sum_n C_n B_n (1 - a_n) a_n^(t-s) in the place of Mamba's selective scan.

Document 1's ``mamba_SSD_diag_exp``: Mamba's block (projection, short convolution, gate)
whose state space model has diagonal decays that are the same for every input, so that
each head is a sum of N causal exponentials of t - s and can be computed in either of
its dual forms (Dao & Gu 2024, arXiv:2405.21060, sections 4 and 5). The layer is
:class:`ssm.layers.DiagonalSSD`.

Differs: document 1 gives the name and "exponential decays" and no more; what the layer
adds to that (heads, the weight 1 - a of an input) its own docstring says.
"""
# ruff: noqa: N999  # document 1 names the module so

from typing import Any

from ssm.layers.mamba2 import resolve_headdim

EXPAND = 2
LARGEST_HEAD = 16  # channels


def mamba_SSD_diag(d_model: int, n_state: int, *, selective: bool) -> dict[str, Any]:
    """Blocks with N diagonal decays a head, as entries of a ``SequenceLMConfig``.

    ``selective=False`` (``mamba_SSD_diag_exp``): decays, B and C are parameters.
    ``selective=True`` (``mamba_SSD_diag_selective``): all three are read from the
    input, and nothing else changes: between the two lies selectivity alone. Between
    the second and Mamba lies the structure, which DiagonalSSD's docstring compares.

    n_state: the N decays of a head, which its channels (16, or the largest divisor of
    2 d_model below) share.
    """
    options = {
        "d_state": n_state,
        "expand": EXPAND,
        "headdim": resolve_headdim(EXPAND * d_model, None, limit=LARGEST_HEAD),
        "selective": selective,
    }
    return {"pattern": "G", "mixer": {"diagonal_ssd": options}}
