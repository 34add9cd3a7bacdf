"""Causal softmax attention of short sequences that lie behind each other."""

from ssm.ops.short_attention.op import BACKENDS, short_attention

__all__ = ["BACKENDS", "short_attention"]
