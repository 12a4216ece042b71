"""Labelled concepts that a model hears where nobody speaks of them.

An atom is mostly its word's tokens. A rare word broken into pieces can share what its last piece looks like
with any other word in pieces, as the name of the model in its own system prompt, and an edit that takes it
for the concept then touches every answer. Such an atom gives itself away: it is found in ordinary text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from daco_rt.artifacts import Concept, ConceptDictionary, save_dictionary
from daco_rt.concepts import ORDINARY_TEXTS
from daco_rt.models.residual import read_blocks

# Massive activations are no hearing: they are left alone by whoever edits.
_NORM_LIMIT = 4.0
_ROWS = 1024


@dataclass(frozen=True)
class Heard:
    """The loudest place of one concept: ``level`` is ⟨z − mean, atom⟩ over the block's median norm."""

    concept: int
    level: float
    block: int
    token: str


def ordinary_texts(tokenizer: Any) -> tuple[str, ...]:
    """Return ordinary texts, and what the model's chat template puts around every prompt.

    Example
    -------
    >>> "You are a helpful AI assistant" in ordinary_texts(tokenizer)[-1]
    True
    """
    if not getattr(tokenizer, "chat_template", None):
        return ORDINARY_TEXTS
    turn = [{"role": "user", "content": "Hello."}]
    return (*ORDINARY_TEXTS, tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))


def find_heard(
    dictionary: ConceptDictionary,
    model: Any,
    tokenizer: Any,
    *,
    least: float,
    texts: Sequence[str] | None = None,
    batch_tokens: int = 1024,
) -> tuple[Heard, ...]:
    """Return the undesirable and desirable concepts that are heard in ordinary text, the loudest first.

    Parameters
    ----------
    dictionary : of the model.
    model, tokenizer : from ``load_torch``.
    least : levels from here on count. A policy's deadband is the natural choice: below it nothing is edited.
    texts : by default ``ordinary_texts(tokenizer)``. They must speak of no concept of the dictionary.
    batch_tokens : tokens in one forward pass.

    Example
    -------
    >>> find_heard(dictionary, model, tokenizer, least=0.4)
    (Heard(concept=1408, level=0.43, block=17, token='ol'),)
    """
    rows = np.array([i for i, c in enumerate(dictionary.concepts) if c.label != "neutral"], np.int64)
    ids = tokenizer(list(texts or ordinary_texts(tokenizer)), add_special_tokens=False)["input_ids"]
    best: dict[int, Heard] = {}
    # One block's labelled atoms are in memory as fp32.
    atoms = {block: dictionary.atoms(block)[rows].astype(np.float32) for block in dictionary.blocks}
    for i, streams in read_blocks(model, ids, dictionary.blocks, batch_tokens=batch_tokens):
        for block, stream in streams.items():
            z = stream.numpy()
            usual = np.linalg.norm(z, axis=1) <= _NORM_LIMIT * dictionary.median_norm[block]
            usual[0] = False
            levels = (z - dictionary.mean(block)) @ atoms[block].T / dictionary.median_norm[block]
            levels[~usual] = -np.inf
            loudest = levels.argmax(axis=0)
            for column, place in enumerate(loudest):
                level, concept = float(levels[place, column]), int(rows[column])
                if level >= least and (concept not in best or level > best[concept].level):
                    best[concept] = Heard(concept, round(level, 4), block, tokenizer.decode([ids[i][place]]))
    return tuple(sorted(best.values(), key=lambda heard: (-heard.level, heard.concept)))


def without_heard(
    dictionary: ConceptDictionary, heard: Sequence[Heard], output: str | Path, *, overwrite: bool = False
) -> ConceptDictionary:
    """Write a dictionary in which the concepts that were heard are neutral; their atoms stay.

    Their ``source`` says where each was heard, and so does the recipe.

    Raises
    ------
    ArtifactError
        If the folder may not be written.
    """
    where = {one.concept: one for one in heard}

    def relabelled(concept: Concept) -> Concept:
        one = where.get(concept.index)
        if one is None:
            return concept
        source = f"{one.level:.2f} of the norm in ordinary text at {one.token!r}, block {one.block}"
        return replace(concept, label="neutral", group="", source=source)

    def rows(block: int) -> Iterator[np.ndarray]:
        table = dictionary.atoms(block)
        for start in range(0, len(table), _ROWS):
            yield np.array(table[start : start + _ROWS])

    dtype = {"fp16": "F16", "fp32": "F32"}[dictionary.dtype]
    shape = (dictionary.size, dictionary.dim)
    return save_dictionary(
        output,
        model=dictionary.model,
        atoms={block: (dtype, shape, partial(rows, block)) for block in dictionary.blocks},
        means={block: np.array(dictionary.mean(block)) for block in dictionary.blocks},
        median_norm=dictionary.median_norm,
        concepts=[relabelled(concept) for concept in dictionary.concepts],
        recipe={
            **dictionary.recipe,
            "heard": {dictionary.concepts[one.concept].name: one.level for one in heard},
        },
        overwrite=overwrite,
    )
