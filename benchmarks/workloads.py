"""Inputs that look like the real thing: coherent dictionaries, rows that are sparse mixtures, and a policy.

Atoms share a mean direction and a low-rank subspace, come in clusters and carry noise: mean |cos| ≈ 0.13,
mean cosine of the nearest neighbour ≈ 0.45 at 15,000 atoms. White noise would make both selection and pursuit
easier than they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SLOT = 2
"""The slot under which the benchmarks' rows are edited."""

# Shares of an atom's energy, and the shapes behind them.
_MEAN, _SHARED, _CLUSTER = 0.125, 0.30, 0.14
_RANK, _CLUSTER_SIZE = 12, 30
_EDITED = 0.1
_ACTIVE, _NOISE = 32, 0.3


def coherent_dictionary(atoms: int, dim: int, *, seed: int = 0) -> NDArray[np.float32]:
    """Return atoms [m, d] of unit length, up to rounding.

    Every value is exact in fp32, fp16 and bf16 alike, so that one reference serves all three.
    """
    import torch

    draw = np.random.default_rng(seed)

    def units(*shape: int) -> NDArray[np.float32]:
        rows = draw.standard_normal(shape, dtype=np.float32)
        rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
        return rows

    found = units(atoms, dim)
    found *= np.sqrt(np.float32(1 - _MEAN - _SHARED - _CLUSTER))
    found += np.sqrt(np.float32(_MEAN)) * units(dim)
    found += units(atoms, _RANK) @ (np.sqrt(np.float32(_SHARED)) * units(_RANK, dim))
    centres = np.sqrt(np.float32(_CLUSTER)) * units(-(-atoms // _CLUSTER_SIZE), dim)
    member = draw.permutation(atoms) // _CLUSTER_SIZE
    for start in range(0, atoms, 1024):
        part = found[start : start + 1024]
        part += centres[member[start : start + 1024]]
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return torch.from_numpy(found).bfloat16().half().float().numpy()


def coherence(atoms: NDArray[np.float32], *, sample: int = 300) -> dict[str, float]:
    """Return the mean |cos| and the mean cosine of the nearest neighbour over the first atoms."""
    cosines = atoms[:sample] @ atoms.T
    cosines[np.arange(len(cosines)), np.arange(len(cosines))] = 0
    return {
        "mean_abs_cos": round(float(np.abs(cosines).mean()), 3),
        "nearest_neighbour_cos": round(float(cosines.max(axis=1).mean()), 3),
    }


def mixtures(atoms: NDArray[np.float32], rows: int, *, seed: int = 1) -> NDArray[np.float32]:
    """Return rows [T, d]: positive mixtures of 32 atoms each, and noise of 0.3 times their norm."""
    draw = np.random.default_rng(seed)
    dim = atoms.shape[1]
    found = np.empty((rows, dim), np.float32)
    for row in found:
        chosen = draw.choice(len(atoms), min(_ACTIVE, len(atoms) // 4), replace=False)
        row[:] = draw.lognormal(0.0, 0.5, len(chosen)).astype(np.float32) @ atoms[chosen]
        noise = draw.standard_normal(dim, dtype=np.float32)
        row += noise * np.float32(_NOISE * np.linalg.norm(row) / np.linalg.norm(noise))
    return found


@dataclass(frozen=True)
class PolicyTables:
    """The operands that are looked up by slot: off, observe, and a policy that removes a tenth of the atoms.

    ``gain``, ``undesirable`` [3, m], ``shift`` [3, d], ``limits`` [3, 4]; ``watched`` lists the edited atoms.
    """

    gain: NDArray[np.float32]
    undesirable: NDArray[np.bool_]
    shift: NDArray[np.float32]
    limits: NDArray[np.float32]

    @property
    def watched(self) -> NDArray[np.intp]:
        """Indices of the atoms that the policy edits, ascending."""
        return np.flatnonzero(self.undesirable[SLOT])

    def operands(self) -> dict[str, NDArray]:
        """The tables by operand name."""
        return {
            "gain": self.gain,
            "undesirable": self.undesirable,
            "shift": self.shift,
            "limits": self.limits,
        }


def removing_policy(
    atoms: NDArray[np.float32], norm: float, *, deadband: float = 0.02, seed: int = 2
) -> PolicyTables:
    """Make the tables of a policy that removes a tenth of the atoms and adds a small constant vector.

    ``norm`` is the typical norm of a row; codes weaker than ``deadband`` times it are left alone.
    """
    m, dim = atoms.shape
    draw = np.random.default_rng(seed)
    gain, undesirable = np.ones((3, m), np.float32), np.zeros((3, m), bool)
    bad = draw.choice(m, max(1, round(_EDITED * m)), replace=False)
    gain[SLOT, bad] = 0
    undesirable[1:, bad] = True
    shift = np.zeros((3, dim), np.float32)
    shift[SLOT] = atoms[draw.integers(m)] * np.float32(0.01 * norm)
    limits = np.zeros((3, 4), np.float32)
    limits[SLOT, 0] = deadband * norm
    return PolicyTables(gain, undesirable, shift, limits)
