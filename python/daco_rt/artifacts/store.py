"""Writing an artifact: a folder that appears whole or not at all, its manifest last."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import daco_rt
from daco_rt._files import atomic_directory, atomic_file, refuse_existing, sha256_file
from daco_rt.artifacts.manifest import (
    MANIFEST,
    SHARED_KEYS,
    VERSIONS,
    check_relative,
    encode_manifest,
    part_entry,
    plain_json,
    read_manifest,
    reference_entry,
)
from daco_rt.artifacts.tensors import TensorSource, write_safetensors
from daco_rt.errors import ArtifactError

# Reasons for which a hard link is impossible though a copy is not.
_NO_LINK = {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS}


class ArtifactWriter:
    """What ``new_artifact`` yields. ``path`` is the folder to write in, ``target`` the one it becomes.

    Files may also be written straight under ``path``: whatever lies there at the end is hashed and owned,
    and a sub-folder that is an artifact itself (``pack.save_to(writer.path / "pack")``) is recorded as a
    part.
    """

    def __init__(self, path: Path, target: Path, kind: str) -> None:
        self.path = path
        self.target = target
        self.kind = kind
        self._fields: dict[str, Any] = {}
        self._files: dict[str, dict[str, Any]] = {}
        self._references: dict[str, dict[str, Any]] = {}
        self._hashes: dict[str, Future[str]] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._cancelled = threading.Event()

    def set(self, **fields: Any) -> None:
        """Put keys into the manifest: anything JSON can hold, NumPy scalars and arrays too."""
        taken = SHARED_KEYS & fields.keys()
        if taken:
            raise ValueError(
                f"ArtifactWriter.set: {', '.join(sorted(taken))} is written by the artifact itself"
            )
        self._fields.update(fields)

    def add_file(self, source: str | Path, rel: str) -> None:
        """Copy a file into the artifact, which then owns it."""
        source = Path(source)
        try:
            with self._new(rel) as out, open(source, "rb") as file:
                while block := file.read(1 << 20):
                    out.write(block)
        except FileNotFoundError as error:
            raise ArtifactError(
                f"{source} does not exist; it was to become {rel} of {self.target}"
            ) from error

    def add_bytes(self, rel: str, data: bytes) -> None:
        """Write bytes as a file of the artifact."""
        with self._new(rel) as out:
            out.write(data)

    def add_json(self, rel: str, value: Any) -> None:
        """Write one value as an indented JSON file. NaN and Inf raise ``ValueError``."""
        text = json.dumps(value, indent=2, ensure_ascii=False, default=plain_json, allow_nan=False)
        self.add_bytes(rel, (text + "\n").encode())

    def add_jsonl(self, rel: str, rows: Iterable[Any]) -> None:
        """Write JSON lines, one row a line."""
        with self._new(rel) as out:
            for row in rows:
                text = json.dumps(row, ensure_ascii=False, default=plain_json, allow_nan=False)
                out.write((text + "\n").encode())

    def write_safetensors(
        self, rel: str, tensors: Mapping[str, TensorSource] | Iterable[tuple[str, TensorSource]]
    ) -> None:
        """Write tensors into the artifact, one in memory at a time (``tensors.write_safetensors``)."""
        file = write_safetensors(self._place(rel), tensors)
        self._files[rel] = {"sha256": file.sha256, "bytes": file.bytes}

    def link(self, source: str | Path, rel: str, *, full_hash: bool = False) -> None:
        """Refer to a safetensors shard that belongs to somebody else: a hard link, or a copy across devices.

        Size, header hash and a hash of 256 samples are recorded at once. ``full_hash`` also records the hash
        of every byte, computed on another thread while the artifact is made (about 1.5 GB/s where the file is
        in the page cache), which lets ``open_artifact(full=True)`` find any flipped bit.

        Raises
        ------
        ArtifactError
            If the source is missing or no safetensors file.
        """
        # A link to a symlink would leave the folder, which ONNX Runtime refuses.
        real = Path(os.path.realpath(source))
        entry = reference_entry(real) if real.is_file() else None
        if entry is None:
            raise ArtifactError(f"{source} does not exist; it was to become {rel} of {self.target}")
        place = self._place(rel)
        try:
            os.link(real, place)
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
            shutil.copyfile(real, place)
        self._references[rel] = entry
        if full_hash:
            self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="daco-hash")
            self._hashes[rel] = self._pool.submit(sha256_file, place, self._check_cancelled)

    def _check_cancelled(self, _: int) -> None:
        if self._cancelled.is_set():
            raise InterruptedError

    @contextlib.contextmanager
    def _new(self, rel: str) -> Iterator[Any]:
        with atomic_file(self._place(rel)) as file:
            yield file
        self._files[rel] = {"sha256": file.sha256, "bytes": file.bytes}

    def _place(self, rel: str) -> Path:
        check_relative(rel, self.target)
        place = self.path / rel
        if place.exists():
            raise ValueError(f"ArtifactWriter: {rel} is already written")
        place.parent.mkdir(parents=True, exist_ok=True)
        return place

    def _finish(self) -> None:
        parts = self._claim(self.path)
        for rel, digest in self._hashes.items():
            self._references[rel]["sha256"] = digest.result()
        manifest = {
            "format": f"daco_rt.{self.kind}",
            "version": VERSIONS[self.kind],
            "producer": {"name": "daco-rt", "version": daco_rt.__version__},
            **self._fields,
            "files": dict(sorted(self._files.items())),
            "references": dict(sorted(self._references.items())),
            "parts": dict(sorted(parts.items())),
        }
        with atomic_file(self.path / MANIFEST) as file:
            file.write(encode_manifest(manifest))

    def _claim(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Take what was written straight into the folder; return the artifacts found in sub-folders."""
        parts: dict[str, dict[str, Any]] = {}
        for entry in sorted(os.scandir(folder), key=lambda e: e.name):
            path = Path(entry.path)
            rel = path.relative_to(self.path).as_posix()
            if entry.is_symlink():
                raise ArtifactError(
                    f"{self.target}: {rel} is a symbolic link; an artifact holds only plain files"
                )
            if entry.is_dir():
                if is_artifact(path):
                    parts[rel] = part_entry(path, read_manifest(path))
                else:
                    parts.update(self._claim(path))
            elif rel not in self._files and rel not in self._references:
                check_relative(rel, self.target)
                self._files[rel] = {"sha256": sha256_file(path), "bytes": entry.stat().st_size}
        return parts

    def _close(self) -> None:
        self._cancelled.set()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def new_artifact(path: str | Path, kind: str, *, overwrite: bool = False) -> Iterator[ArtifactWriter]:
    """Make an artifact: it appears under ``path`` when the block ends without an error, else nothing changes.

    Parameters
    ----------
    path : the folder to make; missing parents are made too.
    kind : "pack", "bundle", "dictionary" or "sae".
    overwrite : replace an artifact that is there. A folder that is neither an artifact nor empty is never
        replaced.

    Raises
    ------
    ArtifactError
        If the folder exists and may not be replaced, or the device refuses the data.

    Example
    -------
    >>> with new_artifact("out/dictionary", "dictionary") as writer:
    ...     writer.set(dim=576)
    ...     writer.add_json("notes.json", {"corpus": "captions"})
    """
    kind = kind.removeprefix("daco_rt.")
    if kind not in VERSIONS:
        raise ValueError(f"new_artifact: kind must be one of {', '.join(VERSIONS)}, got {kind!r}")
    check_target(path, overwrite=overwrite)
    target = Path(os.path.realpath(path))
    with atomic_directory(target, overwrite=overwrite) as folder:
        writer = ArtifactWriter(folder, target, kind)
        try:
            yield writer
            writer._finish()
        finally:
            writer._close()


def check_target(path: str | Path, *, overwrite: bool) -> None:
    """Raise ``ArtifactError`` if ``new_artifact`` would refuse this output. Call it before long work."""
    path = Path(path)
    if not overwrite:
        refuse_existing(path)
    elif path.exists():
        if not path.is_dir():
            raise ArtifactError(f"{path} is a file, expected a folder; choose another --output")
        if not is_artifact(path) and any(path.iterdir()):
            raise ArtifactError(
                f"{path} is not empty and no daco_rt artifact, so it is not replaced; choose another --output"
            )


def is_artifact(path: Path) -> bool:
    """Whether a folder holds a manifest of ours, even a damaged one."""
    try:
        return b'"daco_rt.' in (path / MANIFEST).read_bytes()
    except OSError:
        return False
