"""Affine edits in float64, one row at a time: the definition that kernels are tested against."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

PHIS = ("identity", "relu", "clamp")


class SteeredAffine(NamedTuple):
    """What the affine operator returns: ``z`` [..., d] in the input's dtype, and ``doses`` [..., 2] fp32,
    (0, applied dose), the latter relative to ‖z‖; NaN for rows that could not be steered."""

    z: NDArray
    doses: NDArray


def steer_affine(
    z: ArrayLike,
    slots: ArrayLike,
    a: ArrayLike,
    a_bias: ArrayLike,
    b: ArrayLike,
    *,
    shift: ArrayLike,
    limits: ArrayLike,
    phi: str = "identity",
    clamp: tuple[float, float] = (0.0, 1.0),
) -> SteeredAffine:
    """Steer rows by z' = z + B φ(A z + a) + shift, in float64; arguments of :func:`daco_rt.ops.steer_affine`.

    Example
    -------
    >>> direction = np.zeros((3, 1, 2))
    >>> direction[2, 0, 0] = 1
    >>> steer_affine([[3.0, 4.0]], [2], direction, np.zeros((3, 1)), -direction.transpose(0, 2, 1),
    ...              shift=np.zeros((3, 2)), limits=np.zeros((3, 4))).z
    array([[0., 4.]])
    """
    rows = np.asarray(z)
    flat = rows.reshape(-1, rows.shape[-1]).astype(np.float64)
    slot_of = np.asarray(slots).reshape(-1)
    a64, bias64, b64, shift64, limits64 = (
        np.asarray(x).astype(np.float64) for x in (a, a_bias, b, shift, limits)
    )
    out, doses = flat.copy(), np.zeros((len(flat), 2))
    for t, row in enumerate(flat):
        p = int(slot_of[t])
        if p == 0:
            continue
        if not 0 <= p < len(a64):
            out[t], doses[t] = np.nan, np.nan
            continue
        if not np.isfinite(row).all():
            doses[t] = np.nan
            continue
        if p == 1:
            continue
        inner = _phi(a64[p] @ row + bias64[p], phi, clamp)
        if not inner.any() and not shift64[p].any():
            continue
        out[t] = add_delta(row, b64[p] @ inner + shift64[p], limits64[p])
        norm = np.linalg.norm(row)
        if norm > 0:
            doses[t, 1] = np.linalg.norm(out[t] - row) / norm
    return SteeredAffine(out.reshape(rows.shape), doses.reshape(*rows.shape[:-1], 2))


def add_delta(row: Array, delta: Array, limits: Array) -> Array:
    """Return row + delta [d] under a dose cap and norm keeping, in that order; ``limits`` [4]."""
    _, max_dose, keep_norm = limits[:3]
    norm = np.linalg.norm(row)
    length = np.linalg.norm(delta)
    if max_dose > 0 and length > 0:
        delta = delta * min(1.0, max_dose * norm / length)
    edited = row + delta
    length = np.linalg.norm(edited)
    if keep_norm != 0 and length > 0:
        edited = edited * (norm / length)
    return edited


def _phi(x: Array, phi: str, clamp: tuple[float, float]) -> Array:
    if phi == "relu":
        return np.maximum(x, 0)
    return np.clip(x, *clamp) if phi == "clamp" else x
