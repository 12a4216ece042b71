"""Packs of every form in the dialect of TensorRT: what the plugin gets, and the numbers by the functions."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from plugin_host import plugin_library

from daco_rt.artifacts import load_dictionary
from daco_rt.artifacts.bundle import load_bundle
from daco_rt.artifacts.engine import PLUGIN, TensorRTPlan
from daco_rt.dictionary import dictionary_for
from daco_rt.errors import DacoError
from daco_rt.export import export_model, verify_bundle
from daco_rt.runtime.onnx_session import OnnxSession
from daco_rt.steering import compile_affine_pack, compile_pursuit_pack


@pytest.fixture(scope="module")
def dictionary():
    plugin_library()
    return load_dictionary(dictionary_for("pocket-internvl"))


def make_pack(form: str, dictionary, path: Path) -> Path:
    if form == "affine":
        blocks = dictionary.blocks[:2]
        return compile_affine_pack(
            {block: dictionary.atoms(block)[:3] for block in blocks},
            path,
            model=dictionary.model,
            median_norm=dictionary.median_norm,
            means={block: dictionary.mean(block) for block in blocks},
            strengths={"default": 1.0},
        ).path
    options = {"int8": {"dtype": "int8", "k": 8}, "elastic_net": {"coder": "elastic_net", "dtype": "fp16"},
               "no gram": {"gram": "none", "k": 8, "dtype": "fp16"}}[form]  # fmt: skip
    return compile_pursuit_pack(dictionary, path, **options).path


OPERANDS = {
    "affine": "z,slots,a,a_bias,b,shift,limits",
    "int8": "z,slots,analysis,bias,gram,atoms,gain,undesirable,shift,limits,scales",
    "elastic_net": "z,slots,analysis,bias,gram,atoms,gain,undesirable,shift,limits",
    "no gram": "z,slots,analysis,bias,atoms,gain,undesirable,shift,limits",
}


@pytest.mark.parametrize("form", OPERANDS)
def test_every_form_of_pack(form: str, dictionary, tmp_path: Path):
    pack = make_pack(form, dictionary, tmp_path / "pack")
    out = tmp_path / "bundle"
    result = export_model(
        "internvl", checkpoint="pocket-internvl", pack=pack, output=out, runtime="tensorrt", max_length=128
    )
    assert result.runtime == "tensorrt" and not result.engine
    bundle = load_bundle(out)
    assert TensorRTPlan.of(bundle).plugin_sha256 == bundle.manifest["files"][PLUGIN]["sha256"]
    graph = onnx.load(str(bundle.decoder_path), load_external_data=False)
    nodes = [node for node in graph.graph.node if node.domain == "ai.daco"]
    assert len(nodes) == len(bundle.steered_blocks) > 0
    for node in nodes:
        assert all(node.input), "an input is missing"
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert attributes["operands"] == OPERANDS[form].encode()
        assert len(node.input) == OPERANDS[form].count(",") + 1
        assert attributes["plugin_namespace"] == b"ai.daco" and attributes["plugin_version"] == b"1"
    if form == "elastic_net":
        assert not graph.functions
        with pytest.raises(DacoError, match="nor has its operator a portable form"):
            OnnxSession(bundle)
        return
    report = verify_bundle(out, tokens=4, compare_model=False)
    assert report.passed, [check for check in report.checks if check.state == "fail"]
