"""Where a picture of a corpus lies, as one string, and how it is read from there.

================================  =====================================================================
``folder/picture.jpg``            a file, relative to the corpus's root
``shards/0007.tar#0042.jpg``      a member of a tar file
``parts/0.parquet#image:17``      a cell of a Parquet file: column ``image``, row 17; bytes, or a struct
                                  with a field ``bytes``
================================  =====================================================================

Members of tar files are read by their offset: headers are walked once a file and the offsets kept under the
cache folder, so that one picture among millions costs one read. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tarfile
import threading
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from daco_rt._files import atomic_file
from daco_rt.corpus.arrow import arrow
from daco_rt.errors import DacoError
from daco_rt.models.assembly import cache_root
from daco_rt.runtime.images import read_image

BACKGROUND = "white"
_GROUPS_KEPT = 2
_groups: OrderedDict[tuple[str, str, int], Any] = OrderedDict()
_lock = threading.Lock()


def open_reference(root: str | Path, reference: str) -> Any:
    """Return the picture that ``reference`` names, as an upright RGB ``PIL.Image.Image``, white where it is
    transparent.

    Parameters
    ----------
    root : the folder to which references are relative.
    reference : see the table at the head of this module.

    Raises
    ------
    DacoError
        If it is empty, leaves the root, is not there, or is no picture that Pillow can read.

    Example
    -------
    >>> open_reference("cc3m", "cc3m-train-0000.tar#000000042.jpg").mode
    'RGB'
    """
    if not reference:
        raise DacoError("this pair has no picture: its reference is empty")
    path, member, kind = split_reference(reference)
    place = Path(root) / path
    if os.path.isabs(path) or ".." in Path(path).parts:
        raise DacoError(f"picture {reference!r} lies outside its root {root}; references are relative to it")
    if kind == "file":
        return read_image(place, str(place), background=BACKGROUND)
    if not place.is_file():
        raise DacoError(f"{place} is not a file: the picture {reference!r} was to be read from it")
    name = f"{place}#{member}"
    data = read_tar_member(place, member) if kind == "tar" else _parquet_cell(place, member)
    return read_image(io.BytesIO(data), name, background=BACKGROUND)


def split_reference(reference: str) -> tuple[str, str, str]:
    """Return file, member and kind ("file", "tar" or "parquet") of a reference.

    Example
    -------
    >>> split_reference("a/0.tar#x.jpg")
    ('a/0.tar', 'x.jpg', 'tar')
    """
    for kind in ("tar", "parquet"):
        path, mark, member = reference.partition(f".{kind}#")
        if mark:
            return f"{path}.{kind}", member, kind
    return reference, "", "file"


@dataclass(frozen=True, eq=False)
class TarIndex:
    """Where the members of a tar file lie: name → (offset of the data, bytes), in the file's order.

    ``damage`` says why the list ends early; "" for a whole file.
    """

    members: dict[str, tuple[int, int]]
    damage: str = ""


def tar_index(path: str | Path) -> TarIndex:
    """Return where the members of an uncompressed tar file lie.

    Built once: kept in memory, and under the cache folder by path, size and time of change of the file. Of a
    file that was cut short the members before the cut are listed.

    Raises
    ------
    DacoError
        If the file is missing or no tar file.
    """
    path = Path(os.path.realpath(path))
    try:
        status = path.stat()
    except OSError as error:
        raise DacoError(f"{path} cannot be read: {error.strerror}") from error
    return _tar_index(str(path), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=512)
def _tar_index(path: str, size: int, changed: int) -> TarIndex:
    key = hashlib.sha256(f"{path}\0{size}\0{changed}".encode(errors="surrogatepass")).hexdigest()
    kept = cache_root() / "tar-indexes" / f"{key[:32]}.json"
    # A damaged or foreign index is made again.
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        stored = json.loads(kept.read_bytes())
        found = {str(name): (int(at), int(length)) for name, at, length in stored["members"]}
        if all(min(at, length) >= 0 and at + length <= size for at, length in found.values()):
            return TarIndex(found, str(stored["damage"]))
    members: dict[str, tuple[int, int]] = {}
    damage = ""
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                # Of two members of one name tar itself takes the last.
                if member.isreg() and not member.issparse():
                    members[member.name] = (member.offset_data, member.size)
                archive.members = []  # type: ignore[attr-defined]  # or every header stays in memory
    except (tarfile.TarError, OSError, EOFError) as error:
        damage = str(error) or type(error).__name__
        if not members:
            raise DacoError(
                f"{path} cannot be read as an uncompressed tar file ({damage}); fetch it again"
            ) from error
    whole = {name: place for name, place in members.items() if sum(place) <= size}
    index = TarIndex(whole, damage)
    with contextlib.suppress(OSError, DacoError):  # a cache that cannot be written costs time, not results
        kept.parent.mkdir(parents=True, exist_ok=True)
        rows = [[name, *place] for name, place in whole.items()]
        with atomic_file(kept) as file:
            file.write(json.dumps({"members": rows, "damage": damage}).encode())
    return index


def read_tar_member(path: str | Path, member: str) -> bytes:
    """Return the bytes of one member of a tar file; ``DacoError`` if it has none of that name."""
    place = tar_index(path).members.get(member)
    if place is None:
        raise DacoError(f"{path} has no member {member!r}; the pairs were made from another file")
    with open(path, "rb") as file:
        file.seek(place[0])
        return file.read(place[1])


def _parquet_cell(path: Path, member: str) -> bytes:
    column, _, number = member.rpartition(":")
    if not column or not number.isdigit():
        raise DacoError(f"picture {path}#{member} has no column and row; expected {path.name}#COLUMN:ROW")
    row, group = int(number), 0
    file = _parquet_file(str(path), path.stat().st_mtime_ns)
    while group < file.num_row_groups and row >= (rows := file.metadata.row_group(group).num_rows):
        row, group = row - rows, group + 1
    if group == file.num_row_groups or column not in file.schema_arrow.names:
        raise DacoError(
            f"{path} has no row {number} or no column {column!r}; the pairs were made of another file"
        )
    key = str(path), column, group
    with _lock:  # one file object is not read by two threads at a time
        cells = _groups.pop(key, None)
        if cells is None:
            cells = file.read_row_group(group, columns=[column]).column(0)
        _groups[key] = cells
        while len(_groups) > _GROUPS_KEPT:
            _groups.popitem(last=False)
    return cell_bytes(cells[row].as_py(), f"{path}#{member}")


def cell_bytes(value: Any, where: str) -> bytes:
    """Return the bytes in a cell: as they are, or in the field ``bytes`` of a struct."""
    if isinstance(value, dict):
        value = value.get("bytes")
    if not isinstance(value, bytes):
        raise DacoError(f"{where} holds no picture: expected bytes, got {type(value).__name__}")
    return value


@lru_cache(maxsize=64)
def _parquet_file(path: str, changed: int) -> Any:
    pa = arrow()
    try:
        return pa.parquet.ParquetFile(path, memory_map=True)
    except (pa.ArrowException, OSError) as error:
        raise DacoError(f"{path} cannot be read as Parquet: {error}") from error
