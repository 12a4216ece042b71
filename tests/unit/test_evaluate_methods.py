"""Methods as packs, the match of the random control, and rows that survive a kill."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from daco_rt.artifacts import load_dictionary, load_pack, save_sae
from daco_rt.dictionary import dictionary_for
from daco_rt.errors import ArtifactError, DacoError
from daco_rt.evaluate.controls import watch
from daco_rt.evaluate.methods import Method, build_method
from daco_rt.evaluate.rows import RowFile
from daco_rt.ops.reference import edit_row


@pytest.fixture(scope="module")
def dictionary():
    return load_dictionary(dictionary_for("pocket-internvl"))


def labelled(dictionary, label):
    return [c.index for c in dictionary.concepts if c.label == label]


@pytest.mark.parametrize(
    ("kind", "options", "op", "coder"),
    [
        ("actadd", {}, "sae", "none"),
        ("projection", {"rank": 4}, "affine", "identity"),
        ("omp", {"k": 4, "gain": 0.0}, "pursuit", "omp"),
        ("elastic_net", {"tau": 0.9, "alpha": 0.1}, "pursuit", "elastic_net"),
        ("conditional", {"deadband": 0.3}, "pursuit", "omp"),
    ],
)
def test_each_strength_is_a_policy_of_one_pack(dictionary, tmp_path, kind, options, op, coder):
    built = build_method(Method("m", kind, (0.25, 0.5), options), dictionary, tmp_path)
    assert built.policies == {"m@0.25": "m@0.25", "m@0.5": "m@0.5"} and built.bundle is None
    pack = load_pack(built.pack)
    assert (pack.op, pack.coder) == (op, coder)
    assert [p.name for p in pack.policies] == ["m@0.25", "m@0.5"]
    if kind == "conditional":
        assert [(p.condition, p.positions) for p in pack.policies] == [
            (0.25, "generated"),
            (0.5, "generated"),
        ]
    if kind == "omp":
        limits = pack.operands(pack.blocks[0])["limits"]
        norm = dictionary.median_norm[pack.blocks[0]]
        assert np.allclose(limits[2:, 0], [0.25 * norm, 0.5 * norm], rtol=1e-6)
        gain = pack.operands(pack.blocks[0])["gain"]
        assert (gain[2, labelled(dictionary, "undesirable")] == 0).all()
        assert (gain[2, labelled(dictionary, "neutral")] == 1).all()


def test_the_added_direction_points_from_undesirable_to_desirable(dictionary, tmp_path):
    built = build_method(Method("m", "actadd", (0.5,), {"blocks": [3]}), dictionary, tmp_path)
    shift = load_pack(built.pack).operands(3)["shift"][2].astype(np.float64)
    assert np.isclose(np.linalg.norm(shift), 0.5 * dictionary.median_norm[3], rtol=1e-5)
    atoms = np.asarray(dictionary.atoms(3), np.float64)
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    good, bad = (atoms[labelled(dictionary, label)].mean(0) for label in ("desirable", "undesirable"))
    assert (good - bad) @ shift / np.linalg.norm(good - bad) / np.linalg.norm(shift) > 0.9999


def test_the_projection_removes_the_leading_directions_around_the_mean(dictionary, tmp_path):
    from daco_rt.ops import reference

    built = build_method(Method("m", "projection", (1.0,), {"rank": 5, "blocks": [2]}), dictionary, tmp_path)
    pack = load_pack(built.pack)
    rng, mean = np.random.default_rng(0), np.asarray(dictionary.mean(2), np.float64)
    z = (mean + rng.normal(size=(1, 6, dictionary.dim))).astype(np.float32)
    out = reference.steer_affine(z, np.full((1, 6), 2, np.int32), **pack.operands(2), phi=pack.coder)
    atoms = np.asarray(dictionary.atoms(2), np.float64)[labelled(dictionary, "undesirable")]
    _, _, basis = np.linalg.svd(atoms / np.linalg.norm(atoms, axis=1, keepdims=True), full_matrices=False)
    assert np.abs((out.z - mean) @ basis[:5].T).max() < 1e-4
    kept = (z - mean) - (z - mean) @ basis[:5].T @ basis[:5]
    assert np.abs((out.z - mean) - kept).max() < 1e-4


def test_an_sae_is_labelled_by_the_dictionary_and_swept_by_gamma(dictionary, tmp_path):
    rng = np.random.default_rng(0)
    atoms = np.asarray(dictionary.atoms(3), np.float32)
    atoms = atoms / np.linalg.norm(atoms, axis=1, keepdims=True)
    save_sae(
        tmp_path / "sae", model=dictionary.model, block=3, coder="topk", k=8,
        weights={
            "W_enc": atoms.T.copy(), "W_dec": atoms,
            "b_enc": np.zeros(len(atoms), np.float32),
            "b_dec": rng.normal(size=dictionary.dim).astype(np.float32),
        },
    )  # fmt: skip
    options = {"saes": {3: str(tmp_path / "sae")}, "eta": 0.2, "sweep": "gamma", "gain": 0.0}
    built = build_method(Method("daco", "sae", (0.0, 0.1), options), dictionary, tmp_path)
    pack = load_pack(built.pack)
    operands, norm = pack.operands(3), dictionary.median_norm[3]
    assert pack.coder == "topk" and (operands["gain"][2:] == 0).any(axis=1).all()
    assert not operands["shift"][2].any()
    assert np.isclose(np.linalg.norm(operands["shift"][3]), 0.1 * norm, rtol=1e-3)


def test_the_random_control_matches_firing_and_leaves_undesirable_atoms_alone(dictionary, tmp_path):
    rng, seen = np.random.default_rng(0), []

    def observe(pack):
        seen.append(load_pack(pack))
        rows = 400
        index = np.stack([rng.choice(dictionary.size, 6, replace=False) for _ in range(rows)]).astype(
            np.int32
        )
        return {
            block: (index, rng.exponential(0.4 * dictionary.median_norm[block], (rows, 6)).astype(np.float32))
            for block in dictionary.blocks
        }

    method = Method("c", "random", (0.2, 0.6), {"k": 6, "seed": 1})
    built = build_method(method, dictionary, tmp_path, observe=observe)
    assert seen[0].k_out == 6
    for label in ("c@0.2", "c@0.6"):
        row = built.notes[label]
        assert row["firing share of random atoms"] == pytest.approx(
            row["firing share of undesirable atoms"], abs=0.005
        )
    assert built.notes["c@0.6"]["matched deadband"] > built.notes["c@0.2"]["matched deadband"]
    gain = load_pack(built.pack).operands(dictionary.blocks[0])["gain"][2]
    edited = np.flatnonzero(gain != 1)
    assert len(edited) == len(labelled(dictionary, "undesirable"))
    assert set(edited) <= set(labelled(dictionary, "neutral"))
    again = build_method(method, dictionary, tmp_path / "again", observe=observe)
    assert (load_pack(again.pack).operands(dictionary.blocks[0])["gain"][2] == gain).all()
    with pytest.raises(DacoError, match="needs a model to observe"):
        build_method(method, dictionary, tmp_path)


def test_watched_atoms_fire_and_dose_as_the_reference_edits(dictionary):
    """Doses from codes are lengths of the edits that the operator's definition makes."""
    rng = np.random.default_rng(3)
    atoms = rng.normal(size=(12, 8)) * rng.uniform(0.5, 2.0, (12, 1))
    code = np.where(rng.random((40, 12)) < 0.3, rng.exponential(1.0, (40, 12)), 0.0)
    order = np.argsort(-code * np.linalg.norm(atoms, axis=1), axis=1)[:, :6]
    index = np.where(np.take_along_axis(code, order, 1) > 0, order, -1).astype(np.int32)
    value = np.take_along_axis(code, order, 1).astype(np.float32)
    kept = np.zeros_like(code)
    np.put_along_axis(kept, order, value.astype(np.float64), 1)
    chosen, norm, deadband, gain = [1, 4, 5, 9], 2.0, 0.4, -1.0
    found = watch({7: (index, value)}, {7: atoms}, {7: norm}, {7: chosen})
    gains = np.where(np.isin(np.arange(12), chosen), gain, 1.0)
    limits = np.array([deadband * norm, 0, 0, 0])
    rows = rng.normal(size=(40, 8))
    edits = np.array([
        edit_row(z, c, atoms, gains, np.zeros(12), np.zeros(8), limits) - z
        for z, c in zip(rows, kept, strict=True)
    ])  # fmt: skip
    assert found.dose(deadband, gain=gain) == pytest.approx(
        np.linalg.norm(edits, axis=1).mean() / norm, rel=1e-6
    )
    assert found.firing(deadband) == (np.abs(edits).max(axis=1) > 0).mean() > 0.1


def test_a_matched_deadband_gives_the_share_or_the_dose_or_says_that_it_cannot():
    codes = {
        1: (np.array([[0], [1], [1], [2]], np.int32), np.array([[9.0], [4.0], [2.0], [5.0]], np.float32))
    }
    one = watch(codes, {1: np.eye(3)}, {1: 2.0}, {1: [1]})
    assert watch(codes, {1: np.eye(3)}, {1: 2.0}, {1: [0]}).firing(1.0) == 0.25
    for share in (0.0, 0.25, 0.5):
        assert one.firing(one.deadband_of_firing(share)) == share
    # Atom 1 is active on half of the rows only.
    assert one.firing(one.deadband_of_firing(0.75)) == 0.5
    assert one.dose(one.deadband_of_dose(0.5, gain=0.0), gain=0.0) == 0.5
    assert one.deadband_of_dose(0.75, gain=0.0) < 1.0 and one.deadband_of_dose(0.8, gain=0.0) == 0.0


@pytest.mark.parametrize("match", ["dose", "both"])
@pytest.mark.parametrize("kind", ["omp", "sae"])
def test_a_control_takes_as_much_as_what_it_controls(dictionary, tmp_path, match, kind):
    block = dictionary.blocks[1]
    save_sae(
        tmp_path / "sae", model=dictionary.model, block=block, coder="topk", k=5,
        weights={
            "W_enc": np.asarray(dictionary.atoms(block), np.float32).T.copy(),
            "W_dec": 0.5 * np.asarray(dictionary.atoms(block), np.float32),
            "b_enc": np.zeros(dictionary.size, np.float32), "b_dec": np.zeros(dictionary.dim, np.float32),
        },
    )  # fmt: skip
    options = {
        "omp": {"k": 5, "blocks": [block], "gain": 0.0},
        "sae": {"saes": {block: str(tmp_path / "sae")}, "eta": 0.2, "deadband": 0.1, "sweep": "gain"},
    }[kind]
    of = Method("ours", kind, (-1.0, 0.5) if kind == "sae" else (0.2, 0.4), options)
    control = Method("c", "random", of.strengths, {"match": match, "seeds": [0, 3]}, controls=of)
    rng = np.random.default_rng(0)

    def observe(pack):
        loaded = load_pack(pack)
        assert loaded.k_out == 5 and (loaded.operands(block)["gain"][2] == 0).any()
        index = np.stack([rng.choice(dictionary.size, 5, replace=False) for _ in range(500)])
        strength = rng.exponential(0.4 * dictionary.median_norm[block], (500, 5)).astype(np.float32)
        return {block: (index.astype(np.int32), strength)}

    built = build_method(control, dictionary, tmp_path, observe=observe)
    assert list(built.policies) == [f"c@{s:g}-d{d}" for s in of.strengths for d in (0, 3)]
    for name in built.policies:
        row = built.notes[name]
        assert row["dose of undesirable atoms"] > 0.01
        assert row["dose of random atoms"] == pytest.approx(row["dose of undesirable atoms"], rel=1e-9)
        same = abs(row["firing share of random atoms"] - row["firing share of undesirable atoms"]) < 0.01
        assert same or match == "dose"
    pack = load_pack(built.pack)
    gains = {p.name: pack.operands(block)["gain"][p.slot] for p in pack.policies}
    edited = {name: set(np.flatnonzero(row != 1)) for name, row in gains.items()}
    first, second = (f"c@{of.strengths[0]:g}-d{draw}" for draw in (0, 3))
    assert edited[first] != edited[second] and len(edited[first]) == len(edited[second])
    assert edited[first] == edited[f"c@{of.strengths[1]:g}-d0"]
    if kind == "omp":
        assert edited[first] <= set(labelled(dictionary, "neutral"))


def test_methods_of_named_policies_have_a_variant_each():
    there = Method("b", "pack", (), {"path": "x", "policies": ["mild", "strong"]})
    assert list(there.labels) == ["b@mild", "b@strong"]


def test_methods_without_a_pack(tmp_path):
    assert build_method(Method("none", "none"), None, tmp_path).policies == {"none": "off"}
    prompt = build_method(Method("p", "system_prompt", (), {"text": "Be kind."}), None, tmp_path)
    assert prompt.system == "Be kind." and prompt.pack is None
    there = build_method(Method("b", "bundle", (), {"path": "x", "policies": ["a", "b"]}), None, tmp_path)
    assert there.policies == {"b@a": "a", "b@b": "b"} and there.bundle == Path("x")


def test_rows_survive_a_kill_and_refuse_other_settings(tmp_path):
    path = tmp_path / "a" / "rows.jsonl"
    rows = RowFile(path, {"policy": "off"})
    rows.append([{"id": "1", "text": "one\u2028line"}, {"id": "2", "text": "two"}])
    partial = path.with_name("rows.jsonl.partial")
    assert partial.is_file() and not path.exists()
    partial.write_bytes(partial.read_bytes() + b'{"id": "3", "te')
    again = RowFile(path, {"policy": "off"})
    assert list(again.rows) == ["1", "2"] and again.rows["1"]["text"] == "one\u2028line"
    again.append([{"id": "3", "text": "three"}])
    again.finish()
    assert not partial.exists() and list(RowFile(path, {"policy": "off"}).rows) == ["1", "2", "3"]
    with pytest.raises(ArtifactError, match=r"other settings \(policy: off there, default now\)"):
        RowFile(path, {"policy": "default"})
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ArtifactError, match="ends within a row"):
        RowFile(path, {"policy": "off"})
    path.write_text('{"header": {"policy": "off"}}\n{"text": "no id"}\n')
    with pytest.raises(ArtifactError, match="damaged row"):
        RowFile(path, {"policy": "off"})
