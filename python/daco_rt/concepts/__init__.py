"""Concepts: which there are, what they are labelled, and short texts in which each of them is said."""

from __future__ import annotations

from daco_rt.concepts.everyday import ConceptEntry, everyday_concepts, read_entries
from daco_rt.concepts.labels import HandTable, Label, Labeller, apply_labels
from daco_rt.concepts.mention import WordIndex, find_word
from daco_rt.concepts.rules import LabelRules, load_rules
from daco_rt.concepts.select import select_concepts
from daco_rt.concepts.stimuli import ORDINARY_TEXTS, Stimulus, stimuli_for
from daco_rt.concepts.table import WordConcept, count_labels, load_table, save_table, shipped_table
from daco_rt.concepts.texts import (
    StimulusSet,
    TextStimulus,
    load_stimuli,
    make_stimuli,
    save_stimuli,
    texts_for,
)
from daco_rt.concepts.wordnet import Synset, WordNet, find_wordnet

__all__ = [
    "ORDINARY_TEXTS",
    "ConceptEntry",
    "HandTable",
    "Label",
    "LabelRules",
    "Labeller",
    "Stimulus",
    "StimulusSet",
    "Synset",
    "TextStimulus",
    "WordConcept",
    "WordIndex",
    "WordNet",
    "apply_labels",
    "count_labels",
    "everyday_concepts",
    "find_word",
    "find_wordnet",
    "load_rules",
    "load_stimuli",
    "load_table",
    "make_stimuli",
    "read_entries",
    "save_stimuli",
    "save_table",
    "select_concepts",
    "shipped_table",
    "stimuli_for",
    "texts_for",
]
