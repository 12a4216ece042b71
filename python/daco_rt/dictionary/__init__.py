"""Concept dictionaries: measuring directions on a model, and finding the ones that come with the package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from daco_rt.dictionary.shipped import dictionary_for, shipped_dictionaries

if TYPE_CHECKING:
    from daco_rt.dictionary.directions import Directions, build_dictionary, measure_directions

__all__ = [
    "Directions",
    "build_dictionary",
    "dictionary_for",
    "measure_directions",
    "shipped_dictionaries",
]


def __getattr__(name: str) -> Any:
    # Looking a dictionary up must not cost the import of torch.
    if name in ("Directions", "build_dictionary", "measure_directions"):
        from daco_rt.dictionary import directions

        return getattr(directions, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
