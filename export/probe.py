"""Looking inside a bundle's decoder: the same graph with its steering nodes tapped, removed or alone.

Verification needs what production hides: the rows that enter and leave each steering node. The graph is
rewritten in memory and run with plain feeds; its weights are found in the bundle's folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from daco_rt.artifacts.bundle import Bundle
from daco_rt.errors import ArtifactError

DOMAIN = "ai.daco"
Kernels = Literal["library", "functions"]
KERNELS: tuple[Kernels, Kernels] = ("library", "functions")
Arrays = dict[str, NDArray]


@dataclass(frozen=True)
class Tap:
    """One steering node's values in one run: rows in, slots, rows out."""

    block: int
    z: NDArray
    slots: NDArray
    out: NDArray
    doses: NDArray


class Probe:
    """A bundle's decoder graph, taken apart.

    Example
    -------
    >>> probe = Probe(load_bundle("bundles/smol-internvl"))      # doctest: +SKIP
    >>> plain = probe.session("unsteered", "functions")          # doctest: +SKIP
    """

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.graph = onnx.load(str(bundle.decoder_path), load_external_data=False)
        doses = {f"doses.{block}": block for block in bundle.steered_blocks}
        self.nodes: dict[int, onnx.NodeProto] = {}
        for node in self.graph.graph.node:
            if node.domain == DOMAIN:
                block = next((doses[name] for name in node.output if name in doses), None)
                if block is None:
                    raise ArtifactError(
                        f"{bundle.decoder_path}: a steering node has no dose output; export again"
                    )
                self.nodes[block] = node
        if missing := set(bundle.steered_blocks) - set(self.nodes):
            raise ArtifactError(
                f"{bundle.decoder_path}: no steering node for block(s) {sorted(missing)}, which the manifest "
                "names; export again"
            )

    @cached_property
    def activation(self) -> int:
        """ONNX element type of the residual stream."""
        return self.graph.graph.input[0].type.tensor_type.elem_type

    def tapped(self) -> onnx.ModelProto:
        """The graph with every steering node's rows as further outputs."""
        model = _copy(self.graph)
        for block, node in self.nodes.items():
            for name, tensor, kind in (
                ("z", node.input[0], self.activation),
                ("slots", node.input[1], onnx.TensorProto.INT32),
                ("out", node.output[0], self.activation),
            ):
                tap = f"tap.{name}.{block}"
                model.graph.node.append(onnx.helper.make_node("Identity", [tensor], [tap]))
                model.graph.output.append(onnx.helper.make_tensor_value_info(tap, kind, None))
        return model

    def unsteered(self) -> onnx.ModelProto:
        """The graph without its steering nodes: what the model was before."""
        model = _copy(self.graph)
        bypass = {node.output[0]: node.input[0] for node in self.nodes.values()}
        gone = {name for node in self.nodes.values() for name in node.output}
        kept = [node for node in model.graph.node if node.domain != DOMAIN]
        for node in kept:
            for i, name in enumerate(node.input):
                node.input[i] = bypass.get(name, name)
        del model.graph.node[:]
        model.graph.node.extend(kept)
        outputs = [value for value in model.graph.output if value.name not in gone]
        del model.graph.output[:]
        model.graph.output.extend(outputs)
        del model.functions[:]
        return model

    def alone(self, block: int) -> onnx.ModelProto:
        """One steering node as a model of its own: inputs ``z`` [B, S, d] and ``slots`` [B, S]."""
        node = onnx.NodeProto()
        node.CopyFrom(self.nodes[block])
        node.input[0], node.input[1] = "z", "slots"
        node.output[0] = "out"
        outputs = [("out", self.activation), (node.output[1], onnx.TensorProto.FLOAT)]
        if self.bundle.k_out:
            outputs += [(node.output[2], onnx.TensorProto.INT32), (node.output[3], onnx.TensorProto.FLOAT)]
        wanted = set(node.input)
        graph = onnx.helper.make_graph(
            [node],
            f"steer.{block}",
            [
                onnx.helper.make_tensor_value_info(
                    "z", self.activation, ["B", "S", self.bundle.decoder["hidden_size"]]
                ),
                onnx.helper.make_tensor_value_info("slots", onnx.TensorProto.INT32, ["B", "S"]),
            ],
            [onnx.helper.make_tensor_value_info(name, kind, None) for name, kind in outputs],
            [tensor for tensor in self.graph.graph.initializer if tensor.name in wanted],
        )
        return onnx.helper.make_model(
            graph,
            opset_imports=self.graph.opset_import,
            functions=self.graph.functions,
            ir_version=self.graph.ir_version,
        )

    def session(self, model: onnx.ModelProto, kernels: Kernels) -> Any:
        """Open an ONNX Runtime session on a rewritten graph, with the custom-op library or without it."""
        import onnxruntime

        from daco_rt._native import library_path

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(self.bundle.path.resolve())
        )
        if kernels == "library":
            options.register_custom_ops_library(str(library_path("onnxruntime")))
        return onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )


class Stepper:
    """Runs a decoder session step by step with plain feeds, keeping the cache between steps.

    The cache has a fixed length for the life of the stepper: runs of equal shapes compare bit for bit.
    """

    def __init__(self, session: Any, cache_length: int) -> None:
        self.session = session
        self.cache_length = cache_length
        self.inputs = {value.name: value for value in session.get_inputs()}
        self.names = [value.name for value in session.get_outputs()]
        self.past: Arrays = {}

    def step(
        self,
        embeds: NDArray,
        positions: NDArray,
        at: NDArray,
        slots: NDArray,
        logits_at: NDArray,
    ) -> Arrays:
        """Run embeds [B, S, d] written at ``at`` [B]; returns every output but the caches, by name."""
        kind = np.float16 if self.inputs["inputs_embeds"].type == "tensor(float16)" else np.float32
        feeds: Arrays = {
            "inputs_embeds": embeds.astype(kind),
            "position_ids": positions.astype(np.int64),
            "write_indices": at.astype(np.int64),
            "logits_at": logits_at.astype(np.int64),
        }
        if "policy_slots" in self.inputs:
            feeds["policy_slots"] = slots.astype(np.int32)
        for name, value in self.inputs.items():
            if name.startswith("past_"):
                fixed = value.shape[2]
                length = fixed if isinstance(fixed, int) else self.cache_length
                shape = (len(embeds), value.shape[1], length, value.shape[3])
                feeds[name] = self.past.get(name.removeprefix("past_"), np.zeros(shape, kind))
        outputs = dict(zip(self.names, self.session.run(None, feeds), strict=True))
        self.past = {
            name.removeprefix("present_"): outputs.pop(name)
            for name in list(outputs)
            if name.startswith("present_")
        }
        return outputs


def taps_of(outputs: Mapping[str, NDArray], blocks: Sequence[int]) -> list[Tap]:
    """Collect the taps of one step as flat rows: z and out [T, d], slots [T], doses [T, 2]."""
    found = []
    for block in blocks:
        z = outputs[f"tap.z.{block}"]
        found.append(
            Tap(
                block,
                z.reshape(-1, z.shape[-1]),
                outputs[f"tap.slots.{block}"].reshape(-1),
                outputs[f"tap.out.{block}"].reshape(-1, z.shape[-1]),
                outputs[f"doses.{block}"].reshape(-1, 2),
            )
        )
    return found


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy
