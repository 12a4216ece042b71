"""Sparse autoencoders: activation stores, training from a dictionary, conversion, annotation, the sweep."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from daco_rt.sae.annotate import annotate_sae, label_latents
    from daco_rt.sae.checkpoint import read_metrics
    from daco_rt.sae.feed import RowSource, ShuffledRows, StoreSource
    from daco_rt.sae.harvest import LiveSource, TextReader, harvest_activations
    from daco_rt.sae.jumprelu import convert_to_jumprelu
    from daco_rt.sae.settings import SaeTraining
    from daco_rt.sae.store import ActivationStore, create_store, open_store
    from daco_rt.sae.sweep import SweepPoint, choose_point, sweep_policies
    from daco_rt.sae.train import train_sae

_HOMES = {
    "annotate": ("annotate_sae", "label_latents"),
    "checkpoint": ("read_metrics",),
    "feed": ("RowSource", "ShuffledRows", "StoreSource"),
    "harvest": ("LiveSource", "TextReader", "harvest_activations"),
    "jumprelu": ("convert_to_jumprelu",),
    "settings": ("SaeTraining",),
    "store": ("ActivationStore", "create_store", "open_store"),
    "sweep": ("SweepPoint", "choose_point", "sweep_policies"),
    "train": ("train_sae",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "ActivationStore",
    "LiveSource",
    "RowSource",
    "SaeTraining",
    "ShuffledRows",
    "StoreSource",
    "SweepPoint",
    "TextReader",
    "annotate_sae",
    "choose_point",
    "convert_to_jumprelu",
    "create_store",
    "harvest_activations",
    "label_latents",
    "open_store",
    "read_metrics",
    "sweep_policies",
    "train_sae",
]


def __getattr__(name: str) -> Any:
    # Opening a store or annotating must not cost the import of torch.
    if name in _HOME_OF:
        return getattr(import_module(f"daco_rt.sae.{_HOME_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
