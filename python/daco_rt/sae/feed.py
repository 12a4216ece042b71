"""Rows in random order from a source that gives them chunk by chunk, with a position that can be restored.

The order is a function of the seed alone. Within an epoch the chunks come in a random order, as many at a
time as fill the buffer, and the rows of a buffer are shuffled among themselves. So the position is three
integers: a training that is resumed reads on at the very next row, without having stored the buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from daco_rt.errors import DacoError
from daco_rt.sae.store import ActivationStore


class RowSource(Protocol):
    """Where rows come from. ``chunk`` must return the same rows whenever it is asked.

    ``dim`` is d, ``chunks`` the number of chunks; ``describe`` returns JSON that is equal only for equal
    sources, up to the place where they lie.
    """

    @property
    def dim(self) -> int: ...

    @property
    def chunks(self) -> int: ...

    def chunk(self, index: int) -> np.ndarray: ...

    def describe(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class StoreSource:
    """The rows of one block of an activation store; a chunk is a shard.

    Example
    -------
    >>> StoreSource(open_store("stores/smol"), 16).chunk(0).shape
    (4096, 576)
    """

    store: ActivationStore
    block: int

    @property
    def dim(self) -> int:
        """Return the width of the rows."""
        return self.store.dim

    @property
    def chunks(self) -> int:
        """Return the number of shards."""
        return self.store.shards

    def chunk(self, index: int) -> np.ndarray:
        """Return the rows of one shard, [n, d]."""
        return self.store.chunk(self.block, index)

    def describe(self) -> dict[str, Any]:
        """Return what the rows are, for the artifact."""
        return {
            "kind": "store",
            "block": self.block,
            "rows": self.store.rows(self.block),
            "shards": self.store.shards,
            "dtype": self.store.dtype,
            "recipe": self.store.recipe,
        }


class ShuffledRows:
    """Endless batches from some chunks of a source.

    Parameters
    ----------
    source : where rows come from.
    chunks : which of its chunks.
    batch : rows in a batch.
    buffer_rows : rows that are shuffled together, at least; all chunks that the last of them needs are held.
    seed : decides the order.

    Example
    -------
    >>> feed = ShuffledRows(source, range(source.chunks), batch=1024, buffer_rows=1 << 18, seed=0)
    >>> feed.draw().shape
    (1024, 576)
    """

    def __init__(
        self, source: RowSource, chunks: Sequence[int], *, batch: int, buffer_rows: int, seed: int
    ) -> None:
        self._source, self._chunks = source, list(chunks)
        self._batch, self._rows, self._seed = batch, buffer_rows, seed
        self._epoch = self._first = self._offset = 0
        self._next = 0
        self._buffer: np.ndarray | None = None
        self._order = np.zeros(0, np.int64)

    @property
    def state(self) -> tuple[int, int, int]:
        """Return the position: epoch, chunks of it that are used up, rows of the buffer that are used up."""
        return self._epoch, self._first, self._offset

    def restore(self, state: Sequence[int]) -> None:
        """Go to a position that ``state`` once gave."""
        self._epoch, self._first, self._offset = map(int, state)
        self._buffer = None

    def draw(self) -> np.ndarray:
        """Return the next batch, fp32 [batch, d].

        Raises
        ------
        DacoError
            If the chunks hold no row at all.
        """
        parts, need = [], self._batch
        while need:
            if self._buffer is None:
                self._fill()
            assert self._buffer is not None
            picked = self._order[self._offset : self._offset + need]
            parts.append(self._buffer[picked].astype(np.float32))
            self._offset += len(picked)
            need -= len(picked)
            if self._offset == len(self._order):
                self._buffer, self._first, self._offset = None, self._next, 0
                if self._first == len(self._chunks):
                    self._epoch, self._first = self._epoch + 1, 0
        return np.concatenate(parts)

    def _fill(self) -> None:
        order = np.random.default_rng((self._seed, self._epoch, 0)).permutation(self._chunks)
        held: list[np.ndarray] = []
        count, at = 0, self._first
        while at < len(order) and (count < self._rows or not count):
            held.append(np.asarray(self._source.chunk(int(order[at]))))
            count += len(held[-1])
            at += 1
        if self._first == 0 and not count:
            raise DacoError("the source of activations holds no rows; give it longer texts, or more")
        self._buffer, self._next = np.concatenate(held), at
        self._order = np.random.default_rng((self._seed, self._epoch, 1 + self._first)).permutation(count)
