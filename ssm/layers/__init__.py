"""Sequence layers with one meaning in three forms: parallel, step, matrix.

See :class:`SequenceLayer` for the contract. HiPPO matrices, discretisations and kernels
are functions; the names of document 4 (``make_hippo_matrix``, ``discretize_A``,
``discretize_B``, ``compute_kernel``, ``parallel_scan``, ``MambaBlock``) are these.
"""

from ssm.layers._base import (
    KernelLayer,
    SequenceLayer,
    apply_kernel,
    param_groups,
    state_bytes,
)
from ssm.layers.attention import Attention
from ssm.layers.diagonal_ssd import DiagonalSSD
from ssm.layers.hippo import (
    compute_kernel,
    discretize_A,
    discretize_B,
    make_hippo_matrix,
)
from ssm.layers.hyena import Hyena
from ssm.layers.mamba import Mamba
from ssm.layers.mamba import Mamba as MambaBlock
from ssm.layers.mamba2 import Mamba2
from ssm.layers.mlp import GLUMLP
from ssm.layers.moe import MoE
from ssm.layers.norm import RMSNorm
from ssm.layers.recurrent import GRU, RNN
from ssm.layers.rwkv import RWKV, RWKVBlock, RWKVChannelMix
from ssm.layers.s4 import S4
from ssm.layers.s4d import S4D
from ssm.layers.s5 import S5
from ssm.layers.selective_ssm import SelectiveSSM
from ssm.ops.parallel_scan import parallel_scan

__all__ = [
    "GLUMLP",
    "GRU",
    "RNN",
    "RWKV",
    "S4",
    "S4D",
    "S5",
    "Attention",
    "DiagonalSSD",
    "Hyena",
    "KernelLayer",
    "Mamba",
    "Mamba2",
    "MambaBlock",
    "MoE",
    "RMSNorm",
    "RWKVBlock",
    "RWKVChannelMix",
    "SelectiveSSM",
    "SequenceLayer",
    "apply_kernel",
    "compute_kernel",
    "discretize_A",
    "discretize_B",
    "make_hippo_matrix",
    "parallel_scan",
    "param_groups",
    "state_bytes",
]
