"""The coders: from rows to codes."""

from __future__ import annotations

import onnx_ir as ir

from daco_rt.ops.onnx_functions.body import Body, Matrix
from daco_rt.ops.onnx_functions.rows import Code, Rows
from daco_rt.ops.reference import PIVOT_MIN, PURSUIT_EPS


def correlations(op: Body, matrix: ir.Value, x: ir.Value, bias: ir.Value) -> ir.Value:
    """``matrix xᵀ + bias``, [m, T]."""
    product = op("Gemm", matrix, x, transB=1)
    return op("Add", product, op("Unsqueeze", bias, op.ints(1)))


def topk(op: Body, rows: Rows, enc: Matrix, bias: ir.Value, k: int) -> Code:
    """The k largest of relu(E z + b)."""
    a = op("Relu", correlations(op, enc.whole(op), rows.x, bias))
    value, index = op.pair("TopK", op("Transpose", a, perm=[1, 0]), op.ints(k), axis=-1)
    return Code(value, index, k)


def above(
    op: Body, rows: Rows, enc: Matrix, bias: ir.Value, level: ir.Value | None, watched: ir.Value
) -> Code:
    """a_i where a_i > level_i (0 if ``level`` is None), for latents that some policy edits or reports."""
    a = op("Transpose", correlations(op, enc.whole(op), rows.x, bias), perm=[1, 0])
    passed = op("Greater", a, op.number(0.0) if level is None else level)
    return Code(op.where_or(op("And", passed, watched), a, 0.0), None, 0)


def watched_latents(op: Body, gain: ir.Value, boost: ir.Value, undesirable: ir.Value) -> ir.Value:
    """[m] whether some policy edits (slots 2 and up) or reports (slots 1 and up) a latent."""
    far = op.ints(2**31 - 1)
    edits = op(
        "Or", op("Not", op("Equal", gain, op.number(1.0))), op("Not", op("Equal", boost, op.number(0.0)))
    )
    edits = op("Slice", op("Cast", edits, to=int(ir.DataType.FLOAT)), op.ints(2), far, op.ints(0))
    reports = op("Slice", undesirable, op.ints(1), far, op.ints(0))
    # ReduceSum, because a maximum over no rows (no policy loaded) is undefined.
    total = op("ReduceSum", op("Concat", edits, reports, axis=0), op.ints(0), keepdims=0)
    return op("Greater", total, op.number(0.0))


def pursuit(
    op: Body,
    rows: Rows,
    analysis: Matrix,
    bias: ir.Value,
    atoms: Matrix,
    *,
    k: int,
    signed: bool,
    tol: float,
) -> Code:
    """Orthogonal matching pursuit, unrolled: one block of nodes a step.

    Step s makes the chosen atom orthogonal to the earlier ones in the metric G = E Aᵀ: a unit vector
    q_s = Σ_i M[s, i] A_i. Then α falls by y_s E q_s with y_s = ⟨q_s, residual⟩, and the Schur complement of
    *every* atom by (E q_s)²; atoms for which it is too small, chosen ones among them, are out of the race,
    which is the skip rule before the fact. In the end c = Mᵀ y. A row that has stopped divides by ∞
    from then on, and nothing moves.
    """
    e32 = analysis.whole(op)
    # Einsum, because a runtime that folds constants keeps no [N, d] product on the way.
    gram_diagonal = op("Unsqueeze", op("Einsum", e32, atoms.whole(op), equation="nd,nd->n"), op.ints(1))
    positive = op("Greater", gram_diagonal, op.number(0.0))
    floor = op.where_or(positive, op("Mul", gram_diagonal, op.number(PIVOT_MIN)), float("inf"))
    alpha = correlations(op, e32, rows.x, bias)
    schur = op("Expand", gram_diagonal, op("Shape", alpha))
    norm = op("Transpose", rows.norm, perm=[1, 0])
    level = op("Mul", norm, op.number(PURSUIT_EPS))
    running = op("Greater", norm, op.number(0.0))
    residual = rows.x

    basis: ir.Value | None = None  # Q [T, s, d]
    mixing: ir.Value | None = None  # M [T, s, k]
    chosen: list[ir.Value] = []  # [1, T] each
    progress: list[ir.Value] = []  # y, [1, T] each
    for step in range(k):
        if tol > 0:
            left = op("Transpose", op.row_norm(residual), perm=[1, 0])
            running = op("And", running, op("Greater", left, op("Mul", norm, op.number(tol))))
        score = op("Abs", alpha) if signed else alpha
        score = op.where_or(op("GreaterOrEqual", schur, floor), score, float("-inf"))
        j = op("ArgMax", score, axis=0, keepdims=1)
        running = op("And", running, op("Greater", op("GatherElements", score, j, axis=0), level))
        pivot = op("Sqrt", op("GatherElements", schur, j, axis=0))
        pivot = op.where_or(running, pivot, float("inf"))
        y = op("Div", op("GatherElements", alpha, j, axis=0), pivot)
        chosen.append(j)
        progress.append(y)

        atom_of_row = op("Transpose", j, perm=[1, 0])  # [T, 1]
        column = op("Unsqueeze", op("Transpose", pivot, perm=[1, 0]), op.ints(2))  # [T, 1, 1]
        q = atoms.rows(op, atom_of_row)  # [T, 1, d]
        unit = op("Unsqueeze", op.floats([float(i == step) for i in range(k)]), op.ints(0))
        if basis is None or mixing is None:
            q = op("Div", q, column)
            m = op("Div", op("Unsqueeze", unit, op.ints(0)), column)
            basis, mixing = q, m
        else:
            e = analysis.rows(op, atom_of_row)
            w = op("MatMul", e, op("Transpose", basis, perm=[0, 2, 1]))  # [T, 1, s]
            q = op("Div", op("Sub", q, op("MatMul", w, basis)), column)
            m = op("Div", op("Sub", unit, op("MatMul", w, mixing)), column)
            mixing = op("Concat", mixing, m, axis=1)
            if step + 1 < k:
                basis = op("Concat", basis, q, axis=1)
        if step + 1 < k:
            direction = op("Squeeze", q, op.ints(1))
            p = op("Gemm", e32, direction, transB=1)
            alpha = op("Sub", alpha, op("Mul", p, y))
            schur = op("Sub", schur, op("Mul", p, p))
            if tol > 0:
                residual = op("Sub", residual, op("Mul", direction, op("Transpose", y, perm=[1, 0])))
    assert mixing is not None  # k is at least 1

    y_rows = op("Unsqueeze", op("Transpose", op("Concat", *progress, axis=0), perm=[1, 0]), op.ints(1))
    code = op("MatMul", y_rows, mixing)  # [T, 1, k]
    index = op("Transpose", op("Concat", *chosen, axis=0), perm=[1, 0])
    if k > 1:
        code = op("Add", code, _correction(op, rows.x, code, index, mixing, analysis, bias, atoms))
    code = op("Squeeze", code, op.ints(1))
    return Code(code if signed else op("Relu", code), index, k)


def _correction(
    op: Body,
    x: ir.Value,
    code: ir.Value,
    index: ir.Value,
    mixing: ir.Value,
    analysis: Matrix,
    bias: ir.Value,
    atoms: Matrix,
) -> ir.Value:
    """One step of iterative refinement, [T, 1, k]: c += MᵀM (E_S (x - A_Sᵀ c) + b_S).

    Steps in fp32 lose digits where chosen atoms nearly depend on each other. What is left of the
    correlations with them should be 0, and MᵀM is the inverse of their Gram matrix.
    """
    chosen = atoms.rows(op, index)  # [T, k, d]
    left = op("Sub", op("Unsqueeze", x, op.ints(1)), op("MatMul", code, chosen))
    e = analysis.rows(op, index)
    rest = op("MatMul", e, op("Transpose", left, perm=[0, 2, 1]))  # [T, k, 1]
    rest = op("Add", rest, op("Unsqueeze", op("Gather", bias, index, axis=0), op.ints(2)))
    solved = op("MatMul", mixing, rest)
    return op("MatMul", op("Transpose", solved, perm=[0, 2, 1]), mixing)
