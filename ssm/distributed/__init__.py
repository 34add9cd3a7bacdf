"""Sequences too long for one device: each rank of torch.distributed holds a shard.

Rank r holds steps starts[r] … starts[r] + L_r - 1 of every row; shards may differ in
length and be empty. Every function here is called by all ranks of the group, in the
same order, and so is ``backward``, on outputs that depend on them: gradients are those
of the sum of the ranks' losses. Without a process group there is one rank.

    from ssm.distributed import CommCount, ring_attention, sharded_scan
"""

from ssm.distributed._ranks import CommCount
from ssm.distributed.attention import ring_attention
from ssm.distributed.convolution import halo, sharded_conv1d
from ssm.distributed.scan import (
    carry,
    selective_decay,
    sharded,
    sharded_mamba,
    sharded_scan,
)

__all__ = [
    "CommCount",
    "carry",
    "halo",
    "ring_attention",
    "selective_decay",
    "sharded",
    "sharded_conv1d",
    "sharded_mamba",
    "sharded_scan",
]
