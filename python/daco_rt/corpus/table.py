"""The pairs of every concept, as one Parquet file.

A row is a pair that stands for a concept (``sign`` 1, of X⁺) or for its absence (−1, of X⁻). The file names
what it was made of: see `metadata`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from daco_rt._files import atomic_file, refuse_existing
from daco_rt.corpus.arrow import arrow
from daco_rt.corpus.references import open_reference
from daco_rt.errors import ArtifactError

FORMAT, VERSION = "daco_rt.pairs", 1
COLUMNS = {
    "concept": "int32",
    "name": "string",
    "pair": "string",
    "sign": "int8",
    "image_similarity": "float32",
    "text_similarity": "float32",
    "score": "float32",
    "caption": "string",
    "image": "string",
    "start": "int32",
    "end": "int32",
}
_NULLABLE = ("image_similarity", "text_similarity")


def pairs_schema() -> Any:
    """Return the ``pyarrow.Schema`` of a table of pairs, without metadata.

    ==================== ======== ========================================================================
    ``concept``          int32    row of the concept in its table
    ``name``             string   its word
    ``pair``             string   id of the pair in its corpus
    ``sign``             int8     1: of X⁺, −1: of X⁻
    ``image_similarity`` float32  s of concept and picture, in (0, 1]; null where none was computed
    ``text_similarity``  float32  s of concept and caption, likewise
    ``score``            float32  dist(c, x), smaller is nearer; of the lexical retriever words in the caption
    ``caption``          string
    ``image``            string   where the picture lies, relative to the metadata ``root``; "" without
    ``start``, ``end``   int32    characters of the concept's word in the caption; −1 where it is not said
    ==================== ======== ========================================================================
    """
    pa = arrow()
    kinds = {"int32": pa.int32(), "int8": pa.int8(), "float32": pa.float32(), "string": pa.string()}
    return pa.schema([pa.field(name, kinds[kind], name in _NULLABLE) for name, kind in COLUMNS.items()])


def save_pairs(
    pairs: Any,
    path: str | Path,
    *,
    root: str | Path,
    corpus: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write pairs in one step; equal pairs and metadata give equal bytes.

    Parameters
    ----------
    pairs : a ``pyarrow.Table``, or a mapping of the columns of ``pairs_schema`` to sequences.
    path : the file.
    root : the folder to which ``image`` is relative. It is stored relative to the file where it lies in or
        below the file's folder, so that both can be moved together, and absolute otherwise.
    corpus : what the pairs were read from: kind, hashes; any JSON.
    settings : how they were chosen; any JSON.
    overwrite : replace an existing file.

    Raises
    ------
    ArtifactError
        If columns are missing or of other types, a value is out of range, or the file exists.

    Example
    -------
    >>> save_pairs(rows, "pairs.parquet", root="cc3m/images", corpus=corpus.describe())
    PosixPath('pairs.parquet')
    """
    pa = arrow()
    path = Path(path)
    if not overwrite:
        refuse_existing(path)
    schema = pairs_schema()
    try:
        if isinstance(pairs, Mapping):
            pairs = pa.table({name: pairs[name] for name in COLUMNS}, schema=schema)
        table = pairs.select(list(COLUMNS)).cast(schema)
    except (KeyError, ValueError, pa.ArrowException) as error:
        raise ArtifactError(f"pairs for {path}: columns must be {', '.join(COLUMNS)} ({error})") from error
    _check(table, f"pairs for {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    here, there = os.path.realpath(path.parent), os.path.realpath(root)
    inside = there == here or there.startswith(os.path.join(here, ""))
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "root": os.path.relpath(there, here) if inside else there,
        "corpus": json.dumps(dict(corpus or {}), sort_keys=True, allow_nan=False),
        "settings": json.dumps(dict(settings or {}), sort_keys=True, allow_nan=False),
    }
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(
        table.replace_schema_metadata(metadata), sink, compression="zstd", row_group_size=1 << 16
    )
    with atomic_file(path) as file:
        file.write(memoryview(sink.getvalue()))
    return path


def load_pairs(path: str | Path, *, root: str | Path | None = None) -> Any:
    """Read and check a file of pairs; return a ``pyarrow.Table`` with the columns of ``pairs_schema``.

    Its schema metadata has the absolute ``root``, so `load_image` needs nothing else.

    Parameters
    ----------
    path : the file.
    root : where the pictures are now, if they were moved.

    Raises
    ------
    ArtifactError
        If it is missing, damaged, of a newer version or holds something else.

    Example
    -------
    >>> table = load_pairs("pairs.parquet")
    >>> positive = table.filter(pc.equal(table["sign"], 1))
    >>> load_image(table, positive["image"][0].as_py()).size
    (640, 480)
    """
    pa = arrow()
    path = Path(path)
    try:
        table = pa.parquet.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise ArtifactError(
            f"{path} cannot be read as Parquet ({str(error).splitlines()[0]}); make it again: daco-rt stimuli"
        ) from error
    found = table.schema.metadata or {}
    form, version = found.get(b"format", b"").decode(), found.get(b"version", b"0").decode()
    if form != FORMAT or not version.isdigit():
        raise ArtifactError(
            f"{path} holds no pairs: its metadata names the format {form!r}, expected {FORMAT!r}"
        )
    if int(version) > VERSION:
        raise ArtifactError(f"{path} is of version {version}, this daco-rt reads up to {VERSION}; upgrade it")
    if missing := [name for name in COLUMNS if name not in table.column_names]:
        raise ArtifactError(f"{path} has no column {', '.join(missing)}; make it again")
    try:
        table = table.select(list(COLUMNS)).cast(pairs_schema())
    except (ValueError, pa.ArrowException) as error:
        raise ArtifactError(f"{path}: a column is of another type ({error}); make it again") from error
    _check(table, str(path))
    stored = found.get(b"root", b".").decode()
    place = Path(root) if root is not None else Path(os.path.realpath(path)).parent / stored
    return table.replace_schema_metadata({**found, b"root": os.path.realpath(place).encode()})


def metadata(table: Any) -> dict[str, Any]:
    """Return what a loaded table says about itself: ``root`` (a Path), ``corpus`` and ``settings``.

    Example
    -------
    >>> metadata(load_pairs("pairs.parquet"))["corpus"]["kind"]
    'cc3m'
    """
    raw = table.schema.metadata or {}
    if b"root" not in raw:
        raise ArtifactError("this table has no metadata 'root'; use one that load_pairs returned")
    return {
        "root": Path(raw[b"root"].decode()),
        "corpus": json.loads(raw.get(b"corpus", b"{}")),
        "settings": json.loads(raw.get(b"settings", b"{}")),
    }


def load_image(table: Any, reference: str) -> Any:
    """Return the picture that a row's ``image`` names, as an upright RGB ``PIL.Image.Image``.

    Parameters
    ----------
    table : what ``load_pairs`` returned, or any slice or filter of it.
    reference : a value of its column ``image``.

    Raises
    ------
    DacoError
        If there is no picture at that place, or none that Pillow can read.
    """
    root = (table.schema.metadata or {}).get(b"root")
    if root is None:
        raise ArtifactError("this table has no metadata 'root'; use one that load_pairs returned")
    return open_reference(root.decode(), reference)


def _check(table: Any, where: str) -> None:
    """Refuse values that no reader could use, with the first row that has one."""
    pc = arrow().compute
    length = pc.utf8_length(table["caption"])
    start, end = table["start"], table["end"]
    unsaid = pc.and_(pc.equal(start, -1), pc.equal(end, -1))
    inside = pc.and_(
        pc.greater_equal(start, 0), pc.and_(pc.less(start, end), pc.less_equal(end, length.cast("int32")))
    )
    rules = {
        "a concept below 0": pc.greater_equal(table["concept"], 0),
        "a sign other than 1 and -1": pc.equal(pc.abs(table["sign"]), 1),
        "a span outside its caption": pc.or_(unsaid, inside),
    }
    for what, holds in rules.items():
        row = pc.index(holds, False).as_py()
        if row >= 0:
            raise ArtifactError(f"{where}: row {row} has {what}; make the pairs again")
