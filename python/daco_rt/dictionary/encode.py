"""From items to token sequences, with the positions that are read in each."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from daco_rt.concepts.texts import FORMATS
from daco_rt.corpus import open_reference
from daco_rt.dictionary.items import HarvestItem
from daco_rt.dictionary.positions import Tokens, find_positions
from daco_rt.errors import DacoError, UnsupportedError
from daco_rt.runtime.processor import Processor

PROMPT = "What is in this picture?"
# Pictures that are prepared together and sorted by their number of tokens; two such windows are in memory.
_WINDOW = 16
# So many unreadable pictures and no readable one: the folder is not there, rather than the files damaged.
_HOPELESS = 8
# What ends a prompt and opens its answer, in every format of daco-rt stimuli.
_OPENINGS = tuple(markers.end + markers.assistant for markers in FORMATS.values())


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
    processor : the checkpoint's ``Processor``, or its fast tokenizer, which is enough where no item has a
        picture. Texts get no special tokens: write chat markers into them.
    position : name of the rule.
    max_tokens : texts are cut there; pictures never.
    prompt : what the user asks about a picture; the item's text is the answer.
    max_tiles : most tiles a picture is cut into; None: as the processor does it.

    Example
    -------
    >>> encoder = Encoder(Processor("models/mine"), "word", 2048)
    >>> [len(stimuli) for stimuli in encoder.encode(items, 0, Losses())]
    [412, 16, 16]
    """

    def __init__(
        self,
        processor: Any,
        position: str,
        max_tokens: int,
        *,
        prompt: str = PROMPT,
        max_tiles: int | None = None,
    ) -> None:
        self.processor = processor if isinstance(processor, Processor) else None
        self.tokenizer = processor if self.processor is None else processor.tokenizer
        self.position, self.max_tokens, self.max_tiles = position, max_tokens, max_tiles
        self.prompt = prompt
        self._openings: dict[str, str] = {}

    def encode(self, items: list[HarvestItem], first: int, losses: Losses) -> Iterator[list[Stimulus]]:
        """Yield the stimuli of one shard, a list at a time; ``first`` is the place of the first item.

        What cannot be used is entered in ``losses``.

        Raises
        ------
        DacoError
            If there are pictures and no processor, or many pictures of which none can be read.
        """
        texts: list[tuple[int, HarvestItem]] = []
        pictures: list[tuple[int, HarvestItem]] = []
        seen: set[tuple[int, int, str]] = set()
        for place, item in enumerate(items, first):
            key = (item.concept, item.sign, item.id)
            if not item.text.strip() and item.image is None:
                losses.refuse(item, "empty text")
            elif key in seen:
                losses.refuse(item, "duplicate id")
            else:
                seen.add(key)
                (texts if item.image is None else pictures).append((place, item))
        if texts:
            yield self._texts(texts, losses)
        if pictures:
            yield from self._pictures(pictures, losses)

    def _texts(self, usable: list[tuple[int, HarvestItem]], losses: Losses) -> list[Stimulus]:
        texts = [item.text for _, item in usable]
        encoded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        found = []
        for (place, item), ids, offsets in zip(
            usable, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            cut = len(ids) > self.max_tokens
            tokens = Tokens(
                ids[: self.max_tokens],
                offsets[: self.max_tokens],
                _span(item, 0),
                cut=cut,
                answer=_answer(item.text),
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

    def _pictures(self, usable: list[tuple[int, HarvestItem]], losses: Losses) -> Iterator[list[Stimulus]]:
        """Prepare pictures on other threads, a window ahead of the one that is read."""
        if self.processor is None:
            raise DacoError(
                f"stimulus {usable[0][1].id!r} has a picture, which a tokenizer alone cannot prepare; pass "
                "daco_rt.runtime.processor.Processor(checkpoint)"
            )
        readable, broken = 0, 0
        waiting: deque[tuple[int, HarvestItem, Future[Any]]] = deque()
        rest = iter(usable)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="daco-picture") as pool:
            try:
                while True:
                    while len(waiting) < 2 * _WINDOW and (nearest := next(rest, None)) is not None:
                        waiting.append((*nearest, pool.submit(self._prepare, nearest[1])))
                    window: list[Stimulus] = []
                    while waiting and len(window) < _WINDOW:
                        place, item, prepared = waiting.popleft()
                        try:
                            tokens, extras = prepared.result()
                        except UnsupportedError:
                            raise
                        except DacoError as error:
                            broken += 1
                            losses.refuse(item, "broken picture")
                            if broken >= _HOPELESS and not readable:
                                raise DacoError(
                                    f"the first {broken} pictures cannot be read, the last for this reason: "
                                    f"{error}; see that the pictures are where the pairs say"
                                ) from error
                            continue
                        readable += 1
                        window.append(self._stimulus(place, item, tokens, losses, extras))
                    if window:
                        yield window
                    elif not waiting:
                        return
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _prepare(self, item: HarvestItem) -> tuple[Tokens, dict[str, torch.Tensor]]:
        """Return tokens and pixels of a picture with its text as the answer to the prompt."""
        assert self.processor is not None and item.image is not None
        picture = open_reference("/", os.path.abspath(item.image).lstrip("/"))
        opening = self._open(item.system)
        made = self.processor.prepare(
            opening + item.text, images=[picture], max_tiles=self.max_tiles, raw=True
        )
        ids = made.input_ids.tolist()
        # What stands behind the picture's tokens is split from them, so it is tokenised alike alone.
        tail = (opening + item.text).rpartition(self.processor.image_token or "")[2]
        last, spans = self.processor.tokens(tail)
        if ids[len(ids) - len(last) :] != last:
            raise UnsupportedError(
                f"the tokens behind the picture of stimulus {item.id!r} differ from those of their text "
                "alone; pictures are not supported with this tokenizer"
            )
        offsets = [(0, 0)] * (len(ids) - len(last)) + spans
        answer = len(tail) - len(item.text)
        tokens = Tokens(ids, offsets, _span(item, answer), made.image_mask, answer=answer)
        assert made.pixel_values is not None
        return tokens, {"pixel_values": torch.from_numpy(made.pixel_values)}

    def _open(self, system: str) -> str:
        assert self.processor is not None
        if system not in self._openings:
            content = [{"type": "image"}, {"type": "text", "text": self.prompt}]
            before = [{"role": "system", "content": system}] if system else []
            self._openings[system] = self.processor.render([*before, {"role": "user", "content": content}])
        return self._openings[system]


def _span(item: HarvestItem, shift: int) -> tuple[int, int] | None:
    return None if item.start is None or item.end is None else (item.start + shift, item.end + shift)


def _answer(text: str) -> int | None:
    """The character at which the answer begins; None where no turn stands before it."""
    ends = (text.rfind(opening) + len(opening) for opening in _OPENINGS if opening in text)
    return max(ends, default=None)
