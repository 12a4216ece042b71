"""The parametric decoder as an ONNX graph with a static cache and steered blocks.

The graph is written in the operators that both ONNX Runtime and TensorRT take: the cache is updated by
``TensorScatter`` (in place, when input and output are bound to one buffer), attention is the single-output
``Attention`` with a boolean mask of exactly [B, 1, S, C], no past inputs and no vendor operators.

Inputs: ``inputs_embeds`` [B, S, d], ``position_ids`` int64 [P, B, S], ``write_indices`` int64 [B],
``logits_at`` int64 [B, R], ``policy_slots`` int32 [B, S] (only if a block is steered), ``deepstack.{i}``
(broadcastable to [B, S, d]), ``past_k.{i}`` and ``past_v.{i}`` [B, kv, C, head_dim]. Outputs: ``logits`` fp32
[B, R, V], ``present_k.{i}``, ``present_v.{i}``, and ``doses.{ℓ}`` fp32 [B, S, 2], ``support_index.{ℓ}`` int32
and ``support_value.{ℓ}`` fp32 [B, S, k_out] for each steered block ℓ (the support only if k_out ≥ 1).

Row b writes its S keys to the cache positions write_indices[b], write_indices[b] + 1, …; its query i sees the
cache positions j ≤ write_indices[b] + i. Prompts are padded on the right: what a pad writes is never seen by
a real query before a real token overwrites it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from onnxscript import GraphBuilder
from onnxscript.nn import Module, ModuleList

from daco_rt.artifacts.tensors import TensorRef
from daco_rt.models import layers
from daco_rt.models.config import DecoderConfig
from daco_rt.models.layers import Linear, Locate, RMSNorm, bind_weights, declare

DOMAIN = "ai.daco"
OPERANDS = {
    "SteerSae": ("enc", "enc_bias", "dec", "threshold", "gain", "boost", "undesirable", "shift", "limits",
                 "scales"),
    "SteerPursuit": ("analysis", "bias", "gram", "atoms", "gain", "boost", "undesirable", "shift", "limits",
                     "scales"),
    "SteerAffine": ("a", "a_bias", "b", "shift", "limits"),
}  # fmt: skip
"""Operands of each steering operator after ``z`` and ``slots``, in the order of its inputs."""
_OUTPUTS = {"SteerSae": 4, "SteerPursuit": 4, "SteerAffine": 2}

_INT64, _INT32 = ir.DataType.INT64, ir.DataType.INT32


@dataclass(frozen=True)
class SteerNode:
    """One block's steering: which operator, its attributes, and where its operands lie.

    ``operands`` maps operand names to tensors, normally ``onnx_ir.ExternalTensor``; an operand that is absent
    or ``None`` becomes a missing input. ``slot_map`` is int32 [P]: the slot that this block sees for each
    policy slot. ``k_out`` ≥ 1 adds the support outputs to the graph.
    """

    op_type: str
    attributes: Mapping[str, str | int | float]
    operands: Mapping[str, ir.TensorProtocol | None]
    slot_map: ir.TensorProtocol
    k_out: int = 0


def build_decoder(
    config: DecoderConfig,
    weights: Mapping[str, TensorRef],
    *,
    dtype: str = "fp32",
    locate: Locate | None = None,
    steer: Mapping[int, SteerNode] | None = None,
    functions: Sequence[ir.Function] = (),
    deepstack: int = 0,
) -> ir.Model:
    """Build the decoder graph; no tensor of the checkpoint is read.

    Parameters
    ----------
    config : sizes and switches of the language model.
    weights : canonical tensor name → where it lies (``checkpoint.text_weights()``).
    dtype : ``"fp32"``, ``"fp16"`` or ``"bf16"``: type of embeddings, caches and weights. Logits are fp32 in
        all. ONNX Runtime does not compute in bf16 on CPU; TensorRT does.
    locate : maps a tensor to (path relative to the model file, byte offset); see ``layers.bind_weights``.
    steer : block number → its steering node.
    functions : model-local functions behind the steering operators, for runtimes without our library.
    deepstack : number of leading blocks that get an extra input added to their output, before steering.

    Raises
    ------
    CheckpointError
        A tensor is missing, has another shape, or is stored in another dtype.
    ValueError
        A steered block lies outside the model, or a steering node names an unknown operator or operand.

    Example
    -------
    >>> model = build_decoder(checkpoint.decoder, checkpoint.text_weights())
    >>> onnx_ir.save(model, checkpoint.path / "decoder.onnx")
    """
    nodes = dict(steer or {})
    _check_steer(config, nodes, deepstack)
    kind = layers.float_type(dtype)
    imports = {"": layers.OPSET, **({DOMAIN: 1} if nodes else {})}
    graph = ir.Graph([], [], nodes=[], name="decoder", opset_imports=imports)
    builder = GraphBuilder(graph)
    d, kv, width = config.hidden_size, config.num_kv_heads, config.head_dim

    x = builder.input("inputs_embeds", kind, ["batch", "sequence", d])
    positions = builder.input("position_ids", _INT64, [config.position_axes, "batch", "sequence"])
    write = builder.input("write_indices", _INT64, ["batch"])
    rows = builder.input("logits_at", _INT64, ["batch", "rows"])
    slots = builder.input("policy_slots", _INT32, ["batch", "sequence"]) if nodes else None
    deep = [
        builder.input(f"deepstack.{i}", kind, ["deepstack_batch", "deepstack_sequence", d])
        for i in range(deepstack)
    ]
    cache_shape: list[int | str | None] = ["batch", kv, "cache", width]
    past = [
        (builder.input(f"past_k.{i}", kind, cache_shape), builder.input(f"past_v.{i}", kind, cache_shape))
        for i in range(config.num_layers)
    ]

    module = _Decoder(config, kind, nodes)
    bind_weights(module, weights, dtype, locate, "the decoder")
    logits, present, reports = module(builder.op, x, positions, write, rows, slots, deep, past)

    builder.add_output(declare(logits, ir.DataType.FLOAT, ["batch", "rows", config.vocab_size]), "logits")
    for i, pair in enumerate(present):
        for name, value in zip(("present_k", "present_v"), pair, strict=True):
            builder.add_output(declare(value, kind, ["batch", kv, "cache", width]), f"{name}.{i}")
    for block, values in reports.items():
        names = ("doses", "support_index", "support_value")[: 3 if nodes[block].k_out else 1]
        for name, value in zip(names, values, strict=False):
            builder.add_output(value, f"{name}.{block}")
    return ir.Model(
        graph,
        ir_version=layers.IR_VERSION,
        producer_name="daco_rt",
        functions=list(functions) if nodes else [],
    )


class _Decoder(Module):
    def __init__(self, config: DecoderConfig, dtype: ir.DataType, steer: Mapping[int, SteerNode]) -> None:
        super().__init__()
        self.config, self.dtype, self.steer = config, dtype, steer
        self.layers = ModuleList([_Block(config, dtype) for _ in range(config.num_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        # A tied head *is* the embedding table: giving it that name binds it to the one stored tensor.
        self.head = "embed_tokens" if config.tie_word_embeddings else "lm_head"
        setattr(self, self.head, Linear(config.hidden_size, config.vocab_size, dtype))

    def forward(
        self,
        op: Any,
        embeds: ir.Value,
        positions: ir.Value,
        write: ir.Value,
        rows: ir.Value,
        slots: ir.Value | None,
        deep: Sequence[ir.Value],
        past: Sequence[tuple[ir.Value, ir.Value]],
    ) -> tuple[ir.Value, list[tuple[ir.Value, ir.Value]], dict[int, list[ir.Value]]]:
        c, d = self.config, self.config.hidden_size
        size = op.Shape(embeds, start=0, end=2)
        stream = layers.shape_of(op, size, d)
        heads = (layers.shape_of(op, size, c.num_heads, c.head_dim),
                 layers.shape_of(op, size, c.num_kv_heads, c.head_dim))  # fmt: skip
        cos, sin = _rotary_tables(op, c, positions, self.dtype)
        mask = _visible(op, embeds, write, past[0][0])
        x = layers.to_rows(op, embeds, d)
        present, reports = [], {}
        for i, block in enumerate(self.layers):
            x, keys, values = block(op, x, heads, cos, sin, mask, write, *past[i])
            present.append((keys, values))
            if i < len(deep) or i in self.steer:
                z = declare(op.Reshape(x, stream), self.dtype, ["batch", "sequence", d])
                if i < len(deep):
                    z = declare(op.Add(z, deep[i]), self.dtype, ["batch", "sequence", d])
                if i in self.steer:
                    z, *reports[i] = _steer(op, z, slots, i, self.steer[i], d, self.dtype)
                x = layers.to_rows(op, z, d)
        # Only the rows that will be sampled pass the head: a prefill would otherwise compute S × V logits.
        picked = op.GatherND(op.Reshape(x, stream), op.Unsqueeze(rows, [-1]), batch_dims=1)
        logits = getattr(self, self.head)(op, self.norm(op, layers.to_rows(op, picked, d)))
        if self.dtype != ir.DataType.FLOAT:
            logits = op.Cast(logits, to=ir.DataType.FLOAT)
        return op.Reshape(logits, layers.shape_of(op, op.Shape(rows), c.vocab_size)), present, reports


class _Block(Module):
    def __init__(self, config: DecoderConfig, dtype: ir.DataType) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.self_attn = _Attention(config, dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.mlp = _Mlp(config, dtype)

    def forward(self, op: Any, x: ir.Value, *context: Any) -> tuple[ir.Value, ir.Value, ir.Value]:
        y, keys, values = self.self_attn(op, self.input_layernorm(op, x), *context)
        x = op.Add(x, y)
        return op.Add(x, self.mlp(op, self.post_attention_layernorm(op, x))), keys, values


class _Attention(Module):
    def __init__(self, config: DecoderConfig, dtype: ir.DataType) -> None:
        super().__init__()
        self.config = config
        d, q = config.hidden_size, config.num_heads * config.head_dim
        kv = config.num_kv_heads * config.head_dim
        self.q_proj = Linear(d, q, dtype, bias=config.qkv_bias)
        self.k_proj = Linear(d, kv, dtype, bias=config.qkv_bias)
        self.v_proj = Linear(d, kv, dtype, bias=config.qkv_bias)
        self.o_proj = Linear(q, d, dtype, bias=config.o_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, dtype) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, dtype) if config.qk_norm else None

    def forward(
        self,
        op: Any,
        x: ir.Value,
        heads: tuple[ir.Value, ir.Value],
        cos: ir.Value,
        sin: ir.Value,
        mask: ir.Value,
        write: ir.Value,
        past_k: ir.Value,
        past_v: ir.Value,
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        of_queries, of_keys = heads
        q = op.Reshape(self.q_proj(op, x), of_queries)
        k = op.Reshape(self.k_proj(op, x), of_keys)
        v = op.Reshape(self.v_proj(op, x), of_keys)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(op, q), self.k_norm(op, k)
        q = op.RotaryEmbedding(layers.heads_first(op, q), cos, sin)
        k = op.RotaryEmbedding(layers.heads_first(op, k), cos, sin)
        keys = op.TensorScatter(past_k, k, write, axis=-2)
        values = op.TensorScatter(past_v, layers.heads_first(op, v), write, axis=-2)
        y = op.Attention(q, keys, values, mask)
        y = layers.to_rows(op, layers.heads_first(op, y), self.config.num_heads * self.config.head_dim)
        return self.o_proj(op, y), keys, values


class _Mlp(Module):
    def __init__(self, config: DecoderConfig, dtype: ir.DataType) -> None:
        super().__init__()
        d, ff = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(d, ff, dtype)
        self.up_proj = Linear(d, ff, dtype)
        self.down_proj = Linear(ff, d, dtype)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        gate = layers.activation("silu")(op, self.gate_proj(op, x))
        return self.down_proj(op, op.Mul(gate, self.up_proj(op, x)))


def _rotary_tables(
    op: Any, config: DecoderConfig, positions: ir.Value, dtype: ir.DataType
) -> tuple[ir.Value, ir.Value]:
    """cos and sin [B, S, head_dim / 2] of every position; angles are fp32 in every precision."""
    table = config.inverse_frequencies() * config.section_selector()
    frequency = op.initializer(ir.tensor(table[:, None, None, :], name="rope.frequency"))
    turns = op.Mul(op.Cast(op.Unsqueeze(positions, [-1]), to=ir.DataType.FLOAT), frequency)
    angle = op.ReduceSum(turns, [0], keepdims=0)
    cos, sin = op.Cos(angle), op.Sin(angle)
    if dtype != ir.DataType.FLOAT:
        cos, sin = op.Cast(cos, to=dtype), op.Cast(sin, to=dtype)
    return cos, sin


def _visible(op: Any, x: ir.Value, write: ir.Value, cache: ir.Value) -> ir.Value:
    """bool [B, 1, S, C]: cache position j is seen by query i of row b iff j ≤ write_indices[b] + i."""
    queries = op.Range(0, op.Squeeze(op.Shape(x, start=1, end=2)), 1)
    last = op.Add(op.Unsqueeze(write, [1]), queries)
    keys = op.Range(0, op.Squeeze(op.Shape(cache, start=2, end=3)), 1)
    mask = op.LessOrEqual(keys, op.Unsqueeze(last, [1, 3]))
    return declare(mask, ir.DataType.BOOL, ["batch", 1, "sequence", "cache"])


def _steer(
    op: Any, x: ir.Value, slots: ir.Value | None, block: int, node: SteerNode, width: int, dtype: ir.DataType
) -> list[ir.Value]:
    """Append one block's steering: [z', doses, support_index, support_value], of affine edits [z', doses]."""
    prefix = f"steer.{block}."
    own = op.Gather(op.initializer(node.slot_map, prefix + "slot_map"), slots, axis=0)
    inputs = []
    for name in OPERANDS[node.op_type]:
        tensor = node.operands.get(name)
        inputs.append(None if tensor is None else op.initializer(tensor, prefix + name))
    names = ("steered", "doses", "support_index", "support_value")[: _OUTPUTS[node.op_type]]
    outputs = [ir.Value(name=f"{name}.{block}") for name in names]
    op.builder.call_op(
        node.op_type,
        [x, declare(own, _INT32, ["batch", "sequence"]), *inputs],
        dict(node.attributes),
        domain=DOMAIN,
        outputs=outputs,
        name=f"steer.{block}",
    )
    rows: list[int | str] = ["batch", "sequence"]
    declare(outputs[0], dtype, [*rows, width])
    declare(outputs[1], ir.DataType.FLOAT, [*rows, 2])
    if len(outputs) > 2:
        declare(outputs[2], _INT32, [*rows, node.k_out])
        declare(outputs[3], ir.DataType.FLOAT, [*rows, node.k_out])
    return outputs


def _check_steer(config: DecoderConfig, steer: Mapping[int, SteerNode], deepstack: int) -> None:
    for block, node in steer.items():
        if not 0 <= block < config.num_layers:
            raise ValueError(f"steer: block {block} is outside the model's 0…{config.num_layers - 1}")
        if node.op_type not in OPERANDS:
            known = ", ".join(OPERANDS)
            raise ValueError(f"steer[{block}]: operator {node.op_type!r} is unknown; known: {known}")
        if unknown := sorted(set(node.operands) - set(OPERANDS[node.op_type])):
            raise ValueError(f"steer[{block}]: {node.op_type} has no operand {', '.join(unknown)}")
        if node.k_out and _OUTPUTS[node.op_type] == 2:
            raise ValueError(f"steer[{block}]: {node.op_type} reports no support; k_out must be 0")
    if not 0 <= deepstack <= config.num_layers:
        raise ValueError(f"deepstack: expected 0…{config.num_layers} blocks, got {deepstack}")
