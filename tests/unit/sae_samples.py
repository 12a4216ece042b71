"""Small synthetic worlds for the tests of sparse autoencoders: rows that are sums of a few known atoms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from daco_rt.artifacts import Concept, ConceptDictionary, ModelIdentity, save_dictionary
from daco_rt.sae import ActivationStore, SaeTraining, create_store, open_store

DIM, ATOMS, BLOCK = 16, 24, 3
MODEL = ModelIdentity(DIM, 6, 100, 2, 1, "llama", (0.25, -0.5))
CENTRE = np.linspace(-2, 2, DIM)


def atoms(seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((ATOMS, DIM))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def rows(count: int, seed: int = 1) -> np.ndarray:
    """Sums of about two atoms around a centre, with a little noise."""
    random = np.random.default_rng(seed)
    codes = np.where(random.random((count, ATOMS)) < 2 / ATOMS, random.random((count, ATOMS)) * 2 + 1, 0)
    return (codes @ atoms() + CENTRE + random.standard_normal((count, DIM)) * 0.02).astype(np.float32)


def store(path: Path, *, shards: int = 4, per_shard: int = 200, **options: Any) -> ActivationStore:
    made = create_store(
        path,
        model=MODEL,
        blocks=[BLOCK],
        median_norm={BLOCK: 6.0},
        shards=shards,
        norm_limit=100.0,
        **options,
    )
    for shard in range(shards):
        made.add(
            shard,
            {BLOCK: rows(per_shard, seed=10 + shard)},
            text=np.arange(per_shard),
            token=np.ones(per_shard, int),
        )
    return open_store(path)


def dictionary(path: Path, identity: ModelIdentity = MODEL) -> ConceptDictionary:
    """Atoms 0 to 5 are undesirable, 6 to 8 desirable."""
    table = [
        Concept(
            i,
            f"concept {i}",
            "undesirable" if i < 6 else "desirable" if i < 9 else "neutral",
            "weapons" if i < 6 else "",
        )
        for i in range(ATOMS)
    ]
    return save_dictionary(
        path,
        model=identity,
        atoms={BLOCK: atoms()},
        means={BLOCK: CENTRE.astype(np.float32)},
        median_norm={BLOCK: 6.0},
        concepts=table,
    )


def quick(**changes: Any) -> SaeTraining:
    """A training of a second or less."""
    base: dict[str, Any] = {
        "k": 3, "steps": 60, "batch": 64, "lr": 2e-3, "buffer_rows": 256, "eval_rows": 256,
        "log_every": 10, "checkpoint_every": 20,
    }  # fmt: skip
    return SaeTraining(**{**base, **changes})
