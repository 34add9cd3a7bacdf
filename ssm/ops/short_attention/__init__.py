"""Causal softmax attention of short sequences that lie behind each other."""

from ssm.ops.short_attention.op import BACKENDS, short_attention
from ssm.ops.short_attention.torch import Parts

__all__ = ["BACKENDS", "Parts", "short_attention"]
