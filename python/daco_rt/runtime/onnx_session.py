"""A bundle's graphs in ONNX Runtime: prefill and decode with an in-place cache, and the vision tower.

The session knows tensors only: embeddings in, logits and steering reports out. Prompts, sampling and text
belong to `daco_rt.runtime.generate`.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from daco_rt.errors import ArtifactError, DacoError, PolicyError
from daco_rt.models.config import DecoderConfig
from daco_rt.models.embedding import TokenEmbedding
from daco_rt.runtime.buffers import Buffers, Step, steered_blocks
from daco_rt.runtime.cache import KvCache
from daco_rt.runtime.telemetry import BlockRows

if TYPE_CHECKING:
    from daco_rt.artifacts import Pack
    from daco_rt.artifacts.bundle import Bundle

Library = Literal["auto", "require", "off"]
_DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
}


@dataclass(frozen=True)
class SessionInfo:
    """What a session runs on."""

    operator: str
    """"native" (the custom-op library), "functions" (the portable form inside the file), or "none" (the
    bundle was exported without steering)."""
    library: str | None
    """Path of the library in use."""
    reason: str
    """Why this operator form was taken."""
    precision: str
    """Dtype of activations and cache: "fp32" or "fp16"."""
    onnxruntime: str
    """Version of ONNX Runtime."""
    threads: int
    """Intra-op threads; 0 leaves the choice to ONNX Runtime."""


class OnnxSession:
    """Decoder, vision tower and token embeddings of a bundle.

    One session may serve several threads, each with its own cache.

    Parameters
    ----------
    bundle : path or Bundle
    library : "auto", "require" or "off"
        Use the custom-op library if it is installed, insist on it, or run the portable functions.
    threads : int, optional
        Intra-op threads; by default ONNX Runtime's own choice.
    verify : bool
        Hash the bundle's own files before they are used (referenced shards by their header).

    Raises
    ------
    ArtifactError
        A file of the bundle is missing or is no model that ONNX Runtime can load.
    DacoError
        The library is required (by the argument or the bundle) and cannot be used.

    Example
    -------
    >>> session = OnnxSession("bundle")                                       # doctest: +SKIP
    >>> cache = session.new_cache(1, 64)                                      # doctest: +SKIP
    >>> step = session.prefill(cache, session.embed(ids), slots, [5])         # doctest: +SKIP
    >>> step.logits.shape                                                     # doctest: +SKIP
    (1, 1, 49152)
    """

    def __init__(
        self,
        bundle: str | Path | Bundle,
        *,
        library: Library = "auto",
        threads: int | None = None,
        verify: bool = True,
    ) -> None:
        if isinstance(bundle, str | Path):
            from daco_rt.artifacts.bundle import load_bundle

            self.bundle: Bundle = load_bundle(bundle, verify=verify)
        else:
            self.bundle = bundle
        if threads is not None and threads < 1:
            raise DacoError(f"threads must be 1 or greater, got {threads}")
        self._threads = threads or 0
        path, reason = _pick_library(self.bundle, library)
        self.config = DecoderConfig.from_dict(self.bundle.decoder)
        self._decoder = self._open(self.bundle.decoder_path, path)
        self._vision: Any = None
        self._vision_lock = threading.Lock()
        table = self.bundle.embedding_ref()
        self._embedding = TokenEmbedding(table.file, table.offset, table.shape, table.dtype)
        found = next(i.type for i in self._decoder.get_inputs() if i.name == "inputs_embeds")
        if found not in _DTYPES:
            raise ArtifactError(f"{self.bundle.decoder_path} takes {found}; this runtime feeds fp32 or fp16")
        self.dtype = _DTYPES[found]
        self.blocks = steered_blocks(self._decoder)
        import onnxruntime

        self.info = SessionInfo(
            operator="native" if path is not None else "functions" if self.blocks else "none",
            library=None if path is None else str(path),
            reason=reason,
            precision="fp32" if self.dtype == np.float32 else "fp16",
            onnxruntime=onnxruntime.__version__,
            threads=self._threads,
        )

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

    def encode_images(self, pixel_values: NDArray[np.floating], *, tiles_at_once: int = 4) -> np.ndarray:
        """Return image embeddings [tiles, image_seq_length, d] of tiles [tiles, 3, H, W].

        The vision tower is loaded at the first call and runs on ``tiles_at_once`` tiles at a time, which
        bounds its memory for an image of many tiles.
        """
        with self._vision_lock:
            if self._vision is None:
                if self.bundle.vision_path is None:
                    raise DacoError(
                        f"{self.bundle.path} was exported without its vision tower, so it cannot take images"
                    )
                self._vision = self._open(self.bundle.vision_path)
        (declared,) = self._vision.get_inputs()
        wanted = _DTYPES.get(declared.type, np.dtype(np.float32))
        pixels = np.ascontiguousarray(pixel_values, dtype=wanted)
        height_width = tuple(declared.shape[2:])
        if all(isinstance(n, int) for n in height_width) and pixels.shape[2:] != height_width:
            raise DacoError(
                f"image tiles must be {height_width[0]} x {height_width[1]} pixels for this vision tower, "
                f"got {pixels.shape[2]} x {pixels.shape[3]}; the processor does not belong to this bundle"
            )
        parts = [
            self._vision.run(["image_embeds"], {declared.name: pixels[at : at + tiles_at_once]})[0]
            for at in range(0, len(pixels), tiles_at_once)
        ]
        return np.concatenate(parts).astype(self.dtype, copy=False)

    def new_cache(self, batch: int, length: int) -> KvCache:
        """Return an empty cache of ``length`` positions (see `daco_rt.runtime.cache.cache_length`)."""
        config = self.config
        return KvCache.allocate(
            batch,
            length,
            layers=config.num_layers,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=self.dtype,
        )

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
            Run at most this many positions at once, which bounds the memory of attention.
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
        size = chunk or width
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
        buffers = self._buffers(cache, width, at.shape[1])
        feed = buffers.inputs
        feed["inputs_embeds"][...] = embeds
        feed["logits_at"][...] = at
        # A finished row stays where it is; a full one is clamped, for what it computes is ignored.
        feed["write_indices"][...] = np.minimum(cache.lengths, cache.length - width)
        feed["position_ids"][...] = (
            cache.next_position[None, :, None] + np.arange(width) if position_ids is None else position_ids
        )
        if "policy_slots" in feed:
            feed["policy_slots"][...] = slots
        self._decoder.run_with_iobinding(buffers.binding)
        return buffers.step()

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

    def _open(self, path: Path, library: Path | None = None) -> Any:
        import onnxruntime

        if not path.is_file():
            raise ArtifactError(f"{path} is missing from the bundle; export it again")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self._threads
        if library is not None:
            try:
                options.register_custom_ops_library(str(library))
            except Exception as e:
                raise DacoError(
                    f"{library} cannot be loaded into ONNX Runtime {onnxruntime.__version__}: "
                    f"{_one_line(e)}; reinstall daco-rt, or run with the library off"
                ) from e
        try:
            return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as e:  # ONNX Runtime has one exception class a status code, all of Exception
            raise ArtifactError(f"{path} is no model that ONNX Runtime can load: {_one_line(e)}") from e

    def _buffers(self, cache: KvCache, width: int, rows: int) -> Buffers:
        # Prompt-wide buffers serve one run each; keeping them would hold their memory for the answer.
        if width > 1:
            return Buffers(self._decoder, self.config, cache, width, rows)
        if rows not in cache.bindings:
            cache.bindings[rows] = Buffers(self._decoder, self.config, cache, width, rows)
        found: Buffers = cache.bindings[rows]
        return found


def _pick_library(bundle: Bundle, library: Library) -> tuple[Path | None, str]:
    """Return (path or None, reason)."""
    from daco_rt._native import library_path

    if library not in ("auto", "require", "off"):
        raise DacoError(f"library must be 'auto', 'require' or 'off', got '{library}'")
    if not bundle.steered_blocks:
        return None, "no block is steered"
    if library == "off":
        if bundle.library_required:
            raise DacoError(
                f"{bundle.path} needs the custom-op library (its operator has no portable form), "
                "so it cannot run with the library off"
            )
        return None, "the library was turned off"
    try:
        return Path(library_path("onnxruntime")), "the library is installed"
    except DacoError as e:
        if library == "require" or bundle.library_required:
            who = "was asked for" if library == "require" else f"is needed by {bundle.path}"
            raise DacoError(f"the ONNX Runtime custom-op library {who} but is not at hand: {e}") from e
        return None, f"no library: {e}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
