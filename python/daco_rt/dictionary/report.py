"""What is worth knowing about a dictionary, as one JSON document that the figures are drawn from."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from daco_rt._files import atomic_file
from daco_rt.artifacts import ConceptDictionary
from daco_rt.dictionary.diagnostics import (
    coherence,
    group_cosines,
    group_map,
    labelled_groups,
    nearest,
    own_group_share,
    signal,
)
from daco_rt.dictionary.directions import block_directions, select_rows
from daco_rt.errors import ArtifactError, DacoError
from daco_rt.progress import progress as show

if TYPE_CHECKING:
    from daco_rt.dictionary.identification import Identification
    from daco_rt.dictionary.means import ConceptMeans

SHOWN = ("dagger", "heroin", "bomb", "honesty", "dog", "bread", "theft", "poison")
_BINS = 100


def diagnose(
    dictionary: ConceptDictionary,
    means: ConceptMeans | None = None,
    *,
    block: int | None = None,
    names: Sequence[str] = SHOWN,
    identification: Identification | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure coherence and signal at every block, groups and neighbours at one; plain JSON values.

    Cost: N²·d / 2 multiplications a block for the coherence. Memory: one block's atoms in fp32 and a few
    matrices of 1,024 × N.

    Parameters
    ----------
    dictionary : what is looked at.
    means : what it was made from; without them ``signal`` is None.
    block : where groups, neighbours and the histogram are shown; by default the best of the identification,
        or the middle block.
    names : concepts whose neighbours are listed; those that the dictionary lacks are left out.
    identification : what ``identify`` found, or None.

    Raises
    ------
    ArtifactError
        If the dictionary has no such block.
    DacoError
        If the means are not those of the dictionary.

    Example
    -------
    >>> report = diagnose(dictionary, means)
    >>> report["coherence"]["16"]["mean"]
    0.07
    """
    if block is None:
        best = None if identification is None else identification.best_block()
        block = dictionary.blocks[len(dictionary.blocks) // 2] if best is None else best
    if block not in dictionary.blocks:
        raise ArtifactError(
            f"dictionary {dictionary.path} has no block {block}; available: "
            + ", ".join(map(str, dictionary.blocks))
        )
    alike: dict[str, Any] = {}
    silent = contextlib.nullcontext(lambda _: None)
    with show("coherence", len(dictionary.blocks), unit="blocks") if progress else silent as advance:
        for each in dictionary.blocks:
            found = coherence(dictionary.atoms(each))
            pair = [dictionary.concepts[i].name for i in found.pair]
            histogram = found.counts.reshape(_BINS, -1).sum(axis=1).tolist()
            alike[str(each)] = {**found.to_dict(), "pair": pair, "histogram": histogram}
            advance(1)
    known = {concept.name for concept in dictionary.concepts}
    return {
        "dictionary": dictionary.path.name,
        "size": dictionary.size,
        "dim": dictionary.dim,
        "blocks": list(dictionary.blocks),
        "block": block,
        "median_norm": {str(each): norm for each, norm in dictionary.median_norm.items()},
        "recipe": {key: value for key, value in dictionary.recipe.items() if key != "harvest"},
        "coherence": alike,
        "signal": None if means is None else _signal(dictionary, means),
        "groups": _groups(dictionary, block),
        "neighbours": {name: neighbour_rows(dictionary, block, name, 5) for name in names if name in known},
        "identification": None if identification is None else identification.to_dict(),
    }


def save_report(report: Mapping[str, Any], path: str | Path) -> Path:
    """Write what ``diagnose`` returned as JSON; an old file is replaced.

    Raises
    ------
    ArtifactError
        If the device refuses the file; the old one is intact.

    Example
    -------
    >>> save_report(report, "figures/diagnostics.json")
    PosixPath('figures/diagnostics.json')
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write((json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode())
    return path


def neighbour_rows(dictionary: ConceptDictionary, block: int, name: str, count: int) -> list[dict[str, Any]]:
    """Return the nearest atoms of a concept as rows of name, cosine, label and group.

    Example
    -------
    >>> neighbour_rows(dictionary, 16, "dagger", 1)[0]["name"]
    'sword'
    """
    found = nearest(dictionary.atoms(block), dictionary.concepts, dictionary.index(name), count=count)
    return [
        {
            "name": each.concept.name,
            "cosine": round(each.cosine, 4),
            "label": each.concept.label,
            "group": each.concept.group,
        }
        for each in found
    ]


def _signal(dictionary: ConceptDictionary, means: ConceptMeans) -> dict[str, Any]:
    recipe = dictionary.recipe
    try:
        centre, removed, minimum = recipe["centre"], recipe["remove_shared"], recipe["minimum"]
    except KeyError as error:
        raise DacoError(
            f"dictionary {dictionary.path} was not made from means: no {error} in its recipe"
        ) from error
    chosen = select_rows(means, centre=centre, minimum=minimum)
    names = [means.concepts[row].name for row in chosen.rows]
    if means.blocks != dictionary.blocks or names != [concept.name for concept in dictionary.concepts]:
        raise DacoError(
            f"dictionary {dictionary.path} was not made from {means.path}; give the means it was made from"
        )
    found = {}
    for block in means.blocks:
        norms = block_directions(means, block, chosen.rows, centre=centre, remove_shared=removed).norms
        found[str(block)] = signal(means, block, chosen.rows, norms).to_dict()
    return found


def _groups(dictionary: ConceptDictionary, block: int) -> dict[str, Any] | None:
    groups = labelled_groups(dictionary.concepts)
    if len(groups) < 3:
        return None
    atoms = dictionary.atoms(block)
    # A handful of atoms has a mean of its own in any case; it must not take the axes from larger groups.
    largest = max(map(len, groups.values()))
    mapped = {name: rows for name, rows in groups.items() if 4 * len(rows) >= largest}
    places, shares = group_map(atoms, mapped if len(mapped) >= 3 else groups)
    return {
        "names": list(groups),
        "sizes": [len(rows) for rows in groups.values()],
        "cosines": np.round(group_cosines(atoms, groups), 4).tolist(),
        "own_group": round(own_group_share(atoms, groups), 4),
        "map": {name: np.round(place, 4).tolist() for name, place in places.items()},
        "shares": [round(share, 4) for share in shares],
    }
