"""Weights in one byte: what quantise() promises, in both libraries."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from daco_rt.ops import quantise
from daco_rt.ops.quantise import dequantise, scaled


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_int8_is_within_half_a_step_and_uses_the_whole_range(dtype):
    rng = np.random.default_rng(0)
    matrix = (rng.normal(size=(40, 65)) * 10.0 ** rng.integers(-3, 3, (40, 1))).astype(dtype)
    matrix[3] = 0
    q, scale = quantise(matrix)
    assert q.dtype == np.int8 and scale.dtype == np.float32 and scale.shape == (40,)
    wide = matrix.astype(np.float64)
    error = np.abs(q * scale[:, None].astype(np.float64) - wide)
    assert (error <= scale[:, None] * (0.5 + 1e-4)).all()
    assert (np.delete(np.abs(q).max(axis=1), 3) == 127).all() and (np.abs(q) <= 127).all()
    assert scale[3] == 1 and not q[3].any()


def test_fp8_has_three_bits_of_fraction():
    rng = np.random.default_rng(1)
    matrix = rng.normal(size=(20, 33)).astype(np.float32)
    q, scale = quantise(matrix, "fp8")
    assert q.dtype == ml_dtypes.float8_e4m3fn
    values = q.astype(np.float64)
    assert (np.abs(values).max(axis=1) == 448).all()
    error = np.abs(values * scale[:, None] - matrix)
    assert (error <= np.abs(matrix) * (2.0**-4 + 1e-6) + scale[:, None] * 2.0**-9).all()


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_torch_and_numpy_agree(dtype):
    rng = np.random.default_rng(2)
    matrix = rng.normal(size=(9, 31)).astype(np.float32)
    q, scale = quantise(matrix, dtype)
    tq, tscale = quantise(torch.from_numpy(matrix), dtype)
    assert tq.dtype == (torch.int8 if dtype == "int8" else torch.float8_e4m3fn)
    np.testing.assert_array_equal(tq.view(torch.int8).numpy(), q.view(np.int8))
    np.testing.assert_array_equal(tscale.numpy(), scale)
    hq, _ = quantise(torch.from_numpy(matrix).to(torch.bfloat16).T)
    assert hq.shape == (31, 9)


def test_rows_at_the_edge_of_the_range():
    matrix = np.array([[1e-45, 0, -1e-45], [3e38, -3e38, 1e38], [1e-38, 5e-39, 0]], np.float32)
    q, scale = quantise(matrix)
    assert (scale > 0).all() and np.isfinite(scale).all()
    assert q[1].tolist() == [127, -127, 42]


def test_misuse():
    with pytest.raises(ValueError, match="quantise: dtype must be 'int8' or 'fp8', got 'int4'"):
        quantise(np.ones((2, 2), np.float32), "int4")
    with pytest.raises(TypeError, match="quantise: matrix must be of floats, got int64"):
        quantise(np.ones((2, 2), np.int64))
    with pytest.raises(TypeError, match=r"quantise: matrix must be of floats, got torch\.int8"):
        quantise(torch.ones(2, 2, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"quantise: matrix must have shape \(m, d\), got \(3,\)"):
        quantise(np.ones(3, np.float32))
    with pytest.raises(ValueError, match="quantise: matrix must be finite, row 1 is not"):
        quantise(np.array([[1.0], [np.nan]], np.float32))


def test_dequantise_takes_each_matrix_with_its_own_scales():
    q = np.array([[2, -3]], np.int8)
    found = dequantise({"analysis": q, "bias": np.ones(1), "atoms": q, "scales": np.array([[0.5], [2.0]])})
    assert sorted(found) == ["analysis", "atoms", "bias"]
    np.testing.assert_array_equal(found["analysis"], [[1.0, -1.5]])
    np.testing.assert_array_equal(found["atoms"], [[4.0, -6.0]])
    plain = {"enc": q, "scales": np.empty(0, np.float32)}
    assert dequantise(plain)["enc"] is q
    np.testing.assert_array_equal(scaled(q, None, 0), [[2.0, -3.0]])
