"""Where a policy acts: from position rules to the ``policy_slots`` that the decoder takes.

A policy names a slot and one rule; a rule says which tokens of a request the slot covers:

=============  ==========================================================================
``generated``  the last prompt token and every decoded token (what decides the answer)
``prompt``     every token of the prompt, none of the decoded ones
``image``      the image tokens of the prompt, none of the decoded ones
``text``       every token that is no image token, decoded tokens included
``all``        every token
=============  ==========================================================================

Two things hold for every rule. The first token of a prompt is never edited (it carries the massive
activations of the residual stream), and padding is never edited: both get slot 0. Slot 0 ("off") is 0
everywhere, and slot 1 ("observe") covers what ``all`` covers whatever its rule says, because reporting
changes nothing.

Only numpy is used here, so that the torch path and the exported graph share the same function.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from daco_rt.artifacts.policy import POSITIONS
from daco_rt.errors import PolicyError, did_you_mean

OFF_SLOT = 0
OBSERVE_SLOT = 1


def check_positions(rule: str) -> str:
    """Return ``rule`` if it is one of :data:`POSITIONS`, else raise `PolicyError` with the near match."""
    if rule not in POSITIONS:
        raise PolicyError(f"positions '{rule}' is not a position rule{did_you_mean(rule, POSITIONS)}")
    return rule


def right_padded(lengths: ArrayLike, width: int | None = None) -> NDArray[np.bool_]:
    """Return the attention mask ``[B, S]`` of right-padded rows of the given ``lengths``.

    Example
    -------
    >>> right_padded([1, 3]).astype(int).tolist()
    [[1, 0, 0], [1, 1, 1]]
    """
    n = np.asarray(lengths, dtype=np.int64)
    columns = int(n.max(initial=0)) if width is None else width
    return np.arange(columns)[None, :] < n[:, None]


def token_slots(
    slots: Sequence[int] | NDArray[np.integer],
    positions: Sequence[str],
    attention: ArrayLike,
    *,
    image_mask: ArrayLike | None = None,
    prompt_lengths: ArrayLike | None = None,
    past_lengths: ArrayLike | None = None,
) -> NDArray[np.int32]:
    """Return the slot of every token of a batch.

    Parameters
    ----------
    slots : int sequence, shape [B]
        Policy slot of each request: 0 off, 1 observe, 2 and up the policies of a pack.
    positions : str sequence, length B
        Position rule of each request, one of :data:`POSITIONS`; ignored for slots 0 and 1.
    attention : bool or 0/1 array, shape [B, S]
        1 where a real token stands, 0 on padding. Padding may be on the left or on the right.
    image_mask : bool array, shape [B, S], optional
        True where an image token stands. Without it no token counts as an image token.
    prompt_lengths : int array, shape [B], optional
        Real tokens of each prompt; tokens after them are decoded ones. Without it, everything in
        ``attention`` (and in the past) is prompt.
    past_lengths : int array, shape [B], optional
        Real tokens of each row that were run before this call (a key/value cache holds them).
        Without it, 0.

    Returns
    -------
    int32 array, shape [B, S]
        The slot that each token is run under.

    Raises
    ------
    PolicyError
        A rule is unknown, or a slot is negative.
    ValueError
        Shapes do not fit together.

    Example
    -------
    >>> token_slots([2, 0], ["generated", "all"], [[1, 1, 1, 0], [1, 1, 1, 1]]).tolist()
    [[0, 0, 2, 0], [0, 0, 0, 0]]
    >>> token_slots([2], ["generated"], [[1]], prompt_lengths=[3], past_lengths=[5]).tolist()
    [[2]]
    """
    real = np.asarray(attention).astype(bool)
    if real.ndim != 2:
        raise ValueError(f"token_slots: attention must have shape [B, S], got {list(real.shape)}")
    batch = real.shape[0]
    wanted = np.asarray(slots, dtype=np.int64).reshape(-1)
    if wanted.size != batch or len(positions) != batch:
        raise ValueError(
            f"token_slots: slots and positions need one entry for each of the {batch} rows of attention, "
            f"got {wanted.size} and {len(positions)}"
        )
    if (wanted < 0).any():
        raise PolicyError(f"policy slots must be 0 or greater, got {wanted.tolist()}")
    image = _like(image_mask, real, "image_mask")
    past = _per_row(past_lengths, batch, "past_lengths", default=np.zeros(batch, np.int64))
    rank = np.cumsum(real, axis=1) - 1 + past[:, None]
    total = real.sum(axis=1) + past
    prompt = _per_row(prompt_lengths, batch, "prompt_lengths", default=total)[:, None]

    out = np.zeros(real.shape, dtype=np.int32)
    for row in range(batch):
        slot = int(wanted[row])
        if slot == OFF_SLOT:
            continue
        rule = "all" if slot == OBSERVE_SLOT else check_positions(positions[row])
        covered = _covered(rule, rank[row], int(prompt[row, 0]), image[row])
        out[row] = np.where(covered & real[row] & (rank[row] > 0), slot, OFF_SLOT)
    return out


def _covered(rule: str, rank: NDArray[np.int64], prompt: int, image: NDArray[np.bool_]) -> NDArray[np.bool_]:
    if rule == "generated":
        return rank >= prompt - 1
    if rule == "prompt":
        return rank < prompt
    if rule == "image":
        return image & (rank < prompt)
    if rule == "text":
        return ~(image & (rank < prompt))
    return np.ones_like(image)


def _like(mask: ArrayLike | None, real: NDArray[np.bool_], name: str) -> NDArray[np.bool_]:
    if mask is None:
        return np.zeros_like(real)
    found = np.asarray(mask).astype(bool)
    if found.shape != real.shape:
        raise ValueError(
            f"token_slots: {name} must have the shape of attention {list(real.shape)}, "
            f"got {list(found.shape)}"
        )
    return found


def _per_row(value: ArrayLike | None, batch: int, name: str, default: NDArray[np.int64]) -> NDArray[np.int64]:
    if value is None:
        return default
    found = np.asarray(value, dtype=np.int64).reshape(-1)
    if found.size != batch:
        raise ValueError(
            f"token_slots: {name} must have one entry for each of {batch} rows, got {found.size}"
        )
    return found
