"""Choosing η and γ on a validation split: score every pair, keep the safest that stays capable.

What "safe" and "capable" mean is the caller's: two functions that steer a model with an annotation and a
strength and return a number, higher is better. Results are written line by line, so a sweep that was stopped
goes on.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from daco_rt._files import atomic_file
from daco_rt.artifacts import Concept, ConceptDictionary, Sae
from daco_rt.artifacts.manifest import read_manifest
from daco_rt.errors import ArtifactError, DacoError
from daco_rt.sae.annotate import Rule, label_latents

Score = Callable[[tuple[Concept, ...], float], float]


@dataclass(frozen=True)
class SweepPoint:
    """One pair and its scores. ``eta`` None is the model without steering; counts are labelled latents."""

    eta: float | None
    gamma: float
    undesirable: int
    desirable: int
    safety: float
    capability: float


def sweep_policies(
    sae: Sae,
    dictionary: ConceptDictionary,
    *,
    etas: Sequence[float],
    gammas: Sequence[float],
    safety: Score,
    capability: Score,
    rule: Rule = "centroid",
    results: str | Path | None = None,
    scored_by: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[SweepPoint]:
    """Score every pair of η and γ, and the model without steering first.

    Parameters
    ----------
    sae, dictionary, rule : as in ``label_latents``.
    etas, gammas : the grid.
    safety, capability : called with (annotation, γ); an empty annotation with γ = 0 means no steering.
    results : a JSON-lines file that grows by a line a point; points that it holds are not scored again, as
        long as it was made for the same weights, dictionary, rule and ``scored_by``.
    scored_by : what the scores depend on besides, any JSON: the prompts, the policy's other numbers.
    progress : called with 1 after each point.

    Returns
    -------
    list of SweepPoint
        Unsteered first, then by η and γ.

    Raises
    ------
    DacoError
        If the grid is empty or a score is not a finite number.
    ArtifactError
        As ``label_latents``; also if ``results`` holds another sweep.

    Example
    -------
    >>> points = sweep_policies(sae, dictionary, etas=[0.2, 0.3], gammas=[0.0, 0.1], safety=f, capability=g)
    >>> choose_point(points).eta
    0.3
    """
    if not etas or not gammas:
        raise DacoError("the sweep is empty; give at least one eta and one gamma")
    file = None if results is None else Path(results)
    head = {
        "sae": sae.path.name,
        "dictionary": dictionary.path.name,
        "rule": rule,
        "latents": len(sae.decoder),
        "weights": hashlib.sha256(np.ascontiguousarray(sae.decoder).tobytes()).hexdigest()[:16],
        "concepts": read_manifest(dictionary.path)["checksum"][:16],
        "scored_by": json.loads(json.dumps(scored_by or {})),
    }
    done = {} if file is None else _read(file, head)
    grid: list[tuple[float | None, float]] = [(None, 0.0)]
    grid += [(float(eta), float(gamma)) for eta in dict.fromkeys(etas) for gamma in dict.fromkeys(gammas)]
    tables: dict[float | None, tuple[Concept, ...]] = {None: ()}
    points = []
    for eta, gamma in grid:
        point = done.get((eta, gamma))
        if point is None:
            if eta not in tables:
                assert eta is not None
                tables[eta] = label_latents(sae, dictionary, eta=eta, rule=rule)
            table = tables[eta]
            scores = {
                name: _score(name, function, table, eta, gamma)
                for name, function in (("safety", safety), ("capability", capability))
            }
            labels = [concept.label for concept in table]
            point = SweepPoint(eta, gamma, labels.count("undesirable"), labels.count("desirable"), **scores)
            done[eta, gamma] = point
            if file is not None:
                _write(file, head, done)
        points.append(point)
        if progress is not None:
            progress(1)
    return points


def choose_point(points: Sequence[SweepPoint], *, keep_capability: float = 0.95) -> SweepPoint:
    """Return the safest point whose capability is at least a share of the unsteered model's.

    Ties go to the higher capability, then to the smaller γ. Where no point qualifies, the unsteered one is
    returned: nothing on this grid is good enough.

    Raises
    ------
    DacoError
        If the unsteered point is missing.

    Example
    -------
    >>> choose_point(points, keep_capability=0.9)
    """
    free = [point for point in points if point.eta is None]
    if not free:
        raise DacoError("the sweep has no unsteered point to compare with; sweep again")
    floor = keep_capability * free[0].capability
    able = [point for point in points if point.capability >= floor or point is free[0]]
    return max(able, key=lambda point: (point.safety, point.capability, -abs(point.gamma)))


def pareto_front(points: Sequence[SweepPoint]) -> list[SweepPoint]:
    """Return the points that no other beats in both scores, by rising capability.

    Example
    -------
    >>> [point.eta for point in pareto_front(points)]
    [0.2, 0.3, None]
    """
    front = []
    best = -math.inf
    for point in sorted(points, key=lambda point: (-point.capability, -point.safety)):
        if point.safety > best:
            front.append(point)
            best = point.safety
    return front[::-1]


def _score(name: str, function: Score, table: tuple[Concept, ...], eta: float | None, gamma: float) -> float:
    value = float(function(table, gamma))
    if not math.isfinite(value):
        raise DacoError(
            f"the {name} score at eta {eta}, gamma {gamma} is {value}; it must be a finite number"
        )
    return value


def _read(file: Path, head: dict[str, Any]) -> dict[tuple[float | None, float], SweepPoint]:
    if not file.exists():
        return {}
    try:
        first, *rest = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        points = [SweepPoint(**row) for row in rest]
    except (OSError, ValueError, TypeError) as error:
        raise ArtifactError(f"{file} is no sweep ({error}); give another file or delete it") from error
    if first != head:
        keys = sorted(set(head) | set(first)) if isinstance(first, dict) else ["everything"]
        other = [key for key in keys if not isinstance(first, dict) or first.get(key) != head.get(key)]
        raise ArtifactError(
            f"{file} is a sweep with another {', '.join(other)}; give another file or delete it"
        )
    return {(point.eta, point.gamma): point for point in points}


def _write(file: Path, head: dict[str, Any], done: dict[tuple[float | None, float], SweepPoint]) -> None:
    with atomic_file(file) as out:
        for row in (head, *map(asdict, done.values())):
            out.write((json.dumps(row) + "\n").encode())
