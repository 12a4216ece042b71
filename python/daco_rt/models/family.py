"""What one family of multimodal models says about itself.

Everything above (export, runtime, steering, tests) asks a :class:`FamilySpec` and never a family by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir

    from daco_rt.models.checkpoint import Checkpoint
    from daco_rt.models.config import DecoderConfig


@dataclass(frozen=True)
class FamilySpec:
    """How a family's checkpoints map onto our graphs.

    Attributes
    ----------
    name : what ``--model`` takes.
    architectures : ``architectures`` entries of its ``config.json``; the first names the transformers class.
    text_prefixes : what stands before a canonical text name (``layers.0…``) in a stored tensor's name.
    head_names : stored names of the output head, when it is not tied.
    vision_prefixes : what stands before a canonical vision name (``vision_tower.…``) in a stored name.
    position_axes : P of ``position_ids`` [P, B, S].
    blocks_path : attribute path of the decoder blocks in the transformers model. Each block's output (a bare
        tensor, [B, S, d]) is the whole residual stream there: what dictionaries read and steering edits.
    decoder_config : config.json, head stored? → DecoderConfig.
    vision_shapes : config.json → canonical vision name → shape.
    build_vision : (checkpoint, dtype=, locate=) → the vision graph.
    image_token_id : config.json → the token that stands for one image embedding.
    tokens_per_tile : config.json → image embeddings of one tile.
    image_size : config.json → side of a tile in pixels.
    position_ids : (input_ids [B, S], start [B] or None) → int64 [P, B, S].
    tiny_configs : name → keyword arguments of the transformers configuration class, a few thousand
        parameters each, one for every shape of decoder and tower that the family has.
    redirect : config.json, label → a sentence that names the right checkpoint, for repositories of the same
        models in a layout that is not supported; None if it is not one of those.
    """

    name: str
    architectures: tuple[str, ...]
    text_prefixes: tuple[str, ...]
    head_names: tuple[str, ...]
    vision_prefixes: tuple[str, ...]
    position_axes: int
    blocks_path: str
    decoder_config: Callable[[Mapping[str, Any], bool], DecoderConfig]
    vision_shapes: Callable[[Mapping[str, Any]], dict[str, tuple[int, ...]]]
    build_vision: Callable[..., ir.Model]
    image_token_id: Callable[[Mapping[str, Any]], int]
    tokens_per_tile: Callable[[Mapping[str, Any]], int]
    image_size: Callable[[Mapping[str, Any]], int]
    position_ids: Callable[..., np.ndarray]
    tiny_configs: Callable[[], dict[str, dict[str, Any]]]
    redirect: Callable[[Mapping[str, Any], str], str | None]

    def build_decoder(self, checkpoint: Checkpoint, **options: Any) -> ir.Model:
        """Build the decoder graph of a checkpoint; ``options`` as in ``daco_rt.models.decoder``."""
        from daco_rt.models.decoder import build_decoder

        return build_decoder(checkpoint.decoder, checkpoint.text_weights(), **options)
