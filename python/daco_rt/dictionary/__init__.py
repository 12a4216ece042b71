"""Concept dictionaries: directions from concept means, diagnostics, the ones that come with the package."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from daco_rt.dictionary.shipped import dictionary_for, shipped_dictionaries

if TYPE_CHECKING:
    from daco_rt.dictionary.directions import block_directions, build_dictionary
    from daco_rt.dictionary.identify import Identification, identify
    from daco_rt.dictionary.neighbours import open_atoms
    from daco_rt.dictionary.report import diagnose

__all__ = [
    "Identification",
    "block_directions",
    "build_dictionary",
    "diagnose",
    "dictionary_for",
    "identify",
    "open_atoms",
    "shipped_dictionaries",
]

_MODULES = {
    "Identification": "identify",
    "block_directions": "directions",
    "build_dictionary": "directions",
    "diagnose": "report",
    "identify": "identify",
    "open_atoms": "neighbours",
}


def __getattr__(name: str) -> Any:
    # Looking a dictionary up must not cost the import of torch.
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
