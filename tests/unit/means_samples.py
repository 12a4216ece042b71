"""Concept means with numbers of the test's choosing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from daco_rt.artifacts import Concept, ModelIdentity


@dataclass
class StandIn:
    path: Path
    model: ModelIdentity
    blocks: tuple[int, ...]
    concepts: tuple[Concept, ...]
    position: str
    median_norm: dict[int, float]
    recipe: dict[str, Any]
    means: dict
    counts: dict
    spreads: dict
    ordinaries: dict

    @property
    def dim(self):
        return self.model.hidden_size

    def mean(self, block, sign=1):
        return self.means[block, sign].copy()

    def count(self, block, sign=1):
        return self.counts[block, sign].copy()

    def spread(self, block, sign=1):
        return self.spreads[block, sign].copy()

    def ordinary(self, block):
        return self.ordinaries[block].copy()

    def rejected(self, block):
        return 0


def make_means(
    path: Path,
    positive: Mapping[int, np.ndarray],
    negative: Mapping[int, np.ndarray] | None = None,
    *,
    counts: Mapping[int, np.ndarray] | None = None,
    negative_counts: Mapping[int, np.ndarray] | None = None,
    spread: float = 1.0,
    position: str = "word",
    concepts: tuple[Concept, ...] | None = None,
) -> Any:
    n, d = next(iter(positive.values())).shape
    rng = np.random.default_rng(0)
    table = concepts or tuple(
        Concept(
            i, f"c{i}", "undesirable" if i % 3 == 0 else "neutral", f"g{i % 3}", f"c{i}.n.01", f"gloss {i}"
        )
        for i in range(n)
    )
    signed = {(b, 1): a for b, a in positive.items()} | {(b, -1): a for b, a in (negative or {}).items()}
    number = {1: counts or {}, -1: negative_counts or {}}
    return StandIn(
        path,
        ModelIdentity(d, 12, 1000, 2, 1, "llama", (0.0,) * 4),
        tuple(sorted(positive)),
        table,
        position,
        dict.fromkeys(positive, 10.0),
        {"stimuli": "planted"},
        signed,
        {(b, s): np.asarray(number[s].get(b, np.full(n, 7)), np.int64) for b, s in signed},
        {key: np.full(n, spread, np.float32) for key in signed},
        {b: rng.standard_normal(d).astype(np.float32) for b in positive},
    )
