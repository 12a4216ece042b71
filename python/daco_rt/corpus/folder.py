"""A folder of pictures with their captions in one file, or in a text file beside each."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from daco_rt._files import sha256_file
from daco_rt.corpus.pairs import Corpus, Pair, Problems, decode
from daco_rt.errors import DacoError, did_you_mean

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
CAPTION_FILES = ("captions.jsonl", "captions.csv", "captions.tsv")
_CAPTIONS = ("caption", "text")
_IMAGES = ("image", "file_name", "path")


class FolderCorpus(Corpus):
    """Pictures below a folder.

    Captions come from ``captions.jsonl``, ``captions.csv`` or ``captions.tsv`` in the folder (or the file
    given), with the fields or columns ``image`` (also ``file_name``, ``path``), relative to the folder, and
    ``caption`` (also ``text``), and ``id`` if there is one. Without such a file the caption of ``x.jpg`` is
    the text of ``x.txt``. The id is the field ``id``, else the picture's path.

    Parameters
    ----------
    folder : the pictures' folder.
    captions : the captions file, if it has another name or place.

    Raises
    ------
    DacoError
        If folder or file are missing, or the file has no columns of these names.

    Example
    -------
    >>> next(iter(FolderCorpus("pictures")))
    Pair(id='a/dagger.png', caption='a dagger', image_ref='a/dagger.png')
    """

    kind = "folder"

    def __init__(self, folder: str | Path, captions: str | Path | None = None) -> None:
        super().__init__(Path(folder))
        if not self.root.is_dir():
            raise DacoError(f"{self.root} is not a folder; give the folder that holds the pictures")
        named = [self.root / name for name in CAPTION_FILES if (self.root / name).is_file()]
        self.captions = Path(captions) if captions is not None else (named[0] if named else None)
        if self.captions is not None and not self.captions.is_file():
            raise DacoError(f"{self.captions} is not a file; give the captions file of {self.root}")

    def read(self) -> Iterator[Pair]:
        """Yield the pairs: of a captions file in its order, else in the order of the pictures' paths."""
        if self.captions is None:
            yield from self._beside(self.problems)
            return
        rows = _json_rows if self.captions.suffix == ".jsonl" else _csv_rows
        for line, row in rows(self.captions, self.problems):
            where = f"{self.captions}, line {line}"
            image, caption = _first(row, _IMAGES), _first(row, _CAPTIONS)
            if image is None or caption is None:
                self.problems.add("field missing", str(line), where)
            elif ".." in Path(image).parts or not (self.root / image).is_file() or os.path.isabs(image):
                self.problems.add("picture missing", image, where)
            else:
                image = Path(image).as_posix()
                yield Pair(str(row.get("id") or image), caption, image)

    def describe(self) -> dict[str, Any]:
        """Return kind, folder and a hash of the captions file, or of the pictures' names and captions."""
        found: dict[str, Any] = {"kind": self.kind, "folder": str(self.root)}
        if self.captions is not None:
            return {**found, "captions": self.captions.name, "sha256": sha256_file(self.captions)}
        digest = hashlib.sha256()
        for pair in self._beside(Problems()):
            digest.update(f"{pair.id}\0{pair.caption}\0".encode(errors="surrogatepass"))
        return {**found, "sha256": digest.hexdigest()}

    def _beside(self, problems: Problems) -> Iterator[Pair]:
        for base, folders, files in os.walk(self.root):
            folders.sort()
            for name in sorted(files):
                image = Path(base, name)
                if image.suffix.lower() not in SUFFIXES:
                    continue
                inner = image.relative_to(self.root).as_posix()
                text = image.with_suffix(".txt")
                if text.is_file():
                    yield Pair(inner, decode(text.read_bytes()), inner)
                else:
                    problems.add("caption missing", inner, str(text))


def _first(row: dict[str, Any], names: tuple[str, ...]) -> str | None:
    given = [row[name] for name in names if row.get(name) is not None]
    found = next((value for value in given if value), given[0] if given else None)
    return found if isinstance(found, str) else None


def _json_rows(path: Path, problems: Problems) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(decode(line))
                if not isinstance(row, dict):
                    raise ValueError("not an object")
            except (ValueError, RecursionError) as error:
                problems.add("line is not JSON", str(number), f"{path}, line {number}: {error}")
                continue
            yield number, row


def _csv_rows(path: Path, problems: Problems) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        columns = reader.fieldnames or []
        for names in (_IMAGES, _CAPTIONS):
            if not set(names) & set(columns):
                raise DacoError(f"{path} has no column {names[0]!r}{did_you_mean(names[0], columns)}")
        while True:
            try:
                row = next(reader, None)
            except csv.Error as error:
                problems.add("line is not CSV", str(reader.line_num), f"{path}: {error}")
                continue
            if row is None:
                return
            yield reader.line_num, row
