"""The steered decoder graph: the model's own weights, and a steering node at each of the pack's blocks.

Steering operands are external data too, inside the bundle's copy of the pack. A pack of equal shapes has
equal offsets there, so another dictionary or policy is a file swap and not an export.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import onnx_ir as ir

from daco_rt.artifacts.pack import STEERING, Pack
from daco_rt.artifacts.tensors import TensorRef, read_header
from daco_rt.errors import DacoError
from daco_rt.models.config import DecoderConfig
from daco_rt.models.decoder import OPERANDS, SteerNode, build_decoder
from daco_rt.models.layers import Locate
from daco_rt.ops.onnx_functions import affine_function, function_refusal, steer_function

PACK_FOLDER = "pack"
OP_TYPES = {"sae": "SteerSae", "pursuit": "SteerPursuit", "affine": "SteerAffine"}

_ONNX_DTYPE = {
    "F32": ir.DataType.FLOAT,
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
    "BOOL": ir.DataType.BOOL,
    "I32": ir.DataType.INT32,
    "I8": ir.DataType.INT8,
}


@dataclass(frozen=True)
class SteeredGraph:
    """A decoder model and what running it takes."""

    model: ir.Model
    library_required: str
    """Why only the custom-op library can run it; empty when standard operators can."""


def steered_decoder(
    config: DecoderConfig,
    weights: Mapping[str, TensorRef],
    precision: str,
    locate: Locate,
    pack: Pack | None,
    bundle: Path,
) -> SteeredGraph:
    """Build the decoder with the pack's steering; ``bundle/pack`` must hold the pack already.

    Returns the graph and, in ``library_required``, the reason for which it needs the custom-op library, if it
    does. Reads headers only.
    """
    if pack is None:
        model = build_decoder(config, weights, dtype=precision, locate=locate)
        return SteeredGraph(model, "")
    op_type = OP_TYPES[pack.op]
    refusal = function_refusal(op_type, coder=pack.coder, k=pack.k, sign=pack.sign) or ""
    functions = [] if refusal else [_function(op_type, pack, precision)]
    steer = {
        block: SteerNode(op_type, _attributes(pack), operands, slot_map, pack.k_out)
        for block, (operands, slot_map) in _operands(pack, op_type, bundle).items()
    }
    model = build_decoder(config, weights, dtype=precision, locate=locate, steer=steer, functions=functions)
    return SteeredGraph(model, refusal)


def _function(op_type: str, pack: Pack, precision: str) -> ir.Function:
    dtypes: dict[str, Any] = {"activation": precision, "weight": pack.dtype}
    if pack.op == "affine":
        return affine_function(phi=cast(Any, pack.coder), **dtypes)
    pursuit: dict[str, Any] = {"sign": pack.sign, "tol": pack.tol} if pack.op == "pursuit" else {}
    return steer_function(
        cast(Any, op_type), coder=pack.coder, k=pack.k, k_out=pack.k_out, **pursuit, **dtypes
    )


def library_at_hand() -> bool:
    """Whether the custom-op library was built into this installation."""
    from daco_rt._native import library_path

    try:
        library_path("onnxruntime")
    except DacoError:
        return False
    return True


def _attributes(pack: Pack) -> dict[str, str | int | float]:
    if pack.op == "affine":
        return {"phi": pack.coder, "plugin_namespace": "ai.daco", "plugin_version": "1"}
    common: dict[str, str | int | float] = {
        "coder": pack.coder,
        "k": pack.k,
        "k_out": pack.k_out,
        "plugin_namespace": "ai.daco",
        "plugin_version": "1",
    }
    if pack.op == "sae":
        return common
    return common | {
        "sign": pack.sign,
        "tol": float(pack.tol),
        "tau": float(pack.tau),
        "alpha": float(pack.alpha),
    }


def _operands(
    pack: Pack, op_type: str, bundle: Path
) -> dict[int, tuple[dict[str, ir.TensorProtocol], ir.TensorProtocol]]:
    refs = read_header(bundle / PACK_FOLDER / STEERING)
    found: dict[int, tuple[dict[str, ir.TensorProtocol], ir.TensorProtocol]] = {}
    for row, block in enumerate(pack.blocks):
        operands: dict[str, ir.TensorProtocol] = {
            name: _external(refs[f"block.{block}.{name}"], f"steer.{block}.{name}")
            for name in OPERANDS[op_type]
            if f"block.{block}.{name}" in refs
        }
        found[block] = (operands, _slot_map(refs["slot_map"], row, pack.slots_count, block))
    return found


def _external(ref: TensorRef, name: str) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        f"{PACK_FOLDER}/{STEERING}",
        ref.offset,
        ref.nbytes,
        _ONNX_DTYPE[ref.dtype],
        shape=ir.Shape(ref.shape),
        name=name,
    )


def _slot_map(ref: TensorRef, row: int, policies: int, block: int) -> ir.ExternalTensor:
    """One row of ``slot_map`` [blocks, P]: a view into the file like every other operand."""
    width = policies * 4
    return ir.ExternalTensor(
        f"{PACK_FOLDER}/{STEERING}",
        ref.offset + row * width,
        width,
        ir.DataType.INT32,
        shape=ir.Shape([policies]),
        name=f"steer.{block}.slot_map",
    )
