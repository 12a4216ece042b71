"""The main job: a checkpoint and a pack become a bundle, and the bundle proves itself."""

from __future__ import annotations

import hashlib
import json
import shutil

import numpy as np
import onnx
import pytest

from daco_rt.artifacts import load_bundle, load_pack
from daco_rt.artifacts.manifest import encode_manifest
from daco_rt.artifacts.tensors import header_sha256
from daco_rt.errors import ArtifactError, PolicyError
from daco_rt.export import export_model, parse_layers, verify_bundle
from daco_rt.runtime.generate import Generator
from daco_rt.runtime.request import GenerateRequest


def states(report) -> dict[str, str]:
    return {check.name: check.state for check in report.checks}


def test_default_export_verifies_against_the_original_model(pocket_bundle):
    report = verify_bundle(pocket_bundle, tokens=12)
    assert report.passed, [check for check in report.checks if check.state == "fail"]
    found = states(report)
    assert found["logits equal Hugging Face, unsteered"] == "pass"
    assert found["logits equal Hugging Face, policy default"] == "pass"
    assert found["greedy tokens equal Hugging Face, policy default"] == "pass"
    assert found["steering fires on every generated token"] == "pass"


def test_full_verification_hashes_the_linked_shards(pocket_bundle):
    report = verify_bundle(pocket_bundle, tokens=4, full=True, compare_model=False)
    assert "in full" in report.checks[0].measured and report.passed


def test_weights_are_linked_and_not_copied(pocket_bundle, pocket):
    shard = pocket_bundle / "weights" / "model.safetensors"
    assert shard.samefile(pocket.path / "model.safetensors")
    assert (pocket_bundle / "decoder.onnx").stat().st_size < 1 << 20


def test_half_precision_is_converted_and_verifies(tmp_path):
    export_model("internvl", checkpoint="pocket-internvl", output=tmp_path / "half", precision="fp16")
    bundle = load_bundle(tmp_path / "half")
    assert bundle.embedding["dtype"] == "F16"
    report = verify_bundle(tmp_path / "half", tokens=8)
    assert report.passed, report.checks


def test_layers_choose_among_the_packs_blocks(make_pack, tmp_path):
    pack = make_pack()
    export_model("internvl", checkpoint="pocket-internvl", pack=pack.path, output=tmp_path / "b", layers=[3])
    assert load_bundle(tmp_path / "b").steered_blocks == (3,)
    with pytest.raises(PolicyError, match="block 9"):
        export_model(
            "internvl", checkpoint="pocket-internvl", pack=pack.path, output=tmp_path / "c", layers=[9]
        )
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("text", "blocks"), [("3", (3,)), ("15-17", (15, 16, 17)), ("7, 2-3", (2, 3, 7)), ("2,2", (2,))]
)
def test_layer_lists(text, blocks):
    assert parse_layers(text) == blocks


@pytest.mark.parametrize("text", ["", "a", "3-", "-3", "5-3", "1.5", "3,,4"])
def test_layer_lists_that_are_none(text):
    with pytest.raises(PolicyError, match="--layers"):
        parse_layers(text)


def test_without_a_pack_the_model_is_exported_unsteered(pocket, tmp_path):
    # A copy has no built-in pack: it is somebody's own checkpoint.
    shutil.copytree(pocket.path, tmp_path / "mine")
    result = export_model("internvl", checkpoint=tmp_path / "mine", output=tmp_path / "b")
    assert result.steered_blocks == ()
    graph = onnx.load(str(tmp_path / "b" / "decoder.onnx"), load_external_data=False)
    assert "policy_slots" not in {value.name for value in graph.graph.input}
    answer = Generator(tmp_path / "b").generate([GenerateRequest("hello", max_new_tokens=3)])[0]
    assert answer.policy == "off" and len(answer.token_ids) == 3
    with pytest.raises(PolicyError):
        Generator(tmp_path / "b").generate([GenerateRequest("hello", policy="default")])


def test_a_pack_of_equal_shapes_is_a_file_swap(make_pack, tmp_path):
    first, second = make_pack("first", seed=0), make_pack("second", seed=1)
    steering = "steering.safetensors"
    assert header_sha256(first.path / steering) == header_sha256(second.path / steering)
    export_model("internvl", checkpoint="pocket-internvl", pack=first.path, output=tmp_path / "b")
    before = Generator(tmp_path / "b").generate([GenerateRequest("hello", max_new_tokens=8)])[0]
    shutil.rmtree(tmp_path / "b" / "pack")
    shutil.copytree(second.path, tmp_path / "b" / "pack")
    export_model("internvl", checkpoint="pocket-internvl", pack=second.path, output=tmp_path / "c")
    swapped, exported = (
        Generator(tmp_path / name).generate([GenerateRequest("hello", max_new_tokens=8)])[0] for name in "bc"
    )
    assert swapped.token_ids == exported.token_ids != before.token_ids


def test_command_line_end_to_end(run_cli, tmp_path):
    out = tmp_path / "bundle"
    arguments = ("--model", "internvl", "--checkpoint", "pocket-internvl", "--output", out)
    first = run_cli(*arguments, "--json", module="daco_rt.export")
    assert first.returncode == 0, first.stderr
    assert json.loads(first.stdout)["default_policy"] == "default"
    verified = run_cli("verify", out, "--tokens", 4, "--json", "--no-model")
    assert verified.returncode == 0, verified.stdout
    assert json.loads(verified.stdout)["passed"] is True
    asked = run_cli("generate", out, "--prompt", "What is a dagger?", "--max-new-tokens", 5, "--json")
    assert json.loads(asked.stdout)["generated_tokens"] == 5
    assert run_cli("inspect", out).returncode == 0
    assert run_cli("inspect", out / "pack", "--json").returncode == 0


class TestVerificationCanFail:
    """A verification that cannot fail proves nothing: each check is shown a bundle that breaks it."""

    def test_rows_that_are_not_steered(self, bundle_copy):
        graph = onnx.load(str(bundle_copy / "decoder.onnx"), load_external_data=False)
        blocks = load_bundle(bundle_copy).steered_blocks
        _edit_initialiser(graph, f"steer.{blocks[0]}.slot_map", lambda a: np.zeros_like(a), bundle_copy)
        found = self._verify_changed(graph, bundle_copy)
        assert found["steering fires on every generated token"] == "fail"

    def test_another_operator_than_the_pack_says(self, bundle_copy):
        graph = onnx.load(str(bundle_copy / "decoder.onnx"), load_external_data=False)
        block = load_bundle(bundle_copy).steered_blocks[0]
        _edit_initialiser(graph, f"steer.{block}.gain", lambda a: a * 0.5, bundle_copy)
        found = self._verify_changed(graph, bundle_copy)
        assert found["rows equal the float64 reference"] == "fail"
        assert found["a planted concept is edited at every block"] == "fail"

    def test_a_model_that_was_altered(self, bundle_copy):
        graph = onnx.load(str(bundle_copy / "decoder.onnx"), load_external_data=False)
        _edit_initialiser(graph, "norm.weight", lambda a: a * 1.01, bundle_copy)
        found = self._verify_changed(graph, bundle_copy)
        assert found["logits equal Hugging Face, unsteered"] == "fail"

    @staticmethod
    def _verify_changed(graph, bundle) -> dict[str, str]:
        onnx.save(graph, str(bundle / "decoder.onnx"))
        with pytest.raises(ArtifactError, match=r"decoder\.onnx"):
            verify_bundle(bundle)  # the changed file is caught before anything runs
        _accept_change(bundle, "decoder.onnx")
        return states(verify_bundle(bundle, tokens=4))


def _edit_initialiser(graph, name, change, folder) -> None:
    """Replace one external tensor of a graph by an inline one with other values."""
    (tensor,) = [t for t in graph.graph.initializer if t.name == name]
    array = onnx.numpy_helper.to_array(tensor, base_dir=str(folder))
    tensor.CopyFrom(onnx.numpy_helper.from_array(change(array), tensor.name))


def _accept_change(bundle, file) -> None:
    """Make the manifest vouch for a changed file, as an attacker or a buggy exporter would."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    data = (bundle / file).read_bytes()
    manifest["files"][file] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    del manifest["checksum"]
    (bundle / "manifest.json").write_bytes(encode_manifest(manifest))


def test_packs_are_checked_before_anything_is_written(make_pack, tmp_path):
    pack = make_pack("other", dim=64)
    with pytest.raises(ArtifactError):
        export_model("internvl", checkpoint="pocket-internvl", pack=pack.path, output=tmp_path / "b")
    assert not (tmp_path / "b").exists()
    assert load_pack(pack.path).dim == 64
