"""Affine edits: z' = z + B φ(A z + a) + shift, with the matrices of each row's policy."""

from __future__ import annotations

import onnx_ir as ir

from daco_rt.ops.onnx_functions import rows
from daco_rt.ops.onnx_functions.body import Body


def affine_edit(
    op: Body,
    here: rows.Rows,
    a: ir.Value,
    a_bias: ir.Value,
    b: ir.Value,
    shift: ir.Value,
    limits: ir.Value,
    *,
    phi: str,
    clamp: tuple[float, float],
) -> rows.Edited:
    """Return the edited rows. ``a`` [P, r, d] and ``b`` [P, d, r] are fp32.

    Two products with the matrices of all policies, one policy's share of which counts: there are few
    policies, and gathering matrices by row would copy r·d numbers a row.
    """
    by_row = op("Squeeze", here.policy, op.ints(1))
    d = op.size(here.x, 1)
    flat_a = op("Reshape", a, op("Concat", op.ints(-1), d, axis=0))  # [P r, d]
    every = op("Transpose", op("Gemm", flat_a, here.x, transB=1), perm=[1, 0])
    every = op("Add", every, op("Reshape", a_bias, op.ints(1, -1)))
    owner = op("Expand", op("Unsqueeze", _numbers(op, op.size(a, 0)), op.ints(1)), op("Shape", a_bias))
    own = op("Equal", op("Reshape", owner, op.ints(1, -1)), op("Unsqueeze", by_row, op.ints(1)))
    inner = op.where_or(own, _phi(op, every, phi, clamp), 0.0)  # [T, P r]
    flat_b = op("Reshape", op("Transpose", b, perm=[0, 2, 1]), op("Concat", op.ints(-1), d, axis=0))
    own_shift = op("Gather", shift, by_row, axis=0)
    delta = op("Add", op("MatMul", inner, flat_b), own_shift)
    moved = op("Or", rows.any_nonzero(op, inner), rows.any_nonzero(op, own_shift))
    return rows.add_delta(op, here, delta, op("Gather", limits, by_row, axis=0), moved)


def _numbers(op: Body, count: ir.Value) -> ir.Value:
    """0, 1, … count - 1, int64."""
    return op("Range", op.scalar(0), op("Squeeze", count), op.scalar(1))


def _phi(op: Body, x: ir.Value, phi: str, clamp: tuple[float, float]) -> ir.Value:
    if phi == "relu":
        return op("Relu", x)
    return op("Clip", x, op.number(clamp[0]), op.number(clamp[1])) if phi == "clamp" else x
