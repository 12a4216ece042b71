"""Texts kept out of the harvest, to test directions on: unseen sentences, and definitions without the word.

A reading at the word of an unseen sentence mostly tells which *word* stands there. A definition read at its
last token, without the word in it, tells whether the *meaning* is found.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from daco_rt.concepts.texts import CHATML, Markers, Sayable, TextStimulus, definition_of
from daco_rt.errors import ArtifactError

HELD_OUT = 2
ALONE, ASKED = "definition alone", "definition asked"
WITHOUT_WORD = (ALONE, ASKED)


def split_stimuli(
    stimuli: Iterable[TextStimulus], *, harvest: int, held_out: int = HELD_OUT
) -> tuple[list[TextStimulus], list[TextStimulus]]:
    """Divide texts concept by concept: the first ``harvest`` of each, and up to ``held_out`` of those after.

    ``make_stimuli`` gives the most useful texts first and no text twice, so what is held out differs from all
    that is harvested: the third definition, later sentences, later examples.

    Raises
    ------
    ArtifactError
        If a number is below 1, or nothing is left to hold out.

    Example
    -------
    >>> seen, unseen = split_stimuli(make_stimuli(shipped_table(), count=9).stimuli, harvest=7)
    >>> len(unseen)
    30000
    """
    if harvest < 1 or held_out < 1:
        raise ArtifactError(f"texts to harvest and to hold out must be 1 at least, got {harvest}, {held_out}")
    seen: Counter[int] = Counter()
    parts: tuple[list[TextStimulus], list[TextStimulus]] = ([], [])
    for stimulus in stimuli:
        place = seen[stimulus.concept]
        seen[stimulus.concept] += 1
        if place < harvest + held_out:
            parts[place >= harvest].append(stimulus)
    if not parts[1]:
        raise ArtifactError(f"no concept has more than {harvest} texts; make more texts or harvest fewer")
    return parts


def definition_stimuli(
    concepts: Sequence[Sayable], *, markers: Markers = CHATML, skipped: Counter[str] | None = None
) -> list[TextStimulus]:
    """Return two texts a concept that give its definition and never say its word; the span is their end.

    "definition alone" is the bare definition, read at its last token. "definition asked" is a question for
    the word, read at the last token before the answer. Definitions that contain the word, or one of the same
    stem, and empty ones are left out and counted in ``skipped``.

    Example
    -------
    >>> [s.kind for s in definition_stimuli(shipped_table()[:1])]
    ['definition alone', 'definition asked']
    """
    skipped = Counter() if skipped is None else skipped
    made = []
    for row, concept in enumerate(concepts):
        gloss = definition_of(concept.gloss)
        if not gloss:
            skipped["no definition"] += 1
        elif _says(gloss, concept.name):
            skipped["definition says the word"] += 1
        else:
            alone = markers.start + gloss[0].upper() + gloss[1:]
            asked = f"{markers.user}What do we call this: {gloss}?{markers.end}{markers.assistant}"
            for kind, text in ((ALONE, alone), (ASKED, asked)):
                made.append(TextStimulus(row, concept.name, kind, text, len(text) - 1, len(text)))
    return made


def _says(gloss: str, name: str) -> bool:
    """Whether a definition contains a part of the name, or a word that begins as it does."""
    words = re.findall(r"\w+", gloss.lower())
    for part in re.findall(r"\w+", name.lower()):
        stem = part[: max(5, len(part) - 2)]
        if any(word == part or (len(part) >= 4 and word.startswith(stem)) for word in words):
            return True
    return False
