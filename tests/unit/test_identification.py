"""Held-out texts, and finding the concept of a text among a dictionary's atoms on a real small model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from daco_rt.artifacts import Concept, ConceptDictionary, ModelIdentity, save_dictionary
from daco_rt.cli import main
from daco_rt.concepts import TextStimulus, everyday_concepts, load_stimuli, make_stimuli, shipped_table
from daco_rt.concepts.held_out import WITHOUT_WORD, definition_stimuli, split_stimuli
from daco_rt.dictionary.identification import Identification, identify, match_concepts, rank_rows, read_words
from daco_rt.errors import ArtifactError, DacoError
from daco_rt.models import model_identity, pocket, resolve_checkpoint

BLOCKS = (1, 3)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, ModelIdentity]:
    from transformers import InternVLForConditionalGeneration, PreTrainedTokenizerFast

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DACO_RT_CACHE", str(tmp_path_factory.mktemp("cache")))
        folder = pocket.ensure(progress=False)
    model = InternVLForConditionalGeneration.from_pretrained(folder).eval()
    identity = model_identity(resolve_checkpoint("internvl", folder))
    return model, PreTrainedTokenizerFast.from_pretrained(folder), identity


@pytest.fixture(scope="module")
def texts() -> list[TextStimulus]:
    return make_stimuli(everyday_concepts()[:20], count=4).stimuli


# ---- texts


def test_held_out_texts_are_other_texts_of_the_same_concepts() -> None:
    table = shipped_table()[:50]
    made = make_stimuli(table, count=12).stimuli
    seen, unseen = split_stimuli(made, harvest=7)
    assert not {s.text for s in seen} & {s.text for s in unseen}
    assert Counter(s.concept for s in seen) == dict.fromkeys(range(50), 7)
    assert Counter(s.concept for s in unseen) == dict.fromkeys(range(50), 2)
    assert seen == make_stimuli(table, count=7).stimuli
    for options in ({"harvest": 12}, {"harvest": 0}, {"harvest": 7, "held_out": 0}):
        with pytest.raises(ArtifactError):
            split_stimuli(made, **options)


def test_definitions_never_say_their_word() -> None:
    skipped: Counter[str] = Counter()
    table = shipped_table()
    made = definition_stimuli(table, skipped=skipped)
    assert len(made) + 2 * skipped.total() == 2 * len(table) and 0 < skipped.total() < len(table) / 2
    assert Counter(s.kind for s in made) == dict.fromkeys(WITHOUT_WORD, len(made) // 2)
    for s in made[::97]:
        assert f" {s.name.lower()} " not in f" {s.text.lower()} " and s.end == len(s.text) == s.start + 1
    entry = everyday_concepts()[0]
    dagger = definition_stimuli([entry])
    assert dagger[0].text == f"<|im_start|>{entry.gloss[0].upper()}{entry.gloss[1:]}"
    assert dagger[1].text.endswith("<|im_start|>assistant\n")


def test_the_command_writes_both_files(tmp_path: Path, capsys: Any) -> None:
    table = tmp_path / "table.jsonl"
    from daco_rt.concepts import save_table

    save_table(shipped_table()[:30], table)
    seen, unseen = tmp_path / "seen.jsonl", tmp_path / "unseen.jsonl.gz"
    command = ["stimuli", str(table), "--output", str(seen), "--held-out", str(unseen), "--json"]
    assert main(command) == 0
    said = json.loads(capsys.readouterr().out)
    first, second = list(load_stimuli(seen)), list(load_stimuli(unseen))
    assert (said["texts"], said["held_out"]) == (len(first), len(second)) == (210, len(second))
    assert said["concepts_by_texts"] == {"7": 30}
    assert not {s.text for s in first} & {s.text for s in second}
    assert main(command) == 2 and "already exists" in capsys.readouterr().err
    unseen.unlink()
    assert main(command) == 2 and not unseen.exists()


# ---- ranks


def test_ranks_count_the_atoms_that_are_nearer() -> None:
    rng = np.random.default_rng(1)
    atoms, rows = rng.standard_normal((50, 9)), rng.standard_normal((40, 9))
    owners = rng.integers(0, 50, 40)
    exact = rows @ (atoms / np.linalg.norm(atoms, axis=1, keepdims=True)).T
    wanted = [1 + int((row > row[own]).sum()) for row, own in zip(exact, owners, strict=True)]
    np.testing.assert_array_equal(rank_rows(rows, owners, 7 * atoms), wanted)
    # A twin of the right atom is no find.
    twins = np.array([[1.0, 0], [1.0, 0], [0, 1]])
    np.testing.assert_array_equal(rank_rows(twins[:1], np.array([1]), twins), [2])


def slow_readings(model: Any, tokenizer: Any, stimuli: Sequence[TextStimulus], block: int) -> np.ndarray:
    rows = []
    for s in stimuli:
        encoded = tokenizer(s.text, return_offsets_mapping=True, add_special_tokens=False)
        token = [i for i, (a, b) in enumerate(encoded["offset_mapping"]) if a < s.end and b > s.start][-1]
        with torch.inference_mode():
            states = model.model.language_model(
                input_ids=torch.tensor([encoded["input_ids"]]), output_hidden_states=True
            ).hidden_states
        rows.append(states[block + 1][0, token].numpy())
    return np.array(rows)


def test_readings_are_those_at_the_words(reader: Any, texts: list[TextStimulus]) -> None:
    model, tokenizer, _ = reader
    stimuli = [*texts[:9], TextStimulus(0, "x", "sentence", "d", 0, 1), *texts[9:14]]
    read = list(read_words(model, tokenizer, stimuli, BLOCKS, batch_tokens=60, chunk=4))
    assert [start for start, _, _ in read] == [0, 4, 8, 12]
    good = np.concatenate([each for _, _, each in read])
    assert good.tolist() == [i != 9 for i in range(15)]
    for block in BLOCKS:
        rows = np.concatenate([found[block] for _, found, _ in read])
        assert not rows[9].any()
        np.testing.assert_allclose(rows[good], slow_readings(model, tokenizer, texts[:14], block), atol=1e-4)


def plant(
    path: Path, reader: Any, texts: list[TextStimulus], order: Sequence[int], **changes: Any
) -> ConceptDictionary:
    """A dictionary whose atom of concept i is what text order[i] gives: what identification must find."""
    model, tokenizer, identity = reader
    named = [next(s for s in texts if s.concept == i) for i in range(20)]
    means = {b: np.full(192, 0.01 * b, np.float32) for b in BLOCKS}
    readings = {b: slow_readings(model, tokenizer, named, b) - means[b] for b in BLOCKS}
    return save_dictionary(
        path,
        model=identity,
        atoms={b: rows[list(order)].astype(np.float32) for b, rows in readings.items()},
        means=means,
        median_norm={b: changes.get("norm", 1e3) for b in BLOCKS},
        concepts=[Concept(i, s.name, group="even" if i % 2 == 0 else "") for i, s in enumerate(named)],
    )


def test_planted_atoms_are_found_and_others_are_not(
    reader: Any, texts: list[TextStimulus], tmp_path: Path
) -> None:
    model, tokenizer, _ = reader
    firsts = [next(s for s in texts if s.concept == i) for i in range(20)]
    right = plant(tmp_path / "right", reader, texts, range(20))
    found = identify(right, model, tokenizer, firsts, progress=False)
    assert [found.top(block) for block in BLOCKS] == [1.0, 1.0] and found.best_block() == 1
    # Each atom answers to the name of its left neighbour: nothing is right, and ranks say so.
    wrong = plant(tmp_path / "wrong", reader, texts, [(i + 1) % 20 for i in range(20)])
    missed = identify(wrong, model, tokenizer, firsts, progress=False)
    assert [missed.top(block) for block in BLOCKS] == [0.0, 0.0]
    assert [concept.name for concept in missed.concepts] == [s.name for s in firsts]
    rows = slow_readings(model, tokenizer, firsts, 3) - right.mean(3)
    np.testing.assert_array_equal(missed.ranks["ordinary"][3], rank_rows(rows, np.arange(20), wrong.atoms(3)))
    assert missed.top(3, 20) == 1.0


def test_what_is_not_read_is_counted(reader: Any, texts: list[TextStimulus], tmp_path: Path) -> None:
    model, tokenizer, _ = reader
    dictionary = plant(tmp_path / "d", reader, texts, range(20))
    others = [TextStimulus(99, "no such", "sentence", texts[0].text, texts[0].start, texts[0].end)]
    first_token = [TextStimulus(0, texts[0].name, "sentence", texts[0].name, 0, 1)]
    found = identify(dictionary, model, tokenizer, [*texts[:4], *others, *first_token], progress=False)
    assert found.skipped == {"concept is no atom": 1} and len(found.kinds) == 5
    assert found.ranks["ordinary"][1][4] == 0 and (found.ranks["ordinary"][1][:4] > 0).all()
    assert found.to_dict()["rejected"] == {"1": 1, "3": 1}
    # A median norm so small that every reading is an outlier.
    none = plant(tmp_path / "n", reader, texts, range(20), norm=1e-3)
    empty = identify(none, model, tokenizer, texts[:4], progress=False)
    assert (
        np.isnan(empty.top(1))
        and empty.to_dict()["centres"]["readings"]["1"]["by_group"]["even"]["texts"] == 0
    )
    with pytest.raises(DacoError, match="none of the 1 held-out texts"):
        match_concepts(dictionary, others)


def test_centring_on_readings_takes_out_what_a_kind_of_text_shares(
    reader: Any, texts: list[TextStimulus], tmp_path: Path
) -> None:
    model, tokenizer, identity = reader
    firsts = [next(s for s in texts if s.concept == i) for i in range(20)]
    same = [replace(s, kind="sentence") for s in firsts]
    rows = {b: slow_readings(model, tokenizer, firsts, b) for b in BLOCKS}
    # Atoms around the readings' own mean; the ordinary mean of the dictionary is far off.
    middles = {b: r.mean(axis=0) for b, r in rows.items()}
    far_off = {b: middles[b] - 50 * r.std() * np.sign(r[0]) for b, r in rows.items()}
    dictionary = save_dictionary(
        tmp_path / "d", model=identity,
        atoms={b: (r - middles[b]).astype(np.float32) for b, r in rows.items()},
        means={b: vector.astype(np.float32) for b, vector in far_off.items()},
        median_norm=dict.fromkeys(BLOCKS, 1000.0),
        concepts=[Concept(i, s.name) for i, s in enumerate(firsts)],
    )  # fmt: skip
    found = identify(dictionary, model, tokenizer, same, progress=False)
    assert [found.top(b, centre="readings") for b in BLOCKS] == [1.0, 1.0]
    assert max(found.top(b) for b in BLOCKS) < 0.5
    # Two kinds: each is centred on its own mean, which is not that of the other.
    half = [replace(s, kind="a" if i < 3 else "b") for i, s in enumerate(same)]
    apart = identify(dictionary, model, tokenizer, half, progress=False)
    wanted = np.concatenate([rows[3][:3] - rows[3][:3].mean(axis=0), rows[3][3:] - rows[3][3:].mean(axis=0)])
    np.testing.assert_array_equal(
        apart.ranks["readings"][3], rank_rows(wanted, np.arange(20), dictionary.atoms(3))
    )


def test_scores_by_kind_and_group() -> None:
    concepts = tuple(Concept(i, f"c{i}", group="a" if i < 2 else "") for i in range(4))
    found = Identification(
        10, concepts, ("sentence", "definition asked", "sentence", "sentence"),
        {"ordinary": {4: np.array([1, 4, 6, 0]), 6: np.array([1, 1, 1, 1])}, "readings": {4: np.ones(4)}}, {},
    )  # fmt: skip
    assert found.top(4) == pytest.approx(1 / 3) and found.top(4, 5) == pytest.approx(2 / 3)
    assert found.top(4, kinds=["sentence"]) == 0.5 and found.best_block() == 6
    assert found.best_block(kinds=["example"]) == 4
    assert found.top(4, centre="readings") == 1.0
    block = found.to_dict()["centres"]["ordinary"]["4"]
    assert block["by_group"] == {
        "a": {"texts": 1, "top1": 1.0, "top5": 1.0},
        "neutral": {"texts": 1, "top1": 0.0, "top5": 0.0},
    }
    assert block["by_kind"]["definition asked"] == {"texts": 1, "top1": 0.0, "top5": 1.0}
