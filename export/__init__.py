"""Export: from a checkpoint and a concept pack to a bundle that any ONNX Runtime can serve, steered.

``export_model`` writes a bundle, ``verify_bundle`` proves it. Both load their heavy parts when called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from daco_rt.export.bundle import export_model as export_model
    from daco_rt.export.bundle import parse_layers as parse_layers
    from daco_rt.export.verify import verify_bundle as verify_bundle

_PUBLIC = {"export_model": "bundle", "parse_layers": "bundle", "verify_bundle": "verify"}
__all__ = ["export_model", "parse_layers", "verify_bundle"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'daco_rt.export' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"daco_rt.export.{_PUBLIC[name]}"), name)
