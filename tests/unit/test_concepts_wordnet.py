"""Reading WordNet, choosing concepts, the table on disk."""

from __future__ import annotations

import gzip
import json

import pytest

from daco_rt.cli import main
from daco_rt.concepts import (
    WordNet,
    find_wordnet,
    load_rules,
    load_table,
    save_table,
    select_concepts,
    shipped_table,
    subset_concepts,
)
from daco_rt.concepts.rules import LabelRules
from daco_rt.concepts.table import SHIPPED
from daco_rt.concepts.wordnet import split_gloss
from daco_rt.errors import ArtifactError

# offset, file, words with lex ids, pointers, gloss
SYNSETS = [
    (100, 3, ["entity"], [], "that which exists"),
    (200, 6, ["weapon", "arm"], ["@ 100"], 'a tool for fighting; "he dropped his weapon"; "two arms"'),
    (300, 6, ["dagger"], ["@ 200", "@ 700"], "a short knife"),
    (400, 20, ["rape", "colza"], ["@ 100"], "a plant with yellow flowers near a city"),
    (500, 4, ["rape"], ["@ 100"], "a crime of violence with a weapon"),
    (600, 18, ["Paris"], ["@i 100"], "a city"),
    (700, 6, ["knife"], ["@ 100"], "an edge tool; a dagger is one"),
    (800, 6, ["kitchen_sink"], ["@ 100"], "a sink in a kitchen"),
    (900, 6, ["sink"], ["@ 100"], "a basin"),
    (1000, 6, ["Opuntia_tuna"], ["@ 100"], "a cactus"),
    (1100, 6, ["oral"], ["@ 100"], "an examination by word of mouth"),
    (1200, 6, ["basin", "sink"], ["@ 100"], "an oral basin; oral"),
    (1300, 14, ["taxonomic_group"], ["@ 100"], "a group of animals"),
    (1400, 14, ["Felidae"], ["@ 1300"], "cats, knife"),
    (1500, 6, ["3-d_printer"], ["@ 100"], "prints"),
    (1600, 6, ["by"], ["@ 100"], "two letters"),
]


@pytest.fixture
def folder(tmp_path):
    return write_wordnet(tmp_path / "dict")


def write_wordnet(folder):
    folder.mkdir()
    licence = "  1 This software and database is being provided to you, the LICENSEE\n"
    data, senses = [licence], {}
    for offset, file, words, pointers, gloss in SYNSETS:
        listed = " ".join(f"{word} 0" for word in words)
        marks = [mark.split() for mark in pointers]
        links = "".join(f" {kind} {int(target):08d} n 0000" for kind, target in marks)
        kind = f"{offset:08d} {file:02d} n {len(words):02x} {listed} {len(marks):03d}{links} | {gloss}  \n"
        data.append(kind)
        for word in words:
            senses.setdefault(word.lower(), []).append(offset)
    index = [licence]
    for word, offsets in sorted(senses.items()):
        numbers = " ".join(f"{offset:08d}" for offset in offsets)
        index.append(f"{word} n {len(offsets)} 1 @ {len(offsets)} 0 {numbers}  \n")
    (folder / "data.noun").write_text("".join(data))
    (folder / "index.noun").write_text("".join(index))
    counts = ["knife%1:06:00:: 1 9", "oral%3:00:00:: 1 4", "arm%1:06:00:: 1 2"]
    (folder / "cntlist.rev").write_text("\n".join(counts) + "\n")
    (folder / "noun.exc").write_text("knives knife\n")
    return folder


def rules(tmp_path, text=None):
    path = tmp_path / "rules.yaml"
    path.write_text(
        text
        or "version: 1\nprefer: [rape.n.02]\n"
        "groups:\n  w: {label: undesirable, under: [weapon.n.01, rape.n.02]}\n"
    )
    return load_rules(path)


def test_synsets_are_read(folder):
    wordnet = WordNet(folder)
    weapon = wordnet.synset("weapon.n.01")
    assert weapon.words == ("weapon", "arm") and weapon.counts == (0, 2) and weapon.topic == "artifact"
    assert (weapon.gloss, weapon.examples) == ("a tool for fighting", ("he dropped his weapon", "two arms"))
    assert wordnet.names[500] == "rape.n.02" and wordnet.synsets[600].is_instance
    assert wordnet.paths(300) == (("weapon.n.01", "entity.n.01"), ("knife.n.01", "entity.n.01"))
    assert (wordnet.depth(300), wordnet.depth(100)) == (2, 0)
    assert wordnet.plurals == {"knife": "knives"} and wordnet.tagged_elsewhere == {"oral"}


@pytest.mark.parametrize(
    ("gloss", "parts"),
    [
        ("a cat", ("a cat", ())),
        ('a cat; "the cat sat"', ("a cat", ("the cat sat",))),
        ('a cat; "the cat"- T.S.Eliot; "cats"  ', ("a cat", ("the cat", "cats"))),
        ("a cat; of any age", ("a cat; of any age", ())),
    ],
)
def test_glosses_are_parted(gloss, parts):
    assert split_gloss(gloss) == parts


def test_selection_follows_its_rule(folder, tmp_path):
    table = select_concepts(WordNet(folder), rules=rules(tmp_path))
    names = [concept.name for concept in table]
    # Sense frequency first; then mentions ("city" is none: an instance); digits, taxa, two letters, and a
    # compound whose second word is no noun are out.
    assert names[0] == "knife" and table[0].plural == "knives" and table[0].phrase == "a knife"
    assert not {"Paris", "Opuntia tuna", "Felidae", "3-d printer", "by"} & set(names)
    assert "kitchen sink" in names and len(names) == len(set(names))
    # The preferred sense, and "sink" read as the synset that it leads.
    assert {c.name: c.synset for c in table}["rape"] == "rape.n.02"
    assert {c.name: c.synset for c in table}["sink"] == "sink.n.01"
    weapon, oral = (next(c for c in table if c.name == name) for name in ("weapon", "oral"))
    assert (weapon.mentions, weapon.label, weapon.reason) == (1, "undesirable", "named itself")
    # Mentioned twice, but tagged text knows it as an adjective: no credit for that.
    assert names.index("weapon") < names.index("oral") and oral.mentions == 1


def test_labelled_concepts_are_kept_past_their_rank(folder, tmp_path):
    wordnet, chosen = WordNet(folder), rules(tmp_path)
    kept = select_concepts(wordnet, size=3, rules=chosen)
    assert len(kept) == 3 and sum(c.label == "undesirable" for c in kept) >= 1
    assert [c.name for c in select_concepts(wordnet, size=1, rules=chosen, keep_labelled=False)] == ["knife"]
    with pytest.raises(ArtifactError, match="size must be 1 or more, got 0"):
        select_concepts(wordnet, size=0, rules=chosen)


def test_rules_must_name_what_exists(folder, tmp_path):
    text = "version: 1\ngroups:\n  w: {label: undesirable, under: [weapon.n.07]}\n"
    with pytest.raises(
        ArtifactError, match=r"'weapon.n.07' is in no WordNet; senses of that word: weapon.n.01"
    ):
        select_concepts(WordNet(folder), rules=rules(tmp_path, text))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("data.noun", "00000100 03 n 01 entity 0 001 @ 00000999 n 0000 | x\n", "points to 00000999"),
        ("data.noun", "00000100 03 n zz entity\n", r"data\.noun, line 1: not a line of WordNet"),
        ("data.noun", "", "holds no synset"),
        ("data.noun", b"00000100 03 n 01 \xff 0 000 | x\n", "cannot be read"),
        ("cntlist.rev", "dagger%1:06:00::\n", r"cntlist\.rev, line 1"),
        ("index.noun", "dagger n 2 0 2 0 00000300\n", "2 senses announced, 1 listed"),
        ("noun.exc", "knives\n", r"noun\.exc, line 1"),
    ],
)
def test_damaged_files_are_named(folder, name, content, said):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ArtifactError, match=said):
        wordnet = WordNet(folder)
        _ = wordnet.senses, wordnet.plurals


def test_wordnet_is_found_or_the_way_to_it_said(folder, tmp_path, monkeypatch):
    assert find_wordnet(tmp_path) == folder
    monkeypatch.setenv("DACO_RT_WORDNET", str(folder))
    assert find_wordnet() == folder
    monkeypatch.delenv("DACO_RT_WORDNET")
    monkeypatch.setattr("daco_rt.concepts.wordnet._PLACES", (str(tmp_path / "none"),))
    with pytest.raises(ArtifactError, match=r"fetch it \(bash scripts/fetch_wordnet\.sh\)"):
        find_wordnet()
    with pytest.raises(ArtifactError, match=r"it has no data\.noun"):
        WordNet(tmp_path)


def test_tables_come_back_and_are_equal_byte_by_byte(folder, tmp_path):
    table = select_concepts(WordNet(folder), rules=rules(tmp_path))
    plain, packed = tmp_path / "t.jsonl", tmp_path / "t.jsonl.gz"
    for path in (plain, packed):
        assert load_table(save_table(table, path)) == table
        first = path.read_bytes()
        with pytest.raises(ArtifactError, match="already exists"):
            save_table(table, path)
        save_table(table, path, overwrite=True)
        assert path.read_bytes() == first
    assert gzip.decompress(packed.read_bytes()) == plain.read_bytes()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not a JSON object"),
        ("[]", "expected a JSON object, got list"),
        ('{"name": "x", "gloos": "y"}', "'gloos' is unknown; did you mean 'gloss'"),
        ('{"name": "x", "label": "bad"}', "label 'bad' is unknown"),
        ('{"name": ""}', "needs a name"),
        ('{"name": "x", "frequency": "3"}', "frequency must be an integer"),
        ('{"name": "x", "frequency": true}', "frequency must be an integer"),
        ('{"name": "x", "paths": ["a"]}', "paths must be a list of lists"),
        ('{"name": "x", "words": [1]}', "words must be a list of texts"),
    ],
)
def test_bad_rows_are_named(tmp_path, line, said):
    path = tmp_path / "t.jsonl"
    path.write_text('{"name": "first"}\n' + line + "\n")
    with pytest.raises(ArtifactError, match=f"line 2.*{said}"):
        load_table(path)
    path.write_text('{"name": "first"}\n{"name": "first"}\n')
    with pytest.raises(ArtifactError, match="'first' comes twice"):
        load_table(path)
    path.write_text("\n")
    with pytest.raises(ArtifactError, match="holds no concept"):
        load_table(path)
    (tmp_path / "t.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(ArtifactError, match="cannot be read as a concept table"):
        load_table(tmp_path / "t.jsonl.gz")


def test_shipped_table_is_what_it_says():
    table = shipped_table()
    assert len(table) == 15_000 == len({c.name.lower() for c in table}) == len({c.synset for c in table})
    assert all(
        c.gloss and c.paths and c.words[0] == c.name and c.source for c in table if c.synset != "entity.n.01"
    )
    labels = [c.label for c in table]
    assert 800 < labels.count("undesirable") < 1200 and 80 < labels.count("desirable") < 300
    by_name = {c.name: c for c in table}
    assert by_name["rape"].group == "sexual" and by_name["dagger"].phrase == "a dagger"
    assert by_name["heroin"].phrase == "heroin" and by_name["honesty"].plural is None


def real_wordnet():
    try:
        return WordNet(find_wordnet())
    except ArtifactError as error:
        pytest.skip(str(error))


def test_shipped_table_is_what_the_rule_gives(tmp_path):
    table = select_concepts(real_wordnet())
    assert save_table(table, tmp_path / "t.jsonl.gz").read_bytes() == SHIPPED.read_bytes()


def test_default_rules_name_no_synset_twice():
    found: LabelRules = load_rules()
    assert len(set(found.under) | set(found.only)) == len(found.under) + len(found.only)
    assert len(found.labels) >= 20 and "weapons" in found.labels


def test_command_writes_a_table(folder, tmp_path, capsys):
    rules(tmp_path)
    output = tmp_path / "out" / "t.jsonl"
    command = [
        "concepts",
        "--output",
        str(output),
        "--wordnet",
        str(folder),
        "--rules",
        str(tmp_path / "rules.yaml"),
    ]
    assert main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["concepts"] == len(load_table(output)) and report["labels"]["undesirable"] == {"w": 3}
    assert main(command) == 2 and "already exists" in capsys.readouterr().err
    assert main([*command, "--force"]) == 0
    again = ["concepts", "--table", str(output), "--output", str(tmp_path / "again.jsonl")]
    assert main([*again, "--rules", str(tmp_path / "rules.yaml")]) == 0
    assert (tmp_path / "again.jsonl").read_bytes() == output.read_bytes()
    assert main([*again, "--wordnet", str(folder), "--force"]) == 2
    assert main([*again, "--rank", "depth", "--force"]) == 2
    assert "leave them out with --table" in capsys.readouterr().err
    assert main([*again, "--rules", str(tmp_path / "rules.yaml"), "--size", "2", "--force"]) == 0
    assert load_table(tmp_path / "again.jsonl") == subset_concepts(load_table(output), 2)
