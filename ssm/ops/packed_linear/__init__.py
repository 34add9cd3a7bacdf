"""y = W x + bias of many positions, to train with."""

from ssm.ops.packed_linear.op import BACKENDS, packed_linear

__all__ = ["BACKENDS", "packed_linear"]
