"""Where a text says a concept's word: whole words, singular or plural, in any case."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

_WORD = re.compile(r"[\w-]+")


class Named(Protocol):
    """What has a word and maybe a plural."""

    @property
    def name(self) -> str: ...
    @property
    def plural(self) -> str | None: ...


def find_word(concept: Named, text: str) -> tuple[int, int] | None:
    """Return the characters of the last place where ``text`` says the concept's word; None if it does not.

    Of several places the last has read the most context. A word ends where no letter, digit, underscore or
    hyphen follows: "dog-tired" and "hotdog" do not say "dog", "the dog's" does.

    Example
    -------
    >>> from daco_rt.concepts import WordConcept
    >>> find_word(WordConcept("", "dagger", topic="artifact"), "Two Daggers and a sword")
    (4, 11)
    """
    forms = [re.escape(form).replace(r"\ ", r"\s+") for form in (concept.plural, concept.name) if form]
    hits = list(re.finditer(rf"(?<![\w-])(?:{'|'.join(forms)})(?![\w-])", text, re.IGNORECASE))
    return (hits[-1].start(), hits[-1].end()) if hits else None


class WordIndex:
    """The words of a whole table at once: which concepts does a text say?

    Cost: one pass over the text's words, whatever the number of concepts.

    Parameters
    ----------
    concepts : the table. A plural that is another concept's own word ("glasses") counts for that one alone.

    Example
    -------
    >>> from daco_rt.concepts import shipped_table
    >>> table = shipped_table()
    >>> {table[row].name for row in WordIndex(table).find("a dagger and two machine guns")}
    {'dagger', 'machine gun', 'two'}
    """

    def __init__(self, concepts: Sequence[Named]) -> None:
        self._rows: dict[tuple[str, ...], list[int]] = {}
        for row, concept in enumerate(concepts):
            self._rows.setdefault(_words(concept.name), []).append(row)
        plurals: dict[tuple[str, ...], list[int]] = {}
        for row, concept in enumerate(concepts):
            if concept.plural and (form := _words(concept.plural)) not in self._rows:
                plurals.setdefault(form, []).append(row)
        self._rows |= plurals
        self._longest = max(map(len, self._rows), default=0)
        self._first = {form[0] for form in self._rows if form}

    def find(self, text: str) -> dict[int, tuple[int, int]]:
        """Return row of each concept that ``text`` says → characters of the last place.

        Where a compound is said its words are not said on their own: a machine gun is here no machine.
        """
        places = [(match[0].casefold(), match.start(), match.end()) for match in _WORD.finditer(text)]
        found: dict[int, tuple[int, int]] = {}
        at = 0
        while at < len(places):
            taken = 1
            if places[at][0] in self._first:
                for length in range(min(self._longest, len(places) - at), 0, -1):
                    run = places[at : at + length]
                    rows = self._rows.get(tuple(word for word, _, _ in run))
                    # Nothing but blanks may stand inside a compound.
                    gaps = [text[a[2] : b[1]] for a, b in pairwise(run)]
                    if rows and all(map(str.isspace, gaps)):
                        found.update(dict.fromkeys(rows, (run[0][1], run[-1][2])))
                        taken = length
                        break
            at += taken
        return found


def _words(form: str) -> tuple[str, ...]:
    return tuple(form.casefold().split())
