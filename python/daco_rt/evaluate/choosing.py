"""From development trials to a choice, and the file that freezes it.

For each method and budget the strength with the best criterion is taken among those whose divergence on the
development part keeps the budget and that break no constraint; among equals the smaller divergence.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from daco_rt._files import write_json
from daco_rt.errors import ArtifactError, DacoError
from daco_rt.evaluate.metrics import Estimate
from daco_rt.evaluate.protocol import Protocol, is_fixed
from daco_rt.evaluate.provenance import provenance
from daco_rt.evaluate.run import Evaluation
from daco_rt.evaluate.summary import Numbers, judged
from daco_rt.evaluate.values import plain

FILE = "chosen.json"


@dataclass(frozen=True)
class Trial:
    """One variant on the development part; ``bounds`` are the constrained rates, ``broken`` the constraints
    that it does not keep.
    """

    variant: str
    method: str
    strength: float | None
    criterion: Estimate
    divergence: Estimate
    bounds: tuple[Estimate, ...] = ()
    broken: tuple[str, ...] = ()

    def keeps(self, budget: float) -> bool:
        """Whether the trial may be chosen within a budget."""
        return not (self.broken or math.isnan(self.criterion.value)) and self.divergence.value <= budget


def trials_of(protocol: Protocol, numbers: Sequence[Numbers]) -> list[Trial]:
    """Return every variant's trial from the numbers of the development part, in their order.

    Raises
    ------
    DacoError
        The divergence of a variant was not measured.
    """
    by_key = {(n.variant, n.benchmark): n for n in numbers}
    goal, found = protocol.criterion, []
    for variant in dict.fromkeys(n.variant for n in numbers):
        cost = by_key[variant, protocol.divergence]
        if cost.kl is None:
            raise DacoError(
                f"the divergence of {variant} on {protocol.divergence} is not there; run it first"
            )
        bounds = [
            judged(by_key[variant, c.rate.benchmark], c.rate.judge, c.rate.name) for c in protocol.constraints
        ]
        found.append(
            Trial(
                variant,
                cost.method,
                cost.strength,
                judged(by_key[variant, goal.benchmark], goal.judge, goal.name),
                cost.kl,
                tuple(bounds),
                tuple(
                    str(constraint)
                    for constraint, bound in zip(protocol.constraints, bounds, strict=True)
                    if not constraint.holds(bound.value)
                ),
            )
        )
    return found


def choose(
    protocol: Protocol, methods: Mapping[str, Any], trials: Sequence[Trial]
) -> dict[float, dict[str, str]]:
    """Return budget → method → the variant chosen; a method without one is left out.

    Methods without a strength are there at the budgets that they keep, a control at its method's strength.

    Example
    -------
    >>> found = choose(protocol, config.methods, trials_of(protocol, numbers))      # doctest: +SKIP
    >>> found[0.03]["omp"]                                                          # doctest: +SKIP
    'omp@0.4'
    """
    sign = 1 if protocol.better == "lower" else -1
    chosen: dict[float, dict[str, str]] = {}
    for budget in protocol.budgets:
        best: dict[str, Trial] = {}
        for trial in trials:
            if trial.method == "none" or not trial.keeps(budget):
                continue
            there = best.get(trial.method)
            order = (sign * trial.criterion.value, trial.divergence.value)
            if there is None or order < (sign * there.criterion.value, there.divergence.value):
                best[trial.method] = trial
        found = {"none": "none", **{name: trial.variant for name, trial in best.items()}}
        for name, method in methods.items():
            if method.controls is not None and method.controls.name in best:
                strength = best[method.controls.name].strength
                found[name] = next(label for label, value in method.labels.items() if value == strength)
        chosen[budget] = {name: found[name] for name in methods if name in found}
    return chosen


def run_on_test(methods: Mapping[str, Any], chosen: Mapping[float, Mapping[str, str]]) -> set[str]:
    """Return the variants of the test part: those chosen, and methods that have no strength, at any cost."""
    fixed = {label for method in methods.values() if is_fixed(method) for label in method.labels}
    return fixed | {variant for row in chosen.values() for variant in row.values()}


def fingerprint(evaluation: Evaluation, protocol: Protocol) -> str:
    """Return the SHA-256 of what a choice rests on: answers, divergences, and the verdicts of its judges."""
    digest = hashlib.sha256()
    for cell in evaluation.cells:
        row = {
            "cell": cell.stem,
            "answers": {key: answer.token_ids for key, answer in evaluation.answers(cell).items()},
            "divergence": evaluation.divergences(cell),
            "verdicts": [
                {key: verdict.to_json() for key, verdict in evaluation.verdicts(cell, judge).items()}
                for judge in protocol.judges
            ],
        }
        digest.update((json.dumps(row, sort_keys=True) + "\n").encode())
    return digest.hexdigest()


def configured(evaluation: Evaluation) -> str:
    """Return the SHA-256 of the configuration's keys and values but ``prepare``; order does not count."""
    settings = {key: value for key, value in evaluation.config.raw.items() if key != "prepare"}
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def freeze(
    evaluation: Evaluation, protocol: Protocol, trials: Sequence[Trial], packs: Mapping[str, str]
) -> dict[str, Any]:
    """Return what ``chosen.json`` says about a finished development part: choice, trials, hashes, date.

    ``packs`` are the checksums of the methods' packs.
    """
    chosen = choose(protocol, evaluation.config.methods, trials)
    return {
        "format": 1,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "chosen": {f"{budget:g}": row for budget, row in chosen.items()},
        "protocol": protocol.to_json(),
        "packs": dict(packs),
        "development_sha256": fingerprint(evaluation, protocol),
        "config": str(evaluation.config.path),
        "config_sha256": configured(evaluation),
        "questions": {name: len(b.samples) for name, b in evaluation.benchmarks.items()},
        "trials": [asdict(trial) for trial in trials],
        **{key: value for key, value in provenance().items() if key in ("commit", "daco_rt")},
    }


def read_chosen(path: Path) -> dict[str, Any] | None:
    """Return what ``chosen.json`` says, None if there is none.

    Raises
    ------
    ArtifactError
        It is damaged.
    """
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] != 1 or not isinstance(record["chosen"], dict):
            raise ValueError(f"format {record['format']!r}")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ArtifactError(f"{path} is no record of a choice ({error}); restore it from a copy") from error
    return record


def write_chosen(path: Path, record: Mapping[str, Any]) -> None:
    """Write ``chosen.json``."""
    write_json(path, plain(record))


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Say in what two choices differ, "" if in nothing: the choice, the protocol, packs, development answers.

    Example
    -------
    >>> difference({"chosen": {"0.1": {"a": "a@1"}}}, {"chosen": {"0.1": {"a": "a@2"}}})
    'a at 0.1: a@1 then, a@2 now'
    """
    then, now = old.get("chosen", {}), new.get("chosen", {})
    for budget in dict.fromkeys((*then, *now)):
        if budget not in then or budget not in now:
            return f"budget {budget}: " + ("none then" if budget not in then else "none now")
        for method in dict.fromkeys((*then[budget], *now[budget])):
            a, b = then[budget].get(method, "none"), now[budget].get(method, "none")
            if a != b:
                return f"{method} at {budget}: {a} then, {b} now"
    for key, said in (
        ("protocol", "the protocol section changed"),
        ("packs", "a method is made of another pack"),
        ("development_sha256", "the development answers are others"),
    ):
        if old.get(key) != new.get(key):
            return said
    return ""
