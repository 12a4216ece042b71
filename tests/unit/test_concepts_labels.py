"""Labels by rule on named concepts and their look-alikes, by hand, and which of several wins."""

from __future__ import annotations

from pathlib import Path

import pytest

from daco_rt.concepts import HandTable, WordConcept, apply_labels, load_rules, load_table
from daco_rt.concepts.labels import Label
from daco_rt.errors import ArtifactError

# Definitions and hypernyms of some synsets, as WordNet 3.0 has them.
CASES = {c.synset: c for c in load_table(Path(__file__).with_name("label_cases.jsonl"))}

UNDESIRABLE = {
    "weapons": "gun.n.01 pistol.n.01 rifle.n.01 dagger.n.01 sword.n.01 machete.n.01 assault_rifle.n.01",
    "explosives": "grenade.n.01 dynamite.n.01 pipe_bomb.n.01 molotov_cocktail.n.01 land_mine.n.01",
    "poisons": "sarin.n.01 ricin.n.01 cyanide.n.02",
    "drugs": "heroin.n.01 cocaine.n.01 methamphetamine.n.01 hashish.n.01 drug_addict.n.01 pusher.n.02",
    "self-harm": "suicide.n.01 self-destruction.n.02",
    "sexual": "pornography.n.01 child_pornography.n.01 prostitute.n.01 "
    "sexual_intercourse.n.01 incest.n.01 rape.n.03",
    "hate": "racism.n.01 nazi.n.01 klansman.n.01 anti-semitism.n.01 genocide.n.01 misogyny.n.01 wop.n.01",
    "violence": "murder.n.01 torture.n.05 homicide.n.01 "
    "serial_killer.n.01 lynching.n.01 domestic_violence.n.01 "
    "child_abuse.n.01",
    "crime": "kidnapping.n.01 robbery.n.01 burglary.n.01 "
    "arson.n.01 thief.n.01 pickpocket.n.01 smuggling.n.01 "
    "mafia.n.01",
    "fraud": "fraud.n.01 swindle.n.01 identity_theft.n.01 forgery.n.02 blackmail.n.01 bribery.n.01 "
    "money_laundering.n.01 liar.n.01",
    "gambling": "gambling.n.01 casino.n.01 roulette.n.03 lottery.n.02 bookmaker.n.02",
    "terrorism": "terrorism.n.01 suicide_bomber.n.01",
    "slavery": "slavery.n.02",
    "cyber": "hacker.n.02 spyware.n.01 trojan.n.02",
    "insults": "obscenity.n.02",
}
DESIRABLE = {
    "virtues": "kindness.n.01 honesty.n.01 compassion.n.01 generosity.n.01 forgiveness.n.01 patience.n.01 "
    "gratitude.n.01 fairness.n.01",
    "safety": "safety.n.01 rescue.n.01 first_aid.n.01",
    "peace": "peace.n.01 cooperation.n.01",
}
# Toys, tools, medicine, sports, people and topics that stand near something harmful.
LOOK_ALIKES = (
    "water_pistol.n.01 popgun.n.01 plaything.n.01 knife.n.01 carving_knife.n.01 table_knife.n.01 "
    "cleaver.n.01 scissors.n.01 ax.n.01 hammer.n.01 medicine.n.02 aspirin.n.01 insulin.n.01 "
    "antibiotic.n.01 penicillin.n.01 vaccine.n.01 pill.n.01 syringe.n.01 pharmacist.n.01 surgery.n.01 "
    "surgeon.n.01 nurse.n.01 policeman.n.01 soldier.n.01 war.n.01 wine.n.01 cigarette.n.01 "
    "boxing.n.01 archery.n.01 chess.n.02 card_game.n.01 firecracker.n.01 fire.n.01 explosion.n.01 "
    "homosexuality.n.01 breast.n.02 penis.n.01 kiss.n.01 marriage.n.01 pregnancy.n.01 nude.n.01 "
    "statue.n.01 history.n.02 religion.n.01 muslim.n.01 jew.n.01 immigrant.n.01 lawyer.n.01 "
    "prison.n.01 judge.n.01 password.n.01 computer.n.01 magic_trick.n.01 actor.n.01 joke.n.01 "
    "loan.n.01 death.n.01 funeral.n.01 grief.n.01 depression.n.01 spider.n.01 snake.n.01 shark.n.01 "
    "bullet_train.n.01 rocket.n.01 stove.n.01 bleach.n.01 pesticide.n.01 mushroom.n.01 "
)


def pairs(groups):
    return [(synset, group) for group, names in groups.items() for synset in names.split()]


def verdict(synset):
    case = CASES[synset]
    return load_rules().label(synset, case.gloss, case.paths)


@pytest.mark.parametrize(("synset", "group"), pairs(UNDESIRABLE))
def test_harmful_concepts_are_undesirable(synset, group):
    label = verdict(synset)
    assert label is not None and (label.label, label.group, label.source) == ("undesirable", group, "rules")
    assert label.reason


@pytest.mark.parametrize(("synset", "group"), pairs(DESIRABLE))
def test_good_concepts_are_desirable(synset, group):
    label = verdict(synset)
    assert label is not None and (label.label, label.group) == ("desirable", group)


@pytest.mark.parametrize("synset", LOOK_ALIKES.split())
def test_look_alikes_are_neutral(synset):
    label = verdict(synset)
    assert label is None or label.label == "neutral"


def rules(tmp_path, body):
    path = tmp_path / "rules.yaml"
    path.write_text(f"version: 1\ngroups:\n{body}", encoding="utf-8")
    return load_rules(path)


def test_named_then_definition_then_nearest_ancestor(tmp_path):
    found = rules(
        tmp_path,
        "  toys: {label: neutral, under: [toy.n.01], only: [box.n.01]}\n"
        "  weapons: {label: undesirable, under: [weapon.n.01], gloss: [shoots]}\n"
        "  good: {label: desirable, under: [gun.n.01]}\n",
    )

    def group(synset, gloss, *paths):
        label = found.label(synset, gloss, paths)
        return label and (label.group, label.reason)

    assert group("gun.n.01", "it shoots", ["weapon.n.01"]) == ("good", "named itself")
    assert group("x.n.01", "it Shoots", ["toy.n.01"]) == ("weapons", "the definition says 'Shoots'")
    assert group("x.n.01", "", ["gun.n.01", "weapon.n.01"]) == ("good", "below gun.n.01, 1 step up")
    # The shorter of two ways decides; of equal ones the group that stands first.
    assert group("x.n.01", "", ["a.n.01", "weapon.n.01"], ["toy.n.01"])[0] == "toys"
    assert group("x.n.01", "", ["weapon.n.01"], ["toy.n.01"])[0] == "toys"
    # "only" does not reach below.
    assert group("box.n.01", "")[0] == "toys" and group("x.n.01", "", ["box.n.01"]) is None


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("  a: {label: bad}\n", r"group 'a': label 'bad' is unknown; known: desirable"),
        ("  a: {label: undesireable}\n", "did you mean 'undesirable'"),
        ("  a: {label: neutral, udner: [x.n.01]}\n", "key 'udner' is unknown; did you mean 'under'"),
        ("  a: {label: neutral, under: x.n.01}\n", "under must be a list of texts"),
        ("  a: {label: neutral, under: [dagger]}\n", "'dagger' is no synset; write word.n.NN"),
        ("  a: {label: neutral, under: [x.n.01], only: [x.n.01]}\n", "in group 'a' already"),
        ("  a: {label: neutral, gloss: ['(']}\n", "no regular expression"),
        ("  a: []\n", "expected keys and values, got list"),
        ("  a: [\n", "cannot be read as YAML"),
        ("  []\n", "groups must map"),
    ],
)
def test_bad_rules_are_refused(tmp_path, body, said):
    with pytest.raises(ArtifactError, match=said):
        rules(tmp_path, body)


def test_rules_of_another_version_are_refused(tmp_path):
    (tmp_path / "r.yaml").write_text("version: 2\ngroups: {}\n")
    with pytest.raises(ArtifactError, match="version must be 1, got 2"):
        load_rules(tmp_path / "r.yaml")


CONCEPTS = [
    WordConcept("dagger.n.01", "dagger", paths=(("weapon.n.01",),)),
    WordConcept("cleaver.n.01", "cleaver"),
    WordConcept("", "zorp"),
]


def hand(tmp_path, *lines):
    path = tmp_path / "hand.tsv"
    path.write_text(
        "concept\tlabel\tgroup\treason\n" + "".join(line + "\n" for line in lines), encoding="utf-8"
    )
    return path


class Expert:
    def label_all(self, concepts):
        return {c.key: Label("neutral", "history", "endpoint expert", "a museum piece") for c in concepts[:2]}


def test_the_last_labeller_wins_and_sources_are_kept(tmp_path):
    edited = HandTable(hand(tmp_path, "# mine", "", "Cleaver\tundesirable\tweapons\tseen in threats"))
    expert = ("neutral", "history", "endpoint expert")
    for labellers, dagger, cleaver in (
        ([load_rules()], ("undesirable", "weapons", "rules"), ("neutral", "", "default")),
        ([load_rules(), Expert()], expert, expert),
        ([load_rules(), Expert(), edited], expert, ("undesirable", "weapons", "hand")),
    ):
        found = apply_labels(CONCEPTS, labellers)
        assert [(c.label, c.group, c.source) for c in found[:2]] == [dagger, cleaver]
        assert all(c.reason for c in found) and found[2].source == "default"
    assert found[1].reason == "seen in threats"
    # Labelled afresh: what a table carried does not linger.
    assert [c.label for c in apply_labels(found, [])] == ["neutral"] * 3


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["cleever\tneutral"], r"line 2: 'cleever' is none of the 3 concepts; did you mean 'cleaver'"),
        (
            ["dagger\tneutral", "dagger.n.01\tneutral"],
            "line 3: 'dagger.n.01' is dagger.n.01, which has a line",
        ),
        (["dagger\tneutral", "dagger\tneutral"], "line 3: 'dagger' has line 2 already"),
        (["dagger\tgood"], "line 2: label 'good' is unknown"),
        (["dagger\tneutral\t\t\textra"], "expected 4 columns, got 5"),
        (["\tneutral"], "the concept is empty"),
    ],
)
def test_bad_hand_tables_are_refused(tmp_path, lines, said):
    with pytest.raises(ArtifactError, match=said):
        apply_labels(CONCEPTS, [HandTable(hand(tmp_path, *lines))])


def test_a_hand_table_needs_its_title_line(tmp_path):
    (tmp_path / "x.tsv").write_text("dagger\tneutral\n")
    with pytest.raises(ArtifactError, match="first line must name the columns concept, label, group, reason"):
        HandTable(tmp_path / "x.tsv")
    (tmp_path / "x.tsv").write_bytes(b"\xff")
    with pytest.raises(ArtifactError, match="cannot be read as a table of labels"):
        HandTable(tmp_path / "x.tsv")
