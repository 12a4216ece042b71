"""TensorRT engines of a bundle: what they are built from, and whether those that lie there belong to it.

An engine is made on the machine that runs it, after the export, so it is no file of the bundle's manifest.
It stands in the folder ``engine`` with a record of its own, ``engine.json``: versions, device, and the
hashes of everything that went into it. Steering operands are constants of an engine; one that was built
from another pack is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from daco_rt._files import sha256_file
from daco_rt.artifacts.bundle import DECODER, PACK, VISION, Bundle
from daco_rt.artifacts.manifest import MANIFEST
from daco_rt.errors import ArtifactError

ENGINE = "engine"
RECORD = "engine.json"
DECODER_PLAN = "decoder.plan"
VISION_PLAN = "vision.plan"
PLUGIN = "plugin/libdaco_trt_plugin.so"
FORMAT = "daco_rt.engine"


@dataclass(frozen=True)
class TensorRTPlan:
    """Limits that an engine is built for, fixed at export.

    Example
    -------
    >>> TensorRTPlan(2048, max_batch=8, max_width=1024, max_tiles=4, plugin_sha256=None).max_batch
    8
    """

    cache_length: int
    """Positions of the key/value cache of every row."""
    max_batch: int
    """Most rows of one run."""
    max_width: int
    """Most tokens a row of one prefill run; longer prompts run in pieces."""
    max_tiles: int
    """Most image tiles of one run of the vision tower."""
    plugin_sha256: str | None
    """Of the plugin library in the bundle; None where nothing is steered."""

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON values."""
        return asdict(self)

    @classmethod
    def of(cls, bundle: Bundle) -> TensorRTPlan:
        """Read the plan from a bundle's manifest.

        Raises
        ------
        ArtifactError
            The bundle is for another runtime, or the plan is incomplete.
        """
        if bundle.tensorrt is None:
            raise ArtifactError(
                f"{bundle.path} was exported for ONNX Runtime; export it again with --runtime tensorrt"
            )
        try:
            plugin = bundle.tensorrt["plugin_sha256"]
            sizes = {
                k: int(bundle.tensorrt[k]) for k in ("cache_length", "max_batch", "max_width", "max_tiles")
            }
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(
                f"{bundle.path / MANIFEST}: tensorrt.{error} is missing or no number; export the bundle again"
            ) from error
        if min(sizes.values()) < 1:
            raise ArtifactError(
                f"{bundle.path / MANIFEST}: sizes of tensorrt must be at least 1, got {sizes}; export again"
            )
        return cls(**sizes, plugin_sha256=None if plugin is None else str(plugin))


@dataclass(frozen=True)
class Engine:
    """An engine that belongs to its bundle."""

    folder: Path
    tensorrt: str
    """Version of TensorRT that built it."""
    device: str
    compute: str
    """Compute capability of the device it was built on, "9.0"."""
    operators: str
    """"plugin", "functions" (the portable form was built in), or "none" (nothing is steered)."""

    @property
    def decoder(self) -> Path:
        return self.folder / DECODER_PLAN

    @property
    def vision(self) -> Path | None:
        """The vision tower's engine; None if there is none."""
        file = self.folder / VISION_PLAN
        return file if file.is_file() else None


def plugin_path(bundle: Bundle) -> Path:
    """Where the plugin library of a TensorRT bundle lies."""
    return bundle.path / PLUGIN


def sources_of(bundle: Bundle) -> dict[str, str]:
    """Hashes of all that goes into an engine: graphs and plugin, and the pack with its operands.

    The weights are named by the manifest's checksum, which covers their own entries.
    """
    files = bundle.manifest["files"]
    found = {name: str(files[name]["sha256"]) for name in (DECODER, VISION, PLUGIN) if name in files}
    found["weights"] = str(bundle.manifest.get("checksum", ""))
    if bundle.steered_blocks:
        # Not the manifest's entry: a pack may be swapped, and the swapped one counts.
        found[PACK] = sha256_file(bundle.path / PACK / MANIFEST)
    return found


def engine_record(
    bundle: Bundle, folder: Path, *, tensorrt: str, device: str, compute: str, operators: str
) -> dict[str, Any]:
    """Return what ``engine.json`` says of the plans that lie in ``folder``."""
    plans = [name for name in (DECODER_PLAN, VISION_PLAN) if (folder / name).is_file()]
    return {
        "format": FORMAT,
        "version": 1,
        "tensorrt": tensorrt,
        "device": device,
        "compute": compute,
        "operators": operators,
        "sources": sources_of(bundle),
        "files": {name: sha256_file(folder / name) for name in plans},
    }


def load_engine(bundle: Bundle, *, verify: bool = True) -> Engine:
    """Open the engine that lies in a bundle.

    Parameters
    ----------
    bundle : exported for TensorRT.
    verify : hash the plans too.

    Raises
    ------
    ArtifactError
        There is none, it is damaged, or it was built from another graph, pack or plugin than the bundle's.

    Example
    -------
    >>> load_engine(load_bundle("bundles/internvl-trt")).tensorrt             # doctest: +SKIP
    '10.15.1.29'
    """
    folder = bundle.path / ENGINE
    record = folder / RECORD
    again = f"run python -m daco_rt.export.tensorrt {bundle.path}"
    if not record.is_file():
        raise ArtifactError(f"{bundle.path} has no engine yet: {again} on the machine that will run it")
    try:
        data: Mapping[str, Any] = json.loads(record.read_text(encoding="utf-8"))
        if data["format"] != FORMAT or data["version"] != 1:
            raise ValueError(f"format {data['format']} version {data['version']}")
        files, sources = dict(data["files"]), dict(data["sources"])
        engine = Engine(
            folder, str(data["tensorrt"]), str(data["device"]), str(data["compute"]), str(data["operators"])
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{record} is damaged ({error}); {again}") from error
    expected = sources_of(bundle)
    changed = sorted(k for k in expected.keys() | sources.keys() if expected.get(k) != sources.get(k))
    if changed:
        raise ArtifactError(
            f"the engine in {folder} was built from another {' and '.join(changed)} than the bundle has "
            f"now; {again}"
        )
    for name, sha256 in files.items():
        if not (folder / name).is_file() or (verify and sha256_file(folder / name) != sha256):
            raise ArtifactError(f"{folder / name} is missing or damaged; {again}")
    if DECODER_PLAN not in files:
        raise ArtifactError(f"{record} names no {DECODER_PLAN}; {again}")
    return engine
