"""What a policy edits, in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from daco_rt.artifacts import LABELS, POSITIONS, Concept, Policy
from daco_rt.errors import PolicyError, did_you_mean

FIRST_SLOT = 2


@dataclass(frozen=True)
class PolicySpec:
    """One policy, as a person would describe it. Fields left at ``None`` take the compiler's default.

    Parameters
    ----------
    name : how requests ask for it; "off" and "observe" are built in and cannot be redefined.
    positions : "all" (every token but the first of the prompt), "generated" (the last prompt token and every
        decoded one), "prompt", "image" or "text".
    blocks : decoder blocks that it edits; all of the pack's by default.
    labels, groups, concepts : what it edits: concepts with one of these labels, in one of these groups, or of
        one of these names. Without any of the three: everything labelled "undesirable".
    latents : what it edits besides, by index: for all blocks, or block → indices. Where only latents are
        given, no label selects anything.
    gain : factor on the code of an edited concept. 0 removes it, −1 removes it twice over, 1 only
        reports it.
    boost : added to the active codes of desirable concepts, as a fraction of the block's median norm.
    gamma : length of a constant shift towards the desirable concepts' sum, as a fraction of the block's
        median norm.
    deadband : codes no stronger than this fraction of the block's median norm are left alone.
    max_dose : longest edit, as a fraction of the row's own norm; 0 sets no bound.
    keep_norm : give the edited row the norm it had.
    condition : threshold of a gate: the prompt is observed first, and the policy acts only if the mean
        removed dose of its rows, largest over the policy's blocks, exceeds this. 0 is no gate.
    description : one line for people.

    Example
    -------
    >>> PolicySpec("no-weapons", groups=("weapon",), positions="generated", gain=0.0)
    """

    name: str
    positions: str = "all"
    blocks: tuple[int, ...] | None = None
    labels: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    concepts: tuple[str, ...] = ()
    latents: tuple[int, ...] | Mapping[int, tuple[int, ...]] = ()
    gain: float | None = None
    boost: float | None = None
    gamma: float | None = None
    deadband: float | None = None
    max_dose: float | None = None
    keep_norm: bool | None = None
    condition: float = 0.0
    description: str = ""

    def with_defaults(self, **defaults: Any) -> PolicySpec:
        """Return this policy with its ``None`` fields filled in and everything checked.

        Raises
        ------
        PolicyError
            A number is out of range, or positions or a label are unknown.
        """
        missing = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        filled = replace(self, **missing)
        filled._check()
        return filled

    def selects(self, concept: Concept) -> bool:
        """Whether this policy edits that concept."""
        chosen = self.labels or self.groups or self.concepts or self.latents
        labels = self.labels if chosen else ("undesirable",)
        return concept.label in labels or concept.group in self.groups or concept.name in self.concepts

    def latents_at(self, block: int) -> tuple[int, ...]:
        """Indices that this policy edits at a block whatever they are called."""
        return self.latents.get(block, ()) if isinstance(self.latents, Mapping) else self.latents

    def _check(self) -> None:
        what = f"policy '{self.name}'"
        if self.positions not in POSITIONS:
            raise PolicyError(
                f"{what}: positions {self.positions!r} are unknown"
                f"{did_you_mean(str(self.positions), POSITIONS)}"
            )
        if self.condition and self.positions in ("prompt", "image"):
            raise PolicyError(
                f"{what}: a condition observes the prompt and steers what comes after it, so positions "
                f"'{self.positions}' would edit nothing; choose generated, text or all"
            )
        for label in self.labels:
            if label not in LABELS:
                raise PolicyError(f"{what}: label {label!r} is unknown{did_you_mean(str(label), LABELS)}")
        for name in ("gain", "boost", "gamma", "deadband", "max_dose", "condition"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise PolicyError(f"{what}: {name} must be a finite number, got {value!r}")
        for name in ("deadband", "max_dose", "condition"):
            if getattr(self, name) < 0:
                raise PolicyError(f"{what}: {name} must be 0 or more, got {getattr(self, name)}")


def check_specs(
    specs: Sequence[PolicySpec], concepts: Mapping[int, Sequence[Concept]], defaults: Mapping[str, Any]
) -> tuple[PolicySpec, ...]:
    """Fill in and check all policies against the concepts of each block.

    Raises
    ------
    PolicyError
        A name comes twice, a group or concept does not exist (near matches are named), or a policy would
        edit nothing and shift nothing.
    """
    if not specs:
        raise PolicyError("policies are empty; give one PolicySpec at least")
    filled = tuple(spec.with_defaults(**defaults) for spec in specs)
    names = [spec.name for spec in filled]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise PolicyError(f"policy '{twice}' comes twice; rename one")
    for spec in filled:
        blocks = sorted(concepts) if spec.blocks is None else spec.blocks
        unknown = [block for block in blocks if block not in concepts]
        if unknown or not blocks:
            there = ", ".join(map(str, sorted(concepts)))
            got = f"block {unknown[0]}" if unknown else "no block"
            raise PolicyError(f"policy '{spec.name}' names {got}; choose from {there}")
        table = [concept for block in blocks for concept in concepts[block]]
        groups = {concept.group for concept in table} - {""}
        known = {concept.name for concept in table}
        for group in spec.groups:
            if group not in groups:
                raise PolicyError(f"policy '{spec.name}': no group '{group}'{did_you_mean(group, groups)}")
        for name in spec.concepts:
            if name not in known:
                raise PolicyError(f"policy '{spec.name}': no concept '{name}'{did_you_mean(name, known)}")
        if isinstance(spec.latents, Mapping):
            alien = next((block for block in spec.latents if block not in blocks), None)
            if alien is not None:
                raise PolicyError(
                    f"policy '{spec.name}' has latents of block {alien}, its blocks are "
                    f"{', '.join(map(str, blocks))}"
                )
        by_index = any(spec.latents_at(block) for block in blocks)
        if not spec.gamma and not spec.boost and not by_index and not any(map(spec.selects, table)):
            raise PolicyError(
                f"policy '{spec.name}' selects none of the {len(table)} concepts; name labels, groups or "
                "concepts that exist"
            )
    return filled


def to_policies(specs: Sequence[PolicySpec], blocks: Sequence[int]) -> tuple[Policy, ...]:
    """Give each policy its slot."""
    return tuple(
        Policy(
            spec.name,
            FIRST_SLOT + i,
            spec.positions,
            tuple(blocks) if spec.blocks is None else tuple(sorted(set(spec.blocks))),
            spec.description,
            spec.condition,
        )
        for i, spec in enumerate(specs)
    )


def describe_spec(spec: PolicySpec) -> dict[str, Any]:
    """A policy as plain JSON, for the pack's recipe."""
    values = {field.name: getattr(spec, field.name) for field in fields(spec)}
    if isinstance(spec.latents, Mapping):
        values["latents"] = {str(block): list(items) for block, items in spec.latents.items()}
    # What is not used stays out, so that packs without it keep their bytes.
    for name in ("latents", "condition"):
        if not values[name]:
            del values[name]
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
