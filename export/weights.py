"""Where a bundle's weights stand: linked to the checkpoint where the precision is right, else converted once.

A tensor that already has the wanted dtype is used where it lies: its file is hard-linked into the bundle
and the graph points inside it. The others are converted into one file, a block of rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from daco_rt.artifacts.store import ArtifactWriter
from daco_rt.artifacts.tensors import DTYPES, TensorRef, read_header
from daco_rt.errors import CheckpointError
from daco_rt.models import check_finite
from daco_rt.progress import progress

DTYPE_OF = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
"""Safetensors' name of each precision that an export can have."""

FOLDER = "weights"
CONVERTED = "weights/converted.safetensors"
_FLOATS = ("F64", "F32", "F16", "BF16")
_CHUNK_BYTES = 32 << 20
_SCAN_BUDGET = 2 << 30
# Beyond this, linked shards are recorded by samples: hashing them whole would take longer than the export.
_HASH_LIMIT = 4 << 30


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
        checked whole; linked ones in pieces spread evenly, 2 GiB of them at most.
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
    total = sum(ref.nbytes for ref in kept)
    with progress("checking weights", min(total, _SCAN_BUDGET), unit="bytes") as advance:
        check_finite(kept, at_most=_SCAN_BUDGET, progress=advance)
    files = {file: f"{FOLDER}/{name}" for file, name in _unique_names({ref.file for ref in kept}).items()}
    for file, relative in files.items():
        writer.link(file, relative, full_hash=total <= _HASH_LIMIT)

    moved = {ref.name: ref for ref in needed.values() if ref.dtype != wanted}
    if not moved:
        return Placement(files)
    total = sum(ref.nbytes for ref in moved.values())
    with progress(f"converting weights to {precision}", total, unit="bytes") as advance:
        sources = {name: (wanted, ref.shape, _converter(ref, wanted, advance)) for name, ref in moved.items()}
        writer.write_safetensors(CONVERTED, sources)
    return Placement(files, read_header(writer.path / CONVERTED))


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
            with np.errstate(over="ignore"):
                narrow = chunk.astype(target)
            if not np.isfinite(narrow).all():
                check_finite([ref])
                raise CheckpointError(
                    f"{ref.file}: tensor '{ref.name}' reaches {np.abs(chunk).max():.3g}, more than fp16 can "
                    "hold; export with --precision fp32 (bf16 for TensorRT)"
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
