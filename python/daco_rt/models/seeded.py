"""Random weights that are the same bytes on every machine, and the small vision tower made of them.

The built-in checkpoints need a vision tower and a projector before a trained one exists. Drawing
normals through the C library differs in the last bit between platforms, so values are sums of
integers instead: a checkpoint made here has one hash everywhere.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

# Four uniform 16-bit integers: variance 4 (2^32 - 1) / 12 around 4 * 65535 / 2.
_MEAN = 131070.0
_STD = math.sqrt((2.0**32 - 1.0) / 3.0)

VISION_CONFIG: Mapping[str, Any] = {
    "model_type": "internvl_vision",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "hidden_size": 192,
    "image_size": [64, 64],
    "initializer_range": 0.02,
    "intermediate_size": 576,
    "layer_norm_eps": 1e-6,
    "layer_scale_init_value": 1.0,
    "norm_type": "layer_norm",
    "num_attention_heads": 6,
    "num_channels": 3,
    "num_hidden_layers": 5,
    "patch_size": [8, 8],
    "projection_dropout": 0.0,
    "use_absolute_position_embeddings": True,
    "use_mask_token": False,
    "use_mean_pooling": False,
    "use_qk_norm": False,
}
IMAGE_TOKENS = 16


def near_normal(name: str, shape: Sequence[int], std: float, *, seed: int = 0) -> np.ndarray:
    """Return bell-shaped noise that depends only on ``name``, ``shape``, ``std`` and ``seed``.

    Parameters
    ----------
    name : str
        The tensor's name: every tensor gets its own stream.
    shape : sequence of int
        Shape of the result.
    std : float
        Standard deviation; values stay within 3.5 of it.
    seed : int
        Seed of the whole checkpoint.

    Returns
    -------
    numpy.ndarray
        ``float32`` of ``shape``.

    Example
    -------
    >>> near_normal("w", (2, 3), 0.5).shape
    (2, 3)
    """
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], "little")
    count = math.prod(shape)
    raw = np.random.Philox(key=key).random_raw(count).astype("<u8", copy=False)
    total = raw.view("<u2").reshape(count, 4).sum(axis=1, dtype=np.int64)
    return ((total - _MEAN) * (std / _STD)).astype(np.float32).reshape(tuple(shape))


def fan_in(name: str, shape: Sequence[int], *, gain: float = 1.0, seed: int = 0) -> np.ndarray:
    """Return a weight of ``shape`` (outputs first) that keeps its inputs' variance times ``gain`` squared."""
    return near_normal(name, shape, gain / math.sqrt(math.prod(shape[1:])), seed=seed)


def vision_tensors(
    text_width: int, embedding_norm: float, *, seed: int = 0
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the tower and projector of ``VISION_CONFIG`` under their stored names.

    Parameters
    ----------
    text_width : int
        Width d of the text model.
    embedding_norm : float
        Typical Euclidean norm of a token embedding; image embeddings come out near it, so that an
        untrained picture neither drowns nor vanishes beside the words.
    seed : int
        Seed of the whole checkpoint.

    Yields
    ------
    tuple of (str, numpy.ndarray)
        Stored name and ``float32`` tensor.
    """
    width = int(VISION_CONFIG["hidden_size"])
    inner = int(VISION_CONFIG["intermediate_size"])
    patch = int(VISION_CONFIG["patch_size"][0])
    side = int(VISION_CONFIG["image_size"][0]) // patch
    ones, zeros = np.ones(width, np.float32), np.zeros(width, np.float32)

    root = "vision_tower.embeddings."
    yield root + "cls_token", near_normal(root + "cls_token", (1, 1, width), 1.0, seed=seed)
    name = root + "patch_embeddings.projection.weight"
    yield name, fan_in(name, (width, 3, patch, patch), gain=3.0, seed=seed)
    yield root + "patch_embeddings.projection.bias", zeros
    name = root + "position_embeddings"
    yield name, near_normal(name, (1, side * side + 1, width), 0.5, seed=seed)
    for layer in range(int(VISION_CONFIG["num_hidden_layers"])):
        root = f"vision_tower.encoder.layer.{layer}."
        for part in ("q_proj", "k_proj", "v_proj", "projection_layer"):
            name = f"{root}attention.{part}.weight"
            yield name, fan_in(name, (width, width), seed=seed)
        yield root + "attention.projection_layer.bias", zeros
        for part in ("layernorm_before", "layernorm_after"):
            yield f"{root}{part}.weight", ones
            yield f"{root}{part}.bias", zeros
        for part in ("lambda_1", "lambda_2"):
            yield root + part, ones
        name = root + "mlp.fc1.weight"
        yield name, fan_in(name, (inner, width), seed=seed)
        yield root + "mlp.fc1.bias", np.zeros(inner, np.float32)
        name = root + "mlp.fc2.weight"
        yield name, fan_in(name, (width, inner), seed=seed)
        yield root + "mlp.fc2.bias", zeros
    yield "vision_tower.layernorm.weight", ones
    yield "vision_tower.layernorm.bias", zeros

    root = "multi_modal_projector."
    yield root + "layer_norm.weight", np.ones(4 * width, np.float32)
    yield root + "layer_norm.bias", np.zeros(4 * width, np.float32)
    name = root + "linear_1.weight"
    yield name, fan_in(name, (text_width, 4 * width), seed=seed)
    yield root + "linear_1.bias", np.zeros(text_width, np.float32)
    name = root + "linear_2.weight"
    # gelu of a unit normal has a root mean square of 0.652: undo it, then scale to the embeddings.
    gain = embedding_norm / math.sqrt(text_width) / 0.652
    yield name, fan_in(name, (text_width, text_width), gain=gain, seed=seed)
    yield root + "linear_2.bias", np.zeros(text_width, np.float32)
