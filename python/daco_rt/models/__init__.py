"""Model families: finding a checkpoint, describing it, and rebuilding it as ONNX graphs.

``resolve_checkpoint`` opens a checkpoint without loading it, ``family_of`` says how it maps onto graphs, and
the family builds them. Importing this package loads neither torch nor ONNX.
"""

from daco_rt.models.checkpoint import Checkpoint, check_finite, model_identity
from daco_rt.models.config import DecoderConfig
from daco_rt.models.embedding import TokenEmbedding
from daco_rt.models.family import FamilySpec
from daco_rt.models.registry import families, family, family_of
from daco_rt.models.resolve import resolve_checkpoint

__all__ = [
    "Checkpoint",
    "DecoderConfig",
    "FamilySpec",
    "TokenEmbedding",
    "check_finite",
    "families",
    "family",
    "family_of",
    "model_identity",
    "resolve_checkpoint",
]
