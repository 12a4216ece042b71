"""The protocol of an evaluation: what is chosen on the development part, by which rate, within which budgets.

It is written down before anything runs, and checked for what makes a comparison unfair: methods that were
tried more often than others, or a control that goes its own way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from daco_rt._yaml import check_keys
from daco_rt.errors import DacoError, did_you_mean
from daco_rt.evaluate.judges import SCORES
from daco_rt.evaluate.methods import Method
from daco_rt.evaluate.values import number

RATES: dict[str, str | None] = {
    "main": "lower", "unsafe": "lower", "safe": "higher", "unjudged": "lower", "refused": None,
    "own": "lower", "named": "lower",
}  # fmt: skip
"""Rates that a judge may have beside its scores, and which way they are better; "main" is its main rate.
Whether refusals are good depends on the question."""


@dataclass(frozen=True)
class Rate:
    """One number of one judge on one benchmark; ``name`` is one of `RATES` or of the judge's scores."""

    judge: str
    benchmark: str
    name: str = "main"

    def __str__(self) -> str:
        return f"{self.benchmark}, {self.judge}: {self.name.replace('_', ' ')}"


@dataclass(frozen=True)
class Constraint:
    """What a trial must keep on the development part besides the budget: a bound from below or from above."""

    rate: Rate
    at_least: float | None = None
    at_most: float | None = None

    def holds(self, value: float) -> bool:
        """Whether a value keeps the bound; NaN keeps none."""
        if self.at_least is not None:
            return value >= self.at_least
        return self.at_most is not None and value <= self.at_most

    def __str__(self) -> str:
        if self.at_least is not None:
            return f"{self.rate} ≥ {self.at_least:g}"
        return f"{self.rate} ≤ {self.at_most:g}"


@dataclass(frozen=True)
class Protocol:
    """A checked protocol.

    Attributes
    ----------
    budgets : tuple of float
        Largest divergences on harmless answers, nats a token, rising; a strength is chosen for each.
    divergence : str
        The benchmark on which the divergence is measured.
    criterion : Rate
        What is made best within a budget.
    better : str
        "lower" or "higher", of the criterion.
    constraints : tuple of Constraint
    reference : str or None
        The method that the others are compared with; all pairs are compared without one.
    trials : int
        Strengths that each method was tried at.
    """

    budgets: tuple[float, ...]
    divergence: str
    criterion: Rate
    better: str
    constraints: tuple[Constraint, ...] = ()
    reference: str | None = None
    trials: int = 0

    @property
    def judges(self) -> list[str]:
        """The judges on whose verdicts the choice rests, by name."""
        return sorted({self.criterion.judge, *(c.rate.judge for c in self.constraints)})

    def to_json(self) -> dict[str, Any]:
        """Return the protocol ready for ``json.dumps``."""
        return {
            "budgets": list(self.budgets),
            "divergence": self.divergence,
            "criterion": vars(self.criterion) | {"better": self.better},
            "constraints": [str(constraint) for constraint in self.constraints],
            "reference": self.reference,
            "trials": self.trials,
        }


def read_protocol(
    tree: Any,
    where: str,
    *,
    divergence: Sequence[str],
    benchmarks: Mapping[str, Any],
    methods: Mapping[str, Method],
    judges: Mapping[str, Mapping[str, Any]],
) -> Protocol:
    """Read and check the ``protocol`` section of a configuration; the other arguments are its other sections.

    Raises
    ------
    DacoError
        A key or a name is wrong, methods have different numbers of trials, or a control belongs to no method.
    """
    tree = check_keys(tree, ("budgets", "divergence", "criterion", "constraints", "reference"), where)
    budgets = tree.get("budgets", [0.03, 0.1])
    if not isinstance(budgets, list) or not budgets:
        raise DacoError(f"{where}: budgets must be a list of divergences in nats a token, got {budgets!r}")
    limits = sorted({number(value, f"{where}: budgets", 0) for value in budgets})
    if not divergence:
        raise DacoError(f"{where}: a budget needs a benchmark on which the divergence is measured; name one")
    chosen = tree.get("divergence", divergence[0])
    if chosen not in divergence:
        raise DacoError(
            f"{where}: the divergence is not measured on '{chosen}', only on {', '.join(divergence)}"
        )
    if "criterion" not in tree:
        raise DacoError(f"{where}: criterion is missing; name a judge and a benchmark")
    row = check_keys(tree["criterion"], ("judge", "benchmark", "rate"), f"{where}, criterion")
    criterion = _rate(row, f"{where}, criterion", benchmarks, judges)
    better = _directions(judges[criterion.judge]["kind"]).get(criterion.name)
    if better is None:
        raise DacoError(
            f"{where}, criterion: whether '{criterion.name}' should rise or fall depends on the question; "
            "choose another rate"
        )
    rows = tree.get("constraints", [])
    if not isinstance(rows, list):
        raise DacoError(f"{where}: constraints must be a list, got {type(rows).__name__}")
    constraints = tuple(
        _constraint(row, f"{where}, constraint {i + 1}", benchmarks, judges) for i, row in enumerate(rows)
    )
    reference = tree.get("reference")
    if reference is not None and (str(reference) not in methods or reference == "none"):
        near = did_you_mean(str(reference), set(methods) - {"none"})
        raise DacoError(f"{where}: no method '{reference}' to compare with{near}")
    trials = _trials(methods, where)
    return Protocol(tuple(limits), chosen, criterion, better, constraints, reference, trials)


def is_fixed(method: Method) -> bool:
    """Whether a method has nothing to choose: it runs on the test part as it is."""
    return method.controls is None and len(method.labels) == 1 and not method.strengths


def _trials(methods: Mapping[str, Method], where: str) -> int:
    alone = [m.name for m in methods.values() if m.kind == "random" and m.controls is None]
    if alone:
        raise DacoError(
            f"{where}: control '{alone[0]}' belongs to no method; name one by of:, whose strengths it takes"
        )
    tried = {m.name: len(m.labels) for m in methods.values() if m.controls is None and not is_fixed(m)}
    if len(set(tried.values())) > 1:
        counts = ", ".join(f"{name} {count}" for name, count in tried.items())
        fixed = [m.name for m in methods.values() if is_fixed(m) and m.kind != "none"]
        raise DacoError(
            f"{where}: every method must be tried at as many strengths, got {counts}"
            + (f" (without a strength, hence exempt: {', '.join(fixed)})" if fixed else "")
            + "; add strengths or take some away"
        )
    return next(iter(tried.values()), 0)


def _directions(kind: str) -> dict[str, str | None]:
    return {**RATES, **SCORES.get(kind, {})}


def _rate(
    row: Mapping[str, Any], where: str, benchmarks: Mapping[str, Any], judges: Mapping[str, Mapping[str, Any]]
) -> Rate:
    for key, known in (("judge", judges), ("benchmark", benchmarks)):
        if str(row.get(key)) not in known:
            raise DacoError(f"{where}: no {key} '{row.get(key)}'{did_you_mean(str(row.get(key)), known)}")
    name, known_rates = str(row.get("rate", "main")), _directions(judges[row["judge"]]["kind"])
    if name not in known_rates:
        raise DacoError(
            f"{where}: judge '{row['judge']}' has no rate '{name}'{did_you_mean(name, known_rates)}"
        )
    return Rate(row["judge"], row["benchmark"], name)


def _constraint(
    row: Any, where: str, benchmarks: Mapping[str, Any], judges: Mapping[str, Mapping[str, Any]]
) -> Constraint:
    row = check_keys(row, ("judge", "benchmark", "rate", "at_least", "at_most"), where)
    bounds = {key: number(row[key], f"{where}: {key}") for key in ("at_least", "at_most") if key in row}
    if len(bounds) != 1:
        raise DacoError(f"{where}: needs a bound, either at_least or at_most")
    return Constraint(_rate(row, where, benchmarks, judges), **bounds)
