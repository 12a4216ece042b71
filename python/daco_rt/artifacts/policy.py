"""Policies by name, and the table that tells each block which slot it sees."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from daco_rt.errors import ArtifactError, PolicyError

POSITIONS = ("generated", "prompt", "image", "text", "all")
BUILT_IN = ("off", "observe")  # slots 0 and 1


@dataclass(frozen=True)
class Policy:
    """A named slot.

    ``slot`` ≥ 2 is the row of gain, boost, undesirable, shift and limits; ``positions`` says which tokens are
    steered: "generated" (the last prompt token and every decoded one), "prompt", "image", "text", or "all"
    (all but position 0); ``blocks`` are the decoder blocks it edits. With ``condition`` > 0 the prompt
    is observed first, and the policy acts only on requests whose mean removed dose, largest over the blocks,
    exceeds it.
    """

    name: str
    slot: int
    positions: str
    blocks: tuple[int, ...]
    description: str = ""
    condition: float = 0.0

    def row(self) -> dict[str, Any]:
        """The policy as the manifest keeps it; the condition only where there is one."""
        row = asdict(self)
        if not self.condition:
            del row["condition"]
        return row


def check_policies(
    policies: Iterable[Policy], default: str, blocks: Sequence[int], slots: int, where: str
) -> tuple[Policy, ...]:
    """Return the policies as a tuple after checking them against the pack's blocks and slots.

    Raises
    ------
    PolicyError
        If a name or slot comes twice or is reserved, positions are unknown, a block is not in the pack, or
        the default policy does not exist.
    """
    table = tuple(policies)
    names: set[str] = set()
    taken: set[int] = set()
    for policy in table:
        what = f"{where}: policy '{policy.name}'"
        if not isinstance(policy.name, str) or not policy.name or policy.name in BUILT_IN:
            raise PolicyError(
                f"{what} must have a name other than {', '.join(BUILT_IN)} (those are built in)"
            )
        if policy.name in names:
            raise PolicyError(f"{what} comes twice; rename one")
        if type(policy.slot) is not int or not 2 <= policy.slot < slots:
            raise PolicyError(f"{what} must have a slot from 2 to {slots - 1}, got {policy.slot!r}")
        if policy.slot in taken:
            raise PolicyError(f"{what} has slot {policy.slot}, which another policy has; give each its own")
        if policy.positions not in POSITIONS:
            raise PolicyError(
                f"{what}: positions must be one of {', '.join(POSITIONS)}, got {policy.positions!r}"
            )
        condition = policy.condition
        if (
            isinstance(condition, bool)
            or not isinstance(condition, (int, float))
            or not 0 <= condition < math.inf
        ):
            raise PolicyError(f"{what}: condition must be a number from 0, got {condition!r}")
        if list(policy.blocks) != sorted(set(policy.blocks)) or not policy.blocks:
            raise PolicyError(f"{what}: blocks must be unique and ascending, got {list(policy.blocks)}")
        outside = sorted(set(policy.blocks) - set(blocks))
        if outside:
            raise PolicyError(f"{what} names block {outside[0]}, the pack has {', '.join(map(str, blocks))}")
        names.add(policy.name)
        taken.add(policy.slot)
    if default not in names and default not in BUILT_IN:
        known = ", ".join((*BUILT_IN, *sorted(names)))
        raise PolicyError(f"{where}: default policy {default!r} does not exist; choose one of {known}")
    return table


def make_slot_map(policies: Iterable[Policy], blocks: Sequence[int], slots: int) -> np.ndarray:
    """Return int32 [blocks, slots]: observe everywhere, each policy in its own blocks, 0 elsewhere."""
    table = np.zeros((len(blocks), slots), np.int32)
    table[:, 1] = 1
    for policy in policies:
        for block in policy.blocks:
            table[list(blocks).index(block), policy.slot] = policy.slot
    return table


def check_slot_map(
    table: np.ndarray, policies: Iterable[Policy], blocks: Sequence[int], slots: int, where: str
) -> None:
    """Check a slot map: no row may be silently unsteered under a policy, or edited under "off".

    Raises
    ------
    ArtifactError
        If dtype, shape or a value is wrong, or an entry contradicts the policies' blocks.
    """
    shape = (len(blocks), slots)
    if table.dtype != np.int32 or table.shape != shape:
        raise ArtifactError(
            f"{where}: slot_map must be int32 {list(shape)}, got {table.dtype} {list(table.shape)}"
        )
    if ((table < 0) | (table >= slots)).any():
        raise ArtifactError(
            f"{where}: slot_map must hold slots from 0 to {slots - 1}, got {table.min()} to {table.max()}"
        )
    if table[:, 0].any() or (table[:, 1] > 1).any():
        raise ArtifactError(f"{where}: slot_map must send slot 0 to 0 and slot 1 to 0 or 1 in every block")
    for policy in policies:
        for row, block in enumerate(blocks):
            slot = int(table[row, policy.slot])
            if (slot >= 2) != (block in policy.blocks):
                does = "edits" if slot >= 2 else "does not edit"
                raise ArtifactError(
                    f"{where}: slot_map {does} block {block} under policy '{policy.name}', whose blocks are "
                    f"{', '.join(map(str, policy.blocks))}; make them agree"
                )
