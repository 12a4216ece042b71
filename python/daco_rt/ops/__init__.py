"""The steering operators.

- :func:`steer_sae`, :func:`steer_pursuit`, :func:`build_gram`: on torch tensors (loaded on first use);
- :mod:`daco_rt.ops.numpy`: the same kernels on NumPy arrays, without torch;
- :mod:`daco_rt.ops.reference`: the definition in float64, one row at a time.

All return :class:`Steered`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from daco_rt.ops.reference import Steered

if TYPE_CHECKING:
    from daco_rt.ops.torch_ops import build_gram, steer_pursuit, steer_sae

__all__ = ["Steered", "build_gram", "steer_pursuit", "steer_sae"]


def __getattr__(name: str) -> Any:
    if name in ("build_gram", "steer_pursuit", "steer_sae"):
        from daco_rt.ops import torch_ops

        function = getattr(torch_ops, name)
        globals()[name] = function
        return function
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
