"""From concept means to a dictionary: what a concept adds to the residual stream, beyond what any text adds.

With m_c the mean of a concept's readings at a block, the direction is D_c = m_c − centre, of unit norm as an
atom. The centre is

``others``
    the mean of the other concepts' means, for readings at words: any word in such a sentence is the contrast.
    With N concepts it is (N m̄ − m_c) / (N − 1), so D_c = N / (N − 1) · (m_c − m̄) and one mean m̄ serves all.
``negatives``
    the mean over the concept's own negatives X⁻, for readings at positions that every text has.
``ordinary``
    the mean of ordinary text at the block.
``none``
    nothing: the raw mean. Nearly parallel for all concepts; for comparisons.

``remove_shared`` then takes the r leading components of the unit directions out of each (their uncentred
principal components): what is left of the components that all concepts share.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from daco_rt.artifacts import Concept, ConceptDictionary, save_dictionary
from daco_rt.artifacts.store import check_target
from daco_rt.concepts.texts import MINIMUM
from daco_rt.dictionary.positions import WORD_RULES
from daco_rt.errors import DacoError, did_you_mean
from daco_rt.progress import progress as show

if TYPE_CHECKING:
    from daco_rt.dictionary.means import ConceptMeans

CENTRES = ("others", "negatives", "ordinary", "none")
# Rows that are worked on in float64 at a time.
_ROWS = 1024
_QUANTILES = (0.05, 0.5, 0.95)


@dataclass(frozen=True)
class Selection:
    """Which concepts of some means become atoms.

    ``rows`` [n] int64 are their rows in the means, in order; ``excluded`` maps the names of the others to
    their smallest number of readings at any block (of positives, or of negatives where those are the centre).
    """

    rows: np.ndarray
    excluded: dict[str, int]


@dataclass(frozen=True)
class Directions:
    """The directions of one block.

    ``atoms`` [n, d] fp32 of unit norm, ``norms`` [n] fp32 the length each had, ``shared`` [r, d] fp32 the
    orthonormal components that were removed, ``share`` the part of the unit directions' energy in them.
    """

    atoms: np.ndarray
    norms: np.ndarray
    shared: np.ndarray
    share: float


def default_centre(position: str) -> str:
    """Return what directions are centred on, unless said otherwise, for a position rule of the harvest.

    Example
    -------
    >>> default_centre("word"), default_centre("last")
    ('others', 'negatives')
    """
    return "others" if position in WORD_RULES else "negatives"


def select_rows(means: ConceptMeans, *, centre: str = "others", minimum: int = MINIMUM) -> Selection:
    """Choose the concepts that were read at least ``minimum`` times at every block.

    The mean of a few readings says more about those texts than about the concept. Excluded concepts are not
    among the others that directions are contrasted with.

    Raises
    ------
    DacoError
        If ``minimum`` is below 1 or fewer than two concepts are left.

    Example
    -------
    >>> select_rows(means, minimum=4).excluded
    {'xylem': 2}
    """
    if minimum < 1:
        raise DacoError(f"the minimum of readings must be at least 1, got {minimum}")
    signs = (1, -1) if centre == "negatives" else (1,)
    counts = np.min([means.count(block, sign) for block in means.blocks for sign in signs], axis=0)
    kept = counts >= minimum
    rows = np.flatnonzero(kept)
    if len(rows) < 2:
        what = "readings and as many negatives" if centre == "negatives" else "readings"
        raise DacoError(
            f"{means.path}: {len(rows)} of {len(counts)} concepts have {minimum} {what} at every block, but "
            "directions need two to contrast; lower the minimum or harvest more"
        )
    return Selection(rows, {means.concepts[i].name: int(counts[i]) for i in np.flatnonzero(~kept)})


def block_directions(
    means: ConceptMeans, block: int, rows: np.ndarray, *, centre: str = "others", remove_shared: int = 0
) -> Directions:
    """Compute the directions of one block.

    Memory: one [n, d] fp32 matrix (two with ``negatives``) and, with ``remove_shared``, a few d × d ones in
    float64. Time: n·d, and n·d² + d³ with ``remove_shared``. Sums are in float64.

    Parameters
    ----------
    means : what the harvest read.
    block : one of its blocks.
    rows : [n], rows of the concepts, n ≥ 2, as ``select_rows`` gives them.
    centre : "others", "negatives", "ordinary" or "none".
    remove_shared : r, the number of leading components to take out, 0 to d − 1.

    Raises
    ------
    DacoError
        If an option is unknown or out of range, a mean is not finite, or a concept has no direction.

    Example
    -------
    >>> block_directions(means, 16, select_rows(means).rows).atoms.shape
    (15000, 576)
    """
    if centre not in CENTRES:
        raise DacoError(f"centre '{centre}' is unknown{did_you_mean(centre, CENTRES)}")
    if not 0 <= remove_shared < means.dim:
        raise DacoError(f"remove_shared must lie between 0 and {means.dim - 1}, got {remove_shared}")
    atoms = _rows_of(means.mean(block), rows)
    bad = np.flatnonzero(~np.isfinite(atoms).all(axis=1))
    if bad.size:
        name = means.concepts[rows[bad[0]]].name
        raise DacoError(f"{means.path}: the mean of '{name}' at block {block} is not finite; harvest again")
    _centre(atoms, means, block, rows, centre)
    norms = _normalise(atoms, means, block, rows)
    if not remove_shared:
        return Directions(atoms, norms, np.zeros((0, means.dim), np.float32), 0.0)
    shared, share = leading_components(atoms, remove_shared)
    for part in _parts(atoms):
        part -= ((part.astype(np.float64) @ shared.T) @ shared).astype(np.float32)
    norms = norms * _normalise(atoms, means, block, rows)
    return Directions(atoms, norms, shared.astype(np.float32), share)


def leading_components(atoms: np.ndarray, count: int) -> tuple[np.ndarray, float]:
    """Return the leading right singular vectors of a matrix [n, d], and their share of its energy.

    ``(components [count, d] float64, share)``; exact, by the eigenvectors of the d × d Gram matrix.

    Example
    -------
    >>> leading_components(np.array([[1.0, 0.0], [1.0, 0.1]]), 1)[1]
    0.99...
    """
    gram = np.zeros((atoms.shape[1], atoms.shape[1]))
    for part in _parts(atoms):
        wide = part.astype(np.float64)
        gram += wide.T @ wide
    values, vectors = np.linalg.eigh(gram)
    return vectors[:, ::-1][:, :count].T.copy(), float(values[::-1][:count].sum() / values.sum())


def build_dictionary(
    means: ConceptMeans,
    output: str | Path,
    *,
    centre: str | None = None,
    remove_shared: int = 0,
    minimum: int = MINIMUM,
    overwrite: bool = False,
    progress: bool = True,
) -> ConceptDictionary:
    """Write the dictionary of fp16 atoms that some means give, one block in memory at a time.

    Parameters
    ----------
    means : what the harvest read.
    output : the folder to make.
    centre : as in ``block_directions``; by default "others" for readings at words, else "negatives".
    remove_shared : number of leading components to take out at each block.
    minimum : concepts with fewer readings at any block are left out; the recipe names them.
    overwrite : whether an existing dictionary is replaced.
    progress : show a progress bar on standard error.

    Returns
    -------
    ConceptDictionary
        Its recipe holds the options, the concepts excluded, and the harvest's own recipe.

    Raises
    ------
    ArtifactError
        If the folder may not be written.
    DacoError
        As ``select_rows`` and ``block_directions``.

    Example
    -------
    >>> dictionary = build_dictionary(open_means("means/smol"), "dictionaries/smol")
    >>> dictionary.recipe["centre"]
    'others'
    """
    check_target(output, overwrite=overwrite)
    centre = default_centre(means.position) if centre is None else centre
    if centre not in CENTRES:
        raise DacoError(f"centre '{centre}' is unknown{did_you_mean(centre, CENTRES)}")
    chosen = select_rows(means, centre=centre, minimum=minimum)
    size = len(chosen.rows)
    recipe: dict[str, Any] = {
        "direction": "mean of the concept's readings minus the centre, unit norm",
        "position": means.position,
        "centre": centre,
        "remove_shared": remove_shared,
        "minimum": minimum,
        "excluded": chosen.excluded,
        "rejected": {str(block): int(means.rejected(block)) for block in means.blocks},
        "norms": {},
        "harvest": means.recipe,
    }
    if remove_shared:
        recipe["shared_energy"] = {}

    def producer(block: int, advance: Callable[[int], None]) -> Callable[[], Iterator[np.ndarray]]:
        def produce() -> Iterator[np.ndarray]:
            found = block_directions(means, block, chosen.rows, centre=centre, remove_shared=remove_shared)
            quantiles = np.quantile(found.norms, _QUANTILES)
            recipe["norms"][str(block)] = dict(zip(map(str, _QUANTILES), quantiles.round(4), strict=True))
            if remove_shared:
                recipe["shared_energy"][str(block)] = round(found.share, 4)
            yield from (part.astype(np.float16) for part in _parts(found.atoms))
            advance(1)

        return produce

    silent = contextlib.nullcontext(lambda _: None)
    with show("directions", len(means.blocks), unit="blocks") if progress else silent as advance:
        return save_dictionary(
            output,
            model=means.model,
            atoms={block: ("F16", (size, means.dim), producer(block, advance)) for block in means.blocks},
            means={block: means.ordinary(block) for block in means.blocks},
            median_norm=means.median_norm,
            concepts=kept_concepts(means, chosen),
            recipe=recipe,
            overwrite=overwrite,
        )


def kept_concepts(means: ConceptMeans, chosen: Selection) -> tuple[Concept, ...]:
    """Return the concepts that were kept, numbered as the atoms are.

    Example
    -------
    >>> kept_concepts(means, select_rows(means))[0].index
    0
    """
    return tuple(replace(means.concepts[row], index=i) for i, row in enumerate(chosen.rows))


def _rows_of(matrix: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The rows as fp32 that may be written to; a copy only where rows are left out or memory is mapped."""
    if len(rows) != len(matrix):
        return np.asarray(matrix[rows], np.float32)
    return np.require(matrix, np.float32, ["C", "W", "O"])


def _parts(matrix: np.ndarray) -> Iterator[np.ndarray]:
    return (matrix[start : start + _ROWS] for start in range(0, len(matrix), _ROWS))


def _centre(atoms: np.ndarray, means: ConceptMeans, block: int, rows: np.ndarray, centre: str) -> None:
    """Subtract the centre from the means, in place."""
    if centre == "negatives":
        atoms -= _rows_of(means.mean(block, -1), rows)
    elif centre == "ordinary":
        atoms -= means.ordinary(block)
    elif centre == "others":
        n = len(atoms)
        mean = sum(part.sum(axis=0, dtype=np.float64) for part in _parts(atoms)) / n
        for part in _parts(atoms):
            part[:] = (part - mean) * (n / (n - 1))


def _normalise(atoms: np.ndarray, means: ConceptMeans, block: int, rows: np.ndarray) -> np.ndarray:
    """Give every row unit norm, in place, and return the lengths [n] fp32."""
    norms = np.concatenate([np.linalg.norm(part.astype(np.float64), axis=1) for part in _parts(atoms)])
    flat = np.flatnonzero(norms == 0)
    if flat.size:
        name = means.concepts[rows[flat[0]]].name
        raise DacoError(f"concept '{name}' has no direction at block {block}; remove it from the table")
    atoms /= norms[:, None].astype(np.float32)
    return norms.astype(np.float32)
