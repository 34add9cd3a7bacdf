"""A diagonal state space model as a recurrence and as a matrix, straight from the page.

Notation of "On Structured State-Space Duality" (arXiv:2510.04944, section 2), all
float64 or complex128 NumPy:

    T   sequence length                a, b, c   decays and couplings, shape (T, N)
    N   state size                     x         input, shape (T, d)
    d   channels sharing the kernel    M         kernel, shape (T, T)

    h_t = a_t * h_{t-1} + b_t x_t^T,   y_t = c_t^T h_t        (h_t has shape (N, d))
    M[t, s] = sum_n c_t[n] (a_t[n] ... a_{s+1}[n]) b_s[n]  for s <= t, else 0
"""

import numpy as np
from jaxtyping import Inexact, Shaped

Array = np.ndarray


def recurrence(
    a: Inexact[Array, "T N"],
    b: Inexact[Array, "T N"],
    c: Inexact[Array, "T N"],
    x: Inexact[Array, "T d"],
    initial_state: Inexact[Array, "N d"] | None = None,
) -> tuple[Inexact[Array, "T d"], Inexact[Array, "N d"]]:
    """y_t = c_t^T h_t with h_t = a_t * h_{t-1} + b_t x_t^T: O(T N d) operations.

    Returns every output and the final state; ``initial_state`` (default 0) is h_0.
    """
    T, N = a.shape
    dtype = np.result_type(a, b, c, x)
    h = np.zeros((N, x.shape[1]), dtype) if initial_state is None else initial_state
    y = np.empty((T, x.shape[1]), np.result_type(dtype, h))  # a state may be complex
    for t in range(T):
        h = a[t, :, None] * h + b[t, :, None] * x[t]
        y[t] = c[t] @ h
    return y, h


def decay_mask(a: Shaped[Array, "T N"]) -> Shaped[Array, "T T N"]:
    """L[t, s, n] = a_t[n] a_{t-1}[n] ... a_{s+1}[n] for s <= t (1 at s = t), else 0.

    Built row from row, L[t, s] = a_t L[t-1, s]: no division and no logarithm, so
    decays that are exactly zero, tiny or negative are right. Memory T^2 N numbers.
    """
    T, N = a.shape
    L = np.zeros((T, T, N), a.dtype)
    for t in range(T):
        if t:
            L[t, :t] = a[t] * L[t - 1, :t]
        L[t, t] = 1
    return L


def semiseparable_kernel(
    a: Inexact[Array, "T N"], b: Inexact[Array, "T N"], c: Inexact[Array, "T N"]
) -> Inexact[Array, "T T"]:
    """M = sum_n (c^n b^{nT}) o L(a^n): one 1-semiseparable attention head per state.

    O(T^2 N) operations (paper, section 3: the diagonal case is a sum of N heads).
    """
    return np.einsum("tn,tsn,sn->ts", c, decay_mask(a), b)


def constant(values: Inexact[Array, " N"], T: int) -> Inexact[Array, "T N"]:
    """The same ``values`` at each of T steps (a view)."""
    return np.broadcast_to(values, (T, len(values)))


def largest_difference(
    y: Inexact[Array, "*shape"], reference: Inexact[Array, "*shape"]
) -> float:
    """max |y - reference| / max |reference|; 0 where the reference is empty or zero and
    ``y`` equals it, infinity where only the reference is zero."""
    difference = float(np.abs(y - reference).max(initial=0.0))
    scale = float(np.abs(reference).max(initial=0.0))
    if difference == 0.0:
        return 0.0
    return difference / scale if scale else float("inf")
