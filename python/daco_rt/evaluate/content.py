"""What a report says about one part of the split: its sections, before they become Markdown or HTML."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Sequence

from daco_rt.errors import DacoError
from daco_rt.evaluate.config import EvaluationConfig
from daco_rt.evaluate.figures import draw_categories, draw_front
from daco_rt.evaluate.parts import (
    Code,
    Example,
    Figure,
    Section,
    Table,
    amount,
    number,
    p_value,
    share,
    titled,
)
from daco_rt.evaluate.rates import OUTCOMES
from daco_rt.evaluate.run import Evaluation
from daco_rt.evaluate.summary import Numbers, judge_agreement, most_removed

BUDGETS = (0.03, 0.1, 0.3)
"""Divergences in nats a token at which methods are compared."""
EXAMPLES = 4


def build_sections(evaluation: Evaluation, numbers: Sequence[Numbers]) -> list[Section]:
    """Return the report's sections in their order."""
    chosen = at_budgets(evaluation, numbers)
    shown = _shown(evaluation, numbers, chosen)
    sections = [setting(evaluation)]
    sections += [benchmark_section(evaluation, numbers, name) for name in evaluation.benchmarks]
    sections += _fronts(evaluation, numbers, chosen)
    sections += [
        categories(evaluation, numbers, shown),
        costs(numbers),
        removed(numbers, shown),
    ]
    sections += [agreement_section(evaluation), examples(evaluation, shown)]
    sections.append(commands(evaluation.config, "--part", evaluation.config.part))
    return [section for section in sections if section.parts]


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
    for name in harmful_of(evaluation):
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


def harmful_of(evaluation: Evaluation) -> list[str]:
    """Return the benchmarks that have harmful questions."""
    return [name for name, b in evaluation.benchmarks.items() if any(s.harmful for s in b.samples)]


def _measured(evaluation: Evaluation, numbers: Sequence[Numbers]) -> str | None:
    """The benchmark whose divergence stands for the harm done; a harmless one if there is."""
    names = [
        name for name in evaluation.config.divergence if any(n.benchmark == name and n.kl for n in numbers)
    ]
    harmless = [name for name in names if name not in harmful_of(evaluation)]
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
    return [picked[method] for method in evaluation.config.methods if method in picked]


def setting(evaluation: Evaluation) -> Section:
    """Return which model, data and split the numbers are of."""
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
        f"{', '.join(map(str, config.seeds))}. Shares are per cent with 95 % intervals (Wilson's, at the "
        "effective number of answers where a question has several); means with bootstrap intervals over "
        "questions. Unjudged answers count in every denominator, never as safe."
    )
    if config.protocol is None:
        text += (
            " No protocol: strengths are compared on the questions that they are chosen on, so this is an "
        )
        text += "exploration and no result."
    text += pending_text(evaluation)
    return Section(
        "Setting", text, [Table(("benchmark", "data", "questions", "licence", "SHA-256"), tuple(rows), 5)]
    )


def pending_text(evaluation: Evaluation) -> str:
    """Return a sentence about each judge that could not be asked about some answers."""
    return "".join(f" {str(row)[0].upper()}{str(row)[1:]}." for row in evaluation.pending())


def benchmark_section(evaluation: Evaluation, numbers: Sequence[Numbers], name: str) -> Section:
    """Return the table of one benchmark: every variant under every judge."""
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
            "" if n.variant == "none" else p_value(j.p) for n, j in zip(rows, found, strict=True)
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
    for name in harmful_of(evaluation):
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


def categories(evaluation: Evaluation, numbers: Sequence[Numbers], shown: list[str]) -> Section:
    """Return bars by category of the variants shown."""
    section = Section(
        "By category", "The judge's main rate; in parentheses the number of answers, seeds pooled."
    )
    for name in harmful_of(evaluation):
        for judge in evaluation.config.judges:
            svg = draw_categories(numbers, benchmark=name, judge=judge, variants=shown)
            section.parts.append(
                Figure(f"categories-{name}-{judge}", svg, f"{name}, {judge}: rate by category")
            )
    return section


def costs(numbers: Sequence[Numbers]) -> Section:
    """Return what each variant costs: time, edited rows, dose, perplexity, divergence on neutral text."""
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
                "" if n.variant == "none" else p_value(n.p_perplexity),
                number(n.kl_neutral),
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
        "KL, neutral text",
    )
    text = (
        f"Edited rows and dose are those on {first}. Time is that of one request at a time, in pairs with "
        "the unsteered model: median, and least and largest of the pairs; an indication, for the machine may "
        "be busy. p of the perplexity: a paired permutation test over the passages. KL: nats a token on the "
        "same passages, bootstrapped by passage."
    )
    return Section("Cost", text, [Table(titles, tuple(rows))])


def removed(numbers: Sequence[Numbers], shown: list[str]) -> Section:
    """Return which concepts the variants shown removed most."""
    rows = []
    for variant in shown:
        found = most_removed(numbers, variant)
        if found:
            rows.append((variant, ", ".join(f"{name} ×{count}" for name, count in found)))
    text = "Over all benchmarks, by the number of token rows in which a concept was taken out."
    return Section(
        "Most removed concepts", text, [Table(("variant", "concepts"), tuple(rows), 2)] if rows else []
    )


def agreement_section(evaluation: Evaluation) -> Section:
    """Return how far the judges agree."""
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


def examples(evaluation: Evaluation, shown: list[str]) -> Section:
    """The questions with most different answers; the first ones in the file's order where that is equal."""
    section = Section(
        "Examples", "The questions whose answers differ most among the variants shown, not a random sample."
    )
    for name, benchmark in evaluation.benchmarks.items():
        # The first repetition stands for all.
        first = {cell.variant: cell for cell in reversed(evaluation.cells) if cell.benchmark == name}
        answers = {variant: evaluation.answers(first[variant]) for variant in shown}
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
            section.parts.append(Example(sample.prompt, f"{name}: {sample.category}", told, sample.image))
    return section


def commands(config: EvaluationConfig, *options: str) -> Section:
    """Return how the run is repeated: what the configuration says comes first, and the command itself."""
    # An output named in a file stands beside that file: configs/../runs/smol.
    path, output = (os.path.normpath(place) for place in (config.path, config.output))
    command = shlex.join(["daco-rt", "evaluate", path, "--output", output, *options])
    text = (
        "Into a folder that is not there yet. With `--report-only` the last command writes this page again "
        "from what is there."
    )
    return Section("How to repeat it", text, [Code((*config.prepare, command))])


def require(evaluation: Evaluation) -> None:
    """Raise ``DacoError`` if a cell has no answers or no verdicts yet."""
    missing = [cell.stem for cell in evaluation.cells if not evaluation.judged(cell)]
    if missing:
        raise DacoError(
            f"{evaluation.output}: {len(missing)} of {len(evaluation.cells)} cells are not finished "
            f"({', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}); run it without --report-only"
        )
