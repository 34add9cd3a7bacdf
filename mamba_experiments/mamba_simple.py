"""y = W_out (S6(silu(conv(x'))) * silu(z)), [x', z] = W_in x: ``mamba_simple``.

Document 1's baseline: Mamba's block as published (Gu & Dao 2023, arXiv:2312.00752,
section 3.4), which is :class:`ssm.layers.Mamba`.
"""

from typing import Any


def mamba_simple(n_state: int) -> dict[str, Any]:
    """Blocks of Mamba, as entries of a ``SequenceLMConfig``.

    n_state: the state size N of each of the 2 d_model channels.
    """
    return {"pattern": "mamba", "mixer": {"mamba": {"d_state": n_state}}}
