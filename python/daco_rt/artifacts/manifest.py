"""``manifest.json``: what makes a folder an artifact, and how its files are checked.

Keys that every kind has: ``format`` ("daco_rt.pack"), ``version``, ``producer``, ``files`` (owned: SHA-256
and bytes), ``references`` (shards of a checkpoint: bytes, header hash, hash of samples, and the full hash if
it was asked for), ``parts`` (artifacts inside this one, each with a manifest of its own) and ``checksum``,
the SHA-256 of the manifest's other keys in canonical JSON.

A part is checked through its own manifest, so it can be replaced by another of the same layout: the outer
manifest keeps only its format and the header hashes of its safetensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from daco_rt._files import sha256_file
from daco_rt.artifacts.tensors import header_sha256
from daco_rt.errors import ArtifactError

MANIFEST = "manifest.json"
VERSIONS = {"pack": 1, "bundle": 1, "dictionary": 1, "sae": 1}
SHARED_KEYS = frozenset({"format", "version", "producer", "files", "references", "parts", "checksum"})

_SAMPLE = 64 << 10
_SAMPLES = 256

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Artifact:
    """An opened artifact. ``checks`` says of every file how far it was checked.

    Values of ``checks``: "size" (present, right length), "sha256" (every byte), "header" (size and header of
    a referenced shard), "sampled" (the same and 256 blocks of 64 KiB spread over it).
    """

    path: Path
    kind: str
    manifest: dict[str, Any]
    checks: dict[str, str] = field(default_factory=dict)

    def file(self, rel: str) -> Path:
        """Return the path of a file that the manifest lists.

        Raises
        ------
        ArtifactError
            If the manifest does not list it.
        """
        parts = self.manifest["parts"]
        if (
            rel in self.manifest["files"]
            or rel in self.manifest["references"]
            or any(rel == part or rel.startswith(f"{part}/") for part in parts)
        ):
            return self.path / rel
        raise ArtifactError(f"{self.path}: {MANIFEST} lists no file {rel}; make the {self.kind} again")


def open_artifact(
    path: str | Path, kind: str, *, verify: bool = True, full: bool = False, progress: Progress | None = None
) -> Artifact:
    """Open an artifact and check it.

    Parameters
    ----------
    path : the folder.
    kind : "pack", "bundle", "dictionary" or "sae".
    verify : hash every owned file and the header of every referenced one; if False only presence and sizes
        are checked.
    full : also hash the data of referenced files: every byte where the writer recorded a full hash, 256
        blocks of 64 KiB otherwise. Implies ``verify``.
    progress : called with (bytes hashed so far, bytes to hash).

    Raises
    ------
    ArtifactError
        If the folder, the manifest or a file is missing, damaged, of another kind or of a newer version. The
        sentence names the file, what was expected and what came.

    Example
    -------
    >>> open_artifact("bundles/internvl", "bundle").manifest["precision"]
    'fp32'
    """
    path, kind = Path(path), kind.removeprefix("daco_rt.")
    manifest = read_manifest(path, kind)
    artifact = Artifact(path, kind, manifest)
    tick = _Ticker(progress, _bytes_to_hash(manifest, verify, full))
    for rel, entry in manifest["files"].items():
        artifact.checks[rel] = _check_owned(path, rel, entry, kind, verify or full, tick)
    for rel, entry in manifest["references"].items():
        artifact.checks[rel] = _check_reference(path, rel, entry, kind, verify, full, tick)
    for rel, entry in manifest["parts"].items():
        _check_part(artifact, rel, entry, verify, full)
    return artifact


def read_manifest(path: Path, kind: str | None = None) -> dict[str, Any]:
    """Parse and check a manifest by itself: JSON, format, version, checksum, safe paths.

    ``kind=None`` accepts every kind.
    """
    what = f"daco_rt {kind}" if kind else "daco_rt artifact"
    file = path / MANIFEST
    if not path.exists():
        raise ArtifactError(f"{path} does not exist; expected the folder of a {what}")
    if not file.is_file():
        raise ArtifactError(f"{path} holds no {MANIFEST}, so it is no {what}; give the folder that holds one")
    try:
        manifest = json.loads(file.read_bytes())
        if not isinstance(manifest, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{file} is damaged ({error}); copy or make the {what} again") from error
    name = manifest.get("format")
    found = name.removeprefix("daco_rt.") if isinstance(name, str) else ""
    if not isinstance(name, str) or found == name or found not in VERSIONS:
        raise ArtifactError(
            f"{file}: format is {name!r}, expected one of {', '.join(f'daco_rt.{k}' for k in VERSIONS)}; "
            "give another folder, or upgrade daco-rt if a newer one made it"
        )
    if kind is not None and found != kind:
        raise ArtifactError(f"{path} is a daco_rt {found}, expected a {kind}; give the folder of a {kind}")
    version = manifest.get("version")
    if isinstance(version, int) and version > VERSIONS[found]:
        raise ArtifactError(
            f"{file}: {found} format version {version}, this daco-rt reads up to {VERSIONS[found]}; "
            "upgrade daco-rt"
        )
    if not isinstance(version, int) or version < 1 or manifest.get("checksum") != manifest_checksum(manifest):
        raise ArtifactError(
            f"{file} does not match its own checksum: it was edited or damaged; copy or make the {found} "
            "again"
        )
    for section in ("files", "references", "parts"):
        entries = manifest.get(section)
        if not isinstance(entries, dict):
            raise ArtifactError(f"{file}: '{section}' must be an object; make the {found} again")
        for rel, entry in entries.items():
            check_relative(rel, file)
            if not isinstance(entry, dict) or (section != "parts" and type(entry.get("bytes")) is not int):
                raise ArtifactError(f"{file}: the entry of {rel} is incomplete; make the {found} again")
    return manifest


def manifest_checksum(manifest: dict[str, Any]) -> str:
    """SHA-256 of a parsed manifest without its ``checksum``, in canonical JSON."""
    rest = {key: value for key, value in manifest.items() if key != "checksum"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def encode_manifest(manifest: dict[str, Any]) -> bytes:
    """Add the checksum and return the bytes of ``manifest.json``.

    NumPy scalars and arrays, paths and tuples become plain JSON; NaN and Inf raise ``ValueError``.
    """
    # Parsing back first turns integer keys into strings, so that the checksum is of what a reader sees.
    plain = json.loads(json.dumps(manifest, default=plain_json, allow_nan=False))
    plain["checksum"] = manifest_checksum(plain)
    return (json.dumps(plain, indent=2, ensure_ascii=False) + "\n").encode()


def plain_json(value: Any) -> Any:
    """``default`` of ``json.dumps``: NumPy scalars and arrays and paths as plain values."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be stored in a manifest")


def check_relative(rel: str, where: Path) -> None:
    """Refuse names that could leave the artifact's folder, or stand for the manifest itself."""
    pure = PurePosixPath(rel)
    unsafe = pure.is_absolute() or ".." in pure.parts or "\\" in rel or "\0" in rel
    if unsafe or str(pure) != rel or rel in (".", MANIFEST):
        raise ArtifactError(
            f"{where}: '{rel}' is no plain relative path inside the artifact; do not use this artifact"
        )


def reference_entry(file: Path) -> dict[str, Any]:
    """Return what is recorded at once of a referenced safetensors shard: bytes, header and sample hashes."""
    return {
        "bytes": file.stat().st_size,
        "header_sha256": header_sha256(file),
        "sampled_sha256": sampled_sha256(file),
    }


def sampled_sha256(file: Path) -> str:
    """Return the SHA-256 of up to 256 blocks of 64 KiB spread evenly over a file, its ends included.

    Files of up to 16 MiB are covered completely. Reads at most 16 MiB.
    """
    size = file.stat().st_size
    digest = hashlib.sha256(size.to_bytes(8, "little"))
    with open(file, "rb", buffering=0) as raw:
        if size <= _SAMPLE * _SAMPLES:
            digest.update(raw.read())
        else:
            for i in range(_SAMPLES):
                raw.seek((size - _SAMPLE) * i // (_SAMPLES - 1))
                digest.update(raw.read(_SAMPLE))
    return digest.hexdigest()


def part_entry(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Return what an outer manifest records of an artifact inside its own folder."""
    tensors = sorted(rel for rel in manifest["files"] if rel.endswith(".safetensors"))
    return {"format": manifest["format"], "headers": {rel: header_sha256(folder / rel) for rel in tensors}}


class _Ticker:
    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def __call__(self, count: int) -> None:
        self._done += count
        if self._progress is not None:
            self._progress(self._done, self._total)


def _bytes_to_hash(manifest: dict[str, Any], verify: bool, full: bool) -> int:
    total = sum(entry["bytes"] for entry in manifest["files"].values()) if verify or full else 0
    if full:
        total += sum(entry["bytes"] for entry in manifest["references"].values() if "sha256" in entry)
    return total


def _check_size(path: Path, rel: str, entry: dict[str, Any], kind: str) -> Path:
    file = path / rel
    if not file.is_file():
        raise ArtifactError(f"{file} is missing; copy or make the {kind} again")
    size = file.stat().st_size
    if size != entry["bytes"]:
        raise ArtifactError(
            f"{file} has {size} bytes, the {kind}'s manifest says {entry['bytes']}; it was cut short or "
            f"replaced: copy or make the {kind} again"
        )
    return file


def _check_owned(
    path: Path, rel: str, entry: dict[str, Any], kind: str, verify: bool, tick: Callable[[int], None]
) -> str:
    file = _check_size(path, rel, entry, kind)
    if not verify:
        return "size"
    _compare(file, "SHA-256", entry.get("sha256"), sha256_file(file, tick), f"copy or make the {kind} again")
    return "sha256"


def _check_reference(
    path: Path,
    rel: str,
    entry: dict[str, Any],
    kind: str,
    verify: bool,
    full: bool,
    tick: Callable[[int], None],
) -> str:
    file = _check_size(path, rel, entry, kind)
    if not (verify or full):
        return "size"
    remedy = f"restore that shard of the checkpoint, or make the {kind} again"
    _compare(file, "header SHA-256", entry.get("header_sha256"), header_sha256(file), remedy)
    if not full:
        return "header"
    if "sha256" in entry:
        _compare(file, "SHA-256", entry["sha256"], sha256_file(file, tick), remedy)
        return "sha256"
    _compare(file, "sampled SHA-256", entry.get("sampled_sha256"), sampled_sha256(file), remedy)
    return "sampled"


def _compare(file: Path, what: str, expected: Any, got: str, remedy: str) -> None:
    if expected != got:
        raise ArtifactError(
            f"{file} is damaged or was replaced: {what} {str(expected)[:12]}… expected, {got[:12]}… "
            f"found; {remedy}"
        )


def _check_part(outer: Artifact, rel: str, entry: dict[str, Any], verify: bool, full: bool) -> None:
    inner = open_artifact(outer.path / rel, str(entry.get("format")), verify=verify, full=full)
    outer.checks.update({f"{rel}/{name}": check for name, check in inner.checks.items()})
    for name, expected in entry.get("headers", {}).items():
        file = inner.path / name
        if not file.is_file() or header_sha256(file) != expected:
            raise ArtifactError(
                f"{file} has other tensor names, dtypes or shapes than the {outer.kind} was made with; "
                f"put back a {inner.kind} of the same shapes, or make the {outer.kind} again"
            )
