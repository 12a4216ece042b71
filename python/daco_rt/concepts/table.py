"""The concept table: one JSON object a line, compressed if the file's name ends in ``.gz``.

Equal concepts give equal bytes: keys have a fixed order and the compressed form carries no time or name.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from daco_rt._files import atomic_file, refuse_existing
from daco_rt.concepts.everyday import LABELS
from daco_rt.errors import ArtifactError, did_you_mean

# WordNet does not say which nouns are counted. Words filed under these topics mostly take an article.
_COUNTED = frozenset(("animal", "artifact", "body", "communication", "group", "location", "object", "person"))
_COUNTED |= {"plant", "shape", "quantity", "time", "tops"}
# Below these they do not.
_UNCOUNTED = frozenset(("matter.n.03", "drug.n.01", "fabric.n.01", "language.n.01", "weaponry.n.01"))
SHIPPED = Path(__file__).resolve().parent.parent / "data" / "wordnet-concepts.jsonl.gz"


@dataclass(frozen=True)
class WordConcept:
    """One concept of a table.

    Attributes
    ----------
    synset : str
        ``"dagger.n.01"``; empty for a concept that is in no WordNet.
    name : str
        The customary word or two-word compound.
    words : tuple of str
        All words of the synset, ``name`` first.
    gloss : str
        The definition.
    examples : tuple of str
        Sentences or phrases that use one of the words.
    paths : tuple of tuples of str
        Every way up to a root of WordNet, the nearest ancestor first.
    topic : str
        WordNet's coarse field: "artifact", "person", "act", …
    frequency : int
        How often the sense was met in WordNet's tagged text.
    mentions : int
        In how many definitions and examples of other concepts the word occurs.
    irregular : str
        The plural where it is irregular.
    label, group : str
        "desirable", "undesirable" or "neutral", and a heading such as "weapons".
    source, reason : str
        Who gave the label ("rules", "endpoint …", "hand"), and why.

    Example
    -------
    >>> WordConcept("dagger.n.01", "dagger", topic="artifact").phrase
    'a dagger'
    """

    synset: str
    name: str
    words: tuple[str, ...] = ()
    gloss: str = ""
    examples: tuple[str, ...] = ()
    paths: tuple[tuple[str, ...], ...] = ()
    topic: str = ""
    frequency: int = 0
    mentions: int = 0
    irregular: str = ""
    label: str = "neutral"
    group: str = ""
    source: str = ""
    reason: str = ""

    @property
    def key(self) -> str:
        """The synset, or the name where there is none: what labels refer to."""
        return self.synset or self.name

    @property
    def plural(self) -> str | None:
        """The plural; None for words that are mostly used without one."""
        if self.topic not in _COUNTED or any(_UNCOUNTED.intersection(path[:6]) for path in self.paths):
            return None
        if self.irregular:
            return self.irregular
        if self.name.endswith("y") and self.name[-2:-1] not in tuple("aeiou"):
            return f"{self.name[:-1]}ies"
        return f"{self.name}es" if self.name.endswith(("s", "x", "z", "ch", "sh")) else f"{self.name}s"

    @property
    def phrase(self) -> str:
        """The name as it stands after a verb: "a dagger", "an orange", "honesty"."""
        if self.plural is None:
            return self.name
        return ("an " if self.name[0].lower() in "aeiou" else "a ") + self.name


_FIELDS = {field.name: field.default for field in fields(WordConcept)}
_LISTS = ("words", "examples", "paths")
_NUMBERS = ("frequency", "mentions")


def save_table(concepts: Iterable[WordConcept], path: str | Path, *, overwrite: bool = False) -> Path:
    """Write a table in one step; the old file, if any, stays until the new one is complete.

    Raises
    ------
    ArtifactError
        If the file exists and ``overwrite`` is off, or it cannot be written.

    Example
    -------
    >>> save_table(shipped_table()[:100], "first.jsonl")
    PosixPath('first.jsonl')
    """
    path = Path(path)
    if not overwrite:
        refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    for concept in concepts:
        row = {name: getattr(concept, name) for name, default in _FIELDS.items()}
        kept = {name: value for name, value in row.items() if value != _FIELDS[name]}
        text.write(json.dumps(kept, ensure_ascii=False, separators=(",", ":")) + "\n")
    data = text.getvalue().encode()
    with atomic_file(path) as file:
        file.write(_compressed(data) if path.suffix == ".gz" else data)
    return path


def load_table(path: str | Path) -> tuple[WordConcept, ...]:
    """Read and check a table.

    Raises
    ------
    ArtifactError
        If the file cannot be read or a line is no concept; the sentence names the line, and for an unknown
        key the nearest known one.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} cannot be read as a concept table: {error}") from error
    found: dict[str, WordConcept] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line:
            continue
        concept = _concept(line, f"{path}, line {number}")
        if concept.key in found:
            raise ArtifactError(f"{path}, line {number}: '{concept.key}' comes twice; remove one")
        found[concept.key] = concept
    if not found:
        raise ArtifactError(f"{path} holds no concept; make it again: daco-rt concepts --output {path}")
    return tuple(found.values())


def shipped_table() -> tuple[WordConcept, ...]:
    """Return the table of the package: 15,000 concepts of WordNet 3.0 with labels by the default rules.

    Example
    -------
    >>> len(shipped_table())
    15000
    """
    return load_table(SHIPPED)


def count_labels(concepts: Sequence[WordConcept]) -> dict[str, dict[str, int]]:
    """Return label → group → number of concepts, the largest first; "" counts those without a group."""
    counts: dict[str, dict[str, int]] = {label: {} for label in LABELS}
    for concept in concepts:
        groups = counts[concept.label]
        groups[concept.group] = groups.get(concept.group, 0) + 1
    return {
        label: dict(sorted(groups.items(), key=lambda item: (-item[1], item[0])))
        for label, groups in counts.items()
    }


def _compressed(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=buffer, mtime=0, compresslevel=9) as file:
        file.write(data)
    return buffer.getvalue()


def _concept(line: str, where: str) -> WordConcept:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{where}: not a JSON object ({error}); make the table again") from error
    if not isinstance(row, dict):
        raise ArtifactError(
            f"{where}: expected a JSON object, got {type(row).__name__}; make the table again"
        )
    for name, value in row.items():
        if name not in _FIELDS:
            raise ArtifactError(f"{where}: key '{name}' is unknown{did_you_mean(name, _FIELDS)}")
        if name in _LISTS:
            row[name] = _texts(value, name, where)
        elif not isinstance(value, int if name in _NUMBERS else str) or isinstance(value, bool):
            kind = "an integer" if name in _NUMBERS else "text"
            raise ArtifactError(f"{where}: {name} must be {kind}, got {value!r}")
    if not row.get("name"):
        raise ArtifactError(f"{where}: a concept needs a name")
    label = row.get("label", "neutral")
    if label not in LABELS:
        raise ArtifactError(f"{where}: label {label!r} is unknown{did_you_mean(label, LABELS)}")
    return WordConcept(row.pop("synset", ""), row.pop("name"), **row)


def _texts(value: Any, name: str, where: str) -> tuple:
    inner = list if name == "paths" else str
    if not isinstance(value, list) or not all(isinstance(item, inner) for item in value):
        raise ArtifactError(f"{where}: {name} must be a list of {'lists' if inner is list else 'texts'}")
    if inner is str:
        return tuple(value)
    return tuple(_texts(item, "path", where) for item in value)
