"""Controls with random atoms: is a fall of a rate more than damage?

A control takes a method that removes undesirable atoms and lets it remove as many random neutral ones. On
observed development questions it is made alike in how often it acts ("firing"), in how much it takes
("dose"), or in both; everything else, γ included, is that of the method.

A row *fires* if one of the atoms is above the deadband. Its *dose* is the length of what is taken out over
the block's median norm, the unit of deadbands. Both are averages over rows and blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from daco_rt.artifacts import ConceptDictionary, Pack
from daco_rt.errors import DacoError
from daco_rt.evaluate.coded import compile_coded, labels_of, saes_of, specs_of
from daco_rt.evaluate.methods import Codes, Method, Observe, drawn, indices
from daco_rt.steering import PolicySpec

_REPORTED = 32
"""Codes a row that are watched where the coder has no k, the strongest first."""
_ROWS = 512


@dataclass(frozen=True)
class Watched:
    """What some atoms did on observed rows, all blocks together.

    Attributes
    ----------
    strength : float64 [rows, k]
        |c|·‖A‖ over the block's median norm; 0 for other atoms.
    cross : float64 [rows, k, k]
        Inner products of the atoms' contributions c·A, over the median norm squared.

    Example
    -------
    >>> two = Watched(np.array([[0.5], [0.2]]), np.array([[[0.25]], [[0.04]]]))
    >>> two.firing(0.3), two.dose(0.3, gain=-1.0)
    (0.5, 0.5)
    """

    strength: NDArray[np.float64]
    cross: NDArray[np.float64]

    def firing(self, deadband: float) -> float:
        """Return the share of rows on which an atom is above the deadband."""
        return float((self.strength > deadband).any(axis=1).mean()) if len(self.strength) else 0.0

    def dose(self, deadband: float, *, gain: float) -> float:
        """Return the mean length of the edit that multiplies codes above the deadband by ``gain``."""
        if not len(self.strength):
            return 0.0
        on = (self.strength > deadband).astype(np.float64)
        squares = np.einsum("ri,rij,rj->r", on, self.cross, on)
        return abs(1 - gain) * float(np.sqrt(np.maximum(squares, 0)).mean())

    def deadband_of_firing(self, share: float) -> float:
        """Return the deadband at which a share of the rows fires; 0 where fewer fire even there."""
        peaks = np.sort(self.strength.max(axis=1, initial=0.0))[::-1]
        wanted = round(share * len(peaks))
        return float(peaks[wanted]) if wanted < len(peaks) else 0.0

    def deadband_of_dose(self, dose: float, *, gain: float) -> float:
        """Return the widest deadband at which the mean dose is at least ``dose``; 0 where there is none."""
        low, high = 0.0, float(self.strength.max(initial=0.0))
        if self.dose(low, gain=gain) < dose:
            return 0.0
        for _ in range(50):
            middle = (low + high) / 2
            if self.dose(middle, gain=gain) >= dose:
                low = middle
            else:
                high = middle
        return low


def watch(
    codes: Codes,
    atoms_by_block: Mapping[int, ArrayLike],
    norms: Mapping[int, float],
    chosen: Mapping[int, Sequence[int]],
) -> Watched:
    """Return what the chosen atoms did.

    Parameters
    ----------
    codes : block → support indices and values, each [rows, k].
    atoms_by_block : block → what the codes multiply, [m, d].
    norms : block → median residual norm.
    chosen : block → indices of atoms.

    Example
    -------
    >>> codes = {3: (np.array([[0, 1]], np.int32), np.array([[3.0, 4.0]], np.float32))}
    >>> watch(codes, {3: np.eye(2)}, {3: 1.0}, {3: [0, 1]}).dose(0.0, gain=0.0)
    5.0
    """
    strengths, crosses = [], []
    widest = max((index.shape[-1] for index, _ in codes.values()), default=0)
    for block, (index, value) in codes.items():
        atoms = np.asarray(atoms_by_block[block], np.float32)
        index, value = index.reshape(-1, index.shape[-1]), value.reshape(-1, value.shape[-1])
        # Unused places of a row hold -1, which is no atom.
        there = np.isin(index, np.asarray(chosen[block])) & (index >= 0)
        code = np.where(there, value, 0).astype(np.float64) / norms[block]
        for start in range(0, len(index), _ROWS):
            part = slice(start, start + _ROWS)
            rows = atoms[np.where(there[part], index[part], 0)] * code[part, :, None]
            cross = np.einsum("rid,rjd->rij", rows, rows)
            room = widest - cross.shape[-1]
            crosses.append(np.pad(cross, ((0, 0), (0, room), (0, room))))
            strengths.append(np.pad(np.sqrt(np.einsum("rii->ri", cross)), ((0, 0), (0, room))))
    if not crosses:
        return Watched(np.zeros((0, 0)), np.zeros((0, 0, 0)))
    return Watched(np.concatenate(strengths), np.concatenate(crosses))


def compile_control(
    method: Method, dictionary: ConceptDictionary, pack: Path, observe: Observe | None
) -> dict[str, Any]:
    """Compile a random control and return its notes: for each variant what was matched, and how well.

    Raises
    ------
    DacoError
        There is no model to observe, no neutral atom, or the drawn atoms are never active.
    """
    if observe is None:
        raise DacoError(f"method '{method.name}': matching random atoms needs a model to observe")
    of = method.controls
    if of is None:
        kept = {key: value for key, value in method.options.items() if key not in ("match", "seed", "seeds")}
        of = Method(method.name, "omp", method.strengths, kept)
    specs = specs_of(of)
    labels = labels_of(of, dictionary)
    bad = {block: _labelled(concepts, "undesirable") for block, concepts in labels.items()}
    neutral = {block: _labelled(concepts, "neutral") for block, concepts in labels.items()}
    if not any(neutral.values()):
        indices(dictionary, "neutral", method)
        raise DacoError(f"method '{method.name}': no latent of '{of.name}' is neutral; none can be drawn")
    codes, seen = _observed(of, dictionary, pack, observe)
    atoms = {
        block: np.asarray(seen.operands(block)["dec" if seen.op == "sae" else "atoms"]) for block in codes
    }
    norms = seen.median_norm
    wanted = watch(codes, atoms, norms, bad)
    match = str(method.options.get("match", "firing"))
    policies: list[PolicySpec] = []
    notes: dict[str, Any] = {"match": match, "of": of.name}
    for draw in method.draws:
        seed = int(method.options.get("seed", method.options.get("seeds", [0])[0])) if draw is None else draw
        taken_out = _draw(bad, neutral, seed, shared=of.kind != "sae")
        random = watch(codes, atoms, norms, taken_out)
        for label, spec in zip(method.labels, specs, strict=True):
            assert spec.deadband is not None and spec.gain is not None
            deadband, gain = _matched(method, match, wanted, random, spec.deadband, spec.gain)
            name = drawn(label, draw)
            policies.append(
                replace(
                    spec,
                    name=name,
                    latents={block: tuple(rows) for block, rows in taken_out.items()},
                    deadband=deadband,
                    gain=gain,
                    description=f"{of.name} with random neutral atoms, seed {seed}",
                )
            )
            notes[name] = {
                "firing share of undesirable atoms": wanted.firing(spec.deadband),
                "firing share of random atoms": random.firing(deadband),
                "dose of undesirable atoms": wanted.dose(spec.deadband, gain=spec.gain),
                "dose of random atoms": random.dose(deadband, gain=gain),
                "matched deadband": deadband,
                "matched gain": gain,
                "atoms": max(map(len, taken_out.values())),
            }
    compile_coded(of, dictionary, pack, policies)
    return notes


def _matched(
    method: Method, match: str, wanted: Watched, random: Watched, deadband: float, gain: float
) -> tuple[float, float]:
    """Deadband and gain of the random atoms."""
    if match == "firing":
        return random.deadband_of_firing(wanted.firing(deadband)), gain
    dose = wanted.dose(deadband, gain=gain)
    if match == "both":
        found = random.deadband_of_firing(wanted.firing(deadband))
    else:
        found = random.deadband_of_dose(dose, gain=gain)
    there = random.dose(found, gain=gain)
    if dose > 0 and there == 0:
        raise DacoError(
            f"method '{method.name}': the drawn atoms are never active on the observed questions, so no dose "
            "can be matched; take match: firing, other seeds, or more questions"
        )
    # What a deadband alone cannot give, for it moves in steps, the gain gives.
    return found, 1 - (1 - gain) * dose / there if there else gain


def _observed(of: Method, dictionary: ConceptDictionary, pack: Path, observe: Observe) -> tuple[Codes, Pack]:
    """All codes of the observed questions, and the pack that found them."""
    # Some coders compute only latents that a policy edits, so both kinds have to be edited by one.
    everything = PolicySpec("watched", labels=("undesirable", "neutral"), gain=0.0)
    k = _REPORTED
    if of.kind == "omp":
        k = int(of.options.get("k", 16))
    elif of.kind == "sae":
        k = next(iter(saes_of(of, dictionary)[0].values())).k or _REPORTED
    seen = compile_coded(of, dictionary, pack.with_name(f"{pack.name}-observed"), [everything], k_out=k)
    return observe(seen.path), seen


def _labelled(concepts: Sequence[Any], label: str) -> list[int]:
    return [concept.index for concept in concepts if concept.label == label]


def _draw(
    bad: Mapping[int, Sequence[int]], neutral: Mapping[int, Sequence[int]], seed: int, *, shared: bool
) -> dict[int, list[int]]:
    """As many neutral atoms as there are undesirable ones; ``shared``: the same in all blocks."""
    rng = np.random.default_rng(seed)
    found: dict[int, list[int]] = {}
    for block in bad:
        if shared and found:
            found[block] = next(iter(found.values()))
            continue
        size = min(len(bad[block]), len(neutral[block]))
        found[block] = sorted(rng.choice(neutral[block], size=size, replace=False).tolist())
    return found
