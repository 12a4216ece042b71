"""CC-3M as it is published: a TSV of captions and addresses, and a folder of the fetched pictures."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from daco_rt._files import sha256_file
from daco_rt.corpus.folder import SUFFIXES
from daco_rt.corpus.pairs import Corpus, Pair, decode
from daco_rt.errors import DacoError, did_you_mean

NAMINGS = ("row", "md5", "sha1", "sha256")


class Cc3mCorpus(Corpus):
    """Lines ``caption⇥url`` without a header, and pictures named after the line or the address.

    Parameters
    ----------
    table : the TSV. A line's number, from 0, is the id of its pair.
    images : folder of the pictures; None for the captions alone. The addresses are never fetched: most of
        them are dead, and those that answer may show something else by now.
    naming : how the pictures are called; suffix and subfolders do not matter.

        * "row": the line's number, from 0, with any zeros before it: ``42.jpg``, ``00000/000000042.jpg``;
        * "md5", "sha1", "sha256": that hash of the address (UTF-8), in hexadecimal digits;
        * a file: lines ``number or address⇥path``, the path relative to ``images``.
    limit : read so many lines only.

    Raises
    ------
    DacoError
        If table, folder or mapping are missing, or the naming is unknown.

    Example
    -------
    >>> corpus = Cc3mCorpus("Train_GCC-training.tsv", "images")
    >>> next(iter(corpus))
    Pair(id='0', caption='a very typical bus station', image_ref='00000/000000000.jpg')
    """

    kind = "cc3m"

    def __init__(
        self,
        table: str | Path,
        images: str | Path | None = None,
        *,
        naming: str | Path = "row",
        limit: int | None = None,
    ) -> None:
        self.table, self.limit = Path(table), limit
        if not self.table.is_file():
            raise DacoError(f"{self.table} is not a file; give the TSV of captions and addresses")
        super().__init__(Path(images) if images is not None else self.table.parent)
        self.has_images = images is not None
        if self.has_images and not self.root.is_dir():
            raise DacoError(f"{self.root} is not a folder; give the folder of the fetched pictures")
        self.naming, self._mapping = str(naming), None
        if self.naming not in NAMINGS:
            if not Path(naming).is_file():
                raise DacoError(
                    f"naming {self.naming!r} is no file and no rule{did_you_mean(self.naming, NAMINGS)}"
                )
            self._mapping = Path(naming)

    @property
    def ids_are_unique(self) -> bool:
        """True: ids are line numbers."""
        return True

    def read(self) -> Iterator[Pair]:
        """Yield the pairs in the order of the lines; lines without a picture are counted as problems."""
        places = self._places() if self.has_images else {}
        with open(self.table, "rb") as file:
            for number, line in enumerate(file):
                if self.limit is not None and number >= self.limit:
                    return
                fields = decode(line).rstrip("\r\n").split("\t")
                if len(fields) != 2:
                    detail = (
                        f"{self.table}, line {number + 1}: {len(fields)} fields, expected caption and url"
                    )
                    self.problems.add("line is not caption and url", str(number), detail)
                    continue
                caption, url = fields
                place = places.get(self._key(number, url.strip()), "")
                if self._mapping is not None and not place:
                    place = places.get(url.strip(), "")
                if self.has_images and not place:
                    self.problems.add("picture missing", str(number), url)
                else:
                    yield Pair(str(number), caption, place)

    def describe(self) -> dict[str, Any]:
        """Return kind, the table's name and hash, the pictures' folder and naming."""
        found = {
            "kind": self.kind,
            "table": self.table.name,
            "sha256": sha256_file(self.table),
            "images": str(self.root) if self.has_images else None,
            "naming": self.naming if self._mapping is None else self._mapping.name,
            "limit": self.limit,
        }
        if self._mapping is not None:
            found["mapping_sha256"] = sha256_file(self._mapping)
        return found

    def _key(self, number: int, url: str) -> str:
        if self.naming in hashlib.algorithms_available:
            return hashlib.new(self.naming, url.encode(errors="surrogatepass")).hexdigest()
        return str(number)

    def _places(self) -> Mapping[str, str]:
        """Key → path of the picture relative to the folder; of two files of one key the first by path."""
        if self._mapping is not None:
            return self._mapped(self._mapping)
        found: dict[str, str] = {}
        for base, folders, files in os.walk(self.root):
            folders.sort()
            inner = os.path.relpath(base, self.root)
            for name in sorted(files):
                stem, suffix = os.path.splitext(name)
                if suffix.lower() not in SUFFIXES and suffix:
                    continue
                key = stem.lower()
                if self.naming == "row":
                    if not (stem.isascii() and stem.isdigit()):
                        continue
                    key = str(int(stem))
                found.setdefault(key, name if inner == "." else f"{inner}/{name}")
        return found

    def _mapped(self, mapping: Path) -> dict[str, str]:
        found: dict[str, str] = {}
        for number, line in enumerate(mapping.read_bytes().splitlines(), 1):
            fields = decode(line).split("\t")
            if len(fields) != 2:
                self.problems.add("line of the mapping is bad", fields[0], f"{mapping}, line {number}")
            elif os.path.isabs(fields[1]) or not (self.root / fields[1]).is_file():
                self.problems.add("picture of the mapping missing", fields[0], fields[1])
            else:
                found[fields[0].strip()] = Path(fields[1]).as_posix()
        return found
