"""The steering operators.

- :func:`steer_sae`, :func:`steer_pursuit`, :func:`steer_affine`, :func:`build_gram`: on torch tensors
  (loaded on first use);
- :func:`quantise`: weights in one byte, of either library;
- :mod:`daco_rt.ops.numpy`: the same kernels on NumPy arrays, without torch;
- :mod:`daco_rt.ops.reference`: the definition in float64, one row at a time.

Operators with a code return :class:`Steered`, affine edits :class:`SteeredAffine`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from daco_rt.ops.quantise import quantise
from daco_rt.ops.reference import Steered, SteeredAffine

if TYPE_CHECKING:
    from daco_rt.ops.torch_ops import build_gram, steer_affine, steer_pursuit, steer_sae

__all__ = [
    "Steered",
    "SteeredAffine",
    "build_gram",
    "quantise",
    "steer_affine",
    "steer_pursuit",
    "steer_sae",
]


def __getattr__(name: str) -> Any:
    if name in ("build_gram", "steer_affine", "steer_pursuit", "steer_sae"):
        from daco_rt.ops import torch_ops

        function = getattr(torch_ops, name)
        globals()[name] = function
        return function
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
