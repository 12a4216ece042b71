"""Contrastive directions: what a concept's word adds to the residual stream, beyond what any word adds.

For each concept c, block and its short texts, the stream is read at the last token of the concept's word:

    D_c = mean over the readings of c  −  mean over the readings of all other concepts

The last token has seen the whole word; with the tokens before it averaged in, a word of two tokens
("d", "agger") got a direction too weak to pass a deadband that benign words stay under.

Residual streams hold a few positions of enormous norm. Three rules keep them out: position 0 is never
read, a token whose norm exceeds four times the block's median is dropped, and whoever codes with the
atoms first subtracts the mean of ordinary text, which is measured here too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from daco_rt.artifacts import Concept, ConceptDictionary, ModelIdentity, save_dictionary
from daco_rt.concepts import ORDINARY_TEXTS, ConceptEntry, stimuli_for
from daco_rt.errors import DacoError
from daco_rt.models.residual import read_blocks
from daco_rt.progress import progress as show

NORM_LIMIT = 4.0


@dataclass
class Directions:
    """Directions of N concepts at some blocks.

    Attributes
    ----------
    atoms : dict of int to numpy.ndarray
        block → [N, d] ``float32``, rows of unit norm.
    norms : dict of int to numpy.ndarray
        block → [N] ``float32``, the length each row had.
    means : dict of int to numpy.ndarray
        block → [d] ``float32``, mean of the stream over ordinary text.
    median_norm : dict of int to float
        block → median norm of the stream over ordinary text.
    readings : int
        Number of texts read.
    rejected : dict of int to int
        block → readings dropped for their norm or because the word stood at position 0.
    """

    atoms: dict[int, np.ndarray] = field(default_factory=dict)
    norms: dict[int, np.ndarray] = field(default_factory=dict)
    means: dict[int, np.ndarray] = field(default_factory=dict)
    median_norm: dict[int, float] = field(default_factory=dict)
    readings: int = 0
    rejected: dict[int, int] = field(default_factory=dict)


def build_dictionary(
    model: torch.nn.Module,
    tokenizer: Any,
    concepts: Sequence[ConceptEntry],
    blocks: Sequence[int],
    output: str | Path,
    *,
    identity: ModelIdentity,
    batch_tokens: int = 1024,
    overwrite: bool = False,
    progress: bool = True,
) -> ConceptDictionary:
    """Measure the concepts' directions on ``model`` and write them as a dictionary of fp16 atoms.

    Parameters
    ----------
    model : torch.nn.Module
        A Hugging Face causal or image-text model.
    tokenizer : transformers fast tokenizer
        The model's own.
    concepts : sequence of ConceptEntry
        At least two.
    blocks : sequence of int
        0-based decoder blocks whose outputs are read.
    output : path
        The folder to make.
    identity : ModelIdentity
        Of the model's checkpoint.
    batch_tokens : int
        Tokens in one forward pass, padding included.
    overwrite : bool
        Whether an existing dictionary is replaced.
    progress : bool
        Show a progress bar on standard error.

    Returns
    -------
    ConceptDictionary

    Raises
    ------
    ArtifactError
        If the folder may not be written.
    DacoError
        If a concept could not be read, or a block does not exist.
    """
    found = measure_directions(
        model, tokenizer, concepts, blocks, batch_tokens=batch_tokens, progress=progress
    )
    table = [
        Concept(i, entry.name, entry.label, entry.group, gloss=entry.gloss, source="built-in list")
        for i, entry in enumerate(concepts)
    ]
    recipe = {
        "direction": "mean over the word's readings minus mean over all other concepts' readings, unit norm",
        "position": "last token of the word",
        "centre": "mean of ordinary text",
        "norm_limit": NORM_LIMIT,
        "readings": found.readings,
        "rejected": {str(block): count for block, count in found.rejected.items()},
        "norms": {str(block): [round(float(n), 4) for n in norms] for block, norms in found.norms.items()},
    }
    return save_dictionary(
        output,
        model=identity,
        atoms={block: atoms.astype(np.float16) for block, atoms in found.atoms.items()},
        means=found.means,
        median_norm=found.median_norm,
        concepts=table,
        recipe=recipe,
        overwrite=overwrite,
    )


def measure_directions(
    model: torch.nn.Module,
    tokenizer: Any,
    concepts: Sequence[ConceptEntry],
    blocks: Sequence[int],
    *,
    batch_tokens: int = 1024,
    progress: bool = True,
) -> Directions:
    """Measure the concepts' directions without writing anything; arguments as in ``build_dictionary``."""
    wanted = sorted({int(block) for block in blocks})
    if len(concepts) < 2:
        raise DacoError(f"directions need at least two concepts to contrast, got {len(concepts)}")

    found = Directions()
    for block, rows in _ordinary(model, tokenizer, wanted, batch_tokens).items():
        norms = np.linalg.norm(rows, axis=1)
        median = float(np.median(norms))
        found.median_norm[block] = median
        found.means[block] = rows[norms <= NORM_LIMIT * median].mean(axis=0).astype(np.float32)

    owners, texts, spans = [], [], []
    for owner, entry in enumerate(concepts):
        for stimulus in stimuli_for(entry):
            owners.append(owner)
            texts.append(stimulus.text)
            spans.append((stimulus.start, stimulus.end))
    found.readings = len(texts)
    found.rejected = dict.fromkeys(wanted, 0)
    width = found.means[wanted[0]].shape[0]
    sums = {block: np.zeros((len(concepts), width)) for block in wanted}
    counts = {block: np.zeros(len(concepts)) for block in wanted}
    silent = contextlib.nullcontext(lambda _: None)
    with show("reading concepts", len(texts), unit="texts") if progress else silent as advance:
        for index, offsets, streams in _run(model, tokenizer, texts, wanted, batch_tokens, advance):
            token = _word_token(offsets, *spans[index])
            for block, stream in streams.items():
                row = stream[token].astype(np.float64)
                if token > 0 and np.linalg.norm(row) <= NORM_LIMIT * found.median_norm[block]:
                    sums[block][owners[index]] += row
                    counts[block][owners[index]] += 1
                else:
                    found.rejected[block] += 1
    for block in wanted:
        found.atoms[block], found.norms[block] = _contrast(sums[block], counts[block], concepts, block)
    return found


def _contrast(
    sums: np.ndarray, counts: np.ndarray, concepts: Sequence[ConceptEntry], block: int
) -> tuple[np.ndarray, np.ndarray]:
    missing = np.flatnonzero(counts == 0)
    if missing.size:
        name = concepts[missing[0]].name
        raise DacoError(
            f"concept {name!r} could not be read at block {block}: each of its readings is a massive "
            "activation; remove it from the list or choose another block"
        )
    own = sums / counts[:, None]
    others = (sums.sum(axis=0) - sums) / (counts.sum() - counts)[:, None]
    directions = own - others
    norms = np.linalg.norm(directions, axis=1)
    flat = np.flatnonzero(norms == 0)
    if flat.size:
        name = concepts[flat[0]].name
        raise DacoError(f"concept {name!r} has no direction at block {block}; remove it from the list")
    return (directions / norms[:, None]).astype(np.float32), norms.astype(np.float32)


def _ordinary(
    model: torch.nn.Module, tokenizer: Any, blocks: list[int], batch_tokens: int
) -> dict[int, np.ndarray]:
    rows: dict[int, list[np.ndarray]] = {block: [] for block in blocks}
    for _, _, streams in _run(model, tokenizer, ORDINARY_TEXTS, blocks, batch_tokens, lambda _: None):
        for block, stream in streams.items():
            rows[block].append(stream[1:])
    return {block: np.concatenate(parts).astype(np.float64) for block, parts in rows.items()}


def _word_token(offsets: Sequence[tuple[int, int]], start: int, end: int) -> int:
    """Return the last token that overlaps the characters [start, end)."""
    return max(i for i, (a, b) in enumerate(offsets) if a < end and b > start)


def _run(
    model: torch.nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    blocks: list[int],
    batch_tokens: int,
    advance: Callable[[int], None],
) -> Iterator[tuple[int, Sequence[tuple[int, int]], dict[int, np.ndarray]]]:
    """Yield (index of the text, token offsets, block → [tokens, d] fp32), texts of equal length together."""
    encoded = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True)
    for i, streams in read_blocks(model, encoded["input_ids"], blocks, batch_tokens=batch_tokens):
        yield i, encoded["offset_mapping"][i], {block: stream.numpy() for block, stream in streams.items()}
        advance(1)
