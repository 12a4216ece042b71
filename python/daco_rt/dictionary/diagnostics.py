"""What a dictionary looks like: how alike its atoms are, where its groups lie, how far above the noise.

Everything is exact and works on blocks of rows, so that memory stays near one copy of a block's atoms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from daco_rt.artifacts import Concept
from daco_rt.errors import DacoError

if TYPE_CHECKING:
    from daco_rt.dictionary.means import ConceptMeans

QUANTILES = (0.5, 0.9, 0.99, 0.999)
BINS = 1000


@dataclass(frozen=True)
class Coherence:
    """How alike atoms are: |cos| over all pairs of different atoms.

    ``counts`` [bins] int64 is the histogram over 0 … 1, ``mean`` the mean of |cos|, ``mean_signed`` that of
    cos, ``maximum`` the largest |cos| and ``pair`` the rows it belongs to.
    """

    counts: np.ndarray
    mean: float
    mean_signed: float
    maximum: float
    pair: tuple[int, int]

    def quantile(self, share: float) -> float:
        """Return the |cos| below which a share of the pairs lies, to the width of a bin (upper edge).

        Example
        -------
        >>> coherence(np.eye(3)).quantile(0.5)
        0.001
        """
        total = np.cumsum(self.counts)
        return float((np.searchsorted(total, share * total[-1]) + 1) / len(self.counts))

    def to_dict(self) -> dict[str, Any]:
        """Return mean, quantiles and maximum as plain JSON values."""
        return {
            "mean": round(self.mean, 5),
            "mean_signed": round(self.mean_signed, 5),
            "quantiles": {str(share): self.quantile(share) for share in QUANTILES},
            "maximum": round(self.maximum, 5),
            "pair": list(self.pair),
        }


def coherence(atoms: np.ndarray, *, rows: int = 1024, bins: int = BINS) -> Coherence:
    """Measure |cos| over all N (N − 1) / 2 pairs, exactly.

    Parameters
    ----------
    atoms : [N, d], any float dtype, N ≥ 2; rows need not have unit norm.
    rows : rows multiplied with all later ones at a time; memory is ``rows`` · N fp32 beside the atoms.
    bins : of the histogram.

    Raises
    ------
    DacoError
        If there are fewer than two atoms, or one is zero or not finite.

    Example
    -------
    >>> coherence(dictionary.atoms(16)).quantile(0.99)
    0.42
    """
    unit = unit_rows(atoms)
    size = len(unit)
    if size < 2:
        raise DacoError(f"coherence needs two atoms, got {size}")
    counts = np.zeros(bins, np.int64)
    total, signed = 0.0, 0.0
    best, pair = -1.0, (0, 1)
    for start in range(0, size, rows):
        products = unit[start : start + rows] @ unit[start:].T
        upper = np.arange(products.shape[1]) > np.arange(len(products))[:, None]
        signed += float(products.sum(where=upper, dtype=np.float64))
        np.abs(products, out=products)
        total += float(products.sum(where=upper, dtype=np.float64))
        products[~upper] = -1.0
        place = int(products.argmax())
        if products.flat[place] > best:
            i, j = np.unravel_index(place, products.shape)
            best, pair = float(products[i, j]), (start + int(i), start + int(j))
        places = np.minimum((products[upper] * bins).astype(np.int32), bins - 1)
        counts += np.bincount(places, minlength=bins)
    pairs = size * (size - 1) / 2
    return Coherence(counts, total / pairs, signed / pairs, min(best, 1.0), pair)


@dataclass(frozen=True)
class Signal:
    """How far directions stand above the noise of their readings, [n] fp32 each.

    ``norms`` is ‖D_c‖, ``spread`` √(mean squared distance of a reading from its concept's mean), ``errors``
    the standard error of the concept's mean, √(Σ‖z − m_c‖² / (n (n − 1))), and ``ratio`` norms / errors. A
    direction that is all noise has a ratio near 1. Concepts with one reading have no error: NaN.
    """

    norms: np.ndarray
    spread: np.ndarray
    errors: np.ndarray
    ratio: np.ndarray

    def to_dict(self) -> dict[str, Any]:
        """Return the 5th, 50th and 95th percentiles as plain JSON values."""
        return {
            name: {str(q): round(float(np.nanquantile(values, q)), 4) for q in (0.05, 0.5, 0.95)}
            for name, values in vars(self).items()
        }


def signal(means: ConceptMeans, block: int, rows: np.ndarray, norms: np.ndarray) -> Signal:
    """Compare the lengths of directions with the scatter of the readings behind them.

    Parameters
    ----------
    means : what the directions were made from.
    block : one of its blocks.
    rows : [n], the concepts' rows in the means.
    norms : [n], ‖D_c‖ as ``block_directions`` gives them.

    Example
    -------
    >>> float(np.median(signal(means, 16, chosen.rows, found.norms).ratio))
    8.1
    """
    variance = means.spread(block)[rows].astype(np.float64)
    count = means.count(block)[rows]
    with np.errstate(divide="ignore", invalid="ignore"):
        errors = np.where(count > 1, np.sqrt(variance / np.maximum(count - 1, 1)), np.nan)
        ratio = norms / errors
    kinds = (norms, np.sqrt(variance), errors, ratio)
    return Signal(*(np.asarray(values, np.float32) for values in kinds))


@dataclass(frozen=True)
class Neighbour:
    """An atom near another: its concept, and the cosine between the two."""

    concept: Concept
    cosine: float


def nearest(
    atoms: np.ndarray, concepts: Sequence[Concept], index: int, *, count: int = 10
) -> tuple[Neighbour, ...]:
    """Return the atoms with the largest cosine to one of them, the nearest first, itself left out.

    Parameters
    ----------
    atoms : [N, d].
    concepts : table whose ``index`` says which atom a concept names; atoms without one are left out.
    index : row of the atom whose neighbours are wanted.
    count : how many, at least 1.

    Raises
    ------
    DacoError
        If ``count`` is below 1.

    Example
    -------
    >>> nearest(dictionary.atoms(16), dictionary.concepts, dictionary.index("dagger"))[0].concept.name
    'knife'
    """
    if count < 1:
        raise DacoError(f"the number of neighbours must be at least 1, got {count}")
    unit = unit_rows(atoms)
    cosines = unit @ unit[index]
    ranked = sorted(
        (concept for concept in concepts if concept.index != index),
        key=lambda concept: (-cosines[concept.index], concept.index),
    )
    return tuple(Neighbour(concept, float(cosines[concept.index])) for concept in ranked[:count])


def labelled_groups(
    concepts: Sequence[Concept], *, minimum: int = 5, label: str | None = None
) -> dict[str, np.ndarray]:
    """Return group → rows of its concepts, the largest group first; groups below ``minimum`` are left out.

    Example
    -------
    >>> list(labelled_groups(dictionary.concepts))[:2]
    ['weapons', 'crime']
    """
    rows: dict[str, list[int]] = {}
    for concept in concepts:
        if concept.group and label in (None, concept.label):
            rows.setdefault(concept.group, []).append(concept.index)
    found = {group: np.array(items) for group, items in rows.items() if len(items) >= minimum}
    return dict(sorted(found.items(), key=lambda item: (-len(item[1]), item[0])))


def group_cosines(atoms: np.ndarray, groups: dict[str, np.ndarray]) -> np.ndarray:
    """Return the mean cosine between the atoms of two groups, [g, g] fp32; no atom is paired with itself.

    Example
    -------
    >>> group_cosines(dictionary.atoms(16), labelled_groups(dictionary.concepts)).shape
    (15, 15)
    """
    unit = unit_rows(atoms)
    sums = np.stack([unit[rows].sum(axis=0, dtype=np.float64) for rows in groups.values()])
    sizes = np.array([len(rows) for rows in groups.values()], np.float64)
    totals, pairs = sums @ sums.T, np.outer(sizes, sizes)
    totals[np.diag_indices_from(totals)] -= sizes
    pairs[np.diag_indices_from(pairs)] -= sizes
    with np.errstate(invalid="ignore"):
        return (totals / pairs).astype(np.float32)


def own_group_share(atoms: np.ndarray, groups: dict[str, np.ndarray]) -> float:
    """Return the share of atoms that are nearest to the mean of their own group, themselves left out of it.

    Example
    -------
    >>> own_group_share(dictionary.atoms(16), labelled_groups(dictionary.concepts))
    0.86
    """
    unit = unit_rows(atoms)
    sums = np.stack([unit[rows].sum(axis=0, dtype=np.float64) for rows in groups.values()])
    right = total = 0
    for own, rows in enumerate(groups.values()):
        cosines = unit[rows] @ (sums / np.linalg.norm(sums, axis=1, keepdims=True)).T
        rest = sums[own] - unit[rows]
        cosines[:, own] = np.einsum("nd,nd->n", unit[rows], rest) / np.linalg.norm(rest, axis=1)
        right += int((cosines.argmax(axis=1) == own).sum())
        total += len(rows)
    return right / total


def group_map(
    atoms: np.ndarray, groups: dict[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], tuple[float, float]]:
    """Place the atoms of some groups on the plane along which the groups' means differ most.

    Returns group → [n, 2] coordinates, and the share of the variance between the groups' means that each
    axis carries. The axes are principal components of the means, so a group is not pulled apart by what
    varies inside it, and no distance is bent as in t-SNE.

    Raises
    ------
    DacoError
        If there are fewer than three groups.

    Example
    -------
    >>> places, shares = group_map(dictionary.atoms(16), labelled_groups(dictionary.concepts))
    >>> places["weapons"].shape[1]
    2
    """
    if len(groups) < 3:
        raise DacoError(f"a map needs three groups of concepts, got {len(groups)}")
    unit = unit_rows(atoms)
    centres = np.stack([unit[rows].mean(axis=0, dtype=np.float64) for rows in groups.values()])
    middle = centres.mean(axis=0)
    _, values, axes = np.linalg.svd(centres - middle, full_matrices=False)
    shares = values**2 / (values**2).sum()
    places = {group: (unit[rows] - middle) @ axes[:2].T for group, rows in groups.items()}
    return places, (float(shares[0]), float(shares[1]))


def unit_rows(atoms: np.ndarray) -> np.ndarray:
    """Return a copy of the rows [N, d] in fp32, each of unit norm.

    Raises
    ------
    DacoError
        If a row is zero or not finite.
    """
    rows = np.array(atoms, np.float32)
    norms = np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64))
    bad = np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))
    if bad.size:
        raise DacoError(
            f"atom {bad[0]} is zero or not finite, so it has no direction; make the dictionary again"
        )
    rows /= norms[:, None].astype(np.float32)
    return rows
