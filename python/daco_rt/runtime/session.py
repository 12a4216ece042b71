"""What every session is: a decoder with a cache, whatever engine runs it.

A session knows tensors only: embeddings in, logits and steering reports out. Prompts, sampling and text
belong to `daco_rt.runtime.generate`. This module checks what is asked and walks through prompts; a session
for an engine adds how one step and the vision tower are run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from daco_rt.errors import DacoError, PolicyError
from daco_rt.models.config import DecoderConfig
from daco_rt.models.embedding import TokenEmbedding
from daco_rt.runtime.cache import KvCache
from daco_rt.runtime.telemetry import BlockRows

if TYPE_CHECKING:
    from daco_rt.artifacts import Pack
    from daco_rt.artifacts.bundle import Bundle


class Step(NamedTuple):
    """What one run of the decoder returned."""

    logits: NDArray[np.float32]
    """Shape [B, R, V]: the rows asked for by ``logits_at``."""
    reports: dict[int, BlockRows]
    """Steered block -> doses [B, S, 2] and, if exported, the support [B, S, k_out]."""


@dataclass(frozen=True)
class SessionInfo:
    """What a session runs on."""

    operator: str
    """"native" (the custom-op library), "plugin" (TensorRT's), "functions" (the portable form inside the
    file), or "none" (the bundle was exported without steering)."""
    library: str | None
    """Path of the library in use."""
    reason: str
    """Why this operator form was taken."""
    precision: str
    """Dtype of activations and cache: "fp32", "fp16" or "bf16"."""
    onnxruntime: str
    """Version of ONNX Runtime; empty where TensorRT runs the decoder."""
    threads: int
    """Intra-op threads; 0 leaves the choice to ONNX Runtime."""
    tensorrt: str = ""
    """Version of TensorRT; empty where ONNX Runtime runs the decoder."""


class DecoderSession(ABC):
    """Token embeddings, prompts and decoding over a bundle; engines fill in the rest.

    A subclass calls ``_open_bundle`` first and sets ``info``, ``dtype`` and ``blocks``. One session may serve
    several threads, each with its own cache.

    Example
    -------
    >>> session = OnnxSession("bundle")                                       # doctest: +SKIP
    >>> cache = session.new_cache(1, 64)                                      # doctest: +SKIP
    >>> step = session.prefill(cache, session.embed(ids), slots, [5])         # doctest: +SKIP
    """

    bundle: Bundle
    config: DecoderConfig
    info: SessionInfo
    dtype: np.dtype[Any]
    """Of embeddings, activations and caches."""
    blocks: tuple[int, ...]
    """Steered blocks, in the order of the graph."""
    widest: int | None = None
    """Most positions that one run takes; None has no limit."""

    def _open_bundle(self, bundle: str | Path | Bundle, verify: bool) -> None:
        if isinstance(bundle, str | Path):
            from daco_rt.artifacts.bundle import load_bundle

            bundle = load_bundle(bundle, verify=verify)
        self.bundle = bundle
        self.config = DecoderConfig.from_dict(bundle.decoder)
        table = bundle.embedding_ref()
        self._embedding = TokenEmbedding(table.file, table.offset, table.shape, table.dtype)

    @abstractmethod
    def _run(self, cache: KvCache, feed: dict[str, np.ndarray]) -> Step:
        """Run one step: ``feed`` holds the graph's inputs but the caches; ``policy_slots`` [B, S] is given
        even where the graph has none."""

    @abstractmethod
    def encode_images(self, pixel_values: NDArray[np.floating], *, tiles_at_once: int = 4) -> np.ndarray:
        """Return image embeddings [tiles, image_seq_length, d] of tiles [tiles, 3, H, W].

        The vision tower is loaded at the first call and runs on ``tiles_at_once`` tiles at a time, which
        bounds its memory for an image of many tiles.
        """

    @abstractmethod
    def new_cache(self, batch: int, length: int) -> KvCache:
        """Return an empty cache of at least ``length`` positions (see
        `daco_rt.runtime.cache.cache_length`)."""

    @property
    def pack(self) -> Pack | None:
        """The pack baked into the bundle; None if it was exported without one."""
        return self.bundle.pack()

    @property
    def max_length(self) -> int:
        """Longest prompt plus answer, in tokens."""
        return self.bundle.max_length

    def embed(self, ids: NDArray[np.integer]) -> np.ndarray:
        """Return the embeddings of token ids, shape ``ids.shape + (d,)``, in the activation dtype."""
        return self._embedding.lookup(ids, dtype=self.info.precision)

    def prefill(
        self,
        cache: KvCache,
        embeds: np.ndarray,
        slots: NDArray[np.integer],
        lengths: NDArray[np.integer],
        *,
        position_ids: NDArray[np.integer] | None = None,
        chunk: int | None = None,
    ) -> Step:
        """Run right-padded prompts and return the logits [B, 1, V] after each row's last token.

        Parameters
        ----------
        cache : KvCache
            Fresh, of the same batch.
        embeds : array, shape [B, S, d]
        slots : int array, shape [B, S]
            Policy slot of each token, 0 on padding.
        lengths : int array, shape [B]
            Tokens of each row; 1 to S.
        position_ids : int array, shape [P, B, S], optional
            Rotary positions; by default 0, 1, 2, … on every axis.
        chunk : int, optional
            Run at most this many positions at once, which bounds the memory of attention; an engine that was
            built for narrower runs bounds it too.
        """
        embeds, slots, n = np.asarray(embeds), np.asarray(slots), np.asarray(lengths, np.int64)
        width = embeds.shape[1]
        if n.shape != (cache.batch,) or (n < 1).any() or (n > width).any():
            raise ValueError(
                f"prefill: lengths must be {cache.batch} numbers within 1 and {width}, got {n.tolist()}"
            )
        if position_ids is None:
            axes = self.config.position_axes
            position_ids = np.broadcast_to(np.arange(width), (axes, cache.batch, width))
        size = min(chunk or width, self.widest or width)
        steps: list[dict[int, BlockRows]] = []
        logits = np.empty((cache.batch, 1, self.config.vocab_size), np.float32)
        for start in range(0, width, size):
            end = min(start + size, width)
            last = n - 1 - start
            cache.lengths[:] = start
            step = self.forward(
                cache,
                embeds[:, start:end],
                slots[:, start:end],
                logits_at=np.clip(last, 0, end - start - 1)[:, None],
                position_ids=position_ids[:, :, start:end],
            )
            here = (last >= 0) & (last < end - start)
            logits[here] = step.logits[here]
            steps.append({block: rows.copy() for block, rows in step.reports.items()})
        cache.lengths[:] = n
        real = np.arange(width)[None, :] < n[:, None]
        cache.next_position[:] = np.where(real, np.asarray(position_ids).max(axis=0), -1).max(axis=1) + 1
        return Step(
            logits, {block: BlockRows.join([s[block] for s in steps], axis=1) for block in self.blocks}
        )

    def decode(
        self,
        cache: KvCache,
        token_ids: NDArray[np.integer],
        slots: NDArray[np.integer],
        *,
        active: NDArray[np.bool_] | None = None,
    ) -> Step:
        """Run one token a row and return the logits after it.

        Parameters
        ----------
        token_ids, slots : int arrays, shape [B]
        active : bool array, shape [B], optional
            Rows that go on. The others are computed but do not advance, so their result means nothing.
        """
        going = np.ones(cache.batch, np.bool_) if active is None else np.asarray(active, np.bool_)
        if (cache.lengths[going] >= cache.length).any():
            raise DacoError(
                f"the cache of {cache.length} positions is full; ask for fewer new tokens or a longer cache"
            )
        embeds = self.embed(np.asarray(token_ids)[:, None])
        step = self.forward(cache, embeds, np.asarray(slots)[:, None])
        cache.lengths[going] += 1
        cache.next_position[going] += 1
        return step

    def forward(
        self,
        cache: KvCache,
        embeds: np.ndarray,
        slots: NDArray[np.integer],
        *,
        logits_at: NDArray[np.integer] | None = None,
        position_ids: NDArray[np.integer] | None = None,
    ) -> Step:
        """Run S tokens a row, written to the cache from ``cache.lengths`` on, which this does not advance.

        ``logits_at`` [B, R] names the rows whose logits are wanted (default: the last). Logits, doses and
        supports are views of buffers that the next run of the same width overwrites.

        Raises
        ------
        ValueError
            A shape does not fit the graph or the cache.
        PolicyError
            A slot is not in the bundle's pack; unknown slots never reach the graph.
        """
        embeds = np.asarray(embeds)
        width = embeds.shape[1] if embeds.ndim == 3 else 0
        expected = (cache.batch, width, self.config.hidden_size)
        if embeds.shape != expected or width == 0:
            raise ValueError(f"forward: embeds must have shape {list(expected)}, got {list(embeds.shape)}")
        if int(cache.lengths.max()) + width > cache.length and width > 1:
            raise ValueError(
                f"forward: {width} tokens after {int(cache.lengths.max())} do not fit "
                f"a cache of {cache.length}"
            )
        slots = self._checked_slots(slots, (cache.batch, width))
        at = np.full((cache.batch, 1), width - 1) if logits_at is None else np.asarray(logits_at, np.int64)
        if at.ndim != 2 or at.shape[0] != cache.batch or (at < 0).any() or (at >= width).any():
            raise ValueError(
                f"forward: logits_at must have shape [{cache.batch}, R] with entries in [0, {width}), "
                f"got shape {list(at.shape)}"
            )
        feed = {
            "inputs_embeds": embeds,
            "logits_at": at,
            # A finished row stays where it is; a full one is clamped, for what it computes is ignored.
            "write_indices": np.minimum(cache.lengths, cache.length - width),
            "position_ids": cache.next_position[None, :, None] + np.arange(width)
            if position_ids is None
            else np.asarray(position_ids),
            "policy_slots": slots,
        }
        return self._run(cache, feed)

    def _checked_slots(self, slots: NDArray[np.integer], shape: tuple[int, int]) -> NDArray[np.int32]:
        found = np.asarray(slots)
        if found.shape != shape or not np.issubdtype(found.dtype, np.integer):
            raise ValueError(
                f"forward: slots must be integers of shape {list(shape)}, "
                f"got {found.dtype} {list(found.shape)}"
            )
        count = 1 if self.pack is None else self.pack.slots_count
        if (found < 0).any() or (found >= count).any():
            bad = sorted(set(found[(found < 0) | (found >= count)].tolist()))
            raise PolicyError(f"policy slots {bad} are not in this bundle, which has slots 0 to {count - 1}")
        return found.astype(np.int32)
