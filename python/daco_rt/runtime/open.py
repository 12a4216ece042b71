"""Which session runs a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from daco_rt.errors import ArtifactError
from daco_rt.runtime.onnx_session import Library, OnnxSession
from daco_rt.runtime.session import DecoderSession

if TYPE_CHECKING:
    from daco_rt.artifacts.bundle import Bundle


def open_session(
    bundle: str | Path | Bundle,
    *,
    library: Library = "auto",
    threads: int | None = None,
    verify: bool = True,
) -> DecoderSession:
    """Open the session that a bundle was exported for.

    Parameters
    ----------
    bundle : path or Bundle
    library : "auto", "require" or "off"
        For ONNX Runtime as in `OnnxSession`. "off" runs the portable form of a bundle for TensorRT in ONNX
        Runtime: slow, and meant for looking at it where there is no GPU.
    threads : int, optional
        Of ONNX Runtime.
    verify : bool
        Hash the bundle's own files, and an engine, before they are used.

    Raises
    ------
    ArtifactError
        A file is missing or damaged, or an engine does not belong to its bundle.
    DacoError
        What the bundle needs is not at hand. An engine is never silently replaced by the portable form.

    Example
    -------
    >>> open_session("bundles/smol-internvl").info.tensorrt                   # doctest: +SKIP
    ''
    """
    if isinstance(bundle, str | Path):
        from daco_rt.artifacts.bundle import load_bundle

        bundle = load_bundle(bundle, verify=verify)
    if bundle.runtime != "tensorrt" or library == "off":
        return OnnxSession(bundle, library=library, threads=threads)
    from daco_rt.runtime.tensorrt_session import TensorRTSession

    try:
        return TensorRTSession(bundle, verify=verify)
    except ArtifactError as error:
        raise ArtifactError(
            f"{error}; or run its portable form in ONNX Runtime with the library off"
        ) from error
