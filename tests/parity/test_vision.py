"""The rebuilt vision tower and projector against Hugging Face eager."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import transformers
from tiny_models import TOLERANCE, Tiny, randomise, relative_error, session

from daco_rt.errors import CheckpointError, UnsupportedError
from daco_rt.models import families, resolve_checkpoint
from daco_rt.models.vision import VisionConfig

BASE = families()["internvl"].tiny_configs()["qwen2"]
VARIANTS = {
    f"{norm}-{'qknorm' if qk else 'plain'}-{'bias' if bias else 'nobias'}": {
        "norm_type": norm, "use_qk_norm": qk, "attention_bias": bias
    }
    for norm, qk, bias in itertools.product(("layer_norm", "rms_norm"), (False, True), (False, True))
} | {
    "final-norm": {"use_mean_pooling": False, "norm_type": "rms_norm"},
    "no-positions": {"use_absolute_position_embeddings": False},
    "tanh-gelu": {"hidden_act": "gelu_pytorch_tanh"},
    "quick-gelu": {"hidden_act": "quick_gelu"},
    "epsilon": {"layer_norm_eps": 0.1},
    "deep": {"num_hidden_layers": 4},
}  # fmt: skip


def saved(path, outer=None, dtype=torch.float32, **tower) -> Tiny:
    torch.manual_seed(5)
    kind = transformers.InternVLForConditionalGeneration
    config = {**BASE, **(outer or {}), "vision_config": {**BASE["vision_config"], **tower}}
    model = kind._from_config(kind.config_class(**config), attn_implementation="eager", dtype=torch.float32)
    randomise(model.eval())
    model.to(dtype).save_pretrained(path)
    return Tiny(families()["internvl"], model, resolve_checkpoint("internvl", path))


def run_both(small: Tiny, tiles: int, dtype: str = "fp32") -> tuple[np.ndarray, np.ndarray]:
    side = small.spec.image_size(small.checkpoint.config)
    pixels = torch.randn(tiles, 3, side, side, generator=torch.Generator().manual_seed(tiles))
    graph = small.spec.build_vision(small.checkpoint, dtype=dtype)
    loaded = session(graph, small.checkpoint.path / "vision.onnx")
    kind = np.float32 if dtype == "fp32" else np.float16
    (found,) = loaded.run(None, {"pixel_values": pixels.numpy().astype(kind)})
    with torch.no_grad():
        expected = small.model.get_image_features(pixels).pooler_output.float().numpy()
    return found, expected


@pytest.mark.parametrize("tiles", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_tower(variant, tiles, tmp_path):
    small = saved(tmp_path, **VARIANTS[variant])
    found, expected = run_both(small, tiles)
    config = small.checkpoint.config
    assert found.shape == (tiles, config["image_seq_length"], small.checkpoint.decoder.hidden_size)
    assert relative_error(found, expected) <= TOLERANCE


@pytest.mark.parametrize("layer", [-3, -2, 1, 2, 3])
def test_feature_layer(layer, tmp_path):
    """Hidden states other than the output skip the closing norm; layers beyond them are not in the graph."""
    small = saved(tmp_path, {"vision_feature_layer": layer}, num_hidden_layers=3, use_mean_pooling=False)
    found, expected = run_both(small, 2)
    assert relative_error(found, expected) <= TOLERANCE
    used = layer if layer >= 0 else layer + 4
    assert f"vision_tower.encoder.layer.{used - 1}.lambda_1" in small.checkpoint.vision
    assert f"vision_tower.encoder.layer.{used}.lambda_1" not in small.checkpoint.vision


@pytest.mark.parametrize(("ratio", "tokens", "act"), [(1.0, 16, "gelu"), (0.5, 4, "relu"), (0.25, 1, "silu")])
def test_pixel_shuffle_and_projector(ratio, tokens, act, tmp_path):
    outer = {"downsample_ratio": ratio, "image_seq_length": tokens, "projector_hidden_act": act}
    found, expected = run_both(saved(tmp_path, outer), 2)
    assert found.shape[1] == tokens
    assert relative_error(found, expected) <= TOLERANCE


def test_half_precision(tmp_path):
    """fp16 loses at most twice what plain torch loses in fp16."""
    small = saved(tmp_path, dtype=torch.float16)
    side = small.spec.image_size(small.checkpoint.config)
    pixels = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(3))
    found, plain = run_both(small, 3, "fp16")
    assert found.dtype == np.float16
    with torch.no_grad():
        expected = small.model.float().get_image_features(pixels).pooler_output.numpy()
    assert relative_error(found, expected) <= 2 * relative_error(plain, expected) + 2e-4


def test_graph_contract(tmp_path):
    small = saved(tmp_path)
    path = tmp_path / "contract.onnx"
    ir.save(small.spec.build_vision(small.checkpoint), path)
    onnx.checker.check_model(str(path), full_check=True)
    proto = onnx.load(str(path), load_external_data=False)
    assert [i.name for i in proto.graph.input] == ["pixel_values"]
    assert [o.name for o in proto.graph.output] == ["image_embeds"]
    assert {node.domain for node in proto.graph.node} == {""}
    names = {t.name for t in proto.graph.initializer if t.external_data}
    assert names == set(small.checkpoint.vision)


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"vision_config": {"image_size": [28, 56]}}, UnsupportedError, "image_size .* square"),
        ({"vision_config": {"norm_type": "batch"}}, UnsupportedError, "norm_type 'batch'"),
        ({"vision_feature_select_strategy": "full"}, UnsupportedError, "'full' is not implemented"),
        ({"vision_feature_layer": [1, 2]}, UnsupportedError, r"vision_feature_layer \[1, 2\]"),
        ({"vision_feature_layer": 99}, CheckpointError, "99 is outside"),
        ({"downsample_ratio": 0.3}, UnsupportedError, "downsample_ratio 0.3"),
        ({"image_seq_length": 99}, CheckpointError, "image_seq_length is 99, .* give 256"),
        ({"vision_config": {"patch_size": 15}}, CheckpointError, "must be a multiple of patch_size"),
    ],
)
def test_refused_configurations(change, error, sentence):
    assert VisionConfig.from_hf({}, 64).tokens == 256
    with pytest.raises(error, match=sentence):
        VisionConfig.from_hf(change, 64)
