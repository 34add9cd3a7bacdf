"""y = W x + bias of one step."""

from ssm.ops.linear_step.op import BACKENDS, linear_step

__all__ = ["BACKENDS", "linear_step"]
