"""Where a bundle's weights stand: linked to the checkpoint where the precision is right, else converted once.

A tensor that already has the wanted dtype is used where it lies: its file is hard-linked into the bundle
and the graph points inside it. The others are converted into one file, a block of rows at a time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from daco_rt.artifacts.store import ArtifactWriter
from daco_rt.artifacts.tensors import DTYPES, TensorRef, read_header
from daco_rt.errors import CheckpointError
from daco_rt.progress import progress

DTYPE_OF = {"fp32": "F32", "fp16": "F16"}
"""Safetensors' name of each precision that an export can have."""

FOLDER = "weights"
CONVERTED = "weights/converted.safetensors"
_FLOATS = ("F64", "F32", "F16", "BF16")
_CHUNK_BYTES = 32 << 20
_SCAN_BLOCK = 1 << 20
_SCAN_BUDGET = 2 << 30


@dataclass(frozen=True)
class Placement:
    """Maps a checkpoint's tensors to files of the bundle.

    ``files`` says which file of the bundle holds a linked shard; ``converted`` holds the tensors that were
    rewritten, by their stored names.
    """

    files: Mapping[Path, str]
    converted: Mapping[str, TensorRef] = field(default_factory=dict)

    def locate(self, ref: TensorRef) -> tuple[str, int]:
        """Return (path relative to the bundle, byte offset) of a tensor."""
        moved = self.converted.get(ref.name)
        return (CONVERTED, moved.offset) if moved is not None else (self.files[ref.file], ref.offset)

    @property
    def copied_bytes(self) -> int:
        """Bytes that the bundle holds of its own, beyond links."""
        return sum(ref.nbytes for ref in self.converted.values())


def place_weights(refs: Iterable[TensorRef], precision: str, writer: ArtifactWriter) -> Placement:
    """Link or convert every tensor of ``refs`` into the bundle under construction.

    Raises
    ------
    CheckpointError
        If a tensor holds NaN or infinity, is no float, or does not fit in fp16. Converted tensors are
        checked whole; linked ones in blocks spread evenly over at most 2 GiB, whole below that.
    """
    wanted = DTYPE_OF[precision]
    needed = {ref.name: ref for ref in refs}
    for ref in needed.values():
        if ref.dtype not in _FLOATS:
            raise CheckpointError(
                f"{ref.file}: tensor '{ref.name}' has dtype {ref.dtype}, expected a float checkpoint; "
                "quantised checkpoints cannot be exported: use the original one"
            )
    kept = [ref for ref in needed.values() if ref.dtype == wanted]
    scan_finite(kept)
    files = {file: f"{FOLDER}/{name}" for file, name in _unique_names({ref.file for ref in kept}).items()}
    for file, relative in files.items():
        writer.link(file, relative)

    moved = {ref.name: ref for ref in needed.values() if ref.dtype != wanted}
    if not moved:
        return Placement(files)
    total = sum(ref.nbytes for ref in moved.values())
    with progress(f"converting weights to {precision}", total, unit="bytes") as advance:
        sources = {name: (wanted, ref.shape, _converter(ref, wanted, advance)) for name, ref in moved.items()}
        writer.write_safetensors(CONVERTED, sources)
    return Placement(files, read_header(writer.path / CONVERTED))


def scan_finite(refs: Iterable[TensorRef]) -> None:
    """Refuse weights that hold NaN or infinity.

    Reads with its own buffer, so memory stays flat; beyond 2 GiB of weights, evenly spaced blocks of
    1 MiB are read, so that an 7B checkpoint costs a second and not a minute.

    Raises
    ------
    CheckpointError
        Naming file and tensor.
    """
    refs = [ref for ref in refs if ref.nbytes]
    total = sum(ref.nbytes for ref in refs)
    keep_one_in = max(1, -(-total // _SCAN_BUDGET))
    with progress("checking weights", total // keep_one_in, unit="bytes") as advance:
        count = 0
        for ref in refs:
            with open(ref.file, "rb", buffering=0) as file:
                for start in range(0, ref.nbytes, _SCAN_BLOCK):
                    count += 1
                    if count % keep_one_in:
                        continue
                    size = min(_SCAN_BLOCK, ref.nbytes - start)
                    block = os.pread(file.fileno(), size, ref.offset + start)
                    if not _finite(np.frombuffer(block, DTYPES[ref.dtype])):
                        raise _not_finite(ref)
                    advance(size)


def _finite(block: np.ndarray) -> bool:
    """Whether all values are finite; the sum decides at once unless it overflows."""
    wide = block if block.dtype == np.float32 else block.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(wide.sum(dtype=np.float32))) or bool(np.isfinite(wide).all())


def _not_finite(ref: TensorRef) -> CheckpointError:
    return CheckpointError(
        f"{ref.file}: tensor '{ref.name}' holds NaN or infinity; the checkpoint is damaged: fetch it again"
    )


def _converter(
    ref: TensorRef, wanted: str, advance: Callable[[int], None]
) -> Callable[[], Iterator[np.ndarray]]:
    target = DTYPES[wanted]

    def produce() -> Iterator[np.ndarray]:
        source = ref.read()
        rows = source.shape[0] if source.ndim else 1
        step = max(1, _CHUNK_BYTES // max(1, ref.nbytes // max(rows, 1)))
        for start in range(0, rows, step):
            chunk = np.asarray(source[start : start + step]).astype(np.float32)
            if not _finite(chunk):
                raise _not_finite(ref)
            with np.errstate(over="ignore"):
                narrow = chunk.astype(target)
            if not np.isfinite(narrow).all():
                raise CheckpointError(
                    f"{ref.file}: tensor '{ref.name}' reaches {np.abs(chunk).max():.3g}, more than fp16 can "
                    "hold; export with --precision fp32"
                )
            yield narrow
            advance(ref.nbytes * len(chunk) // max(rows, 1))

    return produce


def _unique_names(files: set[Path]) -> dict[Path, str]:
    """Give every file a name of its own: shards of one checkpoint have different names already."""
    names: dict[Path, str] = {}
    for file in sorted(files):
        name = file.name
        while name in names.values() or name == Path(CONVERTED).name:
            name = f"_{name}"
        names[file] = name
    return names
