"""An InternVL vision tower and projector as an ONNX graph: ``pixel_values`` → ``image_embeds``.

Input ``pixel_values`` [tiles, channels, H, W], already normalised by the processor, in the graph's
precision; output ``image_embeds`` [tiles, tokens, d]. H and W are fixed to the tower's image size: other
sizes would need interpolated position embeddings, and the processor never makes them. The number of tiles is
free.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
from onnxscript import GraphBuilder
from onnxscript.nn import Module, ModuleList, Parameter

from daco_rt.artifacts.tensors import TensorRef
from daco_rt.models import layers
from daco_rt.models.layers import LayerNorm, Linear, Locate, RMSNorm, bind_weights, declare
from daco_rt.models.vision import VisionConfig

# The tower's q/k norms and the projector's layer norm keep their classes' defaults, whatever the
# configuration's epsilon is.
_QK_EPSILON, _PROJECTOR_EPSILON = 1e-6, 1e-5


def build_vision(
    config: VisionConfig,
    weights: Mapping[str, TensorRef],
    *,
    dtype: str = "fp32",
    locate: Locate | None = None,
) -> ir.Model:
    """Build the vision graph; no tensor of the checkpoint is read.

    ``weights`` maps canonical vision names to checkpoint tensors (``checkpoint.vision_weights()``); ``dtype``
    and ``locate`` are as in :func:`daco_rt.models.decoder.build_decoder`. Raises ``CheckpointError`` for a
    missing or ill-shaped tensor, ``UnsupportedError`` for an unknown activation.

    Example
    -------
    >>> model = build_vision(spec.vision_config(checkpoint), checkpoint.vision_weights())
    """
    kind = layers.float_type(dtype)
    graph = ir.Graph([], [], nodes=[], name="vision", opset_imports={"": layers.OPSET})
    builder = GraphBuilder(graph)
    side = config.image_size
    pixels = builder.input("pixel_values", kind, ["tiles", config.channels, side, side])
    module = _VisionModel(config, kind)
    bind_weights(module, weights, dtype, locate, "the vision tower")
    embeds = module(builder.op, pixels)
    builder.add_output(declare(embeds, kind, ["tiles", config.tokens, config.text_width]), "image_embeds")
    return ir.Model(graph, ir_version=layers.IR_VERSION, producer_name="daco_rt")


class _VisionModel(Module):
    def __init__(self, config: VisionConfig, dtype: ir.DataType) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = _Tower(config, dtype)
        self.multi_modal_projector = _Projector(config, dtype)

    def forward(self, op: Any, pixels: ir.Value) -> ir.Value:
        c = self.config
        x = op.Reshape(self.vision_tower(op, pixels), [-1, c.grid**2 + 1, c.hidden_size])
        x = op.Slice(x, [1], [c.grid**2 + 1], [1])  # drops the class token
        x = self.multi_modal_projector(op, layers.to_rows(op, _pixel_shuffle(op, x, c), c.shuffled_width))
        return op.Reshape(x, [-1, c.tokens, c.text_width])


class _Tower(Module):
    def __init__(self, config: VisionConfig, dtype: ir.DataType) -> None:
        super().__init__()
        self.embeddings = _Embeddings(config, dtype)
        self.encoder = _Encoder(config, dtype)
        # The closing norm is a layer norm even in towers whose blocks use RMS norms.
        norm = LayerNorm(config.hidden_size, config.layer_norm_eps, dtype) if config.final_norm else None
        self.layernorm = norm
        self.width = config.hidden_size

    def forward(self, op: Any, pixels: ir.Value) -> ir.Value:
        x = self.embeddings(op, pixels)
        x = self.encoder(op, layers.to_rows(op, x, self.width), op.Shape(x, start=0, end=2))
        return x if self.layernorm is None else self.layernorm(op, x)


class _Embeddings(Module):
    def __init__(self, config: VisionConfig, dtype: ir.DataType) -> None:
        super().__init__()
        d = config.hidden_size
        self.cls_token = Parameter([1, 1, d], dtype)
        self.patch_embeddings = _Patches(config, dtype)
        places = [1, config.grid**2 + 1, d]
        self.position_embeddings = Parameter(places, dtype) if config.position_embeddings else None
        self.width = d

    def forward(self, op: Any, pixels: ir.Value) -> ir.Value:
        tiles = op.Shape(pixels, start=0, end=1)
        cls = op.Expand(self.cls_token, op.Concat(tiles, [1, self.width], axis=0))
        x = op.Concat(cls, self.patch_embeddings(op, pixels), axis=1)
        return x if self.position_embeddings is None else op.Add(x, self.position_embeddings)


class _Patches(Module):
    def __init__(self, config: VisionConfig, dtype: ir.DataType) -> None:
        super().__init__()
        self.config = config
        self.projection = _PatchConv(config, dtype)

    def forward(self, op: Any, pixels: ir.Value) -> ir.Value:
        maps = op.Reshape(self.projection(op, pixels), [0, self.config.hidden_size, -1])
        return op.Transpose(maps, perm=[0, 2, 1])


class _PatchConv(Module):
    def __init__(self, config: VisionConfig, dtype: ir.DataType) -> None:
        super().__init__()
        self.side = config.patch_size
        self.weight = Parameter([config.hidden_size, config.channels, self.side, self.side], dtype)
        self.bias = Parameter([config.hidden_size], dtype)

    def forward(self, op: Any, pixels: ir.Value) -> ir.Value:
        window = [self.side, self.side]
        return op.Conv(pixels, self.weight, self.bias, kernel_shape=window, strides=window)


class _Encoder(Module):
    def __init__(self, config: VisionConfig, dtype: ir.DataType) -> None:
        super().__init__()
        self.layer = ModuleList([_Layer(config, dtype) for _ in range(config.layers)])
        self.heads = (config.num_heads, config.hidden_size // config.num_heads)

    def forward(self, op: Any, x: ir.Value, size: ir.Value) -> ir.Value:
        heads = layers.shape_of(op, size, *self.heads)
        for layer in self.layer:
            x = layer(op, x, heads)
        return x


class _Layer(Module):
    def __init__(self, config: VisionConfig, dtype: ir.DataType) -> None:
        super().__init__()
        d, epsilon = config.hidden_size, config.layer_norm_eps
        norm = LayerNorm if config.norm_type == "layer_norm" else RMSNorm
        self.layernorm_before = norm(d, epsilon, dtype)
        self.attention = _Attention(config, dtype)
        self.lambda_1 = Parameter([d], dtype)
        self.layernorm_after = norm(d, epsilon, dtype)
        self.mlp = _Mlp(d, config.intermediate_size, config.hidden_act, dtype)
        self.lambda_2 = Parameter([d], dtype)

    def forward(self, op: Any, x: ir.Value, heads: ir.Value) -> ir.Value:
        x = op.Add(x, op.Mul(self.attention(op, self.layernorm_before(op, x), heads), self.lambda_1))
        return op.Add(x, op.Mul(self.mlp(op, self.layernorm_after(op, x)), self.lambda_2))


class _Attention(Module):
    def __init__(self, config: VisionConfig, dtype: ir.DataType) -> None:
        super().__init__()
        d, bias = config.hidden_size, config.attention_bias
        self.width = d
        self.q_proj = Linear(d, d, dtype, bias=bias)
        self.k_proj = Linear(d, d, dtype, bias=bias)
        self.v_proj = Linear(d, d, dtype, bias=bias)
        self.projection_layer = Linear(d, d, dtype, bias=True)
        # Unlike the decoder's, these norms span all heads together, so they come before the split.
        self.q_norm = RMSNorm(d, _QK_EPSILON, dtype) if config.qk_norm else None
        self.k_norm = RMSNorm(d, _QK_EPSILON, dtype) if config.qk_norm else None

    def forward(self, op: Any, x: ir.Value, heads: ir.Value) -> ir.Value:
        q, k, v = self.q_proj(op, x), self.k_proj(op, x), self.v_proj(op, x)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(op, q), self.k_norm(op, k)
        q, k, v = (layers.heads_first(op, op.Reshape(t, heads)) for t in (q, k, v))
        y = layers.heads_first(op, op.Attention(q, k, v))
        return self.projection_layer(op, layers.to_rows(op, y, self.width))


class _Mlp(Module):
    def __init__(self, width: int, inner: int, act: str, dtype: ir.DataType) -> None:
        super().__init__()
        self.fc1 = Linear(width, inner, dtype, bias=True)
        self.fc2 = Linear(inner, width, dtype, bias=True)
        self.act = layers.activation(act)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        return self.fc2(op, self.act(op, self.fc1(op, x)))


class _Projector(Module):
    def __init__(self, config: VisionConfig, dtype: ir.DataType) -> None:
        super().__init__()
        self.layer_norm = LayerNorm(config.shuffled_width, _PROJECTOR_EPSILON, dtype)
        self.linear_1 = Linear(config.shuffled_width, config.text_width, dtype, bias=True)
        self.linear_2 = Linear(config.text_width, config.text_width, dtype, bias=True)
        self.act = layers.activation(config.projector_act)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        return self.linear_2(op, self.act(op, self.linear_1(op, self.layer_norm(op, x))))


def _pixel_shuffle(op: Any, x: ir.Value, config: VisionConfig) -> ir.Value:
    """Trade resolution for width: [T, g·g, d] → [T, (g/n)·(g/n), d·n²] with n = 1 / downsample_ratio.

    Each axis in turn moves n neighbours into the channels; the second transposition restores rows, columns.
    """
    g, n, d = config.grid, round(1 / config.downsample_ratio), config.hidden_size
    x = op.Transpose(op.Reshape(x, [0, g, g // n, d * n]), perm=[0, 2, 1, 3])
    x = op.Transpose(op.Reshape(x, [0, g // n, g // n, d * n * n]), perm=[0, 2, 1, 3])
    return op.Reshape(x, [0, (g // n) ** 2, d * n * n])
