"""Bundles of packs in other forms than the default: int8 weights, the elastic net, affine edits."""

from __future__ import annotations

import onnx
import pytest

from daco_rt.artifacts import load_dictionary
from daco_rt.dictionary import dictionary_for
from daco_rt.export import export_model, verify_bundle
from daco_rt.runtime.generate import Generator
from daco_rt.runtime.request import GenerateRequest
from daco_rt.steering import compile_affine_pack, compile_pursuit_pack


@pytest.fixture(scope="module")
def dictionary():
    return load_dictionary(dictionary_for("pocket-internvl"))


def failed(report) -> list:
    return [check for check in report.checks if check.state == "fail"]


def test_an_int8_pack_verifies_with_the_library_and_as_a_function(dictionary, tmp_path):
    pack = compile_pursuit_pack(dictionary, tmp_path / "pack", dtype="int8", k=12)
    out = tmp_path / "bundle"
    result = export_model("internvl", checkpoint="pocket-internvl", pack=pack.path, output=out)
    assert not result.library_required
    graph = onnx.load(str(out / "decoder.onnx"), load_external_data=False).graph
    stored = {t.name: t.data_type for t in graph.initializer if t.name.startswith("steer.")}
    block = pack.blocks[0]
    assert stored[f"steer.{block}.atoms"] == onnx.TensorProto.INT8
    assert stored[f"steer.{block}.scales"] == onnx.TensorProto.FLOAT
    report = verify_bundle(out, tokens=8)
    assert report.passed, failed(report)
    states = {check.name: check.state for check in report.checks}
    assert states["library and functions agree"] == "pass"
    assert states["logits equal Hugging Face, policy default"] == "pass"


def test_an_elastic_net_pack_verifies_with_the_library(dictionary, tmp_path):
    pack = compile_pursuit_pack(dictionary, tmp_path / "pack", coder="elastic_net", dtype="fp16")
    out = tmp_path / "bundle"
    result = export_model("internvl", checkpoint="pocket-internvl", pack=pack.path, output=out)
    assert "elastic_net" in result.library_required
    report = verify_bundle(out, tokens=6)
    assert report.passed, failed(report)


def test_an_affine_pack_verifies_with_the_library_and_as_a_function(dictionary, tmp_path):
    blocks = dictionary.blocks[:2]
    pack = compile_affine_pack(
        {block: dictionary.atoms(block)[:3] for block in blocks},
        tmp_path / "pack",
        model=dictionary.model,
        median_norm=dictionary.median_norm,
        means={block: dictionary.mean(block) for block in blocks},
        strengths={"default": 1.0, "mirror": 2.0},
    )
    out = tmp_path / "bundle"
    result = export_model("internvl", checkpoint="pocket-internvl", pack=pack.path, output=out)
    assert not result.library_required and "affine edits of rank 3" in result.coder
    report = verify_bundle(out, tokens=8)
    assert report.passed, failed(report)
    states = {check.name: check.state for check in report.checks}
    assert states["library and functions agree"] == "pass"
    assert states["logits equal Hugging Face, policy default"] == "pass"
    generator = Generator(out)
    plain, steered = (
        generator.generate([GenerateRequest("hello", policy=name, max_new_tokens=6)])[0]
        for name in ("off", "mirror")
    )
    assert plain.token_ids and steered.token_ids
