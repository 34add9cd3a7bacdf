"""Linear CDEs under the names of document 2, and where each equation is computed.

    y_t = y_0 + int_0^t sum_k A_k y_s dω^k_s + int_0^t B dξ_s,     ω = ξ = (t, X)

    sum_k v_k A_k                     Structure.contract         lcde._structures
    exp(M) y + phi_1(M) b             exact_cde_solve            lcde._solvers
    ... composed by a scan            parallel_cde_solve
    y + M y + b        (Euler)        scan_cde_solve
    Tsit5 with a PID control          adaptive_cde_solve
    ω = (t, X), y_0 = W X_0 + b       LinearCDE                  lcde._model
    token -> vector                   Embedding
    ω_t = int_0^t (s, X_s) ds         A5LinearCDE                lcde.a5
    X -> y_T, for many paths          obtain_features_from_model lcde.toy, lcde._shared
    min |y_T . c + c_0 - label|^2     train_linear
    cross entropy, AdamW              train_model                lcde.a5

Both experiments are commands as well: ``python -m lcde.toy``, ``python -m lcde.a5``.
"""

from lcde._model import Embedding, LinearCDE
from lcde._solvers import (
    adaptive_cde_solve,
    exact_cde_solve,
    parallel_cde_solve,
    scan_cde_solve,
)
from lcde._structures import (
    BlockDiagonal,
    Dense,
    Diagonal,
    DiagonalPlusLowRank,
    Structure,
    random_structure,
)
from lcde.a5 import A5LinearCDE, run_lcde_A5_experiment, train_model
from lcde.toy import (
    obtain_features_from_model,
    run_lcde_toy_experiment,
    train_linear,
)

__all__ = [
    "A5LinearCDE",
    "BlockDiagonal",
    "Dense",
    "Diagonal",
    "DiagonalPlusLowRank",
    "Embedding",
    "LinearCDE",
    "Structure",
    "adaptive_cde_solve",
    "exact_cde_solve",
    "obtain_features_from_model",
    "parallel_cde_solve",
    "random_structure",
    "run_lcde_A5_experiment",
    "run_lcde_toy_experiment",
    "scan_cde_solve",
    "train_linear",
    "train_model",
]
