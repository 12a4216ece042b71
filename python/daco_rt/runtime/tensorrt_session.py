"""A bundle's engine in TensorRT, with the interface of every session.

What a step means is here: which profile runs, which arrays it gets, which outputs come back, where the caches
lie. How an engine is run is behind `EngineRunner`, which `daco_rt.runtime.tensorrt_engine` implements with
TensorRT and torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from daco_rt.artifacts.engine import Engine, TensorRTPlan, load_engine, plugin_path
from daco_rt.errors import ArtifactError, DacoError
from daco_rt.runtime.cache import KvCache
from daco_rt.runtime.session import DecoderSession, SessionInfo, Step
from daco_rt.runtime.telemetry import BlockRows

if TYPE_CHECKING:
    from daco_rt.artifacts.bundle import Bundle

PREFILL, DECODE = 0, 1
"""The decoder's profiles, in the order in which an engine has them."""
DTYPES: dict[str, np.dtype[Any]] = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True)
class Port:
    """An input or output of an engine; open axes are −1."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    is_input: bool


class EngineRunner(Protocol):
    """One engine, ready to run. Caches are device arrays that it makes and that only it looks into."""

    version: str
    """Of TensorRT."""

    def ports(self) -> list[Port]:
        """Return inputs and outputs, in the engine's order."""

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        """Return a device array of zeros."""

    def rows(self, array: Any, rows: NDArray[np.integer]) -> Any:
        """Return a device array of these rows alone, copied."""

    def run(
        self,
        profile: int,
        feed: Mapping[str, np.ndarray],
        outputs: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]],
        in_place: Mapping[str, Any],
    ) -> dict[str, np.ndarray]:
        """Run under a profile and wait for the result.

        ``feed`` are host arrays by input, ``outputs`` shapes and dtypes by output, ``in_place`` device
        arrays by input *or* output: an array that is named as both is updated where it lies. Returns
        ``outputs``.
        """


@dataclass
class DeviceCache(KvCache):
    """A cache in device memory."""

    pick: Callable[[Any, NDArray[np.integer]], Any] | None = None

    def keep(self, rows: NDArray[np.integer]) -> DeviceCache:
        """Return a cache of these rows alone (copied)."""
        pick = self.pick
        if pick is None:
            raise ValueError("keep: this cache was made without a way to pick rows")
        arrays = {name: pick(array, rows) for name, array in self.arrays.items()}
        return DeviceCache(
            len(rows), self.length, arrays, self.lengths[rows], self.next_position[rows], pick=pick
        )


class TensorRTSession(DecoderSession):
    """Decoder and vision tower of a bundle as engines.

    One session serves one thread at a time: an execution context holds the state of its run.

    Parameters
    ----------
    bundle : path or Bundle
        Exported with ``--runtime tensorrt``.
    verify : bool
        Hash the bundle's files, the plugin library and the engine before they are used.
    open_engine : callable, optional
        From the path of a plan and of the plugin library (None where nothing is steered) to a runner.

    Raises
    ------
    ArtifactError
        The bundle has no engine, or one that was built from another graph, pack or plugin.
    DacoError
        TensorRT, or a GPU, is not at hand.

    Example
    -------
    >>> session = TensorRTSession("bundles/smol-internvl-trt")                # doctest: +SKIP
    >>> session.info.operator                                                 # doctest: +SKIP
    'plugin'
    """

    def __init__(
        self,
        bundle: str | Path | Bundle,
        *,
        verify: bool = True,
        open_engine: Callable[[Path, Path | None], EngineRunner] | None = None,
    ) -> None:
        self._open_bundle(bundle, verify)
        self.plan = TensorRTPlan.of(self.bundle)
        self.engine: Engine = load_engine(self.bundle, verify=verify)
        plugin = plugin_path(self.bundle) if self.engine.operators == "plugin" else None
        if open_engine is None:
            from daco_rt.runtime.tensorrt_engine import TensorRTRunner

            open_engine = TensorRTRunner
        self._open_engine = open_engine
        self._decoder = open_engine(self.engine.decoder, plugin)
        self._vision: EngineRunner | None = None
        self._outputs = {port.name: port for port in self._decoder.ports() if not port.is_input}
        self._inputs = {port.name: port for port in self._decoder.ports() if port.is_input}
        self.dtype = DTYPES[self.bundle.precision]
        self.widest = self.plan.max_width
        self.blocks = tuple(
            int(name.partition(".")[2]) for name in self._outputs if name.startswith("doses.")
        )
        self._check()
        self.info = SessionInfo(
            operator=self.engine.operators,
            library=None if plugin is None else str(plugin),
            reason=f"the engine was built for {self.engine.device}",
            precision=self.bundle.precision,
            onnxruntime="",
            threads=0,
            tensorrt=self._decoder.version,
        )

    def encode_images(self, pixel_values: NDArray[np.floating], *, tiles_at_once: int = 4) -> np.ndarray:
        """Return image embeddings [tiles, image_seq_length, d] of tiles [tiles, 3, H, W].

        The vision tower is loaded at the first call and runs on ``tiles_at_once`` tiles at a time, at most
        as many as the engine was built for.
        """
        if self._vision is None:
            if self.engine.vision is None:
                raise DacoError(
                    f"{self.engine.folder} has no engine of a vision tower, so this bundle cannot take images"
                )
            self._vision = self._open_engine(self.engine.vision, None)
        ports = self._vision.ports()
        pixels_port = next(port for port in ports if port.is_input)
        out = next(port for port in ports if not port.is_input)
        pixels = np.ascontiguousarray(pixel_values, dtype=pixels_port.dtype)
        if pixels.shape[1:] != pixels_port.shape[1:]:
            raise DacoError(
                f"image tiles must be {pixels_port.shape[2]} x {pixels_port.shape[3]} pixels for this "
                f"vision tower, got {pixels.shape[2]} x {pixels.shape[3]}; the processor does not belong to "
                "this bundle"
            )
        size = min(tiles_at_once, self.plan.max_tiles)
        parts = []
        for at in range(0, len(pixels), size):
            piece = pixels[at : at + size]
            shape = (len(piece), *out.shape[1:])
            found = self._vision.run(0, {pixels_port.name: piece}, {out.name: (shape, out.dtype)}, {})
            parts.append(found[out.name])
        return np.concatenate(parts).astype(self.dtype, copy=False)

    def new_cache(self, batch: int, length: int) -> KvCache:
        """Return an empty cache in device memory, of the engine's length whatever ``length`` is asked for.

        Raises
        ------
        DacoError
            The engine was not built for so many rows or so long a cache.
        """
        if not 1 <= batch <= self.plan.max_batch:
            raise DacoError(
                f"this engine runs 1 to {self.plan.max_batch} requests together, got {batch}; "
                "lower the batch size, or export with a larger --max-batch"
            )
        if length > self.plan.cache_length:
            raise DacoError(
                f"this engine's cache holds {self.plan.cache_length} positions, {length} are needed; "
                "export with a larger --max-length"
            )
        config = self.config
        shape = (batch, config.num_kv_heads, self.plan.cache_length, config.head_dim)
        arrays = {
            f"{z}.{i}": self._decoder.zeros(shape, self.dtype) for i in range(config.num_layers) for z in "kv"
        }
        empty = (np.zeros(batch, np.int64), np.zeros(batch, np.int64))
        return DeviceCache(batch, self.plan.cache_length, arrays, *empty, pick=self._decoder.rows)

    def _run(self, cache: KvCache, feed: dict[str, np.ndarray]) -> Step:
        batch, width = feed["inputs_embeds"].shape[:2]
        if feed["logits_at"].shape[1] != 1:
            raise ValueError("forward: an engine returns the logits of one row a request")
        arrays = {
            name: np.ascontiguousarray(value, dtype=self._inputs[name].dtype)
            for name, value in feed.items()
            if name in self._inputs
        }
        outputs = {
            name: (_filled(port, batch, width), port.dtype)
            for name, port in self._outputs.items()
            if not name.startswith("present_")
        }
        in_place = {}
        for name, array in cache.arrays.items():
            letter, layer = name.split(".")
            in_place[f"past_{letter}.{layer}"] = in_place[f"present_{letter}.{layer}"] = array
        found = self._decoder.run(DECODE if width == 1 else PREFILL, arrays, outputs, in_place)
        reports = {
            block: BlockRows(
                found[f"doses.{block}"],
                found.get(f"support_index.{block}"),
                found.get(f"support_value.{block}"),
            )
            for block in self.blocks
        }
        return Step(found["logits"].astype(np.float32, copy=False), reports)

    def _check(self) -> None:
        """The engine must be the one that the manifest speaks of, whoever built it."""
        where = self.engine.decoder
        if sorted(self.blocks) != sorted(self.bundle.steered_blocks):
            raise ArtifactError(
                f"{where} reports on blocks {list(self.blocks)}, the bundle steers "
                f"{list(self.bundle.steered_blocks)}; build the engine again"
            )
        embeds = self._inputs.get("inputs_embeds")
        if embeds is None or embeds.dtype != self.dtype:
            got = "nothing of that name" if embeds is None else embeds.dtype.name
            raise ArtifactError(
                f"{where}: inputs_embeds must be {self.bundle.precision}, got {got}; build the engine again"
            )
        cache = self._inputs.get("past_k.0")
        if cache is None or cache.shape[2] != self.plan.cache_length:
            raise ArtifactError(
                f"{where} was not built for a cache of {self.plan.cache_length} positions; build it again"
            )


def _filled(port: Port, batch: int, width: int) -> tuple[int, ...]:
    """Shape of an output of one run: [B, 1, V] for logits, [B, S, ·] for reports."""
    return (batch, 1 if port.name == "logits" else width, *port.shape[2:])
