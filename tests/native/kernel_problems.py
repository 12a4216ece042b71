"""Random steering problems with everything awkward in them, and float64 judgements of what came out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from daco_rt.ops import quantise, reference

BF16 = ml_dtypes.bfloat16
DTYPES: dict[str, Any] = {"fp32": np.float32, "fp16": np.float16, "bf16": BF16}
WEIGHTS: dict[str, Any] = {**DTYPES, "int8": np.int8}
EPS32 = float(np.finfo(np.float32).eps)
POLICIES = 6
Array = NDArray[Any]


@dataclass
class Problem:
    """Operands of one call; ``policy`` holds the keyword arguments that both operators share.

    ``enc`` and ``dec`` are the matrices as they are meant: in float64 where ``stored`` holds int8 ones.
    """

    z: Array
    slots: Array
    enc: Array
    bias: Array
    dec: Array
    threshold: Array
    policy: dict[str, Array]
    stored: tuple[Array, Array]  # the two matrices as the kernels take them
    scales: Array | None = None  # [2, m] of int8 ones

    @property
    def coded(self) -> list[int]:
        """Rows that get a code: finite, with a slot in [1, P)."""
        finite = np.isfinite(self.z.astype(np.float64)).all(axis=1)
        return [t for t in range(len(self.z)) if finite[t] and 1 <= self.slots[t] < POLICIES]


def random_problem(
    rng: np.random.Generator, rows: int, atoms: int, dim: int, weight: Any, activation: Any, metric: bool
) -> Problem:
    """Coherent atoms with a duplicate and a zero one; sparse rows; broken rows and slots.

    ``metric``: the analysis matrix is the atoms under a metric, with a bias that centres the rows.
    """
    dec = rng.normal(size=(atoms, dim)) + 0.6 * rng.normal(size=dim)
    dec /= np.maximum(np.linalg.norm(dec, axis=1, keepdims=True), 1e-9)
    dec *= rng.uniform(0.5, 2.0, size=(atoms, 1)) if metric else 1.0
    if atoms > 5:
        dec[5] = dec[1]
        dec[3] = 0.0
    stored_dec, dec, dec_scale = _store(dec, weight)
    bias = 0.05 * rng.normal(size=atoms)
    if atoms > 5:
        bias[5] = bias[1]
    stored_enc, enc, enc_scale = stored_dec, dec, dec_scale
    if metric:
        root = np.eye(dim) + 0.3 * rng.normal(size=(dim, dim)) / np.sqrt(dim)
        stored_enc, enc, enc_scale = _store(dec.astype(np.float64) @ (root @ root.T), weight)

    weights = (rng.random((rows, atoms)) < 4 / atoms) * rng.uniform(1, 5, size=(rows, atoms))
    z = (weights @ dec.astype(np.float64) + 0.2 * rng.normal(size=(rows, dim))).astype(activation)
    slots = rng.integers(0, POLICIES, rows).astype(np.int32)
    for t in range(rows):
        match t % 9:
            case 3:
                z[t] = 0
            case 5:
                z[t, rng.integers(dim)] = rng.choice([np.nan, np.inf, -np.inf])
            case 7:
                slots[t] = rng.choice([-1, POLICIES, 2**31 - 1, -(2**31)])
            case 8 if activation is np.float32:
                z[t] *= 1e16

    gain = np.where(rng.random((POLICIES, atoms)) < 0.3, rng.choice([0.0, -1.0, 0.5]), 1.0)
    boost = np.where(rng.random((POLICIES, atoms)) < 0.1, 0.4, 0.0)
    shift = 0.1 * rng.normal(size=(POLICIES, dim))
    boost[:4], shift[:4] = 0, 0
    limits = np.zeros((POLICIES, 4))  # 2: gain only; 3: deadband and cap; 4: boost, shift, norm; 5: all
    limits[3] = 0.3, 0.25, 0, 0
    limits[4] = 0, 0, 1, 0
    limits[5] = 0.1, 0.4, 1, 0
    policy = {
        "gain": gain.astype(np.float32),
        "boost": boost.astype(np.float32),
        "undesirable": rng.random((POLICIES, atoms)) < 0.3,
        "shift": shift.astype(np.float32),
        "limits": limits.astype(np.float32),
    }
    threshold = np.abs(0.3 * rng.normal(size=atoms)).astype(np.float32)
    scales = None if dec_scale is None else np.stack([enc_scale, dec_scale])
    stored = stored_enc, stored_dec
    return Problem(z, slots, enc, bias.astype(np.float32), dec, threshold, policy, stored, scales)


def _store(matrix: Array, weight: Any) -> tuple[Array, Array, Array | None]:
    """Return a matrix as it is stored, as it is meant, and its scales [m] if it is int8."""
    if weight is not np.int8:
        rounded = matrix.astype(weight)
        return rounded, rounded, None
    q, scale = quantise(matrix)
    return q, q.astype(np.float64) * scale[:, None].astype(np.float64), scale


def same_bits(a: Array, b: Array) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


class Gram:
    """G = E Aᵀ in float64, with the two figures of it that error bounds need."""

    def __init__(self, problem: Problem) -> None:
        self.matrix = problem.enc.astype(np.float64) @ problem.dec.astype(np.float64).T
        self.asymmetry = float(np.abs(self.matrix - self.matrix.T).max())
        self.largest = float(np.abs(self.matrix).max())

    def of(self, picked: list[int]) -> Array:
        at = np.array(picked, int)
        return self.matrix[np.ix_(at, at)]

    def condition(self, picked: list[int]) -> float:
        return float(np.linalg.cond(self.of(picked))) if picked else 1.0


def correlations(problem: Problem, t: int, dtype: Any = np.float64) -> Array:
    """Return E z + b of row t [m], plainly in ``dtype``."""
    return problem.enc.astype(dtype) @ problem.z[t].astype(dtype) + problem.bias.astype(dtype)


def correlation_error(problem: Problem, t: int) -> float:
    """Bound of the error of fp32 correlations of row t."""
    size = np.abs(problem.enc.astype(np.float64)) @ np.abs(problem.z[t].astype(np.float64))
    return 4 * EPS32 * float((size + np.abs(problem.bias)).max())


class Undecidable(Exception):
    """A row stands so near to a cliff that two right answers exist; it is counted, not compared."""


def greedy_paths(
    problem: Problem, t: int, support: set[int], gram: Gram, k: int, sign: str, coarse: float
) -> Iterator[tuple[list[int], Array]]:
    """Yield the pursuits of row t that are greedy up to rounding: their picks in order and exact codes.

    Where correlations are within rounding of the largest, each of them may be picked; those in ``support``
    (the kernel's) are tried first. ``coarse`` is the relative error of the Gram entries that chose.

    Raises
    ------
    Undecidable
        If the duplicate test or a stop is within rounding.
    """
    row = problem.z[t].astype(np.float64)
    start = correlations(problem, t)
    error = correlation_error(problem, t)
    floor = reference.PURSUIT_EPS * float(np.linalg.norm(row))
    diagonal = np.diag(gram.matrix)
    solve = reference._nnls if sign == "nnls" else np.linalg.solve

    def extend(picked: list[int], usable: Array) -> Iterator[tuple[list[int], Array]]:
        c = solve(gram.of(picked), start[picked]) if picked else np.zeros(0)
        if len(picked) == k or floor == 0:
            yield picked, c
            return
        alpha = start - gram.matrix[:, picked] @ c
        margin = error + float(np.abs(c).sum()) * ((coarse + 8 * EPS32) * gram.largest + gram.asymmetry)
        usable = usable.copy()
        while True:
            score = np.where(usable, np.abs(alpha) if sign == "signed" else alpha, -np.inf)
            best = float(score.max())
            if abs(best - floor) <= (margin if gram.asymmetry + coarse == 0 else 4 * margin):
                # Nothing but rounding is left: the kernel may have stopped or gone on.
                raise Undecidable
            if best <= floor:
                yield picked, c
                return
            near = np.flatnonzero(score >= best - 2 * margin)
            cross = gram.matrix[np.ix_(np.array(picked, int), near)]
            combined = np.linalg.solve(gram.of(picked), cross)
            pivots = 1 - (cross * combined).sum(axis=0) / diagonal[near]
            # What fp32 entries of G leave of a pivot: their rounding, seen through the combination.
            noise = 8 * EPS32 * gram.largest * (1 + np.abs(combined).sum(axis=0)) ** 2 / diagonal[near]
            if picked and (np.abs(pivots - reference.PIVOT_MIN) < 2e-5 + 2 * gram.asymmetry + noise).any():
                raise Undecidable
            skipped = near[pivots < reference.PIVOT_MIN]
            if not picked or len(skipped) == 0:
                break
            usable[skipped] = False
        for j in sorted(near.tolist(), key=lambda j: (j not in support, -score[j])):
            left = usable.copy()
            left[j] = False
            yield from extend([*picked, j], left)

    return extend([], diagonal > 0)


def plain_code(problem: Problem, t: int, picked: list[int]) -> Array:
    """Codes of the picked atoms as plain NumPy float32 finds them."""
    if not picked:
        return np.zeros(0)
    gram = problem.enc[picked].astype(np.float32) @ problem.dec[picked].astype(np.float32).T
    return np.linalg.solve(gram, correlations(problem, t, np.float32)[picked]).astype(np.float64)


def edited(problem: Problem, t: int, code: Array, dtype: Any, keep_norm: bool = True) -> Array:
    """Return z' of row t before it is rounded to z's dtype, computed in ``dtype``; observe rows stay."""
    row = problem.z[t].astype(dtype)
    p = int(problem.slots[t])
    if p < 2:
        return row
    policy = problem.policy
    limits = policy["limits"][p].astype(dtype) * np.array([1, 1, keep_norm, 0], dtype)
    operands = (problem.dec, policy["gain"][p], policy["boost"][p], policy["shift"][p])
    return reference.edit_row(row, code.astype(dtype), *(x.astype(dtype) for x in operands), limits)


def near_cliff(problem: Problem, t: int, code: Array, slack: float) -> bool:
    """Whether rounding may switch a code on or off, or an edit cancels a row whose norm is then restored."""
    p = int(problem.slots[t])
    theta, _, keep_norm, _ = problem.policy["limits"][p]
    strength = np.abs(code) * np.linalg.norm(problem.dec.astype(np.float64), axis=1)
    if p < 2:
        return False
    if theta > 0 and (np.abs(strength[code != 0] - theta) <= slack).any():
        return True
    left = np.linalg.norm(edited(problem, t, code, np.float64, keep_norm=False))
    return bool(keep_norm and left <= 1e-3 * np.linalg.norm(problem.z[t].astype(np.float64)))


def doses(problem: Problem, t: int, code: Array, out: Array) -> tuple[float, float]:
    """Removed and applied dose of row t in float64."""
    row = problem.z[t].astype(np.float64)
    norm = float(np.linalg.norm(row))
    if norm == 0:
        return 0.0, 0.0
    strength = np.abs(code) * np.linalg.norm(problem.dec.astype(np.float64), axis=1)
    removed = strength[problem.policy["undesirable"][problem.slots[t]]].sum()
    return float(removed) / norm, float(np.linalg.norm(out - row)) / norm
