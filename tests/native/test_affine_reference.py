"""Affine edits of every instruction set and dtype against the float64 reference, at awkward sizes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from kernel_problems import BF16, DTYPES, EPS32, same_bits
from test_kernels_reference import ISAS, ROUNDING

from daco_rt.ops import numpy as kernels
from daco_rt.ops import reference

SIZES = ((1, 1, 1), (5, 3, 2), (17, 17, 1), (9, 64, 3), (3, 100, 40), (0, 8, 2), (40, 129, 7))


@pytest.fixture(params=ISAS)
def isa(request):
    try:
        kernels.build_gram(np.eye(1, dtype=np.float32), np.eye(1, dtype=np.float32), isa=request.param)
    except NotImplementedError as error:
        pytest.skip(str(error))
    return request.param


def random_edit(rng, rows, d, r, weight, activation):
    """Policies: 2 free, 3 capped, 4 norm keeping with a deadband that must mean nothing."""
    z = (2 * rng.normal(size=(rows, d))).astype(activation)
    slots = rng.integers(0, 5, rows).astype(np.int32)
    for t in range(rows):
        match t % 9:
            case 3:
                z[t] = 0
            case 5:
                z[t, rng.integers(d)] = rng.choice([np.nan, np.inf, -np.inf])
            case 7:
                slots[t] = rng.choice([-1, 5, 2**31 - 1, -(2**31)])
    a = (rng.normal(size=(5, r, d)) / np.sqrt(d)).astype(weight)
    b = (rng.normal(size=(5, d, r)) / np.sqrt(d)).astype(weight)
    limits = np.zeros((5, 4), np.float32)
    limits[3, 1], limits[4] = 0.2, (5.0, 0, 1, 0)
    shift = (0.2 * rng.normal(size=(5, d)) * (rng.random((5, 1)) < 0.6)).astype(np.float32)
    a_bias = (0.3 * rng.normal(size=(5, r))).astype(np.float32)
    return (z, slots, a, a_bias, b), {"shift": shift, "limits": limits}


@pytest.mark.parametrize("phi", ["identity", "relu", "clamp"])
def test_affine(isa, phi):
    rng = np.random.default_rng(list(phi.encode()))
    edited = 0
    for (weight, activation), (rows, d, r) in itertools.product(
        itertools.product(DTYPES.values(), DTYPES.values()), SIZES
    ):
        operands, named = random_edit(rng, rows, d, r, weight, activation)
        z, slots = operands[:2]
        named |= {"phi": phi, "clamp": (-0.2, np.inf)}
        out = kernels.steer_affine(*operands, **named, isa=isa)
        for threads in (3, 1):
            again = kernels.steer_affine(*operands, **named, isa=isa, threads=threads)
            assert all(same_bits(x, y) for x, y in zip(out, again, strict=True))
        want = reference.steer_affine(*operands, **named)
        np.testing.assert_array_equal(np.isnan(out.doses), np.isnan(want.doses))
        np.testing.assert_allclose(out.doses, want.doses, rtol=1e-4, atol=1e-5)
        finite = np.isfinite(z.astype(np.float64)).all(axis=1)
        for t, p in enumerate(slots):
            if not 0 <= p < 5:
                assert np.isnan(out.z[t].astype(np.float64)).all()
            elif p < 2 or not finite[t]:
                assert same_bits(out.z[t], z[t])
            else:
                size = np.abs(want.z[t]).max(initial=0) + np.abs(z[t].astype(np.float64)).max() + 1
                bound = 16 * EPS32 * np.sqrt(d) * size + ROUNDING[activation] * np.abs(want.z[t])
                assert (np.abs(out.z[t].astype(np.float64) - want.z[t]) <= bound).all()
                edited += want.doses[t, 1] > 0
    assert edited > 100


def test_projection_removal(isa):
    """What the edit is for: with B = -Aᵀ and orthonormal rows of A nothing is left along them."""
    rng = np.random.default_rng(8)
    basis = np.linalg.qr(rng.normal(size=(64, 4)))[0].T.astype(np.float32)
    a = np.zeros((3, 4, 64), np.float32)
    a[2] = basis
    z = rng.normal(size=(6, 64)).astype(np.float32)
    out = kernels.steer_affine(
        z, np.full(6, 2, np.int32), a, np.zeros((3, 4), np.float32), -a.transpose(0, 2, 1),
        shift=np.zeros((3, 64), np.float32), limits=np.zeros((3, 4), np.float32), isa=isa,
    )  # fmt: skip
    assert np.abs(out.z @ basis.T).max() < 1e-6
    assert np.abs((z - out.z) - (z @ basis.T) @ basis).max() < 1e-6


def test_rows_beyond_the_range_saturate(isa):
    shift = np.full((3, 20), 6e4, np.float32)
    zero = np.zeros((3, 1, 20), np.float32)
    for activation, largest in ((np.float16, 65504.0), (BF16, 3.3895313892515355e38)):
        shift[:] = largest
        out = kernels.steer_affine(
            np.full((2, 20), largest, np.float32).astype(activation), np.full(2, 2, np.int32), zero,
            np.zeros((3, 1), np.float32), zero.transpose(0, 2, 1), shift=shift,
            limits=np.zeros((3, 4), np.float32), isa=isa,
        )  # fmt: skip
        assert (out.z.astype(np.float64) == largest).all()
