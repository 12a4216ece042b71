"""The key/value cache of a batch: static buffers that the graph writes in place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from daco_rt.errors import DacoError

ROUND_TO = 64
"""Cache lengths are multiples of this, so that batches of similar lengths share shapes."""


def cache_length(prompt: int, new_tokens: int, max_length: int) -> int:
    """Return the cache length for ``prompt`` + ``new_tokens`` positions.

    Raises
    ------
    DacoError
        They do not fit into ``max_length``.

    Example
    -------
    >>> cache_length(70, 20, 2048)
    128
    """
    needed = prompt + new_tokens
    if needed > max_length:
        room = max_length - prompt
        mend = f"ask for at most {room} new tokens" if room > 0 else "shorten the prompt"
        raise DacoError(
            f"the prompt has {prompt} tokens and {new_tokens} new ones are asked for, but this bundle's "
            f"cache holds {max_length}; {mend}, or export with --max-length {needed} or more"
        )
    return min(-(-needed // ROUND_TO) * ROUND_TO, max_length)


@dataclass
class KvCache:
    """Keys and values of ``batch`` rows over ``length`` positions, and how far each row has come.

    The arrays are allocated once and bound as the graph's input and output alike, so a step writes its
    new positions and copies nothing.
    """

    batch: int
    length: int
    arrays: dict[str, np.ndarray]
    """``k.{i}`` and ``v.{i}`` -> array [batch, kv_heads, length, head_dim]."""
    lengths: NDArray[np.int64]
    """Tokens written so far, shape [batch]; the next one goes here."""
    next_position: NDArray[np.int64]
    """Rotary position of the next token, shape [batch]."""
    bindings: dict[int, Any] = field(default_factory=dict, repr=False)
    """Rows of logits -> buffers of a one-token step, kept by the session that made this cache."""

    @classmethod
    def allocate(
        cls, batch: int, length: int, *, layers: int, kv_heads: int, head_dim: int, dtype: np.dtype[Any]
    ) -> KvCache:
        """Return an empty cache; the memory is zeroed so that masked positions hold finite numbers."""
        shape = (batch, kv_heads, length, head_dim)
        arrays = {f"{z}.{i}": np.zeros(shape, dtype) for i in range(layers) for z in "kv"}
        return cls(batch, length, arrays, np.zeros(batch, np.int64), np.zeros(batch, np.int64))

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of keys and values, which is that of the activations."""
        return next(iter(self.arrays.values())).dtype

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(a.nbytes for a in self.arrays.values())

    def keep(self, rows: NDArray[np.integer]) -> KvCache:
        """Return a cache of these rows alone (copied)."""
        arrays = {name: np.ascontiguousarray(a[rows]) for name, a in self.arrays.items()}
        return KvCache(len(rows), self.length, arrays, self.lengths[rows], self.next_position[rows])
