"""Text stimuli of concept tables."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from daco_rt.cli import main
from daco_rt.concepts import (
    WordConcept,
    everyday_concepts,
    load_stimuli,
    make_stimuli,
    save_stimuli,
    save_table,
    shipped_table,
    texts_for,
)
from daco_rt.concepts.texts import PLAIN, TextStimulus
from daco_rt.errors import ArtifactError

KNIFE = WordConcept(
    "knife.n.01",
    "knife",
    gloss="(cooking) a tool with a blade; used to cut",
    examples=("two knives lay there", "the KNIFE", "a sharp blade", "a knife-edge"),
    topic="artifact",
    irregular="knives",
)
HONESTY = WordConcept("honesty.n.01", "honesty", gloss="the quality of being honest", topic="attribute")


def said(stimulus):
    return stimulus.text[stimulus.start : stimulus.end]


def test_the_first_seven_are_two_definitions_three_sentences_two_examples():
    texts = texts_for(KNIFE)
    kinds = ["definition"] * 2 + ["sentence"] * 3 + ["example"] * 2
    assert [text.kind for text in texts[:7]] == kinds
    assert texts[0].text == "<|im_start|>The word for a tool with a blade is knife."
    assert texts[2].text == "<|im_start|>user\nWhat is a knife?<|im_end|>\n<|im_start|>assistant\n"
    assert texts[5].text == "<|im_start|>Two knives lay there." and said(texts[5]) == "knives"
    assert said(texts[6]) == "KNIFE"
    # Without examples, sentences take their place, before the third definition.
    assert [text.kind for text in texts_for(HONESTY)[:8]] == ["definition"] * 2 + ["sentence"] * 5 + [
        "definition"
    ]


@pytest.mark.parametrize("markers", [PLAIN, None])
@pytest.mark.parametrize(
    "concept", [KNIFE, HONESTY, everyday_concepts()[0], WordConcept("", "ant", topic="animal")]
)
def test_spans_mark_the_word(concept, markers):
    texts = texts_for(concept) if markers is None else texts_for(concept, markers=markers)
    assert len(texts) >= 27
    for text in texts:
        forms = {concept.name, concept.plural}
        assert said(text).lower() in forms and "{" not in text.text
        before = text.text[: text.start].rstrip()
        if text.kind == "sentence" and before.endswith((" a", " an")):
            assert before.endswith(" an" if concept.name[0] in "aeiou" else " a")
    assert not any("a honesty" in text.text for text in texts)
    if markers is PLAIN:
        assert not any("<|" in text.text for text in texts)
        assert texts[0].text.startswith(("The word", "Question: "))


def test_examples_without_the_word_are_counted():
    skipped = Counter()
    texts = texts_for(KNIFE, kinds=("example",), skipped=skipped)
    assert len(texts) == 2 and skipped == {"example without the word": 2}


def test_every_shipped_concept_has_texts_and_none_comes_twice():
    table = shipped_table()[::25]
    found = make_stimuli(table, count=27)
    assert set(found.counts.values()) == {27} and not found.excluded
    places = {(text.text.lower(), text.start) for text in found.stimuli}
    assert len(places) == len(found.stimuli)
    for text in found.stimuli:
        concept = table[text.concept]
        assert text.name == concept.name and said(text).lower() in {
            concept.name.lower(),
            (concept.plural or "").lower(),
        }
    again = make_stimuli(table, count=27)
    assert again.stimuli == found.stimuli


def test_concepts_with_too_few_texts_are_left_out_and_listed():
    found = make_stimuli([KNIFE, HONESTY], kinds=("example", "definition"), minimum=4)
    assert found.counts == {0: 5} and found.excluded == {"honesty": 3}
    assert {text.concept for text in found.stimuli} == {0}
    with pytest.raises(ArtifactError, match="none of the 1 concepts has 4 texts"):
        make_stimuli([HONESTY], kinds=("example",), minimum=4)


def test_texts_of_equal_concepts_come_once():
    found = make_stimuli([KNIFE, KNIFE], count=50, minimum=1)
    assert set(found.counts) == {0} and found.excluded == {"knife": 0} and found.skipped["duplicate"] >= 7


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"count": 3, "minimum": 4}, "between 1 and the count of 3, got 4"),
        ({"minimum": 0}, "got 0"),
        ({"kinds": ("examples",)}, "did you mean 'example'"),
    ],
)
def test_bad_numbers_and_kinds_are_refused(options, said):
    with pytest.raises(ArtifactError, match=said):
        make_stimuli([KNIFE], **options)


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz"])
def test_stimuli_come_back_and_bytes_repeat(tmp_path, name):
    found = make_stimuli([KNIFE, HONESTY])
    path = save_stimuli(found.stimuli, tmp_path / name)
    assert list(load_stimuli(path)) == found.stimuli
    first = path.read_bytes()
    save_stimuli(found.stimuli, path, overwrite=True)
    assert path.read_bytes() == first
    with pytest.raises(ArtifactError, match="already exists"):
        save_stimuli(found.stimuli, path)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"concept": 0}', "no stimulus"),
        ("nonsense", "no stimulus"),
        (json.dumps(TextStimulus(0, "a", "example", "abc", 2, 4).__dict__), "span 2 to 4 lies outside"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, said):
    (tmp_path / "t.jsonl").write_text(line + "\n")
    with pytest.raises(ArtifactError, match=f"line 1: .*{said}"):
        list(load_stimuli(tmp_path / "t.jsonl"))
    (tmp_path / "t.jsonl.gz").write_bytes(b"\x1f\x8bnot really")
    with pytest.raises(ArtifactError, match="cannot be read as stimuli"):
        list(load_stimuli(tmp_path / "t.jsonl.gz"))


def test_command_counts_and_lists(tmp_path, capsys):
    table = save_table([KNIFE, HONESTY], tmp_path / "c.jsonl")
    output = tmp_path / "t.jsonl"
    command = ["stimuli", str(table), "--output", str(output), "--kind", "definition", "--kind", "example"]
    assert main(command) == 0
    told = capsys.readouterr().out
    assert "left out with fewer than 4 texts: honesty" in told and "5 texts of 1 concepts" in told
    assert main([*command, "--force", "--json", "--minimum", "3"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["texts"] == 8 and report["concepts_by_texts"] == {"3": 1, "5": 1}
    assert main(command) == 2
