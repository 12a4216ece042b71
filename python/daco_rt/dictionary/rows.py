"""Rows of the stream to train an SAE on that come from the places where a dictionary is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from daco_rt.dictionary.encode import Encoder, Losses
from daco_rt.dictionary.items import text_items
from daco_rt.dictionary.positions import rule
from daco_rt.errors import DacoError
from daco_rt.sae.texts import mixed


def read_rows(
    file: str | Path, position: str, tokenizer: Any, *, max_tokens: int = 512
) -> tuple[list[str], list[list[int]]]:
    """Return the texts of a file of stimuli, those of one concept far apart, and of each the positions that a
    rule reads: none where it finds no place.

    Raises
    ------
    ArtifactError
        The file holds no stimuli.
    DacoError
        There is no such rule, or no text has a place that it reads.

    Example
    -------
    >>> texts, kept = read_rows("builds/smol-small/texts.jsonl.gz", "word", tokenizer)
    >>> store = harvest_activations(model, tokenizer, texts, [16], "store", identity=identity,
    ...                             position="word", kept=kept)
    >>> store.rows(16)
    10500
    """
    rule(position)
    items = mixed(list(text_items(file)))
    losses = Losses()
    kept: list[list[int]] = [[] for _ in items]
    for stimuli in Encoder(tokenizer, position, max_tokens).encode(items, 0, losses):
        for stimulus in stimuli:
            kept[stimulus.place] = stimulus.positions
    if not any(kept):
        reasons = ", ".join(f"{count} {reason}" for reason, count in losses.skipped.items())
        raise DacoError(
            f"position '{position}' finds no place in any of the {len(items)} texts of {file} ({reasons}); "
            "choose another position, or all"
        )
    return [item.text for item in items], kept
