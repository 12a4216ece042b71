"""The steering operators in plain NumPy float64: their definition, which every kernel is tested against.

Written for reading, one row at a time and one idea a function; nothing here is fast. The formulas
are those of the operator's documentation (``docs/operator.md``).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from daco_rt.ops.affine_reference import SteeredAffine, add_delta, steer_affine
from daco_rt.ops.elastic_net import elastic_net
from daco_rt.ops.quantise import scaled

__all__ = ["Steered", "SteeredAffine", "steer_affine", "steer_pursuit", "steer_sae"]

Array = NDArray[np.float64]

PURSUIT_EPS = 1e-5
"""Pursuit stops when the largest correlation is at most this fraction of ‖z‖."""
PIVOT_MIN = 1e-4
"""An atom is skipped when its Schur complement falls below this fraction of its own Gram entry."""


class Steered(NamedTuple):
    """What a steering operator returns.

    Attributes
    ----------
    z : [..., d], dtype of the input
        The edited activations z'.
    doses : [..., 2], fp32
        ``(removed_dose, applied_dose)``, both relative to ‖z‖; NaN for rows that could not be steered.
    support_index : [..., k_out], int32
        Active codes ranked by |c|·‖A‖, padded with -1.
    support_value : [..., k_out], fp32
        Their codes c, padded with 0.
    """

    z: NDArray
    doses: NDArray
    support_index: NDArray
    support_value: NDArray


def steer_sae(
    z: ArrayLike,
    slots: ArrayLike,
    enc: ArrayLike,
    enc_bias: ArrayLike,
    dec: ArrayLike,
    *,
    gain: ArrayLike,
    undesirable: ArrayLike,
    shift: ArrayLike,
    limits: ArrayLike,
    threshold: ArrayLike | None = None,
    boost: ArrayLike | None = None,
    scales: ArrayLike | None = None,
    coder: str = "topk",
    k: int = 32,
    k_out: int = 0,
) -> Steered:
    """Steer rows by the code of a sparse autoencoder, in float64.

    Same arguments as :func:`daco_rt.ops.steer_sae`, as anything that NumPy turns into arrays.

    Example
    -------
    >>> import numpy as np
    >>> eye = np.eye(2)
    >>> gain = np.array([[1, 1], [1, 1], [0, 1.0]])
    >>> out = steer_sae([[3.0, 4.0]], [2], eye, np.zeros(2), eye, gain=gain, undesirable=gain < 1,
    ...                 shift=np.zeros((3, 2)), limits=np.zeros((3, 4)), k=2)
    >>> out.z
    array([[0., 4.]])
    """
    dec64 = scaled(dec, scales, 1)
    enc64, bias64 = scaled(enc, scales, 0), _f64(enc_bias)
    watched = watched_latents(_f64(gain), or_zeros(boost, gain), np.asarray(undesirable, bool))
    level = np.zeros(len(bias64)) if coder == "relu" else or_zeros(threshold, bias64)

    def code(row: Array) -> Array:
        if coder == "none":
            return np.zeros(len(dec64))
        a = enc64 @ row + bias64
        if coder == "topk":
            return keep_largest(np.maximum(a, 0.0), k)
        return np.where((a > level) & watched, a, 0.0)

    return _steer(z, slots, code, dec64, gain, boost, undesirable, shift, limits, k_out)


def steer_pursuit(
    z: ArrayLike,
    slots: ArrayLike,
    analysis: ArrayLike,
    bias: ArrayLike,
    atoms: ArrayLike,
    *,
    gain: ArrayLike,
    undesirable: ArrayLike,
    shift: ArrayLike,
    limits: ArrayLike,
    gram: ArrayLike | None = None,
    boost: ArrayLike | None = None,
    scales: ArrayLike | None = None,
    coder: str = "omp",
    k: int = 32,
    sign: str = "positive",
    tol: float = 0.0,
    tau: float = 0.95,
    alpha: float = 0.05,
    k_out: int = 0,
) -> Steered:
    """Steer rows by matching pursuit or an elastic net over a dictionary, in float64.

    Same arguments as :func:`daco_rt.ops.steer_pursuit`; the columns of ``gram`` that are needed are
    computed from ``analysis`` and ``atoms`` when it is ``None``.
    """
    e64, a64, b64 = scaled(analysis, scales, 0), scaled(atoms, scales, 1), _f64(bias)
    columns = GramColumns(e64, a64, None if gram is None or np.size(gram) == 0 else _f64(gram))

    lengths = np.linalg.norm(a64, axis=1)

    def code(row: Array) -> Array:
        if coder == "elastic_net":
            return elastic_net(
                row, e64, b64, columns.__getitem__, columns.diagonal, lengths,
                tau=tau, alpha=alpha, signed=sign == "signed",
            )  # fmt: skip
        return orthogonal_matching_pursuit(row, e64, b64, columns, a64, k=k, sign=sign, tol=tol)

    return _steer(z, slots, code, a64, gain, boost, undesirable, shift, limits, k_out)


def keep_largest(a: Array, k: int) -> Array:
    """Keep the k largest entries of ``a`` [m], ties to the lower index; the rest becomes 0."""
    kept = np.zeros_like(a)
    chosen = np.argsort(-a, kind="stable")[:k]
    kept[chosen] = a[chosen]
    return kept


class GramColumns:
    """Columns of G = E Aᵀ [N, N], computed when first asked for: the whole would not fit in memory."""

    def __init__(self, analysis: Array, atoms: Array, gram: Array | None = None) -> None:
        self.analysis, self.atoms, self.gram = analysis, atoms, gram
        self.diagonal = np.einsum("nd,nd->n", analysis, atoms) if gram is None else np.diag(gram)
        self._columns: dict[int, Array] = {}

    def __getitem__(self, j: int) -> Array:
        if self.gram is not None:
            return self.gram[:, j]
        if j not in self._columns:
            self._columns[j] = self.analysis @ self.atoms[j]
        return self._columns[j]


class Decisions:
    """The choices of one coding: how narrow each was and, for one of them, taking the other side.

    ``margins`` receives |left - right| / max(|left|, |right|) of every choice in order; choice number
    ``flip`` is turned over. Two correct implementations may differ where a margin is no wider than rounding.
    """

    def __init__(self, flip: int | None = None) -> None:
        self.flip = flip
        self.margins: list[float] = []

    def __call__(self, verdict: bool, left: float, right: float) -> bool:
        widest = max(abs(left), abs(right))
        self.margins.append(abs(left - right) / widest if widest > 0 else 0.0)
        return bool(verdict) != (len(self.margins) - 1 == self.flip)


def orthogonal_matching_pursuit(
    row: Array,
    analysis: Array,
    bias: Array,
    gram: GramColumns,
    atoms: Array,
    *,
    k: int,
    sign: str = "positive",
    tol: float = 0.0,
    decisions: Decisions | None = None,
) -> Array:
    """Return the code c [N] of one activation row [d].

    Correlations start at α₀ = E z + b. Each step picks the largest one (``signed``: in absolute value,
    ties to the lower index), refits ``G[S, S] c = α₀[S]`` and updates ``α = α₀ - G[:, S] c``. Cost:
    N·d + k·N·k multiplications. ``decisions`` records how narrow each choice was, and can turn one over.
    """
    norm = float(np.linalg.norm(row))
    floor = PURSUIT_EPS * norm
    start = analysis @ row + bias
    alpha: Array = start.copy()
    diagonal = gram.diagonal
    usable = diagonal > 0
    decide = Decisions() if decisions is None else decisions
    picked: list[int] = []
    chosen = np.zeros((len(start), 0))  # the columns G[:, S]
    c: Array = np.zeros(0)
    while len(picked) < k and norm > 0 and usable.any():
        if tol > 0:
            residual = float(np.linalg.norm(row - c @ atoms[picked]))
            if decide(residual <= tol * norm, residual, tol * norm):
                break
        score = np.where(usable, np.abs(alpha) if sign == "signed" else alpha, -np.inf)
        best = float(score.max())
        if decide(not best > floor, best, floor):
            break
        j = int(np.argmax(score))
        rest = np.where(np.arange(len(score)) == j, -np.inf, score)
        if rest.max() > floor and not decide(True, best, float(rest.max())):
            j = int(np.argmax(rest))
        usable[j] = False
        if picked:
            inner, cross = chosen[picked], gram[j][picked]
            pivot = 1 - float(cross @ np.linalg.solve(inner, cross)) / diagonal[j]
            if decide(pivot < PIVOT_MIN, pivot, PIVOT_MIN):
                continue
        picked.append(j)
        chosen = np.column_stack([chosen, gram[j]])
        inner = chosen[picked]
        solve = _nnls if sign == "nnls" else np.linalg.solve
        c = np.asarray(solve(inner, start[picked]))
        alpha = start - chosen @ c
    if sign != "signed":
        c = np.maximum(c, 0.0)
    code = np.zeros(len(start))
    code[picked] = c
    return code


def _nnls(gram: Array, target: Array) -> Array:
    """Minimise ½cᵀGc - cᵀt over c ≥ 0 by the active-set method of Lawson and Hanson."""
    n = len(target)
    passive = np.zeros(n, bool)
    c = np.zeros(n)
    for _ in range(10 * n):
        gradient = target - gram @ c
        free = ~passive & (gradient > 1e-12 * np.abs(target).max(initial=1e-300))
        if not free.any():
            break
        passive[int(np.argmax(np.where(free, gradient, -np.inf)))] = True
        while True:
            s = np.zeros(n)
            s[passive] = np.linalg.solve(gram[np.ix_(passive, passive)], target[passive])
            if (s[passive] > 0).all():
                break
            blocking = passive & (s <= 0)
            step = np.min(c[blocking] / (c[blocking] - s[blocking]))
            c = c + step * (s - c)
            passive &= c > 1e-14
        c = s
    return c


def edit_row(
    row: Array,
    code: Array,
    atoms: Array,
    gain: Array,
    boost: Array,
    shift: Array,
    limits: Array,
) -> Array:
    """Return z' of one row: deadband, gain and boost, shift, dose cap, norm keeping, in that order."""
    theta = limits[0]
    on = np.abs(code) * np.linalg.norm(atoms, axis=1) > theta
    if not (on & (code != 0)).any() and not shift.any():
        return row
    active = (code != 0).astype(np.float64)
    delta = (on * ((gain - 1.0) * code + boost * active)) @ atoms + shift
    return add_delta(row, delta, limits)


def _steer(z, slots, code_of, atoms, gain, boost, undesirable, shift, limits, k_out) -> Steered:
    rows = np.asarray(z)
    flat = rows.reshape(-1, rows.shape[-1])
    flat64 = flat.astype(np.float64)
    slot_of = np.asarray(slots).reshape(-1)
    gain64, boost64 = _f64(gain), or_zeros(boost, gain)
    bad = np.asarray(undesirable, bool)
    shift64, limits64 = _f64(shift), _f64(limits)
    policies = len(gain64)
    atom_norm = np.linalg.norm(atoms, axis=1)

    out = flat64.copy()
    doses = np.zeros((len(flat), 2))
    index = np.full((len(flat), k_out), -1, np.int32)
    value = np.zeros((len(flat), k_out))
    for t, row in enumerate(flat64):
        p = int(slot_of[t])
        if p == 0:
            continue
        if not 0 <= p < policies:
            out[t], doses[t] = np.nan, np.nan
            continue
        if not np.isfinite(row).all():
            doses[t] = np.nan
            continue
        c = code_of(row)
        norm = np.linalg.norm(row)
        strength = np.abs(c) * atom_norm
        if p >= 2:
            out[t] = edit_row(row, c, atoms, gain64[p], boost64[p], shift64[p], limits64[p])
        if norm > 0:
            doses[t] = strength[bad[p]].sum() / norm, np.linalg.norm(out[t] - row) / norm
        ranked = np.argsort(-strength, kind="stable")
        active = [i for i in ranked if c[i] != 0][:k_out]
        index[t, : len(active)] = active
        value[t, : len(active)] = c[active]
    return Steered(
        out.reshape(rows.shape),
        doses.reshape(*rows.shape[:-1], 2),
        index.reshape(*rows.shape[:-1], k_out),
        value.reshape(*rows.shape[:-1], k_out),
    )


def watched_latents(gain: Array, boost: Array, undesirable: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Latents that some policy edits or reports, [m]; ``relu`` and ``jumprelu`` code no others."""
    edited = (gain[2:] != 1).any(0) | (boost[2:] != 0).any(0)
    return edited | undesirable[1:].any(0)


def _f64(a: ArrayLike) -> Array:
    return np.asarray(a).astype(np.float64)


def or_zeros(a: ArrayLike | None, like: ArrayLike) -> Array:
    """An optional operand: zeros in the shape of ``like`` where it is ``None`` or has no elements."""
    return np.zeros_like(_f64(like)) if a is None or np.size(a) == 0 else _f64(a)
