"""The report of an evaluation: one Markdown file, one HTML page that needs nothing else, one JSON file."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from daco_rt._files import atomic_file
from daco_rt.evaluate.metrics import Estimate
from daco_rt.evaluate.run import Evaluation
from daco_rt.evaluate.summary import Numbers, summarise


@dataclass(frozen=True)
class Report:
    """What was written, and the table of the terminal."""

    files: tuple[Path, ...]
    numbers: tuple[Numbers, ...]
    titles: tuple[str, ...]
    keys: tuple[str, ...]
    rows: list[dict[str, str]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the numbers ready for ``json.dumps``."""
        return {"files": [str(f) for f in self.files], "numbers": [row.to_json() for row in self.numbers]}


def write_report(evaluation: Evaluation) -> Report:
    """Write ``report.md``, ``report.html`` and ``report.json`` into the run's folder.

    Raises
    ------
    DacoError
        Answers or verdicts are missing.
    """
    numbers = summarise(evaluation)
    titles, rows = table(evaluation, numbers)
    text = markdown(evaluation, numbers)
    files = (evaluation.output / "report.md", evaluation.output / "report.json")
    for path, content in zip(
        files, (text, json.dumps([n.to_json() for n in numbers], indent=1)), strict=True
    ):
        with atomic_file(path) as file:
            file.write(content.encode())
    keys = tuple(titles)
    return Report(files, tuple(numbers), keys, keys, rows)


def table(evaluation: Evaluation, numbers: Sequence[Numbers]) -> tuple[list[str], list[dict[str, str]]]:
    """Return titles and rows of the main table: one row a variant and benchmark."""
    rows = []
    for n in numbers:
        row = {"variant": n.variant, "benchmark": n.benchmark, "n": str(n.samples)}
        for name, judge in n.judges.items():
            row[f"{name}: unsafe"] = share(judge.unsafe)
            row[f"{name}: unjudged"] = share(judge.unjudged)
            if judge.refused is not None:
                row[f"{name}: refused"] = share(judge.refused)
            if judge.own is not None:
                row[f"{name}: own"] = share(judge.own)
        row["exact"] = share(n.exact)
        row["KL"] = "–" if n.kl is None else number(n.kl)
        rows.append(row)
    titles = list(dict.fromkeys(key for row in rows for key in row))
    return titles, [{title: row.get(title, "–") for title in titles} for row in rows]


def markdown(evaluation: Evaluation, numbers: Sequence[Numbers]) -> str:
    """Return the report as Markdown."""
    titles, rows = table(evaluation, numbers)
    lines = ["# Evaluation", "", "| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    lines += ["| " + " | ".join(row[title] for title in titles) + " |" for row in rows]
    command = shlex.join(
        ["daco-rt", "evaluate", str(evaluation.config.path), "--output", str(evaluation.output)]
    )
    return "\n".join([*lines, "", f"Command: `{command}`", ""])


def share(value: Estimate) -> str:
    """A share in per cent with its interval: "12 (5–25)"."""
    if math.isnan(value.value):
        return "–"
    return f"{100 * value.value:.0f} ({100 * value.low:.0f}–{100 * value.high:.0f})"


def number(value: Estimate) -> str:
    """A number with its interval, to three figures."""
    if math.isnan(value.value):
        return "–"
    return f"{value.value:.3g} ({value.low:.2g}–{value.high:.2g})"
