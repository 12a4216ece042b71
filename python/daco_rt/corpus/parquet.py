"""Parquet files with a caption column, and pictures as bytes or as paths."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from glob import glob, has_magic
from pathlib import Path
from typing import Any

from daco_rt.corpus.arrow import arrow
from daco_rt.corpus.pairs import Corpus, Pair
from daco_rt.errors import DacoError, did_you_mean

_BATCH = 4096


class ParquetCorpus(Corpus):
    """Rows of Parquet files.

    Parameters
    ----------
    files : a file, a folder of ``.parquet`` files, or a pattern.
    caption : the column of captions.
    image : the column of pictures: bytes, a struct with the field ``bytes`` (as the hub stores them), or
        paths relative to ``images``; None for the captions alone.
    images : the folder of the paths; by default the files' own.
    id : a column of ids; by default ``file:row``.

    Raises
    ------
    DacoError
        If there is no file, it is damaged, or has no such column.

    Example
    -------
    >>> next(iter(ParquetCorpus("train.parquet", caption="text")))
    Pair(id='train:0', caption='a dagger', image_ref='train.parquet#image:0')
    """

    kind = "parquet"

    def __init__(
        self,
        files: str | Path,
        *,
        caption: str = "caption",
        image: str | None = "image",
        images: str | Path | None = None,
        id: str | None = None,
    ) -> None:
        place = Path(files)
        if place.is_dir():
            found = sorted(place.glob("*.parquet"))
        else:
            found = sorted(map(Path, glob(str(files)))) if has_magic(str(files)) else [place]
        if not found or not found[0].is_file():
            raise DacoError(f"{files} is no .parquet file, nor a folder or pattern of some")
        self.files, self.caption, self.image, self.id = found, caption, image or None, id
        self._in_cells = self._check() and self.image is not None
        super().__init__(Path(images) if images is not None and not self._in_cells else found[0].parent)
        self.has_images = self.image is not None

    @property
    def size(self) -> int:
        """The number of rows, usable or not."""
        return sum(self._open(file).metadata.num_rows for file in self.files)

    def read(self) -> Iterator[Pair]:
        """Yield the rows, file by file; columns of bytes are not read here."""
        in_cells = self._in_cells
        columns = [self.caption, *([self.id] if self.id else [])]
        if self.image is not None and not in_cells:
            columns.append(self.image)
        for file in self.files:
            row = 0
            for batch in self._open(file).iter_batches(_BATCH, columns=columns):
                captions = batch.column(0).to_pylist()
                ids = batch.column(self.id).to_pylist() if self.id else None
                paths = batch.column(self.image).to_pylist() if self.image and not in_cells else None
                for i, caption in enumerate(captions):
                    name = str(ids[i]) if ids is not None else f"{file.stem}:{row + i}"
                    where = f"{file}, row {row + i}"
                    ref: Any = "" if self.image is None else f"{file.name}#{self.image}:{row + i}"
                    if paths is not None:
                        ref = paths[i]
                    if isinstance(caption, bytes):
                        caption = caption.decode(errors="replace")
                    if not isinstance(caption, str):
                        self.problems.add("caption missing", name, where)
                    elif not isinstance(ref, str) or (paths is not None and not (self.root / ref).is_file()):
                        self.problems.add("picture missing", name, f"{where}: {ref}")
                    else:
                        yield Pair(name, caption, ref)
                row += len(captions)

    def describe(self) -> dict[str, Any]:
        """Return kind, columns, and a hash of the files' names, sizes and footers, not of their contents."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            digest.update(_footer(file))
        return {
            "kind": self.kind,
            "files": len(self.files),
            "footers_sha256": digest.hexdigest(),
            "columns": {"caption": self.caption, "image": self.image, "id": self.id},
        }

    def _check(self) -> bool:
        """Check the columns of every file; return whether the pictures lie in cells and not at paths."""
        pa = arrow()
        kinds = set()
        for file in self.files:
            schema = self._open(file).schema_arrow
            for column in (self.caption, self.image, self.id):
                if column is not None and column not in schema.names:
                    raise DacoError(f"{file} has no column {column!r}{did_you_mean(column, schema.names)}")
            kind = schema.field(self.image).type if self.image else pa.string()
            text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
            if not text and not pa.types.is_struct(kind) and "binary" not in str(kind):
                raise DacoError(
                    f"{file}: column {self.image!r} is {kind}, expected bytes, a struct with bytes, or paths"
                )
            kinds.add(not text)
        if len(kinds) > 1:
            raise DacoError(
                f"some files of {self.files[0].parent} hold bytes and some paths; read them apart"
            )
        return kinds.pop()

    @staticmethod
    def _open(file: Path) -> Any:
        pa = arrow()
        try:
            return pa.parquet.ParquetFile(file)
        except (pa.ArrowException, OSError) as error:
            raise DacoError(f"{file} cannot be read as Parquet ({str(error).splitlines()[0]})") from error


def _footer(path: Path) -> bytes:
    """The metadata at the end of the file: it names offsets, sizes and statistics of every column."""
    with open(path, "rb") as file:
        file.seek(-8, 2)
        length = int.from_bytes(file.read(4), "little")
        file.seek(-8 - length, 2)
        return file.read(length)
