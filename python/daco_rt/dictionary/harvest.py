"""The harvest: many stimuli through a model once, into the mean reading of each concept at each block."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from daco_rt.artifacts import Concept, ModelIdentity
from daco_rt.concepts import ORDINARY_TEXTS
from daco_rt.dictionary.encode import PROMPT, Encoder, Losses, Stimulus
from daco_rt.dictionary.items import HarvestItem, ItemTable
from daco_rt.dictionary.means import ConceptMeans, begin_means, open_means
from daco_rt.dictionary.positions import IMAGE_RULES, rule
from daco_rt.dictionary.reading import ShardReader, measure_ordinary
from daco_rt.errors import DacoError
from daco_rt.models.residual import text_model_of
from daco_rt.progress import progress as show
from daco_rt.sae import ActivationStore, create_store

# Positions above this multiple of a block's median norm are massive activations, a few shared directions.
NORM_LIMIT = 4.0
# Stimuli behind one shard, if it is not said how many concepts: a minute or so of work to lose.
STIMULI_PER_SHARD = 512
PICTURES_SAMPLED = 16


def harvest_means(
    model: torch.nn.Module,
    processor: Any,
    concepts: Sequence[Concept],
    items: Iterable[HarvestItem] | ItemTable,
    blocks: Sequence[int],
    output: str | Path,
    *,
    identity: ModelIdentity,
    position: str = "word",
    batch_tokens: int = 4096,
    max_tokens: int = 2048,
    prompt: str = PROMPT,
    max_tiles: int | None = None,
    concepts_per_shard: int | None = None,
    activations: str | Path | None = None,
    norm_limit: float = NORM_LIMIT,
    overwrite: bool = False,
    progress: bool = True,
) -> ConceptMeans:
    """Read every item once, for all blocks, and write the concepts' means; called again, it goes on.

    Parameters
    ----------
    model : a Hugging Face causal or image-text model.
    processor : the checkpoint's ``runtime.processor.Processor``; its fast tokenizer is enough where no item
        has a picture.
    concepts : N rows, in order of their index.
    items : what is read.
    blocks : 0-based decoder blocks whose outputs are read.
    output : the folder of the means.
    identity : of the model's checkpoint.
    position : where in a stimulus it is read (``dictionary.positions``).
    batch_tokens : tokens in one forward pass, padding included.
    max_tokens : texts are cut there; pictures never.
    prompt : what the user asks about a picture; the item's text is the answer.
    max_tiles : most tiles a picture is cut into; by default the processor's own.
    concepts_per_shard : concepts behind one shard; by default as many as have about 512 stimuli. Memory grows
        with it only where ``activations`` are kept.
    activations : folder of an activation store that is filled in the same pass with every position's row.
    norm_limit : positions above this multiple of the block's median norm are rejected.
    overwrite : begin anew where means are.
    progress : show a progress bar on standard error.

    Raises
    ------
    ArtifactError
        If the folder holds means of other stimuli, settings or another model, or the disk is full.
    DacoError
        If there is no item, a block or position does not exist, or the model gives NaN (the item is named).

    Example
    -------
    >>> items = text_items("texts.jsonl.gz", concepts)
    >>> means = harvest_means(model, tokenizer, concepts, items, [15, 16], "means/smol", identity=identity)
    >>> means.count(16)[:3]
    array([7, 7, 7])
    """
    rule(position)
    for name, value in (("batch_tokens", batch_tokens), ("max_tokens", max_tokens)):
        if value < 1:
            raise DacoError(f"{name} must be at least 1, got {value}")
    if not norm_limit > 0:
        raise DacoError(f"norm_limit must be positive, got {norm_limit}")
    table = items if isinstance(items, ItemTable) else ItemTable(items, len(concepts))
    recipe = {
        "stimuli": len(table),
        "stimuli_sha256": table.sha256(),
        "ordinary_sha256": hashlib.sha256("\0".join(ORDINARY_TEXTS).encode()).hexdigest(),
        "dtype": str(text_model_of(model).embed_tokens.weight.dtype).removeprefix("torch."),
        "norm_limit": norm_limit,
        "batch_tokens": batch_tokens,
        "max_tokens": max_tokens,
    }
    if len(table.pictures):
        recipe |= {"prompt": prompt, "max_tiles": max_tiles}
    encoder = Encoder(processor, position, max_tokens, prompt=prompt, max_tiles=max_tiles)
    means = begin_means(
        output,
        model=identity,
        concepts=concepts,
        blocks=blocks,
        position=position,
        signs=table.signs,
        concepts_per_shard=concepts_per_shard or table.concepts_per_shard(STIMULI_PER_SHARD),
        recipe=recipe,
        ordinary=lambda: measure_ordinary(
            model,
            encoder.tokenizer,
            blocks,
            norm_limit=norm_limit,
            batch_tokens=batch_tokens,
            pictures=_sample_pictures(table, encoder),
        ),
        overwrite=overwrite,
    )
    store = None if activations is None else _store(activations, means)
    shards = missing_shards(means, store)
    reader = ShardReader.of(means, model, encoder)
    total = sum(len(table.places(means.rows(shard))) for shard in shards)
    silent: Any = contextlib.nullcontext(lambda _: None)
    with show("harvesting", total, unit="stimuli") if progress else silent as advance:
        for shard in shards:
            fill_shard(reader, table, means, store, shard, advance)
    return open_means(means.path)


def _sample_pictures(table: ItemTable, encoder: Encoder) -> Iterator[list[Stimulus]]:
    """Pictures from all over the table, for the norm of image tokens where the rule reads them."""
    if encoder.position in IMAGE_RULES:
        whole = Encoder(
            encoder.processor, "image", encoder.max_tokens, prompt=encoder.prompt, max_tiles=encoder.max_tiles
        )
        # Places number them: one picture may stand for several concepts under one id.
        sample = [replace(item, id=str(i)) for i, item in enumerate(table.sample_pictures(PICTURES_SAMPLED))]
        yield from whole.encode(sample, 0, Losses())


def missing_shards(means: ConceptMeans, store: ActivationStore | None) -> list[int]:
    """Return the shards that the means, or the store that is filled along with them, still lack."""
    return sorted({*means.missing, *(store.missing if store is not None else ())})


def fill_shard(
    reader: ShardReader,
    table: ItemTable,
    means: ConceptMeans,
    store: ActivationStore | None,
    shard: int,
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Make one shard: the unit of work, the same in one process and in many."""
    rows = means.rows(shard)
    found, reading = reader.read(
        table.select(rows),
        rows,
        means.signs,
        first=table.places(rows).start,
        keep=store is not None,
        advance=advance,
    )
    if store is not None and reading is not None:
        store.add(shard, reading.rows, text=reading.text, token=reading.token)
    means.add(shard, found)


def _store(path: str | Path, means: ConceptMeans) -> ActivationStore:
    return create_store(
        path,
        model=means.model,
        blocks=means.blocks,
        median_norm=means.median_norm,
        shards=means.shards.count,
        norm_limit=float(means.recipe["norm_limit"]),
        recipe={**means.recipe, "positions": "all but the first", "stimuli_by": "order in the harvest"},
    )
