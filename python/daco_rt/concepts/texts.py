"""Text stimuli for any concept table: definitions, WordNet's examples, and sentences around the word.

Every text says the concept's word once where its span is marked. Where the definition is used it comes
*before* the word: a language model reads from left to right, so only then does the reading at the word know
what is meant, and not only how it is spelt. The sentences are the same for all concepts, so that what they
add to a reading cancels against the other concepts' mean.
"""

from __future__ import annotations

import gzip
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

from daco_rt._files import atomic_file, refuse_existing
from daco_rt.concepts.mention import find_word
from daco_rt.errors import ArtifactError, did_you_mean

KINDS = ("definition", "example", "sentence")
COUNT = 7
MINIMUM = 4


class Sayable(Protocol):
    """What a concept needs for texts: entries of the built-in list and of tables have it."""

    @property
    def name(self) -> str: ...
    @property
    def gloss(self) -> str: ...
    @property
    def phrase(self) -> str: ...
    @property
    def plural(self) -> str | None: ...


@dataclass(frozen=True)
class Markers:
    """What a chat format puts around turns; ``user`` and ``assistant`` open one, ``end`` closes it."""

    start: str
    user: str
    assistant: str
    end: str


CHATML = Markers("<|im_start|>", "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n")
PLAIN = Markers("", "Question: ", "Answer: ", "\n")
FORMATS = {"chatml": CHATML, "plain": PLAIN}


@dataclass(frozen=True)
class TextStimulus:
    """One text.

    ``concept`` is the row of the concept in its table, ``name`` its word, ``kind`` "definition", "example" or
    "sentence", ``text[start:end]`` the word as it stands there.
    """

    concept: int
    name: str
    kind: str
    text: str
    start: int
    end: int


@dataclass
class StimulusSet:
    """The texts of a table, and what was left out.

    Attributes
    ----------
    stimuli : list of TextStimulus
        In the order of the table.
    counts : dict of int to int
        Row of the concept → number of its texts, for those that were kept.
    excluded : dict of str to int
        Name → number of texts, for concepts that have fewer than the minimum.
    skipped : Counter
        Reason → number of texts that were not used: "example without the word", "duplicate".
    """

    stimuli: list[TextStimulus] = field(default_factory=list)
    counts: dict[int, int] = field(default_factory=dict)
    excluded: dict[str, int] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)


# {w} is the word, {a} the word with its article, {s} the plural; {gloss} the definition. A leading ? opens a
# question whose answer is left to the model, a leading ! an answer that is under way.
_DEFINITIONS = (
    "The word for {gloss} is {w}.",
    "Think of {gloss}. In one word, that is {a}.",
    "!What you describe, {gloss}, is usually called {a}",
)
_SENTENCES = (
    "?What is {a}?",
    "In this picture one can see {a} quite clearly.",
    "!Here is what you should know about {a}",
    "?Tell me about {w}.",
    "Yesterday we talked about {a} for an hour.",
    "Many people want to learn more about {s} today.",
    "The whole chapter is about {w} and nothing else.",
    "She had never thought much about {a} before.",
    "!The image shows {a}",
    "?Can you explain the meaning of {w}?",
    "He wrote a long letter in which he mentioned {a} twice.",
    "Among other things, the list names {w}.",
    "It was the first time that they had to deal with {a}.",
    "There is a lot to say about {s}, but little time.",
    "?Write a short story about {a}.",
    "In the middle of the conversation somebody brought up {w}.",
    "!Of course! Let us talk about {a}",
    "The film begins and ends with {a}.",
    "Nobody in the room wanted to hear about {w} again.",
    "What surprised me most was {a}.",
    "?How would you describe {a} to a child?",
    "The old man told us everything that he knew about {s}.",
    "This is a photograph of {a}.",
    "!The answer has to do with {w}",
    "As far as I remember, the question was about {a}.",
    "The newspaper printed a story about {w} last week.",
    "?Why do people care about {w}?",
    "In her opinion, {a} is worth a closer look.",
    "Some of them had read about {s} at school.",
    "They kept coming back to the subject of {w}.",
)


def texts_for(
    concept: Sayable,
    *,
    row: int = 0,
    kinds: Sequence[str] = KINDS,
    markers: Markers = CHATML,
    skipped: Counter[str] | None = None,
) -> list[TextStimulus]:
    """Return every text that can be made for one concept, the most useful first, without duplicates.

    The first seven are two with the definition, three sentences, and two of WordNet's examples or, where
    there are none, more sentences.

    Example
    -------
    >>> from daco_rt.concepts import shipped_table
    >>> dagger = next(c for c in shipped_table() if c.name == "dagger")
    >>> s = texts_for(dagger)[0]
    >>> s.text[s.start : s.end]
    'dagger'
    """
    skipped = Counter() if skipped is None else skipped
    gloss = definition_of(concept.gloss)
    made: dict[str, list[tuple[str, int, int]]] = {kind: [] for kind in KINDS}
    if "definition" in kinds and gloss:
        made["definition"] = [_fill(template, concept, markers, gloss) for template in _DEFINITIONS]
    if "example" in kinds:
        for example in getattr(concept, "examples", ()):
            found = _example(example, concept, markers)
            if found is None:
                skipped["example without the word"] += 1
            else:
                made["example"].append(found)
    if "sentence" in kinds:
        made["sentence"] = [
            _fill(template, concept, markers, gloss)
            for template in _SENTENCES
            if "{s}" not in template or concept.plural is not None
        ]
    definitions, examples, sentences = (made[kind] for kind in KINDS)
    # Where there are fewer than two examples, sentences fill the first seven places.
    early = 5 - len(examples[:2])
    order = (
        ("definition", definitions[:2]),
        ("sentence", sentences[:3]),
        ("example", examples[:2]),
        ("sentence", sentences[3:early]),
        ("definition", definitions[2:]),
        ("sentence", sentences[early:]),
        ("example", examples[2:]),
    )
    texts: dict[str, TextStimulus] = {}
    for kind, items in order:
        for text, start, end in items:
            same = " ".join(text.lower().split())
            if same in texts:
                skipped["duplicate"] += 1
            else:
                texts[same] = TextStimulus(row, concept.name, kind, text, start, end)
    return list(texts.values())


def make_stimuli(
    concepts: Sequence[Sayable],
    *,
    count: int = COUNT,
    minimum: int = MINIMUM,
    kinds: Sequence[str] = KINDS,
    markers: Markers = CHATML,
) -> StimulusSet:
    """Make up to ``count`` texts for every concept of a table.

    Concepts with fewer than ``minimum`` texts get none and are listed in ``excluded``: the mean of a few
    readings says more about those texts than about the concept.

    Raises
    ------
    ArtifactError
        If a number is out of range, a kind is unknown, or no concept has enough texts.

    Example
    -------
    >>> found = make_stimuli(everyday_concepts(), count=10)
    >>> found.counts[0]
    10
    """
    if not 1 <= minimum <= count:
        raise ArtifactError(
            f"the minimum of texts must lie between 1 and the count of {count}, got {minimum}"
        )
    for kind in kinds:
        if kind not in KINDS:
            raise ArtifactError(f"kind of text {kind!r} is unknown{did_you_mean(str(kind), KINDS)}")
    found = StimulusSet()
    seen: set[tuple[str, int, int]] = set()
    for row, concept in enumerate(concepts):
        texts: list[TextStimulus] = []
        for stimulus in texts_for(concept, row=row, kinds=kinds, markers=markers, skipped=found.skipped):
            place = stimulus.text, stimulus.start, stimulus.end
            if place in seen:
                found.skipped["duplicate"] += 1
            elif len(texts) < count:
                texts.append(stimulus)
        if len(texts) < minimum:
            found.excluded[concept.name] = len(texts)
            continue
        seen.update((text.text, text.start, text.end) for text in texts)
        found.stimuli += texts
        found.counts[row] = len(texts)
    if not found.stimuli:
        raise ArtifactError(
            f"none of the {len(concepts)} concepts has {minimum} texts; lower the minimum or allow more kinds"
        )
    return found


def save_stimuli(stimuli: Iterable[TextStimulus], path: str | Path, *, overwrite: bool = False) -> Path:
    """Write texts as JSON lines, compressed if the name ends in ``.gz``; equal texts give equal bytes.

    Raises
    ------
    ArtifactError
        If the file exists and ``overwrite`` is off, or it cannot be written.
    """
    path = Path(path)
    if not overwrite:
        refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(asdict(stimulus), ensure_ascii=False, separators=(",", ":")) for stimulus in stimuli)
    data = "".join(f"{line}\n" for line in lines).encode()
    if path.suffix == ".gz":
        buffer = io.BytesIO()
        with gzip.GzipFile(filename="", mode="wb", fileobj=buffer, mtime=0) as packed:
            packed.write(data)
        data = buffer.getvalue()
    with atomic_file(path) as file:
        file.write(data)
    return path


def load_stimuli(path: str | Path) -> Iterator[TextStimulus]:
    """Read texts one by one, so that memory stays flat.

    Raises
    ------
    ArtifactError
        At the first line that is no stimulus, or whose span lies outside its text.
    """
    path = Path(path)
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as file:  # type: ignore[operator]
            for number, line in enumerate(file, 1):
                yield _stimulus(line, f"{path}, line {number}")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} cannot be read as stimuli: {error}") from error


def _stimulus(line: str, where: str) -> TextStimulus:
    try:
        stimulus = TextStimulus(**json.loads(line))
        if not 0 <= stimulus.start < stimulus.end <= len(stimulus.text):
            raise ValueError(f"the span {stimulus.start} to {stimulus.end} lies outside the text")
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"{where}: no stimulus ({error}); make the file again") from error
    return stimulus


def definition_of(gloss: str) -> str:
    """Return the first clause of a gloss, without the field of knowledge before it.

    Example
    -------
    >>> definition_of("(music) a short tune; also a song")
    'a short tune'
    """
    clause = re.sub(r"^(\([^()]*\)\s*)+", "", gloss.strip()).split(";")[0]
    return clause.strip(" .,:")


def _fill(template: str, concept: Sayable, markers: Markers, gloss: str) -> tuple[str, int, int]:
    mood = template[0] if template[0] in "?!" else ""
    text = template[len(mood) :].replace("{gloss}", gloss)
    slot = re.search(r"\{([was])\}", text)
    assert slot is not None  # every template has one
    words = {"w": concept.name, "a": concept.phrase, "s": concept.plural or concept.name}[slot[1]]
    said = concept.plural if slot[1] == "s" else concept.name
    assert said is not None
    opening = {"?": markers.user, "!": markers.assistant, "": markers.start}[mood]
    start = len(opening) + slot.start() + len(words) - len(said)
    text = opening + text[: slot.start()] + words + text[slot.end() :]
    if mood == "?":
        text += markers.end + markers.assistant
    return text, start, start + len(said)


def _example(example: str, concept: Sayable, markers: Markers) -> tuple[str, int, int] | None:
    found = find_word(concept, example)
    if found is None:
        return None
    body = example[0].upper() + example[1:]
    if body[-1] not in ".?!":
        body += "."
    offset = len(markers.start)
    return markers.start + body, offset + found[0], offset + found[1]
