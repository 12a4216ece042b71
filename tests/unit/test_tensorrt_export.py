"""Export for TensorRT without TensorRT: the dialect, profiles, limits, the recipe, and the engine's
record."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest

from daco_rt.artifacts.bundle import DECODER, load_bundle
from daco_rt.artifacts.engine import DECODER_PLAN, PLUGIN, TensorRTPlan, load_engine
from daco_rt.errors import ArtifactError, DacoError
from daco_rt.export import export_model
from daco_rt.export.tensorrt.build import build_engines, check_plugin, check_version
from daco_rt.export.tensorrt.dialect import to_tensorrt_dialect
from daco_rt.export.tensorrt.profiles import DECODE, PREFILL, decoder_profiles, shape_options
from daco_rt.export.tensorrt.recipe import RECIPE
from daco_rt.export.tensorrt.target import choose_plan, choose_precision
from daco_rt.ops.onnx_functions import steer_function

PLAN = TensorRTPlan(cache_length=64, max_batch=4, max_width=32, max_tiles=2, plugin_sha256=None)
TENSORRT = SimpleNamespace(__version__="10.15.1.29")


@pytest.fixture(scope="module")
def unsteered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TensorRT bundle without steering, which needs no plugin library."""
    from daco_rt.export import bundle

    path = tmp_path_factory.mktemp("trt") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("daco_rt.export.default_pack.default_pack", lambda *_: None)
        bundle.export_model(
            "internvl",
            checkpoint="pocket-internvl",
            output=path,
            runtime="tensorrt",
            max_length=64,
            max_batch=4,
        )
    return path


# ---- the dialect


def steered_graph(given: tuple[str, ...] = ("analysis", "bias", "gram", "atoms", "gain")) -> ir.Model:
    """One pursuit node with the optional ``boost`` and ``scales`` left out, and its function."""
    names = ("analysis", "bias", "gram", "atoms", "gain", "boost", "undesirable", "shift", "limits", "scales")
    function = steer_function("SteerPursuit", coder="omp", k=2, k_out=2)
    z, slots = ir.Value(name="z"), ir.Value(name="slots")
    past = ir.Value(
        name="past_k.0", shape=ir.Shape(["batch", 2, "cache", 8]), type=ir.TensorType(ir.DataType.FLOAT)
    )
    given = (*given, "undesirable", "shift", "limits")
    operands = {n: ir.Value(name=n) for n in names if n in given}
    node = ir.Node(
        "ai.daco",
        "SteerPursuit",
        [z, slots, *(operands.get(n) for n in names)],
        [ir.AttrString("coder", "omp")],
        num_outputs=4,
        name="steer.0",
    )
    graph = ir.Graph([z, slots, past, *operands.values()], list(node.outputs), nodes=[node], name="g")
    return ir.Model(graph, ir_version=11, functions=[function])


def test_gaps_close_and_operands_are_named():
    model = to_tensorrt_dialect(steered_graph(), 64)
    node = next(iter(model.graph))
    assert None not in node.inputs
    wanted = "z,slots,analysis,bias,gram,atoms,gain,undesirable,shift,limits"
    assert node.attributes["operands"].as_string() == wanted
    assert ",".join(v.name for v in node.inputs) == wanted
    function = next(iter(model.functions.values()))
    assert ",".join(v.name for v in function.inputs) == wanted
    used = {value.name for inner in function for value in inner.inputs if value is not None}
    assert not used & {"boost", "scales"}, "the body still reads an operand that no node gives"


def test_the_cache_axis_becomes_a_number():
    model = to_tensorrt_dialect(steered_graph(), 64)
    past = next(v for v in model.graph.inputs if v.name == "past_k.0")
    assert past.shape is not None and past.shape[2] == 64 and past.shape[0] == "batch"
    with pytest.raises(ValueError, match="cache_length must be 1 or greater, got 0"):
        to_tensorrt_dialect(steered_graph(), 0)


def test_nodes_of_one_type_must_leave_out_the_same():
    model, other = steered_graph(), steered_graph(("analysis", "bias", "atoms", "gain"))
    stranger = next(iter(other.graph))
    other.graph.remove(stranger)
    model.graph.append(stranger)
    with pytest.raises(ValueError, match=r"leave out .*'gram'.* must leave out the same operands"):
        to_tensorrt_dialect(model, 64)


# ---- shapes and limits


def test_one_profile_for_prompts_and_one_for_tokens():
    inputs = {
        "inputs_embeds": (-1, -1, 48),
        "position_ids": (3, -1, -1),
        "logits_at": (-1, -1),
        "past_k.0": (-1, 2, 64, 16),
    }
    prefill, decode = decoder_profiles(inputs, PLAN)
    assert (PREFILL, DECODE) == (0, 1)
    assert prefill["inputs_embeds"] == ((1, 1, 48), (1, 16, 48), (4, 32, 48))
    assert decode["inputs_embeds"] == ((1, 1, 48), (2, 1, 48), (4, 1, 48))
    assert prefill["position_ids"].high == (3, 4, 32) and decode["logits_at"].high == (4, 1)
    assert prefill["past_k.0"].low == (1, 2, 64, 16) and decode["past_k.0"].high == (4, 2, 64, 16)
    options = shape_options([prefill, decode])
    assert options[0] == "--profile=0" and options[4] == "--profile=1"
    assert "inputs_embeds:4x32x48,position_ids:3x4x32" in options[3]


@pytest.mark.parametrize(
    ("name", "shape"), [("surprise", (-1, 4)), ("past_k.0", (-1, 2, -1, 16)), ("logits_at", (-1,))]
)
def test_unknown_and_open_inputs_are_refused(name: str, shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        decoder_profiles({name: shape}, PLAN)


def test_precision_follows_the_checkpoint():
    assert choose_precision(None, {"BF16"}) == "bf16"
    assert choose_precision(None, {"BF16", "F32"}) == "fp16"
    assert choose_precision("fp16", {"BF16"}) == "fp16"
    with pytest.raises(DacoError, match="--precision fp32 cannot be had with --runtime tensorrt"):
        choose_precision("fp32", {"F32"})


def test_limits_are_checked():
    assert choose_plan(4096, None, steered=False).max_width == 1024
    assert choose_plan(64, 2, steered=False) == TensorRTPlan(64, 2, 64, 4, None)
    with pytest.raises(DacoError, match="--max-batch must be between 1 and 1024, got 0"):
        choose_plan(64, 0, steered=False)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"runtime": "torchscript"}, "--runtime must be one of onnxruntime, tensorrt, got 'torchscript'"),
        ({"max_batch": 4}, "--max-batch is a limit of TensorRT engines"),
        ({"precision": "bf16"}, "--precision bf16 is for --runtime tensorrt"),
        (
            {"runtime": "tensorrt", "precision": "fp32"},
            "--precision fp32 cannot be had with --runtime tensorrt",
        ),
    ],
)
def test_options_that_do_not_go_together(tmp_path: Path, changes: dict, sentence: str):
    with pytest.raises(DacoError, match=re.escape(sentence)):
        export_model("internvl", checkpoint="pocket-internvl", output=tmp_path / "b", **changes)
    assert not (tmp_path / "b").exists()


def test_old_versions_are_refused():
    check_version(TENSORRT)  # type: ignore[arg-type]
    check_version(SimpleNamespace(__version__="11.4.0.106"))  # type: ignore[arg-type]
    with pytest.raises(
        DacoError, match=r"TensorRT 10\.14\.1 cannot update a cache in place: 10\.15 or later"
    ):
        check_version(SimpleNamespace(__version__="10.14.1"))  # type: ignore[arg-type]


def test_another_plugin_is_refused(tmp_path: Path):
    library = tmp_path / "libplugin.so"
    with pytest.raises(ArtifactError, match=r"libplugin\.so is missing"):
        check_plugin(library, "0" * 64)
    library.write_bytes(b"not that one")
    with pytest.raises(ArtifactError, match="is not the plugin that the bundle was exported with"):
        check_plugin(library, "0" * 64)


# ---- the bundle


def test_the_bundle_says_what_an_engine_needs(unsteered: Path):
    bundle = load_bundle(unsteered)
    assert bundle.runtime == "tensorrt" and bundle.precision == "fp16"
    assert TensorRTPlan.of(bundle) == TensorRTPlan(64, 4, 64, 4, None)
    assert not (unsteered / PLUGIN).exists()
    graph = ir.load(unsteered / DECODER)
    caches = [v for v in graph.graph.inputs if v.name and v.name.startswith("past_")]
    assert caches and all(v.shape is not None and v.shape[2] == 64 for v in caches)
    assert {v.dtype for v in caches} == {ir.DataType.FLOAT16}
    text = (unsteered / RECIPE).read_text()
    assert "trtexec" in text and "python -m daco_rt.export.tensorrt ." in text
    assert "--maxShapes=inputs_embeds:4x64x" in text and "dynamicPlugins" not in text


def test_a_bundle_for_onnxruntime_has_no_plan(tmp_path: Path):
    export_model("internvl", checkpoint="pocket-internvl", output=tmp_path / "b", vision=False)
    with pytest.raises(
        ArtifactError, match="was exported for ONNX Runtime; export it again with --runtime tensorrt"
    ):
        TensorRTPlan.of(load_bundle(tmp_path / "b"))


@pytest.fixture
def recorded(unsteered: Path, tmp_path: Path) -> Path:
    """A copy of the bundle with an engine recorded in it."""
    path = tmp_path / "bundle"
    shutil.copytree(unsteered, path)
    plan = tmp_path / "some.plan"
    plan.write_bytes(b"bytes of a plan")
    build_engines(
        load_bundle(path),
        TENSORRT,  # type: ignore[arg-type]
        device="a device",
        compute="9.0",
        given={DECODER_PLAN: plan},
    )
    return path


def test_a_recorded_engine_opens(recorded: Path):
    engine = load_engine(load_bundle(recorded))
    assert (engine.tensorrt, engine.device, engine.compute) == ("10.15.1.29", "a device", "9.0")
    assert engine.operators == "none" and engine.vision is None
    assert engine.decoder.read_bytes() == b"bytes of a plan"


def test_without_an_engine_the_sentence_says_how_to_get_one(unsteered: Path):
    with pytest.raises(ArtifactError, match="has no engine yet: run python -m"):
        load_engine(load_bundle(unsteered))


def test_a_damaged_plan_is_refused(recorded: Path):
    (recorded / "engine" / DECODER_PLAN).write_bytes(b"other bytes")
    with pytest.raises(ArtifactError, match=r"decoder\.plan is missing or damaged"):
        load_engine(load_bundle(recorded))


def test_an_engine_of_another_graph_is_refused(recorded: Path):
    record = recorded / "engine" / "engine.json"
    data = json.loads(record.read_text())
    data["sources"][DECODER] = "0" * 64
    record.write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match=r"was built from another decoder\.onnx than the bundle has now"):
        load_engine(load_bundle(recorded))
    record.write_text("{")
    with pytest.raises(ArtifactError, match=r"engine\.json is damaged"):
        load_engine(load_bundle(recorded))


def test_bf16_rows_are_looked_up_exactly(unsteered: Path):
    import ml_dtypes

    from daco_rt.models.embedding import TokenEmbedding

    ref = load_bundle(unsteered).embedding_ref()
    table = TokenEmbedding(ref.file, ref.offset, ref.shape, ref.dtype)
    got = table.lookup([3, 5], dtype="bf16")
    assert got.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(got, table.lookup([3, 5]).astype(ml_dtypes.bfloat16))
