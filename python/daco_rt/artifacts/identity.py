"""Which model an artifact was made for, told from its configuration and a few of its weights."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from daco_rt.errors import ArtifactError

# One rounding to bf16 moves a value by at most 2^-9 of it, to fp16 by 2^-12 or, if it is tiny, by 3e-8.
_RELATIVE, _ABSOLUTE = 2.0**-7, 1e-4


@dataclass(frozen=True)
class ModelIdentity:
    """The text model behind a dictionary, an SAE, a pack or a bundle.

    ``samples`` are weights read at fixed places of fixed tensors. The same text weights may sit in several
    families and precisions, so only ``hidden_size``, ``num_hidden_layers`` and the samples (within one
    rounding to bf16 or fp16) decide; the rest tells people what it was.

    Example
    -------
    >>> llama = ModelIdentity(576, 30, 49152, 9, 3, "llama", (0.1,))
    >>> llama.matches(ModelIdentity(576, 30, 49280, 9, 3, "qwen2", (0.1,)))
    True
    """

    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    num_attention_heads: int
    num_key_value_heads: int
    model_type: str
    samples: tuple[float, ...]

    def matches(self, other: ModelIdentity) -> bool:
        """Whether both are the same text model."""
        return self.difference(other) is None

    def difference(self, other: ModelIdentity) -> str | None:
        """Say what differs ("made for hidden_size 576, the model has 896"), or None if nothing that counts.

        ``self`` is what an artifact was made for, ``other`` the model at hand.
        """
        for name in ("hidden_size", "num_hidden_layers"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"made for {name} {mine}, the model has {theirs}"
        if len(self.samples) != len(other.samples):
            return f"made with {len(self.samples)} sampled weights, the model gives {len(other.samples)}"
        far = sum(not _close(a, b) for a, b in zip(self.samples, other.samples, strict=True))
        if far:
            return (
                f"made for other weights of a {self.model_type} model of the same size "
                f"({far} of {len(self.samples)} sampled weights differ)"
            )
        return None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "samples": list(self.samples)}

    @classmethod
    def from_dict(cls, data: Any, where: str = "model identity") -> ModelIdentity:
        """Read what ``to_dict`` wrote; ``where`` names the file in the error.

        Raises
        ------
        ArtifactError
            If a field is missing or of another type.
        """
        counts = (
            "hidden_size",
            "num_hidden_layers",
            "vocab_size",
            "num_attention_heads",
            "num_key_value_heads",
        )
        try:
            numbers = [data[name] for name in counts]
            kind, samples = data["model_type"], tuple(float(value) for value in data["samples"])
            bad = not isinstance(kind, str) or not all(type(n) is int and n >= 0 for n in numbers)
            if bad or not all(map(math.isfinite, samples)):
                raise ValueError
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(
                f"{where}: the model identity must hold {', '.join(counts)} (integers), model_type (text) "
                f"and samples (finite numbers), got {str(data)[:120]}; make the artifact again"
            ) from error
        return cls(**dict(zip(counts, numbers, strict=True)), model_type=kind, samples=samples)


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= _RELATIVE * max(abs(a), abs(b)) + _ABSOLUTE
