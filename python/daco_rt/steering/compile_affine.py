"""Affine baselines as packs: removing the projection on given directions, without a code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from daco_rt.artifacts import ModelIdentity, Pack, save_pack
from daco_rt.errors import ArtifactError, PolicyError
from daco_rt.steering.policy import FIRST_SLOT, PolicySpec, describe_spec, to_policies
from daco_rt.steering.tables import DTYPES, one_of, require_norms


def compile_affine_pack(
    directions_by_block: Mapping[int, NDArray],
    path: str | Path,
    *,
    model: ModelIdentity,
    median_norm: Mapping[int, float],
    means: Mapping[int, NDArray] | None = None,
    strengths: Mapping[str, float] | None = None,
    positive_only: bool = False,
    positions: str = "all",
    max_dose: float = 0.0,
    keep_norm: bool = False,
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32",
    overwrite: bool = False,
) -> Pack:
    """Compile directions into a pack that removes what a row has along them: z' = z - s·Uᵀφ(U (z - μ)).

    U are orthonormal rows that span the directions, so directions may overlap.

    Parameters
    ----------
    directions_by_block : block → [r, d] or [d], any lengths, linearly independent; one r for all blocks.
    path : the folder to make.
    model : identity of the model.
    median_norm : block → median residual norm.
    means : block → μ [d], what counts as having nothing along U; by default zero.
    strengths : policy → s; 1 removes the projection, 2 reflects it. By default one policy, "default", of 1.
    positive_only : φ is relu: only what points along a direction is removed, not what points against it. With
        more than one direction they must be orthogonal then, for U to be the directions themselves.
    positions : of all policies.
    max_dose, keep_norm : as in :class:`PolicySpec`.
    dtype : of the matrices.

    Raises
    ------
    PolicyError, ArtifactError
        Directions are dependent or of another shape, or a number is out of range.

    Example
    -------
    >>> compile_affine_pack({15: refusal}, "packs/ablate", model=identity, median_norm={15: 210.0})
    """
    if not directions_by_block:
        raise ArtifactError("compile_affine_pack: no direction given; give some for each block to steer")
    strengths = {"default": 1.0} if strengths is None else strengths
    if not strengths or not all(np.isfinite(s) for s in strengths.values()):
        raise PolicyError(
            f"compile_affine_pack: strengths must be finite, one at least, got {dict(strengths)}"
        )
    one_of("dtype", dtype, tuple(DTYPES))
    blocks = tuple(sorted(directions_by_block))
    require_norms(median_norm, blocks)
    specs = [
        PolicySpec(name, positions, description="removes a projection").with_defaults(
            gain=1.0, boost=0.0, gamma=0.0, deadband=0.0, max_dose=max_dose, keep_norm=keep_norm
        )
        for name in strengths
    ]
    d, slots = model.hidden_size, FIRST_SLOT + len(specs)
    ranks = {block: len(np.atleast_2d(rows)) for block, rows in directions_by_block.items()}
    if len(set(ranks.values())) != 1:
        raise ArtifactError(f"compile_affine_pack: every block needs as many directions, got {ranks}")
    operands = {}
    for block in blocks:
        basis = _basis(directions_by_block[block], d, positive_only, f"compile_affine_pack: block {block}")
        basis = basis.astype(DTYPES[dtype])
        mean = np.zeros(d) if means is None or block not in means else np.asarray(means[block], np.float64)
        if mean.shape != (d,):
            raise ArtifactError(
                f"compile_affine_pack: the mean of block {block} must have shape [{d}], got {list(mean.shape)}"
            )
        a = np.zeros((slots, *basis.shape), DTYPES[dtype])
        b = np.zeros((slots, d, len(basis)), DTYPES[dtype])
        bias = np.zeros((slots, len(basis)), np.float32)
        limits = np.zeros((slots, 4), np.float32)
        for slot, (spec, strength) in enumerate(zip(specs, strengths.values(), strict=True), FIRST_SLOT):
            a[slot] = basis
            b[slot] = (-strength * basis.astype(np.float64)).T.astype(DTYPES[dtype])
            bias[slot] = -(basis.astype(np.float64) @ mean)
            limits[slot, 1:3] = spec.max_dose, bool(spec.keep_norm)
        operands[block] = {
            "a": a, "a_bias": bias, "b": b, "shift": np.zeros((slots, d), np.float32), "limits": limits
        }  # fmt: skip
    return save_pack(
        path,
        model=model,
        op="affine",
        coder="relu" if positive_only else "identity",
        k=1,
        operands=operands,
        policies=to_policies(specs, blocks),
        default_policy=specs[0].name,
        concepts=(),
        median_norm={block: float(median_norm[block]) for block in blocks},
        recipe={
            "method": "affine",
            "strengths": {name: float(s) for name, s in strengths.items()},
            "policies": [describe_spec(spec) for spec in specs],
        },
        overwrite=overwrite,
    )


def _basis(directions: NDArray, d: int, keep: bool, where: str) -> NDArray[np.float64]:
    """Orthonormal rows with the span of the directions [r, d]; with ``keep`` the directions' own, at length 1."""
    rows = np.atleast_2d(np.asarray(directions)).astype(np.float64)
    if rows.ndim != 2 or rows.shape[1] != d or not 1 <= len(rows) <= d or not np.isfinite(rows).all():
        raise ArtifactError(f"{where}: directions must be finite, shape [r, {d}], got {list(rows.shape)}")
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)
    if np.linalg.svd(unit, compute_uv=False).min() < 1e-3:
        raise ArtifactError(f"{where}: a direction is zero or depends on the others; leave it out")
    if keep:
        if np.abs(unit @ unit.T - np.eye(len(unit))).max() > 1e-3:
            raise ArtifactError(
                f"{where}: with positive_only the directions must be orthogonal to each other"
            )
        return unit
    return np.linalg.qr(unit.T)[0].T
