"""Concepts: words with a label and a gloss, and short texts in which each of them is said."""

from __future__ import annotations

from daco_rt.concepts.everyday import ConceptEntry, everyday_concepts, read_entries
from daco_rt.concepts.stimuli import ORDINARY_TEXTS, Stimulus, stimuli_for

__all__ = [
    "ORDINARY_TEXTS",
    "ConceptEntry",
    "Stimulus",
    "everyday_concepts",
    "read_entries",
    "stimuli_for",
]
