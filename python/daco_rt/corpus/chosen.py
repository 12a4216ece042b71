"""What a retriever gives back: the rows of the table of pairs, and what was left out and why."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from daco_rt.concepts import WordConcept, find_word
from daco_rt.corpus.pairs import Corpus, Pair
from daco_rt.corpus.table import COLUMNS
from daco_rt.errors import DacoError

COUNT, MINIMUM = 27, 4
SAMPLE = 32_768


@dataclass
class PairSet:
    """Pairs of concepts.

    Attributes
    ----------
    columns : dict of str to list
        The columns of ``daco_rt.corpus.COLUMNS``, ordered by concept, then X⁺ before X⁻, then rank.
    counts : dict of int to tuple of int
        Row of each concept that was kept → numbers of its X⁺ and X⁻, which differ in a small corpus only.
    excluded : dict of str to int
        Name → number of X⁺ found, for concepts with fewer X⁺ or X⁻ than the minimum.
    skipped : Counter
        Reason → number of pairs that were passed over.
    settings : dict
        How the pairs were chosen, as JSON.
    """

    columns: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in COLUMNS})
    counts: dict[int, tuple[int, int]] = field(default_factory=dict)
    excluded: dict[str, int] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)
    settings: dict[str, Any] = field(default_factory=dict)

    def add(
        self,
        row: int,
        concept: WordConcept,
        pair: Pair,
        sign: int,
        score: float,
        similarities: tuple[float | None, float | None] = (None, None),
    ) -> None:
        """Append one pair; where its caption says the concept's word is looked up here."""
        start, end = find_word(concept, pair.caption) or (-1, -1)
        values = (
            row, concept.name, pair.id, sign, *similarities, score, pair.caption, pair.image_ref, start, end,
        )  # fmt: skip
        for name, value in zip(COLUMNS, values, strict=True):
            self.columns[name].append(value)

    def extend(self, other: PairSet) -> None:
        """Append the pairs of further concepts."""
        for name, values in other.columns.items():
            self.columns[name].extend(values)
        self.counts |= other.counts
        self.excluded |= other.excluded
        self.skipped += other.skipped

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the settings as JSON."""
        return {
            "columns": self.columns,
            "counts": [[row, *numbers] for row, numbers in self.counts.items()],
            "excluded": self.excluded,
            "skipped": dict(self.skipped),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PairSet:
        """Return what ``to_dict`` gave."""
        counts = {int(row): (int(positive), int(negative)) for row, positive, negative in data["counts"]}
        return cls(data["columns"], counts, dict(data["excluded"]), Counter(data["skipped"]))


class ImageCheck:
    """Whether a pair's picture can be opened; each picture is tried once, those that cannot are problems."""

    def __init__(self, corpus: Corpus, enabled: bool = True) -> None:
        self._corpus = corpus
        self._enabled = enabled and corpus.has_images
        self._known: dict[str, bool] = {}

    def __call__(self, pair: Pair) -> bool:
        if not self._enabled:
            return True
        if pair.image_ref not in self._known:
            try:
                self._corpus.open_image(pair.image_ref)
                self._known[pair.image_ref] = True
            except DacoError as error:
                self._corpus.problems.add("picture broken", pair.id, str(error))
                self._known[pair.image_ref] = False
        return self._known[pair.image_ref]


def concept_random(seed: int, concept: WordConcept) -> np.random.Generator:
    """Return the generator of one concept: a function of seed and concept, not of its place in the table."""
    digest = hashlib.sha256(f"{seed}\0{concept.key}".encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, np.uint32))


def check_numbers(count: int, minimum: int, sample: int, copies: int) -> None:
    """Refuse numbers out of range."""
    if not 1 <= minimum <= count:
        raise DacoError(f"the minimum of pairs must lie between 1 and the count of {count}, got {minimum}")
    if sample < 2 * count:
        raise DacoError(f"the common sample must hold twice the count of {count} or more, got {sample}")
    if copies < 1:
        raise DacoError(f"at least one pair of equal captions must be allowed, got {copies}")
