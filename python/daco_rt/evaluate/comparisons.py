"""Methods against each other on the same questions, and repetitions of one method against themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

from daco_rt.evaluate.judges import SCORES
from daco_rt.evaluate.metrics import Estimate, bootstrap, holm, over_seeds, paired_p
from daco_rt.evaluate.protocol import RATES, Protocol, Rate
from daco_rt.evaluate.rates import by_question, outcome_of, valued
from daco_rt.evaluate.run import Cell, Evaluation

Chosen = dict[str, dict[str, str]]
"""Budget, as text → method → variant."""


@dataclass(frozen=True)
class Comparison:
    """Two methods at one budget: ``one`` minus ``other`` in a rate, over the questions that both answered.

    ``difference`` has a bootstrap interval over questions, ``p`` is that of `paired_p` (McNemar's exact test
    where each question has one answer of each), ``adjusted`` is corrected by Holm's method over all
    comparisons of that rate within the budget.
    """

    budget: str
    rate: Rate
    one: str
    other: str
    difference: Estimate
    p: float
    adjusted: float

    def to_json(self) -> dict[str, Any]:
        """Return the comparison ready for ``json.dumps``."""
        return asdict(self)


@dataclass(frozen=True)
class Repeated:
    """A rate of one thing over repetitions: sampling seeds, draws of a control, or methods of a pool."""

    budget: str
    rate: Rate
    name: str
    values: tuple[float, ...]
    mean: Estimate

    def to_json(self) -> dict[str, Any]:
        """Return the repetitions ready for ``json.dumps``."""
        return asdict(self)


def compare(evaluation: Evaluation, protocol: Protocol, chosen: Chosen) -> list[Comparison]:
    """Return the comparisons of the methods chosen at each budget, for every rate of `rates_of`.

    With a reference every method is compared with it, else all pairs; "none" has its own tests in the tables.
    """
    found = []
    for budget, variants in chosen.items():
        names = [name for name in variants if name != "none"]
        if protocol.reference is not None:
            rest = [name for name in names if name != protocol.reference]
            pairs = [(protocol.reference, name) for name in rest if protocol.reference in names]
        else:
            pairs = list(combinations(names, 2))
        for rate in rates_of(evaluation, protocol.criterion):
            means = {name: _means(evaluation, variants[name], rate) for name in names}
            rows = []
            for one, other in pairs:
                groups = _differences(means[one], means[other])
                p = paired_p(groups)
                if p is not None:
                    rows.append((one, other, bootstrap(groups), p))
            for (one, other, gap, p), adjusted in zip(rows, holm([row[3] for row in rows]), strict=True):
                found.append(Comparison(budget, rate, one, other, gap, p, adjusted))
    return found


def repeated(evaluation: Evaluation, protocol: Protocol, chosen: Chosen) -> list[Repeated]:
    """Return the rates of everything that was repeated, at each budget."""
    found = []
    for budget, variants in chosen.items():
        pools: dict[str, list[Cell]] = {}
        for name, variant in variants.items():
            pool = evaluation.config.methods[name].pool or name
            pools.setdefault(pool, []).extend(c for c in evaluation.cells if c.variant == variant)
        for rate in rates_of(evaluation, protocol.criterion):
            for name, cells in pools.items():
                values = [_rate(evaluation, c, rate) for c in cells if c.benchmark == rate.benchmark]
                kept = tuple(value for value in values if value is not None)
                if len(kept) > 1:
                    mean = over_seeds(kept)
                    if rate.name in RATES:
                        mean = mean._replace(low=max(mean.low, 0.0), high=min(mean.high, 1.0))
                    found.append(Repeated(budget, rate, name, kept, mean))
    return found


def rates_of(evaluation: Evaluation, criterion: Rate) -> list[Rate]:
    """Return what methods are compared by: the criterion, judges' main rates on harmful questions, scores."""
    found = [criterion]
    for benchmark, data in evaluation.benchmarks.items():
        harmful = any(sample.harmful for sample in data.samples)
        for judge, row in evaluation.config.judges.items():
            if harmful:
                found.append(Rate(judge, benchmark))
            found += [Rate(judge, benchmark, score) for score in SCORES.get(row["kind"], {})]
    return list(dict.fromkeys(found))


def _means(evaluation: Evaluation, variant: str, rate: Rate) -> dict[str, tuple[str, float]]:
    """Sample → its question, and the mean of the rate over repetitions; samples that tell nothing are out."""
    values: dict[str, list[float]] = {}
    for cell in evaluation.cells:
        if (cell.variant, cell.benchmark) == (variant, rate.benchmark):
            for key, value in _values(evaluation, cell, rate):
                if value is not None:
                    values.setdefault(key, []).append(float(value))
    samples = evaluation.benchmarks[rate.benchmark].samples
    return {s.id: (s.question, float(np.mean(values[s.id]))) for s in samples if s.id in values}


def _differences(
    one: dict[str, tuple[str, float]], other: dict[str, tuple[str, float]]
) -> Sequence[Sequence[float]]:
    both = [key for key in one if key in other]
    return by_question([one[key][0] for key in both], [one[key][1] - other[key][1] for key in both])


def _rate(evaluation: Evaluation, cell: Cell, rate: Rate) -> float | None:
    """A cell's rate, as `Numbers` has it: what is not told counts in a share's denominator, but for refusals
    and scores, which a judge may not look for.
    """
    values = [value for _, value in _values(evaluation, cell, rate)]
    if rate.name in RATES and rate.name != "refused":
        values = [value is True for value in values]
    there = [float(value) for value in values if value is not None]
    return float(np.mean(there)) if there else None


def _values(evaluation: Evaluation, cell: Cell, rate: Rate) -> Iterator[tuple[str, float | bool | None]]:
    row = evaluation.config.judges[rate.judge]
    outcome = outcome_of(row["kind"], row)
    for key, verdict in evaluation.verdicts(cell, rate.judge).items():
        yield key, valued(verdict, rate.name, outcome)
