"""The elastic net in float64, by plain cyclic coordinate descent: what kernels are tested against."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

STEP_MIN = 1e-13
"""The descent ends when no step moves c_j·A_j by more than this, relative to ‖z‖."""
MAX_SWEEPS = 20_000


def elastic_net(
    row: Array,
    analysis: Array,
    bias: Array,
    column: Callable[[int], Array],
    diagonal: Array,
    lengths: Array,
    *,
    tau: float,
    alpha: float,
    signed: bool,
) -> Array:
    """Return the code c [N] of one activation row [d].

    With α₀ = (E z + b)/‖z‖ and G = E Aᵀ it minimises ½cᵀGc - cᵀα₀ + α(τ‖c‖₁ + ½(1-τ)‖c‖²), over c ≥ 0 unless
    ``signed``, and returns c·‖z‖. A zero row has no code; an atom with G_jj ≤ 0 is never used.

    Parameters
    ----------
    column : gives G[:, j] [N].
    diagonal, lengths : [N] G_jj and ‖A_j‖.

    Example
    -------
    >>> eye = np.eye(2)
    >>> elastic_net(np.array([3.0, 4]), eye, np.zeros(2), eye.__getitem__, np.ones(2), np.ones(2),
    ...             tau=1.0, alpha=0.1, signed=False)
    array([2.5, 3.5])
    """
    norm = float(np.linalg.norm(row))
    code = np.zeros(len(bias))
    if norm == 0:
        return code
    left = (analysis @ row + bias) / norm
    l1, l2 = alpha * tau, alpha * (1 - tau)
    usable = diagonal > 0
    for _ in range(MAX_SWEEPS):
        longest = 0.0
        # Atoms at zero within the bound would stay there: only the others have a step to make.
        pull = np.abs(left) if signed else left
        for j in np.flatnonzero(usable & ((code != 0) | (pull > l1))).tolist():
            target = left[j] + diagonal[j] * code[j]
            size = max(abs(target) - l1, 0.0) if signed or target > 0 else 0.0
            step = np.copysign(size, target) / (diagonal[j] + l2) - code[j]
            if step != 0:
                code[j] += step
                left -= step * column(j)
                longest = max(longest, abs(step) * lengths[j])
        if longest <= STEP_MIN:
            break
    return code * norm


def objective(code: Array, start: Array, gram: Array, *, tau: float, alpha: float, norm: float) -> float:
    """Return the objective of a code [N] in units of ‖z‖², given start = E z + b [N] and gram = G [N, N]."""
    c = code / norm
    penalty = alpha * (tau * np.abs(c).sum() + 0.5 * (1 - tau) * (c @ c))
    return float(0.5 * c @ gram @ c - c @ start / norm + penalty)
