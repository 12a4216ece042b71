"""Pictures that lie inside tables: written once beside the cache, by the hash of their bytes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from daco_rt._files import atomic_file
from daco_rt.errors import ArtifactError
from daco_rt.models.assembly import cache_root


def unpack_picture(table: Path, name: str, cell: Any) -> Path:
    """Write a picture of a table to the cache and return its file.

    Parameters
    ----------
    table, name : for the error alone.
    cell : bytes, or a mapping with ``bytes``, as the hub stores pictures.

    Raises
    ------
    ArtifactError
        The cell holds no bytes.
    """
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(data, bytes) or not data:
        raise ArtifactError(f"{table}: row {name} holds no picture bytes; fetch the table again")
    digest = hashlib.sha256(data).hexdigest()
    file = cache_root() / "benchmark-pictures" / digest[:2] / f"{digest}.img"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as out:
            out.write(data)
    return file
