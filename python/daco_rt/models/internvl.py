"""InternVL (Hugging Face's ``InternVLForConditionalGeneration``) on a Qwen2, Qwen3 or Llama language model.

The processor cuts a picture into square tiles (and a thumbnail when there are several); each tile becomes
``image_seq_length`` embeddings that replace as many image tokens, in order. Positions simply count tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from daco_rt.errors import CheckpointError
from daco_rt.models.config import DecoderConfig
from daco_rt.models.family import FamilySpec
from daco_rt.models.vision import VisionConfig

if TYPE_CHECKING:
    import onnx_ir as ir

    from daco_rt.models.checkpoint import Checkpoint
    from daco_rt.models.layers import Locate


def decoder_config(config: Mapping[str, Any], head_stored: bool) -> DecoderConfig:
    """Read the language model's part of ``config.json``.

    A stored head is used even if the configuration says "tied": that is what transformers does when the two
    differ, and when they are equal nothing is lost. Raises ``CheckpointError`` if there should be one.
    """
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        raise CheckpointError("config.json has no text_config, so it is no InternVL checkpoint")
    if not head_stored and not config.get("tie_word_embeddings", True):
        raise CheckpointError(
            "the checkpoint has no lm_head.weight although config.json says tie_word_embeddings false;"
            " it is incomplete: download it again"
        )
    return DecoderConfig.from_hf({"model_type": "qwen2", **text}, tie_word_embeddings=not head_stored)


def vision_config(config: Mapping[str, Any]) -> VisionConfig:
    """Read the vision tower's and projector's part of ``config.json``."""
    return VisionConfig.from_hf(config, decoder_config(config, True).hidden_size)


def build_vision(checkpoint: Checkpoint, *, dtype: str = "fp32", locate: Locate | None = None) -> ir.Model:
    """Build ``pixel_values`` [tiles, 3, H, W] → ``image_embeds`` [tiles, image_seq_length, d]."""
    from daco_rt.models import vision_graph

    return vision_graph.build_vision(
        vision_config(checkpoint.config), checkpoint.vision_weights(), dtype=dtype, locate=locate
    )


def image_token_id(config: Mapping[str, Any]) -> int:
    """Return the id of the token that is replaced by one image embedding."""
    return int(config.get("image_token_id", 151667))


def position_ids(input_ids: np.ndarray, start: np.ndarray | None = None) -> np.ndarray:
    """Return int64 [1, B, S]: token i of row b stands at ``start[b]`` + i (``start`` is 0 if not given).

    Example
    -------
    >>> position_ids(np.zeros((1, 3)), np.array([5])).tolist()
    [[[5, 6, 7]]]
    """
    batch, length = np.shape(input_ids)
    first = np.zeros(batch, np.int64) if start is None else np.asarray(start, np.int64)
    return (first[:, None] + np.arange(length, dtype=np.int64))[None]


def redirect(config: Mapping[str, Any], label: str) -> str | None:
    """Name the ``-hf`` twin of a repository in InternVL's original layout, which runs code of its own."""
    original = config.get("model_type") == "internvl_chat" or "InternVLChatModel" in (
        config.get("architectures") or ()
    )
    if not original:
        return None
    name = label if "/" in label and not label.startswith("/") else str(config.get("_name_or_path") or label)
    twin = re.sub(r"/+$", "", name)
    twin = twin if "/" in twin and not twin.startswith("/") else f"OpenGVLab/{twin.rsplit('/', 1)[-1]}"
    return (
        f"{label} is an InternVL repository in its original format (InternVLChatModel), which is not"
        f" supported; use its Hugging Face twin {twin}-hf instead"
    )


def tiny_configs() -> dict[str, dict[str, Any]]:
    """Return the shapes that tests run: every text model and every variant of the tower."""
    text = {"model_type": "qwen2", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 160,
            "max_position_embeddings": 256, "rms_norm_eps": 1e-6}  # fmt: skip
    tower = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 3,
             "image_size": [32, 32], "patch_size": [8, 8]}  # fmt: skip
    outer = {"image_token_id": 7, "image_seq_length": 4, "downsample_ratio": 0.5}
    rotary = {"rope_type": "default", "rope_theta": 1e6}
    return {
        "qwen2": {**outer, "text_config": {**text, "rope_parameters": rotary}, "vision_config": tower},
        "qwen3": {
            **outer,
            "text_config": {**text, "model_type": "qwen3", "head_dim": 24, "rope_parameters": rotary},
            "vision_config": {**tower, "norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": True},
        },
        "untied": {
            **outer,
            "tie_word_embeddings": False,
            "text_config": {**text, "num_key_value_heads": 4},
            "vision_config": {**tower, "use_mean_pooling": False, "hidden_act": "gelu_pytorch_tanh"},
        },
        "llama": {
            **outer,
            "vision_feature_layer": -2,
            "text_config": {**text, "model_type": "llama", "num_key_value_heads": 1, "attention_bias": True,
                            "rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0,
                                                "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                                "original_max_position_embeddings": 32}},
            "vision_config": tower,
        },
    }  # fmt: skip


INTERNVL = FamilySpec(
    name="internvl",
    architectures=("InternVLForConditionalGeneration",),
    text_prefixes=("language_model.model.", "model.language_model."),
    head_names=("language_model.lm_head.weight", "lm_head.weight"),
    vision_prefixes=("", "model."),
    position_axes=1,
    blocks_path="model.language_model.layers",
    decoder_config=decoder_config,
    vision_shapes=lambda config: vision_config(config).tensor_shapes(),
    build_vision=build_vision,
    image_token_id=image_token_id,
    tokens_per_tile=lambda config: vision_config(config).tokens,
    image_size=lambda config: vision_config(config).image_size,
    position_ids=position_ids,
    tiny_configs=tiny_configs,
    redirect=redirect,
)
