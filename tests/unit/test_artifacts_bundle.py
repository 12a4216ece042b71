"""Bundles and the packs inside them, and the summary of every kind of artifact."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from daco_rt.artifacts import (
    Concept,
    ModelIdentity,
    Policy,
    bundle_fields,
    describe,
    from_array,
    load_bundle,
    load_pack,
    new_artifact,
    save_dictionary,
    save_pack,
    save_sae,
    write_safetensors,
)
from daco_rt.artifacts.manifest import encode_manifest
from daco_rt.errors import ArtifactError

D, M, N = 8, 5, 4
MODEL = ModelIdentity(D, 6, 100, 2, 1, "qwen2", (0.25, -0.5, 1e-3))


def make_pack(
    path: Path, *, seed: int = 0, k: int = 2, m: int = M, overwrite: bool = False, **changes: Any
) -> Path:
    rng = np.random.default_rng(seed)

    def operands() -> dict[str, np.ndarray]:
        gain = np.ones((3, m), np.float32)
        gain[2, :2] = 0
        undesirable = np.zeros((3, m), bool)
        undesirable[1:, :3] = True
        return {
            "enc": rng.standard_normal((m, D)).astype(np.float32),
            "enc_bias": np.zeros(m, np.float32),
            "dec": rng.standard_normal((m, D)).astype(np.float32),
            "gain": gain,
            "undesirable": undesirable,
            "shift": np.zeros((3, D), np.float32),
            "limits": np.zeros((3, 4), np.float32),
        }

    given: dict[str, Any] = {
        "model": MODEL,
        "op": "sae",
        "coder": "topk",
        "k": k,
        "operands": {1: operands(), 4: operands()},
        "policies": [Policy("default", 2, "generated", (1, 4))],
        "default_policy": "default",
        "concepts": [Concept(0, "dagger", "undesirable", "weapons"), Concept(3, "bread", "neutral", "food")],
        "median_norm": {1: 1.0, 4: 2.0},
    }
    save_pack(path, overwrite=overwrite, **{**given, **changes})
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    table = np.random.default_rng(0).standard_normal((100, D)).astype(ml_dtypes.bfloat16)
    write_safetensors(
        folder / "model.safetensors",
        {"embed.weight": from_array(table), "norm.weight": from_array(np.ones(D, np.float32))},
    )
    config = {
        "model_type": "internvl",
        "architectures": ["X"],
        "text_config": {"hidden_size": D, "num_hidden_layers": 6},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_bundle(tmp_path: Path, checkpoint: Path, *, steered: bool = True, **changes: Any) -> Path:
    path = tmp_path / "bundle"
    with new_artifact(path, "bundle") as writer:
        (writer.path / "decoder.onnx").write_bytes(b"graph")
        (writer.path / "vision.onnx").write_bytes(b"tower")
        (writer.path / "processor").mkdir()
        (writer.path / "processor" / "config.json").write_text("{}")
        writer.link(checkpoint / "model.safetensors", "weights/model.safetensors", full_hash=True)
        pack = None
        if steered:
            pack = load_pack(make_pack(tmp_path / "source", seed=1)).save_to(writer.path / "pack")
        fields = bundle_fields(
            family="internvl",
            checkpoint="pocket-internvl",
            precision="fp32",
            max_length=64,
            decoder={"hidden_size": D},
            embedding={"file": "weights/model.safetensors", "name": "embed.weight"},
            image={"token_id": 3, "tokens_per_tile": 4},
            library_required=False,
            model=MODEL,
            pack=pack,
            k_out=2,
        )
        writer.set(**{**fields, **changes})
    return path


def test_bundle_round_trip(tmp_path: Path, checkpoint: Path) -> None:
    bundle = load_bundle(make_bundle(tmp_path, checkpoint), full=True)
    assert (bundle.family, bundle.checkpoint, bundle.precision, bundle.max_length) == (
        "internvl", "pocket-internvl", "fp32", 64,
    )  # fmt: skip
    assert bundle.steered_blocks == (1, 4) and bundle.k_out == 2 and bundle.model == MODEL
    assert bundle.image == {"token_id": 3, "tokens_per_tile": 4} and bundle.library_required is False
    assert bundle.decoder_path.read_bytes() == b"graph"
    assert bundle.vision_path is not None and bundle.vision_path.read_bytes() == b"tower"
    assert (bundle.processor_path / "config.json").is_file()
    embeddings = bundle.embedding_ref()
    assert embeddings.shape == (100, D) and embeddings.dtype == "BF16"
    assert (
        embeddings.read().tobytes()
        == np.random.default_rng(0).standard_normal((100, D)).astype(ml_dtypes.bfloat16).tobytes()
    )
    pack = bundle.pack()
    assert pack is not None and pack is bundle.pack() and pack.blocks == (1, 4)
    assert bundle.checks["weights/model.safetensors"] == "sha256"
    assert bundle.checks["pack/steering.safetensors"] == "sha256"


def test_bundle_without_steering_or_vision(tmp_path: Path, checkpoint: Path) -> None:
    path = make_bundle(tmp_path, checkpoint, steered=False, image=None)
    bundle = load_bundle(path)
    assert bundle.pack() is None and bundle.image is None and bundle.steered_blocks == ()


@pytest.mark.parametrize(
    "name",
    [
        "decoder.onnx", "vision.onnx", "processor/config.json", "manifest.json",
        "pack/manifest.json", "pack/steering.safetensors", "pack/concepts.jsonl",
    ],
)  # fmt: skip
@pytest.mark.parametrize("damage", ["flip", "delete"])
def test_bundle_damage_names_the_file(tmp_path: Path, checkpoint: Path, name: str, damage: str) -> None:
    path = make_bundle(tmp_path, checkpoint)
    raw = bytearray((path / name).read_bytes())
    if damage == "flip":
        raw[-2] ^= 0x04
        (path / name).write_bytes(raw)
    else:
        (path / name).unlink()
    with pytest.raises(ArtifactError) as caught:
        load_bundle(path)
    assert Path(name).name in str(caught.value) and "\n" not in str(caught.value)


def test_flipped_bit_of_a_referenced_shard_is_found_by_full(tmp_path: Path, checkpoint: Path) -> None:
    path = make_bundle(tmp_path, checkpoint)
    with open(checkpoint / "model.safetensors", "r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"\x7f")
    load_bundle(path)
    with pytest.raises(
        ArtifactError, match=r"weights/model\.safetensors is damaged or was replaced: SHA-256"
    ):
        load_bundle(path, full=True)


def test_another_pack_of_the_same_shape_is_a_folder_swap(tmp_path: Path, checkpoint: Path) -> None:
    path = make_bundle(tmp_path, checkpoint)
    before = load_bundle(path).pack()
    assert before is not None
    old = before.operands(1)["enc"].copy()
    make_pack(path / "pack", seed=9, overwrite=True)
    after = load_bundle(path).pack()
    assert after is not None and after.operands(1)["enc"].tobytes() != old.tobytes()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"k": 3}, "has k = 3, the graph was exported with 2"),
        ({"coder": "relu"}, "has coder = relu, the graph was exported with topk"),
        ({"m": 6, "concepts": []}, "has other tensor names, dtypes or shapes than the bundle was made with"),
        (
            {"model": dataclasses.replace(MODEL, samples=(0.25, -0.5, 0.7))},
            "does not fit the bundle's model: made for other",
        ),
        (
            {"model": dataclasses.replace(MODEL, num_hidden_layers=7)},
            "made for num_hidden_layers 7, the model has 6",
        ),
    ],
)
def test_a_pack_that_the_graph_cannot_run_is_refused(
    tmp_path: Path, checkpoint: Path, changes: dict[str, Any], words: str
) -> None:
    path = make_bundle(tmp_path, checkpoint)
    make_pack(path / "pack", overwrite=True, **changes)
    with pytest.raises(ArtifactError, match=words):
        load_bundle(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"precision": "int4"}, "precision must be one of fp32, fp16"),
        ({"max_length": 0}, "max_length at least 1"),
        ({"max_length": "long"}, "missing or of another type"),
        ({"embedding": {}}, "embedding must name a file and a tensor"),
        ({"embedding": {"file": "gone.safetensors", "name": "w"}}, "lists no file gone.safetensors"),
        ({"model": None}, "model identity must hold"),
        ({"steered_blocks": None}, "missing or of another type"),
        ({"steered_blocks": [1]}, r"steers blocks \[1, 4\], the graph \[1\]"),
        ({"family": ...}, "field 'family' is missing"),
    ],
)
def test_bundle_manifests_that_do_not_hold(
    tmp_path: Path, checkpoint: Path, changes: dict[str, Any], words: str
) -> None:
    path = make_bundle(tmp_path, checkpoint)
    manifest = {**json.loads((path / "manifest.json").read_bytes()), **changes}
    manifest = {key: value for key, value in manifest.items() if value is not ... and key != "checksum"}
    (path / "manifest.json").write_bytes(encode_manifest(manifest))
    with pytest.raises(ArtifactError, match=words):
        load_bundle(path)


def test_embedding_that_is_not_there(tmp_path: Path, checkpoint: Path) -> None:
    path = make_bundle(tmp_path, checkpoint, embedding={"file": "weights/model.safetensors", "name": "gone"})
    with pytest.raises(ArtifactError, match=r"model\.safetensors has no tensor 'gone'"):
        load_bundle(path).embedding_ref()


def test_describe_pack(tmp_path: Path) -> None:
    about = describe(make_pack(tmp_path / "p"))
    assert json.loads(json.dumps(about)) == about
    assert (about["kind"], about["version"], about["op"], about["dtype"]) == ("pack", 1, "sae", "fp32")
    assert about["producer"]["name"] == "daco-rt"
    assert about["blocks"] == [1, 4] and about["default_policy"] == "default"
    (policy,) = about["policies"]
    assert policy["edited"] == {"1": 2, "4": 2} and policy["undesirable"] == {"1": 3, "4": 3}
    assert policy["shifted_blocks"] == []
    assert about["concepts"]["by_label"] == {"neutral": 1, "undesirable": 1}
    assert about["concepts"]["by_group"] == {"food": 1, "weapons": 1}
    assert about["operands"]["enc"] == {"dtype": "F32", "shape": [M, D]}
    files = [file for file in (tmp_path / "p").iterdir() if file.name != "manifest.json"]
    assert about["bytes"] == sum(file.stat().st_size for file in files)


def test_describe_everything_else(tmp_path: Path, checkpoint: Path) -> None:
    about = describe(make_bundle(tmp_path, checkpoint))
    assert about["kind"] == "bundle" and about["pack"]["k"] == 2 and about["vision"] is True
    assert about["referenced_bytes"] == (checkpoint / "model.safetensors").stat().st_size
    assert json.loads(json.dumps(about)) == about

    save_dictionary(
        tmp_path / "d",
        model=MODEL,
        atoms={1: np.ones((N, D), np.float32)},
        means={1: np.ones(D, np.float32)},
        median_norm={1: 1.0},
        concepts=[Concept(i, f"c{i}", "undesirable" if i == 2 else "neutral") for i in range(N)],
    )
    about = describe(tmp_path / "d")
    assert about["kind"] == "dictionary" and about["concepts"]["by_label"] == {"neutral": 3, "undesirable": 1}

    rng = np.random.default_rng(0)
    shapes = {"W_enc": (D, M), "W_dec": (M, D), "b_enc": (M,), "b_dec": (D,)}
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    save_sae(
        tmp_path / "s", model=MODEL, block=4, coder="relu", weights=weights, annotation=[Concept(0, "a")]
    )
    about = describe(tmp_path / "s")
    assert (about["kind"], about["block"], about["atoms"], about["coder"]) == ("sae", 4, M, "relu")
    assert about["annotation"]["count"] == 1
    (tmp_path / "s/manifest.json").unlink()
    assert describe(tmp_path / "s")["producer"] == "SAELens"

    about = describe(checkpoint)
    assert about["kind"] == "checkpoint" and about["hidden_size"] == D and about["dtypes"] == ["BF16", "F32"]
    assert about["parameters"] == 101 * D and about["shards"] == ["model.safetensors"]
    assert json.loads(json.dumps(about)) == about


def test_describe_refuses(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not exist; give the folder"):
        describe(tmp_path / "nothing")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match="is a file, expected a folder"):
        describe(tmp_path / "file")
    with pytest.raises(ArtifactError, match=r"holds no manifest\.json, cfg\.json or config\.json"):
        describe(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ArtifactError, match=r"config\.json is damaged"):
        describe(tmp_path)
    path = make_pack(tmp_path / "p")
    shutil.copy(path / "concepts.jsonl", path / "steering.safetensors")
    with pytest.raises(ArtifactError, match=r"steering\.safetensors has \d+ bytes"):
        describe(path)
