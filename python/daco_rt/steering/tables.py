"""The rows of the operator's tables that follow from policies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from daco_rt.artifacts import Concept
from daco_rt.errors import ArtifactError, PolicyError
from daco_rt.ops.quantise import quantise, scaled
from daco_rt.steering.policy import FIRST_SLOT, PolicySpec

DTYPES: dict[str, np.dtype] = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
}
WEIGHTS = (*DTYPES, "int8")
"""What the two matrices may be stored in."""
GRAM_LIMIT = 4096
"""Atoms up to which the Gram matrix is made without being asked for (64 MiB a block in fp32)."""


class Stored(NamedTuple):
    """A matrix as a pack holds it."""

    rows: NDArray  # [m, d]
    exact: NDArray[np.float64]  # [m, d] what the kernels multiply by, to derive everything else from
    scale: NDArray[np.float32] | None  # [m] of int8 rows


def store_rows(matrix: NDArray, dtype: str) -> Stored:
    """Round or quantise a matrix [m, d] to one of :data:`WEIGHTS`."""
    if dtype != "int8":
        rows = np.asarray(matrix).astype(DTYPES[dtype])
        return Stored(rows, rows.astype(np.float64), None)
    rows, scale = quantise(np.asarray(matrix))
    return Stored(rows, scaled(rows, scale[None], 0), scale)


def scales_of(first: Stored, second: Stored) -> dict[str, NDArray]:
    """The operand ``scales`` [2, m] of a pair of int8 matrices; nothing for others."""
    if first.scale is None or second.scale is None:
        return {}
    return {"scales": np.stack([first.scale, second.scale])}


class Tables:
    """The operands that are looked up by slot, of one block, filled in policy by policy.

    ``gain`` [P, m], ``boost`` [P, m], ``undesirable`` [P, m], ``shift`` [P, d], ``limits`` [P, 4].
    """

    def __init__(self, slots: int, atoms: int, dim: int) -> None:
        self.gain = np.ones((slots, atoms), np.float32)
        self.boost = np.zeros((slots, atoms), np.float32)
        self.undesirable = np.zeros((slots, atoms), bool)
        self.shift = np.zeros((slots, dim), np.float32)
        self.limits = np.zeros((slots, 4), np.float32)

    def observe(self, concepts: Sequence[Concept]) -> None:
        """Slot 1 reports everything labelled undesirable."""
        for concept in concepts:
            self.undesirable[1, concept.index] = concept.label == "undesirable"

    def add(
        self, slot: int, spec: PolicySpec, concepts: Sequence[Concept], atoms: NDArray, median_norm: float
    ) -> None:
        """Write one policy with all its fields set; ``atoms`` [m, d] are the synthesis rows."""
        assert spec.gain is not None and spec.boost is not None and spec.gamma is not None
        edited = [concept.index for concept in concepts if spec.selects(concept)]
        wanted = [concept.index for concept in concepts if concept.label == "desirable"]
        if (spec.boost or spec.gamma) and not wanted:
            raise PolicyError(
                f"policy '{spec.name}' sets {'boost' if spec.boost else 'gamma'}, but no concept is labelled "
                "desirable; label some or leave it at 0"
            )
        self.gain[slot, edited] = spec.gain
        self.undesirable[slot, edited] = True
        self.boost[slot, wanted] = spec.boost * median_norm
        if spec.gamma:
            total = np.asarray(atoms[wanted], np.float64).sum(axis=0)
            self.shift[slot] = along(total, spec.gamma * median_norm, f"policy '{spec.name}'")
        self.limit(slot, spec, median_norm)

    def limit(self, slot: int, spec: PolicySpec, median_norm: float) -> None:
        """Write the deadband, dose bound and norm rule of one policy."""
        assert spec.deadband is not None and spec.max_dose is not None
        self.limits[slot, :3] = spec.deadband * median_norm, spec.max_dose, float(bool(spec.keep_norm))

    def operands(self, *, with_boost: bool) -> dict[str, NDArray]:
        """The tables by operand name. ``boost`` is left out where no block of the pack uses it."""
        named = {field: getattr(self, field) for field in ("gain", "undesirable", "shift", "limits")}
        return named | ({"boost": self.boost} if with_boost else {})


def along(direction: NDArray, length: float, what: str) -> NDArray[np.float32]:
    """Scale a direction [d] to a length."""
    norm = float(np.linalg.norm(direction))
    if norm == 0:
        raise PolicyError(f"{what}: the direction of its shift is zero; choose other concepts or readings")
    return (np.asarray(direction, np.float64) * (length / norm)).astype(np.float32)


def fill_tables(
    specs: Sequence[PolicySpec], concepts: Sequence[Concept], atoms: NDArray, median_norm: float
) -> dict[str, NDArray]:
    """Return one block's policy operands by name; ``atoms`` [m, d] are its synthesis rows."""
    tables = Tables(FIRST_SLOT + len(specs), *atoms.shape)
    tables.observe(concepts)
    for slot, spec in enumerate(specs, FIRST_SLOT):
        tables.add(slot, spec, concepts, atoms, median_norm)
    return tables.operands(with_boost=any(spec.boost for spec in specs))


def require_norms(median_norm: Mapping[int, float], blocks: Sequence[int]) -> None:
    """Refuse a missing or impossible median norm."""
    for block in blocks:
        value = median_norm.get(block)
        if value is None or not 0 < float(value) < float("inf"):
            raise ArtifactError(f"median_norm needs one positive number for block {block}, got {value!r}")


def one_of(name: str, got: str, allowed: tuple[str, ...]) -> None:
    """Refuse a word that is not allowed."""
    if got not in allowed:
        raise ArtifactError(f"{name} must be one of {', '.join(allowed)}, got {got!r}")
