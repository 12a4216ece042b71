"""Arguments of save_pack for small packs of either operator."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from daco_rt.artifacts import Concept, ModelIdentity, Policy

DTYPES = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16, "int8": np.int8}
MODEL = ModelIdentity(12, 4, 100, 2, 1, "llama", (0.25, -0.5))


def arrays(
    op: str = "sae", dtype: str = "fp32", seed: int = 0, m: int = 9, d: int = 12, P: int = 4
) -> dict[str, Any]:
    rng = np.random.default_rng(seed)

    def weight(*shape: int, kind: Any = np.float32) -> np.ndarray:
        return rng.standard_normal(shape).astype(kind)

    limits = np.abs(weight(P, 4))
    limits[:, 3] = 0
    edit = {
        "gain": weight(P, m),
        "boost": weight(P, m),
        "undesirable": rng.random((P, m)) < 0.5,
        "shift": weight(P, d),
        "limits": limits,
    }
    if dtype == "int8":
        edit["scales"] = np.abs(weight(2, m)) + np.float32(0.1)
    if op == "sae":
        matrices = {"enc": weight(m, d, kind=DTYPES[dtype]), "dec": weight(m, d, kind=DTYPES[dtype])}
        return {**matrices, "enc_bias": weight(m), "threshold": weight(m), **edit}
    matrices = {"analysis": weight(m, d, kind=DTYPES[dtype]), "atoms": weight(m, d, kind=DTYPES[dtype])}
    return {**matrices, "bias": weight(m), "gram": weight(m, m, kind=np.float16), **edit}


def arguments(op: str = "sae", dtype: str = "fp32", seed: int = 0, **sizes: int) -> dict[str, Any]:
    return {
        "model": MODEL,
        "op": op,
        "coder": "topk" if op == "sae" else "omp",
        "k": 3,
        "k_out": 2,
        "operands": {block: arrays(op, dtype, seed + block, **sizes) for block in (1, 3)},
        "policies": [
            Policy("default", 2, "generated", (1, 3), "removes what must not surface"),
            Policy("gentle", 3, "all", (3,)),
        ],
        "default_policy": "default",
        "concepts": [
            Concept(4, "dagger", "undesirable", "weapons", "dagger.n.01", "a short knife\u2028for stabbing"),
            Concept(0, "crème brûlée", "desirable", "food"),
        ],
        "median_norm": {1: 10.5, 3: 20.25},
        "recipe": {"made by": "test", "numbers": [1, 2]},
    }
