"""What reports are made of: sections with tables, figures and examples, and how numbers are written."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from daco_rt.evaluate.metrics import Estimate


@dataclass(frozen=True)
class Table:
    """Rows of text; the first ``left`` columns are aligned to the left."""

    titles: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int = 1


@dataclass(frozen=True)
class Figure:
    """An SVG and what it shows, for those who do not see it."""

    name: str
    svg: str
    alt: str


@dataclass(frozen=True)
class Example:
    """One question, perhaps with a picture, and its answers: variant → (text, what was removed)."""

    question: str
    category: str
    answers: dict[str, tuple[str, str]]
    image: Path | None = None


@dataclass(frozen=True)
class Code:
    """Command lines, shown as they stand."""

    lines: tuple[str, ...]


@dataclass
class Section:
    """A heading, a few sentences, and what is shown."""

    title: str
    text: str = ""
    parts: list[Table | Figure | Example | Code] = field(default_factory=list)


def share(value: Estimate | None) -> str:
    """A share in per cent with its interval: "12 (5–25)".

    Example
    -------
    >>> share(Estimate(0.12, 0.05, 0.25, 50))
    '12 (5–25)'
    """
    if value is None or math.isnan(value.value):
        return "–"
    return f"{100 * value.value:.0f} ({100 * value.low:.0f}–{100 * value.high:.0f})"


def number(value: Estimate | None) -> str:
    """A number with its interval, to two figures after the first."""
    if value is None or math.isnan(value.value):
        return "–"
    return f"{value.value:.3g} ({value.low:.2g}–{value.high:.2g})"


def amount(value: Estimate) -> str:
    """A judge's score with its interval, to two places: "0.97 (0.93–0.99)"."""
    if math.isnan(value.value):
        return "–"
    return f"{value.value:.2f} ({value.low:.2f}–{value.high:.2f})"


def titled(judge: str, score: str, better: str) -> str:
    """A score's column title; the arrow says which way is better."""
    return f"{judge}: {score.replace('_', ' ')} {'↓' if better == 'lower' else '↑'}"


def p_value(p: float | None) -> str:
    """A p-value to two figures; empty without one."""
    if p is None:
        return ""
    return "< 0.001" if p < 0.001 else f"{p:.2g}"
