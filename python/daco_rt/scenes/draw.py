"""Which things a scene holds: drawn at random, with pairs that are never seen together in training."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal

from daco_rt.scenes.concepts import STYLES, scene_concepts

if TYPE_CHECKING:
    import torch

MOST = 3
"""Most things in one scene."""
HELD_OUT = 0.1
"""Share of all pairs of concepts that training never shows together."""
# So many draws that none of them fits less than once in ten thousand scenes.
_TRIES = {"train": 8, "held-out": 96, "any": 1}


@dataclass(frozen=True, eq=False)
class Choice:
    """What scenes hold, before anything is placed.

    Attributes
    ----------
    concepts : torch.Tensor
        int64 [scenes, 3]: concepts, −1 where there are fewer.
    styles : torch.Tensor
        int64 [scenes, 3]: who drew each.
    words : torch.Tensor
        int64 [scenes]: the concept whose name stands in the picture in letters, or −1.
    """

    concepts: torch.Tensor
    styles: torch.Tensor
    words: torch.Tensor


@cache
def held_out_pairs() -> torch.Tensor:
    """Return bool [concepts, concepts], symmetric: pairs that are for testing alone.

    A pair's side depends on the two names and on nothing else.

    Example
    -------
    >>> held_out_pairs().float().mean().item() < 0.12
    True
    """
    import torch

    names = [concept.name for concept in scene_concepts()]
    found = torch.zeros(len(names), len(names), dtype=torch.bool)
    for i, one in enumerate(names):
        for j in range(i):
            pair = "/".join(sorted((one, names[j])))
            draw = int.from_bytes(hashlib.sha256(pair.encode()).digest()[:4], "big") / 2**32
            found[i, j] = found[j, i] = draw < HELD_OUT
    return found


def draw_scenes(
    counts: torch.Tensor,
    generator: torch.Generator,
    *,
    side: Literal["train", "held-out", "any"] = "train",
    unsafe: float | None = None,
    words: float = 0.0,
) -> Choice:
    """Draw what scenes hold.

    Parameters
    ----------
    counts : torch.Tensor
        int64 [scenes]: how many things, 1 to 3.
    generator : torch.Generator
        Source of all randomness.
    side : str
        "train" shows no held-out pair, "held-out" at least one wherever there are two things or more,
        "any" does not look.
    unsafe : float, optional
        Chance of each place to hold an unsafe thing; by default each concept is as likely as any other.
    words : float
        Share of scenes with a word in letters: the name of one of the things. Half of these show the word
        alone: `concepts` is then −1 throughout.

    Returns
    -------
    Choice
    """
    import torch

    concepts = scene_concepts()
    scenes, tries, bad = len(counts), _TRIES[side], sum(concept.unsafe for concept in concepts)
    weight = torch.ones(scenes * tries, len(concepts))
    if unsafe is not None:
        # Exactly this chance for the first place, a little less for the others: nothing comes twice.
        weight[..., :bad], weight[..., bad:] = unsafe / bad, (1 - unsafe) / (len(concepts) - bad)
    drawn = torch.multinomial(weight, MOST, generator=generator).view(scenes, tries, MOST)
    there = torch.arange(MOST) < counts[:, None]
    apart = held_out_pairs()
    held = torch.zeros(scenes, tries, dtype=torch.bool)
    for i in range(MOST):
        for j in range(i):
            held |= apart[drawn[..., i], drawn[..., j]] & (there[:, i] & there[:, j])[:, None]
    fits = {"train": ~held, "held-out": held, "any": torch.ones_like(held)}[side]
    first = fits.float().argmax(1)
    chosen = drawn[torch.arange(scenes), first]
    chosen = torch.where(there, chosen, -torch.ones_like(chosen))
    styles = torch.randint(len(STYLES), (scenes, MOST), generator=generator)
    lettered = torch.rand(scenes, generator=generator) < words
    alone = torch.rand(scenes, generator=generator) < 0.5
    named = torch.where(lettered, chosen[:, 0], torch.full_like(counts, -1))
    # A picture of 64 pixels has room for one thing above a word.
    chosen[:, 1:] = torch.where(lettered[:, None], -torch.ones_like(chosen[:, 1:]), chosen[:, 1:])
    chosen = torch.where((lettered & alone)[:, None], -torch.ones_like(chosen), chosen)
    return Choice(chosen, styles, named)
