"""How far a row is from a discontinuity of the operator.

Steering has cliffs: a top-k cut, a pursuit arg-max, a deadband. A row that stands next to one may come
out differently in two correct implementations, so comparisons hold their bounds on rows with room to
spare and count the others.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from daco_rt.ops import reference
from daco_rt.ops.quantise import dequantise

CLOSE = 1e-4
"""Rows whose margin is at most this are counted apart."""


def row_margins(
    z: NDArray,
    slots: NDArray,
    operands: Mapping[str, NDArray],
    *,
    coder: str,
    k: int,
    sign: str = "positive",
    tol: float = 0.0,
    tau: float = 0.95,
    alpha: float = 0.05,
) -> NDArray[np.float64]:
    """Return the relative distance of every row to the nearest cliff.

    Parameters
    ----------
    z : [T, d]
    slots : [T] int
    operands : mapping
        By the operator contract's names (``enc`` … or ``analysis`` …), as ``Pack.operands`` gives them.

    Returns
    -------
    [T] float64; infinity where nothing is coded (slot 0, rows that are not finite).
    """
    operands = dequantise(operands)
    gain = np.asarray(operands["gain"], np.float64)
    boost = reference.or_zeros(operands.get("boost"), gain)
    limits = np.asarray(operands["limits"], np.float64)
    synthesis = np.asarray(operands["dec" if "dec" in operands else "atoms"]).astype(np.float64)
    atom_norm = np.linalg.norm(synthesis, axis=1)
    if coder == "omp":
        code_and_margin = _pursuit(operands, synthesis, k, sign, tol)
    elif coder == "elastic_net":
        code_and_margin = _net(operands, synthesis, atom_norm, sign, tau, alpha)
    else:
        code_and_margin = _sae(operands, coder, k)

    margins = np.full(len(z), np.inf)
    for t, row in enumerate(np.asarray(z).astype(np.float64)):
        p = int(slots[t])
        if not 1 <= p < len(gain) or not np.isfinite(row).all():
            continue
        code, margins[t] = code_and_margin(row)
        theta = limits[p, 0]
        edited = (code != 0) & ((gain[p] != 1) | (boost[p] != 0))
        if p >= 2 and theta > 0 and edited.any():
            strength = np.abs(code[edited]) * atom_norm[edited]
            margins[t] = min(margins[t], float(np.abs(strength / theta - 1).min()))
    return margins


def _sae(operands: Mapping[str, NDArray], coder: str, k: int):
    enc = np.asarray(operands["enc"]).astype(np.float64)
    bias = np.asarray(operands["enc_bias"], np.float64)
    level = operands.get("threshold")

    def topk(row):
        a = np.maximum(enc @ row + bias, 0)
        ranked = np.sort(a)[::-1]
        cut, below = ranked[k - 1], ranked[k] if k < len(a) else 0.0
        return reference.keep_largest(a, k), (cut - below) / cut if cut > 0 and k < len(a) else np.inf

    def jumprelu(row):
        a = enc @ row + bias
        t = np.zeros_like(a) if coder == "relu" else reference.or_zeros(level, a)
        jumps = t > 0  # at t = 0 the code is continuous
        gap = float(np.abs(a[jumps] / t[jumps] - 1).min()) if jumps.any() else np.inf
        return np.where(a > t, a, 0.0), gap

    def none(row):
        return np.zeros(len(bias)), np.inf

    return {"topk": topk, "relu": jumprelu, "jumprelu": jumprelu, "none": none}[coder]


def _net(
    operands: Mapping[str, NDArray], atoms: NDArray, lengths: NDArray, sign: str, tau: float, alpha: float
):
    analysis = np.asarray(operands["analysis"]).astype(np.float64)
    bias = np.asarray(operands["bias"], np.float64)
    gram = reference.GramColumns(analysis, atoms)

    def net(row):
        code = reference.elastic_net(
            row, analysis, bias, gram.__getitem__, gram.diagonal, lengths,
            tau=tau, alpha=alpha, signed=sign == "signed",
        )  # fmt: skip
        return code, np.inf  # continuous: only the deadband is a cliff

    return net


def _pursuit(operands: Mapping[str, NDArray], atoms: NDArray, k: int, sign: str, tol: float):
    analysis = np.asarray(operands["analysis"]).astype(np.float64)
    bias = np.asarray(operands["bias"], np.float64)
    gram = reference.GramColumns(analysis, atoms)

    def omp(row):
        decisions = reference.Decisions()
        code = reference.orthogonal_matching_pursuit(
            row, analysis, bias, gram, atoms, k=k, sign=sign, tol=tol, decisions=decisions
        )
        return code, min(decisions.margins, default=np.inf)

    return omp
