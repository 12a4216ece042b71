"""Concept means with numbers of the test's choosing, written and read as those of a harvest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from daco_rt.artifacts import Concept, ModelIdentity
from daco_rt.dictionary.means import ConceptMeans, Ordinary, ShardMeans, begin_means, open_means

LAYERS = 12


def make_means(
    path: Path,
    positive: Mapping[int, np.ndarray],
    negative: Mapping[int, np.ndarray] | None = None,
    *,
    counts: Mapping[int, np.ndarray] | None = None,
    negative_counts: Mapping[int, np.ndarray] | None = None,
    spread: float = 1.0,
    position: str = "word",
    concepts: Sequence[Concept] | None = None,
) -> ConceptMeans:
    """Means of block → [N, d], in two shards; seven readings each unless said otherwise."""
    n, d = next(iter(positive.values())).shape
    rng = np.random.default_rng(0)
    table = concepts or [
        Concept(i, f"c{i}", "undesirable", f"g{i % 3}", f"c{i}.n.01", f"gloss {i}") for i in range(n)
    ]
    signed = {(b, 1): a for b, a in positive.items()} | {(b, -1): a for b, a in (negative or {}).items()}
    number = {1: counts or {}, -1: negative_counts or {}}
    means = begin_means(
        path,
        model=ModelIdentity(d, LAYERS, 1000, 2, 1, "llama", (0.25, -0.5)),
        concepts=table,
        blocks=sorted(positive),
        position=position,
        signs=(1, -1) if negative else (1,),
        concepts_per_shard=-(-n // 2),
        recipe={"stimuli": "planted"},
        ordinary=lambda: Ordinary(
            {b: rng.standard_normal(d).astype(np.float32) for b in positive}, dict.fromkeys(positive, 10.0)
        ),
    )
    for shard in means.missing:
        part = slice(means.rows(shard).start, means.rows(shard).stop)
        size = len(means.rows(shard))
        means.add(
            shard,
            ShardMeans(
                {key: np.asarray(a[part], np.float32) for key, a in signed.items()},
                {(b, s): np.asarray(number[s].get(b, np.full(n, 7))[part], np.int64) for b, s in signed},
                {key: np.full(size, spread, np.float32) for key in signed},
                7 * size,
                {},
                {},
                [],
            ),
        )
    return open_means(path)
