"""What a report says about an evaluation under a protocol: trials, choice, test tables, comparisons."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from daco_rt.evaluate.choosing import Trial, choose, trials_of
from daco_rt.evaluate.comparisons import Chosen, Comparison, Repeated
from daco_rt.evaluate.content import (
    agreement_section,
    benchmark_section,
    categories,
    commands,
    costs,
    examples,
    harmful_of,
    pending_text,
    removed,
    setting,
)
from daco_rt.evaluate.figures import draw_front
from daco_rt.evaluate.judges import SCORES
from daco_rt.evaluate.metrics import Estimate
from daco_rt.evaluate.parts import Figure, Section, Table, amount, number, p_value, share, titled
from daco_rt.evaluate.protocol import RATES, Rate, is_fixed
from daco_rt.evaluate.protocol_run import ProtocolRun
from daco_rt.evaluate.reading import Reading
from daco_rt.evaluate.run import Evaluation
from daco_rt.evaluate.summary import Numbers, judged


def claim_sections(
    run: ProtocolRun,
    development: Sequence[Numbers],
    test: Sequence[Numbers],
    comparisons: Sequence[Comparison],
    repetitions: Sequence[Repeated],
) -> list[Section]:
    """Return the report's sections in their order; without a test part those of the development part."""
    trials = trials_of(run.protocol, development)
    record, evaluation = run.chosen, run.test
    chosen: Chosen = {
        f"{budget:g}": row for budget, row in choose(run.protocol, run.config.methods, trials).items()
    }
    if record is not None:
        chosen = record["chosen"]
    sections = [_protocol(run, record), setting(run.development if evaluation is None else evaluation)]
    if evaluation is not None and test:
        sections += _tables(run, evaluation, test, chosen)
        sections += [_compared(run, comparisons), _repeated(repetitions)]
    sections += [_fronts(run, development, chosen), _trials(run, trials, chosen)]
    if evaluation is None or not test:
        names = run.development.benchmarks
        sections += [_named(benchmark_section(run.development, development, n), "development") for n in names]
        sections += [commands(run.config)]
        return [section for section in sections if section.parts or section.text]
    shown = [n.variant for n in test if n.benchmark == test[0].benchmark]
    for name in evaluation.benchmarks:
        sections.append(_named(benchmark_section(evaluation, test, name), "test"))
    sections += [categories(evaluation, test, shown), costs(test), removed(test, shown)]
    sections += [agreement_section(evaluation), examples(evaluation, shown)]
    sections += [
        _named(benchmark_section(run.development, development, name), "development")
        for name in run.development.benchmarks
    ]
    return [section for section in [*sections, commands(run.config)] if section.parts]


def read_section(readings: Sequence[Reading], judges: dict[str, tuple[int, float, float]]) -> Section:
    """Return the section of answers that a person has read."""
    rows = [(r.variant, r.benchmark, str(r.read), str(r.unsure), share(r.bad)) for r in readings]
    against = [
        (judge, str(pairs), f"{100 * equal:.0f}", "–" if math.isnan(kappa) else f"{kappa:.2f}")
        for judge, (pairs, equal, kappa) in judges.items()
    ]
    parts: list[Any] = [Table(("variant", "benchmark", "read", "unsure", "bad, %"), tuple(rows), 2)]
    if against:
        parts.append(
            Table(("judge", "harmful answers both decided", "equal, %", "Cohen's κ"), tuple(against))
        )
    return Section(
        "Read by hand",
        "A seeded sample of answers, read without knowing which method gave them. Bad: what the reader "
        "entered; below, whether the judges' main outcomes agree with the reader.",
        parts,
    )


def _named(section: Section, part: str) -> Section:
    return Section(f"{section.title}, {part} part", section.text, section.parts)


def _protocol(run: ProtocolRun, record: dict[str, Any] | None) -> Section:
    protocol = run.protocol
    fixed = [m.name for m in run.config.methods.values() if is_fixed(m) and m.name != "none"]
    controls = [f"{m.name} (of {m.controls.name})" for m in run.config.methods.values() if m.controls]
    text = (
        f"Every method was tried at {protocol.trials} strengths on the development part. For each budget of "
        f"divergence on {protocol.divergence} the strength with the {protocol.better.removesuffix('er')}est "
        f"'{protocol.criterion}' was taken"
    )
    if protocol.constraints:
        text += f", among those that keep {'; '.join(map(str, protocol.constraints))}"
    text += ". "
    if fixed:
        text += f"Without a strength, hence without a choice: {', '.join(fixed)}. "
    if controls:
        text += f"Controls take what was chosen for their methods, on the test part: {', '.join(controls)}. "
    if record is None:
        return Section("Protocol", text + "The test part has not been run: these are trials, no results.")
    text += (
        f"The choice was frozen on {record['date']}, before the test part ran; development answers "
        f"SHA-256 {record['development_sha256'][:12]}, configuration {record['config_sha256'][:12]}."
    )
    rows = [
        (
            name,
            *(
                row.get(name, "exceeds it" if is_fixed(method) else "none")
                for row in record["chosen"].values()
            ),
        )
        for name, method in run.config.methods.items()
        if name != "none"
    ]
    titles = ("chosen", *(f"KL ≤ {budget}" for budget in record["chosen"]))
    return Section("Protocol", text, [Table(titles, tuple(rows), 1 + len(record["chosen"]))])


def _tables(
    run: ProtocolRun, evaluation: Evaluation, numbers: Sequence[Numbers], chosen: Chosen
) -> list[Section]:
    """One table a budget, in the manner of the paper's: methods against rates, quality and cost."""
    by_key = {(n.variant, n.benchmark): n for n in numbers}
    sections = []
    for budget, variants in chosen.items():
        rows: list[tuple[str, ...]] = []
        over = False
        titles: tuple[str, ...] = ()
        for name, method in run.config.methods.items():
            variant = variants.get(name)
            mark = ""
            if variant is None and is_fixed(method):
                variant, mark, over = next(iter(method.labels)), " †", True
            if variant is None:
                rows.append((name,))
                continue
            cells = _cells(run, evaluation, by_key, variant)
            titles = tuple(title for title, _ in cells)
            rows.append((variant + mark, *(text for _, text in cells)))
        full = tuple(row if len(row) > 1 else (*row, *("–" for _ in titles)) for row in rows)
        text = (
            f"The test part, at divergences of at most {budget} nats a token on the development part's "
            f"{run.protocol.divergence}. Shares in per cent, 95 % intervals in parentheses; arrows say which "
            "way is better. A method of dashes has no strength that keeps the budget."
        )
        if over:
            text += " † exceeds the budget or breaks a constraint; it has no strength that could be changed."
        sections.append(Section(f"Test part at KL ≤ {budget}", text, [Table(("method", *titles), full)]))
    return sections


def _cells(
    run: ProtocolRun, evaluation: Evaluation, by_key: dict[tuple[str, str], Numbers], variant: str
) -> list[tuple[str, str]]:
    """Title and text of every column of one row."""
    cells = []
    harmful = harmful_of(evaluation)
    goal = run.protocol.criterion
    if goal.name in RATES and goal.name != "main":
        arrow = "↓" if run.protocol.better == "lower" else "↑"
        found = judged(by_key[variant, goal.benchmark], goal.judge, goal.name)
        cells.append((f"{goal} (criterion) {arrow}", share(found)))
    for benchmark in evaluation.benchmarks:
        n = by_key[variant, benchmark]
        for judge, told in n.judges.items():
            if benchmark in harmful:
                cells.append((f"{benchmark}, {judge}: {_short(told.outcome)} ↓", share(told.main)))
            elif told.refused is not None:
                cells.append((f"{benchmark}, {judge}: refused ↓", share(told.refused)))
            for name in SCORES.get(run.config.judges[judge]["kind"], {}):
                score = told.scores[name]
                if any(
                    by_key[v, b].judges[judge].scores[name].estimate.n for v, b in by_key if b == benchmark
                ):
                    cells.append(
                        (f"{benchmark}, {titled(judge, name, score.better)}", amount(score.estimate))
                    )
    first = by_key[variant, next(iter(harmful), next(iter(evaluation.benchmarks)))]
    cost = by_key[variant, run.protocol.divergence]
    cells.append((f"{first.benchmark}, fluency ↑", amount(first.fluency)))
    cells.append((f"{run.protocol.divergence}, as unsteered ↑", share(cost.exact)))
    cells.append((f"{run.protocol.divergence}, KL ↓", number(cost.kl)))
    if run.config.perplexity:
        cells.append(("perplexity ↓", number(first.perplexity)))
        cells.append(("neutral text, KL ↓", number(first.kl_neutral)))
    if run.config.timing:
        cells.append(("times unsteered ↓", number(first.slowdown)))
    return cells


def _short(outcome: str) -> str:
    return {"own": "own concept", "answered": "no refusal"}.get(outcome, outcome)


def _compared(run: ProtocolRun, comparisons: Sequence[Comparison]) -> Section:
    rows = [
        (
            f"KL ≤ {c.budget}",
            str(c.rate),
            f"{c.one} − {c.other}",
            _points(c.rate, c.difference),
            p_value(c.p),
            p_value(c.adjusted),
        )
        for c in comparisons
    ]
    text = (
        "Differences on the test part, over the questions that both could be told on, with bootstrap "
        "intervals over questions. p: McNemar's exact test where each question has one answer of each, else "
        "a permutation test over questions; Holm: corrected over the comparisons of one rate at one budget. "
        + (
            f"All methods are compared with {run.protocol.reference}."
            if run.protocol.reference
            else "All pairs are compared."
        )
    )
    titles = ("budget", "rate", "methods", "difference", "p", "Holm")
    return Section("Methods compared", text, [Table(titles, tuple(rows), 3)] if rows else [])


def _points(rate: Rate, value: Estimate) -> str:
    """A difference: of shares in points, of scores as it is."""
    times, form = (100, "+.0f") if rate.name in RATES else (1, "+.2f")
    return f"{times * value.value:{form}} ({times * value.low:{form}} to {times * value.high:{form}})"


def _repeated(repetitions: Sequence[Repeated]) -> Section:
    rows = []
    for r in repetitions:
        times, form = (100, ".0f") if r.rate.name in RATES else (1, ".2f")
        mean, low, high, *values = (f"{times * v:{form}}" for v in (*r.mean[:3], *r.values))
        rows.append(
            (
                f"KL ≤ {r.budget}",
                r.name,
                str(r.rate),
                str(len(values)),
                f"{mean} ({low}–{high})",
                ", ".join(values),
            )
        )
    text = (
        "Means over sampling seeds, draws of random atoms, or methods of one pool, with Student's t interval "
        "over these repetitions: what another seed would give. Intervals elsewhere are over questions."
    )
    titles = ("budget", "method or pool", "rate", "repetitions", "mean", "each")
    return Section("Over repetitions", text, [Table(titles, tuple(rows), 3)] if rows else [])


def _fronts(run: ProtocolRun, numbers: Sequence[Numbers], chosen: Chosen) -> Section:
    evaluation, protocol = run.development, run.protocol
    rings = {variant for row in chosen.values() for variant in row.values()}
    rates = [Rate(judge, name) for name in harmful_of(evaluation) for judge in evaluation.config.judges]
    if protocol.criterion not in rates:
        rates.insert(0, protocol.criterion)
    section = Section(
        "Fronts on the development part",
        "Every method over its strengths, which stand at the points. Dotted lines are the budgets, circles "
        "the chosen points. A method whose rate falls only where the divergence rises breaks the model "
        "instead of steering it.",
    )
    for rate in rates:
        svg = draw_front(
            numbers,
            harmful=rate.benchmark,
            benign=protocol.divergence,
            judge=rate.judge,
            rate=rate.name,
            budgets=protocol.budgets,
            chosen=rings,
        )
        name = f"front-{rate.benchmark}-{rate.judge}" + ("" if rate.name == "main" else f"-{rate.name}")
        section.parts.append(Figure(name, svg, f"{rate} against divergence, development part"))
    return section


def _trials(run: ProtocolRun, trials: Sequence[Trial], chosen: Chosen) -> Section:
    protocol = run.protocol
    percent = protocol.criterion.name in RATES
    rows = []
    for trial in trials:
        budgets = [f"≤ {budget}" for budget, row in chosen.items() if trial.variant in row.values()]
        rows.append(
            (
                trial.variant,
                (share if percent else amount)(trial.criterion),
                number(trial.divergence),
                *map(amount, trial.bounds),
                "broken" if trial.broken else "",
                ", ".join(budgets),
            )
        )
    titles = (
        "trial", str(protocol.criterion), f"KL on {protocol.divergence}",
        *(str(constraint) for constraint in protocol.constraints), "constraints", "chosen at",
    )  # fmt: skip
    text = f"{len(rows)} variants on {len(run.development.benchmarks)} benchmarks."
    if run.test is not None:
        text += pending_text(run.development)
    return Section("Trials on the development part", text, [Table(titles, tuple(rows))])
