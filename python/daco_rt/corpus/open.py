"""One name for every corpus: ``kind:place``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from daco_rt.corpus.cc3m import Cc3mCorpus
from daco_rt.corpus.folder import FolderCorpus
from daco_rt.corpus.pairs import Corpus
from daco_rt.corpus.parquet import ParquetCorpus
from daco_rt.corpus.text import TextCorpus
from daco_rt.corpus.webdataset import WebdatasetCorpus
from daco_rt.errors import DacoError, did_you_mean

READERS: dict[str, Any] = {
    "cc3m": Cc3mCorpus,
    "webdataset": WebdatasetCorpus,
    "parquet": ParquetCorpus,
    "folder": FolderCorpus,
    "text": TextCorpus,
}
_OPTIONS = {
    "cc3m": ("images", "naming"),
    "webdataset": (),
    "parquet": ("images", "caption", "image", "id"),
    "folder": ("captions",),
    "text": (),
}


def open_corpus(name: str, **options: Any) -> Corpus:
    """Open the corpus ``kind:place``.

    Parameters
    ----------
    name : "cc3m:FILE.tsv", "webdataset:FOLDER_OR_PATTERN", "parquet:FILE_OR_FOLDER", "folder:DIR" or
        "text:FILE".
    options : of that reader; those that are None are left out.

    Raises
    ------
    DacoError
        If the kind is unknown or does not take an option, or its files are missing.

    Example
    -------
    >>> open_corpus("cc3m:Train_GCC-training.tsv", images="images").kind
    'cc3m'
    """
    kind, mark, place = name.partition(":")
    if not mark or not place:
        raise DacoError(f"corpus {name!r} must be KIND:PLACE, with a kind of {', '.join(READERS)}")
    if kind not in READERS:
        raise DacoError(f"kind of corpus {kind!r} is unknown{did_you_mean(kind, READERS)}")
    given = {option: value for option, value in options.items() if value is not None}
    for option in given:
        if option not in _OPTIONS[kind]:
            takes = ", ".join(_OPTIONS[kind]) or "none"
            raise DacoError(f"a {kind} corpus takes no option {option!r}; it takes: {takes}")
    return READERS[kind](Path(place) if "*" not in place else place, **given)
