"""Policies in YAML: read, refused, compiled."""

from __future__ import annotations

import json

import numpy as np
import pytest

from daco_rt.artifacts import Concept, ModelIdentity, load_pack, save_dictionary, save_sae
from daco_rt.cli import main
from daco_rt.concepts import WordConcept, save_table
from daco_rt.errors import PolicyError
from daco_rt.steering import build_pack, read_policies
from daco_rt.steering.policy_file import parse_blocks

D, N = 12, 6
MODEL = ModelIdentity(D, 6, 100, 2, 1, "qwen2", (0.5, -0.25))
CONCEPTS = [
    Concept(0, "dagger", "undesirable", "weapons", "dagger.n.01"),
    Concept(1, "rifle", "undesirable", "weapons"),
    Concept(2, "poison", "undesirable", "poisons"),
    Concept(3, "kindness", "desirable", "virtues"),
    Concept(4, "spoon"),
    Concept(5, "fork"),
]
NORMS = {2: 10.0, 3: 15.0, 4: 20.0}
TEXT = """
version: 1
source: {dictionary: d}
pack: {k: 4, dtype: fp32, k_out: 3}
defaults: {deadband: 0.3, gain: -1}
default: strict
policies:
  strict:
    description: everything undesirable
    gamma: 0.1
  no-weapons:
    groups: weapons
    positions: generated
    blocks: 2-3
    gain: 0
    max_dose: 0.5
    keep_norm: true
  mixed:
    labels: [desirable]
    concepts: [spoon]
    latents: {2: [5], 4: 1}
    boost: 0.2
    condition: 0.4
"""


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    save_dictionary(
        tmp_path / "d",
        model=MODEL,
        atoms={block: rng.normal(size=(N, D)).astype(np.float32) for block in NORMS},
        means={block: rng.normal(size=D).astype(np.float32) for block in NORMS},
        median_norm=NORMS,
        concepts=CONCEPTS,
    )
    return tmp_path


def written(folder, text):
    path = folder / "p.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def sae(folder, block, annotation):
    rng = np.random.default_rng(block)
    path = folder / f"sae{block}"
    save_sae(
        path, model=MODEL, block=block, coder="topk", k=3, annotation=annotation,
        weights={
            "W_enc": rng.normal(size=(D, N)).astype(np.float32),
            "W_dec": rng.normal(size=(N, D)).astype(np.float32),
            "b_enc": np.zeros(N, np.float32), "b_dec": np.zeros(D, np.float32),
        },
    )  # fmt: skip
    return path


def edited(pack, block, name):
    gain = pack.operands(block)["gain"][pack.policy(name).slot]
    return {int(i): float(gain[i]) for i in np.flatnonzero(gain != 1)}


def test_a_file_becomes_a_pack(folder):
    pack = build_pack(written(folder, TEXT), folder / "pack")
    assert (pack.op, pack.k, pack.k_out, pack.dtype, pack.default_policy) == (
        "pursuit",
        4,
        3,
        "fp32",
        "strict",
    )
    assert edited(pack, 4, "strict") == {0: -1, 1: -1, 2: -1}
    assert edited(pack, 2, "no-weapons") == {0: 0, 1: 0}
    # Labels, names and indices add up; indices may differ from block to block.
    assert edited(pack, 2, "mixed") == {3: -1, 4: -1, 5: -1}
    assert edited(pack, 3, "mixed") == {3: -1, 4: -1}
    assert edited(pack, 4, "mixed") == {1: -1, 3: -1, 4: -1}
    weapons, mixed = pack.policy("no-weapons"), pack.policy("mixed")
    assert (weapons.positions, weapons.blocks, weapons.condition) == ("generated", (2, 3), 0.0)
    assert mixed.condition == 0.4 and mixed.blocks == (2, 3, 4)
    operands = pack.operands(3)
    np.testing.assert_allclose(operands["limits"][weapons.slot], [0.3 * 15, 0.5, 1, 0], rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(operands["shift"][pack.policy("strict").slot]), 1.5, rtol=1e-5)
    assert operands["boost"][mixed.slot].tolist() == [0, 0, 0, 3, 0, 0]
    assert operands["undesirable"][mixed.slot].tolist() == [False, False, False, True, True, False]
    assert load_pack(folder / "pack").policy("mixed") == mixed


def test_packs_without_new_keys_keep_their_manifest(folder):
    build_pack(
        written(folder, "version: 1\npack: {k: 4}\npolicies: {a: }\n"),
        folder / "pack",
        dictionary=folder / "d",
    )
    manifest = json.loads((folder / "pack" / "manifest.json").read_text())
    assert "condition" not in manifest["policies"][0] and "latents" not in manifest["recipe"]["policies"][0]


def test_only_blocks_that_a_policy_edits_are_compiled(folder):
    text = "version: 1\npack: {k: 4}\nsource: {dictionary: d}\npolicies: {a: {blocks: 2}, b: {blocks: [4]}}\n"
    assert build_pack(written(folder, text), folder / "pack").blocks == (2, 4)


def test_labels_of_a_table_replace_those_of_the_dictionary(folder):
    save_table(
        [
            WordConcept("dagger.n.01", "sticker"),
            WordConcept("", "fork", label="undesirable", group="cutlery"),
        ],
        folder / "t.jsonl",
    )
    path = written(
        folder, "version: 1\npack: {k: 4}\nsource: {dictionary: d, concepts: t.jsonl}\npolicies: {a: }\n"
    )
    pack = build_pack(path, folder / "pack")
    assert set(edited(pack, 2, "a")) == {1, 2, 5}
    assert pack.concept(5).group == "cutlery" and pack.concept(0).label == "neutral"


def test_saes_take_the_norms_of_a_dictionary(folder):
    named = [Concept(1, "rifle", "undesirable", "weapons")]
    for block, annotation in ((2, named), (3, named)):
        sae(folder, block, annotation)
    text = (
        "version: 1\nsource: {saes: {2: sae2, 3: sae3}, norms: d}\npack: {dtype: fp32}\n"
        "policies:\n  a: {deadband: 0.1}\n  b: {latents: [4]}\n"
    )
    pack = build_pack(written(folder, text), folder / "pack")
    assert pack.op == "sae" and pack.blocks == (2, 3) and pack.median_norm == {2: 10.0, 3: 15.0}
    assert edited(pack, 2, "a") == {1: 0} and edited(pack, 3, "b") == {4: 0}
    assert pack.concept(4).name == "latent 4"
    np.testing.assert_allclose(pack.operands(3)["limits"][2, 0], 1.5, rtol=1e-6)
    with pytest.raises(PolicyError, match="latent 6 is outside the 6 of block 2; use 0 to 5"):
        build_pack(written(folder, text.replace("[4]", "[6]")), folder / "other")
    with pytest.raises(PolicyError, match="'k' is an option of dictionaries"):
        build_pack(written(folder, text.replace("dtype: fp32", "k: 3")), folder / "other")
    with pytest.raises(PolicyError, match="SAEs do not know the median norms"):
        build_pack(written(folder, text.replace(", norms: d", "")), folder / "other")
    with pytest.raises(PolicyError, match="has no median norm of block 5"):
        build_pack(written(folder, text.replace("3: sae3", "5: sae3")), folder / "other")


def test_a_source_given_by_argument_wins(folder):
    path = written(folder, TEXT.replace("source: {dictionary: d}", "source: {dictionary: nowhere}"))
    assert build_pack(path, folder / "pack", dictionary=folder / "d").atoms == N
    with pytest.raises(PolicyError, match="a dictionary or SAEs, not both"):
        build_pack(path, folder / "pack", dictionary=folder / "d", saes={2: "x"})
    with pytest.raises(PolicyError, match="names no dictionary and no SAEs"):
        build_pack(written(folder, "version: 1\npolicies: {a: }\n"), folder / "other")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("version: 1", "version: 2", "version must be 1, got 2"),
        ("default: strict", "default: stricct", "'stricct' does not exist; did you mean 'strict'"),
        ("gamma: 0.1", "gama: 0.1", r"policy 'strict': key 'gama' is unknown; did you mean 'gamma'"),
        ("gamma: 0.1", "gamma: much", "gamma must be a number such as 0.5, got 'much'"),
        ("gamma: 0.1", "gamma: .nan", "gamma must be a number"),
        ("gamma: 0.1", "gamma: yes", "gamma must be a number"),
        ("pack: {k: 4", "pack: {kk: 4", "pack: key 'kk' is unknown; did you mean 'k'"),
        ("pack: {k: 4", "pack: {k: four", "pack: k must be an integer, got 'four'"),
        (
            "defaults: {deadband",
            "defaults: {deadbnad",
            "defaults: key 'deadbnad' is unknown; did you mean 'deadband'",
        ),
        ("defaults: {", "defaults: {groups: [x], ", "defaults: key 'groups' is unknown"),
        ("source: {dictionary: d}", "source: {dictionnary: d}", "did you mean 'dictionary'"),
        (
            "source: {dictionary: d}",
            "source: {dictionary: d, saes: {2: x}}",
            "a dictionary or saes, not both",
        ),
        ("source: {dictionary: d}", "source: {saes: [x]}", "saes must map block numbers to folders"),
        ("blocks: 2-3", "blocks: 3-2", "blocks must be numbers such as"),
        ("blocks: 2-3", "blocks: []", "blocks are empty"),
        ("keep_norm: true", "keep_norm: 1", "keep_norm must be true or false, got 1"),
        ("groups: weapons", "groups: [1]", "groups must be text, got 1"),
        ("latents: {2: [5], 4: 1}", "latents: [-1]", "latents must be a list of indices from 0"),
        ("latents: {2: [5], 4: 1}", "latents: {a: [1]}", "latents must map block numbers"),
        ("  mixed:", "  off:", "a policy's name must be text other than off and observe"),
        ("  mixed:", "  'observe':", "other than off and observe"),
        ("  mixed:", "  strict:", r"line \d+: 'strict' comes twice"),
        ("policies:", "polices:", "did you mean 'policies'"),
        ("version: 1", "version: [", "cannot be read as YAML"),
    ],
)
def test_bad_files_are_refused_with_the_nearest_key(folder, old, new, said):
    assert old in TEXT
    with pytest.raises(PolicyError, match=said):
        read_policies(written(folder, TEXT.replace(old, new, 1)))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("groups: weapons", "groups: wepons", "no group 'wepons'; did you mean 'weapons'"),
        ("concepts: [spoon]", "concepts: [spon]", "no concept 'spon'; did you mean 'spoon'"),
        ("labels: [desirable]", "labels: [desireable]", "did you mean 'desirable'"),
        ("blocks: 2-3", "blocks: 5", "policy 'no-weapons' names block 5"),
        ("latents: {2: [5], 4: 1}", "latents: {7: [1]}", "latents of block 7, its blocks are 2, 3, 4"),
        ("latents: {2: [5], 4: 1}", "latents: 6", "latent 6 is outside the 6"),
        ("condition: 0.4", "condition: -1", "condition must be 0 or more"),
        ("positions: generated", "positions: generate", "did you mean 'generated'"),
    ],
)
def test_what_does_not_fit_the_dictionary_is_refused(folder, old, new, said):
    with pytest.raises(PolicyError, match=said):
        build_pack(written(folder, TEXT.replace(old, new, 1)), folder / "pack")
    assert not (folder / "pack").exists()


def test_a_bare_off_is_the_policy_off(folder):
    assert read_policies(written(folder, TEXT.replace("default: strict", "default: off"))).default == "off"


@pytest.mark.parametrize(
    ("value", "blocks"),
    [(3, (3,)), ([5, 3, 3], (3, 5)), ("15-17", (15, 16, 17)), ("2, 4-5", (2, 4, 5)), (["2-3", 7], (2, 3, 7))],
)
def test_block_lists(value, blocks):
    assert parse_blocks(value, "x") == blocks


def test_command_checks_and_compiles(folder, capsys):
    path = str(written(folder, TEXT))
    assert main(["pack", path, "--check"]) == 0
    assert "3 policies (strict, no-weapons, mixed), default strict" in capsys.readouterr().out
    output = str(folder / "pack")
    assert main(["pack", path, "--output", output, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["policies"][1]["edited"] == {"2": 2, "3": 2}
    assert main(["pack", path, "--output", output]) == 2
    assert main(["pack", path, "--output", output, "--force"]) == 0
    assert "strict (default)" in capsys.readouterr().out
    for wrong in (["--sae", "x"], ["--sae", "2=a", "--sae", "2=b"], ["--check"]):
        assert main(["pack", path, "--output", output, "--force", *wrong]) == 2
    assert main(["pack", path]) == 2
    assert "--output is missing" in capsys.readouterr().err
