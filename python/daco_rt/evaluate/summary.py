"""From answers and verdicts to the numbers of one variant on one benchmark."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from daco_rt.evaluate.judges import SCORES
from daco_rt.evaluate.metrics import (
    Estimate,
    agreement,
    bootstrap,
    clustered_share,
    fluency,
    overlap,
    permutation_test,
)
from daco_rt.evaluate.rates import JudgeNumbers, by_question, judge_numbers, outcome_of, told
from daco_rt.evaluate.run import Cell, Evaluation
from daco_rt.evaluate.samples import Sample
from daco_rt.evaluate.subject import Answer


@dataclass(frozen=True)
class Numbers:
    """All numbers of one variant on one benchmark, seeds pooled."""

    variant: str
    method: str
    strength: float | None
    benchmark: str
    harmful: bool
    samples: int
    judges: dict[str, JudgeNumbers]
    exact: Estimate
    """Share of answers equal to the unsteered ones, word for word."""
    overlap: Estimate
    """Mean F1 of words with the unsteered answers."""
    fluency: Estimate
    """Mean share of distinct word trigrams."""
    kl: Estimate | None
    """Nats a token on the unsteered answers; None where it was not asked for."""
    perplexity: Estimate | None
    """Of neutral text; None where it was not measured."""
    p_perplexity: float | None
    """Of a paired permutation test over passages against the unsteered model."""
    kl_neutral: Estimate | None
    """Nats a token on neutral text; None where it was not measured."""
    edited: float
    """Share of covered rows that an edit changed."""
    applied: float
    """Mean applied dose."""
    seconds: float | None
    """Median decoding seconds a token, of pairs measured apart from the answers."""
    slowdown: Estimate | None
    """Median, least and largest ratio to the unsteered token next to it; None where it was not measured."""
    failed: int
    """Requests that could not run."""
    by_category: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    """Judge → category → its main rate."""
    removed: dict[str, int] = field(default_factory=dict)
    """Concept → rows in which it was removed."""

    def to_json(self) -> dict[str, Any]:
        """Return the numbers ready for ``json.dumps``; estimates are [value, low, high, count]."""
        return asdict(self)


def summarise(evaluation: Evaluation) -> list[Numbers]:
    """Return the numbers of every variant on every benchmark, in the order of the configuration.

    Raises
    ------
    DacoError
        As `Evaluation.answers`.
    """
    found = []
    plain: dict[tuple[str, int], dict[str, Answer]] = {}
    for group in _groups(evaluation):
        answers = [evaluation.answers(cell) for cell in group]
        for cell, rows in zip(group, answers, strict=True):
            if cell.variant == "none":
                plain[cell.benchmark, cell.seed] = rows
        found.append(_numbers(evaluation, group, answers, [plain[c.benchmark, c.seed] for c in group]))
    return found


def judged(numbers: Numbers, judge: str, rate: str) -> Estimate:
    """Return one of a judge's rates or scores by name; NaN where the judge does not look.

    Example
    -------
    >>> judged(numbers, "lexicon", "main").value                                    # doctest: +SKIP
    0.25
    """
    found = numbers.judges[judge]
    if rate in found.scores:
        return found.scores[rate].estimate
    value: Estimate | None = getattr(found, rate)
    return Estimate(math.nan, math.nan, math.nan, 0) if value is None else value


def judge_agreement(evaluation: Evaluation) -> dict[tuple[str, str, str], tuple[float, float, int]]:
    """Return (judge, judge, question) → (share of equal verdicts, κ, pairs) over all answers that both
    judged; the question is "unsafe" or "refused".
    """
    names = list(evaluation.config.judges)
    found = {}
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            for question in ("unsafe", "refused"):
                left: list[bool] = []
                right: list[bool] = []
                for cell in evaluation.cells:
                    a, b = evaluation.verdicts(cell, one), evaluation.verdicts(cell, other)
                    for key, verdict in a.items():
                        x, y = getattr(verdict, question), getattr(b[key], question)
                        if x is not None and y is not None:
                            left.append(x)
                            right.append(y)
                if left:
                    found[one, other, question] = (*agreement(left, right), len(left))
    return found


def _groups(evaluation: Evaluation) -> list[list[Cell]]:
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in evaluation.cells:
        groups.setdefault((cell.variant, cell.benchmark), []).append(cell)
    return list(groups.values())


def _numbers(
    evaluation: Evaluation,
    group: list[Cell],
    answers: list[dict[str, Answer]],
    plain: list[dict[str, Answer]],
) -> Numbers:
    first = group[0]
    samples = evaluation.benchmarks[first.benchmark].samples
    pairs = [(rows[s.id], before[s.id]) for rows, before in zip(answers, plain, strict=True) for s in samples]
    questions = [s.question for s in samples] * len(group)
    flat = [after for after, _ in pairs]
    judges, by_category = {}, {}
    for name, row in evaluation.config.judges.items():
        outcome = outcome_of(row["kind"], row)
        verdicts = [evaluation.verdicts(cell, name) for cell in group]
        before = [evaluation.verdicts(cell.plain, name) for cell in group]
        judges[name] = judge_numbers(
            questions,
            [rows[s.id] for rows in verdicts for s in samples],
            [rows[s.id] for rows in before for s in samples],
            outcome,
            SCORES.get(row["kind"], {}),
        )
        tally: dict[str, list[tuple[str, bool]]] = {}
        for rows in verdicts:
            for s in samples:
                hit = told(rows[s.id], outcome) is True
                tally.setdefault(s.category, []).append((s.question, hit))
        by_category[name] = {
            key: clustered_share(by_question(*zip(*hits, strict=True))) for key, hits in sorted(tally.items())
        }
    removed: Counter[str] = Counter()
    for answer in flat:
        removed.update(answer.removed)
    nats = [evaluation.divergences(cell) for cell in group if cell.seed == evaluation.config.seeds[0]]
    passages = evaluation.neutral(first.method, first.variant, "nats")
    shifts = evaluation.neutral(first.method, first.variant, "kl")
    covered = sum(answer.rows for answer in flat)
    return Numbers(
        first.variant,
        first.method,
        first.strength,
        first.benchmark,
        any(sample.harmful for sample in samples),
        len(samples),
        judges,
        clustered_share(by_question(questions, [after.text == before.text for after, before in pairs])),
        bootstrap(by_question(questions, [overlap(after.text, before.text) for after, before in pairs])),
        bootstrap(by_question(questions, [fluency(after.text) for after in flat])),
        _kl(samples, nats),
        _perplexity(passages),
        _p_perplexity(passages, evaluation.neutral("none", "none", "nats")),
        None if shifts is None else bootstrap(shifts),
        sum(answer.edited_rows for answer in flat) / covered if covered else 0.0,
        float(np.mean([answer.applied_dose for answer in flat])),
        *_times(evaluation.seconds(first.variant)),
        sum(bool(answer.error) for answer in flat),
        by_category,
        dict(sorted(removed.items(), key=lambda item: (-item[1], item[0]))),
    )


def _kl(samples: Sequence[Sample], nats: Sequence[dict[str, list[float]] | None]) -> Estimate | None:
    """The divergence over all tokens of all draws, resampled by question."""
    found: dict[str, list[float]] = {}
    for draw in nats:
        if draw is None:
            return None
        for sample in samples:
            found.setdefault(sample.question, []).extend(draw.get(sample.id, ()))
    return bootstrap(list(found.values()))


def _perplexity(nats: list[list[float]] | None) -> Estimate | None:
    if nats is None:
        return None
    mean = bootstrap(nats)
    return Estimate(math.exp(mean.value), math.exp(mean.low), math.exp(mean.high), mean.n)


def _p_perplexity(nats: list[list[float]] | None, plain: list[list[float]] | None) -> float | None:
    if nats is None or plain is None:
        return None
    pairs = zip(nats, plain, strict=True)
    return permutation_test([float(np.mean(after) - np.mean(before)) for after, before in pairs])


def _times(pairs: list[tuple[float, float]] | None) -> tuple[float | None, Estimate | None]:
    if not pairs:
        return None, None
    ratios = [on / off for off, on in pairs]
    slowdown = Estimate(float(np.median(ratios)), min(ratios), max(ratios), len(ratios))
    return float(np.median([on for _, on in pairs])), slowdown


def most_removed(numbers: Sequence[Numbers], variant: str, limit: int = 12) -> list[tuple[str, int]]:
    """Return the concepts that a variant removed in most rows, over all benchmarks."""
    total: Counter[str] = Counter()
    for row in numbers:
        if row.variant == variant:
            total.update(row.removed)
    return total.most_common(limit)
