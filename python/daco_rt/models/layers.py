"""Layers that decoders and vision towers are made of, and their weights as references into files.

Every module builds ONNX nodes when called; none holds numbers. Activations travel as *rows* [T, width], T
tokens of all batch entries one below the other, because a linear layer is then one ``Gemm`` that reads its
weight [out, in] as the checkpoint stores it. A ``MatMul`` behind a ``Transpose`` computes the same, but
ONNX Runtime then folds a transposed copy of every weight when it loads the graph: on 24
blocks of width 1,024 that was five times the loading time and more than twice the memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx_ir as ir
from onnxscript.nn import Module, Parameter

from daco_rt.artifacts.tensors import TensorRef
from daco_rt.errors import CheckpointError, UnsupportedError

Locate = Callable[[TensorRef], tuple[str, int]]
"""Maps a checkpoint tensor to (path relative to the model file, byte offset) of the graph's own copy."""

OPSET = 24
IR_VERSION = 11
FLOATS = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
_STORED = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}


def float_type(dtype: str) -> ir.DataType:
    """Return the ONNX type of a precision; raises ``UnsupportedError`` for an unknown name."""
    if dtype not in FLOATS:
        raise UnsupportedError(
            f"precision {dtype!r} is not supported for graphs; supported: {', '.join(FLOATS)}"
        )
    return FLOATS[dtype]


class Linear(Module):
    """x [T, in] → x Wᵀ + b [T, out]; ``weight`` [out, in], ``bias`` [out]."""

    def __init__(self, inputs: int, outputs: int, dtype: ir.DataType, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = Parameter([outputs, inputs], dtype)
        self.bias = Parameter([outputs], dtype) if bias else None

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        operands = (x, self.weight) if self.bias is None else (x, self.weight, self.bias)
        return op.Gemm(*operands, transB=1)


class RMSNorm(Module):
    """Root-mean-square normalisation over the last axis, computed in fp32 whatever the activations are."""

    def __init__(self, width: int, epsilon: float, dtype: ir.DataType) -> None:
        super().__init__()
        self.weight = Parameter([width], dtype)
        self.epsilon = epsilon

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        return op.RMSNormalization(x, self.weight, axis=-1, epsilon=self.epsilon)


class LayerNorm(Module):
    """Mean and variance normalisation over the last axis, computed in fp32."""

    def __init__(self, width: int, epsilon: float, dtype: ir.DataType) -> None:
        super().__init__()
        self.weight = Parameter([width], dtype)
        self.bias = Parameter([width], dtype)
        self.epsilon = epsilon

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        return op.LayerNormalization(x, self.weight, self.bias, axis=-1, epsilon=self.epsilon)


ACTIVATIONS: dict[str, Callable[[Any, ir.Value], ir.Value]] = {
    "gelu": lambda op, x: op.Gelu(x),
    "gelu_new": lambda op, x: op.Gelu(x, approximate="tanh"),
    "gelu_fast": lambda op, x: op.Gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda op, x: op.Gelu(x, approximate="tanh"),
    "quick_gelu": lambda op, x: op.Mul(x, op.Sigmoid(op.Mul(x, 1.702))),
    "relu": lambda op, x: op.Relu(x),
    "silu": lambda op, x: op.Mul(x, op.Sigmoid(x)),
}
"""Activations by Hugging Face's ``hidden_act`` names."""


def activation(name: str) -> Callable[[Any, ir.Value], ir.Value]:
    """Return the builder of an activation; raises ``UnsupportedError`` for a name that is not implemented."""
    if name not in ACTIVATIONS:
        raise UnsupportedError(
            f"activation {name!r} is not implemented; supported: {', '.join(sorted(ACTIVATIONS))}"
        )
    return ACTIVATIONS[name]


def shape_of(op: Any, batch_and_length: ir.Value, *rest: int) -> ir.Value:
    """The shape tensor [B, S, *rest] from the int64 vector [B, S]."""
    return op.Concat(batch_and_length, op.Constant(value_ints=list(rest)), axis=0)


def heads_first(op: Any, x: ir.Value) -> ir.Value:
    """[B, S, H, w] → [B, H, S, w], and back when applied to its own result."""
    return op.Transpose(x, perm=[0, 2, 1, 3])


def to_rows(op: Any, x: ir.Value, width: int) -> ir.Value:
    """[.., width] → [T, width]."""
    return op.Reshape(x, [-1, width])


def bind_weights(
    module: Module, weights: Mapping[str, TensorRef], dtype: str, locate: Locate | None, what: str
) -> None:
    """Point every parameter of ``module`` at its tensor in a file; nothing is read.

    ``weights`` maps the module's parameter names to checkpoint tensors. Without ``locate`` the graph refers
    to the tensor's own file by its bare name, so the model must be saved into the same folder and the tensor
    must already have the graph's ``dtype``. With ``locate`` the caller vouches that the place it returns
    holds the tensor in that dtype.

    Raises ``CheckpointError`` for a missing tensor, a shape that differs, or a dtype that would be misread.
    """
    kind = float_type(dtype)
    for name, parameter in module.named_parameters():
        if name not in weights:
            raise CheckpointError(f"{what} needs the tensor {name!r}, which the checkpoint does not have")
        ref = weights[name]
        shape = tuple(parameter.shape.numpy()) if parameter.shape is not None else ()
        if tuple(ref.shape) != shape:
            raise CheckpointError(
                f"{ref.file}: tensor {ref.name!r} has shape {list(ref.shape)}, expected {list(shape)}"
            )
        if locate is None:
            if _STORED.get(ref.dtype) != dtype:
                raise CheckpointError(
                    f"{ref.file}: tensor {ref.name!r} is stored as {ref.dtype}, a graph in {dtype} cannot"
                    " refer to it; convert it first and pass locate="
                )
            location, offset = ref.file.name, ref.offset
        else:
            location, offset = locate(ref)
        nbytes = math.prod(shape) * int(kind.itemsize)
        parameter.const_value = ir.ExternalTensor(
            location, offset, nbytes, kind, shape=ir.Shape(shape), name=name
        )


def declare(value: ir.Value, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
    """Set a value's type and shape where inference cannot know them, or must state them by name."""
    value.type = ir.TensorType(dtype)
    value.shape = ir.Shape(shape)
    return value
