"""The built-in list of everyday, undesirable and desirable concepts, and the reader of such lists.

A list is a table of five tab-separated columns: ``name``, ``label``, ``group``, ``plural``, ``gloss``.
``plural`` is empty for a regular plural and ``-`` for a word that has none.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from daco_rt.errors import ArtifactError

COLUMNS = ("name", "label", "group", "plural", "gloss")
LABELS = ("desirable", "undesirable", "neutral")


@dataclass(frozen=True)
class ConceptEntry:
    """One concept before it has an atom.

    Attributes
    ----------
    name : str
        The word or two-word compound, in lower case.
    label : str
        ``"desirable"``, ``"undesirable"`` or ``"neutral"``.
    group : str
        A coarse heading such as ``"weapons"``.
    plural : str or None
        The plural, None for a word without one.
    gloss : str
        What it is, in a few words that do not repeat the name.
    """

    name: str
    label: str
    group: str
    plural: str | None
    gloss: str

    @property
    def phrase(self) -> str:
        """The name as it stands after a verb: ``"a dagger"``, ``"an orange"``, ``"cocaine"``."""
        if self.plural is None:
            return self.name
        return ("an " if self.name[0] in "aeiou" else "a ") + self.name


def everyday_concepts() -> tuple[ConceptEntry, ...]:
    """Return the built-in list: 320 concepts, of which 86 are undesirable and 11 desirable.

    Example
    -------
    >>> everyday_concepts()[0].phrase
    'a dagger'
    """
    return read_entries(Path(__file__).with_name("everyday.tsv"))


def read_entries(path: Path) -> tuple[ConceptEntry, ...]:
    """Read a concept list.

    Raises
    ------
    ArtifactError
        If the file cannot be read, or a line has a wrong number of columns, an unknown label, an
        empty name or gloss, or a name that came before.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} cannot be read as a concept list: {error}") from error
    if not lines or tuple(lines[0].split("\t")) != COLUMNS:
        raise ArtifactError(f"{path}, line 1: expected the columns {', '.join(COLUMNS)}, separated by tabs")
    entries: dict[str, ConceptEntry] = {}
    for number, line in enumerate(lines[1:], start=2):
        if line:
            entry = _entry(line, f"{path}, line {number}")
            if entry.name in entries:
                raise ArtifactError(f"{path}, line {number}: {entry.name!r} comes twice; remove one")
            entries[entry.name] = entry
    if not entries:
        raise ArtifactError(f"{path} holds no concept; add at least one line")
    return tuple(entries.values())


def _entry(line: str, where: str) -> ConceptEntry:
    cells = line.split("\t")
    if len(cells) != len(COLUMNS):
        raise ArtifactError(f"{where}: expected {len(COLUMNS)} columns, got {len(cells)}")
    name, label, group, plural, gloss = (cell.strip() for cell in cells)
    if label not in LABELS:
        raise ArtifactError(f"{where}: label must be one of {', '.join(LABELS)}, got {label!r}")
    if not name or not gloss:
        raise ArtifactError(f"{where}: name and gloss must not be empty")
    return ConceptEntry(name, label, group, None if plural == "-" else plural or _regular(name), gloss)


def _regular(name: str) -> str:
    return f"{name}es" if name.endswith(("s", "x", "z", "ch", "sh")) else f"{name}s"
