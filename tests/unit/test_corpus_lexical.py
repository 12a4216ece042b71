"""Pairs by their words, the words of a table in a text, near-duplicate captions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from corpus_samples import folder

from daco_rt.concepts import WordConcept, WordIndex, find_word, shipped_table
from daco_rt.corpus import FolderCorpus
from daco_rt.corpus.lexical import retrieve_lexical
from daco_rt.corpus.near import DistinctCaptions
from daco_rt.errors import DacoError

TABLE = (
    WordConcept("dagger.n.01", "dagger", topic="artifact"),
    WordConcept("gun.n.01", "gun", topic="artifact"),
    WordConcept("machine_gun.n.01", "machine gun", topic="artifact"),
    WordConcept("mouse.n.01", "mouse", topic="animal", irregular="mice"),
    WordConcept("honesty.n.01", "honesty", topic="attribute"),
    WordConcept("glass.n.01", "glass", topic="artifact"),
    WordConcept("glasses.n.01", "glasses", topic="quantity"),
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("A Dagger.", {"dagger": "Dagger"}),
        ("two daggers, a dagger's edge", {"dagger": "dagger"}),
        ("dagger-like; cloak-and-dagger; daggerboard; _dagger", {}),
        ("a machine gun and a gun", {"machine gun": "machine gun", "gun": "gun"}),
        ("a machine  gun", {"machine gun": "machine  gun"}),
        ("a machine, gun", {"gun": "gun"}),
        ("machine guns only", {"machine gun": "machine guns"}),
        ("Mice and a mouse", {"mouse": "mouse"}),
        ("honesties", {}),
        ("her glasses", {"glasses": "glasses"}),
        ("", {}),
    ],
)
def test_words_of_a_table_are_found_whole(text: str, said: dict[str, str]):
    found = WordIndex(TABLE).find(text)
    assert {TABLE[row].name: text[start:end] for row, (start, end) in found.items()} == said


def test_a_whole_table_finds_what_each_concept_finds():
    table = shipped_table()[:3000]
    index = WordIndex(table)
    text = " ".join(example for concept in table[:60] for example in concept.examples)
    found = index.find(text)
    assert len(found) > 50
    plural_of_another = {concept.name for concept in table}
    for row, concept in enumerate(table):
        alone = find_word(concept, text)
        if row in found and concept.plural not in plural_of_another:
            assert alone is not None and found[row][1] <= alone[1]
        elif alone is None:
            assert row not in found


def corpus(tmp_path: Path, captions: list[str]) -> FolderCorpus:
    return FolderCorpus(folder(tmp_path / "c", captions))


CAPTIONS = [
    "an old rusty dagger lies here", "a dagger", "one shiny dagger", "daggers of brass", "A DAGGER!",
    *(f"{word} {noun}" for word in ("red", "green", "blue") for noun in ("house", "lake", "tree",
                                                                           "machine gun")),
]  # fmt: skip


def chosen(found: Any, name: str, sign: int) -> list[str]:
    rows = zip(found.columns["name"], found.columns["sign"], found.columns["caption"], strict=True)
    return [caption for n, s, caption in rows if (n, s) == (name, sign)]


def test_the_shortest_captions_that_say_the_word_and_others_that_do_not(tmp_path: Path):
    place = corpus(tmp_path, CAPTIONS)
    found = retrieve_lexical(place, TABLE, count=4, minimum=3)
    assert chosen(found, "dagger", 1) == [
        "a dagger", "one shiny dagger", "daggers of brass", "an old rusty dagger lies here",
    ]  # fmt: skip
    negative = chosen(found, "dagger", -1)
    assert len(set(negative)) == 4 and not any("dagger" in caption for caption in negative)
    assert chosen(found, "machine gun", 1) == [f"{word} machine gun" for word in ("red", "green", "blue")]
    assert found.counts == {0: (4, 4), 2: (3, 3)}
    assert found.excluded == dict.fromkeys(("gun", "mouse", "honesty", "glass", "glasses"), 0)
    assert found.skipped == {"near-duplicate caption": 1}
    columns = found.columns
    assert set(columns["image_similarity"]) == {None} and columns["score"][0] == 2
    for caption, start, end, sign in zip(
        *(columns[k] for k in ("caption", "start", "end", "sign")), strict=True
    ):
        assert (
            (caption[start:end].lower() in ("dagger", "daggers", "machine gun")) == (sign > 0) == (start >= 0)
        )
    assert len(chosen(retrieve_lexical(place, TABLE, count=5, minimum=3, copies=2), "dagger", 1)) == 5


def test_a_compound_is_no_negative_of_its_word(tmp_path: Path):
    place = corpus(tmp_path, ["a gun", "the black gun", "one old gun", "her gun", *CAPTIONS])
    for seed in range(5):
        found = retrieve_lexical(place, TABLE, count=4, seed=seed)
        assert not any("gun" in caption for caption in chosen(found, "gun", -1))


def test_seeds_decide_and_the_order_of_the_corpus_does_not_decide_the_sample(tmp_path: Path):
    place = corpus(tmp_path, CAPTIONS)
    first = retrieve_lexical(place, TABLE, count=3, minimum=3, sample=9)
    assert retrieve_lexical(place, TABLE, count=3, minimum=3, sample=9).columns == first.columns
    seeds = {
        tuple(chosen(retrieve_lexical(place, TABLE, count=3, minimum=3, sample=9, seed=s), "dagger", -1))
        for s in range(6)
    }
    assert len(seeds) > 2
    lines = (place.root / "captions.jsonl").read_text().splitlines()
    (place.root / "captions.jsonl").write_text("\n".join(reversed(lines)))
    again = retrieve_lexical(FolderCorpus(place.root), TABLE, count=3, minimum=3, sample=9)
    assert chosen(again, "dagger", -1) == chosen(first, "dagger", -1)


def test_broken_pictures_are_passed_over(tmp_path: Path):
    place = corpus(tmp_path, CAPTIONS)
    (place.root / "images" / "1.png").write_bytes(b"broken")
    (place.root / "images" / "5.png").write_bytes(b"broken")
    for seed in range(4):
        found = retrieve_lexical(place, TABLE, count=4, minimum=3, seed=seed)
        assert "a dagger" not in found.columns["caption"] and "red house" not in found.columns["caption"]
    assert found.skipped["picture broken"] == 1 and place.problems.counts["picture broken"] >= 1
    trusting = retrieve_lexical(place, TABLE, count=4, minimum=3, check_images=False)
    assert "a dagger" in trusting.columns["caption"]


def test_too_little_is_refused(tmp_path: Path):
    place = corpus(tmp_path, CAPTIONS)
    with pytest.raises(DacoError, match="none of the 7 concepts has 6 pairs among the 17"):
        retrieve_lexical(place, TABLE, minimum=6)
    with pytest.raises(DacoError, match="twice the count"):
        retrieve_lexical(place, TABLE, sample=9)
    # Where every caption says the word there is nothing to hold against it.
    alone = corpus(tmp_path / "x", [f"{word} dagger" for word in ("red", "green", "old", "new", "big")])
    with pytest.raises(DacoError, match="none of the 7 concepts"):
        retrieve_lexical(alone, TABLE)


@pytest.mark.parametrize(
    ("first", "second", "alike"),
    [
        ("a dagger on a table", "A dagger, on a table.", True),
        ("a dagger on a table", "a dagger on the table", False),
        (
            "vector illustration of an old red dagger on white background",
            "illustration of an old red dagger on white background",
            True,
        ),
        ("a dagger", "a sword", False),
        ("dagger", "dagger dagger", False),
        ("!!!", "???", True),
    ],
)
def test_near_duplicates(first: str, second: str, alike: bool):
    distinct = DistinctCaptions()
    assert distinct.admit(first) and distinct.admit(second) != alike


PICTURES = Path(__file__).resolve().parents[2] / "build" / "deps" / "pictures"


@pytest.mark.skipif(
    not (PICTURES / "captions.jsonl").is_file(), reason="run scripts/fetch_pictures.sh: 430 MB of pictures"
)
def test_fetched_pictures_show_hundreds_of_concepts():
    table = shipped_table()
    found = retrieve_lexical(FolderCorpus(PICTURES), table, check_images=False)
    assert len(found.counts) > 500
    assert json.dumps(found.to_dict())
