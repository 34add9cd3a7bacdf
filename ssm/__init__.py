"""State space models that agree in every form: operators, layers, models.

Letters, the same in NumPy, PyTorch and Triton (shapes are in these letters):

    B   batch                          h   hidden state
    L   sequence length (time)         u   input of a scan; x where it is a layer's
    D   channels (d_model or d_inner)  y   output
    N   state size per channel         a   decay of one step, h_t = a_t h_{t-1} + b_t
    H   heads                          A, B, C, D   the papers' matrices; A < 0
    P   channels per head              delta, dt    discretisation step
    G   groups sharing B and C         Q   chunk length
    K, V   key (state) and value sizes of one head

``B`` is both the batch and the input matrix, as in the papers; in code the batch is
``batch`` and the matrix ``B``.
"""
