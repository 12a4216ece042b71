"""What is harvested: texts, with or without a picture, each for or against one concept.

Items are kept packed in arrays and one buffer of text, about 40 bytes beside each text, so that a million of
them is no matter; only a shard's are ever objects.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from daco_rt.artifacts import Concept
from daco_rt.concepts import TextStimulus, WordConcept, load_stimuli
from daco_rt.concepts.texts import CHATML, Markers
from daco_rt.errors import ArtifactError, DacoError

_PARTS = 4
"""Pieces of text that the table keeps of an item."""


@dataclass(frozen=True)
class HarvestItem:
    """One stimulus.

    ``concept`` is the row of its concept, ``sign`` 1 for an example of it and -1 for a counterexample,
    ``text[start:end]`` the concept's word (None and None where it is not said), ``image`` a picture that
    stands before the text, ``id`` what to call it in messages; unique within concept and sign. ``system`` is
    a system prompt under which the question about the picture is asked; texts hold their own.
    """

    concept: int
    sign: int
    text: str
    start: int | None
    end: int | None
    image: Path | None
    id: str
    system: str = ""


class ItemTable:
    """All items of a harvest, ordered by concept, positives first, otherwise as they came.

    Parameters
    ----------
    items : what to harvest; read once.
    concepts : number of concepts N.

    Raises
    ------
    DacoError
        If there is no item, or one has a concept outside ``0 … N − 1``, another sign than 1 or -1, or a span
        outside its text.

    Example
    -------
    >>> table = ItemTable([HarvestItem(0, 1, "A dagger.", 2, 8, None, "1")], concepts=1)
    >>> table.select(range(1))[0].text
    'A dagger.'
    """

    def __init__(self, items: Iterable[HarvestItem], concepts: int) -> None:
        concept, start, end = array("i"), array("i"), array("i")
        sign, lengths = array("b"), array("i")
        blob = bytearray()
        for item in items:
            _check(item, concepts)
            concept.append(item.concept)
            sign.append(item.sign)
            start.append(-1 if item.start is None else item.start)
            end.append(-1 if item.end is None else item.end)
            for part in (item.text, "" if item.image is None else str(item.image), item.id, item.system):
                data = part.encode(errors="surrogatepass")
                blob += data
                lengths.append(len(data))
        if not concept:
            raise DacoError("there is nothing to harvest; give one stimulus at least")
        self._blob = bytes(blob)
        self._sign = np.frombuffer(sign, np.int8)
        self._span = np.stack([np.frombuffer(start, np.int32), np.frombuffer(end, np.int32)], axis=1)
        self._ends = np.cumsum(np.frombuffer(lengths, np.int32), dtype=np.int64)
        concepts_of = np.frombuffer(concept, np.int32)
        self._order = np.lexsort((-self._sign, concepts_of))
        self._concept = concepts_of[self._order]

    def __len__(self) -> int:
        return len(self._concept)

    def __iter__(self) -> Iterator[HarvestItem]:
        return (self._item(place) for place in range(len(self)))

    @property
    def signs(self) -> tuple[int, ...]:
        """Return (1,), or (1, -1) if there are counterexamples."""
        return (1, -1) if (self._sign < 0).any() else (1,)

    @property
    def pictures(self) -> np.ndarray:
        """Return the places of the items that have a picture."""
        return np.flatnonzero(np.diff(self._ends, prepend=0)[1::_PARTS][self._order])

    def sample_pictures(self, count: int) -> list[HarvestItem]:
        """Return so many items with pictures, from all over the table; fewer if there are not as many."""
        places = self.pictures
        return [self._item(int(place)) for place in places[:: max(1, len(places) // count)][:count]]

    def concepts_per_shard(self, stimuli: int) -> int:
        """Return how many concepts have about so many stimuli, at least one."""
        return max(1, stimuli // -(-len(self) // len(np.unique(self._concept))))

    def places(self, concepts: range) -> range:
        """Return the places in the table of the items of a range of concepts."""
        first, last = np.searchsorted(self._concept, (concepts.start, concepts.stop))
        return range(int(first), int(last))

    def select(self, concepts: range) -> list[HarvestItem]:
        """Return the items of a range of concepts, in the table's order."""
        return [self._item(place) for place in self.places(concepts)]

    def sha256(self) -> str:
        """Return a hash of everything in the table; pictures count by their paths, not their contents."""
        digest = hashlib.sha256()
        for place in range(len(self)):
            i = int(self._order[place])
            head = f"{self._concept[place]} {self._sign[i]} {self._span[i, 0]} {self._span[i, 1]}"
            said = [self._part(i, part) for part in range(_PARTS)]
            # Without a system prompt the hash is that of tables that knew none.
            parts = [head.encode(), *(said if said[-1] else said[:-1])]
            digest.update(b"".join(len(part).to_bytes(4, "little") + part for part in parts))
        return digest.hexdigest()

    def _item(self, place: int) -> HarvestItem:
        i = int(self._order[place])
        text, image, name, system = (
            self._part(i, part).decode(errors="surrogatepass") for part in range(_PARTS)
        )
        start, end = (int(edge) for edge in self._span[i])
        return HarvestItem(
            int(self._concept[place]),
            int(self._sign[i]),
            text,
            None if start < 0 else start,
            None if end < 0 else end,
            Path(image) if image else None,
            name,
            system,
        )

    def _part(self, i: int, part: int) -> bytes:
        """Text (0), picture (1), id (2) or system prompt (3) of the item that came as number ``i``."""
        k = _PARTS * i + part
        return self._blob[int(self._ends[k - 1]) if k else 0 : int(self._ends[k])]


def _check(item: HarvestItem, concepts: int) -> None:
    what = f"stimulus {item.id!r}"
    if not 0 <= item.concept < concepts:
        raise DacoError(
            f"{what} is for concept {item.concept}, the table has {concepts}; use the table it was made from"
        )
    if item.sign not in (1, -1):
        raise DacoError(f"{what} has sign {item.sign}, expected 1 or -1")
    if (item.start is None) != (item.end is None) or (
        item.start is not None and item.end is not None and not 0 <= item.start < item.end <= len(item.text)
    ):
        raise DacoError(f"{what} marks characters {item.start} to {item.end} of a text of {len(item.text)}")


def text_items(
    stimuli: str | Path | Iterable[TextStimulus], concepts: Sequence[Concept] | None = None
) -> Iterator[HarvestItem]:
    """Yield the stimuli that ``daco-rt stimuli`` wrote, or that ``make_stimuli`` returned, as positives.

    Each is called by its line. With ``concepts`` their names must be those of the table.

    Raises
    ------
    ArtifactError
        If a line is no stimulus, or names another concept than the table does.
    """
    file = stimuli if isinstance(stimuli, str | Path) else None
    found = load_stimuli(stimuli) if isinstance(stimuli, str | Path) else stimuli
    for number, stimulus in enumerate(found, 1):
        _check_name(stimulus.concept, stimulus.name, concepts, f"{file or 'the stimuli'}, line {number}")
        yield HarvestItem(stimulus.concept, 1, stimulus.text, stimulus.start, stimulus.end, None, str(number))


def pair_items(
    pairs: str | Path | Any,
    concepts: Sequence[Concept] | None = None,
    *,
    root: str | Path | None = None,
    markers: Markers = CHATML,
) -> Iterator[HarvestItem]:
    """Yield the rows of a table of pairs, of both signs, called by the ids that they have in their corpus.

    Parameters
    ----------
    pairs : a Parquet file of ``daco-rt stimuli --corpus``, or what ``load_pairs`` returned.
    concepts : if given, names must be those of the table.
    root : where the pictures are now, if they were moved.
    markers : of the model's chat format. A caption without a picture stands as an answer that is under way;
        one with a picture is put behind it by the model's own chat template.

    Raises
    ------
    ArtifactError
        If the file holds no pairs, or a row names another concept than the table does.
    DacoError
        If pyarrow is not installed.
    """
    from daco_rt.corpus import load_pairs, metadata

    where = str(pairs) if isinstance(pairs, str | Path) else "the pairs"
    table = load_pairs(pairs, root=root) if isinstance(pairs, str | Path) else pairs
    place, opening, number = metadata(table)["root"], markers.assistant, 0
    columns = ("concept", "name", "pair", "sign", "caption", "image", "start", "end")
    for batch in table.select(list(columns)).to_batches(max_chunksize=4096):
        for row in zip(*(batch.column(name).to_pylist() for name in columns), strict=True):
            concept, name, pair, sign, text, image, start, end = row
            number += 1
            _check_name(concept, name, concepts, f"{where}, row {number}")
            if not image and text.strip():
                start, end = (edge + len(opening) if edge >= 0 else edge for edge in (start, end))
                text = opening + text
            yield HarvestItem(
                concept,
                sign,
                text,
                None if start < 0 else start,
                None if end < 0 else end,
                place / image if image else None,
                pair,
            )


def _check_name(row: int, name: str, concepts: Sequence[Concept] | None, where: str) -> None:
    if concepts is None or (0 <= row < len(concepts) and concepts[row].name == name):
        return
    theirs = repr(concepts[row].name) if 0 <= row < len(concepts) else f"one of {len(concepts)} rows"
    raise ArtifactError(
        f"{where}: row {row} is {name!r}, in the table {theirs}; use the table that they were made from"
    )


def table_concepts(table: Sequence[WordConcept]) -> tuple[Concept, ...]:
    """Return a concept table as the rows of an artifact."""
    return tuple(
        Concept(i, entry.name, entry.label, entry.group, entry.synset, entry.gloss, entry.source)
        for i, entry in enumerate(table)
    )
