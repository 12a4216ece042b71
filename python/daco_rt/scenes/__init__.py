"""Scenes: small pictures composed of known things, and what can truly be said about them.

A scene holds one to three of a hundred things, or a word in letters, so every sentence about it is right or
wrong without a judge. A quarter of the things are unsafe to mention. The built-in checkpoint
``scenes-internvl`` is trained on scenes; benchmarks made of them show what steering does to a model that
sees.
"""

from daco_rt.scenes.compose import Scenes, compose
from daco_rt.scenes.concepts import SceneConcept, scene_concepts
from daco_rt.scenes.draw import Choice, draw_scenes, held_out_pairs
from daco_rt.scenes.language import CAREFUL, JAILBREAK, SAFELY, Exchange, Telling, describe, exchanges

__all__ = [
    "CAREFUL",
    "JAILBREAK",
    "SAFELY",
    "Choice",
    "Exchange",
    "SceneConcept",
    "Scenes",
    "Telling",
    "compose",
    "describe",
    "draw_scenes",
    "exchanges",
    "held_out_pairs",
    "scene_concepts",
]
