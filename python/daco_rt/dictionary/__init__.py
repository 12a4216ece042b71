"""Concept dictionaries: concepts read on a model, their directions, and what comes with the package."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from daco_rt.dictionary.shipped import dictionary_for, shipped_dictionaries

if TYPE_CHECKING:
    from daco_rt.dictionary.directions import Directions, block_directions, build_dictionary
    from daco_rt.dictionary.harvest import harvest_means
    from daco_rt.dictionary.heard import Heard, find_heard, without_heard
    from daco_rt.dictionary.identification import Identification, identify
    from daco_rt.dictionary.items import HarvestItem, ItemTable, table_concepts, text_items
    from daco_rt.dictionary.means import ConceptMeans, open_means
    from daco_rt.dictionary.neighbours import open_atoms
    from daco_rt.dictionary.report import diagnose

_HOMES = {
    "directions": ("Directions", "block_directions", "build_dictionary"),
    "harvest": ("harvest_means",),
    "heard": ("Heard", "find_heard", "without_heard"),
    "identification": ("Identification", "identify"),
    "items": ("HarvestItem", "ItemTable", "table_concepts", "text_items"),
    "means": ("ConceptMeans", "open_means"),
    "neighbours": ("open_atoms",),
    "report": ("diagnose",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "ConceptMeans",
    "Directions",
    "HarvestItem",
    "Heard",
    "Identification",
    "ItemTable",
    "block_directions",
    "build_dictionary",
    "diagnose",
    "dictionary_for",
    "find_heard",
    "harvest_means",
    "identify",
    "open_atoms",
    "open_means",
    "shipped_dictionaries",
    "table_concepts",
    "text_items",
    "without_heard",
]


def __getattr__(name: str) -> Any:
    # Looking a dictionary up must not cost the import of torch.
    if name in _HOME_OF:
        return getattr(import_module(f"daco_rt.dictionary.{_HOME_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
