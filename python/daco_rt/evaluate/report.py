"""The report of an evaluation: a Markdown file, a page that needs nothing else, and all numbers as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from daco_rt._files import atomic_file, write_json
from daco_rt.evaluate.claim import claim_sections, read_section
from daco_rt.evaluate.comparisons import compare, repeated
from daco_rt.evaluate.config import EvaluationConfig
from daco_rt.evaluate.content import build_sections, require
from daco_rt.evaluate.page import markdown, page
from daco_rt.evaluate.parts import Figure, Section, share
from daco_rt.evaluate.protocol_run import ProtocolRun
from daco_rt.evaluate.reading import against_judges, by_variant, read_sample
from daco_rt.evaluate.run import Evaluation, Pending
from daco_rt.evaluate.summary import Numbers, summarise
from daco_rt.evaluate.values import plain


@dataclass(frozen=True)
class Report:
    """What was written, and the numbers.

    Attributes
    ----------
    files : tuple of Path
    numbers : tuple of Numbers
    pending : tuple of Pending
        What judges could not be asked about.
    """

    files: tuple[Path, ...]
    numbers: tuple[Numbers, ...]
    pending: tuple[Pending, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return files, numbers and what is pending ready for ``json.dumps``; NaN is null."""
        record = {
            "files": [str(f) for f in self.files],
            "numbers": [row.to_json() for row in self.numbers],
            "pending": [asdict(row) for row in self.pending],
        }
        return dict(plain(record))

    def summary(self) -> list[dict[str, str]]:
        """Return one row a variant and benchmark for the terminal: each judge's main rate."""
        return [
            {
                "variant": n.variant,
                "benchmark": n.benchmark,
                "questions": str(n.samples),
                **{f"{judge}: {j.outcome}": share(j.main) for judge, j in n.judges.items()},
                "as unsteered": share(n.exact),
            }
            for n in self.numbers
        ]


def write_report(evaluation: Evaluation) -> Report:
    """Write ``report.md`` (with ``figures/``), ``report.html`` and ``report.json`` into the run's folder.

    Raises
    ------
    DacoError
        A cell is not finished, or matplotlib is not installed.

    Example
    -------
    >>> write_report(Evaluation(read_config("mine.yaml"))).files[1].name             # doctest: +SKIP
    'report.html'
    """
    require(evaluation)
    numbers = summarise(evaluation)
    sections = build_sections(evaluation, numbers)
    _read(evaluation, evaluation.output, sections)
    record = {"run": evaluation.described, "numbers": [n.to_json() for n in numbers]}
    files = _write(evaluation.output, _title(evaluation.config), sections, record)
    return Report(files, tuple(numbers), tuple(evaluation.pending()))


def write_protocol_report(run: ProtocolRun) -> Report:
    """Write the report of both parts, of the development part alone where nothing has been chosen yet.

    Raises
    ------
    DacoError
        A cell is not finished, or matplotlib is not installed.

    Example
    -------
    >>> write_protocol_report(ProtocolRun(read_config("mine.yaml"))).numbers[0].variant  # doctest: +SKIP
    'none'
    """
    require(run.development)
    development = summarise(run.development)
    evaluation, chosen = run.test, run.chosen
    record: dict[str, Any] = {"runs": {"dev": run.development.described}, "chosen": chosen}
    if evaluation is None or chosen is None:
        sections = claim_sections(run, development, [], [], [])
        record |= {"numbers": [], "development": [n.to_json() for n in development]}
        files = _write(run.output, _title(run.config), sections, record)
        return Report(files, tuple(development), tuple(run.development.pending()))
    require(evaluation)
    test = summarise(evaluation)
    comparisons = compare(evaluation, run.protocol, chosen["chosen"])
    repetitions = repeated(evaluation, run.protocol, chosen["chosen"])
    sections = claim_sections(run, development, test, comparisons, repetitions)
    _read(evaluation, run.output, sections)
    record["runs"]["test"] = evaluation.described
    record |= {
        "numbers": [n.to_json() for n in test],
        "comparisons": [c.to_json() for c in comparisons],
        "repetitions": [r.to_json() for r in repetitions],
        "development": [n.to_json() for n in development],
    }
    files = _write(run.output, _title(run.config), sections, record)
    return Report(files, tuple(test), (*run.development.pending(), *evaluation.pending()))


def _title(config: EvaluationConfig) -> str:
    return f"Evaluation of {Path(config.checkpoint).name}"


def _read(evaluation: Evaluation, folder: Path, sections: list[Section]) -> None:
    """Add what a person has read, before the commands."""
    rows = read_sample(folder)
    if rows:
        sections.insert(-1, read_section(by_variant(rows), against_judges(evaluation, rows)))


def _write(output: Path, title: str, sections: Sequence[Section], record: dict[str, Any]) -> tuple[Path, ...]:
    figures = {
        output / "figures" / f"{part.name}.svg": part.svg
        for section in sections
        for part in section.parts
        if isinstance(part, Figure)
    }
    texts = {
        output / "report.md": markdown(title, sections),
        output / "report.html": page(title, sections),
        **figures,
    }
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            file.write(text.encode())
    write_json(output / "report.json", plain({"title": title, **record}))
    return (output / "report.md", output / "report.html", output / "report.json")
