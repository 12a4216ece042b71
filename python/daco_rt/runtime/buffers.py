"""Arrays bound to the decoder's inputs and outputs, the cache bound in place."""

from __future__ import annotations

from typing import Any

import numpy as np

from daco_rt.models.config import DecoderConfig
from daco_rt.runtime.cache import KvCache
from daco_rt.runtime.session import Step
from daco_rt.runtime.telemetry import BlockRows


def steered_blocks(decoder: Any) -> tuple[int, ...]:
    """Return the blocks that a decoder session reports doses for, in the order of its outputs."""
    names = (value.name for value in decoder.get_outputs())
    return tuple(int(name.partition(".")[2]) for name in names if name.startswith("doses."))


class Buffers:
    """Input and output arrays of one step width, bound once to the decoder and to a cache.

    Parameters
    ----------
    decoder : onnxruntime.InferenceSession
    config : DecoderConfig
    cache : KvCache
        Its arrays become input and output alike: a step writes its new positions and copies nothing.
    width, rows : int
        S, tokens a row, and R, rows of logits.
    """

    def __init__(self, decoder: Any, config: DecoderConfig, cache: KvCache, width: int, rows: int) -> None:
        import onnxruntime

        batch = cache.batch
        self.inputs: dict[str, np.ndarray] = {
            "inputs_embeds": np.zeros((batch, width, config.hidden_size), cache.dtype),
            "position_ids": np.zeros((config.position_axes, batch, width), np.int64),
            "write_indices": np.zeros(batch, np.int64),
            "logits_at": np.zeros((batch, rows), np.int64),
        }
        if any(value.name == "policy_slots" for value in decoder.get_inputs()):
            self.inputs["policy_slots"] = np.zeros((batch, width), np.int32)
        self._blocks = steered_blocks(decoder)
        shapes = {value.name: value.shape for value in decoder.get_outputs()}
        self.outputs: dict[str, np.ndarray] = {
            "logits": np.zeros((batch, rows, config.vocab_size), np.float32)
        }
        for block in self._blocks:
            self.outputs[f"doses.{block}"] = np.zeros((batch, width, 2), np.float32)
            if f"support_index.{block}" in shapes:
                k_out = int(shapes[f"support_index.{block}"][-1])
                self.outputs[f"support_index.{block}"] = np.zeros((batch, width, k_out), np.int32)
                self.outputs[f"support_value.{block}"] = np.zeros((batch, width, k_out), np.float32)

        # On the CPU an OrtValue made from an array shares its memory, so filling the array feeds the graph.
        value = onnxruntime.OrtValue.ortvalue_from_numpy
        self._values = {n: value(a) for n, a in {**self.inputs, **self.outputs}.items()}
        self.binding = decoder.io_binding()
        for name in self.inputs:
            self.binding.bind_ortvalue_input(name, self._values[name])
        for name in self.outputs:
            self.binding.bind_ortvalue_output(name, self._values[name])
        for name, array in cache.arrays.items():
            letter, layer = name.split(".")
            shared = self._values[f"cache.{name}"] = value(array)
            self.binding.bind_ortvalue_input(f"past_{letter}.{layer}", shared)
            self.binding.bind_ortvalue_output(f"present_{letter}.{layer}", shared)

    def step(self) -> Step:
        """Return the outputs, as views of the bound arrays."""
        reports = {
            block: BlockRows(
                self.outputs[f"doses.{block}"],
                self.outputs.get(f"support_index.{block}"),
                self.outputs.get(f"support_value.{block}"),
            )
            for block in self._blocks
        }
        return Step(self.outputs["logits"], reports)
