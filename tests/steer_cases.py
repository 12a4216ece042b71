"""Operands for tests of the steering operators: planted sparse rows over a random dictionary."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from daco_rt.ops import quantise

DTYPES = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
# How far z' may be from the float64 result, relative to ‖z‖: rounding of the output, and fp32 arithmetic.
TOLERANCE = {"fp32": 2e-5, "fp16": 1e-3, "bf16": 8e-3}


def steer_case(
    op: str,
    *,
    activation: str = "fp32",
    weight: str = "fp32",
    rows: tuple[int, ...] = (9,),
    d: int = 48,
    m: int = 80,
    seed: int = 0,
) -> dict[str, Any]:
    """Operands by name, as NumPy arrays, for ``"sae"`` or ``"pursuit"``; 5 policies, all slots used.

    ``weight`` is one of DTYPES or "int8", whose scales are an operand too.
    Policy 2 removes, 3 rescales with a boost, a deadband and norm keeping, 4 shifts under a dose cap.
    """
    rng = np.random.default_rng(seed)
    atoms = rng.standard_normal((m, d))
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    if weight == "int8":
        atoms, scale = quantise(atoms)
        meant = atoms * scale[:, None].astype(np.float64)
    else:
        atoms = atoms.astype(DTYPES[weight])
        meant = atoms.astype(np.float64)
    count = int(np.prod(rows))
    codes = np.zeros((count, m))
    for row in codes:
        row[rng.choice(m, 6, replace=False)] = rng.uniform(1, 3, 6)
    z = codes @ meant + 0.05 * rng.standard_normal((count, d))
    gain = np.ones((5, m), np.float32)
    gain[2, ::2] = 0.0
    gain[3] = rng.uniform(0, 2, m)
    boost = np.zeros((5, m), np.float32)
    boost[3, 1::3] = 0.25
    undesirable = gain < 0.5
    undesirable[1, ::3] = True
    shift = np.zeros((5, d), np.float32)
    shift[4] = rng.standard_normal(d)
    limits = np.zeros((5, 4), np.float32)
    limits[3] = 0.3, 0.0, 1.0, 0.0
    limits[4] = 0.0, 0.2, 0.0, 0.0
    shared = {
        "gain": gain,
        "boost": boost,
        "undesirable": undesirable,
        "shift": shift,
        "limits": limits,
    }
    if weight == "int8":
        shared["scales"] = np.stack([scale, scale])
    data = {
        "z": z.astype(DTYPES[activation]).reshape(*rows, d),
        "slots": np.resize(np.array([2, 3, 4, 1, 0], np.int32), count).reshape(rows),
    }
    if op == "sae":
        return {
            **data,
            "enc": atoms,
            "enc_bias": (0.01 * rng.standard_normal(m)).astype(np.float32),
            "dec": atoms,
            "threshold": rng.uniform(0.2, 0.6, m).astype(np.float32),
            **shared,
        }
    return {**data, "analysis": atoms, "bias": np.zeros(m, np.float32), "atoms": atoms, **shared}


def assert_steered(got: Any, want: Any, z: np.ndarray, activation: str) -> None:
    """Compare four outputs with the float64 reference's, row by row relative to ‖z‖."""
    new_z, doses, index, value = (np.asarray(x) for x in got)
    assert new_z.dtype == z.dtype and new_z.shape == z.shape
    z64 = z.astype(np.float64)
    norm = np.linalg.norm(z64, axis=-1, keepdims=True)
    error = np.abs(new_z.astype(np.float64) - want.z) / norm
    assert np.nanmax(error) <= TOLERANCE[activation]
    np.testing.assert_allclose(doses, want.doses, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(index, want.support_index)
    np.testing.assert_allclose(value, want.support_value, rtol=1e-4, atol=1e-4)
