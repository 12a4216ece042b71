"""A decoder with random weights, one token a step, static cache: what steering is timed inside of.

The blocks are those of a 7B model of the Qwen2.5 family: RMSNorm, grouped-query attention with biases on q,
k and v, rotary positions, SwiGLU. Projections that read the same input are one matrix. Nothing is allocated
that a CUDA graph could not replay, and a step reads every weight once, so its floor is the bytes of the
weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Steer = Callable[[Tensor], Tensor]
"""An edit of a block's output [B, d]."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder; ``context`` is the length of the cache."""

    layers: int = 28
    dim: int = 3_584
    feed: int = 18_944
    heads: int = 28
    kv_heads: int = 4
    head_dim: int = 128
    vocab: int = 152_064
    context: int = 512

    @property
    def weights(self) -> int:
        """Numbers that a step reads: all weights but the table of embeddings."""
        qkv = (self.heads + 2 * self.kv_heads) * self.head_dim
        block = self.dim * qkv + self.heads * self.head_dim * self.dim + 3 * self.dim * self.feed
        return self.layers * block + self.vocab * self.dim


TINY = Shape(layers=3, dim=64, feed=96, heads=4, kv_heads=2, head_dim=16, vocab=128, context=8)


@dataclass(frozen=True)
class Block:
    """Weights of one block, and its cache."""

    norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor
    out: Tensor
    norm_feed: Tensor
    gate_up: Tensor
    down: Tensor
    keys: Tensor
    values: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """In the order that ``block_step`` takes them."""
        return (self.norm, self.qkv, self.qkv_bias, self.out, self.norm_feed, self.gate_up, self.down,
                self.keys, self.values)  # fmt: skip


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """x [B, d] by its root mean square, in fp32."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight


def block_step(
    h: Tensor, position: Tensor, cosine: Tensor, sine: Tensor, heads: int, kv_heads: int, norm: Tensor,
    qkv: Tensor, qkv_bias: Tensor, out: Tensor, norm_feed: Tensor, gate_up: Tensor, down: Tensor,
    keys: Tensor, values: Tensor,
) -> Tensor:  # fmt: skip
    """One block on a token of each sequence: h [B, d] → [B, d]; keys and values go to ``position`` [1]."""
    batch, size = h.shape[0], cosine.shape[-1]
    mixed = F.linear(rms_norm(h, norm), qkv, qkv_bias).view(batch, heads + 2 * kv_heads, size)
    turned = mixed[:, : heads + kv_heads]
    half = size // 2
    swapped = torch.cat((-turned[..., half:], turned[..., :half]), dim=-1)
    turned = turned * cosine + swapped * sine
    keys.index_copy_(2, position, turned[:, heads:].unsqueeze(2))
    values.index_copy_(2, position, mixed[:, heads + kv_heads :].unsqueeze(2))
    q = turned[:, :heads].reshape(batch, kv_heads, heads // kv_heads, size)
    scores = (q @ keys.transpose(2, 3)).float() * size**-0.5
    hidden = torch.arange(keys.shape[2], device=h.device) > position
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1).to(h.dtype)
    h = h + F.linear((weights @ values).reshape(batch, heads * size), out)
    gate, up = F.linear(rms_norm(h, norm_feed), gate_up).chunk(2, dim=-1)
    return h + F.linear(F.silu(gate) * up, down)


def head_step(h: Tensor, norm: Tensor, head: Tensor) -> Tensor:
    """Logits [B, vocab] of h [B, d]."""
    return F.linear(rms_norm(h, norm), head)


class Decoder:
    """Random weights in bf16 and a step that can be captured.

    Parameters
    ----------
    batch : sequences that go one token further in a step.
    compiled : whether the block and the head go through ``torch.compile``, which fuses what lies between the
        matrix products; without it those small kernels take longer than the matrices of one token.
    tuned : whether the compiler may also write the products of one row itself and search for their tiles,
        which takes it minutes instead of half a minute.
    """

    def __init__(
        self, shape: Shape, batch: int, device: torch.device, *, compiled: bool, tuned: bool = False
    ) -> None:
        self.shape, self.batch = shape, batch
        draw = torch.Generator(device).manual_seed(0)

        def weight(*size: int) -> Tensor:
            spread = size[-1] ** -0.5
            return torch.randn(*size, generator=draw, device=device, dtype=torch.bfloat16) * spread

        def ones() -> Tensor:
            return torch.ones(shape.dim, device=device, dtype=torch.bfloat16)

        size, both = shape.head_dim, shape.heads + 2 * shape.kv_heads
        cache = (batch, shape.kv_heads, shape.context, size)
        self.blocks = [
            Block(
                ones(), weight(both * size, shape.dim), weight(both * size),
                weight(shape.dim, shape.heads * size), ones(), weight(2 * shape.feed, shape.dim),
                weight(shape.dim, shape.feed), weight(*cache), weight(*cache),
            )
            for _ in range(shape.layers)
        ]  # fmt: skip
        self.norm, self.head = ones(), weight(shape.vocab, shape.dim)
        self.h = weight(batch, shape.dim) * shape.dim**0.5
        self.position = torch.full((1,), shape.context - 2, device=device)
        turns = 1e6 ** (-torch.arange(0, size, 2, device=device) / size) * (shape.context - 2)
        self.cosine = torch.cat((turns.cos(), turns.cos())).bfloat16()
        self.sine = torch.cat((turns.sin(), turns.sin())).bfloat16()
        self.logits = torch.empty(batch, shape.vocab, device=device, dtype=torch.bfloat16)
        # Sizes are constants to the compiler: a second batch size in one process would make them symbols.
        how = {"dynamic": False, "options": {"coordinate_descent_tuning": tuned}}
        self._block: Callable[..., Tensor] = torch.compile(block_step, **how) if compiled else block_step
        self._head: Callable[..., Tensor] = torch.compile(head_step, **how) if compiled else head_step

    def step(self, steering: Mapping[int, Steer]) -> None:
        """One token of every sequence, from ``h`` to ``logits``; ``steering`` edits its blocks' outputs."""
        h, shape = self.h, self.shape
        for number, block in enumerate(self.blocks):
            h = self._block(
                h, self.position, self.cosine, self.sine, shape.heads, shape.kv_heads, *block.tensors()
            )
            if number in steering:
                h = steering[number](h)
        self.logits.copy_(self._head(h, self.norm, self.head))

    def floor_bytes(self) -> int:
        """Bytes that a step cannot do without: weights and cache, each once."""
        cache = (
            2
            * self.batch
            * self.shape.kv_heads
            * self.shape.context
            * self.shape.head_dim
            * self.shape.layers
        )
        return 2 * (self.shape.weights + cache)
