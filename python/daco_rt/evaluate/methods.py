"""The methods that are compared: each a pack (or a system prompt) with one number to turn.

A method's strengths become policies of one pack, so that a whole front runs in one bundle. Two methods are
compared at equal cost to harmless answers, never at equal strength: the numbers mean different things.

===============  =========================================================  =======================
kind             what it does                                               strength
===============  =========================================================  =======================
none             nothing                                                    –
system_prompt    asks the model to be safe                                  –
actadd           adds (mean desirable − mean undesirable) direction         length / median norm
projection       removes the span of the leading undesirable directions     share removed
omp              matching pursuit over the dictionary, undesirable removed  deadband / median norm
elastic_net      the same with an elastic net                               deadband / median norm
conditional      omp that acts only on prompts with enough undesirable dose threshold of the dose
sae              undesirable latents scaled by ``gain``, plus γ             deadband / median norm
random           omp that removes random neutral atoms, fired as often      deadband that is matched
bundle, pack     what is there already, under named policies                –
===============  =========================================================  =======================

``sweep: gain`` or ``sweep: gamma`` turns that number instead, for omp, elastic_net and sae.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from daco_rt.artifacts import ConceptDictionary, load_sae
from daco_rt.errors import DacoError, PolicyError, did_you_mean
from daco_rt.steering import (
    PolicySpec,
    compile_actadd_pack,
    compile_affine_pack,
    compile_pursuit_pack,
    compile_sae_pack,
)

SAFE_PROMPT = (
    "You are a careful assistant. If a question, or a picture that comes with it, asks for something "
    "harmful, illegal or unethical, say that you cannot help with it and give no details. Answer every other "
    "question as well as you can."
)
"""The system prompt of method "system_prompt" unless another is given."""

OPTIONS: dict[str, tuple[str, ...]] = {
    "none": (),
    "system_prompt": ("text",),
    "actadd": ("blocks", "positions", "max_dose", "keep_norm"),
    "projection": ("blocks", "positions", "rank", "positive_only"),
    "omp": ("blocks", "positions", "k", "gain", "gamma", "deadband", "sweep", "sign"),
    "elastic_net": ("blocks", "positions", "tau", "alpha", "gain", "gamma", "deadband", "sweep"),
    "conditional": ("blocks", "positions", "k", "gain", "deadband", "sign"),
    "sae": ("blocks", "positions", "saes", "eta", "gain", "gamma", "deadband", "sweep"),
    "random": ("blocks", "positions", "k", "gain", "seed", "sign"),
    "bundle": ("path", "policies"),
    "pack": ("path", "policies"),
}
"""Kind → the options that it takes."""
_UNSWEPT = ("none", "system_prompt", "bundle", "pack")
_SWEEPS = ("deadband", "gain", "gamma")

Codes = Mapping[int, tuple[NDArray[np.int32], NDArray[np.float32]]]
"""Block → support indices and values, each [rows, k], as observed."""
Observe = Callable[[Path], Codes]
"""Runs prompts under "observe" with a pack and returns all codes."""


@dataclass(frozen=True)
class Method:
    """A method as a configuration names it.

    Raises
    ------
    DacoError
        The kind or an option is unknown, or strengths are missing or not wanted.

    Example
    -------
    >>> Method("pursuit", "omp", (0.3, 0.5)).labels
    {'pursuit@0.3': 0.3, 'pursuit@0.5': 0.5}
    """

    name: str
    kind: str
    strengths: tuple[float, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in OPTIONS:
            raise DacoError(
                f"method '{self.name}': kind '{self.kind}' is unknown{did_you_mean(self.kind, OPTIONS)}"
            )
        for option in self.options:
            if option not in OPTIONS[self.kind]:
                known = OPTIONS[self.kind]
                raise DacoError(
                    f"method '{self.name}': {self.kind} takes no option '{option}'"
                    f"{did_you_mean(option, known)}"
                )
        if bool(self.strengths) == (self.kind in _UNSWEPT):
            raise DacoError(
                f"method '{self.name}': kind {self.kind} takes no strengths"
                if self.strengths
                else f"method '{self.name}': kind {self.kind} needs strengths, a list of one number or more"
            )
        if len(set(self.strengths)) != len(self.strengths):
            raise DacoError(f"method '{self.name}': a strength comes twice in {list(self.strengths)}")
        sweep = self.options.get("sweep", "deadband")
        if sweep not in _SWEEPS:
            raise DacoError(
                f"method '{self.name}': sweep {sweep!r} is unknown{did_you_mean(str(sweep), _SWEEPS)}"
            )

    @property
    def labels(self) -> dict[str, float | None]:
        """Variant → strength, as tables and files name them."""
        if not self.strengths:
            return {self.name: None}
        return {f"{self.name}@{value:g}": value for value in self.strengths}


@dataclass(frozen=True)
class Built:
    """A method made ready.

    Attributes
    ----------
    policies : dict of str to str
        Variant → policy that it runs under.
    pack, bundle : Path or None
        What holds those policies; neither for methods that leave the model alone.
    system : str or None
        A system prompt that goes before every question.
    notes : dict
        What was measured or drawn while it was built: calibrated deadbands, firing shares, atoms.
    """

    method: Method
    policies: dict[str, str]
    pack: Path | None = None
    bundle: Path | None = None
    system: str | None = None
    notes: dict[str, Any] = field(default_factory=dict)


def build_method(
    method: Method, dictionary: ConceptDictionary | None, folder: Path, *, observe: Observe | None = None
) -> Built:
    """Compile a method.

    Parameters
    ----------
    method : what to build.
    dictionary : directions, labels and norms; not needed by kinds that bring their own.
    folder : where the pack goes, as ``{folder}/{name}``; replaced if it is there.
    observe : needed by "random", whose deadband is matched to how often undesirable atoms fire.

    Raises
    ------
    DacoError
        A source is missing, has no undesirable concept, or does not fit.

    Example
    -------
    >>> build_method(Method("add", "actadd", (0.1,)), dictionary, Path("packs")).policies  # doctest: +SKIP
    {'add@0.1': 'add@0.1'}
    """
    kind, options = method.kind, method.options
    if kind == "none":
        return Built(method, {method.name: "off"})
    if kind == "system_prompt":
        return Built(method, {method.name: "off"}, system=str(options.get("text", SAFE_PROMPT)))
    if kind in ("bundle", "pack"):
        return _there(method)
    if dictionary is None:
        raise DacoError(
            f"method '{method.name}': kind {kind} is made from a dictionary; name one in the configuration"
        )
    _indices(dictionary, "undesirable", method)
    pack = folder / method.name
    policies = {label: label for label in method.labels}
    notes: dict[str, Any] = {}
    if kind == "actadd":
        _actadd(method, dictionary, pack)
    elif kind == "projection":
        _projection(method, dictionary, pack)
    elif kind == "sae":
        _sae(method, dictionary, pack)
    elif kind == "random":
        notes = _random(method, dictionary, pack, folder, observe)
    else:
        _pursuit(method, dictionary, pack)
    return Built(method, policies, pack=pack, notes=notes)


def matched_deadband(codes: Codes, norms: Mapping[int, float], atoms: Sequence[int], share: float) -> float:
    """Return the deadband at which these atoms fire on a share of all rows, pooled over blocks.

    A row fires if one of the atoms has a code above deadband · median norm; atoms have unit length. Where the
    atoms fire on fewer rows even at 0, 0 is returned: compare `firing_share` with what was asked.

    Example
    -------
    >>> codes = {3: (np.array([[0, 1], [1, 2]], np.int32), np.array([[2.0, 1.0], [4.0, 3.0]], np.float32))}
    >>> round(matched_deadband(codes, {3: 1.0}, [1], 0.5), 3)
    1.0
    """
    peaks = np.sort(_peaks(codes, norms, atoms))[::-1]
    wanted = round(share * len(peaks))
    return float(peaks[wanted]) if wanted < len(peaks) else 0.0


def firing_share(codes: Codes, norms: Mapping[int, float], atoms: Sequence[int], deadband: float) -> float:
    """Return the share of rows, pooled over blocks, on which one of the atoms is above the deadband."""
    peaks = _peaks(codes, norms, atoms)
    return float((peaks > deadband).mean()) if len(peaks) else 0.0


def _peaks(codes: Codes, norms: Mapping[int, float], atoms: Sequence[int]) -> NDArray[np.float64]:
    """Each row's strongest code among the atoms, over the block's median norm; 0 where none is active."""
    found = []
    for block, (index, value) in codes.items():
        chosen = np.isin(index, np.asarray(atoms))
        strength = np.where(chosen, np.abs(value), 0).max(axis=-1, initial=0.0)
        found.append(strength.astype(np.float64).ravel() / norms[block])
    return np.concatenate(found) if found else np.zeros(0)


def _there(method: Method) -> Built:
    named = method.options.get("policies", ["default"])
    names = [named] if isinstance(named, str) else list(named)
    if "path" not in method.options or not names:
        raise DacoError(f"method '{method.name}': kind {method.kind} needs the path of one, and policies")
    path = Path(method.options["path"])
    labels = {method.name if len(names) == 1 else f"{method.name}@{name}": str(name) for name in names}
    return Built(method, labels, **{method.kind: path})  # type: ignore[arg-type]


def _blocks(method: Method, dictionary: ConceptDictionary) -> tuple[int, ...]:
    from daco_rt.steering.policy_file import parse_blocks

    if "blocks" not in method.options:
        return dictionary.blocks
    blocks = parse_blocks(method.options["blocks"], f"method '{method.name}'")
    missing = [block for block in blocks if block not in dictionary.blocks]
    if missing:
        there = ", ".join(map(str, dictionary.blocks))
        raise PolicyError(f"method '{method.name}': the dictionary has no block {missing[0]}, only {there}")
    return blocks


def _indices(dictionary: ConceptDictionary, label: str, method: Method) -> list[int]:
    found = [concept.index for concept in dictionary.concepts if concept.label == label]
    if not found:
        raise DacoError(f"method '{method.name}': dictionary {dictionary.path} labels nothing {label}")
    return found


def _unit(dictionary: ConceptDictionary, block: int, rows: Sequence[int]) -> NDArray[np.float64]:
    atoms = np.asarray(dictionary.atoms(block)[list(rows)], np.float64)
    return atoms / np.linalg.norm(atoms, axis=1, keepdims=True)


def _actadd(method: Method, dictionary: ConceptDictionary, pack: Path) -> None:
    bad = _indices(dictionary, "undesirable", method)
    good = _indices(dictionary, "desirable", method)
    blocks = _blocks(method, dictionary)
    directions = {
        block: (_unit(dictionary, block, good).mean(0) - _unit(dictionary, block, bad).mean(0)).astype(
            np.float32
        )
        for block in blocks
    }
    compile_actadd_pack(
        directions,
        pack,
        model=dictionary.model,
        median_norm=dictionary.median_norm,
        strengths=_strengths(method),
        overwrite=True,
        **_taken(method, "positions", "max_dose", "keep_norm"),
    )


def _projection(method: Method, dictionary: ConceptDictionary, pack: Path) -> None:
    bad = _indices(dictionary, "undesirable", method)
    rank = min(int(method.options.get("rank", 16)), len(bad), dictionary.dim)
    if rank < 1:
        raise DacoError(f"method '{method.name}': rank must be 1 or more, got {method.options['rank']}")
    directions = {}
    for block in _blocks(method, dictionary):
        _, _, basis = np.linalg.svd(_unit(dictionary, block, bad), full_matrices=False)
        directions[block] = basis[:rank]
    compile_affine_pack(
        directions,
        pack,
        model=dictionary.model,
        median_norm=dictionary.median_norm,
        means={block: dictionary.mean(block) for block in directions},
        strengths=_strengths(method),
        overwrite=True,
        **_taken(method, "positions", "positive_only"),
    )


def _pursuit(method: Method, dictionary: ConceptDictionary, pack: Path) -> None:
    coder: dict[str, Any] = {"coder": "elastic_net"} if method.kind == "elastic_net" else {}
    compile_pursuit_pack(
        dictionary,
        pack,
        policies=_specs(method),
        blocks=_blocks(method, dictionary),
        overwrite=True,
        **coder,
        **_taken(method, "k", "sign", "tau", "alpha"),
    )


def _sae(method: Method, dictionary: ConceptDictionary, pack: Path) -> None:
    from daco_rt.sae.annotate import label_latents

    folders = method.options.get("saes")
    if not isinstance(folders, Mapping) or not folders:
        raise DacoError(f"method '{method.name}': saes must map block numbers to folders")
    saes = {int(block): load_sae(folder) for block, folder in folders.items()}
    concepts = None
    if "eta" in method.options:
        eta = float(method.options["eta"])
        concepts = {block: label_latents(sae, dictionary, eta=eta) for block, sae in saes.items()}
    compile_sae_pack(
        saes,
        pack,
        median_norm=dictionary.median_norm,
        policies=_specs(method),
        concepts=concepts,
        model=dictionary.model if all(sae.model is None for sae in saes.values()) else None,
        overwrite=True,
    )


def _random(
    method: Method, dictionary: ConceptDictionary, pack: Path, folder: Path, observe: Observe | None
) -> dict[str, Any]:
    if observe is None:
        raise DacoError(f"method '{method.name}': matching how often atoms fire needs a model to observe")
    bad = _indices(dictionary, "undesirable", method)
    neutral = _indices(dictionary, "neutral", method)
    draw = np.random.default_rng(int(method.options.get("seed", 0)))
    drawn = sorted(draw.choice(neutral, size=min(len(bad), len(neutral)), replace=False).tolist())
    blocks = _blocks(method, dictionary)
    k = int(method.options.get("k", 16))
    watched = folder / f"{method.name}-observed"
    compile_pursuit_pack(
        dictionary, watched, k=k, k_out=k, blocks=blocks, overwrite=True, **_taken(method, "sign")
    )
    codes = observe(watched)
    specs, notes = [], {}
    for label, strength in method.labels.items():
        assert strength is not None
        share = firing_share(codes, dictionary.median_norm, bad, strength)
        deadband = matched_deadband(codes, dictionary.median_norm, drawn, share)
        specs.append(
            PolicySpec(
                label,
                latents=tuple(drawn),
                deadband=deadband,
                description=f"removes {len(drawn)} random neutral atoms",
                **_taken(method, "gain", "positions"),
            )
        )
        notes[label] = {
            "firing share of undesirable atoms": share,
            "firing share of random atoms": firing_share(codes, dictionary.median_norm, drawn, deadband),
            "matched deadband": deadband,
        }
    compile_pursuit_pack(
        dictionary, pack, policies=specs, k=k, blocks=blocks, overwrite=True, **_taken(method, "sign")
    )
    return {"atoms": len(drawn), **notes}


def _specs(method: Method) -> list[PolicySpec]:
    """One policy a strength; the swept number overrides the option of that name."""
    swept = "condition" if method.kind == "conditional" else str(method.options.get("sweep", "deadband"))
    # A gate observes the prompt, so its policy acts on what comes after.
    fixed: dict[str, Any] = {"positions": "generated"} if method.kind == "conditional" else {}
    fixed |= _taken(method, "gain", "gamma", "deadband", "positions")
    return [PolicySpec(label, **(fixed | {swept: strength})) for label, strength in method.labels.items()]


def _strengths(method: Method) -> dict[str, float]:
    return {label: strength for label, strength in method.labels.items() if strength is not None}


def _taken(method: Method, *names: str) -> dict[str, Any]:
    return {name: method.options[name] for name in names if name in method.options}
