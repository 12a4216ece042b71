"""Which latents are undesirable or desirable, and what to call them.

The rule: with μ⁻ the mean of the unit directions of all undesirable concepts, a latent is undesirable if
cos(W_dec[i], μ⁻) ≥ η; desirable likewise with μ⁺; near both, the larger cosine wins. Small η labels too much,
large η too little. Names are those of the nearest concepts and serve people; the rule does not look at them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from daco_rt.artifacts import Concept, ConceptDictionary, Sae
from daco_rt.errors import ArtifactError, DacoError
from daco_rt.sae.folder import rewrite_sae

Rule = Literal["centroid", "nearest"]
_NAME_FLOOR = 0.3
_CHUNK = 1024  # latents that are compared at a time: 120 MB of cosines with 15,000 concepts
_SIDES = ("undesirable", "desirable")


def annotate_sae(
    sae: Sae,
    dictionary: ConceptDictionary,
    output: str | Path,
    *,
    eta: float,
    rule: Rule = "centroid",
    overwrite: bool = False,
) -> Sae:
    """Label the latents of an SAE by a dictionary and write it with that annotation; arguments as below.

    Raises
    ------
    ArtifactError
        As ``label_latents``; also if the folder may not be written.

    Example
    -------
    >>> sae = annotate_sae(load_sae("saes/b16"), dictionary, "saes/b16-labelled", eta=0.3)
    >>> sum(concept.label == "undesirable" for concept in sae.annotation)
    81
    """
    table = label_latents(sae, dictionary, eta=eta, rule=rule)
    counts = {side: sum(concept.label == side for concept in table) for side in _SIDES}
    return rewrite_sae(
        sae,
        output,
        annotation=table,
        model=dictionary.model,
        recipe={"annotation": {"rule": rule, "eta": eta, "dictionary": dictionary.path.name, **counts}},
        overwrite=overwrite,
    )


def label_latents(
    sae: Sae, dictionary: ConceptDictionary, *, eta: float, rule: Rule = "centroid"
) -> tuple[Concept, ...]:
    """Return one concept for each latent that has a label or resembles a concept.

    Parameters
    ----------
    sae : its decoder rows are compared.
    dictionary : of the same model, with the SAE's block; at least one of its concepts has a label.
    eta : smallest cosine for a label, from −1 to 1.
    rule : "centroid" compares with the mean direction of each side; "nearest" with the most similar concept,
        whose label the latent takes. The second finds latents that resemble one concept and not its whole
        side.

    Returns
    -------
    tuple of Concept
        Labelled latents, and neutral ones whose nearest concept has a cosine of at least 0.3. ``source`` says
        how near both were.

    Raises
    ------
    ArtifactError
        If model, block or width differ, or no concept is labelled.
    DacoError
        If ``eta`` or ``rule`` is out of range.
    """
    _check(rule, eta)
    rows, atoms = _unit_rows(sae, dictionary)
    labels = np.array([concept.label for concept in dictionary.concepts])
    found = []
    for start in range(0, len(rows), _CHUNK):
        closeness = rows[start : start + _CHUNK] @ atoms.T
        names, cosines = _sides(rows[start : start + _CHUNK], atoms, labels, rule, closeness)
        best, reached = cosines.argmax(axis=0), cosines.max(axis=0)
        for i, near_all in enumerate(closeness):
            label = names[best[i]] if reached[i] >= eta else "neutral"
            candidates = np.flatnonzero(labels == label) if label != "neutral" else np.arange(len(labels))
            nearest = int(candidates[near_all[candidates].argmax()])
            near = float(near_all[nearest])
            if label == "neutral" and near < _NAME_FLOOR:
                continue
            concept = dictionary.concepts[nearest]
            source = f"{rule} cos {reached[i]:.2f}, eta {eta:g}; {concept.name} {near:.2f}"
            found.append(
                Concept(start + i, concept.name, label, concept.group, concept.synset, concept.gloss, source)
            )
    return tuple(found)


def centroid_cosines(sae: Sae, dictionary: ConceptDictionary) -> dict[str, np.ndarray]:
    """Return for each side that has concepts the latents' cosines with its centroid, fp64 [m].

    What η has to be chosen from: look at it before you set one.

    Example
    -------
    >>> np.quantile(centroid_cosines(sae, dictionary)["undesirable"], [0.5, 0.9, 0.99])
    array([0.02, 0.31, 0.44])
    """
    rows, atoms = _unit_rows(sae, dictionary)
    labels = np.array([concept.label for concept in dictionary.concepts])
    return {side: rows @ _centroid(atoms, labels == side) for side in _SIDES if (labels == side).any()}


def count_labels(
    sae: Sae, dictionary: ConceptDictionary, etas: Sequence[float], *, rule: Rule = "centroid"
) -> list[dict[str, float]]:
    """Return for each η how many latents would be labelled undesirable and desirable.

    Raises
    ------
    ArtifactError, DacoError
        As ``label_latents``.

    Example
    -------
    >>> count_labels(sae, dictionary, [0.2, 0.3])
    [{'eta': 0.2, 'undesirable': 120, 'desirable': 14}, {'eta': 0.3, 'undesirable': 81, 'desirable': 11}]
    """
    _check(rule, *etas)
    rows, atoms = _unit_rows(sae, dictionary)
    labels = np.array([concept.label for concept in dictionary.concepts])
    table: list[dict[str, float]] = [{"eta": float(eta), **dict.fromkeys(_SIDES, 0)} for eta in etas]
    for start in range(0, len(rows), _CHUNK):
        part = rows[start : start + _CHUNK]
        names, cosines = _sides(part, atoms, labels, rule, part @ atoms.T if rule == "nearest" else None)
        best, reached = np.array(names)[cosines.argmax(axis=0)], cosines.max(axis=0)
        for row in table:
            for side in _SIDES:
                row[side] += int(((best == side) & (reached >= row["eta"])).sum())
    return table


def _check(rule: str, *etas: float) -> None:
    for eta in etas:
        if not -1 <= eta <= 1:
            raise DacoError(f"eta is a cosine and must be from -1 to 1, got {eta}")
    if rule not in ("centroid", "nearest"):
        raise DacoError(f"rule must be 'centroid' or 'nearest', got {rule!r}")


def _sides(
    rows: np.ndarray, atoms: np.ndarray, labels: np.ndarray, rule: Rule, closeness: np.ndarray | None
) -> tuple[list[str], np.ndarray]:
    """Return the sides that have concepts, and each row's cosine with them, [sides, n].

    ``closeness`` is the rows' cosine with every atom, which the rule "nearest" needs.
    """
    # With "nearest" a neutral concept that is nearer keeps a label away.
    wanted = _SIDES if rule == "centroid" else (*_SIDES, "neutral")
    names = [side for side in wanted if (labels == side).any()]
    if closeness is None or rule == "centroid":
        return names, np.stack([rows @ _centroid(atoms, labels == side) for side in names])
    return names, np.stack([closeness[:, labels == side].max(axis=1) for side in names])


def _unit_rows(sae: Sae, dictionary: ConceptDictionary) -> tuple[np.ndarray, np.ndarray]:
    """Return decoder rows and atoms, both of unit norm, fp64."""
    difference = None if sae.model is None else dictionary.model.difference(sae.model)
    if difference:
        raise ArtifactError(f"dictionary {dictionary.path} does not fit SAE {sae.path}: {difference}")
    if dictionary.dim != sae.decoder.shape[1]:
        raise ArtifactError(
            f"dictionary {dictionary.path} has width {dictionary.dim}, SAE {sae.path} {sae.decoder.shape[1]}"
        )
    if not any(concept.label in _SIDES for concept in dictionary.concepts):
        raise ArtifactError(f"dictionary {dictionary.path} has no labelled concept; label some first")
    return _normed(sae.decoder), _normed(dictionary.atoms(sae.block))


def _normed(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _centroid(atoms: np.ndarray, members: np.ndarray) -> np.ndarray:
    mean = atoms[members].mean(axis=0)
    return mean / max(float(np.linalg.norm(mean)), 1e-12)
