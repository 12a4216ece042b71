"""Perplexity and divergence on neutral text: what does a method do to ordinary sentences?

Passages are ours and speak of nothing in particular. The first word is given, every token after it is scored
teacher-forced, so that a policy for generated tokens acts on exactly what is scored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from daco_rt.errors import DacoError
from daco_rt.evaluate.metrics import kl_nats, token_nats
from daco_rt.evaluate.subject import PIECE, Ask, Subject

FILE = Path(__file__).with_name("neutral.txt")


class Passage(NamedTuple):
    """A passage under a policy: two numbers for every token but those of the first word."""

    nats: list[float]
    """−ln p; exp of the mean over all passages is the perplexity."""
    kl: list[float]
    """KL(unsteered ‖ steered) in nats."""


def neutral_texts() -> list[str]:
    """Return the built-in passages, 16 of two sentences.

    Example
    -------
    >>> len(neutral_texts())
    16
    """
    return FILE.read_text(encoding="utf-8").splitlines()


def neutral_passages(
    subject: Subject, *, policy: str, texts: Sequence[str] | None = None
) -> Iterator[Passage]:
    """Yield the numbers of each passage; the chat template stays out.

    Memory: twice `PIECE` logits, or those of one passage where these are more.

    Raises
    ------
    DacoError
        A passage cannot be split into a first word and the rest without changing its tokens.

    Example
    -------
    >>> subject = BundleSubject("bundles/smol-internvl")                            # doctest: +SKIP
    >>> found = list(neutral_passages(subject, policy="default"))                   # doctest: +SKIP
    >>> float(np.exp(np.mean(np.concatenate([row.nats for row in found]))))         # doctest: +SKIP
    14.2
    """
    asks, rests = [], []
    for text in neutral_texts() if texts is None else texts:
        first = text.split(" ", 1)[0]
        head = subject.processor.prepare(first, raw=True).input_ids.tolist()
        whole = subject.processor.prepare(text, raw=True).input_ids.tolist()
        if whole[: len(head)] != head or len(whole) == len(head):
            raise DacoError(f"the tokens of {text[:40]!r} do not continue those of its first word")
        asks.append(Ask(first, raw=True))
        rests.append(whole[len(head) :])
    widest = max(map(len, rests)) * len(subject.processor.tokenizer)
    size = max(1, min(subject.batch_size, PIECE // widest))
    for start in range(0, len(asks), size):
        part, given = asks[start : start + size], rests[start : start + size]
        steered = subject.logits(part, given, policy=policy)
        # Not in turns with the steered ones: hooks in torch act on whatever runs while they are there.
        plain = None if policy == "off" else list(subject.logits(part, given, policy="off"))
        for row, (logits, ids) in enumerate(zip(steered, given, strict=True)):
            kl = np.zeros(len(ids)) if plain is None else kl_nats(plain[row], logits)
            yield Passage(np.round(token_nats(logits, ids), 6).tolist(), np.round(kl, 9).tolist())
