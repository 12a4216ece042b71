"""Safetensors files: validated headers, memory-mapped reading, and a streaming writer.

The header that the writer makes is a pure function of the tensors' names, dtypes and shapes, and the
data starts on a 64-byte boundary. So two files of equal shapes have equal offsets, and a graph whose
external data points into one of them runs on the other after a plain file swap.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from daco_rt._files import HashingFile, atomic_file
from daco_rt.errors import ArtifactError, DacoError

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_ALIGNMENT = 64
_MAX_HEADER = 100 << 20  # the limit of the safetensors library itself

Producer = Callable[[], "np.ndarray | Iterable[np.ndarray]"]
TensorSource = tuple[str, tuple[int, ...], Producer]


@dataclass(frozen=True)
class TensorRef:
    """Where one tensor lies on disk.

    ``dtype`` is safetensors' name ("F32", "F16", "BF16", "I8", "I32", "I64", "BOOL", "U8", …), ``offset``
    counts bytes from the start of ``file``, ``nbytes`` is the length of the data.

    Example
    -------
    >>> ref = read_header(Path("model.safetensors"))["model.norm.weight"]
    >>> ref.read().shape == ref.shape
    True
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def read(self) -> np.ndarray:
        """Return a read-only view of the file's bytes: nothing is loaded until it is touched.

        bf16 comes as ``ml_dtypes.bfloat16``. The data may start at any byte, so the array's ALIGNED flag
        can be False.

        Raises
        ------
        ArtifactError
            If the file is gone or has become shorter than its header said.
        """
        dtype = DTYPES[self.dtype]
        if self.nbytes == 0:
            empty = np.empty(self.shape, dtype)
            empty.flags.writeable = False
            return empty
        try:
            raw = np.memmap(self.file, mode="r", dtype=np.uint8, offset=self.offset, shape=(self.nbytes,))
        except (OSError, ValueError) as error:
            raise ArtifactError(
                f"{self.file}: cannot map the {self.nbytes} bytes of tensor '{self.name}' at {self.offset} "
                f"({error}); the file was removed or cut short: restore it"
            ) from error
        return np.asarray(raw).view(dtype).reshape(self.shape)


def read_header(path: Path, error: type[DacoError] = ArtifactError) -> dict[str, TensorRef]:
    """Read and check the header of a safetensors file; no tensor data is read.

    Parameters
    ----------
    path : the file.
    error : the exception to raise: ``ArtifactError``, or ``CheckpointError`` for a model's shard.

    Raises
    ------
    error
        If the file is missing, its header is damaged, a dtype is unknown, a tensor's bytes do not match
        its dtype and shape, or the data does not fill the rest of the file exactly, without gaps or overlaps.

    Example
    -------
    >>> {name: ref.shape for name, ref in read_header(Path("steering.safetensors")).items()}
    """
    path = Path(path)
    raw, size = _raw_header(path, error)
    start = 8 + len(raw)
    try:
        table = json.loads(raw, object_pairs_hook=_no_duplicates)
        if not isinstance(table, dict):
            raise ValueError("not a JSON object")
    except (ValueError, RecursionError) as reason:
        raise error(f"{path}: the safetensors header is damaged ({reason}); restore the file") from reason
    table.pop("__metadata__", None)
    refs = {name: _parse_entry(path, name, entry, start, error) for name, entry in table.items()}
    _check_layout(path, refs, start, size, error)
    return refs


def header_sha256(path: Path, error: type[DacoError] = ArtifactError) -> str:
    """Return the SHA-256 of the header: length prefix, JSON and padding. Equal headers mean equal offsets."""
    raw, _ = _raw_header(Path(path), error)
    return hashlib.sha256(len(raw).to_bytes(8, "little") + raw).hexdigest()


def from_array(array: np.ndarray) -> TensorSource:
    """Describe an array in memory (or mapped) for ``write_safetensors``."""
    if array.dtype not in _NAMES:
        raise TypeError(
            f"from_array: dtype {array.dtype} has no safetensors name; known: {', '.join(DTYPES)}"
        )
    return _NAMES[array.dtype], tuple(array.shape), lambda: array


def dtype_name(array: np.ndarray) -> str:
    """Return safetensors' name of an array's dtype, or numpy's own where there is none."""
    return _NAMES.get(array.dtype, str(array.dtype))


def write_order(dtypes: Mapping[str, str]) -> list[str]:
    """Return tensors' names, given their dtypes, in the order in which they are asked for and written."""
    return sorted(dtypes, key=lambda name: (-DTYPES[dtypes[name]].itemsize, name))


def write_safetensors(
    path: Path, tensors: Mapping[str, TensorSource] | Iterable[tuple[str, TensorSource]]
) -> HashingFile:
    """Write tensors one at a time, atomically; return the closed file's byte count and SHA-256.

    Parameters
    ----------
    path : the file to make or replace.
    tensors : ``name → (dtype, shape, producer)``. A producer is called once, when its turn comes, and returns
        the whole array or yields chunks of rows (arrays of ``shape[1:]`` per row) in order; at most one of
        its results is held at a time.

    Raises
    ------
    ValueError
        If a name comes twice, a dtype is unknown, or a producer's array has another dtype or shape.
    ArtifactError
        If the device refuses the data.

    Example
    -------
    >>> write_safetensors(Path("w.safetensors"), {"w": ("F32", (2, 3), lambda: np.zeros((2, 3), np.float32))})
    """
    pairs = list(tensors.items() if isinstance(tensors, Mapping) else tensors)
    sources = dict(pairs)
    if len(sources) != len(pairs):
        raise ValueError("write_safetensors: a tensor name comes twice")
    for name, (dtype, _, _) in pairs:
        if dtype not in DTYPES:
            raise ValueError(
                f"write_safetensors: dtype of '{name}' must be one of {', '.join(DTYPES)}, got {dtype}"
            )
    order = write_order({name: dtype for name, (dtype, _, _) in pairs})
    header: dict[str, Any] = {}
    end = 0
    for name in order:
        dtype, shape, _ = sources[name]
        begin, end = end, end + math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    with atomic_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            for chunk in _chunks(name, sources[name]):
                # bf16 has no buffer protocol; its bytes do.
                file.write(np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data)
    return file


def _chunks(name: str, source: TensorSource) -> Iterator[np.ndarray]:
    dtype, shape, producer = source
    made = producer()
    whole = isinstance(made, np.ndarray)
    rows = 0
    for chunk in [made] if isinstance(made, np.ndarray) else made:
        fits = (
            chunk.shape == shape if whole else chunk.ndim == len(shape) > 0 and chunk.shape[1:] == shape[1:]
        )
        if chunk.dtype != DTYPES[dtype] or not fits:
            raise ValueError(
                f"write_safetensors: '{name}' was announced as {dtype} {list(shape)}, its producer gave "
                f"{dtype_name(chunk)} {list(chunk.shape)}"
            )
        rows += 0 if whole else chunk.shape[0]
        yield chunk
    if not whole and rows != shape[0]:
        raise ValueError(
            f"write_safetensors: '{name}' was announced with {shape[0]} rows, its producer gave {rows}"
        )


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key comes twice")
    return table


def _raw_header(path: Path, error: type[DacoError]) -> tuple[bytes, int]:
    """Return the header's bytes without the length prefix, and the size of the file."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8:
                raise error(
                    f"{path} has {size} bytes, too few for a safetensors file (8 at least); restore the file"
                )
            if length > _MAX_HEADER or 8 + length > size:
                raise error(
                    f"{path}: the header should be {length} bytes long, the file has {size - 8} after the "
                    "length; it is cut short or no safetensors file: restore it"
                )
            return file.read(length), size
    except OSError as reason:
        raise error(f"{path}: cannot be read ({(reason.strerror or str(reason)).lower()})") from reason


def _parse_entry(path: Path, name: str, entry: Any, start: int, error: type[DacoError]) -> TensorRef:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if type(dtype) is not str or not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
            raise ValueError
    except (KeyError, TypeError, ValueError) as reason:
        raise error(f"{path}: the header's entry of tensor '{name}' is damaged; restore the file") from reason
    if dtype not in DTYPES:
        raise error(f"{path}: tensor '{name}' has dtype {dtype}, expected one of {', '.join(DTYPES)}")
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != expected:
        raise error(
            f"{path}: tensor '{name}' of {dtype} {list(shape)} needs {expected} bytes, its header gives it "
            f"{end - begin}; restore the file"
        )
    return TensorRef(path, name, dtype, shape, start + begin, expected)


def _check_layout(
    path: Path, refs: dict[str, TensorRef], start: int, size: int, error: type[DacoError]
) -> None:
    """The format wants the data to fill the file without gaps, so any other layout is damage."""
    position = start
    for ref in sorted(refs.values(), key=lambda r: (r.offset, r.nbytes)):
        if ref.offset != position:
            what = "overlaps the tensor before it" if ref.offset < position else "leaves a gap before it"
            raise error(
                f"{path}: tensor '{ref.name}' {what} (expected at byte {position}, got {ref.offset}); "
                "restore the file"
            )
        position += ref.nbytes
        if position > size:
            raise error(
                f"{path}: tensor '{ref.name}' ends at byte {position}, the file has {size} bytes; it is cut "
                "short: fetch or make it again"
            )
    if position != size:
        raise error(
            f"{path}: the header describes {position} bytes, the file has {size}; it is damaged: restore it"
        )
