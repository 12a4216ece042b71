"""Where a bundle's weights stand: linked to the checkpoint where the precision is right, else converted once.

A tensor that already has the wanted dtype is used where it lies: its file is hard-linked into the bundle
and the graph points inside it. The others are converted into one file, a block of rows at a time.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from io import RawIOBase
from pathlib import Path
from typing import NoReturn

import numpy as np

from daco_rt import _native
from daco_rt.artifacts.store import ArtifactWriter
from daco_rt.artifacts.tensors import DTYPES, TensorRef, read_header, write_order
from daco_rt.errors import CheckpointError
from daco_rt.models import check_finite
from daco_rt.progress import progress

DTYPE_OF = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
"""Safetensors' name of each precision that an export can have."""

FOLDER = "weights"
CONVERTED = "weights/converted.safetensors"
_FLOATS = ("F64", "F32", "F16", "BF16")
# Pieces are read and converted on a few threads ahead of the one that hashes and writes, across tensors; all
# of them together are some 100 MB of memory. Within a piece a buffer as large as a cache goes round.
_PIECE_BYTES = 8 << 20
_BUFFER_BYTES = 1 << 20
_CONVERTERS = 3
_AHEAD = 6
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
    order = write_order(dict.fromkeys(moved, wanted))
    with (
        progress(f"converting weights to {precision}", total, unit="bytes") as advance,
        _Conversion([moved[name] for name in order], wanted, advance) as conversion,
    ):
        writer.write_safetensors(
            CONVERTED,
            {name: (wanted, ref.shape, partial(conversion.rows, ref)) for name, ref in moved.items()},
        )
    return Placement(files, read_header(writer.path / CONVERTED))


class _Conversion:
    """Tensors in the order in which they will be asked for, converted a few pieces ahead."""

    def __init__(self, refs: list[TensorRef], wanted: str, advance: Callable[[int], None]) -> None:
        self._wanted, self._advance = wanted, advance
        self._buffers = threading.local()
        self._pool = ThreadPoolExecutor(_CONVERTERS, thread_name_prefix="daco-convert")
        self._waiting = ((ref, start) for ref in refs for start in range(0, ref.nbytes, _piece(ref)))
        self._ahead: deque[tuple[TensorRef, Future[np.ndarray]]] = deque()
        for _ in range(_AHEAD):
            self._go_on()

    def __enter__(self) -> _Conversion:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def rows(self, ref: TensorRef) -> Iterator[np.ndarray]:
        """Yield a tensor's rows, a piece at a time."""
        for start in range(0, ref.nbytes, _piece(ref)):
            planned, narrow = self._ahead.popleft()
            if planned is not ref:
                raise RuntimeError(f"'{ref.name}' is asked for in another order than was planned")
            yield narrow.result()
            self._go_on()
            self._advance(min(_piece(ref), ref.nbytes - start))

    def _go_on(self) -> None:
        if (waiting := next(self._waiting, None)) is not None:
            self._ahead.append((waiting[0], self._pool.submit(self._convert, *waiting)))

    def _convert(self, ref: TensorRef, start: int) -> np.ndarray:
        size = min(_piece(ref), ref.nbytes - start)
        given, dtype = DTYPES[ref.dtype], DTYPES[self._wanted]
        narrow = np.empty(size // given.itemsize, dtype)
        if not hasattr(self._buffers, "bytes"):
            self._buffers.bytes = np.empty(_BUFFER_BYTES, np.uint8)
        with ref.file.open("rb", buffering=0) as file:
            file.seek(ref.offset + start)
            for first in range(0, size, _BUFFER_BYTES):
                raw = self._buffers.bytes[: min(_BUFFER_BYTES, size - first)]
                _read_into(raw, file, ref)
                at = first // given.itemsize
                if not _fits(raw.view(given), narrow[at : at + len(raw) // given.itemsize]):
                    _refuse(ref, raw.view(given))
        return narrow.reshape(-1, *ref.shape[1:])


def _piece(ref: TensorRef) -> int:
    """Bytes of whole rows that make a piece."""
    row = ref.nbytes // max(1, ref.shape[0] if ref.shape else 1)
    return max(1, row * max(1, _PIECE_BYTES // max(1, row)))


def _read_into(raw: np.ndarray, file: RawIOBase, ref: TensorRef) -> None:
    """Read bytes of a tensor: a mapping would count, and stay, in the process's memory."""
    view, done = raw.data, 0
    while done < len(raw):
        count = file.readinto(view[done:])
        if not count:
            raise CheckpointError(f"{ref.file}: ends inside tensor '{ref.name}'; download it again")
        done += count


def _fits(given: np.ndarray, narrow: np.ndarray) -> bool:
    """Convert; False where a value is not finite or becomes infinite."""
    if given.dtype == np.float64:
        with np.errstate(over="ignore"):
            given = given.astype(np.float32)
    native = [a.view(np.uint16) if a.dtype == DTYPES["BF16"] else a for a in (given, narrow)]
    fits: bool = _native.core().convert(*native)
    return fits


def _refuse(ref: TensorRef, given: np.ndarray) -> NoReturn:
    check_finite([ref])
    largest = np.abs(given.astype(np.float64)).max()
    raise CheckpointError(
        f"{ref.file}: tensor '{ref.name}' reaches {largest:.3g}, more than fp16 can "
        "hold; export with --precision fp32 (bf16 for TensorRT)"
    )


def _unique_names(files: set[Path]) -> dict[Path, str]:
    """Give every file a name of its own: shards of one checkpoint have different names already."""
    names: dict[Path, str] = {}
    for file in sorted(files):
        name = file.name
        while name in names.values() or name == Path(CONVERTED).name:
            name = f"_{name}"
        names[file] = name
    return names
