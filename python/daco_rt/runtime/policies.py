"""From a policy's name to the slot and the position rule that a request runs under."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from daco_rt.errors import PolicyError

if TYPE_CHECKING:
    from daco_rt.artifacts import Pack


class Chosen(NamedTuple):
    """A policy as a request uses it."""

    name: str
    slot: int
    positions: str
    condition: float = 0.0
    """Prompts are observed first, and the policy acts above this mean removed dose; 0 is no gate."""
    blocks: tuple[int, ...] = ()
    """Blocks whose dose counts for the condition."""


def choose_policy(pack: Pack | None, name: str | None) -> Chosen:
    """Return the policy called ``name``; ``None`` means the pack's default one.

    "off" (slot 0) and "observe" (slot 1) are always there. Without a pack only "off" can be had.

    Raises
    ------
    PolicyError
        The name is unknown (with the near match), or steering is asked of a bundle without a pack. A
        request is never silently unsteered.

    Example
    -------
    >>> choose_policy(None, None)
    Chosen(name='off', slot=0, positions='all', condition=0.0, blocks=())
    """
    if pack is None:
        if name not in (None, "off"):
            raise PolicyError(
                f"policy '{name}' cannot be used: this bundle was exported without a pack, so only 'off' can"
            )
        return Chosen("off", 0, "all")
    policy = pack.policy(pack.default_policy if name is None else name)
    if not policy.condition:
        return Chosen(policy.name, int(policy.slot), policy.positions)
    return Chosen(policy.name, int(policy.slot), policy.positions, policy.condition, policy.blocks)
