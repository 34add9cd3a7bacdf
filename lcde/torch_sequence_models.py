"""Sequence models in PyTorch, as document 2 names them: the page to import from.

    equation                                            code
    x_0 = E[token], or W x + b                          Embedding, torch.nn.Linear
    x_t + [sin t w_i, cos t w_i]                        SinusoidalPositionalEncoding
    x + drop(act(W drop(layer(x)) + b)), LayerNorm      Block
    h_t = tanh(W h_{t-1} + V x_t + b)                   RNN
    LN(z + FFN(z)), z = LN(x + attention(x))            TransformerLayer
    h_t = e^(delta A) h_{t-1} + delta B x_t             S4Recurrence
    h_t = e^(delta_t A) h_{t-1} + delta_t B_t x_t       MambaRecurrence
    h_t = A_bar h_{t-1} + B_bar x_t, x_t all channels   S5
    W mean_t(x) + b, or W x_t + b at every t            SequenceModel

``SequenceModel(SequenceModelConfig(input_dim=2, output_dim=1, hidden_dim=256,
state_dim=256, depth=2, model_name="S4", activation="GELU"))`` is the published model of
the signature experiment; ``MODELS`` has every name and what it stands for.
"""

from lcde._sequence_layers import (
    RNN,
    S5,
    Embedding,
    MambaRecurrence,
    S4Recurrence,
    SinusoidalPositionalEncoding,
    TransformerLayer,
)
from lcde._sequence_model import (
    ACTIVATIONS,
    MODELS,
    Block,
    SequenceModel,
    SequenceModelConfig,
    build,
)
from lcde.sm_a5 import run_sm_A5_experiment
from lcde.sm_toy import run_sm_toy_experiment

__all__ = [
    "ACTIVATIONS",
    "MODELS",
    "RNN",
    "S5",
    "Block",
    "Embedding",
    "MambaRecurrence",
    "S4Recurrence",
    "SequenceModel",
    "SequenceModelConfig",
    "SinusoidalPositionalEncoding",
    "TransformerLayer",
    "build",
    "run_sm_A5_experiment",
    "run_sm_toy_experiment",
]
