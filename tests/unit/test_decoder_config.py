"""Hugging Face text configurations → DecoderConfig: both spellings, defaults, refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest

from daco_rt.errors import CheckpointError, UnsupportedError
from daco_rt.models import DecoderConfig

QWEN2 = {"model_type": "qwen2", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64, "rope_theta": 5e5}  # fmt: skip


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("qwen2", "Qwen2Config"),
        ("qwen3", "Qwen3Config"),
        ("llama", "LlamaConfig"),
        ("mistral", "MistralConfig"),
        ("qwen2_vl", "Qwen2VLTextConfig"),
        ("qwen2_5_vl", "Qwen2_5_VLTextConfig"),
        ("qwen3_vl", "Qwen3VLTextConfig"),
    ],
)
def test_defaults_are_those_of_transformers(module, name):
    import importlib

    source = importlib.import_module(f"transformers.models.{module}.configuration_{module}")
    config = getattr(source, name)(sliding_window=None)
    written = config.to_dict()
    written.pop("mrope_section", None)
    short = {"model_type": written["model_type"], "sliding_window": None}
    assert DecoderConfig.from_hf(short) == DecoderConfig.from_hf(written)


def test_both_spellings_of_rotary_settings():
    new = DecoderConfig.from_hf({**QWEN2, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}})
    old = DecoderConfig.from_hf({**QWEN2, "rope_theta": 1e6, "rope_scaling": None})
    assert new == old
    assert new.rope_theta == 1e6
    old_scaling = {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2}}
    scaled = DecoderConfig.from_hf({**QWEN2, **old_scaling})
    assert (scaled.rope_type, scaled.rope_scaling, scaled.rope_theta) == ("linear", {"factor": 2.0}, 1e6)


def test_switches_of_each_backbone():
    assert DecoderConfig.from_hf(QWEN2).qkv_bias
    assert not DecoderConfig.from_hf(QWEN2).o_bias
    qwen3 = DecoderConfig.from_hf({**QWEN2, "model_type": "qwen3"})
    assert (qwen3.qk_norm, qwen3.qkv_bias, qwen3.head_dim) == (True, False, 128)
    llama = DecoderConfig.from_hf({**QWEN2, "model_type": "llama", "attention_bias": True})
    assert (llama.qk_norm, llama.qkv_bias, llama.o_bias, llama.head_dim) == (False, True, True, 16)


@pytest.mark.parametrize("theta", [1e4, 1e6])
@pytest.mark.parametrize("head_dim", [16, 96, 128])
@pytest.mark.parametrize("rope", [{"rope_type": "default"}, {"rope_type": "linear", "factor": 3.0}, LLAMA3])
def test_frequencies_equal_transformers(rope, head_dim, theta):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    heads = {"hidden_size": 4 * head_dim, "num_attention_heads": 4}
    config = LlamaConfig(**heads, rope_parameters={**rope, "rope_theta": theta}, max_position_embeddings=512)
    expected = LlamaRotaryEmbedding(config).inv_freq.numpy()
    found = DecoderConfig.from_hf(config.to_dict()).inverse_frequencies()
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=5e-7, atol=0)


def test_sections_chunked_and_interleaved():
    chunked = {"rope_type": "default", "mrope_section": [2, 3, 3]}
    config = DecoderConfig.from_hf({**QWEN2, "rope_scaling": {**chunked, "type": "mrope"}})
    assert config.position_axes == 3
    assert config.section_selector().argmax(0).tolist() == [0, 0, 1, 1, 1, 2, 2, 2]
    dealt = {"mrope_section": [4, 2, 2], "mrope_interleaved": True}
    config = DecoderConfig.from_hf({**QWEN2, "rope_parameters": dealt})
    assert config.section_selector().argmax(0).tolist() == [0, 1, 2, 0, 1, 2, 0, 0]
    assert (config.section_selector().sum(0) == 1).all()


def test_round_trip_through_json():
    config = DecoderConfig.from_hf({**QWEN2, "rope_parameters": {"mrope_section": [2, 3, 3], **LLAMA3}})
    again = DecoderConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    with pytest.raises(CheckpointError, match="unknown keys colour"):
        DecoderConfig.from_dict({**config.to_dict(), "colour": "red"})
    with pytest.raises(CheckpointError, match="incomplete"):
        DecoderConfig.from_dict({"hidden_size": 3})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model_type": "mamba"}, "'mamba' has no decoder here; supported: llama"),
        ({"use_sliding_window": True, "sliding_window": 128}, "use_sliding_window is not implemented"),
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding_window 4096"),
        ({"model_type": "mistral"}, "sliding_window 4096"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types sliding_attention"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"model_type": "llama", "mlp_bias": True}, "mlp_bias"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type 'longrope'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differ between layer types"),
    ],
)
def test_features_refused_by_name(change, sentence):
    with pytest.raises(UnsupportedError, match=sentence):
        DecoderConfig.from_hf({**QWEN2, **change})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"hidden_size": "64"}, "hidden_size must be a positive integer, got '64'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer, got 0"),
        ({"num_key_value_heads": 3}, "4 attention heads, 3 key/value heads"),
        ({"head_dim": 15}, "head_dim 15"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_type 'linear' needs factor"),
        ({"rope_parameters": {"mrope_section": [1, 2, 3]}}, r"mrope_section \[1, 2, 3\] .* = 8"),
    ],
)
def test_contradictions_are_named(change, sentence):
    with pytest.raises(CheckpointError, match=sentence):
        DecoderConfig.from_hf({**QWEN2, **change})


def test_inactive_window_is_accepted():
    plain = {"use_sliding_window": False, "sliding_window": 4096, "layer_types": ["full_attention"] * 2}
    assert DecoderConfig.from_hf({**QWEN2, **plain}) == DecoderConfig.from_hf(QWEN2)
