"""What an InternVL vision tower and projector look like: sizes, switches, tensors.

Kept apart from the graph builder so that a checkpoint can be checked without loading ONNX packages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from daco_rt.errors import CheckpointError, UnsupportedError

_DEFAULTS: dict[str, Any] = {
    "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
    "attention_bias": False, "use_qk_norm": False, "hidden_act": "gelu", "norm_type": "layer_norm",
    "layer_norm_eps": 1e-6, "image_size": (448, 448), "patch_size": (14, 14), "num_channels": 3,
    "use_absolute_position_embeddings": True, "use_mean_pooling": True,
}  # fmt: skip


@dataclass(frozen=True)
class VisionConfig:
    """One vision tower with its pixel shuffle and projector.

    The tower sees square tiles of ``image_size`` pixels, cut into a ``grid`` × ``grid`` of patches.
    ``layers`` is the number of encoder layers that the feature needs (the rest are left out of the graph);
    ``final_norm`` says whether the tower's closing norm is applied to it. Every tile becomes ``tokens``
    embeddings of width ``text_width``.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    image_size: int
    patch_size: int
    channels: int
    attention_bias: bool
    qk_norm: bool
    hidden_act: str
    norm_type: str
    layer_norm_eps: float
    position_embeddings: bool
    layers: int
    final_norm: bool
    downsample_ratio: float
    projector_act: str
    text_width: int

    @property
    def grid(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Embeddings that one tile becomes."""
        return int(self.grid * self.downsample_ratio) ** 2

    @property
    def shuffled_width(self) -> int:
        """Width of a token between pixel shuffle and projector."""
        return self.hidden_size * int(1 / self.downsample_ratio) ** 2

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], text_width: int) -> VisionConfig:
        """Read the outer ``config.json`` of an ``InternVLForConditionalGeneration`` checkpoint.

        Raises ``UnsupportedError`` for a feature that the graph does not implement, ``CheckpointError`` for
        sizes that contradict each other.
        """
        given = config.get("vision_config") or {}
        found = {**_DEFAULTS, **{key: value for key, value in given.items() if value is not None}}
        image, patch = _square(found, "image_size"), _square(found, "patch_size")
        if found["norm_type"] not in ("layer_norm", "rms_norm"):
            raise UnsupportedError(
                f"norm_type {found['norm_type']!r} of the vision tower is not implemented;"
                " supported: layer_norm, rms_norm"
            )
        strategy = config.get("vision_feature_select_strategy", "default")
        if strategy != "default":
            raise UnsupportedError(
                f"vision_feature_select_strategy {strategy!r} is not implemented; expected 'default'"
            )
        layers, final_norm = _feature_layer(
            config.get("vision_feature_layer", -1), found["num_hidden_layers"], found["use_mean_pooling"]
        )
        ratio = float(config.get("downsample_ratio", 0.5))
        vision = cls(
            hidden_size=found["hidden_size"],
            intermediate_size=found["intermediate_size"],
            num_layers=found["num_hidden_layers"],
            num_heads=found["num_attention_heads"],
            image_size=image,
            patch_size=patch,
            channels=found["num_channels"],
            attention_bias=bool(found["attention_bias"]),
            qk_norm=bool(found["use_qk_norm"]),
            hidden_act=found["hidden_act"],
            norm_type=found["norm_type"],
            layer_norm_eps=float(found["layer_norm_eps"]),
            position_embeddings=bool(found["use_absolute_position_embeddings"]),
            layers=layers,
            final_norm=final_norm,
            downsample_ratio=ratio,
            projector_act=config.get("projector_hidden_act", "gelu"),
            text_width=text_width,
        )
        _check_shuffle(vision, config.get("image_seq_length", 256))
        return vision

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name → shape of the tensors that the graph uses."""
        d, ff, p = self.hidden_size, self.intermediate_size, self.patch_size
        shapes: dict[str, tuple[int, ...]] = {
            "vision_tower.embeddings.cls_token": (1, 1, d),
            "vision_tower.embeddings.patch_embeddings.projection.weight": (d, self.channels, p, p),
            "vision_tower.embeddings.patch_embeddings.projection.bias": (d,),
        }
        if self.position_embeddings:
            shapes["vision_tower.embeddings.position_embeddings"] = (1, self.grid**2 + 1, d)
        layer: dict[str, tuple[int, ...]] = {"lambda_1": (d,), "lambda_2": (d,)}
        for name in ("layernorm_before", "layernorm_after"):
            layer[f"{name}.weight"] = (d,)
            if self.norm_type == "layer_norm":
                layer[f"{name}.bias"] = (d,)
        for name in ("q_proj", "k_proj", "v_proj", "projection_layer"):
            layer[f"attention.{name}.weight"] = (d, d)
            if self.attention_bias or name == "projection_layer":
                layer[f"attention.{name}.bias"] = (d,)
        if self.qk_norm:
            layer["attention.q_norm.weight"] = layer["attention.k_norm.weight"] = (d,)
        layer.update({"mlp.fc1.weight": (ff, d), "mlp.fc1.bias": (ff,),
                      "mlp.fc2.weight": (d, ff), "mlp.fc2.bias": (d,)})  # fmt: skip
        for i in range(self.layers):
            shapes.update({f"vision_tower.encoder.layer.{i}.{name}": s for name, s in layer.items()})
        if self.final_norm:
            shapes["vision_tower.layernorm.weight"] = shapes["vision_tower.layernorm.bias"] = (d,)
        wide, text = self.shuffled_width, self.text_width
        for name, width in (("layer_norm", (wide,)), ("linear_1", (text, wide)), ("linear_2", (text, text))):
            shapes[f"multi_modal_projector.{name}.weight"] = width
            shapes[f"multi_modal_projector.{name}.bias"] = width[:1]
        return shapes


def _square(config: Mapping[str, Any], key: str) -> int:
    value = config[key]
    sides = list(value) if isinstance(value, (list, tuple)) else [value, value]
    if len(sides) != 2 or sides[0] != sides[1] or not isinstance(sides[0], int) or sides[0] < 1:
        raise UnsupportedError(
            f"{key} {value!r} of the vision tower is not implemented; expected a square of whole pixels"
        )
    return sides[0]


def _feature_layer(index: Any, depth: int, mean_pooling: bool) -> tuple[int, bool]:
    """How many encoder layers feed the projector, and whether the closing norm (if the tower has one) does.

    Index −1 is the tower's output; any other counts hidden states, of which there are one more than layers
    (the first is the embedding), and those never pass the closing norm.
    """
    if isinstance(index, bool) or not isinstance(index, int):
        raise UnsupportedError(
            f"vision_feature_layer {index!r} is not implemented; expected one whole number"
        )
    if index == -1:
        return depth, not mean_pooling
    if not -depth - 1 <= index <= depth:
        raise CheckpointError(
            f"config.json: vision_feature_layer {index} is outside the tower's {-depth - 1}…{depth}"
        )
    return index % (depth + 1), False


def _check_shuffle(vision: VisionConfig, tokens: int) -> None:
    ratio, width = vision.downsample_ratio, vision.hidden_size
    if vision.image_size % vision.patch_size or width % vision.num_heads:
        raise CheckpointError(
            f"config.json: the vision tower's image_size {vision.image_size} must be a multiple of patch_size"
            f" {vision.patch_size}, and hidden_size {width} of num_attention_heads {vision.num_heads}"
        )
    if not 0 < ratio <= 1 or not math.isclose(1 / ratio, round(1 / ratio)) or vision.grid % round(1 / ratio):
        raise UnsupportedError(
            f"downsample_ratio {ratio} is not implemented for {vision.grid} patches a side;"
            " expected 1/n with n a divisor of the patches a side"
        )
    if vision.tokens != tokens:
        raise CheckpointError(
            f"config.json: image_seq_length is {tokens}, but image_size, patch_size and downsample_ratio give"
            f" {vision.tokens} tokens a tile"
        )
