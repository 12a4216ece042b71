"""Weights in one byte: symmetric quantisation with one scale a row, w = scale · q."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, NDArray

LARGEST = {"int8": 127.0, "fp8": 448.0}
_STORED = {"int8": np.dtype(np.int8), "fp8": np.dtype(ml_dtypes.float8_e4m3fn)}
QUANTISED = frozenset(_STORED.values())
_MATRICES = (("enc", "dec"), ("analysis", "atoms"))


def quantise(matrix: Any, dtype: str = "int8") -> tuple[Any, Any]:
    """Return ``(q, scale)`` with ``matrix ≈ scale[:, None] * q``.

    Symmetric, one scale a row: max|row| / 127 for int8, max|row| / 448 for fp8 (e4m3); a row of zeros has
    scale 1. int8 rounds to nearest, ties to even: no entry moves by more than half a scale. The kernels take
    the scales of both matrices stacked, ``scales = [scale_enc, scale_dec]`` [2, m].

    Parameters
    ----------
    matrix : [m, d], a NumPy array or a torch tensor, any float dtype, finite.
    dtype : "int8" (CPU and CUDA kernels) or "fp8" (CUDA kernels only).

    Returns
    -------
    q : [m, d] int8 or float8_e4m3fn, and scale : [m] fp32, of the library that ``matrix`` is of.

    Raises
    ------
    TypeError
        ``matrix`` is not of floats.
    ValueError
        It is no matrix, holds NaN or Inf, or ``dtype`` is unknown.

    Example
    -------
    >>> import numpy as np
    >>> q, scale = quantise(np.array([[0.5, -1.0], [0.0, 0.0]], np.float32))
    >>> q.tolist(), scale.tolist()
    ([[64, -127], [0, 0]], [0.007874015718698502, 1.0])
    """
    if dtype not in _STORED:
        raise ValueError(f"quantise: dtype must be 'int8' or 'fp8', got {dtype!r}")
    if not isinstance(matrix, np.ndarray) and hasattr(matrix, "detach"):
        return _quantise_torch(matrix, dtype)
    rows = np.asarray(matrix)
    if rows.dtype.kind not in "fV" or rows.dtype in QUANTISED:
        raise TypeError(f"quantise: matrix must be of floats, got {rows.dtype}")
    if rows.ndim != 2:
        raise ValueError(f"quantise: matrix must have shape (m, d), got {rows.shape}")
    wide = rows.astype(np.float32)
    largest = np.abs(wide).max(axis=1, initial=0.0)
    if not np.isfinite(largest).all():
        raise ValueError(f"quantise: matrix must be finite, row {int(np.isfinite(largest).argmin())} is not")
    scale = _scale(largest, dtype)
    steps = wide / scale[:, None]
    limit = LARGEST[dtype]
    return (np.rint(steps) if dtype == "int8" else steps).clip(-limit, limit).astype(_STORED[dtype]), scale


def dequantise(operands: Mapping[str, NDArray]) -> dict[str, NDArray]:
    """Return operands by name with both matrices in float64 and without ``scales``.

    Operands that are not quantised pass through: only what needs it is converted.

    Example
    -------
    >>> import numpy as np
    >>> q = np.array([[2]], np.int8)
    >>> dequantise({"enc": q, "dec": q, "scales": np.array([[0.5], [0.25]])})
    {'enc': array([[1.]]), 'dec': array([[0.5]])}
    """
    found = {name: array for name, array in operands.items() if name != "scales"}
    scales = operands.get("scales")
    if scales is None or np.size(scales) == 0:
        return found
    for pair in _MATRICES:
        for row, name in enumerate(pair):
            if name in found:
                found[name] = scaled(found[name], scales, row)
    return found


def scaled(matrix: ArrayLike, scales: ArrayLike | None, row: int) -> NDArray[np.float64]:
    """A matrix [m, d] in float64, its rows multiplied by ``scales[row]`` [m] unless there are none."""
    wide = np.asarray(matrix).astype(np.float64)
    if scales is None or np.size(scales) == 0:
        return wide
    return wide * np.asarray(scales).astype(np.float64)[row][:, None]


def _scale(largest: NDArray, dtype: str) -> NDArray[np.float32]:
    scale = (largest / np.float32(LARGEST[dtype])).astype(np.float32)
    return np.where(scale > 0, scale, np.float32(1)).astype(np.float32)


def _quantise_torch(matrix: Any, dtype: str) -> tuple[Any, Any]:
    import torch

    if not matrix.is_floating_point():
        raise TypeError(f"quantise: matrix must be of floats, got {matrix.dtype}")
    rows = matrix.detach().to(torch.float32).cpu().contiguous().numpy()
    q, scale = quantise(rows, dtype)
    stored = torch.from_numpy(q.view(np.int8))
    if dtype == "fp8":
        stored = stored.view(torch.float8_e4m3fn)
    return stored.to(matrix.device), torch.from_numpy(scale).to(matrix.device)
