"""The decoder graph as TensorRT takes it: a cache of fixed length, steering nodes without gaps.

What differs from the graph for ONNX Runtime, which has the same nodes otherwise:

- the cache axis is a number. TensorRT updates a cache in place only if its length is known when the engine is
  built;
- a steering node's inputs are the operands that are there, and its attribute ``operands`` names them. A
  plugin gets its inputs as a list without gaps, and TensorRT's parser has no mark for a missing one inside
  a model-local function either;
- the function behind a steering node has those inputs too, so that a runtime without the plugin still runs
  the file.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from daco_rt.models.decoder import DOMAIN, OPERANDS

CACHE_AXIS = "cache"


def to_tensorrt_dialect(model: ir.Model, cache_length: int) -> ir.Model:
    """Rewrite a decoder model in place and return it.

    Parameters
    ----------
    model : as :func:`daco_rt.models.decoder.build_decoder` makes it.
    cache_length : positions of the cache; 1 or greater.

    Raises
    ------
    ValueError
        The cache length is below 1, or two steering nodes of one type leave out different operands: a model
        holds one function a type.

    Example
    -------
    >>> model = to_tensorrt_dialect(steered_decoder(...).model, 2048)      # doctest: +SKIP
    """
    if cache_length < 1:
        raise ValueError(f"to_tensorrt_dialect: cache_length must be 1 or greater, got {cache_length}")
    _fix_cache(model.graph, cache_length)
    absent: dict[str, frozenset[str]] = {}
    for node in list(model.graph):
        if node.domain != DOMAIN:
            continue
        names = ("z", "slots", *OPERANDS[node.op_type])
        inputs = [*node.inputs, *[None] * (len(names) - len(node.inputs))]
        missing = frozenset(n for n, value in zip(names, inputs, strict=True) if value is None)
        if absent.setdefault(node.op_type, missing) != missing:
            raise ValueError(
                f"to_tensorrt_dialect: {node.op_type} nodes leave out {sorted(missing)} and "
                f"{sorted(absent[node.op_type])}; all of one type must leave out the same operands"
            )
        _close_gaps(node, names)
    for function in model.functions.values():
        if function.domain == DOMAIN and function.name in absent:
            _drop_inputs(function, absent[function.name])
    return model


def _fix_cache(graph: ir.Graph, length: int) -> None:
    """Replace the symbolic cache axis by a number wherever it was declared."""

    def values() -> Iterable[ir.Value]:
        yield from graph.inputs
        for node in graph:
            yield from node.outputs

    for value in values():
        if value.shape is not None and any(_is_cache(axis) for axis in value.shape):
            value.shape = ir.Shape([length if _is_cache(axis) else axis for axis in value.shape])


def _is_cache(axis: int | ir.SymbolicDim) -> bool:
    return isinstance(axis, ir.SymbolicDim) and axis.value == CACHE_AXIS


def _close_gaps(node: ir.Node, names: Iterable[str]) -> None:
    given = [(n, value) for n, value in zip(names, node.inputs, strict=False) if value is not None]
    node.resize_inputs(len(given))
    for i, (_, value) in enumerate(given):
        node.replace_input_with(i, value)
    node.attributes["operands"] = ir.AttrString("operands", ",".join(n for n, _ in given))


def _drop_inputs(function: ir.Function, absent: frozenset[str]) -> None:
    """Take out inputs that no node gives; where the body names one, its input is missing there too."""
    for value in [v for v in function.inputs if v.name in absent]:
        for node, index in list(value.uses()):
            node.replace_input_with(index, None)
            while node.inputs and node.inputs[-1] is None:
                node.resize_inputs(len(node.inputs) - 1)
        function.inputs.remove(value)
    function.attributes["operands"] = ir.AttrString("operands", "")
