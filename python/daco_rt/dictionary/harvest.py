"""The harvest: many stimuli through a model once, into the mean reading of each concept at each block."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
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
from daco_rt.errors import ArtifactError, DacoError
from daco_rt.models.residual import text_model_of
from daco_rt.progress import progress as show
from daco_rt.sae import ActivationStore, create_store

# Positions above this multiple of a block's median norm are massive activations, a few shared directions.
NORM_LIMIT = 4.0
# Stimuli behind one shard, if it is not said how many concepts: a minute or so of work to lose.
STIMULI_PER_SHARD = 512
PICTURES_SAMPLED = 16
CPU_BATCH, BATCH = 1024, 4096

Advance = Callable[[int], None]


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
    batch_tokens: int | None = None,
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
    batch_tokens : tokens in one forward pass, padding included; by default 1,024 on a CPU, whose caches hold
        no more, and 4,096 elsewhere.
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
    table = items if isinstance(items, ItemTable) else ItemTable(items, len(concepts))
    plan = HarvestPlan(
        tuple(concepts), table, tuple(blocks), Path(output), identity, position, batch_tokens, max_tokens,
        prompt, max_tiles, concepts_per_shard, None if activations is None else Path(activations), norm_limit,
    )  # fmt: skip
    return plan.run(model, processor, overwrite=overwrite, progress=progress)


@dataclass(frozen=True, eq=False)
class HarvestPlan:
    """Everything about a harvest but the model; the fields are the arguments of ``harvest_means``.

    It can be sent to other processes: each loads the model and makes any of the shards.
    """

    concepts: tuple[Concept, ...]
    table: ItemTable
    blocks: tuple[int, ...]
    output: Path
    identity: ModelIdentity
    position: str = "word"
    batch_tokens: int | None = None
    max_tokens: int = 2048
    prompt: str = PROMPT
    max_tiles: int | None = None
    concepts_per_shard: int | None = None
    activations: Path | None = None
    norm_limit: float = NORM_LIMIT

    def __post_init__(self) -> None:
        rule(self.position)
        for name, least in (("batch_tokens", 1), ("max_tokens", 1), ("max_tiles", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise DacoError(f"{name} must be at least {least}, got {value}")
        if not self.norm_limit > 0:
            raise DacoError(f"norm_limit must be positive, got {self.norm_limit}")

    def run(
        self, model: torch.nn.Module, processor: Any, *, overwrite: bool = False, progress: bool = True
    ) -> ConceptMeans:
        """Make the missing shards one after the other in this process."""
        means = self.begin(model, processor, overwrite=overwrite)
        worker = ShardWorker(self, means, model, processor)
        with self.show(means, progress) as advance:
            for shard in self.missing(means):
                worker.make(shard, advance)
        return open_means(means.path)

    def begin(self, model: torch.nn.Module, processor: Any, *, overwrite: bool = False) -> ConceptMeans:
        """Begin the folder, or check that it was begun by an equal plan; ordinary text is read if it is
        new."""
        if overwrite and self.activations is not None and self.activations.exists():
            raise ArtifactError(
                f"{self.activations} is there already, and beginning anew does not replace an activation "
                "store; delete it or choose another folder"
            )
        weight = text_model_of(model).embed_tokens.weight
        batch_tokens = self.batch_tokens or (CPU_BATCH if weight.device.type == "cpu" else BATCH)
        recipe: dict[str, Any] = {
            "stimuli": len(self.table),
            "stimuli_sha256": self.table.sha256(),
            "ordinary_sha256": hashlib.sha256("\0".join(ORDINARY_TEXTS).encode()).hexdigest(),
            "dtype": str(weight.dtype).removeprefix("torch."),
            "norm_limit": self.norm_limit,
            "batch_tokens": batch_tokens,
            "max_tokens": self.max_tokens,
        }
        if len(self.table.pictures):
            recipe |= {"prompt": self.prompt, "max_tiles": self.max_tiles}
        encoder = self.encoder(processor)
        means = begin_means(
            self.output,
            model=self.identity,
            concepts=self.concepts,
            blocks=self.blocks,
            position=self.position,
            signs=self.table.signs,
            concepts_per_shard=self.concepts_per_shard or self.table.concepts_per_shard(STIMULI_PER_SHARD),
            recipe=recipe,
            ordinary=lambda: measure_ordinary(
                model,
                encoder.tokenizer,
                self.blocks,
                norm_limit=self.norm_limit,
                batch_tokens=batch_tokens,
                pictures=self._sample_pictures(processor),
            ),
            overwrite=overwrite,
        )
        self.store(means)
        return means

    def store(self, means: ConceptMeans) -> ActivationStore | None:
        """Begin the activation store, or open the one that was begun; None if none is kept."""
        if self.activations is None:
            return None
        return create_store(
            self.activations,
            model=means.model,
            blocks=means.blocks,
            median_norm=means.median_norm,
            shards=means.shards.count,
            norm_limit=self.norm_limit,
            recipe={**means.recipe, "positions": "all but the first", "stimuli_by": "order in the harvest"},
        )

    def missing(self, means: ConceptMeans) -> list[int]:
        """Return the shards that the means, or the store that is filled along with them, still lack."""
        store = self.store(means)
        return sorted({*means.missing, *(store.missing if store is not None else ())})

    def encoder(self, processor: Any, position: str | None = None) -> Encoder:
        """Return what turns items into token sequences."""
        return Encoder(
            processor,
            position or self.position,
            self.max_tokens,
            prompt=self.prompt,
            max_tiles=self.max_tiles,
        )

    def show(self, means: ConceptMeans, wanted: bool = True) -> contextlib.AbstractContextManager[Advance]:
        """Return the progress bar over the stimuli that are still to be read."""
        total = sum(len(self.table.places(means.rows(shard))) for shard in self.missing(means))
        return show("harvesting", total, unit="stimuli", shown=wanted)

    def _sample_pictures(self, processor: Any) -> Iterator[list[Stimulus]]:
        """Pictures from all over the table, for the norm of image tokens where the rule reads them."""
        if self.position in IMAGE_RULES:
            sample = self.table.sample_pictures(PICTURES_SAMPLED)
            # Numbered: one picture may stand for several concepts under one id.
            numbered = [replace(item, id=str(i)) for i, item in enumerate(sample)]
            yield from self.encoder(processor, "image").encode(numbered, 0, Losses())


class ShardWorker:
    """Makes shards of a plan; what is made does not depend on which worker makes it, or when.

    Example
    -------
    >>> ShardWorker(plan, plan.begin(model, processor), model, processor).make(7)
    512
    """

    def __init__(
        self, plan: HarvestPlan, means: ConceptMeans, model: torch.nn.Module, processor: Any
    ) -> None:
        self._table, self._means, self._store = plan.table, means, plan.store(means)
        self._reader = ShardReader.of(means, model, plan.encoder(processor))

    def make(self, shard: int, advance: Advance = lambda _: None) -> int:
        """Read one shard's items, write and commit it; return their number."""
        rows = self._means.rows(shard)
        items = self._table.select(rows)
        found, reading = self._reader.read(
            items,
            rows,
            self._means.signs,
            first=self._table.places(rows).start,
            keep=self._store is not None,
            advance=advance,
        )
        if self._store is not None and reading is not None:
            self._store.add(shard, reading.rows, text=reading.text, token=reading.token)
        self._means.add(shard, found)
        return len(items)
