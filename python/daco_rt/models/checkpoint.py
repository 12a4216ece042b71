"""An opened checkpoint, what artifacts record of it, and the check of its weights.

A checkpoint is a folder in Hugging Face's layout with safetensors weights. The tensors stay where they are,
as references; :mod:`daco_rt.models.resolve` finds and opens one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from daco_rt.artifacts.identity import ModelIdentity
from daco_rt.artifacts.tensors import TensorRef
from daco_rt.errors import CheckpointError
from daco_rt.models.config import DecoderConfig

_CHUNK = 1 << 20
# Mask of an element's exponent and mantissa, and the smallest such pattern that is no finite number.
NON_FINITE = {
    "F64": (np.uint64, 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000000),
    "F32": (np.uint32, 0x7FFFFFFF, 0x7F800000),
    "F16": (np.uint16, 0x7FFF, 0x7C00),
    "BF16": (np.uint16, 0x7FFF, 0x7F80),
}


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    ``path`` is its folder, ``label`` what to call it in output, ``family`` the name of its family, ``config``
    its parsed ``config.json``, ``decoder`` the language model's sizes, ``tensors`` every stored tensor by
    stored name, ``canonical`` and ``vision`` the stored names behind the names that graphs use.
    """

    path: Path
    label: str
    family: str
    config: dict[str, Any]
    decoder: DecoderConfig
    tensors: Mapping[str, TensorRef]
    canonical: Mapping[str, str]
    vision: Mapping[str, str]

    def ref(self, name: str) -> TensorRef:
        """Return where a tensor lies, by stored or canonical name; raises ``CheckpointError`` if unknown."""
        stored = name if name in self.tensors else self.canonical.get(name, self.vision.get(name, ""))
        if stored not in self.tensors:
            raise CheckpointError(f"{self.path}: the checkpoint has no tensor {name!r}")
        return self.tensors[stored]

    def read(self, name: str) -> np.ndarray:
        """Return a read-only, memory-mapped array of a tensor, by stored or canonical name."""
        return self.ref(name).read()

    def text_weights(self) -> dict[str, TensorRef]:
        """Canonical name → reference of every tensor of the language model."""
        return {name: self.tensors[stored] for name, stored in self.canonical.items()}

    def vision_weights(self) -> dict[str, TensorRef]:
        """Canonical name → reference of every tensor of the vision tower and projector."""
        return {name: self.tensors[stored] for name, stored in self.vision.items()}


def model_identity(checkpoint: Checkpoint) -> ModelIdentity:
    """Return what artifacts record about the language model: sizes and 64 sampled weights.

    Sixteen values each from the closing norm and from the down projections of the first, middle and last
    block, at places that depend on nothing but the tensors' sizes.
    """
    c = checkpoint.decoder
    names = [f"layers.{i}.mlp.down_proj.weight" for i in (0, c.num_layers // 2, c.num_layers - 1)]
    samples: list[float] = []
    for stream, name in enumerate([*names, "norm.weight"]):
        values = checkpoint.read(name).reshape(-1)
        samples.extend(float(values[i]) for i in _places(stream, 16, values.size))
    if not np.isfinite(samples).all():
        raise CheckpointError(f"{checkpoint.path}: the weights contain NaN or infinity; the file is damaged")
    return ModelIdentity(
        hidden_size=c.hidden_size,
        num_hidden_layers=c.num_layers,
        vocab_size=c.vocab_size,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        model_type=str(checkpoint.config.get("model_type", c.model_type)),
        samples=tuple(samples),
    )


def check_finite(
    refs: Iterable[TensorRef], *, at_most: int | None = None, progress: Callable[[int], None] | None = None
) -> None:
    """Raise ``CheckpointError`` naming the first tensor that holds NaN or infinity.

    Files are read in small pieces rather than mapped, so that a check's memory does not grow with the model.
    With ``at_most`` no more than about that many bytes are read, in pieces spread evenly over the weights.
    ``progress`` is called with the bytes just read.
    """
    refs = list(refs)
    every = 1 if at_most is None else max(1, -(-sum(ref.nbytes for ref in refs) // at_most))
    count = 0
    for ref in refs:
        kind, mask, limit = NON_FINITE[ref.dtype]
        with open(ref.file, "rb", buffering=0) as file:
            for start in range(0, ref.nbytes, _CHUNK):
                count += 1
                if count % every:
                    continue
                raw = os.pread(file.fileno(), min(_CHUNK, ref.nbytes - start), ref.offset + start)
                if not raw or len(raw) % np.dtype(kind).itemsize:
                    raise CheckpointError(f"{ref.file}: ends inside tensor {ref.name!r}; download it again")
                if (np.frombuffer(raw, kind) & kind(mask)).max() >= limit:
                    raise CheckpointError(
                        f"{ref.file}: tensor {ref.name!r} holds NaN or infinity; the checkpoint is damaged or"
                        " was saved from a diverged training run"
                    )
                if progress is not None:
                    progress(len(raw))


def _places(stream: int, count: int, size: int) -> list[int]:
    """``count`` fixed positions below ``size``, by splitmix64: the same in every version of every library."""
    wrap, places = (1 << 64) - 1, []
    for i in range(count):
        z = (0x9E3779B97F4A7C15 * (stream * count + i + 1)) & wrap
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & wrap
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & wrap
        places.append((z ^ (z >> 31)) % size)
    return places
