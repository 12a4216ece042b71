"""What every coder shares: kinds of rows, the edit, the doses, the support.

Inside, the leading axes are flattened: T rows of width d. A code is either *sparse*, k entries a row with
their atom numbers, or *dense*, one entry an atom.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import onnx_ir as ir

from daco_rt.ops.onnx_functions.body import FLOAT, INT32, INT64, Body, Matrix

_CHUNK = 8
"""Atoms gathered at once for a sparse edit: bounds the [T, chunk, d] intermediate of a long prompt."""


class Rows(NamedTuple):
    """The rows of one call, flattened."""

    z: ir.Value  # [T, d] as given
    x: ir.Value  # [T, d] fp32; rows that are not finite are 0
    norm: ir.Value  # [T, 1] ‖x‖
    policy: ir.Value  # [T, 1] int64, clipped into the table
    known: ir.Value  # [T, 1] the slot is in the table
    finite: ir.Value  # [T, 1] the row has no NaN or Inf
    coded: ir.Value  # [T, 1] the row is coded and reported
    edited: ir.Value  # [T, 1] the row is coded and its slot is a loaded policy


@dataclass(frozen=True)
class Code:
    """A code of T rows: [T, k] with ``index`` [T, k], or [T, m] with ``index`` None."""

    value: ir.Value
    index: ir.Value | None
    length: int  # k; unused for a dense code


class Policies(NamedTuple):
    """The operands that are looked up by slot."""

    gain: ir.Value  # [P, m]
    boost: ir.Value  # [P, m]
    undesirable: ir.Value  # [P, m] fp32, 0 or 1
    shift: ir.Value  # [P, d]
    limits: ir.Value  # [P, 4]


def read_policies(op: Body, gain, boost, undesirable, shift, limits) -> Policies:
    """Widen ``undesirable`` and fill in a missing ``boost``.

    A function cannot ask whether an input was given. ``Gemm`` takes its third input as optional, so an
    outer product of zeros plus ``boost`` is ``boost`` where there is one and 0 elsewhere.
    """
    shape = op("Shape", gain)
    one = op.ints(1)
    rows, columns = op.size(gain, 0), op.size(gain, 1)
    left = op("Expand", op.number(0.0), op("Concat", rows, one, axis=0))
    right = op("Expand", op.number(0.0), op("Concat", one, columns, axis=0))
    full = op("Expand", op("Gemm", left, right, boost), shape)
    return Policies(gain, full, op("Cast", undesirable, to=FLOAT), shift, limits)


def read_rows(op: Body, z: ir.Value, slots: ir.Value, table: ir.Value) -> Rows:
    """Flatten ``z`` and sort its rows into kinds; ``table`` [P, …] is any operand with a row a slot."""
    flat = op("Flatten", z, axis=-1)
    wide = op.float32(flat)
    slot = op("Cast", op("Flatten", op("Unsqueeze", slots, op.ints(-1)), axis=-1), to=INT64)
    last = op("Sub", op("Squeeze", op.size(table, 0)), op.scalar(1))
    policy = op("Clip", slot, op.scalar(0), last)
    known = op("Equal", slot, policy)
    finite = op("Not", op.row_any(op("Or", op("IsNaN", wide), op("IsInf", wide))))
    x = op.where_or(finite, wide, 0.0)
    usable = op("And", known, finite)
    coded = op("And", usable, op("Greater", policy, op.scalar(0)))
    edited = op("And", usable, op("Greater", policy, op.scalar(1)))
    return Rows(flat, x, op.row_norm(x), policy, known, finite, coded, edited)


def atom_norms(op: Body, atoms: Matrix) -> ir.Value:
    """‖A_i‖ [m]. Depends on weights only, so a runtime computes it once."""
    return op("ReduceL2", atoms.whole(op), op.ints(1), keepdims=0)


def by_slot(op: Body, table: ir.Value, rows: Rows, code: Code) -> ir.Value:
    """Entries of a [P, m] table for the slot of each row, laid out like the code."""
    if code.index is None:
        return op("Squeeze", op("Gather", table, rows.policy, axis=0), op.ints(1))
    position = op("Add", op("Mul", rows.policy, op.size(table, 1)), code.index)
    return op("Gather", op("Reshape", table, op.ints(-1)), position, axis=0)


def strengths(op: Body, code: Code, norms: ir.Value) -> ir.Value:
    """|c|·‖A‖, laid out like the code."""
    scale = norms if code.index is None else op("Gather", norms, code.index, axis=0)
    return op("Mul", op("Abs", code.value), scale)


def synthesise(op: Body, code: Code, weight: ir.Value, atoms: Matrix) -> ir.Value:
    """Σ_i weight_i A_i, [T, d], of entries laid out like the code."""
    if code.index is None:
        return op("MatMul", weight, atoms.whole(op))
    total: ir.Value | None = None
    for start in range(0, code.length, _CHUNK):
        window = (op.ints(start), op.ints(min(start + _CHUNK, code.length)), op.ints(1))
        rows = atoms.rows(op, op("Slice", code.index, *window))
        w = op("Unsqueeze", op("Slice", weight, *window), op.ints(1))
        part = op("Squeeze", op("MatMul", w, rows), op.ints(1))
        total = part if total is None else op("Add", total, part)
    assert total is not None  # codes have at least one entry
    return total


class Edited(NamedTuple):
    row: ir.Value  # [T, d] fp32 z'
    changed: ir.Value  # [T, 1] false: the row must be copied


def edit(
    op: Body, rows: Rows, policies: Policies, code: Code | None, strength: ir.Value | None, atoms: Matrix
) -> Edited:
    """Deadband, gain and boost, shift, dose cap, norm keeping, in that order."""
    shift = op("Squeeze", op("Gather", policies.shift, rows.policy, axis=0), op.ints(1))
    limits = op("Squeeze", op("Gather", policies.limits, rows.policy, axis=0), op.ints(1))
    if code is None or strength is None:
        return add_delta(op, rows, shift, limits, any_nonzero(op, shift))
    zero = op.number(0.0)
    active = op("Not", op("Equal", code.value, zero))
    on = op("And", op("Greater", strength, column(op, limits, 0)), active)
    scaled = op("Mul", op("Sub", by_slot(op, policies.gain, rows, code), op.number(1.0)), code.value)
    weight = op.where_or(on, op("Add", scaled, by_slot(op, policies.boost, rows, code)), 0.0)
    delta = op("Add", synthesise(op, code, weight, atoms), shift)
    return add_delta(op, rows, delta, limits, op("Or", any_nonzero(op, shift), op.row_any(on)))


def column(op: Body, table: ir.Value, i: int) -> ir.Value:
    """Column i of [T, n], [T, 1]."""
    return op("Slice", table, op.ints(i), op.ints(i + 1), op.ints(1))


def any_nonzero(op: Body, x: ir.Value) -> ir.Value:
    """Whether a row of [T, n] has an entry other than 0, [T, 1]."""
    return op("Not", op("Equal", op("ReduceMax", op("Abs", x), op.ints(-1), keepdims=1), op.number(0.0)))


def add_delta(op: Body, rows: Rows, delta: ir.Value, limits: ir.Value, moved: ir.Value) -> Edited:
    """z + delta under the dose cap and norm keeping of ``limits`` [T, 4], for ``moved`` rows [T, 1]."""
    max_dose, keep_norm = column(op, limits, 1), column(op, limits, 2)
    zero = op.number(0.0)
    length = op.row_norm(delta)
    cap = op("Min", op("Div", op("Mul", max_dose, rows.norm), length), op.number(1.0))
    capped = op("And", op("Greater", max_dose, zero), op("Greater", length, zero))
    row = op("Add", rows.x, op("Mul", delta, op.where_or(capped, cap, 1.0)))

    length = op.row_norm(row)
    kept = op("And", op("Not", op("Equal", keep_norm, zero)), op("Greater", length, zero))
    row = op("Mul", row, op.where_or(kept, op("Div", rows.norm, length), 1.0))
    return Edited(row, op("And", rows.edited, moved))


def output_rows(op: Body, rows: Rows, edited: Edited, z: ir.Value, dtype: int) -> ir.Value:
    """z' in the shape and dtype of z. Rows that are not changed pass through ``Where`` untouched."""
    new = op.where_or(rows.known, edited.row, float("nan"))
    touched = op("Or", edited.changed, op("Not", rows.known))
    if dtype != FLOAT:
        new = op("Cast", new, to=dtype)
    return op("Reshape", op("Where", touched, new, rows.z), op("Shape", z), allowzero=1)


def doses(
    op: Body,
    rows: Rows,
    policies: Policies | None,
    edited: Edited,
    code: Code | None,
    strength: ir.Value | None,
) -> ir.Value:
    """[T, 2] (removed, applied), relative to ‖z‖. Without policies or a code nothing is removed."""
    zero = op.number(0.0)
    divisible = op("And", rows.coded, op("Greater", rows.norm, zero))
    if policies is None or code is None or strength is None:
        removed = op("Mul", rows.norm, zero)
    else:
        bad = op.row_sum(op("Mul", strength, by_slot(op, policies.undesirable, rows, code)))
        removed = op.where_or(divisible, op("Div", bad, rows.norm), 0.0)
    distance = op("Div", op.row_norm(op("Sub", edited.row, rows.x)), rows.norm)
    applied = op.where_or(op("And", divisible, edited.changed), distance, 0.0)
    both = op("Concat", removed, applied, axis=1)
    off = op("Equal", rows.policy, op.scalar(0))
    readable = op("And", rows.known, op("Or", off, rows.finite))
    return op.where_or(readable, both, float("nan"))


def support(
    op: Body, rows: Rows, code: Code | None, strength: ir.Value | None, k_out: int
) -> tuple[ir.Value, ir.Value]:
    """([T, k_out] int32, [T, k_out] fp32): active codes by falling strength, ties to the lower atom."""
    if k_out == 0 or code is None or strength is None:
        shape = op("Concat", op.size(rows.x, 0), op.ints(k_out), axis=0)
        minus_one = op("Cast", op.scalar(-1), to=INT32)
        return op("Expand", minus_one, shape), op("Expand", op.number(0.0), shape)

    active = op("And", op("Not", op("Equal", code.value, op.number(0.0))), rows.coded)
    # -1 ranks below an active atom of length 0.
    key = op.where_or(active, strength, -1.0)
    value, index = code.value, code.index
    if index is not None:
        # TopK prefers the earlier of two equals, so entries must stand in the order of their atoms.
        index, order = op.pair("TopK", index, op.ints(code.length), axis=-1, largest=0)
        key = op("GatherElements", key, order, axis=1)
        value = op("GatherElements", value, order, axis=1)
        width = op.ints(min(k_out, code.length))
    else:
        width = op("Min", op.size(value, 1), op.ints(k_out))
    ranked, chosen = op.pair("TopK", key, width, axis=-1)
    atom = chosen if index is None else op("GatherElements", index, chosen, axis=1)
    reported = op("GreaterOrEqual", ranked, op.number(0.0))
    atom = op("Where", reported, atom, op.scalar(-1))
    amount = op.where_or(reported, op("GatherElements", value, chosen, axis=1), 0.0)
    pads = op("Concat", op.ints(0, 0, 0), op("Sub", op.ints(k_out), width), axis=0)
    atom = op("Pad", atom, pads, op.scalar(-1))
    amount = op("Pad", amount, pads, op.number(0.0))
    return op("Cast", atom, to=INT32), amount


def unflatten(op: Body, x: ir.Value, slots: ir.Value, width: int) -> ir.Value:
    """Give [T, width] the leading axes of ``slots`` back."""
    return op("Reshape", x, op("Concat", op("Shape", slots), op.ints(width), axis=0), allowzero=1)
