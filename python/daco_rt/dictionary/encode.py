"""From items to token sequences, with the positions that are read in each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from daco_rt.dictionary.items import HarvestItem
from daco_rt.dictionary.positions import Tokens, find_positions


@dataclass(frozen=True, eq=False)
class Stimulus:
    """One item as the model reads it.

    ``place`` is its number in the table, ``positions`` are read (none: the item is not counted, but its
    tokens may be stored), ``extras`` the model's further inputs, as ``read_batches`` takes them.
    """

    item: HarvestItem
    place: int
    tokens: Tokens
    positions: list[int]
    extras: Mapping[str, Any] | None = None


@dataclass
class Losses:
    """What was not read: ``skipped`` counts stimuli by reason, ``problems`` names the unusable ones."""

    skipped: Counter[str] = field(default_factory=Counter)
    problems: list[dict[str, str]] = field(default_factory=list)

    def refuse(self, item: HarvestItem, reason: str) -> None:
        """Count and name an item that cannot be used at all."""
        self.skipped[reason] += 1
        self.problems.append({"id": item.id, "concept": str(item.concept), "reason": reason})


class Encoder:
    """Turns items into stimuli.

    Parameters
    ----------
    tokenizer : a fast tokenizer of transformers; it adds no special tokens, so write chat markers into texts.
    position : name of the rule.
    max_tokens : texts are cut there.
    """

    def __init__(self, tokenizer: Any, position: str, max_tokens: int) -> None:
        self.tokenizer, self.position, self.max_tokens = tokenizer, position, max_tokens

    def encode(self, items: list[HarvestItem], first: int, losses: Losses) -> Iterator[list[Stimulus]]:
        """Yield the stimuli of one shard, a list at a time; ``first`` is the place of the first item.

        What cannot be used is entered in ``losses``.
        """
        usable, seen = [], set()
        for place, item in enumerate(items, first):
            key = (item.concept, item.sign, item.id)
            if not item.text.strip() and item.image is None:
                losses.refuse(item, "empty text")
            elif key in seen:
                losses.refuse(item, "duplicate id")
            else:
                seen.add(key)
                usable.append((place, item))
        if usable:
            yield self._texts(usable, losses)

    def _texts(self, usable: list[tuple[int, HarvestItem]], losses: Losses) -> list[Stimulus]:
        texts = [item.text for _, item in usable]
        encoded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        found = []
        for (place, item), ids, offsets in zip(
            usable, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            tokens = Tokens(
                ids[: self.max_tokens],
                offsets[: self.max_tokens],
                span(item),
                cut=len(ids) > self.max_tokens,
            )
            found.append(self._stimulus(place, item, tokens, losses))
        return found

    def _stimulus(
        self,
        place: int,
        item: HarvestItem,
        tokens: Tokens,
        losses: Losses,
        extras: Mapping[str, Any] | None = None,
    ) -> Stimulus:
        positions, reason = find_positions(self.position, tokens)
        if reason is not None:
            losses.skipped[reason] += 1
        return Stimulus(item, place, tokens, positions, extras)


def span(item: HarvestItem) -> tuple[int, int] | None:
    """Return the characters of an item's word, or None."""
    return None if item.start is None or item.end is None else (item.start, item.end)
