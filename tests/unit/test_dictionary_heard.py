"""Labelled concepts that ordinary text holds are found, and lose their labels and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from daco_rt.artifacts import Concept, ConceptDictionary, save_dictionary
from daco_rt.concepts import ORDINARY_TEXTS
from daco_rt.dictionary import find_heard, without_heard
from daco_rt.dictionary.heard import ordinary_texts
from daco_rt.models import model_identity, resolve_checkpoint
from daco_rt.models.loading import load_torch
from daco_rt.models.residual import read_blocks

BLOCKS = (2, 3)
TEXT = ORDINARY_TEXTS[0]
PLACE = 5


@pytest.fixture(scope="module")
def host() -> Any:
    checkpoint = resolve_checkpoint(None, "pocket-internvl")
    return (*load_torch(checkpoint.path, "cpu"), model_identity(checkpoint))


@pytest.fixture(scope="module")
def dictionary(host: Any, tmp_path_factory: pytest.TempPathFactory) -> ConceptDictionary:
    """Atoms 0, 1 and 2 point at one token of an ordinary text at block 3, atom 3 away from it."""
    model, tokenizer, identity = host
    ids = tokenizer([TEXT], add_special_tokens=False)["input_ids"]
    [(_, streams)] = read_blocks(model, ids, BLOCKS)
    rows = {block: stream.numpy() for block, stream in streams.items()}
    means = {block: row[1:].mean(axis=0).astype(np.float32) for block, row in rows.items()}
    draw = np.random.default_rng(0)
    atoms = {block: draw.normal(size=(5, row.shape[1])).astype(np.float32) for block, row in rows.items()}
    token = rows[3][PLACE] - means[3]
    atoms[3][:4] = [token, token, token, -token]
    atoms[2][:4] = 0
    atoms[2][:4, 0] = 1e-3
    unit = {b: (a / np.linalg.norm(a, axis=1, keepdims=True)).astype(np.float16) for b, a in atoms.items()}
    labels = ("undesirable", "desirable", "neutral", "undesirable", "neutral")
    return save_dictionary(
        tmp_path_factory.mktemp("heard") / "d",
        model=identity,
        atoms=unit,
        means=means,
        median_norm={block: float(np.median(np.linalg.norm(row[1:], axis=1))) for block, row in rows.items()},
        concepts=[Concept(i, f"c{i}", label, "g", source="rules") for i, label in enumerate(labels)],
        recipe={"centre": "others"},
    )


def test_labelled_concepts_are_found_at_their_loudest_place(host: Any, dictionary: ConceptDictionary):
    model, tokenizer, _ = host
    ids = tokenizer([TEXT], add_special_tokens=False)["input_ids"][0]
    [(_, streams)] = read_blocks(model, [ids], [3])
    row = streams[3].numpy()[PLACE] - dictionary.mean(3)
    level = float(np.linalg.norm(row)) / dictionary.median_norm[3]
    found = find_heard(dictionary, model, tokenizer, least=level * 0.98, texts=[TEXT])
    assert [(one.concept, one.block, one.token) for one in found] == [
        (0, 3, tokenizer.decode([ids[PLACE]])),
        (1, 3, tokenizer.decode([ids[PLACE]])),
    ]
    assert found[0].level == pytest.approx(level, rel=2e-3)
    assert find_heard(dictionary, model, tokenizer, least=level * 1.02, texts=[TEXT]) == ()
    # Position 0 and massive activations are not heard.
    first = tokenizer.decode([ids[0]])
    assert find_heard(dictionary, model, tokenizer, least=0.0, texts=[first]) == ()
    quiet = replace(dictionary, median_norm=dict.fromkeys(BLOCKS, 1e-6))
    assert find_heard(quiet, model, tokenizer, least=0.0, texts=[TEXT]) == ()


def test_what_was_heard_is_neutral_and_nothing_else_changes(
    host: Any, dictionary: ConceptDictionary, tmp_path: Path
):
    model, tokenizer, _ = host
    heard = find_heard(dictionary, model, tokenizer, least=0.5, texts=[TEXT])
    assert {one.concept for one in heard} == {0, 1}
    made = without_heard(dictionary, heard, tmp_path / "d")
    assert [concept.label for concept in made.concepts] == ["neutral"] * 3 + ["undesirable", "neutral"]
    assert "in ordinary text at" in made.concepts[0].source and made.concepts[0].group == ""
    assert made.concepts[3:] == dictionary.concepts[3:]
    for block in BLOCKS:
        np.testing.assert_array_equal(made.atoms(block), dictionary.atoms(block))
        np.testing.assert_array_equal(made.mean(block), dictionary.mean(block))
    assert made.recipe["centre"] == "others" and set(made.recipe["heard"]) == {"c0", "c1"}
    assert made.median_norm == dictionary.median_norm


def test_the_chat_template_counts_as_ordinary_text(host: Any):
    tokenizer = host[1]
    assert ordinary_texts(object()) == ORDINARY_TEXTS
    if tokenizer.chat_template:
        assert "Hello." in ordinary_texts(tokenizer)[-1]
