"""Text alone: one caption a line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from daco_rt._files import sha256_file
from daco_rt.corpus.pairs import Corpus, Pair, decode
from daco_rt.errors import DacoError


class TextCorpus(Corpus):
    """The lines of a file as captions without pictures; a line's number, from 0, is the id.

    Raises
    ------
    DacoError
        If there is no such file.

    Example
    -------
    >>> next(iter(TextCorpus("sentences.txt")))
    Pair(id='0', caption='The dagger lay on the table.', image_ref='')
    """

    kind = "text"
    has_images = False

    def __init__(self, file: str | Path) -> None:
        self.file = Path(file)
        if not self.file.is_file():
            raise DacoError(f"{self.file} is not a file; give a file with one caption a line")
        super().__init__(self.file.parent)

    @property
    def ids_are_unique(self) -> bool:
        """True: ids are line numbers."""
        return True

    def read(self) -> Iterator[Pair]:
        """Yield the lines; empty ones are no problem and have no number of their own to miss."""
        with open(self.file, "rb") as file:
            for number, line in enumerate(file):
                if line.strip():
                    yield Pair(str(number), decode(line))

    def describe(self) -> dict[str, Any]:
        """Return kind, name and hash of the file."""
        return {"kind": self.kind, "file": self.file.name, "sha256": sha256_file(self.file)}
