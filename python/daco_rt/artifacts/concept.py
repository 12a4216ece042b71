"""The table of concepts behind the atoms of a dictionary, an SAE or a pack: one JSON line a concept."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from daco_rt.errors import ArtifactError

LABELS = ("desirable", "undesirable", "neutral")


@dataclass(frozen=True)
class Concept:
    """One named atom.

    ``index`` is its row, ``label`` one of "desirable", "undesirable", "neutral", ``group`` a free heading
    ("weapons"), ``synset`` the WordNet id ("dagger.n.01"), ``gloss`` its definition, ``source`` who labelled
    it. The last four may be empty.
    """

    index: int
    name: str
    label: str = "neutral"
    group: str = ""
    synset: str = ""
    gloss: str = ""
    source: str = ""


_TEXT = tuple(field.name for field in fields(Concept) if field.name != "index")


def concept_rows(concepts: Iterable[Concept]) -> Iterator[dict[str, object]]:
    """Return the table's rows as plain JSON objects; empty fields are left out."""
    for concept in concepts:
        yield {key: value for key, value in asdict(concept).items() if value != ""}


def check_concepts(concepts: Iterable[Concept], atoms: int, where: str | Path) -> tuple[Concept, ...]:
    """Return the concepts as a tuple after checking them.

    Raises
    ------
    ArtifactError
        If an index is outside ``0 … atoms − 1`` or comes twice, a label is unknown or a name is empty.
    """
    table = tuple(concepts)
    seen: set[int] = set()
    for concept in table:
        what = f"{where}: concept '{concept.name}' of index {concept.index}"
        if not 0 <= concept.index < atoms:
            raise ArtifactError(f"{what} is outside the {atoms} atoms; give indices 0 to {atoms - 1}")
        if concept.index in seen:
            raise ArtifactError(f"{what}: that index comes twice; give one concept an atom")
        if concept.label not in LABELS:
            raise ArtifactError(f"{what} has label {concept.label!r}, expected one of {', '.join(LABELS)}")
        if not concept.name:
            raise ArtifactError(f"{what} has no name; name it")
        seen.add(concept.index)
    return table


def read_concepts(file: Path, atoms: int) -> tuple[Concept, ...]:
    """Read and check a table of concepts.

    Raises
    ------
    ArtifactError
        If a line is no such row; the sentence names the line.
    """
    concepts = []
    try:
        # Not splitlines: names may hold other separators, which JSON leaves as they are.
        lines = file.read_bytes().decode().rstrip("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{file} cannot be read ({error}); make the artifact again") from error
    for number, line in enumerate(lines, 1):
        if lines == [""]:
            break
        try:
            row = json.loads(line)
            text = {name: row[name] for name in _TEXT if name in row}
            if type(row["index"]) is not int or not all(isinstance(value, str) for value in text.values()):
                raise TypeError("index must be an integer and the rest text")
            concepts.append(Concept(row["index"], **text))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ArtifactError(
                f"{file}, line {number}: no concept row ({type(error).__name__}: {error}); make the "
                "artifact again"
            ) from error
    return check_concepts(concepts, atoms, file)


def count_by(concepts: Iterable[Concept], field: str) -> dict[str, int]:
    """Count concepts by "label" or "group", the most frequent first."""
    counts: dict[str, int] = {}
    for concept in concepts:
        key = getattr(concept, field)
        counts[key] = counts.get(key, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
