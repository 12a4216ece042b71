"""Concept lists, stimuli, directions measured on a model, and the dictionaries that are shipped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from daco_rt.artifacts import ModelIdentity, load_dictionary
from daco_rt.concepts import ORDINARY_TEXTS, ConceptEntry, everyday_concepts, read_entries, stimuli_for
from daco_rt.dictionary import build_dictionary, dictionary_for, measure_directions, shipped_dictionaries
from daco_rt.errors import ArtifactError, DacoError, UnsupportedError
from daco_rt.models import model_identity, pocket, resolve_checkpoint

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


def _slow_directions(model: Any, tokenizer: Any, concepts: list[ConceptEntry], block: int) -> np.ndarray:
    """The definition, one text at a time and without rejection, through hidden states instead of hooks."""
    means, total, count = [], np.zeros(192), 0
    sums = []
    for entry in concepts:
        own = []
        for stimulus in stimuli_for(entry):
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
        sums.append((np.sum(own, axis=0), len(own)))
        total, count = total + sums[-1][0], count + len(own)
    for own_sum, own_count in sums:
        difference = own_sum / own_count - (total - own_sum) / (count - own_count)
        means.append(difference / np.linalg.norm(difference))
    return np.array(means)


def test_directions_are_the_contrast_of_word_readings(pocket_model: tuple[Any, Any, ModelIdentity]) -> None:
    model, tokenizer, _ = pocket_model
    concepts = list(everyday_concepts()[::40])
    blocks = model.model.language_model.layers
    before = [len(block._forward_hooks) for block in blocks]
    found = measure_directions(model, tokenizer, concepts, [3, 1], batch_tokens=200, progress=False)
    assert [len(block._forward_hooks) for block in blocks] == before
    assert sorted(found.atoms) == [1, 3] and found.rejected == {1: 0, 3: 0}
    assert found.readings == sum(len(stimuli_for(entry)) for entry in concepts)
    for block in (1, 3):
        np.testing.assert_allclose(
            found.atoms[block], _slow_directions(model, tokenizer, concepts, block), atol=2e-5
        )
        assert found.means[block].shape == (192,) and found.median_norm[block] > 1


def test_massive_activations_are_neither_read_nor_averaged(
    pocket_model: tuple[Any, Any, ModelIdentity],
) -> None:
    model, tokenizer, _ = pocket_model
    # With two dozen concepts none loses all of its texts to the damage below.
    concepts = list(everyday_concepts()[::13])
    clean = measure_directions(model, tokenizer, concepts, [2], progress=False)

    def measure_with(damage: Any) -> Any:
        def blow_up(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
            torn = output.clone()
            damage(torn)
            return torn

        handle = model.model.language_model.layers[2].register_forward_hook(blow_up)
        try:
            return measure_directions(model, tokenizer, concepts, [2], progress=False)
        finally:
            handle.remove()

    first = measure_with(lambda rows: rows[:, 0].mul_(1000))
    np.testing.assert_array_equal(first.atoms[2], clean.atoms[2])
    np.testing.assert_array_equal(first.means[2], clean.means[2])

    # A few words of real models blow up too; here every fifth text of a batch does.
    some = measure_with(lambda rows: rows[::5].mul_(1000))
    assert some.rejected[2] > 0
    assert np.linalg.norm(some.means[2]) < 4 * np.linalg.norm(clean.means[2])
    assert (some.norms[2] < 4 * clean.median_norm[2]).all()


def test_bad_requests_are_refused(pocket_model: tuple[Any, Any, ModelIdentity]) -> None:
    model, tokenizer, _ = pocket_model
    concepts = everyday_concepts()[:2]
    with pytest.raises(DacoError, match=r"0 to 5, got \[6\]"):
        measure_directions(model, tokenizer, concepts, [6], progress=False)
    with pytest.raises(DacoError, match=r"got \[\]"):
        measure_directions(model, tokenizer, concepts, [], progress=False)
    with pytest.raises(DacoError, match="at least two"):
        measure_directions(model, tokenizer, concepts[:1], [1], progress=False)
    with pytest.raises(UnsupportedError, match="no decoder blocks"):
        measure_directions(torch.nn.Linear(2, 2), tokenizer, concepts, [1], progress=False)


def test_a_built_dictionary_reads_back(pocket_model: tuple[Any, Any, ModelIdentity], tmp_path: Path) -> None:
    model, tokenizer, identity = pocket_model
    concepts = everyday_concepts()[:12]
    built = build_dictionary(
        model, tokenizer, concepts, [2, 4], tmp_path / "d", identity=identity, progress=False
    )
    loaded = load_dictionary(tmp_path / "d")
    assert (loaded.size, loaded.dim, loaded.dtype, loaded.blocks) == (12, 192, "fp16", (2, 4))
    assert [concept.name for concept in loaded.concepts] == [entry.name for entry in concepts]
    assert loaded.concepts[0].gloss == concepts[0].gloss
    assert loaded.model.matches(identity) and built.path == loaded.path
    norms = np.linalg.norm(loaded.atoms(2).astype(np.float64), axis=1)
    np.testing.assert_allclose(norms, 1, atol=2e-3)
    assert len(loaded.recipe["norms"]["2"]) == 12
    with pytest.raises(ArtifactError, match="already exists"):
        build_dictionary(model, tokenizer, concepts, [2], tmp_path / "d", identity=identity, progress=False)


def test_shipped_dictionaries_are_whole_and_small() -> None:
    assert dictionary_for("/models/other") is None
    shipped = shipped_dictionaries()
    assert set(shipped) == {"smol-internvl", "pocket-internvl"}
    wanted = {"smol-internvl": (576, (15, 16, 17, 18, 19), 30), "pocket-internvl": (192, (2, 3, 4), 6)}
    names = [entry.name for entry in everyday_concepts()]
    for label, path in shipped.items():
        assert dictionary_for(label) == path
        assert sum(file.stat().st_size for file in path.iterdir()) <= 2_000_000
        dictionary = load_dictionary(path)
        dim, blocks, layers = wanted[label]
        assert (dictionary.dim, dictionary.blocks, dictionary.dtype) == (dim, blocks, "fp16")
        assert dictionary.model.num_hidden_layers == layers
        assert [concept.name for concept in dictionary.concepts] == names
        # Centred directions must not share one big component, or pursuit could not tell them apart.
        atoms = dictionary.atoms(blocks[0]).astype(np.float32)
        assert np.abs(atoms @ atoms.T).mean() < 0.2


def test_shipped_pocket_dictionary_belongs_to_the_pocket_model(
    pocket_model: tuple[Any, Any, ModelIdentity],
) -> None:
    model, tokenizer, identity = pocket_model
    path = dictionary_for("pocket-internvl")
    assert path is not None
    dictionary = load_dictionary(path)
    assert dictionary.model.difference(identity) is None
    found = measure_directions(model, tokenizer, everyday_concepts(), [3], progress=False)
    np.testing.assert_allclose(dictionary.atoms(3).astype(np.float32), found.atoms[3], atol=1e-3)
    assert dictionary.median_norm[3] == pytest.approx(found.median_norm[3], rel=1e-4)
