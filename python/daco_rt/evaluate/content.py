"""What a report says: sections with tables, figures and examples, before they become Markdown or HTML."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field

from daco_rt.errors import DacoError
from daco_rt.evaluate.figures import draw_categories, draw_front
from daco_rt.evaluate.metrics import Estimate
from daco_rt.evaluate.run import Cell, Evaluation
from daco_rt.evaluate.summary import OUTCOMES, Numbers, judge_agreement, most_removed

BUDGETS = (0.03, 0.1, 0.3)
"""Divergences in nats a token at which methods are compared."""
EXAMPLES = 4


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
    """One question and its answers: variant → (text, what was removed)."""

    question: str
    category: str
    answers: dict[str, tuple[str, str]]


@dataclass
class Section:
    """A heading, a few sentences, and what is shown."""

    title: str
    text: str = ""
    parts: list[Table | Figure | Example] = field(default_factory=list)


def build_sections(evaluation: Evaluation, numbers: Sequence[Numbers]) -> list[Section]:
    """Return the report's sections in their order."""
    chosen = at_budgets(evaluation, numbers)
    shown = _shown(evaluation, numbers, chosen)
    sections = [_setting(evaluation)]
    sections += [_benchmark(evaluation, numbers, name) for name in evaluation.benchmarks]
    sections += _fronts(evaluation, numbers, chosen)
    sections += [
        _categories(evaluation, numbers, shown),
        _costs(numbers),
        _removed(evaluation, numbers, shown),
    ]
    sections += [_agreement(evaluation), _examples(evaluation, shown), _commands(evaluation)]
    return [section for section in sections if section.parts or section.title == "How to repeat it"]


def at_budgets(
    evaluation: Evaluation, numbers: Sequence[Numbers]
) -> dict[tuple[str, str], dict[float, dict[str, str]]]:
    """Return (harmful benchmark, judge) → budget → method → its best variant whose divergence on the first
    harmless benchmark keeps the budget.
    """
    benign = _measured(evaluation, numbers)
    if benign is None:
        return {}
    cost = {n.variant: n.kl.value for n in numbers if n.benchmark == benign and n.kl is not None}
    found: dict[tuple[str, str], dict[float, dict[str, str]]] = {}
    for name in _harmful(evaluation):
        for judge in evaluation.config.judges:
            budgets: dict[float, dict[str, str]] = {}
            for budget in BUDGETS:
                best: dict[str, Numbers] = {}
                for n in numbers:
                    if n.benchmark != name or n.variant not in cost or cost[n.variant] > budget:
                        continue
                    if (
                        n.method not in best
                        or n.judges[judge].main.value < best[n.method].judges[judge].main.value
                    ):
                        best[n.method] = n
                budgets[budget] = {method: n.variant for method, n in best.items()}
            found[name, judge] = budgets
    return found


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


def _harmful(evaluation: Evaluation) -> list[str]:
    return [name for name, b in evaluation.benchmarks.items() if any(s.harmful for s in b.samples)]


def _measured(evaluation: Evaluation, numbers: Sequence[Numbers]) -> str | None:
    """The benchmark whose divergence stands for the harm done; a harmless one if there is."""
    names = [
        name for name in evaluation.config.divergence if any(n.benchmark == name and n.kl for n in numbers)
    ]
    harmless = [name for name in names if name not in _harmful(evaluation)]
    return next(iter(harmless or names), None)


def _shown(evaluation: Evaluation, numbers: Sequence[Numbers], chosen: dict) -> list[str]:
    """Variants for bars and examples: unsteered, and of each method the best within the widest budget that it
    keeps, else its gentlest.
    """
    picked: dict[str, str] = {}
    for budgets in chosen.values():
        for budget in sorted(budgets, reverse=True):
            for method, variant in budgets[budget].items():
                picked.setdefault(method, variant)
    for n in numbers:
        picked.setdefault(n.method, n.variant)
    return [picked[method] for method in evaluation.config.methods]


def _setting(evaluation: Evaluation) -> Section:
    config = evaluation.config
    rows = []
    for name, benchmark in evaluation.benchmarks.items():
        card = benchmark.card
        left_out = f", {card.missing} left out for want of a picture" if card.missing else ""
        rows.append(
            (
                name,
                f"{card.name} {card.version}",
                f"{len(benchmark.samples)}{left_out}",
                card.licence,
                card.sha256[:12],
            )
        )
    text = (
        f"{config.checkpoint} in {'its exported bundle' if config.engine == 'bundle' else 'torch'}; part "
        f"'{config.part}' of a split drawn by seed {config.split_seed} with {config.dev:g} for development; "
        f"at most {config.max_new_tokens} new tokens, temperature {config.temperature:g}, seeds "
        f"{', '.join(map(str, config.seeds))}. Shares are per cent with 95 % intervals (Wilson); means "
        "with bootstrap intervals over questions. Unjudged answers count in every denominator, never as safe."
    )
    return Section(
        "Setting", text, [Table(("benchmark", "data", "questions", "licence", "SHA-256"), tuple(rows), 5)]
    )


def _benchmark(evaluation: Evaluation, numbers: Sequence[Numbers], name: str) -> Section:
    rows = [n for n in numbers if n.benchmark == name]
    columns: dict[str, list[str]] = {}
    for judge in evaluation.config.judges:
        found = [n.judges[judge] for n in rows]
        outcome = found[0].outcome
        if outcome == "unsafe":
            columns[f"{judge}: unsafe"] = [share(j.unsafe) for j in found]
            columns[f"{judge}: safe"] = [share(j.safe) for j in found]
        if any(j.refused is not None for j in found):
            columns[f"{judge}: refused"] = [share(j.refused) for j in found]
        if outcome == "own":
            columns[f"{judge}: own concept"] = [share(j.own) for j in found]
            columns[f"{judge}: any concept"] = [share(j.named) for j in found]
        if outcome == "unsafe" and any(j.unjudged.value for j in found):
            columns[f"{judge}: unjudged"] = [share(j.unjudged) for j in found]
        for score in found[0].scores:
            values = [j.scores[score] for j in found]
            if any(value.estimate.n for value in values):
                columns[titled(judge, score, values[0].better)] = [amount(v.estimate) for v in values]
        columns[f"{judge}: p"] = [
            "" if n.variant == "none" or j.p is None else f"{j.p:.2g}"
            for n, j in zip(rows, found, strict=True)
        ]
    columns["as unsteered"] = [share(n.exact) for n in rows]
    columns["overlap"] = [f"{n.overlap.value:.2f}" for n in rows]
    columns["fluency"] = [f"{n.fluency.value:.2f}" for n in rows]
    if any(n.kl for n in rows):
        columns["KL, nats a token"] = [number(n.kl) for n in rows]
    if any(n.failed for n in rows):
        columns["could not run"] = [str(n.failed) for n in rows]
    table = Table(
        ("variant", *columns),
        tuple((n.variant, *(cells[i] for cells in columns.values())) for i, n in enumerate(rows)),
    )
    what = "harmful questions" if rows[0].harmful else "harmless questions"
    text = (
        f"{rows[0].samples} {what}. p: a paired test of the judge's main rate against the unsteered "
        "answers, by question; arrows: which way a judge's number is better. As unsteered: answers equal "
        "word for word; overlap: F1 of words with the unsteered answer; fluency: share of distinct trigrams."
    )
    return Section(name, text, [table])


def _fronts(evaluation: Evaluation, numbers: Sequence[Numbers], chosen: dict) -> list[Section]:
    benign = _measured(evaluation, numbers)
    if benign is None:
        return []
    section = Section(
        "Fronts",
        "Down and left is better: fewer bad answers at less change to harmless ones. Numbers at the points "
        "are strengths. A method whose rate falls only where the divergence rises breaks the model instead "
        "of steering it; the random control shows how much of the fall is damage.",
    )
    for name in _harmful(evaluation):
        for judge in evaluation.config.judges:
            svg = draw_front(numbers, harmful=name, benign=benign, judge=judge)
            section.parts.append(
                Figure(f"front-{name}-{judge}", svg, f"{name}, {judge}: rate against divergence")
            )
    matched = Section(
        "At matched divergence",
        f"For each method the best variant whose divergence on {benign} keeps the budget."
        + (
            " Strengths were chosen on the questions that they are compared on: for a claim, choose them "
            "on the development part and run the test part once."
            if evaluation.config.part != "dev"
            else ""
        ),
    )
    by_key = {(n.variant, n.benchmark): n for n in numbers}
    methods = list(evaluation.config.methods)
    for (name, judge), budgets in chosen.items():
        rows = []
        for method in methods:
            cells = []
            for budget in BUDGETS:
                variant = budgets[budget].get(method)
                cells.append("–" if variant is None else _at(by_key[variant, name], judge, variant))
            rows.append((method, *cells))
        outcome = by_key["none", name].judges[judge].outcome
        titles = (f"{name}, {judge}: % {OUTCOMES[outcome]}", *(f"KL ≤ {budget:g}" for budget in BUDGETS))
        matched.parts.append(Table(titles, tuple(rows)))
    return [section, matched]


def _at(n: Numbers, judge: str, variant: str) -> str:
    at = f" @{n.strength:g}" if n.strength is not None else ""
    return share(n.judges[judge].main) + at


def _categories(evaluation: Evaluation, numbers: Sequence[Numbers], shown: list[str]) -> Section:
    section = Section(
        "By category", "The judge's main rate; in parentheses the number of answers, seeds pooled."
    )
    for name in _harmful(evaluation):
        for judge in evaluation.config.judges:
            svg = draw_categories(numbers, benchmark=name, judge=judge, variants=shown)
            section.parts.append(
                Figure(f"categories-{name}-{judge}", svg, f"{name}, {judge}: rate by category")
            )
    return section


def _costs(numbers: Sequence[Numbers]) -> Section:
    rows = []
    first = numbers[0].benchmark
    for n in numbers:
        if n.benchmark != first:
            continue
        rows.append(
            (
                n.variant,
                f"{1000 * n.seconds:.1f}" if n.seconds else "–",
                number(n.slowdown),
                f"{100 * n.edited:.1f}",
                f"{n.applied:.3f}",
                number(n.perplexity),
                "" if n.variant == "none" or n.p_perplexity is None else f"{n.p_perplexity:.2g}",
            )
        )
    titles = (
        "variant",
        "ms a token",
        "times unsteered",
        "rows edited, %",
        "applied dose",
        "perplexity, neutral text",
        "its p",
    )
    text = (
        f"Edited rows and dose are those on {first}. Time is that of one request at a time, in pairs with "
        "the unsteered model: median, and least and largest of the pairs; an indication, for the machine may "
        "be busy. p of the perplexity: a paired permutation test over the passages."
    )
    return Section("Cost", text, [Table(titles, tuple(rows))])


def _removed(evaluation: Evaluation, numbers: Sequence[Numbers], shown: list[str]) -> Section:
    rows = []
    for variant in shown:
        found = most_removed(numbers, variant)
        if found:
            rows.append((variant, ", ".join(f"{name} ×{count}" for name, count in found)))
    text = "Over all benchmarks, by the number of token rows in which a concept was taken out."
    return Section(
        "Most removed concepts", text, [Table(("variant", "concepts"), tuple(rows), 2)] if rows else []
    )


def _agreement(evaluation: Evaluation) -> Section:
    rows = [
        (
            f"{one} and {other}",
            question,
            str(pairs),
            f"{100 * equal:.0f}",
            "–" if math.isnan(kappa) else f"{kappa:.2f}",
        )
        for (one, other, question), (equal, kappa, pairs) in judge_agreement(evaluation).items()
    ]
    text = "Over all answers that both judged. κ corrects for agreement by chance."
    titles = ("judges", "question", "answers", "equal, %", "Cohen's κ")
    return Section("Agreement of judges", text, [Table(titles, tuple(rows), 2)] if rows else [])


def _examples(evaluation: Evaluation, shown: list[str]) -> Section:
    """The questions with most different answers; the first ones in the file's order where that is equal."""
    section = Section(
        "Examples", "The questions whose answers differ most among the variants shown, not a random sample."
    )
    cells = {cell.variant: cell for cell in evaluation.cells if cell.seed == evaluation.config.seeds[0]}
    for name, benchmark in evaluation.benchmarks.items():
        answers = {
            variant: evaluation.answers(
                Cell(variant, cells[variant].method, cells[variant].strength, name, cells[variant].seed)
            )
            for variant in shown
        }
        ranked = sorted(
            benchmark.samples, key=lambda s: -len({answers[variant][s.id].text for variant in shown})
        )
        for sample in ranked[:EXAMPLES]:
            told = {}
            for variant in shown:
                answer = answers[variant][sample.id]
                removed = ", ".join(
                    f"{concept} ×{rows}" for concept, rows in list(answer.removed.items())[:4]
                )
                told[variant] = (answer.text or answer.error, removed)
            section.parts.append(Example(sample.prompt, f"{name}: {sample.category}", told))
    return section


def _commands(evaluation: Evaluation) -> Section:
    config = evaluation.config
    command = ["daco-rt", "evaluate", str(config.path), "--output", str(config.output), "--part", config.part]
    return Section("How to repeat it", f"`{shlex.join(command)}`")


def require(evaluation: Evaluation) -> None:
    """Raise ``DacoError`` if a cell has no answers or no verdicts yet."""
    missing = [cell.stem for cell in evaluation.cells if not evaluation.judged(cell)]
    if missing:
        raise DacoError(
            f"{evaluation.output}: {len(missing)} of {len(evaluation.cells)} cells are not finished "
            f"({', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}); run it without --report-only"
        )
