"""Tiny random models of every registered family, and the exported graphs beside them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
import transformers

from daco_rt.artifacts.tensors import from_array, read_header, write_safetensors
from daco_rt.models import Checkpoint, DecoderConfig, FamilySpec, families, resolve_checkpoint

CASES = [(spec.name, case) for spec in families().values() for case in spec.tiny_configs()]
TOLERANCE = 2e-5  # of the largest logit or embedding

NUMPY = {"fp32": np.float32, "fp16": np.float16}


@dataclass
class Tiny:
    """A transformers model, its saved checkpoint, and where its graphs stand."""

    spec: FamilySpec
    model: Any
    checkpoint: Checkpoint


@functools.cache
def tiny(family: str, case: str, folder: Path) -> Tiny:
    """Build, save and reopen one tiny model."""
    spec = families()[family]
    kind = getattr(transformers, spec.architectures[0])
    torch.manual_seed(0)
    config = kind.config_class(**spec.tiny_configs()[case])
    model = kind._from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    randomise(model)
    path = folder / f"{family}-{case}"
    model.save_pretrained(path)
    return Tiny(spec, model, resolve_checkpoint(family, path))


def randomise(model: torch.nn.Module) -> None:
    """Give every parameter a part in the result: fresh models have zero biases and unit norms."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2 or "position" in name or "cls" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(4)


def session(model: ir.Model, path: Path) -> ort.InferenceSession:
    """Save a graph beside the weights it refers to and load it; standard operators only."""
    ir.save(model, path)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@dataclass
class Decoder:
    """A decoder session with its static cache, fed a chunk at a time."""

    session: ort.InferenceSession
    config: DecoderConfig
    batch: int
    cache: int
    dtype: str = "fp32"

    def __post_init__(self) -> None:
        c, kind = self.config, NUMPY[self.dtype]
        shape = (self.batch, c.num_kv_heads, self.cache, c.head_dim)
        # Garbage, not zeros: what was never written must never be seen.
        self.past = {f"past_{z}.{i}": np.full(shape, 7.0, kind) for i in range(c.num_layers) for z in "kv"}
        self.named = [o.name for o in self.session.get_outputs()]
        self.last: dict[str, np.ndarray] = {}

    def run(self, embeds, write, logits_at, positions=None, **extra) -> np.ndarray:
        """Run S tokens of each row at ``write`` [B]; return logits [B, R, V] and keep the new cache."""
        write = np.asarray(write, np.int64)
        if positions is None:
            axes = np.arange(embeds.shape[1])[None] + write[:, None]
            positions = np.repeat(axes[None], self.config.position_axes, 0)
        feed = {
            "inputs_embeds": np.asarray(embeds, NUMPY[self.dtype]),
            "position_ids": np.asarray(positions, np.int64),
            "write_indices": write,
            "logits_at": np.asarray(logits_at, np.int64),
            **self.past,
            **extra,
        }
        self.last = dict(zip(self.named, self.session.run(None, feed), strict=True))
        for name in self.past:
            self.past[name] = self.last[name.replace("past", "present")]
        return self.last["logits"]


def decode(decoder: Decoder, embeds: list[np.ndarray], prompts: list[int]) -> list[np.ndarray]:
    """Teacher-forced run of ragged rows: one right-padded prefill, then one token a row and step.

    ``embeds[b]`` is [total_b, d] with the same number of tokens after each prompt. Returns the logits of
    every position, [total_b, V] a row.
    """
    longest, steps = max(prompts), len(embeds[0]) - prompts[0]
    prefill = np.zeros((len(embeds), longest, embeds[0].shape[1]), np.float32)
    for b, (row, n) in enumerate(zip(embeds, prompts, strict=True)):
        prefill[b, :n] = row[:n]
        prefill[b, n:] = 3.0
    everywhere = np.tile(np.arange(longest), (len(embeds), 1))
    first = decoder.run(prefill, np.zeros(len(embeds)), everywhere)
    rows = [[*first[b, :n]] for b, n in enumerate(prompts)]
    for step in range(steps):
        token = np.stack([row[n + step] for row, n in zip(embeds, prompts, strict=True)])[:, None]
        logits = decoder.run(token, np.asarray(prompts) + step, np.zeros((len(embeds), 1)))
        for b, row in enumerate(rows):
            row.append(logits[b, 0])
    return [np.stack(row) for row in rows]


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference, as a part of the largest expected magnitude."""
    return float(np.abs(found.astype(np.float64) - expected).max() / np.abs(expected).max())


def stored(state: dict[str, torch.Tensor], path: Path):
    """Write tensors under canonical names into one safetensors file; return their references."""
    write_safetensors(path, {name: from_array(t.detach().numpy().copy()) for name, t in state.items()})
    return read_header(path)
