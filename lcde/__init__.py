"""Linear controlled differential equations: solvers, models and experiments (JAX).

    y_t = y_0 + int_0^t sum_k A_k y_s dω^k_s + int_0^t B dξ_s

Shapes, throughout the package:
    B or n  paths or sequences            H  hidden size, of y
    L  points of a path, or tokens        W  channels of the control ω
    d  channels of the data X             r  rank, b  size of a diagonal block

Source: Muca Cirone, Orvieto, Walker, Salvi, Lyons, "Theoretical Foundations of Deep
Selective State-Space Models" (NeurIPS 2024); structures of A: Walker et al.,
"Structured Linear CDEs" (2025).
"""
