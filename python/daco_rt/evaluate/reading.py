"""Answers for a person to read: a seeded sample that does not say which method gave them.

``read.tsv`` has an empty column to fill in. Which answer is whose stands in ``read.key.json`` alone. What is
filled in is compared with the judges, who may be wrong in the same way on every method.
"""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from daco_rt._files import atomic_file
from daco_rt.errors import ArtifactError, DacoError
from daco_rt.evaluate.metrics import Estimate, agreement, wilson
from daco_rt.evaluate.rates import outcome_of, told
from daco_rt.evaluate.run import Cell, Evaluation

FILE, KEY = "read.tsv", "read.key.json"
COLUMNS = ("number", "question", "picture", "answer", "bad")
YES, NO, UNSURE = ("yes", "y", "1", "true"), ("no", "n", "0", "false"), ("unsure", "?")


@dataclass(frozen=True)
class Reading:
    """What a person made of the answers of one method.

    ``read`` counts the answers with an entry, ``bad`` is the share of bad ones among those decided.
    """

    variant: str
    benchmark: str
    read: int
    unsure: int
    bad: Estimate

    def to_json(self) -> dict[str, Any]:
        """Return the reading ready for ``json.dumps``."""
        return asdict(self)


def write_sample(evaluation: Evaluation, count: int, folder: Path, *, seed: int = 0) -> list[Path]:
    """Write ``count`` answers to read, and the key, into a folder.

    Variants and benchmarks take turns, so that each gets as many; the order in the file is drawn.

    Raises
    ------
    DacoError
        There are no finished answers, or ``count`` is below 1.
    ArtifactError
        The folder holds a sample in which something is filled in.

    Example
    -------
    >>> write_sample(run.test, 40, run.output)[0].name                              # doctest: +SKIP
    'read.tsv'
    """
    if count < 1:
        raise DacoError(f"--read must be 1 or more, got {count}")
    if (folder / FILE).is_file() and any(row["bad"].strip() for row in _rows(folder / FILE)):
        raise ArtifactError(
            f"{folder / FILE} is filled in already; move it away before another sample is drawn"
        )
    draw = random.Random(seed)
    queues: dict[tuple[str, str], list[tuple[Cell, str]]] = {}
    for cell in evaluation.cells:
        queue = queues.setdefault((cell.variant, cell.benchmark), [])
        queue += [(cell, sample.id) for sample in evaluation.benchmarks[cell.benchmark].samples]
    for queue in queues.values():
        draw.shuffle(queue)
    longest = max(map(len, queues.values()), default=0)
    turns = [queue[i] for i in range(longest) for queue in queues.values() if i < len(queue)]
    taken = turns[:count]
    draw.shuffle(taken)
    answers = {cell: evaluation.answers(cell) for cell in {cell for cell, _ in taken}}
    samples = {name: {s.id: s for s in b.samples} for name, b in evaluation.benchmarks.items()}
    text = io.StringIO()
    table = csv.writer(text, delimiter="\t", lineterminator="\n")
    table.writerow(COLUMNS)
    key = []
    for number, (cell, name) in enumerate(taken, start=1):
        sample = samples[cell.benchmark][name]
        answer = answers[cell][name]
        table.writerow(
            [number, _flat(sample.wish), sample.image or "", _flat(answer.text or f"({answer.error})"), ""]
        )
        key.append({"number": number, **asdict(cell), "sample": name})
    folder.mkdir(parents=True, exist_ok=True)
    for path, content in ((folder / FILE, text.getvalue()), (folder / KEY, json.dumps(key, indent=1) + "\n")):
        with atomic_file(path) as file:
            file.write(content.encode())
    return [folder / FILE, folder / KEY]


def read_sample(folder: Path) -> list[tuple[Cell, str, bool | None]]:
    """Return what a person filled in: (cell, sample's id, whether the answer is bad or None for unsure).

    Empty rows are left out; without a file there are none.

    Raises
    ------
    ArtifactError
        The file or its key is damaged, or a word in the column is none that is known.
    """
    path = folder / FILE
    if not path.is_file():
        return []
    try:
        key = {str(row.pop("number")): row for row in json.loads((folder / KEY).read_text(encoding="utf-8"))}
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(f"{folder / KEY} cannot be read ({error}); draw the sample again") from error
    found = []
    for row in _rows(path):
        word = row["bad"].strip().lower()
        if not word:
            continue
        if word not in (*YES, *NO, *UNSURE):
            raise ArtifactError(
                f"{path}, number {row['number']}: 'bad' must be yes, no or unsure, got {row['bad']!r}"
            )
        if row["number"] not in key:
            raise ArtifactError(
                f"{path}: number {row['number']} is not in {KEY}; the two do not belong together"
            )
        place = dict(key[row["number"]])
        sample = place.pop("sample")
        found.append((Cell(**place), sample, None if word in UNSURE else word in YES))
    return found


def by_variant(rows: Sequence[tuple[Cell, str, bool | None]]) -> list[Reading]:
    """Return what was read, variant by variant and benchmark by benchmark."""
    groups: dict[tuple[str, str], list[bool | None]] = {}
    for cell, _, bad in rows:
        groups.setdefault((cell.variant, cell.benchmark), []).append(bad)
    return [
        Reading(
            variant,
            benchmark,
            len(values),
            sum(value is None for value in values),
            wilson(sum(value is True for value in values), sum(value is not None for value in values)),
        )
        for (variant, benchmark), values in groups.items()
    ]


def against_judges(
    evaluation: Evaluation, rows: Sequence[tuple[Cell, str, bool | None]]
) -> dict[str, tuple[int, float, float]]:
    """Return judge → (answers that both decided, share of equal verdicts, Cohen's κ), on harmful questions.

    A judge says "bad" where its main outcome holds.
    """
    harmful = {
        name: {sample.id for sample in b.samples if sample.harmful}
        for name, b in evaluation.benchmarks.items()
    }
    found = {}
    for judge, row in evaluation.config.judges.items():
        outcome = outcome_of(row["kind"], row)
        verdicts = {cell: evaluation.verdicts(cell, judge) for cell in {cell for cell, _, _ in rows}}
        pairs = [
            (bad, told(verdicts[cell][name], outcome))
            for cell, name, bad in rows
            if bad is not None and name in harmful[cell.benchmark]
        ]
        both = [(person, machine) for person, machine in pairs if machine is not None]
        if both:
            equal, kappa = agreement([person for person, _ in both], [machine for _, machine in both])
            found[judge] = (len(both), equal, kappa)
    return found


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = [
                {key: value or "" for key, value in row.items() if key}
                for row in csv.DictReader(file, delimiter="\t")
            ]
    except (OSError, ValueError, csv.Error) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); draw the sample again") from error
    missing = [name for name in ("number", "bad") if rows and name not in rows[0]]
    if missing or not rows:
        what = f"column '{missing[0]}' is gone" if missing else "it is empty"
        raise ArtifactError(f"{path}: {what}; keep its columns {', '.join(COLUMNS)}, separated by tabs")
    return rows


def _flat(text: str) -> str:
    return " ".join(text.split())
