"""From texts to rows of the residual stream: into a store, once for all blocks, or live while training."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from daco_rt.artifacts import ModelIdentity
from daco_rt.errors import DacoError
from daco_rt.models.residual import read_blocks, text_model_of
from daco_rt.progress import progress as show
from daco_rt.sae.store import NORM_LIMIT, ActivationStore, create_store, open_store


def harvest_activations(
    model: torch.nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    blocks: Sequence[int],
    output: str | Path,
    *,
    identity: ModelIdentity,
    position: str = "all",
    kept: Sequence[Sequence[int]] | None = None,
    dtype: str = "bf16",
    median_norm: Mapping[int, float] | None = None,
    norm_limit: float = NORM_LIMIT,
    texts_per_shard: int = 512,
    batch_tokens: int = 4096,
    max_tokens: int = 512,
    progress: bool = True,
) -> ActivationStore:
    """Fill an activation store with the residual stream of texts; called again, it goes on where it stopped.

    Every token but the first of each text is stored, or the ``kept`` ones. Texts are cut at ``max_tokens``;
    those without a token are skipped and counted in the commits by their absence.

    Parameters
    ----------
    model : a Hugging Face causal or image-text model.
    tokenizer : the model's own; it adds no special tokens, so write chat markers into the texts.
    texts : what to read.
    blocks : 0-based decoder blocks whose outputs are stored, all in one pass.
    output : the store's folder.
    identity : of the model's checkpoint.
    position : what the store calls ``kept``, which are the positions of each text's rows
        (``dictionary.rows.read_rows``); without them all but the first.
    dtype : "bf16" or "fp32".
    median_norm : block → median norm of the stream, as a dictionary of the model records it; by default the
        median over the first shard.
    norm_limit : rows above this multiple of the median are rejected.
    texts_per_shard : texts behind one shard; memory grows with it.
    batch_tokens : tokens in one forward pass, padding included.
    progress : show a progress bar on standard error.

    Raises
    ------
    ArtifactError
        If the folder holds a store of other texts or settings, a text gives NaN, or the disk is full.
    DacoError
        If there is no text or a block does not exist.

    Example
    -------
    >>> store = harvest_activations(model, tokenizer, texts, [15, 16], "stores/smol", identity=identity)
    >>> store.rows(16)
    31220
    """
    reader = TextReader(
        model, tokenizer, texts, tuple(blocks), texts_per_shard, batch_tokens, max_tokens, position, kept
    )
    first = None
    norms = dict(median_norm or {})
    output = Path(output)
    if not norms and (output / "store.json").is_file():
        norms = open_store(output, complete=False).median_norm
    if not norms:
        first = reader.read(0)
        norms = _medians(first)
    store = create_store(
        output,
        model=identity,
        blocks=blocks,
        median_norm=norms,
        shards=reader.shards,
        dtype=dtype,
        norm_limit=norm_limit,
        recipe=reader.describe(),
    )
    missing = store.missing
    silent = contextlib.nullcontext(lambda _: None)
    with show("reading activations", len(missing), unit="shards") if progress else silent as advance:
        for shard in missing:
            found = first if shard == 0 and first is not None else reader.read(shard)
            store.add(shard, found.rows, text=found.text, token=found.token)
            advance(1)
    return store


@dataclass(frozen=True)
class Reading:
    """Rows of one shard's texts: block → [n, d] fp32, and of each row its text and its position in it."""

    rows: dict[int, np.ndarray]
    text: np.ndarray
    token: np.ndarray


@dataclass(frozen=True, eq=False)
class TextReader:
    """Reads shards of texts through a model. Equal shards give equal rows, whatever was read before."""

    model: torch.nn.Module
    tokenizer: Any
    texts: Sequence[str]
    blocks: tuple[int, ...]
    texts_per_shard: int = 512
    batch_tokens: int = 4096
    max_tokens: int = 512
    position: str = "all"
    kept: Sequence[Sequence[int]] | None = None

    def __post_init__(self) -> None:
        if not self.texts:
            raise DacoError("there is no text to read activations from; give one at least")
        for name in ("texts_per_shard", "batch_tokens", "max_tokens"):
            if getattr(self, name) < 1:
                raise DacoError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.kept is not None and len(self.kept) != len(self.texts):
            raise DacoError(f"kept is of {len(self.kept)} texts, expected {len(self.texts)}")

    @property
    def shards(self) -> int:
        """Return the number of shards that the texts make."""
        return -(-len(self.texts) // self.texts_per_shard)

    def read(self, shard: int) -> Reading:
        """Run the texts of one shard through the model."""
        start = shard * self.texts_per_shard
        texts = list(self.texts[start : start + self.texts_per_shard])
        ids = [row[: self.max_tokens] for row in self.tokenizer(texts, add_special_tokens=False)["input_ids"]]
        streams: dict[int, dict[int, np.ndarray]] = {}
        for i, found in read_blocks(self.model, ids, self.blocks, batch_tokens=self.batch_tokens):
            streams[i] = {block: stream.numpy() for block, stream in found.items()}
        order = sorted(streams)
        if not order:
            dim = text_model_of(self.model).embed_tokens.weight.shape[1]
            empty = np.zeros((0, dim), np.float32)
            return Reading(dict.fromkeys(self.blocks, empty), np.zeros(0, np.int32), np.zeros(0, np.int32))
        places = [self._places(start + i, len(ids[i])) for i in order]
        return Reading(
            {
                block: np.concatenate([streams[i][block][at] for i, at in zip(order, places, strict=True)])
                for block in self.blocks
            },
            np.repeat(np.asarray(order, np.int32) + start, [len(at) for at in places]),
            np.concatenate(places),
        )

    def _places(self, text: int, length: int) -> np.ndarray:
        """Return the positions of a text's rows, int32; what was cut off has none."""
        if self.kept is None:
            return np.arange(length, dtype=np.int32)
        return np.asarray([at for at in self.kept[text] if at < length], np.int32)

    def describe(self) -> dict[str, Any]:
        """Return what is read, for the store: a hash of the texts, and the settings that shape the rows."""
        digest = hashlib.sha256()
        for text in self.texts:
            digest.update(text.encode(errors="surrogatepass") + b"\0")
        rows: dict[str, Any] = {"positions": "all but the first"}
        if self.kept is not None:
            places = json.dumps([list(map(int, at)) for at in self.kept])
            rows = {"positions": self.position}
            rows["positions_sha256"] = hashlib.sha256(places.encode()).hexdigest()
        return {
            "texts": len(self.texts),
            "texts_sha256": digest.hexdigest(),
            "texts_per_shard": self.texts_per_shard,
            "batch_tokens": self.batch_tokens,
            "max_tokens": self.max_tokens,
            **rows,
        }


@dataclass(eq=False)
class LiveSource:
    """Rows of one block straight from the model, for training without a store; a chunk is a share of the
    texts.

    The stream is computed again in every epoch and, after a resume, for the buffer that was in use.

    Example
    -------
    >>> source = LiveSource(TextReader(model, tokenizer, texts, (16,)), identity.hidden_size)
    >>> train_sae(source, "saes/b16", model=identity, block=16, training=SaeTraining(latents=2048))
    """

    reader: TextReader
    dim: int
    norm_limit: float = NORM_LIMIT
    _median: float | None = field(default=None, repr=False)

    @property
    def chunks(self) -> int:
        """Return the number of shares."""
        return self.reader.shards

    @property
    def block(self) -> int:
        """Return the block that is read."""
        return self.reader.blocks[0]

    def chunk(self, index: int) -> np.ndarray:
        """Return the rows of one share of the texts, fp32 [n, d], without first tokens and outliers."""
        if self._median is None:
            self._median = _medians(self.reader.read(0))[self.block]
        found = self.reader.read(index)
        rows = found.rows[self.block]
        if not np.isfinite(rows).all():
            bad = found.text[np.flatnonzero(~np.isfinite(rows).all(axis=1))[0]]
            raise DacoError(
                f"text {bad} gives NaN or Inf at block {self.block}; leave it out, or run in fp32"
            )
        kept = (found.token > 0) & (np.linalg.norm(rows, axis=1) <= self.norm_limit * self._median)
        return rows[kept]

    def describe(self) -> dict[str, Any]:
        """Return what the rows are, for the artifact."""
        recipe = self.reader.describe()
        return {"kind": "live", "block": self.block, "norm_limit": self.norm_limit, "recipe": recipe}


def _medians(found: Reading) -> dict[int, float]:
    inner = found.token > 0
    if not inner.any():
        raise DacoError(
            "the first texts have no row to read behind their first token; give longer ones first"
        )
    return {
        block: float(np.median(np.linalg.norm(rows[inner], axis=1))) for block, rows in found.rows.items()
    }
