"""From a corpus to its embeddings on disk; called again, it goes on where it stopped."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from daco_rt.corpus.embeddings import SHARD, EmbeddingStore, create_embeddings
from daco_rt.corpus.encoders import Encoder
from daco_rt.corpus.pairs import Corpus, Pair, Problems
from daco_rt.errors import DacoError
from daco_rt.progress import progress as show

WORKERS = min(8, os.cpu_count() or 1)


def embed_corpus(
    corpus: Corpus,
    encoder: Encoder,
    output: str | Path,
    *,
    batch: int = 64,
    workers: int = WORKERS,
    shard_pairs: int = SHARD,
    progress: bool = True,
) -> EmbeddingStore:
    """Embed every caption of a corpus, and every picture if encoder and corpus have them.

    Pairs whose picture cannot be opened get no row; ``EmbeddingStore.problems`` lists them and what the
    reader skipped.

    Parameters
    ----------
    corpus : iterated once, in order; on a resume what is committed is passed over without opening a picture.
    encoder : see ``load_encoder``.
    output : the store's folder.
    batch : texts and pictures in one forward pass.
    workers : threads that read and decode pictures while the encoder computes; two batches are held at a
    time. shard_pairs : pairs of the corpus behind one shard: what an interruption can cost.
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
    if workers < 1:
        raise DacoError(f"at least one worker must read pictures, got {workers}")
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
                pairs, text, image, problems = _embed(
                    share, corpus if images else None, encoder, batch, workers, advance
                )
                store.add(shard, pairs, text, image, problems)
            else:
                advance(len(share))
        if shard == 0 and not store.committed(0):
            raise DacoError(
                f"the corpus has no usable pair ({dict(corpus.problems.counts)}); see its problems"
            )
        store.finish(shard + 1, corpus.problems)
    if store.rows == 0:
        raise DacoError(f"no pair of the corpus could be embedded ({dict(store.problems().counts)})")
    return store


def _embed(
    share: list[Pair], corpus: Corpus | None, encoder: Encoder, batch: int, workers: int, advance: Any
) -> tuple[list[Pair], np.ndarray, np.ndarray | None, Problems]:
    """Embed one share; ``corpus`` opens the pictures, None leaves them out."""
    kept: list[Pair] = []
    problems = Problems()
    empty = np.zeros((0, encoder.dim), np.float32)
    texts, pictures = [empty], [empty]
    parts = [share[start : start + batch] for start in range(0, len(share), batch)]
    with ThreadPoolExecutor(workers) as pool:
        opening = _ahead(pool, corpus, parts) if corpus is not None else None
        for part in parts:
            size = len(part)
            if opening is not None:
                opened = list(zip(part, next(opening), strict=True))
                for pair, found in opened:
                    if isinstance(found, DacoError):
                        problems.add("picture broken", pair.id, str(found))
                good = [(pair, found) for pair, found in opened if not isinstance(found, DacoError)]
                part = [pair for pair, _ in good]
                if part:
                    pictures.append(encoder.images([picture for _, picture in good]))
            if part:
                texts.append(encoder.texts([pair.caption for pair in part]))
            kept += part
            advance(size)
    return kept, np.concatenate(texts), np.concatenate(pictures) if corpus is not None else None, problems


def _ahead(pool: ThreadPoolExecutor, corpus: Corpus, parts: list[list[Pair]]) -> Iterator[list[Any]]:
    """Yield each part's pictures, or the errors in their places, while the next part's are being opened."""

    def attempt(pair: Pair) -> Any:
        try:
            return corpus.open_image(pair.image_ref)
        except DacoError as error:
            return error

    waiting = None
    for part in parts:
        begun = [pool.submit(attempt, pair) for pair in part]
        if waiting is not None:
            yield [future.result() for future in waiting]
        waiting = begun
    if waiting is not None:
        yield [future.result() for future in waiting]


def _shares(corpus: Corpus, size: int) -> Iterator[list[Pair]]:
    pairs = iter(corpus)
    while share := list(islice(pairs, size)):
        yield share
