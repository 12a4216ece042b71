"""Perplexity on neutral text: does a method make ordinary sentences less likely?

Passages are ours and speak of nothing in particular. The first word is given, every token after it is scored
teacher-forced, so that a policy for generated tokens acts on exactly what is scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from daco_rt.errors import DacoError
from daco_rt.evaluate.metrics import token_nats
from daco_rt.evaluate.subject import Ask, Subject

FILE = Path(__file__).with_name("neutral.txt")


def neutral_texts() -> list[str]:
    """Return the built-in passages, 16 of two sentences.

    Example
    -------
    >>> len(neutral_texts())
    16
    """
    return FILE.read_text(encoding="utf-8").splitlines()


def neutral_nats(
    subject: Subject, *, policy: str | None, texts: Sequence[str] | None = None
) -> list[list[float]]:
    """Return −ln p of every token but those of the first word, for each passage.

    exp of the mean over all of them is the perplexity. The chat template stays out.

    Raises
    ------
    DacoError
        A passage cannot be split into a first word and the rest without changing its tokens.

    Example
    -------
    >>> nats = neutral_nats(BundleSubject("bundles/smol-internvl"), policy="off")    # doctest: +SKIP
    >>> float(np.exp(np.mean(np.concatenate(nats))))                                # doctest: +SKIP
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
    found = subject.logits(asks, rests, policy=policy)
    return [np.round(token_nats(rows, ids), 6).tolist() for rows, ids in zip(found, rests, strict=True)]
