"""What an export for TensorRT adds to a bundle: limits, the plugin library, the recipe, and the engine if it
can."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import onnx_ir as ir

from daco_rt._files import sha256_file
from daco_rt._native import library_path
from daco_rt.artifacts.bundle import load_bundle
from daco_rt.artifacts.engine import PLUGIN, TensorRTPlan
from daco_rt.artifacts.store import ArtifactWriter
from daco_rt.errors import DacoError
from daco_rt.export.tensorrt.dialect import to_tensorrt_dialect
from daco_rt.export.tensorrt.recipe import RECIPE, recipe

PRECISIONS = ("fp16", "bf16")
"""fp32 attention does not build in TensorRT."""
LENGTH = 2048
"""Default cache length: every row of a batch holds a cache of that length from the start."""
WIDTH = 1024
"""Most tokens a row of one prefill run."""
BATCH = 8
TILES = 4


def choose_precision(wanted: str | None, stored: Iterable[str]) -> str:
    """Return the precision of an engine for weights that are stored in these dtypes.

    Raises
    ------
    DacoError
        TensorRT cannot run in the one that was asked for.

    Example
    -------
    >>> choose_precision(None, {"BF16"})
    'bf16'
    """
    if wanted is None:
        return "bf16" if set(stored) == {"BF16"} else "fp16"
    if wanted not in PRECISIONS:
        raise DacoError(
            f"--precision {wanted} cannot be had with --runtime tensorrt, whose attention takes fp16 and "
            "bf16; choose one of them"
        )
    return wanted


def choose_plan(length: int, batch: int | None, *, steered: bool) -> TensorRTPlan:
    """Return the limits of an engine; the plugin that it will need must have been built.

    Raises
    ------
    DacoError
        The batch is out of range, or the plugin library is needed and was not built.
    """
    rows = BATCH if batch is None else batch
    if not 1 <= rows <= 1024:
        raise DacoError(f"--max-batch must be between 1 and 1024, got {rows}")
    plugin = sha256_file(library_path("tensorrt")) if steered else None
    return TensorRTPlan(length, rows, min(WIDTH, length), TILES, plugin)


def add_to_bundle(
    writer: ArtifactWriter, decoder: ir.Model, vision: ir.Model | None, plan: TensorRTPlan
) -> None:
    """Turn the decoder into TensorRT's dialect and put the plugin and the recipe into the bundle."""
    to_tensorrt_dialect(decoder, plan.cache_length)
    if any(node.op_type == "SteerPursuit" and "gram" not in _operands(node) for node in decoder.graph):
        print(
            "note: the pack has no Gram matrix, so correlations are computed again at each step of pursuit; "
            'compile it with gram="fp16" for speed',
            file=sys.stderr,
        )
    if plan.plugin_sha256 is not None:
        writer.add_file(library_path("tensorrt"), PLUGIN)
    shapes = None if vision is None else _inputs(vision)
    text = recipe(plan, _inputs(decoder), shapes, steered=plan.plugin_sha256 is not None)
    writer.add_bytes(RECIPE, text.encode())


def build_if_possible(path: Path) -> str:
    """Build the engine of a finished bundle where TensorRT and a GPU are; return its folder, or "" and say
    why.

    Raises
    ------
    DacoError
        Both are there and the build fails. The bundle stays: a later build needs no new export.
    """
    from daco_rt.export.tensorrt.build import build_engines, current_device, import_tensorrt

    try:
        trt, (device, compute) = import_tensorrt(), current_device()
    except DacoError as error:
        print(
            f"note: no engine was built: {error}. {path / RECIPE} says how to build it where it will run",
            file=sys.stderr,
        )
        return ""
    bundle = load_bundle(path, verify=False)
    return str(build_engines(bundle, trt, device=device, compute=compute))


def _operands(node: ir.Node) -> list[str]:
    return node.attributes["operands"].as_string().split(",")


def _inputs(model: ir.Model) -> dict[str, tuple[int, ...]]:
    found = {}
    for value in model.graph.inputs:
        axes = () if value.shape is None else tuple(value.shape)
        found[str(value.name)] = tuple(axis if isinstance(axis, int) else -1 for axis in axes)
    return found
