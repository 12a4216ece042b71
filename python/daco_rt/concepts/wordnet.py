"""Reader of WordNet's noun files: any ``dict`` folder of WordNet 3.x, or Debian's ``wordnet-base``.

Read are ``data.noun`` (the synsets), ``index.noun`` (the order of a word's senses), ``cntlist.rev`` (how
often a sense was met in tagged text) and ``noun.exc`` (irregular plurals). A synset is named by its first
word and the number of that sense among the word's: ``dagger.n.01``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from daco_rt.errors import ArtifactError

FILES = ("data.noun", "index.noun", "cntlist.rev", "noun.exc")
ENVIRONMENT = "DACO_RT_WORDNET"
FETCH = "bash scripts/fetch_wordnet.sh"
_PLACES = ("/usr/share/wordnet", "build/deps/wordnet")

# Lexicographer files 3 to 28 in the order of WordNet's lexnames(5).
_TOPICS = (
    "tops",
    "act",
    "animal",
    "artifact",
    "attribute",
    "body",
    "cognition",
    "communication",
    "event",
    "feeling",
    "food",
    "group",
    "location",
    "motive",
    "object",
    "person",
    "phenomenon",
    "plant",
    "possession",
    "process",
    "quantity",
    "relation",
    "shape",
    "state",
    "substance",
    "time",
)


@dataclass(frozen=True)
class Synset:
    """One meaning.

    Attributes
    ----------
    offset : int
        Byte offset in ``data.noun``, by which other synsets point here.
    words : tuple of str
        Its words, spaces for underscores, the customary one first.
    counts : tuple of int
        How often each word was met in this sense, mostly 0.
    topic : str
        Name of the lexicographer's file: "artifact", "person", "substance", …
    gloss : str
        The definition.
    examples : tuple of str
        Sentences or phrases in which one of the words is used.
    hypernyms : tuple of int
        Offsets of what this is a kind of.
    is_instance : bool
        Whether it names one thing (a city, a person) and not a kind.
    """

    offset: int
    words: tuple[str, ...]
    counts: tuple[int, ...]
    topic: str
    gloss: str
    examples: tuple[str, ...]
    hypernyms: tuple[int, ...]
    is_instance: bool

    @property
    def count(self) -> int:
        """How often the first word was met in this sense."""
        return self.counts[0]


class WordNet:
    """The nouns of one WordNet folder.

    Parameters
    ----------
    folder : path
        A folder that holds ``data.noun``, ``index.noun``, ``cntlist.rev`` and ``noun.exc``.

    Raises
    ------
    ArtifactError
        If a file is missing or a line does not parse; the sentence names file and line.

    Example
    -------
    >>> wordnet = WordNet(find_wordnet())
    >>> wordnet.synset("dagger.n.01").gloss
    'a short knife with a pointed blade used for piercing or stabbing'
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        missing = [name for name in FILES if not (self.folder / name).is_file()]
        if missing:
            raise ArtifactError(
                f"{self.folder} is no WordNet folder: it has no {missing[0]}; name a folder with "
                f"{', '.join(FILES)}, or fetch one: {FETCH}"
            )
        self._counts = self._read_counts()
        self.synsets: dict[int, Synset] = {}
        """Every noun synset by its offset, in the file's order."""
        for number, line in self._lines("data.noun"):
            synset = self._parse(line, number)
            self.synsets[synset.offset] = synset
        if not self.synsets:
            raise ArtifactError(f"{self.folder / 'data.noun'} holds no synset; fetch it again: {FETCH}")
        self._check_pointers()

    @cached_property
    def senses(self) -> dict[str, tuple[int, ...]]:
        """Word in lower case → offsets of its senses, the most frequent first."""
        found: dict[str, tuple[int, ...]] = {}
        for number, line in self._lines("index.noun"):
            try:
                cells = line.split()
                count, pointers = int(cells[2]), int(cells[3])
                offsets = tuple(int(cell) for cell in cells[6 + pointers :])
                if len(offsets) != count:
                    raise ValueError(f"{count} senses announced, {len(offsets)} listed")
            except (ValueError, IndexError) as error:
                raise self._bad("index.noun", number, error) from error
            found[cells[0].replace("_", " ")] = offsets
        return found

    @cached_property
    def names(self) -> dict[int, str]:
        """Offset → name of every synset."""
        found = {}
        for offset, synset in self.synsets.items():
            word = synset.words[0].lower()
            senses = self.senses.get(word, ())
            number = senses.index(offset) + 1 if offset in senses else 0
            found[offset] = f"{word.replace(' ', '_')}.n.{number:02d}"
        return found

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Name → offset."""
        return {name: offset for offset, name in self.names.items()}

    @cached_property
    def plurals(self) -> dict[str, str]:
        """Singular → irregular plural; the first that is listed."""
        found: dict[str, str] = {}
        for number, line in self._lines("noun.exc"):
            cells = line.split()
            if len(cells) < 2:
                raise self._bad("noun.exc", number, ValueError("expected a plural and its singular"))
            found.setdefault(cells[1].replace("_", " "), cells[0].replace("_", " "))
        return found

    @cached_property
    def tagged_elsewhere(self) -> frozenset[str]:
        """Words that the tagged text knows as verb, adjective or adverb."""
        keys = (key.partition("%") for key in self._counts)
        return frozenset(word.replace("_", " ") for word, _, sense in keys if not sense.startswith("1"))

    def synset(self, name: str) -> Synset:
        """Return the synset of that name.

        Raises
        ------
        ArtifactError
            If there is none.
        """
        if name not in self.offsets:
            raise ArtifactError(f"{self.folder} has no synset '{name}'; write word.n.NN, as in dagger.n.01")
        return self.synsets[self.offsets[name]]

    def count(self, offset: int, word: str) -> int:
        """Return how often ``word``, in lower case, was met in that sense."""
        synset = self.synsets[offset]
        return max(
            (
                count
                for other, count in zip(synset.words, synset.counts, strict=True)
                if other.lower() == word
            ),
            default=0,
        )

    def paths(self, offset: int) -> tuple[tuple[str, ...], ...]:
        """Return every way up to a root: names of ancestors, nearest first, without the synset itself."""
        return tuple(tuple(self.names[above] for above in way) for way in self._ways(offset, (offset,)))

    def depth(self, offset: int) -> int:
        """Return the length of the shortest way up; 0 for a root."""
        return min(map(len, self._ways(offset, (offset,))))

    def _ways(self, offset: int, seen: tuple[int, ...]) -> list[tuple[int, ...]]:
        # WordNet 3.0 has no cycle; an edited copy might.
        above = [h for h in self.synsets[offset].hypernyms if h not in seen]
        if not above:
            return [()]
        return [(h, *rest) for h in above for rest in self._ways(h, (*seen, h))]

    def _lines(self, name: str) -> Iterator[tuple[int, str]]:
        path = self.folder / name
        try:
            text = path.read_text(encoding="utf-8", errors="strict")
        except (OSError, UnicodeDecodeError) as error:
            raise ArtifactError(f"{path} cannot be read ({error}); fetch it again: {FETCH}") from error
        for number, line in enumerate(text.split("\n"), 1):
            # The licence stands at the head of every file, indented by two spaces.
            if line and not line.startswith("  "):
                yield number, line

    def _read_counts(self) -> dict[str, int]:
        counts = {}
        for number, line in self._lines("cntlist.rev"):
            try:
                key, _, count = line.split()
                counts[key] = int(count)
            except ValueError as error:
                raise self._bad("cntlist.rev", number, error) from error
        return counts

    def _parse(self, line: str, number: int) -> Synset:
        try:
            head, _, gloss = line.partition(" | ")
            cells = head.split()
            file, words = int(cells[1]), int(cells[3], 16)
            lemmas = [(cells[4 + 2 * i], int(cells[5 + 2 * i], 16)) for i in range(words)]
            at = 4 + 2 * words
            pointers = [cells[at + 1 + 4 * i : at + 5 + 4 * i] for i in range(int(cells[at]))]
            up = [int(p[1]) for p in pointers if p[0] in ("@", "@i")]
            definition, examples = split_gloss(gloss)
            return Synset(
                int(cells[0]),
                tuple(lemma.replace("_", " ") for lemma, _ in lemmas),
                tuple(
                    self._counts.get(f"{lemma.lower()}%1:{file:02d}:{sense:02d}::", 0)
                    for lemma, sense in lemmas
                ),
                _TOPICS[file - 3],
                definition,
                examples,
                tuple(up),
                any(p[0] == "@i" for p in pointers),
            )
        except (ValueError, IndexError) as error:
            raise self._bad("data.noun", number, error) from error

    def _check_pointers(self) -> None:
        for synset in self.synsets.values():
            for above in synset.hypernyms:
                if above not in self.synsets:
                    raise ArtifactError(
                        f"{self.folder / 'data.noun'}: synset {synset.offset:08d} points to {above:08d}, "
                        f"which is not there; the file is cut short, fetch it again: {FETCH}"
                    )

    def _bad(self, name: str, number: int, error: Exception) -> ArtifactError:
        return ArtifactError(
            f"{self.folder / name}, line {number}: not a line of WordNet ({error}); fetch it again: {FETCH}"
        )


def split_gloss(gloss: str) -> tuple[str, tuple[str, ...]]:
    """Part a gloss into its definition and the quoted examples after it.

    Example
    -------
    >>> split_gloss('a large gun; "the gun roared"; "two guns"')
    ('a large gun', ('the gun roared', 'two guns'))
    """
    head, quote, tail = gloss.strip().partition('; "')
    if not quote:
        return head.strip(" ;"), ()
    pieces = (piece.strip(" ;") for piece in tail.split('"'))
    # Between two quotations stand a separator, an author's name after a dash, or nothing.
    return head.strip(" ;"), tuple(piece for piece in pieces if piece and not piece.startswith("-"))


def find_wordnet(folder: str | Path | None = None) -> Path:
    """Return the WordNet folder to use: the one given, ``$DACO_RT_WORDNET``, or a usual place.

    Raises
    ------
    ArtifactError
        If there is none; the sentence says how to fetch one.
    """
    asked = folder if folder is not None else os.environ.get(ENVIRONMENT)
    if asked is not None:
        path = Path(asked)
        # The archive of WordNet's makers has the files in a folder "dict".
        return path / "dict" if (path / "dict" / "data.noun").is_file() else path
    for place in _PLACES:
        if (Path(place) / "data.noun").is_file():
            return Path(place)
    raise ArtifactError(
        f"no WordNet found in {', '.join(_PLACES)}; fetch it ({FETCH}), or name a folder with "
        f"{', '.join(FILES)} by --wordnet or {ENVIRONMENT}"
    )
