"""A bundle's graphs in ONNX Runtime: prefill and decode with an in-place cache, and the vision tower."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from daco_rt.errors import ArtifactError, DacoError
from daco_rt.runtime.buffers import Buffers, steered_blocks
from daco_rt.runtime.cache import KvCache
from daco_rt.runtime.session import DecoderSession, SessionInfo, Step

if TYPE_CHECKING:
    from daco_rt.artifacts.bundle import Bundle

Library = Literal["auto", "require", "off"]
_DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
}


class OnnxSession(DecoderSession):
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
        self._open_bundle(bundle, verify)
        if threads is not None and threads < 1:
            raise DacoError(f"threads must be 1 or greater, got {threads}")
        self._threads = threads or 0
        if self.bundle.precision == "bf16":
            raise DacoError(
                f"{self.bundle.path} is in bf16, which ONNX Runtime does not compute on CPU; run it in "
                "TensorRT, or export with --precision fp16"
            )
        path, reason = _pick_library(self.bundle, library)
        self._decoder = self._open(self.bundle.decoder_path, path)
        self._vision: Any = None
        self._vision_lock = threading.Lock()
        found = next(i.type for i in self._decoder.get_inputs() if i.name == "inputs_embeds")
        if found not in _DTYPES:
            raise ArtifactError(f"{self.bundle.decoder_path} takes {found}; this runtime feeds fp32 or fp16")
        self.dtype = _DTYPES[found]
        axis = next(i.shape[2] for i in self._decoder.get_inputs() if i.name == "past_k.0")
        self._cache_length = axis if isinstance(axis, int) else None
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
        """Return an empty cache; of the graph's own length where that is fixed, else of ``length``
        positions."""
        config = self.config
        length = self._cache_length or length
        return KvCache.allocate(
            batch,
            length,
            layers=config.num_layers,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=self.dtype,
        )

    def _run(self, cache: KvCache, feed: dict[str, np.ndarray]) -> Step:
        width, rows = feed["inputs_embeds"].shape[1], feed["logits_at"].shape[1]
        buffers = self._buffers(cache, width, rows)
        for name, bound in buffers.inputs.items():
            bound[...] = feed[name]
        self._decoder.run_with_iobinding(buffers.binding)
        return buffers.step()

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
    if bundle.runtime == "tensorrt":
        # Its steering nodes leave gaps out, which is not the operator's signature.
        if library == "require" or bundle.library_required:
            raise DacoError(
                f"{bundle.path} was exported for TensorRT, so the custom-op library of ONNX Runtime cannot "
                "serve it" + ("; nor has its operator a portable form" if bundle.library_required else "")
            )
        return None, "the graph is written for TensorRT"
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
