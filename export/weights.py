"""Where a bundle's weights stand: linked to the checkpoint where the precision is right, else converted once.

A tensor that already has the wanted dtype is used where it lies: its file is hard-linked into the bundle
and the graph points inside it. The others are converted into one file, a block of rows at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
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
# Pieces are read and converted on a few threads ahead of the one that hashes and writes; all of them together
# are some 100 MB of memory.
_PIECE_BYTES = 8 << 20
_CONVERTERS = 3
_AHEAD = 4
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
    """Give a tensor's rows in pieces; a few are read and converted ahead while the last one is written."""

    row = ref.nbytes // max(1, ref.shape[0] if ref.shape else 1)
    piece = row * max(1, _PIECE_BYTES // max(1, row))

    def convert(start: int) -> tuple[np.ndarray, int]:
        size = min(piece, ref.nbytes - start)
        wide = _as_fp32(_read(ref, start, size), ref.dtype)
        with np.errstate(over="ignore"):
            narrow = wide.astype(DTYPES[wanted], copy=False)
        if not np.isfinite(narrow).all():
            check_finite([ref])
            raise CheckpointError(
                f"{ref.file}: tensor '{ref.name}' reaches {np.abs(wide).max():.3g}, more than fp16 can "
                "hold; export with --precision fp32 (bf16 for TensorRT)"
            )
        return narrow.reshape(-1, *ref.shape[1:]), size

    def produce() -> Iterator[np.ndarray]:
        starts = iter(range(0, ref.nbytes, max(1, piece)))
        with ThreadPoolExecutor(_CONVERTERS, thread_name_prefix="daco-convert") as pool:
            ahead = deque(pool.submit(convert, start) for start in islice(starts, _AHEAD))
            while ahead:
                narrow, size = ahead.popleft().result()
                if (start := next(starts, None)) is not None:
                    ahead.append(pool.submit(convert, start))
                yield narrow
                advance(size)

    return produce


def _read(ref: TensorRef, start: int, size: int) -> np.ndarray:
    """Read bytes of a tensor: a mapping would count, and stay, in the process's memory."""
    found = np.empty(size, np.uint8)
    with ref.file.open("rb", buffering=0) as file:
        file.seek(ref.offset + start)
        view, done = found.data, 0
        while done < size:
            count = file.readinto(view[done:])
            if not count:
                raise CheckpointError(f"{ref.file}: ends inside tensor '{ref.name}'; download it again")
            done += count
    return found


def _as_fp32(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Widen bytes; bf16 by its bits, which is many times faster than through its type."""
    if dtype == "BF16":
        return (raw.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return raw.view(DTYPES[dtype]).astype(np.float32, copy=False)


def _unique_names(files: set[Path]) -> dict[Path, str]:
    """Give every file a name of its own: shards of one checkpoint have different names already."""
    names: dict[Path, str] = {}
    for file in sorted(files):
        name = file.name
        while name in names.values() or name == Path(CONVERTED).name:
            name = f"_{name}"
        names[file] = name
    return names
