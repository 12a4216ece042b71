"""Dictionaries, and the identity of the model they were made for."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from daco_rt.artifacts import Concept, ModelIdentity, load_dictionary, save_dictionary
from daco_rt.errors import ArtifactError

D, N = 8, 4
MODEL = ModelIdentity(D, 6, 100, 2, 1, "qwen2", (0.25, -0.5, 1e-3))


def make_dictionary(path: Path, dtype: Any = np.float32, **changes: Any) -> Path:
    rng = np.random.default_rng(2)
    given: dict[str, Any] = {
        "model": MODEL,
        "atoms": {block: rng.standard_normal((N, D)).astype(dtype) for block in (1, 4)},
        "means": {block: rng.standard_normal(D).astype(np.float32) for block in (1, 4)},
        "median_norm": {1: 1.5, 4: 2.5},
        "concepts": [
            Concept(
                i, f"c{i}", "undesirable" if i == 2 else "neutral", "", f"c{i}.n.01", f"gloss {i}", "rules"
            )
            for i in range(N)
        ],
        "recipe": {"corpus": "captions"},
        **changes,
    }
    save_dictionary(path, **given)
    return path


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_dictionary_round_trip(tmp_path: Path, dtype: Any) -> None:
    dictionary = load_dictionary(make_dictionary(tmp_path / "d", dtype))
    rng = np.random.default_rng(2)
    for block in (1, 4):
        np.testing.assert_array_equal(dictionary.atoms(block), rng.standard_normal((N, D)).astype(dtype))
    for block in (1, 4):
        np.testing.assert_array_equal(dictionary.mean(block), rng.standard_normal(D).astype(np.float32))
    assert (dictionary.size, dictionary.dim, dictionary.blocks) == (N, D, (1, 4))
    assert dictionary.dtype == ("fp32" if dtype is np.float32 else "fp16")
    assert dictionary.median_norm == {1: 1.5, 4: 2.5} and dictionary.recipe == {"corpus": "captions"}
    assert dictionary.concepts[2] == Concept(2, "c2", "undesirable", "", "c2.n.01", "gloss 2", "rules")
    assert dictionary.model == MODEL and dictionary.index("c3") == 3
    with pytest.raises(ArtifactError, match="has no concept 'c9' among its 4"):
        dictionary.index("c9")
    with pytest.raises(ArtifactError, match="has no block 2; available: 1, 4"):
        dictionary.atoms(2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"means": {1: np.zeros(D, np.float32)}}, "'block.4.mean' is missing"),
        ({"atoms": {}, "means": {}}, "there is no block"),
        ({"means": dict.fromkeys((1, 4), np.zeros(D))}, r"'block.1.mean' must be F32 \[8\], got F64"),
        (
            {"atoms": {1: np.zeros((N, D), np.float32), 4: np.zeros((3, D), np.float32)}},
            r"'block.4.atoms' must be F32 \[4, 8\]",
        ),
        (
            {"atoms": dict.fromkeys((1, 4), np.full((N, D), np.nan, np.float32))},
            "'block.1.atoms' holds a value that is nan",
        ),
        ({"atoms": dict.fromkeys((1, 4), np.zeros((N, D)))}, "must be an fp32 or fp16 matrix"),
        (
            {"concepts": [Concept(i, "c") for i in range(3)]},
            "one concept for each of the 4 atoms, in order, got 3",
        ),
        ({"concepts": [Concept(i, "c") for i in (1, 0, 2, 3)]}, "in order"),
        ({"median_norm": {1: 1.0, 4: -1.0}}, "median_norm"),
    ],
)
def test_dictionary_refuses(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ArtifactError, match=words):
        make_dictionary(tmp_path / "d", **changes)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["dictionary.safetensors", "concepts.jsonl", "manifest.json"])
def test_dictionary_damage_names_the_file(tmp_path: Path, name: str) -> None:
    path = make_dictionary(tmp_path / "d")
    raw = bytearray((path / name).read_bytes())
    raw[len(raw) // 2] ^= 0x04
    (path / name).write_bytes(raw)
    with pytest.raises(ArtifactError, match=name):
        load_dictionary(path)


def test_identity_survives_rounding_and_families() -> None:
    rng = np.random.default_rng(0)
    samples = rng.standard_normal(64) * 10.0 ** rng.uniform(-6, 1, 64)
    mine = ModelIdentity(576, 30, 49152, 9, 3, "llama", tuple(samples.tolist()))
    for dtype in (ml_dtypes.bfloat16, np.float16, np.float32):
        rounded = tuple(samples.astype(dtype).astype(float).tolist())
        other = ModelIdentity(576, 30, 49280, 9, 3, "qwen2", rounded)
        assert mine.matches(other) and other.matches(mine)
    assert not mine.matches(dataclasses.replace(mine, samples=tuple((samples * 1.02).tolist())))
    assert ModelIdentity.from_dict(json.loads(json.dumps(mine.to_dict()))) == mine


def test_identity_says_what_differs() -> None:
    assert MODEL.difference(MODEL) is None
    for changes, words in (
        ({"hidden_size": 9}, "made for hidden_size 8, the model has 9"),
        ({"num_hidden_layers": 9}, "made for num_hidden_layers 6, the model has 9"),
        ({"samples": (0.25,)}, "made with 3 sampled weights, the model gives 1"),
        ({"samples": (0.25, 0.5, 1e-3)}, "(1 of 3 sampled weights differ)"),
        ({"samples": (float("nan"), -0.5, 1e-3)}, "(1 of 3 sampled weights differ)"),
    ):
        difference = MODEL.difference(dataclasses.replace(MODEL, **changes))
        assert difference is not None and words in difference
    for bad in (
        None,
        {},
        {**MODEL.to_dict(), "samples": [float("inf")]},
        {**MODEL.to_dict(), "hidden_size": "8"},
    ):
        with pytest.raises(ArtifactError, match=r"^here: the model identity must hold hidden_size"):
            ModelIdentity.from_dict(bad, "here")


def test_atoms_may_be_made_while_they_are_written(tmp_path: Path) -> None:
    whole = {
        block: np.random.default_rng(block).standard_normal((N, D)).astype(np.float16) for block in (1, 4)
    }
    recipe: dict[str, Any] = {}

    def source(block: int, bad: float = 1.0) -> Any:
        def produce() -> Any:
            recipe[str(block)] = float(np.abs(whole[block]).max())
            yield whole[block][:3]
            yield (whole[block][3:] * np.float16(bad)).astype(np.float16)

        return "F16", (N, D), produce

    made = make_dictionary(
        tmp_path / "d", np.float16, atoms={block: source(block) for block in (1, 4)}, recipe=recipe
    )
    loaded = load_dictionary(made)
    for block in (1, 4):
        np.testing.assert_array_equal(loaded.atoms(block), whole[block])
    assert set(loaded.recipe) == {"1", "4"}
    for broken in (np.nan, np.inf):
        with pytest.raises(ArtifactError, match=r"block\.4\.atoms"):
            make_dictionary(tmp_path / "e", np.float16, atoms={1: source(1), 4: source(4, broken)})
        assert not (tmp_path / "e").exists()
