"""Is a result right? Results are held against the float64 reference before they are timed.

``daco_rt.ops.reference`` is written for reading and touches every atom for every row. Here its own pieces are
applied to the few atoms that a row's code names, which gives the same numbers in a fraction of the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from harness import Check
from numpy.typing import NDArray
from workloads import SLOT, PolicyTables

from daco_rt.ops import reference
from daco_rt.ops.outcomes import CLOSE

ROW_BOUND = 1e-5
"""Largest ‖z' − reference‖ / ‖z‖; fp32 sums over d terms lose about d·2⁻²⁴."""
DOSE_BOUND = 1e-4
RESIDUAL_BOUND = 1.001
"""Largest residual of a pursuit over that of float64 pursuit, which may choose other atoms."""


@dataclass(frozen=True)
class Expected:
    """What rows [T] must become: z' [T, d], doses [T, 2], and whether a row is ``clear`` of every cliff."""

    z: NDArray[np.float64]
    doses: NDArray[np.float64]
    clear: NDArray[np.bool_]

    def rows(self, which: Any) -> Expected:
        """The expectation of some rows: a slice, or their numbers."""
        return Expected(self.z[which], self.doses[which], self.clear[which])


def expect_sae(
    z: NDArray, enc: NDArray, bias: NDArray, dec: NDArray, tables: PolicyTables, coder: str, k: int
) -> Expected:
    """Work out ``topk`` or ``relu`` for every row, edited under the benchmarks' policy."""
    rows = z.astype(np.float64)
    before = rows @ enc.astype(np.float64).T + bias
    results, doses, clear = [], [], []
    watched = np.zeros(len(bias), bool)
    watched[tables.watched] = True
    for row, a in zip(rows, before, strict=True):
        room = True
        if coder == "topk":
            code = reference.keep_largest(np.maximum(a, 0), k)
            ranked = np.sort(np.maximum(a, 0))[::-1]
            if k < len(a) and ranked[k - 1] > 0:
                room = bool(ranked[k - 1] - ranked[k] > CLOSE * ranked[k - 1])
        else:
            code = np.where((a > 0) & watched, a, 0.0)
        support = np.flatnonzero(code)
        edited, dose, inside = edit(row, support, code[support], dec, tables)
        results.append(edited)
        doses.append(dose)
        clear.append(room and inside)
    return Expected(np.array(results), np.array(doses), np.array(clear))


def edit(
    row: NDArray[np.float64],
    support: NDArray[np.integer],
    code: NDArray[np.float64],
    atoms: NDArray,
    tables: PolicyTables,
) -> tuple[NDArray[np.float64], tuple[float, float], bool]:
    """Edit one row by a given code: z', (removed, applied), and whether no code stands at the deadband."""
    chosen = atoms[support].astype(np.float64)
    gain, limits = tables.gain[SLOT, support].astype(np.float64), tables.limits[SLOT].astype(np.float64)
    out = reference.edit_row(
        row, code, chosen, gain, np.zeros(len(code)), tables.shift[SLOT].astype(np.float64), limits
    )
    strength, norm = np.abs(code) * np.linalg.norm(chosen, axis=1), np.linalg.norm(row)
    removed = strength[tables.undesirable[SLOT, support]].sum() / norm
    inside = limits[0] == 0 or not (np.abs(strength[gain != 1] / limits[0] - 1) <= CLOSE).any()
    return out, (float(removed), float(np.linalg.norm(out - row) / norm)), bool(inside)


def check_rows(out: NDArray, doses: NDArray, z: NDArray, expected: Expected) -> Check:
    """Compare z' and doses with an expectation; rows next to a cliff are counted, not compared."""
    norms = np.linalg.norm(z.astype(np.float64), axis=1)
    errors = np.linalg.norm(out.astype(np.float64) - expected.z, axis=1) / norms
    off = np.abs(doses - expected.doses).max(axis=1)
    clear = expected.clear
    row_error, dose_error = float(errors[clear].max(initial=0)), float(off[clear].max(initial=0))
    passed = row_error <= ROW_BOUND and dose_error <= DOSE_BOUND and bool(clear.any())
    passed = passed and bool(np.isfinite(out).all())
    return Check(
        passed,
        f"{int(clear.sum())} of {len(z)} rows equal float64 (the rest stand next to a cliff), error "
        f"{row_error:.1e} of |z|, doses {dose_error:.1e}",
    )


def pursuit_residuals(z: NDArray, atoms: NDArray, k: int) -> list[float]:
    """Return ‖r‖ of positive float64 pursuit over plain atoms (E = A, b = 0) for each row."""
    exact = atoms.astype(np.float64)
    gram, bias = reference.GramColumns(exact, exact), np.zeros(len(exact))
    found = []
    for row in z.astype(np.float64):
        code = reference.orthogonal_matching_pursuit(
            row, exact, bias, gram, exact, k=k, sign="positive", tol=0
        )
        support = np.flatnonzero(code)
        found.append(float(np.linalg.norm(row - code[support] @ exact[support])))
    return found


def check_pursuit(
    out: NDArray | None,
    doses: NDArray,
    index: NDArray,
    value: NDArray,
    z: NDArray,
    atoms: NDArray,
    tables: PolicyTables,
    best: Sequence[float],
) -> Check:
    """Check a pursuit whose picks may differ from float64's, as an fp16 Gram matrix makes them.

    Every row's edit and doses must follow from the code that it reports, and on the first ``len(best)`` rows
    the code must leave no more of the row than float64 pursuit does. ``out`` may be ``None``.
    """
    worst_row = worst_dose = worst_ratio = 0.0
    compared = 0
    for t, row in enumerate(z.astype(np.float64)):
        support = index[t][index[t] >= 0]
        code = value[t][: len(support)].astype(np.float64)
        expected, dose, clear = edit(row, support, code, atoms, tables)
        if t < len(best):
            left = float(np.linalg.norm(row - code @ atoms[support].astype(np.float64)))
            worst_ratio = max(worst_ratio, left / best[t])
        if not clear:
            continue
        compared += 1
        worst_dose = max(worst_dose, float(np.abs(doses[t] - dose).max()))
        if out is not None:
            error = np.linalg.norm(out[t].astype(np.float64) - expected) / np.linalg.norm(row)
            worst_row = max(worst_row, float(error))
    passed = (
        worst_row <= ROW_BOUND and worst_dose <= DOSE_BOUND and worst_ratio <= RESIDUAL_BOUND and compared > 0
    )
    ratios = min(len(best), len(z))
    return Check(
        bool(passed and np.isfinite(doses).all()),
        f"residual ≤ {worst_ratio:.6f} × float64's on {ratios} rows; edits follow from the codes on "
        f"{compared} of {len(z)} rows, error {worst_row:.1e} of |z|, doses {worst_dose:.1e}",
    )
