"""Captions that say the same: a list of them would count one picture, or one phrase, many times."""

from __future__ import annotations

import re
from itertools import pairwise

THRESHOLD = 0.7
_WORD = re.compile(r"\w+")


def normal_form(caption: str) -> str:
    """Return the caption's words in lower case, one blank between them, without punctuation.

    Example
    -------
    >>> normal_form("A dagger, on the Table!")
    'a dagger on the table'
    """
    return " ".join(_WORD.findall(caption.casefold()))


def shingles(caption: str) -> frozenset[str]:
    """Return the words of a caption and its pairs of neighbouring words, in normal form."""
    words = normal_form(caption).split()
    return frozenset(words).union(f"{a} {b}" for a, b in pairwise(words))


class DistinctCaptions:
    """Admits captions that are not near-duplicates of those admitted before.

    Two captions are near-duplicates if their normal forms are equal, or if the Jaccard similarity of their
    shingles (words and pairs of words) is at least ``threshold``. At most ``copies`` of one another are
    admitted: more than one helps where pictures differ but captions are labels, as with emoji of two makers.

    The comparison is exact: a concept's list is short, so nothing would be gained by hashing.
    Cost: O(admitted × words).

    Example
    -------
    >>> distinct = DistinctCaptions()
    >>> [distinct.admit(c) for c in ("a dagger on a table", "A dagger, on a table.", "a rusty dagger")]
    [True, False, True]
    """

    def __init__(self, *, threshold: float = THRESHOLD, copies: int = 1) -> None:
        self.threshold, self.copies = threshold, copies
        self._admitted: list[frozenset[str]] = []

    def admit(self, caption: str) -> bool:
        """Return whether a caption is distinct, and remember it if so."""
        mine = shingles(caption)
        alike = 0
        for other in self._admitted:
            shared = len(mine & other)
            union = len(mine) + len(other) - shared
            if mine == other or (union and shared >= self.threshold * union):
                alike += 1
                if alike >= self.copies:
                    return False
        self._admitted.append(mine)
        return True
