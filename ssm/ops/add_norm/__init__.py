"""A sum, and its root mean square norm."""

from ssm.ops.add_norm.op import BACKENDS, add_norm

__all__ = ["BACKENDS", "add_norm"]
