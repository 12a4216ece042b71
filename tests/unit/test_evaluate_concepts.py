"""The questions about concepts: what they ask, what they do not say, and how the sets are balanced."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from statistics import mean

import pytest

from daco_rt.artifacts import load_dictionary
from daco_rt.concepts import shipped_table
from daco_rt.concepts.held_out import definition_stimuli
from daco_rt.concepts.mention import find_word
from daco_rt.dictionary import dictionary_for
from daco_rt.evaluate.benchmarks import concepts, load_benchmark
from daco_rt.evaluate.judges.lexicon import Lexicon

HARMFUL = load_benchmark("concepts").samples
BENIGN = load_benchmark("benign", kinds=concepts.BENIGN_FORMS).samples
SAMPLES = (*HARMFUL, *BENIGN)
NAMING = ("named", "unlisted", "benign-concept")


@pytest.fixture(scope="module")
def table():
    return {concept.key: concept for concept in shipped_table()}


@pytest.fixture(scope="module")
def lexicon(table):
    return Lexicon(table.values())


@pytest.fixture(scope="module")
def atoms():
    return {c.synset: c for c in load_dictionary(dictionary_for("smol-internvl")).concepts}


def of(*forms):
    return [sample for sample in SAMPLES if sample.form in forms]


def test_there_are_enough_concepts_each_in_every_template():
    groups = {form: {s.group for s in of(form)} for form in concepts.SETS}
    assert len(groups["named"]) >= 100 and len(groups["benign-concept"]) >= 100
    assert len(groups["unlisted"]) >= 50
    assert groups["paraphrase"] == groups["named"] and groups["benign-paraphrase"] == groups["benign-concept"]
    for form in concepts.SETS:
        templates = concepts.DESCRIBED if form.endswith("paraphrase") else concepts.NAMED
        asked = Counter(s.facts["template"] for s in of(form))
        assert asked == dict.fromkeys(templates, len(groups[form]))
    assert all(s.harmful == (s.form in concepts.FORMS) for s in SAMPLES)


def test_no_question_comes_twice():
    assert max(Counter(s.prompt for s in SAMPLES).values()) == 1
    assert max(Counter(s.id for s in SAMPLES).values()) == 1


def test_what_is_meant_is_a_concept_of_the_table_with_the_label_of_its_form(table, lexicon):
    for sample in SAMPLES:
        concept = table[sample.facts["synset"]]
        assert sample.facts["concept"] == concept.name and sample.group == concept.key
        assert (concept.label == "undesirable") == sample.harmful
        if sample.harmful:
            assert sample.category == concept.group
            assert lexicon.find(concept.name) == (concept.name,)
        else:
            assert concept.name in lexicon.find_harmless(concept.name)


def test_listed_and_harmless_concepts_have_an_atom_and_unlisted_ones_none(atoms):
    for sample in SAMPLES:
        if sample.form == "unlisted":
            assert sample.group not in atoms
        else:
            assert (atoms[sample.group].label == "undesirable") == sample.harmful


def test_unlisted_concepts_share_no_word_with_an_undesirable_atom(atoms):
    words = {c.name.lower() for c in atoms.values() if c.label == "undesirable" and len(c.name) > 3}
    for name in {s.facts["concept"].lower() for s in of("unlisted")}:
        assert not [word for word in words if word in name or name in word]


def test_questions_by_name_say_the_concept(table):
    for sample in of(*NAMING):
        assert find_word(table[sample.group], sample.prompt), sample.prompt


def test_described_concepts_are_said_by_no_word_of_their_stem(table, lexicon):
    described = {row.synset: row.description for row in concepts._rows() if row.description}
    for sample in of("paraphrase", "benign-paraphrase"):
        concept, description = table[sample.group], described[sample.group]
        assert description in sample.prompt
        # The definitions of the held-out texts are kept to the same rule.
        assert definition_stimuli([replace(concept, gloss=description)]), sample.prompt
        assert not any(find_word(replace(concept, name=word), sample.prompt) for word in concept.words)
        # No other undesirable concept stands in for it.
        assert not lexicon.find(sample.prompt), sample.prompt


def test_concepts_of_one_word_stem_are_asked_about_once():
    for kind in ("listed", "unlisted", "benign"):
        stems = Counter(
            stem
            for row in concepts._rows()
            if row.set == kind
            for stem in {word[:5].lower() for word in row.name.split()}
        )
        assert stems.most_common(1)[0][1] == 1


def test_phrases_have_the_article_of_their_sound():
    for row in concepts._rows():
        article, _, rest = row.phrase.rpartition(row.name) if row.name in row.phrase else ("", "", row.phrase)
        assert not rest or rest == row.phrase
        assert article.strip() in ("", "a", "an", "the", "a pair of"), row.phrase
        if article in ("a ", "an "):
            assert (article == "an ") == (row.name[0].lower() in "aeiou"), row.phrase
        assert not re.search(r"\ba [aeio]|\ban [^aeioh]|[;()]|\s\s|\.$", row.description), row.description


def test_lengths_of_undesirable_and_harmless_questions_are_alike():
    def words(form):
        return mean(len(s.prompt.split()) for s in of(form))

    assert words("unlisted") == pytest.approx(words("named"), rel=0.05)
    assert words("benign-concept") == pytest.approx(words("named"), rel=0.05)
    assert words("benign-paraphrase") == pytest.approx(words("paraphrase"), rel=0.05)
    counts = [len(template.split()) for template in (*concepts.NAMED.values(), *concepts.DESCRIBED.values())]
    assert min(counts) <= 3 and max(counts) >= 20


def test_all_questions_about_a_concept_fall_on_one_side():
    for name, options in (("concepts", {}), ("benign", {"kinds": concepts.BENIGN_FORMS})):
        whole = load_benchmark(name, **options)
        dev, test = whole.part("dev"), whole.part("test")
        assert not {s.group for s in dev.samples} & {s.group for s in test.samples}
        assert len(dev.samples) + len(test.samples) == len(whole.samples)


def test_written_harmless_questions_are_as_long_as_harmful_ones():
    # Quartiles of StrongREJECT and HarmBench together are 12, 16 and 24 words, the 95th percentile is 45.
    for kind in ("everyday", "look-alike"):
        lengths = sorted(len(s.prompt.split()) for s in load_benchmark("benign", kinds=[kind]).samples)
        quarter = [lengths[len(lengths) * share // 100] for share in (25, 50, 75, 95)]
        for found, wanted in zip(quarter, (12, 16, 24, 45), strict=True):
            assert abs(found - wanted) <= 4, quarter
