"""A recorder of standard operators that keeps the formulas of the other files readable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

FLOAT = int(ir.DataType.FLOAT)
INT64 = int(ir.DataType.INT64)
INT32 = int(ir.DataType.INT32)
BOOL = int(ir.DataType.BOOL)


class Body:
    """Nodes of one function, in order. Calling it appends a node and returns its output.

    Example
    -------
    >>> op = Body()
    >>> total = op("Add", x, op.number(1.0))
    """

    def __init__(self) -> None:
        self._tape = ir.tape.Tape()
        self._constants: dict[tuple[str, object], ir.Value] = {}

    @property
    def nodes(self) -> Sequence[ir.Node]:
        return self._tape.nodes

    def __call__(self, op_type: str, *inputs: ir.Value | None, **attributes) -> ir.Value:
        return self._tape.op(op_type, inputs, attributes)

    def pair(self, op_type: str, *inputs: ir.Value | None, **attributes) -> tuple[ir.Value, ir.Value]:
        """Append a node with two outputs."""
        first, second = self._tape.op_multi_out(op_type, inputs, attributes, num_outputs=2)
        return first, second

    def number(self, value: float) -> ir.Value:
        """A float scalar."""
        return self._constant("value_float", float(value))

    def ints(self, *values: int) -> ir.Value:
        """An int64 vector."""
        return self._constant("value_ints", values)

    def floats(self, values: Sequence[float]) -> ir.Value:
        """A float vector."""
        return self._constant("value_floats", tuple(values))

    def scalar(self, value: int) -> ir.Value:
        """An int64 scalar."""
        return self._constant("value_int", int(value))

    def float32(self, x: ir.Value) -> ir.Value:
        return self("Cast", x, to=FLOAT)

    def row_norm(self, x: ir.Value) -> ir.Value:
        """‖x‖ along the last axis, kept as 1. Divided by its largest entry first: squares of fp32 numbers
        beyond 1e19 overflow, and below 1e-19 vanish."""
        largest = self("ReduceMax", self("Abs", x), self.ints(-1), keepdims=1)
        divisor = self.where_or(self("Greater", largest, self.number(0.0)), largest, 1.0)
        return self("Mul", self("ReduceL2", self("Div", x, divisor), self.ints(-1), keepdims=1), divisor)

    def row_sum(self, x: ir.Value) -> ir.Value:
        return self("ReduceSum", x, self.ints(-1), keepdims=1)

    def row_any(self, x: ir.Value) -> ir.Value:
        """Whether any entry of the last axis is true, kept as 1. ``Cast`` because not every runtime
        reduces booleans."""
        return self("Cast", self("ReduceMax", self("Cast", x, to=FLOAT), self.ints(-1), keepdims=1), to=BOOL)

    def size(self, x: ir.Value, axis: int) -> ir.Value:
        """Length of one axis, an int64 vector of one entry."""
        return self("Shape", x, start=axis, end=axis + 1)

    def where_or(self, condition: ir.Value, x: ir.Value, otherwise: float) -> ir.Value:
        return self("Where", condition, x, self.number(otherwise))

    def _constant(self, kind: str, value) -> ir.Value:
        key = (kind, value)
        if key not in self._constants:
            self._constants[key] = self(
                "Constant", **{kind: list(value) if isinstance(value, tuple) else value}
            )
        return self._constants[key]


@dataclass(frozen=True)
class Matrix:
    """One of the two big matrices [m, d], and what brings its rows into fp32.

    ``wide``: it is fp32 already. ``scale`` [m] multiplies the rows of a quantised one.
    """

    value: ir.Value
    wide: bool
    scale: ir.Value | None = None

    def whole(self, op: Body) -> ir.Value:
        """The matrix in fp32. Of constants only, so a runtime computes it once."""
        matrix = self.value if self.wide else op.float32(self.value)
        return matrix if self.scale is None else op("Mul", matrix, op("Unsqueeze", self.scale, op.ints(1)))

    def rows(self, op: Body, index: ir.Value) -> ir.Value:
        """Rows in fp32, [*index.shape, d]."""
        found = op("Gather", self.value, index, axis=0)
        found = found if self.wide else op.float32(found)
        if self.scale is None:
            return found
        return op("Mul", found, op("Unsqueeze", op("Gather", self.scale, index, axis=0), op.ints(-1)))
