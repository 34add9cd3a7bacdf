"""Language models assembled from the layers by a pattern, their generation and files.

``SequenceLM(SequenceLMConfig(vocab_size=…, pattern="jamba"))``, ``generate(model, …)``,
``model.save_pretrained(folder)``, ``SequenceLM.from_pretrained(folder)``.
"""

from ssm._errors import ArgumentError
from ssm.models.cache import MambaCache
from ssm.models.config import SequenceLMConfig
from ssm.models.generate import Generation, generate, generate_stream
from ssm.models.hybrids import JambaBlock, JambaModel, MambaBlock, StripedHyenaBlock
from ssm.models.lm import LMOutput, SequenceLM
from ssm.models.patterns import NAMED_PATTERNS, resolve_pattern
from ssm.models.sampling import Sampling, row_generators

__all__ = [
    "NAMED_PATTERNS",
    "ArgumentError",
    "Generation",
    "JambaBlock",
    "JambaModel",
    "LMOutput",
    "MambaBlock",
    "MambaCache",
    "Sampling",
    "SequenceLM",
    "SequenceLMConfig",
    "StripedHyenaBlock",
    "generate",
    "generate_stream",
    "resolve_pattern",
    "row_generators",
]
