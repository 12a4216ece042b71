"""Labels: what all labellers give, which of them wins, and the table that a person edits.

A labeller is anything that maps concepts to labels. Three come with the package: rules
(:mod:`daco_rt.concepts.rules`), a language model behind an endpoint (:mod:`daco_rt.concepts.endpoint`), and a
hand-edited table. The order of authority is rules, endpoint, hand: the last that has an opinion wins.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from daco_rt.concepts.everyday import LABELS
from daco_rt.concepts.table import WordConcept
from daco_rt.errors import ArtifactError, did_you_mean

HAND_COLUMNS = ("concept", "label", "group", "reason")
HAND = "hand"
UNLABELLED = "default"


@dataclass(frozen=True)
class Label:
    """One opinion about one concept.

    ``label`` is "desirable", "undesirable" or "neutral", ``group`` a heading or empty, ``source`` who says
    so, ``reason`` why, in a few words.
    """

    label: str
    group: str
    source: str
    reason: str


class Labeller(Protocol):
    """What every source of labels does."""

    def label_all(self, concepts: Sequence[WordConcept]) -> Mapping[str, Label]:
        """Return concept key → label, for those concepts of which it has an opinion."""
        ...


class HandTable:
    """The labels of a hand-edited table.

    Four tab-separated columns with a title line: ``concept`` (a synset or a word), ``label``, ``group``,
    ``reason``. Empty lines and lines that begin with ``#`` are skipped.

    Raises
    ------
    ArtifactError
        If the file cannot be read, or a line has other columns, an unknown label or a concept that came
        before.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._rows: dict[str, tuple[int, Label]] = {}
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ArtifactError(f"{self.path} cannot be read as a table of labels: {error}") from error
        rows = [(n, line) for n, line in enumerate(lines, 1) if line.strip() and not line.startswith("#")]
        if not rows or tuple(rows[0][1].split("\t")) != HAND_COLUMNS:
            raise ArtifactError(
                f"{self.path}: the first line must name the columns {', '.join(HAND_COLUMNS)}, "
                "separated by tabs"
            )
        for number, line in rows[1:]:
            self._add(number, line)

    def label_all(self, concepts: Sequence[WordConcept]) -> dict[str, Label]:
        """Return concept key → label for the table's concepts.

        Raises
        ------
        ArtifactError
            If the table names a concept that is not among ``concepts``; the nearest name is given.
        """
        known = {concept.name.lower(): concept.key for concept in concepts}
        known |= {concept.key: concept.key for concept in concepts}
        found: dict[str, Label] = {}
        for name, (number, label) in self._rows.items():
            key = known.get(name) or known.get(name.lower())
            where = f"{self.path}, line {number}"
            if key is None:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean '{near[0]}'?" if near else "write its synset or its word"
                raise ArtifactError(f"{where}: '{name}' is none of the {len(concepts)} concepts; {hint}")
            if key in found:
                raise ArtifactError(f"{where}: '{name}' is {key}, which has a line already; remove one")
            found[key] = label
        return found

    def _add(self, number: int, line: str) -> None:
        where = f"{self.path}, line {number}"
        cells = [cell.strip() for cell in line.split("\t")]
        # An editor may strip empty columns at the end of a line.
        cells += [""] * (len(HAND_COLUMNS) - len(cells))
        if len(cells) != len(HAND_COLUMNS):
            raise ArtifactError(f"{where}: expected {len(HAND_COLUMNS)} columns, got {len(cells)}")
        name, label, group, reason = cells
        if label not in LABELS:
            raise ArtifactError(f"{where}: label {label!r} is unknown{did_you_mean(label, LABELS)}")
        if not name:
            raise ArtifactError(f"{where}: the concept is empty; write its synset or its word")
        if name in self._rows:
            raise ArtifactError(f"{where}: '{name}' has line {self._rows[name][0]} already; remove one")
        self._rows[name] = (number, Label(label, group, HAND, reason or "edited by hand"))


def apply_labels(concepts: Sequence[WordConcept], labellers: Iterable[Labeller]) -> tuple[WordConcept, ...]:
    """Label a table afresh; of several labellers that speak of a concept the last one wins.

    Concepts of which none speaks are neutral, with source "default".

    Example
    -------
    >>> labelled = apply_labels(shipped_table(), [load_rules(), HandTable("mine.tsv")])
    """
    final: dict[str, Label] = {}
    for labeller in labellers:
        final |= labeller.label_all(concepts)
    nothing = Label("neutral", "", UNLABELLED, "no labeller speaks of it")
    return tuple(_labelled(concept, final.get(concept.key, nothing)) for concept in concepts)


def _labelled(concept: WordConcept, label: Label) -> WordConcept:
    return replace(concept, label=label.label, group=label.group, source=label.source, reason=label.reason)
