"""What every corpus is: pairs in a fixed order, pictures on request, problems counted."""

from __future__ import annotations

import json
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from daco_rt._files import atomic_file
from daco_rt.corpus.references import open_reference

LISTED = 10_000
"""Problems of one kind that are listed by name; the rest is only counted."""


@dataclass(frozen=True)
class Pair:
    """One caption and where its picture lies (see `daco_rt.corpus.references`); ``image_ref`` "" without."""

    id: str
    caption: str
    image_ref: str = ""


@dataclass
class Problems:
    """What was skipped and why, counted by kind, the first of each kind listed.

    Example
    -------
    >>> problems = Problems()
    >>> problems.add("empty caption", "000000042", "cc3m.tsv, line 43")
    >>> dict(problems.counts)
    {'empty caption': 1}
    """

    counts: Counter[str] = field(default_factory=Counter)
    listed: list[dict[str, str]] = field(default_factory=list)

    def add(self, kind: str, pair: str, detail: str) -> None:
        """Count one problem of a pair."""
        self.counts[kind] += 1
        if self.counts[kind] <= LISTED:
            self.listed.append({"problem": kind, "pair": pair, "detail": detail})

    def save(self, path: str | Path) -> None:
        """Write the listed problems as JSON lines, the counts in the first line."""
        lines = [{"counts": dict(sorted(self.counts.items()))}, *self.listed]
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(Path(path)) as file:
            for line in lines:
                file.write((json.dumps(line, ensure_ascii=False) + "\n").encode(errors="backslashreplace"))


class Corpus(ABC):
    """Captions with pictures, or captions alone.

    Iterating gives ``Pair`` after ``Pair``, each time the same ones in the same order; what cannot be used is
    left out and counted in ``problems``, which each iteration begins anew. Pictures are not opened on the
    way, so that a picture that is none shows only in ``open_image``.

    Attributes
    ----------
    kind : str
        "cc3m", "webdataset", "parquet", "folder" or "text".
    root : Path
        The folder to which ``Pair.image_ref`` is relative.
    problems : Problems
        Of the last iteration, and what was added since.
    """

    kind: str
    root: Path
    has_images = True

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self.problems = Problems()

    def __iter__(self) -> Iterator[Pair]:
        self.problems = Problems()
        seen: set[str] = set()
        for pair in self.read():
            caption = clean_caption(pair.caption)
            if not caption:
                self.problems.add("empty caption", pair.id, pair.image_ref)
            elif "�" in caption:
                self.problems.add("caption is not UTF-8", pair.id, caption)
            elif pair.id in seen:
                self.problems.add("duplicate id", pair.id, pair.image_ref or caption)
            else:
                if not self.ids_are_unique:
                    seen.add(pair.id)
                yield Pair(pair.id, caption, pair.image_ref)

    @property
    def size(self) -> int | None:
        """How many pairs there are at most, if that is known without reading; for progress."""
        return None

    @property
    def ids_are_unique(self) -> bool:
        """Whether ids are row numbers, so that none needs to be remembered."""
        return False

    @abstractmethod
    def read(self) -> Iterator[Pair]:
        """Yield every pair there is, with the caption as it stands; bytes that are no UTF-8 as U+FFFD."""

    def open_image(self, ref: str) -> Any:
        """Return the picture of a pair as an upright RGB ``PIL.Image.Image``.

        Raises
        ------
        DacoError
            If there is none, or none that Pillow can read.
        """
        return open_reference(self.root, ref)

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return what the corpus is, as JSON: kind, files with sizes or hashes, settings.

        Two corpora of equal description give equal pairs: what was computed of one is not mixed with another.
        """


def clean_caption(text: str) -> str:
    """Return a caption in Unicode form NFC, on one line, without control characters and outer blanks.

    Example
    -------
    >>> clean_caption(" a dagger\\n on a table ")
    'a dagger on a table'
    """
    text = unicodedata.normalize("NFC", text)
    return " ".join("".join(" " if unicodedata.category(c) == "Cc" else c for c in text).split())


def decode(data: bytes) -> str:
    """Return text from bytes; what is no UTF-8 becomes U+FFFD, which ``Corpus`` counts as a problem."""
    return data.decode("utf-8-sig", errors="replace")
