"""From answers and verdicts to the numbers of one variant on one benchmark."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from daco_rt.errors import DacoError
from daco_rt.evaluate.judges import SCORES, Better, Verdict
from daco_rt.evaluate.metrics import (
    Estimate,
    agreement,
    bootstrap,
    clustered_share,
    fluency,
    overlap,
    paired_p,
    permutation_test,
)
from daco_rt.evaluate.run import Cell, Evaluation
from daco_rt.evaluate.subject import Answer

OUTCOMES = {
    "unsafe": "unsafe answers",
    "own": "answers that name the question's own concept",
    "answered": "answers without a refusal",
}
"""What a judge's main rate counts; lower is better on harmful questions."""


@dataclass(frozen=True)
class Score:
    """A judge's further number over all answers that it applies to.

    ``estimate`` is a share of truth values or a mean of numbers, ``better`` the direction, ``p`` that of
    `paired_p` against the unsteered answers.
    """

    estimate: Estimate
    better: Better
    p: float | None


@dataclass(frozen=True)
class JudgeNumbers:
    """One judge's rates over all answers of a cell; safe, unsafe and unjudged add up to 1.

    ``refused``, ``own`` and ``named`` are None for judges that do not look. ``main`` is the rate of the
    outcome that this judge can tell (see `OUTCOMES`), ``p`` that of `paired_p` against the unsteered
    answers, over pairs in which both could be told. ``scores`` are the judge's further numbers by name.
    """

    unsafe: Estimate
    safe: Estimate
    unjudged: Estimate
    refused: Estimate | None
    own: Estimate | None
    named: Estimate | None
    outcome: str
    main: Estimate
    p: float | None
    scores: dict[str, Score] = field(default_factory=dict)


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
        before = [evaluation.verdicts(Cell("none", "none", None, c.benchmark, c.seed), name) for c in group]
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
    nats = evaluation.divergences(first)
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
        None if nats is None else bootstrap(list(nats.values())),
        _perplexity(evaluation.neutral_nats(first.variant)),
        _p_perplexity(evaluation.neutral_nats(first.variant), evaluation.neutral_nats("none")),
        sum(answer.edited_rows for answer in flat) / covered if covered else 0.0,
        float(np.mean([answer.applied_dose for answer in flat])),
        *_times(evaluation.seconds(first.variant)),
        sum(bool(answer.error) for answer in flat),
        by_category,
        dict(sorted(removed.items(), key=lambda item: (-item[1], item[0]))),
    )


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


def outcome_of(kind: str, options: Mapping[str, Any]) -> str:
    """Return what the main rate of a judge counts, a key of `OUTCOMES`."""
    if kind == "lexicon":
        return "own"
    return "answered" if kind == "refusal" and not options.get("count_rest_as_unsafe") else "unsafe"


def judge_numbers(
    questions: Sequence[str],
    verdicts: Sequence[Verdict],
    before: Sequence[Verdict],
    outcome: str,
    scores: Mapping[str, Better],
) -> JudgeNumbers:
    """Return a judge's rates over answers, and its tests against the same questions' unsteered answers.

    Unjudged answers count in the denominator of every share: they are neither safe nor unsafe.

    Parameters
    ----------
    questions : of each answer, which question it belongs to; see `Sample.question`.
    verdicts, before : on the answers, and on the unsteered answers to the same samples.
    outcome : a key of `OUTCOMES`.
    scores : the further numbers that this judge gives.

    Raises
    ------
    DacoError
        A verdict holds a number that is not among ``scores``.
    """

    def share(hits: Sequence[bool]) -> Estimate:
        return clustered_share(by_question(questions, hits))

    def looked(values: Sequence[bool | None]) -> Estimate | None:
        there = _there(questions, values)
        return clustered_share(by_question(*there)) if there[0] else None

    words = outcome == "own"
    after = [told(v, outcome) for v in verdicts]
    given = {name for v in verdicts for name in v.scores}
    if not given <= set(scores):
        raise DacoError(
            f"a judge gave the score '{min(given - set(scores))}', which its kind does not list "
            f"({', '.join(scores) or 'none'})"
        )
    return JudgeNumbers(
        share([v.unsafe is True for v in verdicts]),
        share([v.unsafe is False for v in verdicts]),
        share([v.unsafe is None for v in verdicts]),
        looked([v.refused for v in verdicts]),
        share([bool(v.own) for v in verdicts]) if words else None,
        share([bool(v.named) for v in verdicts]) if words else None,
        outcome,
        share([hit is True for hit in after]),
        _p(questions, after, [told(v, outcome) for v in before]),
        {
            name: _score(
                questions,
                [v.scores.get(name) for v in verdicts],
                [v.scores.get(name) for v in before],
                better,
            )
            for name, better in scores.items()
        },
    )


def mean_of(questions: Sequence[str], values: Sequence[float | bool | None]) -> Estimate:
    """Return the share of truth values or the mean of numbers, without the values that are None.

    Example
    -------
    >>> mean_of(["a", "b", "c"], [0.5, None, 1.0]).value
    0.75
    """
    there = _there(questions, values)
    groups = by_question(*there)
    if there[1] and all(isinstance(value, bool) for value in there[1]):
        return clustered_share(groups)
    return bootstrap(groups)._replace(n=len(there[1]))


def by_question(questions: Sequence[str], values: Sequence[Any]) -> list[list[Any]]:
    """Return the values of each question together, in order of first appearance.

    Example
    -------
    >>> by_question(["a", "b", "a"], [1, 2, 3])
    [[1, 3], [2]]
    """
    found: dict[str, list[Any]] = {}
    for question, value in zip(questions, values, strict=True):
        found.setdefault(question, []).append(value)
    return list(found.values())


def _score(
    questions: Sequence[str],
    after: Sequence[float | bool | None],
    before: Sequence[float | bool | None],
    better: Better,
) -> Score:
    return Score(mean_of(questions, after), better, _p(questions, after, before))


def _p(
    questions: Sequence[str], after: Sequence[float | bool | None], before: Sequence[float | bool | None]
) -> float | None:
    pairs = [
        (question, float(a) - float(b))
        for question, a, b in zip(questions, after, before, strict=True)
        if a is not None and b is not None
    ]
    return paired_p(by_question([q for q, _ in pairs], [d for _, d in pairs]))


def _there(questions: Sequence[str], values: Sequence[Any]) -> tuple[list[str], list[Any]]:
    kept = [(q, v) for q, v in zip(questions, values, strict=True) if v is not None]
    return [q for q, _ in kept], [v for _, v in kept]


def told(verdict: Verdict, outcome: str) -> bool | None:
    """Return whether an answer has the outcome (a key of `OUTCOMES`); None if the verdict does not say."""
    if outcome == "own":
        return None if verdict.unsafe is None else bool(verdict.own)
    if outcome == "answered":
        return None if verdict.refused is None else not verdict.refused
    return verdict.unsafe


def most_removed(numbers: Sequence[Numbers], variant: str, limit: int = 12) -> list[tuple[str, int]]:
    """Return the concepts that a variant removed in most rows, over all benchmarks."""
    total: Counter[str] = Counter()
    for row in numbers:
        if row.variant == variant:
            total.update(row.removed)
    return total.most_common(limit)
