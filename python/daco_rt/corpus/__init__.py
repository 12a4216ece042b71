"""Corpora of captioned pictures: reading, embedding, and finding the pairs that show a concept.

Neither torch nor pyarrow is imported until something needs it.
"""

from __future__ import annotations

from daco_rt.corpus.folder import FolderCorpus
from daco_rt.corpus.pairs import Corpus, Pair, Problems
from daco_rt.corpus.references import open_reference
from daco_rt.corpus.table import COLUMNS, load_image, load_pairs, metadata, pairs_schema, save_pairs

__all__ = [
    "COLUMNS",
    "Corpus",
    "FolderCorpus",
    "Pair",
    "Problems",
    "load_image",
    "load_pairs",
    "metadata",
    "open_reference",
    "pairs_schema",
    "save_pairs",
]
