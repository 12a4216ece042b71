"""Concept lists, stimuli, directions measured on a model, and the dictionaries that are shipped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from daco_rt.artifacts import Concept, ConceptDictionary, ModelIdentity, load_dictionary
from daco_rt.concepts import (
    ORDINARY_TEXTS,
    ConceptEntry,
    everyday_concepts,
    make_stimuli,
    read_entries,
    shipped_table,
    stimuli_for,
    subset_concepts,
)
from daco_rt.dictionary import (
    build_dictionary,
    dictionary_for,
    harvest_means,
    shipped_dictionaries,
    text_items,
)
from daco_rt.errors import ArtifactError
from daco_rt.models import model_identity, pocket, resolve_checkpoint
from daco_rt.scenes import scene_concepts

HEADER = "name\tlabel\tgroup\tplural\tgloss\n"


@pytest.fixture(scope="module")
def pocket_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, ModelIdentity]:
    from transformers import InternVLForConditionalGeneration, PreTrainedTokenizerFast

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DACO_RT_CACHE", str(tmp_path_factory.mktemp("cache")))
        folder = pocket.ensure(progress=False)
    model = InternVLForConditionalGeneration.from_pretrained(folder).eval()
    identity = model_identity(resolve_checkpoint("internvl", folder))
    return model, PreTrainedTokenizerFast.from_pretrained(folder), identity


def test_built_in_list_has_the_promised_mix() -> None:
    concepts = everyday_concepts()
    labels = [entry.label for entry in concepts]
    assert len(concepts) == 320
    assert (labels.count("undesirable"), labels.count("desirable"), labels.count("neutral")) == (86, 11, 223)
    by_name = {entry.name: entry for entry in concepts}
    assert by_name["dagger"].group == "weapons" and by_name["giraffe"].label == "neutral"
    for entry in concepts:
        assert entry.name not in entry.gloss.split(), f"the gloss of {entry.name} repeats it"


@pytest.mark.parametrize(
    ("line", "phrase", "plural"),
    [
        ("dagger\tneutral\tg\t\tx", "a dagger", "daggers"),
        ("orange\tneutral\tg\t\tx", "an orange", "oranges"),
        ("bus\tneutral\tg\t\tx", "a bus", "buses"),
        ("mouse\tneutral\tg\tmice\tx", "a mouse", "mice"),
        ("opium\tneutral\tg\t-\tx", "opium", None),
    ],
)
def test_articles_and_plurals(tmp_path: Path, line: str, phrase: str, plural: str | None) -> None:
    path = tmp_path / "list.tsv"
    path.write_text(HEADER + line + "\n")
    (entry,) = read_entries(path)
    assert (entry.phrase, entry.plural) == (phrase, plural)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,label\n", "line 1: expected the columns"),
        (HEADER, "holds no concept"),
        (HEADER + "a\tneutral\tg\tx\n", "line 2: expected 5 columns, got 4"),
        (HEADER + "a\tbad\tg\t\tx\n", "line 2: label must be"),
        (HEADER + "a\tneutral\tg\t\t\n", "line 2: name and gloss"),
        (HEADER + "a\tneutral\tg\t\tx\na\tneutral\tg\t\ty\n", "line 3: 'a' comes twice"),
    ],
)
def test_bad_lists_are_refused_by_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "list.tsv"
    path.write_text(text)
    with pytest.raises(ArtifactError, match=message):
        read_entries(path)
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_entries(tmp_path / "none.tsv")


def test_each_stimulus_marks_its_word() -> None:
    for entry in everyday_concepts():
        stimuli = stimuli_for(entry)
        assert len(stimuli) == (7 if entry.plural is None else 8)
        assert len({stimulus.text for stimulus in stimuli}) == len(stimuli)
        for stimulus in stimuli:
            word = stimulus.text[stimulus.start : stimulus.end].lower()
            assert word in (entry.name, entry.plural) and stimulus.start > 0
    assert all(text.startswith("<|im_start|>") for text in ORDINARY_TEXTS)


def _measure(
    pocket_model: tuple[Any, Any, ModelIdentity],
    concepts: Sequence[ConceptEntry],
    blocks: list[int],
    path: Path,
) -> ConceptDictionary:
    model, tokenizer, identity = pocket_model
    table = [Concept(i, e.name, e.label, e.group, gloss=e.gloss) for i, e in enumerate(concepts)]
    items = text_items(make_stimuli(concepts).stimuli, table)
    means = harvest_means(
        model, tokenizer, table, items, blocks, path / "means", identity=identity, progress=False
    )
    return build_dictionary(means, path / "dictionary", progress=False)


def _slow_directions(model: Any, tokenizer: Any, concepts: Sequence[ConceptEntry], block: int) -> np.ndarray:
    """The definition, one text at a time, through hidden states instead of hooks."""
    means = []
    texts = make_stimuli(concepts).stimuli
    for row in range(len(concepts)):
        own = []
        for stimulus in (text for text in texts if text.concept == row):
            encoded = tokenizer(stimulus.text, return_offsets_mapping=True, add_special_tokens=False)
            tokens = [
                i
                for i, (a, b) in enumerate(encoded["offset_mapping"])
                if a < stimulus.end and b > stimulus.start
            ]
            with torch.inference_mode():
                states = model.model.language_model(
                    input_ids=torch.tensor([encoded["input_ids"]]), output_hidden_states=True
                ).hidden_states
            own.append(states[block + 1][0, tokens[-1]].double().numpy())
        means.append(np.mean(own, axis=0))
    rows = [own - np.mean(means[:i] + means[i + 1 :], axis=0) for i, own in enumerate(means)]
    return np.array([row / np.linalg.norm(row) for row in rows])


def test_directions_are_the_contrast_of_word_readings(
    pocket_model: tuple[Any, Any, ModelIdentity], tmp_path: Path
) -> None:
    concepts = list(everyday_concepts()[::40])
    dictionary = _measure(pocket_model, concepts, [3, 1], tmp_path)
    assert (dictionary.size, dictionary.dim, dictionary.dtype, dictionary.blocks) == (8, 192, "fp16", (1, 3))
    assert [concept.name for concept in dictionary.concepts] == [entry.name for entry in concepts]
    assert dictionary.concepts[0].gloss == concepts[0].gloss and dictionary.model.matches(pocket_model[2])
    for block in (1, 3):
        wanted = _slow_directions(*pocket_model[:2], concepts, block)
        # fp16 atoms; the readings themselves agree to 1e-5.
        np.testing.assert_allclose(dictionary.atoms(block).astype(np.float64), wanted, atol=5e-4)
        assert dictionary.mean(block).shape == (192,) and dictionary.median_norm[block] > 1


def test_shipped_dictionaries_are_whole_and_small() -> None:
    assert dictionary_for("/models/other") is None
    shipped = shipped_dictionaries()
    wanted = {
        "smol-internvl": (576, (15, 16, 17, 18, 19), 30),
        "scenes-internvl": (192, (0, 1, 2, 3, 4, 5), 6),
        "pocket-internvl": (192, (2, 3, 4), 6),
    }
    assert set(shipped) == set(wanted)
    small = subset_concepts(shipped_table(), 1500)
    names = {
        "smol-internvl": [concept.name for concept in small],
        "scenes-internvl": [*(concept.name for concept in scene_concepts()), "thing"],
        "pocket-internvl": [entry.name for entry in everyday_concepts()],
    }
    for label, path in shipped.items():
        assert dictionary_for(label) == path
        assert sum(file.stat().st_size for file in path.iterdir()) <= 10_000_000
        dictionary = load_dictionary(path)
        dim, blocks, layers = wanted[label]
        assert (dictionary.dim, dictionary.blocks, dictionary.dtype) == (dim, blocks, "fp16")
        assert dictionary.model.num_hidden_layers == layers
        assert [concept.name for concept in dictionary.concepts] == names[label]
        # Centred directions must not share one big component, or pursuit could not tell them apart. The first
        # blocks of scenes do: before block 2 the model hardly knows what it will say.
        atoms = dictionary.atoms(3 if label == "scenes-internvl" else blocks[0]).astype(np.float32)
        assert np.abs(atoms @ atoms.T).mean() < 0.2
    # Labels are the table's, but for concepts that ordinary text holds.
    smol = load_dictionary(shipped["smol-internvl"])
    changed = {mine.name for mine, row in zip(smol.concepts, small, strict=True) if mine.label != row.label}
    assert changed == set(smol.recipe["heard"]) and len(changed) < 10


def test_shipped_pocket_dictionary_belongs_to_the_pocket_model(
    pocket_model: tuple[Any, Any, ModelIdentity], tmp_path: Path
) -> None:
    identity = pocket_model[2]
    path = dictionary_for("pocket-internvl")
    assert path is not None
    dictionary = load_dictionary(path)
    assert dictionary.model.difference(identity) is None
    fresh = _measure(pocket_model, everyday_concepts(), [3], tmp_path)
    assert dictionary.median_norm[3] == pytest.approx(fresh.median_norm[3], rel=1e-4)
    # The texts may have been others; the concepts are the same.
    cosines = dictionary.atoms(3).astype(np.float32) @ fresh.atoms(3).astype(np.float32).T
    assert (cosines.argmax(axis=1) == np.arange(dictionary.size)).mean() > 0.95
    assert np.median(np.diag(cosines)) > 0.6
