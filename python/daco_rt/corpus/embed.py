"""From a corpus to its embeddings on disk; called again, it goes on where it stopped."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from daco_rt.corpus.embeddings import SHARD, EmbeddingStore, create_embeddings
from daco_rt.corpus.encoders import Encoder
from daco_rt.corpus.pairs import Corpus, Pair, Problems
from daco_rt.errors import DacoError
from daco_rt.progress import progress as show


def embed_corpus(
    corpus: Corpus,
    encoder: Encoder,
    output: str | Path,
    *,
    batch: int = 64,
    shard_pairs: int = SHARD,
    progress: bool = True,
) -> EmbeddingStore:
    """Embed every caption of a corpus, and every picture if encoder and corpus have them.

    Pairs whose picture cannot be opened get no row; they are counted and listed in the commits, and in
    ``corpus.problems``.

    Parameters
    ----------
    corpus : iterated once, in order; on a resume what is committed is passed over without opening a picture.
    encoder : see ``load_encoder``.
    output : the store's folder.
    batch : texts and pictures in one forward pass.
    shard_pairs : pairs of the corpus behind one shard: what an interruption can cost.
    progress : show a bar with rate and remaining time on standard error.

    Raises
    ------
    ArtifactError
        If the folder holds embeddings of another corpus or encoder, a vector is NaN, or the disk is full.
    DacoError
        If the corpus has no usable pair.

    Example
    -------
    >>> store = embed_corpus(open_corpus("webdataset:cc3m"), load_encoder("clip"), "embeddings/cc3m")
    >>> store.rows
    2905954
    """
    if batch < 1:
        raise DacoError(f"the batch must be at least 1, got {batch}")
    images = corpus.has_images and encoder.has_images
    store = create_embeddings(
        output,
        encoder=encoder.describe(),
        corpus=corpus.describe(),
        dim=encoder.dim,
        images=images,
        shard_pairs=shard_pairs,
    )
    if store.shards is not None:
        store.check()
        return store
    shard = 0
    with show("embedding", corpus.size, unit="pairs", shown=progress) as advance:
        for shard, share in enumerate(_shares(corpus, shard_pairs)):
            if not store.committed(shard):
                pairs, text, image, problems = _embed(share, corpus, encoder, batch, images, advance)
                store.add(shard, pairs, text, image, problems)
            else:
                advance(len(share))
        if shard == 0 and not store.committed(0):
            raise DacoError(
                f"the corpus has no usable pair ({dict(corpus.problems.counts)}); see its problems"
            )
        store.finish(shard + 1)
    if store.rows == 0:
        raise DacoError(f"no pair of the corpus could be embedded ({dict(store.problems().counts)})")
    return store


def _embed(
    share: list[Pair], corpus: Corpus, encoder: Encoder, batch: int, images: bool, advance: Any
) -> tuple[list[Pair], np.ndarray, np.ndarray | None, Problems]:
    kept: list[Pair] = []
    problems = Problems()
    texts, pictures = [], []
    for start in range(0, len(share), batch):
        part = share[start : start + batch]
        if images:
            opened = []
            for pair in part:
                try:
                    opened.append((pair, corpus.open_image(pair.image_ref)))
                except DacoError as error:
                    problems.add("picture broken", pair.id, str(error))
                    corpus.problems.add("picture broken", pair.id, str(error))
            part = [pair for pair, _ in opened]
            if part:
                pictures.append(encoder.images([picture for _, picture in opened]))
        if part:
            texts.append(encoder.texts([pair.caption for pair in part]))
        kept += part
        advance(min(batch, len(share) - start))
    empty = np.zeros((0, encoder.dim), np.float32)
    text = np.concatenate([empty, *texts])
    return kept, text, np.concatenate([empty, *pictures]) if images else None, problems


def _shares(corpus: Corpus, size: int) -> Iterator[list[Pair]]:
    pairs = iter(corpus)
    while share := list(islice(pairs, size)):
        yield share
