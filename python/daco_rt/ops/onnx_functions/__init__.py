"""The steering operators as ONNX model-local functions, made of standard operators only.

A graph that carries these functions runs in any ONNX runtime: where the custom-op library is registered,
its kernels are used; elsewhere the runtime inlines the function and computes the same numbers, slower.

The functions read every weight as it stands in the file. The big products put the weight matrix on the
left (``E xᵀ``), because ONNX Runtime packs a private copy of every constant right-hand matrix, one for
each product. fp16, bf16 and int8 matrices are widened by ``Cast`` (and scaled); ONNX Runtime folds that into
one fp32 copy when it loads the model.
"""

from __future__ import annotations

from daco_rt.ops.onnx_functions.functions import (
    DOMAIN,
    MAX_UNROLLED,
    OPSET,
    affine_function,
    function_refusal,
    has_function,
    steer_function,
)

__all__ = [
    "DOMAIN",
    "MAX_UNROLLED",
    "OPSET",
    "affine_function",
    "function_refusal",
    "has_function",
    "steer_function",
]
